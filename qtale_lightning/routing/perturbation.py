"""Decisions perturbed at inference: noise on routers' logits, and random gates mixed in.

Of a model whose weights stay as they are, both vary which paths tokens take, to see what depends on it. Draws are a
hash of the token, its position in its sequence and the layer, as those of the method random: they repeat, whatever
stands beside a sequence, and however it is cut into passes. They change logits alone, so θ is searched, and compared
with p(execute), as ever; θ = 0 stays the base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt

from qtale_lightning.values import NonNegative, ShareAboveZero, in_range

if TYPE_CHECKING:
    from torch import Tensor

    from qtale_lightning.routing.method import Pass

CERTAIN = 40.0
"""Logit gap of a decision that is replaced: p(execute) is 4e-18, or 1 in float32."""
_DRAWS = 3  # of each decision: its noise, whether it is replaced, and by what


@dataclass(frozen=True)
class Perturbation:
    """How decisions are perturbed; by default not at all.

    Args:
        noise: s: each logit gets s times a draw of Gumbel noise. With 1 and θ = 0.5 decisions are those that training
            samples, each layer executed with probability p(execute).
        random_gates: Share of the decisions that are replaced by random ones.
        random_ratio: Share of all layers that tokens would execute by random gates alone.
        draw: Number of the draw: another one is another noise, and other gates.

    Raises:
        ValueError: A number is outside of its range, or one of `random_gates` and `random_ratio` is missing.
    """

    noise: NonNegative = 0.0
    random_gates: ClosedUnitInterval = 0.0
    random_ratio: ShareAboveZero | None = None
    draw: NonNegativeInt = 0

    def __post_init__(self) -> None:
        in_range("", Perturbation.__init__, vars(self))
        if self.random_gates and self.random_ratio is None:
            raise ValueError(
                "--random_gates needs --random_ratio, the share of layers that random gates execute: give the "
                "execution ratio that is measured at, such as 0.7"
            )
        if self.random_ratio is not None and not self.random_gates:
            raise ValueError(
                "--random_ratio is of random gates: give their share, such as --random_gates 0.1"
            )

    @property
    def record(self) -> dict[str, Any]:
        """As a row of results says it in its protocol; empty where nothing is perturbed."""
        asked = {name: value for name, value in asdict(self).items() if value}
        return {} if asked.keys() <= {"draw"} else asked

    @property
    def words(self) -> str:
        """Such as "noise 1"; empty where nothing is perturbed."""
        return in_words(self.record)

    @property
    def arguments(self) -> list[str]:
        """As a command line says it."""
        return [part for name, value in self.record.items() for part in (f"--{name}", str(value))]

    def of(self, layers: int, start_layer: int) -> Perturber:
        """For a model of so many layers, the first of which always execute.

        Raises:
            ValueError: Such a model can't execute as little as `random_ratio`.
        """
        ratio, routed = self.random_ratio, layers - start_layer
        if ratio is not None and ratio * layers < start_layer:
            raise ValueError(
                f"--random_ratio {ratio:g} can't be reached: the first {start_layer} of {layers} layers always execute "
                f"(--model.start_layer): give at least {start_layer / layers:.3f}"
            )
        return Perturber(self, 0.0 if ratio is None else (ratio * layers - start_layer) / routed)


UNPERTURBED = Perturbation()


def in_words(record: Mapping[str, float]) -> str:
    """Of a perturbation's record, such as "noise 1" or "10 % random gates"."""
    noise = f"noise {record['noise']:g}" if "noise" in record else ""
    gates = f"{100 * record['random_gates']:g} % random gates" if "random_gates" in record else ""
    draw = f"draw {record['draw']:g}" if "draw" in record else ""
    return ", ".join(part for part in (noise, gates, draw) if part)


@dataclass(frozen=True)
class Perturber:
    """A perturbation of one model's logits.

    Attributes:
        rate: Share of random gates that execute.
    """

    asked: Perturbation
    rate: float

    def __call__(self, logits: Tensor, routing: Pass, layer: int) -> Tensor:
        """Logits of a layer ``(B, T, 2)``, as the router gave them, perturbed.

        Raises:
            ValueError: The model was given embeddings instead of tokens.
        """
        import torch

        from qtale_lightning.routing.methods.random import uniform

        if routing.ids is None:
            raise ValueError("decisions are perturbed by the token: give the model input_ids")
        noise, replaced, by = (
            uniform(routing.ids, routing.places, layer, _DRAWS * self.asked.draw + draw)
            for draw in range(_DRAWS)
        )
        skip, execute = logits.unbind(-1)
        if (
            self.asked.noise
        ):  # the difference of two draws of Gumbel noise is one of the logistic distribution
            execute = execute + self.asked.noise * noise.clamp_min(1e-12).logit().to(logits.dtype)
        if self.asked.random_gates:
            drawn = torch.where(by < self.rate, CERTAIN, -CERTAIN).to(logits.dtype)
            execute = torch.where(replaced < self.asked.random_gates, skip + drawn, execute)
        return torch.stack([skip, execute], dim=-1)


def perturb(model: Any, perturbation: Perturbation) -> None:
    """Let a loaded model decide so from now on: a routed causal language model.

    Raises:
        ValueError: It has no θ, so that no router's logits decide; or as `Perturbation.of`.
    """
    if not perturbation.record:
        model.model.perturber = None
        return
    if not model.config.has_theta:
        raise ValueError(
            f"decisions of the method {model.config.method} aren't those of routers: leave "
            f"{', '.join(perturbation.arguments[::2])} out"
        )
    model.model.perturber = perturbation.of(model.config.num_hidden_layers, model.config.start_layer)


def perturbed(model: Any) -> dict[str, Any]:
    """What `perturb` has changed, as `Perturbation.record` says it; empty where nothing is."""
    found = model.model.perturber
    return {} if found is None else found.asked.record
