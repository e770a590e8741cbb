"""What there is to measure: an entry is one search, on one calibration set, and gives a row for each model from it."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

from torch import Tensor

from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.engines import find
from qtale_lightning.quantization.linear import QuantizedLinear
from qtale_lightning.quantization.options import QuantizationOptions
from quantizers.cost import Cost, measured
from quantizers.judge import Judge
from quantizers.peer import auto_round
from quantizers.searching import search

COMPARED = ("native", "autoawq", "signround", "nested", "auto-round")  # on every set of calibration sequences
# Seconds of a search over those of `native`'s, roughly (SmolLM2-135M), until the engine has been measured; of learned
# ones at 200 steps.
ROUGHLY = {"none": 0.0, "rtn": 0.0, "native": 1.0, "gptq": 1.0, "autoawq": 21.0}
ROUGHLY_LEARNED = {"signround": 6.5, "nested": 25.0, "auto-round": 11.0}
STEPS = " steps"  # ends the name of a search by fewer of them

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A search.

    Attributes:
        engine: Its name in the table, and before a comma the engine's own.
        bits: Of the models that it gives.
        number: Of its calibration set.
        run: Searches and judges.
        also: Further names in the table, of what the same search gives.
        steps: That it learns in; 0: it doesn't.
    """

    engine: str
    bits: tuple[float, ...]
    number: int
    run: Callable[[], Rows]
    also: tuple[str, ...] = ()
    steps: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """In the table."""
        return (self.engine, *self.also)

    def __str__(self) -> str:
        return f"{self.engine}:{'+'.join(f'{one:g}' for one in self.bits)}:{self.number}"

    def chosen(self, patterns: list[str]) -> bool:
        """Whether a pattern, `engine`, `engine:bits` or `engine:bits:set`, fits it; all do where there are none."""
        return not patterns or any(
            fnmatch(str(self), one) or fnmatch(str(self), f"{one}:*") for one in patterns
        )

    @property
    def roughly(self) -> float:
        """Its seconds over those of `native`."""
        name = self.engine.split(",")[0]
        return ROUGHLY_LEARNED[name] * self.steps / 200 if self.steps else ROUGHLY[name]


def entries(args: Namespace, judge: Judge) -> list[Entry]:
    """All that the arguments ask for: set by set, so that what is compared is soon there for one."""
    found = [Entry("none", (16,), 0, lambda: [judge.row(judge.model, 16, "none", 0, Cost())])]
    for name, (widths, options) in _variants(args).items():
        found += [
            _searched(judge, name, options, bits, n)
            for bits in widths
            for n in _sets(args, judge, name, bits)
        ]
    if args.nested:
        options = _options(args, {"engine": "nested", "options": {"steps": args.steps}})
        found += [_nested(judge, options, number) for number in range(len(judge.sets))]
    if args.peers:
        found += [
            Entry("auto-round", (bits,), number, partial(_peer, args, judge, bits, number), steps=args.steps)
            for bits in args.signround_bits
            for number in range(len(judge.sets))
        ]
    return sorted((one for one in found if one.chosen(args.only)), key=lambda one: one.number)


def _variants(args: Namespace) -> dict[str, tuple[list[float], QuantizationOptions]]:
    """By name in the table, the bits and how they are searched for."""
    whole = [bits for bits in args.bits if bits == int(bits)]
    learned = {"engine": "signround", "options": {"steps": args.steps}}
    given: dict[str, tuple[list[float], dict[str, Any]]] = {
        "native": (args.bits, {}),
        "rtn": (whole, {"engine": "rtn"}),
        "gptq": (whole, {"engine": "gptq"}),
        "gptq, act order": (whole, {"engine": "gptq", "options": {"act_order": True}}),
        "autoawq": (args.autoawq_bits, {"engine": "autoawq"}),
        "signround": (args.signround_bits, learned),
    }
    for steps in args.fewer_steps:
        given[f"signround, {steps}{STEPS}"] = (args.signround_bits, learned | {"options": {"steps": steps}})
    if args.sequential:
        given["signround, model's inputs"] = (args.signround_bits, learned | {"sequential": False})
        for name in ("native", "gptq", "gptq, act order"):
            given[f"{name}, sequential"] = (given[name][0], given[name][1] | {"sequential": True})
    return {name: (widths, _options(args, more)) for name, (widths, more) in given.items()}


def _options(args: Namespace, more: Mapping[str, Any]) -> QuantizationOptions:
    return QuantizationOptions(group_size=args.group_size, **more)


def _steps(options: QuantizationOptions) -> int:
    """Of an engine that learns; 0 of others."""
    return int((options.options or {}).get("steps", 0))


def _sets(args: Namespace, judge: Judge, name: str, bits: float) -> Iterator[int]:
    compared = name in COMPARED or name.endswith(STEPS)
    compared = compared and bits in (*args.autoawq_bits, *args.signround_bits)
    yield from range(len(judge.sets) if compared else 1)


def _searched(judge: Judge, name: str, options: QuantizationOptions, bits: float, number: int) -> Entry:
    """Of an engine that gives a model; with the final norm fitted to it, and not, where the engine has it so."""

    def run() -> Rows:
        (recipe, final_norm), cost = measured(partial(search, judge.model, judge.sets[number], options, bits))
        made: dict[str, Tensor | None] = dict.fromkeys((name, *also)) | {name: final_norm}
        rows = []
        for said, norm in made.items():
            quantized = judge.load()
            quantize_model(quantized, recipe, norm)
            rows.append(judge.row(quantized, bits, said, number, cost))
        return rows

    also = (f"{name}, norm kept",) if options.refits else ()
    return Entry(name, (bits,), number, run, also, _steps(options))


def _nested(judge: Judge, options: QuantizationOptions, number: int) -> Entry:
    """Of the engine nested, one folder of whose bits each is a model."""
    widest = options.declared.holds

    def run() -> Rows:
        (recipe, _), cost = measured(partial(search, judge.model, judge.sets[number], options, widest))
        quantized = judge.load()
        quantize_model(quantized, recipe)
        rows = []
        for bits in recipe.held:
            for linear in quantized.modules():
                if isinstance(linear, QuantizedLinear):
                    linear.read_at(bits)
            rows.append(judge.row(quantized, bits, "nested", number, cost))
        return rows

    return Entry(
        "nested", tuple(sorted(find("nested").widths, reverse=True)), number, run, steps=_steps(options)
    )


def _peer(args: Namespace, judge: Judge, bits: int, number: int) -> Rows:
    weights, cost = auto_round(args, number, judge.sequences[number], bits)
    rounded = judge.load()
    missing = rounded.load_state_dict(weights, strict=False)
    if missing.unexpected_keys:
        raise ValueError(f"auto-round gave weights that the model hasn't: {missing.unexpected_keys[:3]}")
    return [judge.row(rounded, bits, "auto-round", number, cost)]
