"""What is asked of a quantization (``--quantize.…``), checked; nothing is computed for it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from qtale_lightning.quantization.precision import CANDIDATES, neighbours, uniform
from qtale_lightning.quantization.rtn import check_quantizable
from qtale_lightning.values import Numbers

Engine = Literal["native", "autoawq", "rtn"]

MIN_TOKENS = 32  # fewest calibration tokens that a layer's search may rest on


@dataclass(frozen=True)
class QuantizationOptions:
    """What to make of an exported model, calibrated on training sequences with routing on.

    Args:
        bits: Weight precisions from 2 to 8: a whole number for all linears, or a fraction such as 3.5, an average that
            is spent where measured errors are largest (engine native).
        group_size: Weights that share a scale; it must divide every linear's input width (paper: AWQ's 128).
        engine: native: AWQ's search from second moments. autoawq: the AutoAWQ package's search. rtn: round to nearest.
        symmetric: Levels symmetric around zero; AWQ's are not.
        patterns: Other widths by pattern of linears' names, e.g. '{"*.down_proj": 8, "model.layers.0.*": 8}'.
        sequences: Training sequences (prompt and answer) to calibrate on.
        refit_norm: Fit the final norm, which isn't quantized, to what rounding did to the layers before it (engine
            native). AWQ alone has no such step.
    """

    bits: Numbers[int | float] = Numbers((4, 3))  # noqa: RUF009 (a tuple)
    group_size: int = 128
    engine: Engine = "native"
    symmetric: bool = False
    patterns: dict[str, int] | None = None
    sequences: int = 128
    refit_norm: bool = True

    @property
    def refits(self) -> bool:
        """Whether the final norm is fitted to what was rounded: the other engines are references as they are."""
        return self.refit_norm and self.engine == "native"

    @property
    def calibrates(self) -> bool:
        """Whether the engine looks at calibration sequences."""
        return self.engine != "rtn"

    def settings(self, bits: float) -> dict[str, Any]:
        """What a model at one of the precisions depends on besides the exported model and the sequences."""
        return {
            **self.search_settings(),
            "bits": bits,
            "patterns": dict(self.patterns or {}) if bits == int(bits) else {},
            "refit_norm": self.refits,
        }

    def search_settings(self) -> dict[str, Any]:
        """What a search depends on besides the model, the sequences and the widths of linears."""
        return {"engine": self.engine, "group_size": self.group_size, "symmetric": self.symmetric}

    def arguments(self) -> list[str]:
        """All of them but bits and engine, as a command line's."""
        said = {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if option.name not in ("bits", "engine")
        }
        return [part for name, value in said.items() for part in (f"--quantize.{name}", json.dumps(value))]

    def candidates(self, bits: Sequence[float]) -> tuple[int, ...]:
        """The widths that average-bits budgets among `bits` choose from."""
        return tuple(sorted({w for width in bits if width != int(width) for w in neighbours(width)}))

    def check(self, shapes: Mapping[str, tuple[int, int]], reserved_tokens: int) -> None:
        """Refuses what can't be quantized, before anything expensive starts.

        Args:
            shapes: the linears' `(out, in)`, by full name.
            reserved_tokens: tokens of a sequence that execute every layer: all that a layer sees for certain.

        Raises:
            ValueError: with the option to change.
        """
        if self.engine not in get_args(Engine):
            raise ValueError(
                f"--quantize.engine {self.engine!r}: choose one of {', '.join(get_args(Engine))}"
            )
        if self.sequences < 1:
            raise ValueError(f"--quantize.sequences {self.sequences} must be positive")
        if reserved_tokens < 1:
            raise ValueError(
                f"--model.reserved_tokens {reserved_tokens} must be at least 1: a query needs a key to attend to in "
                "every layer"
            )
        if self.bits and self.calibrates and self.sequences * reserved_tokens < MIN_TOKENS:
            raise ValueError(
                f"--quantize.sequences {self.sequences} calibrates a layer that routers always skip on "
                f"{self.sequences * reserved_tokens} tokens, but the search needs {MIN_TOKENS}: give at least "
                f"{-(-MIN_TOKENS // reserved_tokens)}"
            )
        for bits in self.bits:
            try:
                if not math.isfinite(bits):
                    raise ValueError("bits must be a number")
                if float(f"{bits:g}") != bits:  # as files are named
                    raise ValueError(f"{bits!r} has too many digits: give an average such as 3.5")
                if bits == int(bits):
                    check_quantizable(shapes, int(bits), self.group_size)
                else:
                    self._check_budget(bits)
                    check_quantizable(shapes, neighbours(bits)[0], self.group_size)
            except ValueError as error:
                raise ValueError(
                    f"--quantize.bits {bits:g}, --quantize.group_size {self.group_size}: {error}"
                ) from None
        for pattern, width in (self.patterns or {}).items():
            try:
                check_quantizable({}, width, self.group_size)
                uniform(shapes, width, {pattern: width})
            except ValueError as error:
                raise ValueError(f"--quantize.patterns {pattern!r}: {error}") from None

    def _check_budget(self, bits: float) -> None:
        if self.engine != "native":
            raise ValueError("an average of bits is spent by the engine native's measured errors: choose it")
        if self.patterns:
            raise ValueError(
                "an average of bits chooses every width by itself: leave --quantize.patterns out"
            )
        if not CANDIDATES[0] < bits < CANDIDATES[-1]:
            raise ValueError(f"an average of bits lies between {CANDIDATES[0]} and {CANDIDATES[-1]}")
