"""Numbers that aren't finite are named where they turn up, and never saved."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


class NonFiniteError(ValueError):
    """A number is NaN or infinite; the message says which, and what is likely to have made it."""


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first name whose tensor holds NaN or infinity; of a sharded one, this process' part is looked at."""
    for name, tensor in tensors:
        if not (tensor.to_local() if hasattr(tensor, "to_local") else tensor).isfinite().all():
            return name
    return None


def check_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Refuse to go on with tensors, by name, that hold NaN or infinity.

    Args:
        what: What they are, what is not done with them and what to do, as the message's end.

    Raises:
        NonFiniteError: One isn't finite; it is named.
    """
    if (name := first_non_finite(tensors)) is not None:
        raise NonFiniteError(f"{name} has NaN or infinity: {what}")


def as_json(value: Any) -> Any:
    """A nested value without NaN and infinities, which JSON doesn't have: they are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return value
