"""What a method of layer routing declares, and what it computes.

A token executes a layer (w = 1) or skips it (w = 0), y = w · layer(x) + (1 − w) · x. Methods differ in who decides
that, in training and at inference, and in the losses that train it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

if TYPE_CHECKING:  # the declarations are read without it
    from torch import Tensor


class Pass(Protocol):
    """What a method may know of a forward pass (:class:`~qtale_lightning.models.routing.Routing` is one).

    Attributes:
        tokens: Real tokens, bool ``(B, T)``.
        free: Those that are decided about: behind the reserved initial ones.
        places: Position of each real token in its sequence, int64 ``(B, T)``.
        ids: The tokens, int64 ``(B, T)``; None where the model was given embeddings.
        rate: Share of a layer's free tokens that execute it, of methods that fix it.
        seed: Of decisions by chance at inference.
        temperature: Of the Gumbel-softmax.
        noise: What Gumbel's draws are multiplied by.
        shares: Of a layer's units, what is decided about: of the layer itself, (1.0,), or of its sublayers.
        thresholds: Unit that is decided about → θ.
        logits: Unit → router logits ``(B, T, 2)``, float32; those of this unit and before.
    """

    tokens: Tensor
    free: Tensor
    places: Tensor
    ids: Tensor | None
    rate: float | None
    seed: int
    temperature: float
    noise: float
    shares: Sequence[float]
    thresholds: Any

    @property
    def logits(self) -> Mapping[int, Tensor]: ...
    @property
    def gates(self) -> Mapping[int, Tensor]: ...

    def stacked_logits(self) -> Tensor:
        """Of all units with a router, ``(R, B, T, 2)``."""
        ...

    def stacked_gates(self) -> Tensor:
        """Decisions of all units that are decided about, float32 ``(R, B, T)``."""
        ...

    def stacked_shares(self) -> Tensor:
        """How much of each layer that is decided about tokens execute, float32 ``(layers, B, T)``."""
        ...


class Budget(NamedTuple):
    """What execution is held to.

    Attributes:
        target: R_target of this step.
        held: What is held to it, as :func:`~qtale_lightning.losses.ratio_loss` takes it.
    """

    target: float
    held: Literal["token", "sequence", "all"] = "token"


class Rows(NamedTuple):
    """What a method can measure before training.

    Attributes:
        sequences: Token ids of training rows.
        reserved: Share of the tokens that scoring calibration questions computes which execute every layer.
    """

    sequences: Sequence[Sequence[int]]
    reserved: float


class Method:
    """The base of all methods, and what most of them do; a method that decides nothing is :mod:`.methods.full`.

    Attributes:
        name: What ``--model.method`` takes, and what its file is called.
        title: What tables and figures call it.
        decides: Whether layers from ``start_layer`` on decide token by token.
        routers: Whether routers do.
        theta: Whether decisions at inference are p(execute) ≥ θ, so that a θ can be chosen after training.
        at_half: What deciding at θ = 0.5, for the likelier of a router's two classes, is called in reports.
        noisy: Whether noise turns decisions in training, independently in each layer.
        weights: Options ``lambda_…`` of its losses' weights; all others must be 0.
        measures: Whether it measures something on training rows before training; see :meth:`measure`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    decides: ClassVar[bool] = False
    routers: ClassVar[bool] = False
    theta: ClassVar[bool] = False
    at_half: ClassVar[str] = "the likelier decision"
    noisy: ClassVar[bool] = False
    weights: ClassVar[tuple[str, ...]] = ()
    measures: ClassVar[bool] = False

    # -------------------------------------------------------------------------------------- what the model is

    def fields(self, layers: int, start_layer: int, target_ratio: float, seed: int) -> dict[str, Any]:
        """Fields of the routed configuration that go by the method, as far as they are known without a measurement.

        Args:
            layers: Of the base model.
            start_layer: ``--model.start_layer``.
            target_ratio: Share of layers that a token should execute.
            seed: Of the run.

        Raises:
            ValueError: Such a model can't be.
        """
        return {"start_layer": start_layer if self.decides else layers}

    def measure(self, base: Any, rows: Rows, fields: dict[str, Any]) -> dict[str, Any]:
        """Those of ``fields`` that are measured, on the base model before training; numbers or lists of them."""
        return {}

    def change(self, base: Any, fields: dict[str, Any]) -> None:
        """Change the base model in place, before routers and LoRA are attached."""

    def describe(self, config: Any) -> str:
        """What an exported model does, in a sentence, from its configuration."""
        if not self.routers:
            return "Every token executes every layer."
        return (
            f"{'' if config.gates == 'layer' else 'Attention and MLP of '}layers {config.start_layer} to "
            f"{config.num_hidden_layers - 1} have routers of width {config.router_width}: a token executes such a "
            f"{config.gates} iff p(execute) ≥ θ = {config.threshold} "
            "(`config.threshold`; 0 is the dense model)."
        )

    # ------------------------------------------------------------------------------------------------ decisions

    def sample(self, routing: Pass, layer: int) -> Tensor:
        """Decisions of a layer, or of the unit of that number, in training, ``(B, T)`` of 0 and 1.

        Their gradient is what reaches the router. They are the mixing weight w, too. Only free tokens' are used. At
        inference's decisions by default.
        """
        return self.decide(routing, layer)

    def decide(self, routing: Pass, layer: int) -> Tensor:
        """Decisions of a layer at inference, bool ``(B, T)``: p(execute) ≥ θ by default.

        They may go by a token and those before it alone, since prompts are cut into passes anywhere.
        """
        from qtale_lightning.routing.router import execute_probability

        return execute_probability(routing.logits[layer]) >= routing.thresholds[layer]

    @property
    def compares(self) -> bool:
        """Whether `decide` is the base's, so that whoever knows a layer's logits and θ knows its decisions."""
        return type(self).decide is Method.decide

    # ---------------------------------------------------------------------------------------- losses, statistics

    def losses(self, routing: Pass, layers: int, budget: Budget) -> dict[str, Tensor]:
        """Loss terms of a pass beside L_CE, scalars by name; the weight of ``name`` is the option ``lambda_<name>``.

        Args:
            routing: Filled in.
            layers: Of the model.
            budget: Of this step.
        """
        return {}

    def statistics(self, routing: Pass) -> dict[str, Tensor]:
        """What training logs of a pass's decisions, scalars by name; for example ``flip_ratio_layer_<two digits>``."""
        return {}


def fixed_rate(target_ratio: float, layers: int, start_layer: int) -> float:
    """The share of tokens that execute a layer which is decided about, where a token executes ``target_ratio`` of all.

    Raises:
        ValueError: The layers that always execute are more than that.
    """
    decided = layers - start_layer
    rate = (target_ratio * layers - start_layer) / decided if decided > 0 else 1.0
    if rate < 0:
        raise ValueError(
            f"--model.target_ratio {target_ratio:g} can't be reached: the first {start_layer} of {layers} layers "
            f"always execute (--model.start_layer): give at least {start_layer / layers:.3f}"
        )
    return rate
