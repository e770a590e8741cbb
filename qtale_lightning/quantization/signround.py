"""SignRound (Cheng et al., Optimize weight rounding via signed gradient descent, EMNLP Findings 2024; AutoRound).

Rounding and clipping are learned, window by window of decoder layers, by what they do to its output. Each weight has a
value that is added before it is rounded, and each group two shares of its ends (`rounding`). All go a step against the
sign of their gradient on one batch of calibration sequences after the other; the step's length falls linearly to 0, and
with the published rate of 1/steps a value can just go from one rounding to the other. The last step's is kept: the
published code keeps that of the batch with the least error, but batches differ more than steps do.

What this adds to the published method:
- It starts from what AWQ's search found (`awq`): its input scales are folded into the weights that are rounded, and
  its clips are the first α and β.
- A token's error is relative to the residual stream, as in `awq`: in SmolLM2's upper layers the first token has a
  hundred times the norm of others, and would be all that counts.
- A window has one or two layers: what the first rounds wrong, the second learns to make good (CBQ, Ding et al. 2025).
- Only tokens that execute a layer count, and they do what they did in the model: its decisions are taken as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qtale_lightning.quantization import awq
from qtale_lightning.quantization.calibration import Batch, first_calls, padded, real_tokens
from qtale_lightning.quantization.mappings import DecoderLayer, decoder_layers
from qtale_lightning.quantization.options import MIN_TOKENS
from qtale_lightning.quantization.precision import Bits
from qtale_lightning.quantization.recipe import Recipe, scale_vectors
from qtale_lightning.quantization.replay import unwatched
from qtale_lightning.quantization.rounding import REACH, Rounding
from qtale_lightning.quantization.terms import fit_terms

# Where codes' highest bits are learned, too: the reach of a value, since of the highest 2 one is 4 codes wide; and the
# rate of steps for fewer than all bits, at which these gain nearly as much and all of them lose less.
NESTED_REACH, NARROWER_RATE = 2.0, 0.5


class Window:
    """Decoder layers whose roundings are learned together: copies, with the scales that a recipe has for them."""

    def __init__(self, layers: Sequence[DecoderLayer], recipe: Recipe, reach: float = REACH) -> None:
        """Copies the layers and lets their linears' weights be learned, within a `reach` (see `Rounding`)."""
        self.layers = [replace(layer, module=unwatched(layer.module)) for layer in layers]
        self.roundings: dict[str, Rounding] = {}
        self.weights: dict[str, nn.Parameter] = {}
        for layer, mine in zip(layers, self.layers, strict=True):
            mine.module.requires_grad_(False)
            scale_vectors(mine, recipe)
            for name in layer.linears:
                full = layer.path(name)
                weight = layer.scaled_weight(name, recipe.scales)
                self.roundings[full] = Rounding(weight, recipe.scheme(full), recipe.clips.get(full), reach)
                self.weights[full] = mine.module.get_parameter(f"{name}.weight")
                self.weights[full].requires_grad_(True)

    def write(self, bits: int | None = None) -> None:
        """Gives the copies the weights that are rounded to, by their codes' highest `bits`, or all."""
        for name, rounding in self.roundings.items():
            rounding.write(self.weights[name].detach(), bits)

    def step(self, rate: float, bits: int | None = None) -> None:
        """Moves the roundings against the gradients of the weights that they gave, and forgets these."""
        for name, rounding in self.roundings.items():
            gradient = self.weights[name].grad
            if gradient is not None:  # nobody executed the layer
                rounding.step(gradient, rate, bits)
            self.weights[name].grad = None

    def __call__(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The hidden states behind the window."""
        for layer in self.layers:
            hidden = layer.module(hidden, **arguments)
        return hidden

    def outputs(self, calls: Sequence[tuple[Tensor, dict[str, Any]]]) -> list[Tensor]:
        """The hidden states behind the window as it is rounded now, by batch."""
        self.write()
        return self.given(calls)

    @torch.no_grad()
    def given(self, calls: Sequence[tuple[Tensor, dict[str, Any]]]) -> list[Tensor]:
        """The hidden states behind the window with the weights that it has, by batch."""
        return [self(*call) for call in calls]

    @property
    def name(self) -> str:
        """Of its layers."""
        return " and ".join(layer.name for layer in self.layers)


def fit(
    window: Window,
    calls: Mapping[int | None, Sequence[tuple[Tensor, dict[str, Any]]]],
    wanted: Sequence[Tensor],
    shares: Sequence[Tensor],
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """Learns a window's roundings, by Σ_t share_t · ‖window(x_t) - y_t‖² of one batch a step, for each width in turn.

    Args:
        calls: hidden states x before the window, `(B, T, D)`, and the layers' other arguments, by batch: by how many of
            the codes' highest bits, None for all.
        wanted: y, behind it, `(B, T, D)`.
        shares: of each token, `(B, T)`.
        steps: of each width.
        rate: of the first step.

    Raises:
        ValueError: the error isn't finite.
    """
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    for step in range(steps):
        order = order or torch.randperm(len(wanted), generator=generator).tolist()
        i = order.pop()
        for bits, seen in calls.items():
            window.write(bits)
            with torch.enable_grad():
                delta = window(*seen[i]).float() - wanted[i].float()
                error = (delta.square().sum(-1) * shares[i]).sum()
                error.backward()
            if not error.isfinite():
                raise ValueError(
                    f"{window.name} has no finite output error: its weights or activations are too large"
                )
            share = 1 if bits is None else NARROWER_RATE
            window.step(share * rate * (1 - step / steps), bits)


def shuffled(batches: Sequence[Batch], rows: int, seed: int) -> list[Batch]:
    """The sequences of some batches, in random batches of `rows`."""
    sequences = [
        ids[real]
        for batch in batches
        for ids, real in zip(batch["input_ids"], real_tokens(batch), strict=True)
    ]
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed)).tolist()
    return [padded([sequences[i] for i in order[at : at + rows]]) for at in range(0, len(order), rows)]


def token_shares(batch: Batch, wanted: Tensor) -> Tensor:
    """What a squared error of each token counts, `(B, T)`, for a mean that is relative to the squared `wanted`."""
    real = real_tokens(batch)
    return real / wanted.float().square().sum(-1).clamp(min=1e-12) / real.sum()


@torch.inference_mode(False)
def search(
    model: nn.Module,
    batches: Sequence[Batch],
    precisions: Sequence[Bits],
    group_size: int,
    symmetric: bool = False,
    *,
    sequential: bool = False,
    min_tokens: int = MIN_TOKENS,
    progress: Callable[[str, int], None] | None = None,
    steps: int,
    batch: int,
    lr: float,
    window: int,
    seed: int,
) -> list[Recipe]:
    """SignRound's codes for every precision, from AWQ's scales and clips.

    Args:
        model: see :class:`~qtale_lightning.quantization.search.Search`, and of the other arguments it has.
        sequential: a window's inputs are what the quantized ones before it give; what it should give is the model's.
        progress: called for each layer and precision.
        steps, batch, lr, window, seed: see `qtale_lightning.quantization.engines.signround`.

    Returns:
        One recipe for each of `precisions`, with scales and codes.

    Raises:
        ValueError: as Search, or a window's outputs have no finite error.
    """
    started = awq.search(model, batches, precisions, group_size, symmetric, min_tokens=min_tokens)
    some = shuffled(batches, batch, seed)
    how: Any = {"steps": steps, "lr": lr, "window": window, "seed": seed}
    return [_learned(model, some, recipe, [None], sequential, progress, **how) for recipe in started]


def _learned(
    model: nn.Module,
    batches: Sequence[Batch],
    start: Recipe,
    widths: Sequence[int | None],
    sequential: bool,
    progress: Callable[[str, int], None] | None,
    steps: int,
    lr: float,
    window: int,
    seed: int,
) -> Recipe:
    """A recipe's scales with learned codes, whose highest bits are learned, too, at each of some widths (None: all)."""
    learned = replace(start, clips={}, errors={}, damage={}, terms={})
    layers, reach = decoder_layers(model), REACH if len(widths) == 1 else NESTED_REACH
    exact, arguments = first_calls(model, batches)
    seen = dict.fromkeys(widths, exact)
    for first in range(0, len(layers), window):
        here = layers[first : first + window]
        exact = [_decided(here, *call) for call in zip(exact, arguments, strict=True)]
        shares = [token_shares(*one) for one in zip(batches, exact, strict=True)]
        learner = Window(here, start, reach)
        calls = {bits: [*zip(inputs, arguments, strict=True)] for bits, inputs in seen.items()}
        fit(learner, calls, exact, shares, steps, lr / steps, seed)
        learned.codes.update({name: own.codes().cpu() for name, own in learner.roundings.items()})
        for bits in widths:
            if bits is None:
                outputs = learner.outputs(calls[bits]) if sequential else exact
            else:
                own = fit_terms(learner, bits, calls[bits], exact, shares, steps // 2, seed)
                learned.terms.setdefault(bits, {}).update(
                    {n: (s.cpu(), z.cpu()) for n, (s, z) in own.items()}
                )
                outputs = learner.given(calls[bits]) if sequential else exact
            seen[bits] = outputs
        for layer in here:
            if progress:
                progress(layer.name, start.tokens[layer.name])
    return learned


@torch.inference_mode(False)
def search_nested(
    model: nn.Module,
    batches: Sequence[Batch],
    precisions: Sequence[Bits],
    group_size: int,
    symmetric: bool = False,
    *,
    lowest: int,
    sequential: bool = False,
    min_tokens: int = MIN_TOKENS,
    progress: Callable[[str, int], None] | None = None,
    **how: Any,
) -> list[Recipe]:
    """`search` for codes whose highest bits are learned as well, down to `lowest`: see `engines.nested`.

    It starts from AWQ's scales and clips for the middle one of these widths. Where there is none but the codes' own,
    these are those that `search` finds.

    Args:
        precisions: each of one width for all linears.
    """
    some, found = shuffled(batches, how.pop("batch"), how["seed"]), []
    for bits in precisions:
        widest = max(bits.values())
        widths = [*range(lowest, widest + 1)]
        middle = dict.fromkeys(bits, widths[len(widths) // 2])
        (start,) = awq.search(model, batches, [middle], group_size, symmetric, min_tokens=min_tokens)
        turns: list[int | None] = [None, *reversed(widths[:-1])]
        learned = _learned(model, some, replace(start, bits=dict(bits)), turns, sequential, progress, **how)
        found.append(replace(learned, held=widths if len(widths) > 1 else []))
    return found


@torch.no_grad()
def _decided(layers: Sequence[DecoderLayer], hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The hidden states behind some of a model's layers; what their routers decide is decided for later calls, too."""
    for layer in layers:
        hidden = layer.module(hidden, **arguments)
    routing: Any = arguments.get("routing")
    if hasattr(routing, "forced"):
        routing.forced = dict(routing.gates)
    return hidden
