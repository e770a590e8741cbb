"""The configuration of a routed model: the routing's part, shared by all families."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from qtale_lightning.architectures import architecture_of, unit_shares
from qtale_lightning.routing import method_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _Base
else:
    # A data class takes its fields' defaults from all its bases: those of Hugging Face's would hide a family's own.
    _Base = object


class RoutedConfig(_Base):
    """The routing's part of a routed model's configuration; `families` makes a class of it and of each family's own.

    Args:
        router_width: Width of every router (D-LLM: 512).
        start_layer: First layer with a router (D-LLM: 2); ``num_hidden_layers`` for a model without routers.
        reserved_tokens: Initial tokens of a sequence that execute every layer (D-LLM: 2), padding not counted.
        threshold: θ of inference: execute iff p(execute) ≥ θ. One for all layers, or a list of one a router.
        method: That decides, by name; of folders that don't say it, one with routers and θ.
        rate: Share of a layer's free tokens that execute it, of methods that fix it.
        routing_seed: Of decisions by chance.
        gates: What a router decides about: a layer (D-LLM), or a sublayer, attention and MLP apart (SkipGPT, arXiv
            2506.04179).
        keep_kv: Whether a token leaves its keys and values in layers that it skips, too (FlexiDepth, arXiv 2503.23798);
            otherwise none of them are there for other tokens.
        stand_in_rank: Of the maps that stand in for layers that tokens skip; 0: there are none.
        dropped_layers: Layers of the base model, by its numbers, that this one was made without.
    """

    router_width: int = 512
    start_layer: int = 2
    reserved_tokens: int = 2
    threshold: float | list[float] = 0.5
    method: str = "qtale"
    rate: float = 1.0
    routing_seed: int = 0
    gates: Literal["layer", "sublayer"] = "layer"
    keep_kv: bool = False
    stand_in_rank: int = 0
    dropped_layers: list[int] | None = None

    def validate_routing(self) -> None:
        """Refuse values that no routed model can have."""
        if not 0 <= self.start_layer <= self.num_hidden_layers:
            raise ValueError(
                f"start_layer {self.start_layer} is outside the model's {self.num_hidden_layers} layers"
            )
        if self.router_width < 1 or self.reserved_tokens < 0:
            raise ValueError(
                f"router_width {self.router_width} must be positive, "
                f"reserved_tokens {self.reserved_tokens} not negative"
            )
        if self.start_layer < self.num_hidden_layers and self.reserved_tokens < 1:
            raise ValueError(
                "reserved_tokens must be at least 1: a query needs a key to attend to in every layer"
            )
        if not 0 <= self.stand_in_rank <= self.hidden_size:
            raise ValueError(
                f"stand_in_rank {self.stand_in_rank} must be from 0 to the width {self.hidden_size}"
            )
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate {self.rate} is no share of tokens: it must be in [0, 1]")
        if self.keep_kv and not architecture_of(self).fused:
            raise ValueError(
                f"keep_kv: layers of {self.model_type} compute all of a token or nothing: leave it out"
            )
        if self.gates == "sublayer" and not architecture_of(self).fused:
            raise ValueError(
                f"gates: layers of {self.model_type} compute all of a token or nothing: leave it out"
            )
        if self.gates == "sublayer" and (self.keep_kv or self.stand_in_rank):
            raise ValueError(
                "gates of sublayers go with neither keep_kv nor stand_in_rank: leave one of them out"
            )
        method_of(self.method)
        self.thresholds(self.threshold)

    def __setattr__(self, name: str, value: Any) -> None:
        """As ever; and refuses a θ where nothing is decided by one.

        Raises:
            ValueError: The method has no θ, so that the model would do what it does without.
        """
        changed = name == "threshold" and name in self.__dict__ and value != self.threshold
        if changed and not self.has_theta:
            raise ValueError(
                f"this model has no θ, by its method {self.method}: leave config.threshold as it is"
            )
        super().__setattr__(name, value)

    @property
    def routed_layers(self) -> range:
        """The layers that are decided about token by token."""
        return range(self.start_layer, self.num_hidden_layers)

    @property
    def unit_shares(self) -> tuple[float, ...]:
        """Of a layer's units, what routers decide about, by weights: see `architectures.unit_shares`."""
        return unit_shares(self)

    @property
    def routed_units(self) -> range:
        """The units that are decided about: n units of layer i are i · n and those behind it."""
        count = len(self.unit_shares)
        return range(self.start_layer * count, self.num_hidden_layers * count)

    @property
    def has_theta(self) -> bool:
        """Whether decisions go by a threshold."""
        return bool(self.routed_layers) and method_of(self.method).theta

    def thresholds(self, threshold: float | Sequence[float]) -> dict[int, float]:
        """θ by routed unit, from one for all of them or one each.

        Raises:
            ValueError: A θ is no probability, or there aren't as many as routed units.
        """
        units = self.routed_units
        if isinstance(threshold, Sequence) and len(threshold) != len(units):
            raise ValueError(
                f"{len(threshold)} thresholds for {len(units)} routed {self.gates}s: give one, or one for each of them"
            )
        for value in threshold if isinstance(threshold, Sequence) else (threshold,):
            if not 0 <= value <= 1:
                raise ValueError(f"threshold {value} is not a probability: give a value in [0, 1]")
        if isinstance(threshold, Sequence):
            return dict(zip(units, threshold, strict=True))
        return dict.fromkeys(units, threshold)
