"""What is asked of a quantization (``--quantize.…``), checked; nothing is computed for it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from qtale_lightning.quantization.engines import DEFAULT, ENGINES, Engine, find
from qtale_lightning.quantization.precision import CANDIDATES, neighbours, uniform
from qtale_lightning.quantization.rtn import check_quantizable
from qtale_lightning.values import Numbers

MIN_TOKENS = 32  # fewest calibration tokens that a layer's search may rest on


@dataclass(frozen=True)
class QuantizationOptions:
    """What to make of an exported model, calibrated on training sequences with routing on.

    Args:
        bits: Weight precisions from 2 to 8: a whole number for all linears, or a fraction such as 3.5, an average that
            is spent where measured errors are largest (by an engine that measures them).
        group_size: Weights that share a scale; it must divide every linear's input width (paper: AWQ's 128).
        engine: What searches. ENGINES
        symmetric: Levels symmetric around zero; AWQ's are not.
        patterns: Other widths by pattern of linears' names, e.g. '{"*.down_proj": 8, "model.layers.0.*": 8}'.
        sequences: Training sequences (prompt and answer) to calibrate on.
        refit_norm: Fit the final norm, which isn't quantized, to what rounding did to the layers before it. Engines
            that are references as they are have no such step.
        refit_routers: Fit the routers' last linear, which isn't quantized, to the stream that quantized layers give, so
            that the decisions are those of the model before; with any engine.
        sequential: Calibrate each layer on what the quantized layers before it give, not on what the model's own do; by
            default as the engine was published. IN_ORDER
        options: The engine's own, e.g. '{"act_order": true}'. EXPLAINED
    """

    bits: Numbers[int | float] = Numbers((4, 3))  # noqa: RUF009 (a tuple)
    group_size: int = 128
    engine: str = DEFAULT
    symmetric: bool = False
    patterns: dict[str, int] | None = None
    sequences: int = 128
    refit_norm: bool = True
    refit_routers: bool = False
    sequential: bool | None = None
    options: dict[str, bool | int | float | str] | None = None

    @property
    def declared(self) -> Engine:
        """The engine.

        Raises:
            ValueError: There is none of that name.
        """
        return find(self.engine)

    @property
    def refits(self) -> bool:
        """Whether the final norm is fitted to what was rounded."""
        return self.refit_norm and self.declared.refits

    @property
    def calibrates(self) -> bool:
        """Whether something looks at calibration sequences: the engine, or the routers' fit."""
        return self.declared.calibrates or self.refit_routers

    @property
    def in_order(self) -> bool:
        """Whether layers see what quantized ones give."""
        return self.declared.sequential if self.sequential is None else self.sequential

    @property
    def search_options(self) -> dict[str, Any]:
        """What the engine's search takes besides widths, groups and symmetry: its own options, as declared or given."""
        return {**self._own, **({"sequential": self.in_order} if self.declared.calibrates else {})}

    @property
    def _own(self) -> dict[str, Any]:
        return {**self.declared.options, **(self.options or {})}

    @property
    def lowest(self) -> int:
        """The narrowest width that can be had: where one folder holds several, by its options."""
        return int(self._own["lowest"]) if self.declared.holds else min(self.declared.widths)

    def of_engine(self, name: str) -> "QuantizationOptions":
        """The same of another engine, as far as it has them: its own options are as declared."""
        if name == self.engine:
            return self
        sequential = self.sequential if find(name).calibrates else None
        return replace(self, engine=name, options=None, sequential=sequential)

    def settings(self, bits: float) -> dict[str, Any]:
        """What a model at one of the precisions depends on besides the exported model and the sequences."""
        return {
            **self.search_settings(),
            "bits": self.declared.held(bits),
            "patterns": dict(self.patterns or {}) if bits == int(bits) else {},
            "refit_norm": self.refits,
            "refit_routers": self.refit_routers,
        }

    def search_settings(self) -> dict[str, Any]:
        """What a search depends on besides the model, the sequences and the widths of linears."""
        return {
            "engine": self.engine,
            "options": self._own,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "sequential": self.in_order,
        }

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
        try:
            engine = self.declared
        except ValueError as error:
            raise ValueError(f"--quantize.engine {error}") from None
        try:
            engine.check_options(self.options or {}, len({name.rsplit(".", 2)[0] for name in shapes}))
        except ValueError as error:
            raise ValueError(f"--quantize.options: {error}") from None
        if self.sequential and not engine.calibrates:
            raise ValueError(
                f"--quantize.sequential: the engine {engine.name} looks at no sequences, leave it out"
            )
        if engine.holds and (self.patterns or self.refit_routers):
            option = "patterns" if self.patterns else "refit_routers"
            raise ValueError(
                f"--quantize.{option} is of one precision, and a folder of the engine {engine.name} holds several: "
                "leave it out, or choose another engine"
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
                    self._check_width(int(bits))
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
                self._check_width(width)
                uniform(shapes, width, {pattern: width})
            except ValueError as error:
                raise ValueError(f"--quantize.patterns {pattern!r}: {error}") from None

    def _check_width(self, width: int) -> None:
        widths = self.declared.widths
        if width not in widths:
            raise ValueError(
                f"the engine {self.engine} works at {', '.join(map(str, widths))} bits, not at {width}"
            )
        if width < self.lowest:
            raise ValueError(
                f"--quantize.options has lowest {self.lowest}, so that nothing is held at {width} bits"
            )

    def _check_budget(self, bits: float) -> None:
        if not self.declared.averages:
            able = " or ".join(name for name, engine in ENGINES.items() if engine.averages)
            raise ValueError(
                f"an average of bits is spent by measured errors, and {self.engine} measures none: choose "
                f"--quantize.engine {able}"
            )
        if self.patterns:
            raise ValueError(
                "an average of bits chooses every width by itself: leave --quantize.patterns out"
            )
        if not CANDIDATES[0] < bits < CANDIDATES[-1]:
            raise ValueError(f"an average of bits lies between {CANDIDATES[0]} and {CANDIDATES[-1]}")


_TITLES = " ".join(f"{name}: {engine.title}." for name, engine in ENGINES.items())
_OPTIONS = " ".join(
    f"{name}: {engine.explained} (by default {json.dumps(dict(engine.options))})."
    for name, engine in ENGINES.items()
    if engine.options
)
_IN_ORDER = (
    f"With {' and '.join(name for name, engine in ENGINES.items() if engine.sequential)} true, else false."
)
for _word, _said in (
    ("ENGINES", _TITLES),
    ("EXPLAINED", _OPTIONS),
    ("IN_ORDER", _IN_ORDER),
):  # as --help shows it
    QuantizationOptions.__doc__ = (QuantizationOptions.__doc__ or "").replace(_word, _said)
