"""What the suite needs to know of a quantization engine; each is declared in a file of its own beside this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a declaration is read without it
    from torch import nn

    from qtale_lightning.quantization.calibration import Batch
    from qtale_lightning.quantization.precision import Bits
    from qtale_lightning.quantization.recipe import Recipe

WIDTHS = tuple(range(2, 9))


@dataclass(frozen=True)
class Engine:
    """An engine: what it can do, and how what it computes with is had.

    Attributes:
        name: As `--quantize.engine` takes it.
        title: What it is, in a few words.
        load: Imports what it computes with, and returns it: a function of the arguments of :meth:`__call__`.
        folder: Its name in a run's files; its own where it is empty.
        default: It is the one that is taken where none is named.
        calibrates: It looks at calibration sequences.
        keeps_codes: What it finds are codes; other engines find scales and clips, from which codes follow.
        widths: Bits of a code that it works at.
        holds: Of the widest of them, where a folder of it holds a model at all of them (`quantization.nested`), so that
            a run has one; 0: a folder is of one precision.
        refits: The final norm is fitted to what it rounds.
        averages: It measures what each width does to the residual stream, so that an average of bits can be spent.
        mixes: Linears that share an input may have different bits.
        sequential: As it was published, layers see what quantized ones give, where nothing else is said.
        options: Its own options (`--quantize.options`), with their defaults.
        explained: What they are, in a sentence for `--help`.
        packages: Python packages that it computes with besides the suite's own.
        alone: It goes through the layers once for each precision; others search all precisions in one pass, unless
            layers see what quantized ones give.
        check: Refuses values of its own options, all given, by the number of the model's layers: a ValueError.
    """

    name: str
    title: str
    load: Callable[[], Callable[..., list[Recipe]]]
    folder: str = ""
    default: bool = False
    calibrates: bool = True
    keeps_codes: bool = False
    widths: tuple[int, ...] = WIDTHS
    holds: int = 0
    refits: bool = False
    averages: bool = False
    mixes: bool = True
    sequential: bool = False
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    explained: str = ""
    packages: tuple[str, ...] = ()
    alone: bool = False
    check: Callable[[Mapping[str, Any], int], None] = lambda options, layers: None

    def __call__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        precisions: Sequence[Bits],
        group_size: int,
        symmetric: bool = False,
        **more: Any,
    ) -> list[Recipe]:
        """A recipe for each of the precisions, which give bits by linear.

        Args:
            model: A causal language model in evaluation mode; it isn't changed.
            batches: Calibration tokens, as arguments of `model.model`.
            more: Its own options, where they aren't as declared; and, of a calibrating engine, those of
                :class:`~qtale_lightning.quantization.search.Search`.

        Raises:
            ImportError: A package that it needs isn't installed.
            ValueError: It can't be done so; see :class:`~qtale_lightning.quantization.search.Search`.
        """
        if not self.mixes:
            from qtale_lightning.architectures import architecture_of
            from qtale_lightning.quantization.precision import check_shared

            for bits in precisions:
                check_shared(bits, architecture_of(model.config))
        found = self.load()(model, batches, precisions, group_size, symmetric, **{**self.options, **more})
        return [replace(recipe, engine=self.name) for recipe in found]

    def held(self, bits: float) -> float:
        """The precision of the folder that a model at one of its precisions lies in."""
        return self.holds or bits

    def passes(self, precisions: int, sequential: bool) -> int:
        """How often it goes through the layers for so many precisions."""
        return precisions if self.alone or sequential else 1

    def check_options(self, options: Mapping[str, Any], layers: int) -> None:
        """Refuses options that it doesn't have, of another kind than the declared ones, or that don't fit the layers.

        Raises:
            ValueError: Names the option.
        """
        for name, value in options.items():
            if name not in self.options:
                known = f"it has {', '.join(self.options)}" if self.options else "it has none"
                raise ValueError(f"the engine {self.name} has no option {name!r}: {known}")
            kind = type(self.options[name])
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(
                    f"{name} must be a {kind.__name__}, such as {self.options[name]}, not {value!r}"
                )
            if kind is float and isinstance(value, int | float) and not 0 < value < float("inf"):
                raise ValueError(
                    f"{name} must be positive and finite, such as {self.options[name]}, not {value!r}"
                )
        self.check({**self.options, **options}, layers)
