"""SignRound (Cheng et al., Optimize weight rounding via signed gradient descent, EMNLP Findings 2024; AutoRound).

Rounding and clipping are learned, window by window of decoder layers, by what they do to its output. A group of
weights w, with a value v in [-1/2, 1/2] for each of them, and α and β in [0, 1] for the group, is rounded to

    s = (β·max(w) - α·min(w)) / (2^bits - 1),   z = round(-α·min(w) / s)
    Q(w) = s · (clamp(round(w/s + v) + z, 0, 2^bits - 1) - z)

where max(w) ≥ 0 ≥ min(w). All three go a step against the sign of their gradient, through `round` as if it weren't
there, on one batch of calibration sequences after the other; the step's length falls linearly to 0, and with the
published rate of 1/steps a value can just go from one rounding to the other.

What this adds to the published method:
- It starts from what AWQ's search found (`awq`): its input scales are folded into the weights that are rounded, and
  its clips are the first α and β.
- A token's error is relative to the residual stream, as in `awq`: SmolLM2's first tokens have a thousand times the
  norm of others, and would be all that counts.
- A window has one or two layers: what the first rounds wrong, the second learns to make good (CBQ, Ding et al. 2025).
- Only tokens that execute a layer count, and they do what they did in the model: its decisions are taken as they are.

A batch's gradient of a rounded weight comes from PyTorch; what follows from it for v, α and β is written out here, in
float32, some rows at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qtale_lightning import cpu
from qtale_lightning.quantization import awq
from qtale_lightning.quantization.calibration import Batch, first_calls, padded, real_tokens
from qtale_lightning.quantization.mappings import DecoderLayer, decoder_layers
from qtale_lightning.quantization.options import MIN_TOKENS
from qtale_lightning.quantization.precision import Bits
from qtale_lightning.quantization.recipe import CLIP_STEP, Codes, Recipe, scale_vectors
from qtale_lightning.quantization.replay import unwatched
from qtale_lightning.quantization.rtn import Scheme

ROWS = 64  # outputs taken at a time: little memory, and a working set that a core's cache holds


class Rounding:
    """How a weight is rounded, and learns to be; see the module's formulas.

    Attributes:
        values: v, shape `(out, n_groups, group_size)`, float32.
        shares: α and β, shape `(2, out, n_groups, 1)`, float32.
    """

    def __init__(self, weight: Tensor, scheme: Scheme, clips: Tensor | None = None) -> None:
        """Rounds to nearest, first.

        Args:
            weight: shape `(out, in)`; kept in float32.
            clips: steps of `CLIP_STEP` of each group's largest magnitude, shape `(out, n_groups)`; None clips nothing.
        """
        self.scheme = scheme
        self.groups = weight.float().unflatten(1, (-1, scheme.group_size))
        low, high = self.groups.aminmax(dim=-1, keepdim=True)
        self.ends = torch.stack([low.clamp_(max=0), high.clamp_(min=0)])
        self.values = torch.zeros_like(self.groups)
        self.shares = torch.ones_like(self.ends)
        if clips is not None:
            magnitudes = self.ends.abs()
            limit = magnitudes.amax(0) * (1 - clips.to(weight.device)[..., None] * CLIP_STEP)
            self.shares = (limit / magnitudes.clamp(min=1e-12)).clamp_(max=1)

    @property
    def _top(self) -> int:
        return 2**self.scheme.bits - 1

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points, each of shape `(out, n_groups, 1)`."""
        low, high = (self.ends * self.shares).unbind()
        if self.scheme.symmetric:
            middle = 2 ** (self.scheme.bits - 1)
            scales = high.maximum(-low).clamp_(min=1e-5).div_(middle - 1)
            return scales, torch.full_like(scales, middle)
        scales = (high - low).clamp_(min=1e-5).div_(self._top)
        return scales, (low / scales).round_().neg_()

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Writes what the weight is rounded to into a tensor, shape `(out, in)`."""
        scales, zeros = self._grid()
        if self._fast:
            cpu.round_groups(self.groups, self.values, scales, zeros, self._top, weight)
            return
        for w, v, s, z, to in self._by_rows(scales, zeros, weight):
            to.copy_((w / s).add_(v).round_().clamp_(-z, self._top - z).mul_(s).flatten(1))

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: float) -> None:
        """Moves v, α and β by `rate` against the sign of their gradients, given that of the rounded weight.

        Args:
            gradient: shape `(out, in)`.
        """
        scales, zeros = self._grid()
        if self._fast:
            slopes = gradient.contiguous()
            parts = [cpu.round_step(self.groups, self.values, scales, zeros, self._top, slopes, rate)]
        else:
            parts = [_step_rows(self._top, rate, *rows) for rows in self._by_rows(scales, zeros, gradient)]
        held, of_scale = (torch.cat(part) for part in zip(*parts, strict=True))
        self._move_ends(scales, held, of_scale, rate)

    def _move_ends(self, scales: Tensor, held: Tensor, of_scale: Tensor, rate: float) -> None:
        """Moves α and β.

        Args:
            scales: of the groups, shape `(out, n_groups, 1)`; so are the next two.
            held: the slopes of weights that an end of the grid holds, summed.
            of_scale: the slope of the scale where the zero point is constant.
        """
        if self.scheme.symmetric:  # the longer end sets the scale
            reach = (self.ends * self.shares).abs_()
            slopes = of_scale * self.ends.abs() * (reach == reach.amax(0))
        else:  # a held weight's level moves with the zero point, and so with the lower end
            low = self.ends[0] * self.shares[0]
            by_scale = (of_scale - held * low / scales) / self._top
            slopes = torch.stack([(held - by_scale) * self.ends[0], by_scale * self.ends[1]])
        self.shares.sub_(slopes.sign_().mul_(rate)).clamp_(0, 1)

    @property
    def _fast(self) -> bool:
        """Whether the CPU's operations take it."""
        return self.scheme.group_size % cpu.LANES == 0 and cpu.ready(self.groups)

    def _by_rows(self, *by_output: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Weights, values and other tensors of some outputs at a time."""
        return zip(*(part.split(ROWS) for part in (self.groups, self.values, *by_output)), strict=True)

    @torch.no_grad()
    def codes(self) -> Codes:
        """The codes that the weight is rounded to."""
        scales, zeros = self._grid()
        codes = [
            (w / s).add_(v).round_().add_(z).clamp_(0, self._top).flatten(1).byte()
            for w, v, s, z in self._by_rows(scales, zeros)
        ]
        return Codes(torch.cat(codes), scales.squeeze(-1), zeros.squeeze(-1).byte())


def _step_rows(
    top: int, rate: float, w: Tensor, v: Tensor, scales: Tensor, zeros: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """`cpu.round_step` by PyTorch."""
    slope = gradient.float().view_as(w)
    plain = w / scales
    levels = (plain + v).round_()
    within = levels.clamp(-zeros, top - zeros)
    free = slope * (levels == within)  # of weights that no end of the grid holds
    held = slope.sum(-1, keepdim=True).sub_(free.sum(-1, keepdim=True))
    of_scale = within.mul_(slope).sub_(plain.mul_(free)).sum(-1, keepdim=True)
    v.sub_(free.sign_().mul_(rate)).clamp_(-0.5, 0.5)
    return held, of_scale


class Window:
    """Decoder layers whose roundings are learned together: copies, with the scales that a recipe has for them."""

    def __init__(self, layers: Sequence[DecoderLayer], recipe: Recipe) -> None:
        """Copies the layers and lets their linears' weights be learned."""
        self.layers = [replace(layer, module=unwatched(layer.module)) for layer in layers]
        self.roundings: dict[str, Rounding] = {}
        self.weights: dict[str, nn.Parameter] = {}
        for layer, mine in zip(layers, self.layers, strict=True):
            mine.module.requires_grad_(False)
            scale_vectors(mine, recipe)
            for name in layer.linears:
                full = layer.path(name)
                weight = layer.scaled_weight(name, recipe.scales)
                self.roundings[full] = Rounding(weight, recipe.scheme(full), recipe.clips.get(full))
                self.weights[full] = mine.module.get_parameter(f"{name}.weight")
                self.weights[full].requires_grad_(True)

    def write(self) -> None:
        """Gives the copies the weights that are rounded to."""
        for name, rounding in self.roundings.items():
            rounding.write(self.weights[name].detach())

    def step(self, rate: float) -> None:
        """Moves the roundings against the gradients of the weights that they gave, and forgets these."""
        for name, rounding in self.roundings.items():
            gradient = self.weights[name].grad
            if gradient is not None:  # nobody executed the layer
                rounding.step(gradient, rate)
            self.weights[name].grad = None

    def __call__(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The hidden states behind the window."""
        for layer in self.layers:
            hidden = layer.module(hidden, **arguments)
        return hidden

    @torch.no_grad()
    def outputs(self, calls: Sequence[tuple[Tensor, dict[str, Any]]]) -> list[Tensor]:
        """The hidden states behind the window as it is rounded now, by batch."""
        self.write()
        return [self(*call) for call in calls]

    @property
    def name(self) -> str:
        """Of its layers."""
        return " and ".join(layer.name for layer in self.layers)


def fit(
    window: Window,
    calls: Sequence[tuple[Tensor, dict[str, Any]]],
    wanted: Sequence[Tensor],
    shares: Sequence[Tensor],
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """Learns a window's roundings, by Σ_t share_t · ‖window(x_t) - y_t‖² of one batch a step.

    Args:
        calls: hidden states x before the window, `(B, T, D)`, and the layers' other arguments, by batch.
        wanted: y, behind it, `(B, T, D)`.
        shares: of each token, `(B, T)`.
        rate: of the first step.

    Raises:
        ValueError: the error isn't finite.
    """
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    for step in range(steps):
        order = order or torch.randperm(len(calls), generator=generator).tolist()
        i = order.pop()
        window.write()
        with torch.enable_grad():
            delta = window(*calls[i]).float() - wanted[i].float()
            error = (delta.square().sum(-1) * shares[i]).sum()
            error.backward()
        if not error.isfinite():
            raise ValueError(
                f"{window.name} has no finite output error: its weights or activations are too large"
            )
        window.step(rate * (1 - step / steps))


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
    layers, found = decoder_layers(model), []
    for recipe in started:
        learned = replace(recipe, clips={}, errors={}, damage={})
        exact, arguments = first_calls(model, some)
        seen = exact
        for first in range(0, len(layers), window):
            here = layers[first : first + window]
            exact = [_decided(here, *call) for call in zip(exact, arguments, strict=True)]
            shares = [token_shares(*one) for one in zip(some, exact, strict=True)]
            learner = Window(here, recipe)
            calls = [*zip(seen, arguments, strict=True)]
            fit(learner, calls, exact, shares, steps, lr / steps, seed)
            learned.codes.update({name: own.codes().cpu() for name, own in learner.roundings.items()})
            seen = learner.outputs(calls) if sequential else exact
            for layer in here:
                if progress:
                    progress(layer.name, recipe.tokens[layer.name])
        found.append(learned)
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
