"""The types of single values in `results.json`, with their ranges."""

from typing import Annotated

from pydantic import Discriminator, Field, Tag

Number = Annotated[float, Field(allow_inf_nan=False)]
Quantity = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Bits = Annotated[int | float, Field(ge=1, le=32)]
"""Of a weight's code; a fraction is the average over linears of several widths."""
Threshold = Fraction | None
"""θ: a token executes a layer iff p(execute) >= θ. None: a model without routers."""
Thresholds = Annotated[
    Annotated[Threshold, Tag("one")] | Annotated[list[Fraction], Tag("by layer")],
    Discriminator(lambda theta: "by layer" if isinstance(theta, list) else "one"),
]
"""One θ for all layers, or one a routed layer, in order."""
