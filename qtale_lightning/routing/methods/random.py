"""Layers drawn at random for each token, at a given ratio: the floor, which whatever learns to decide must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtale_lightning.routing.method import Method, Pass, Rows, fixed_rate

if TYPE_CHECKING:
    from torch import Tensor

# Odd constants of splitmix64 and of Murmur's finalizer, as int64.
_MIX = (-7046029254386353131, -4417276706812531889, -8663945395140668459, 7960286522194355700)


class Random(Method):
    """Every free token executes a layer with the same probability, ``rate`` of the configuration.

    In training each pass draws anew, as Gumbel noise does. At inference the draw is a hash of the token, its position
    in its sequence, the layer and the seed: it repeats, whatever stands beside a sequence in a batch, however it is
    padded, and however it is cut into passes.
    """

    name = "random"
    title = "random"
    decides = measures = True

    def fields(self, layers: int, start_layer: int, target_ratio: float, seed: int) -> dict[str, Any]:
        """The rate at which a free token executes the target ratio of all layers."""
        rate = fixed_rate(target_ratio, layers, start_layer)
        return super().fields(layers, start_layer, target_ratio, seed) | {"rate": rate, "routing_seed": seed}

    def measure(self, base: Any, rows: Rows, fields: dict[str, Any]) -> dict[str, Any]:
        """The rate at which all tokens together, the reserved ones included, execute the target ratio on average.

        There is no θ to reach a ratio by: what is measured must be what was asked for.
        """
        return {"rate": max(0.0, (fields["rate"] - rows.reserved) / (1 - rows.reserved))}

    def describe(self, config: Any) -> str:
        """The rate."""
        first, last = config.start_layer, config.num_hidden_layers - 1
        return f"A token executes each of the layers {first} to {last} with probability {config.rate:.3f}, by a hash."

    def sample(self, routing: Pass, layer: int) -> Tensor:
        """A new draw."""
        import torch

        return torch.rand(routing.free.shape, device=routing.free.device) < _rate(routing)

    def decide(self, routing: Pass, layer: int) -> Tensor:
        """The hash's draw.

        Raises:
            ValueError: The model was given embeddings instead of tokens.
        """
        if routing.ids is None:
            raise ValueError("the method random decides by the token: give the model input_ids")
        return uniform(routing.ids, routing.places, layer, routing.seed) < _rate(routing)


def uniform(ids: Tensor, places: Tensor, layer: int, seed: int) -> Tensor:
    """A number in [0, 1) for each token, float64 ``(B, T)``, from ids and positions, int64 ``(B, T)``."""
    bits = ids * _MIX[0] + places * _MIX[1] + layer * _MIX[2] % 2**62 + seed * _MIX[3] % 2**62
    for factor in _MIX[1:3]:  # products wrap around, as they do in C
        bits = (bits ^ (bits >> 31)) * factor
    bits = bits ^ (bits >> 33)
    return (bits & (2**53 - 1)).double() / 2**53


def _rate(routing: Pass) -> float:
    assert routing.rate is not None  # the model fills it in
    return routing.rate


METHOD = Random()
