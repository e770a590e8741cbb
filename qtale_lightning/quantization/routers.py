"""Routers, fitted to what rounding did to the residual stream that they read.

A router reads the raw stream, so that what rounding changes in it turns decisions, in every later layer. Routers keep
full precision: their last linear is fitted anew, layer by layer, so that on the quantized model's stream it says what
it said on the model's own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qtale_lightning.quantization.calibration import Batch, check_tokens, first_calls, plain_float32
from qtale_lightning.quantization.mappings import decoder_layers
from qtale_lightning.quantization.recipe import Recipe, check_recipe, quantized_layer
from qtale_lightning.routing.router import EXECUTE, SKIP, logit_gap

RIDGE = 1e-2  # pull towards the weight as it was, relative to what each of its elements explains
FLOOR = 0.05  # least weight of a token, of 1/4 for one that is undecided: θ may be anything


class Refit(NamedTuple):
    """What routers become, and what that does.

    Attributes:
        weights: of the routers' last linears, by their parameters' full names.
        turned: shares of free tokens whose decision differs from the model's own, with the routers as they were and as
            they become, over all routed layers; of the calibration tokens.
    """

    weights: dict[str, Tensor]
    turned: tuple[float, float]


def refit_routers(model: nn.Module, recipe: Recipe, batches: Sequence[Batch]) -> Refit:
    """The routers with which a quantized model decides most like the model itself.

    Minimises for each router, over its last linear, with the gap of its logits g(x) = log p(execute) - log p(skip) on
    the model's stream, h(y) on the quantized model's, and p the model's own p(execute),

        Σ_tokens  max(p·(1 - p), FLOOR) · (h(y) - g(x))²

    whose first factor makes it twice the KL divergence of the decisions to second order. Layers are taken in order,
    each on the stream that the quantized ones before it give, which decide by their routers as they have become.

    Args:
        model: a routed model in full precision, in evaluation mode; it isn't changed.
        recipe: what a search found for it.
        batches: calibration tokens, as arguments of `model.model`.

    Raises:
        ValueError: the model has no routers, or has them for sublayers, the recipe is of another one, or a router saw
            no tokens.
    """
    check_recipe(model, recipe)
    layers = decoder_layers(model)
    check_routers(model)
    streams = [_Stream(model, batches) for _ in range(3)]
    exact, kept, fitted = streams
    weights: dict[str, Tensor] = {}
    for layer in layers:
        router: Any = getattr(layer.module, "router", None)
        exact.advance(layer.module)
        kept.advance(quantized_layer(layer, recipe))
        if router is not None:
            features = fitted.features(layer.module)
            check_tokens(f"{layer.name}.router", len(features), 1)
            weight, bias = _fit(router.out, features, exact.gaps(layer.module))
            weights |= {f"{layer.name}.router.out.weight": weight, f"{layer.name}.router.out.bias": bias}
        fitted.advance(quantized_layer(layer, recipe, weights))
    decisions = exact.decisions()
    turned = [(stream.decisions() != decisions).float().mean().item() for stream in (kept, fitted)]
    return Refit(weights, (turned[0], turned[1]))


def check_routers(model: nn.Module) -> None:
    """Refuses a model without routers, or with routers of sublayers (ValueError)."""
    if not any(getattr(layer.module, "router", None) is not None for layer in decoder_layers(model)):
        raise ValueError("the model has no routers to fit: leave --quantize.refit_routers out")
    if getattr(model.config, "gates", "layer") == "sublayer":
        raise ValueError(
            "the model's routers decide about sublayers, and only those of layers can be fitted: leave "
            "--quantize.refit_routers out"
        )


class _Stream:
    """Hidden states of calibration batches on their way through layers, and what these decided."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.hidden, self.arguments = first_calls(model, batches)

    @torch.no_grad()
    def advance(self, module: nn.Module) -> None:
        """Through a layer."""
        self.hidden = [module(x, **more) for x, more in zip(self.hidden, self.arguments, strict=True)]

    @torch.no_grad()
    def features(self, layer: Any) -> Tensor:
        """What the last linear of a layer's router would read of the free tokens, `(tokens, width)`, float32."""
        router, parts = layer.router, []
        for hidden, more in zip(self.hidden, self.arguments, strict=True):
            tokens = hidden[more["routing"].free].float()
            parts.append(nn.functional.silu(router.norm(router.down(tokens))))
        return torch.cat(parts)

    def gaps(self, layer: Any) -> Tensor:
        """The logit gaps of a layer that was passed, of the free tokens, `(tokens,)`."""
        found = [more["routing"] for more in self.arguments]
        return torch.cat([logit_gap(one.logits[layer.layer_idx])[one.free] for one in found])

    def decisions(self) -> Tensor:
        """Of all routed layers that were passed, about the free tokens, bool."""
        found = [more["routing"] for more in self.arguments]
        return torch.cat([(one.stacked_gates() != 0)[:, one.free].flatten() for one in found])


def _fit(out: nn.Linear, features: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor]:
    """The weight `(2, width)` and bias `(2,)` whose gaps on `features` are closest to `gaps`.

    What the two logits share stays as it was.
    """
    with plain_float32(features):
        weight, bias = out.weight.detach(), out.bias.detach()
        before = torch.cat([weight[EXECUTE] - weight[SKIP], (bias[EXECUTE] - bias[SKIP])[None]]).double()
        rows = torch.cat([features, features.new_ones(len(features), 1)], 1).double()
        chance = gaps.double().sigmoid()
        weighted = rows * (chance * (1 - chance)).clamp(min=FLOOR)[:, None]
        system = weighted.T @ rows
        ridge = RIDGE * system.diagonal().clamp(min=1e-6 * system.diagonal().mean().item())
        missing = weighted.T @ (gaps.double() - rows @ before)
        change = torch.linalg.solve(system + ridge.diag(), missing).to(weight) / 2
        signs = weight.new_zeros(2)
        signs[EXECUTE], signs[SKIP] = 1, -1
        return weight + signs[:, None] * change[:-1], bias + signs * change[-1]
