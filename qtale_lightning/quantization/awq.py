"""AWQ's search for scales and clips, from second moments (Lin et al., AWQ, MLSys 2024; reference: AutoAWQ).

For a linear W with calibration inputs X, the matrix G = XᵀX holds all that the output error needs:

    ‖X·ΔWᵀ‖² = tr(ΔW·G·ΔWᵀ)

so that X is never stored and one pass over the calibration tokens feeds the searches of every precision.

What this shares with AutoAWQ and where it differs:
- Scales of `o_proj` and `down_proj`: AutoAWQ's objective exactly (up to its mean over outputs).
- Scales of `q,k,v` and of `gate,up`: AutoAWQ compares the outputs of the whole attention block and of the
  whole MLP. Here the objective is the summed output error of the linears themselves, an approximation.
- Clips: AutoAWQ's objective without its token dimension. AutoAWQ takes a stride of about 512 tokens; here all
  tokens count. `q` and `k` are not clipped, as in AutoAWQ.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qtale_lightning.quantization.calibration import (
    MIN_TOKENS,
    Batch,
    Moments,
    check_model,
    collect_moments,
    layer_by_layer,
    plain_float32,
)
from qtale_lightning.quantization.mappings import LINEARS, MAPPINGS, NOT_CLIPPED, DecoderLayer
from qtale_lightning.quantization.precision import Bits
from qtale_lightning.quantization.recipe import OutputError, Recipe, clip_limit, clip_weight
from qtale_lightning.quantization.rtn import Scheme, fake_quantize

SCALE_STEPS = 20  # ratios 0, 1/20, …, 19/20 between weight and activation magnitude
ROWS = 256  # outputs searched at a time: little memory, and a working set that a core's cache holds
CLIP_STEPS = 10  # a group's largest magnitude is shrunk by 0, 1/20, …, 9/20


def output_error(delta: Tensor, gram: Tensor) -> Tensor:
    """‖X·ΔWᵀ‖² = tr(ΔW·G·ΔWᵀ) of a weight change, shape `(out, in)`, and G = XᵀX, shape `(in, in)`."""
    return (delta @ gram).mul_(delta).sum()


def search_scale(weights: Sequence[Tensor], moments: Moments, schemes: Sequence[Scheme]) -> Tensor:
    """AWQ's grid search for the input scales of linears that share an input.

        s = argmin ‖X·(Q(W·s)/s - W)ᵀ‖²,  s = mean|x|^r / mean(w)^(1-r),  r = 0, 1/20, …, 19/20

    where w is |W| relative to its group's largest value, and s is normalised by √(max(s)·min(s)) (AutoAWQ's
    `duo_scaling`).

    Args:
        weights: the linears' weights, each of shape `(out, in)`; computed in float32.
        schemes: how each is rounded; the group size is the same.

    Returns:
        Shape `(in,)`.

    Raises:
        ValueError: no candidate has a finite error.
    """
    candidates = _scale_candidates(weights, moments, schemes[0].group_size)
    errors = [0.0] * len(candidates)
    for weight, scheme in zip(weights, schemes, strict=True):
        for rows in weight.split(ROWS):
            rows = rows.float()
            for i, scale in enumerate(candidates):
                delta = fake_quantize(rows * scale, scheme).div_(scale).sub_(rows)
                errors[i] += output_error(delta, moments.gram).item()
    finite = [i for i, error in enumerate(errors) if math.isfinite(error)]
    if not finite:
        raise ValueError("no AWQ scale has a finite output error: its weights or activations are too large")
    return candidates[min(finite, key=errors.__getitem__)]


def _scale_candidates(weights: Sequence[Tensor], moments: Moments, group_size: int) -> list[Tensor]:
    """The scales that `search_scale` tries, each of shape `(in,)`."""
    total = torch.zeros_like(moments.abs_sum)
    for weight in weights:
        for rows in weight.split(ROWS):
            groups = rows.float().abs().unflatten(-1, (-1, group_size))
            total += (groups / (groups.amax(-1, keepdim=True) + 1e-6)).flatten(-2).sum(0)
    w_mean = total / sum(map(len, weights))
    x_mean = moments.abs_sum / moments.tokens
    candidates = []
    for step in range(SCALE_STEPS):
        ratio = step / SCALE_STEPS
        scale = (x_mean.pow(ratio) / (w_mean.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        candidates.append(scale.where(scale.isfinite(), 1.0))
    return candidates


def search_clip(weight: Tensor, gram: Tensor, scheme: Scheme) -> Tensor:
    """AWQ's search for how far to clip each output's groups before rounding.

    A group's own part of the output is compared, so its error needs G's diagonal block of that group alone.

    Args:
        weight: shape `(out, in)`, float32, scaled.
        gram: second moment of the scaled inputs, shape `(in, in)`.

    Returns:
        Steps of `CLIP_STEP`, shape `(out, in / group_size)`, uint8.
    """
    by_group = (-1, scheme.group_size)
    blocks = gram.unflatten(1, by_group).unflatten(0, by_group).diagonal(dim1=0, dim2=2)  # (g, g, n_groups)
    blocks = blocks.permute(2, 0, 1).contiguous()  # (n_groups, g, g)
    return torch.cat([_search_clip(rows, blocks, scheme) for rows in weight.split(ROWS)])


def _search_clip(weight: Tensor, blocks: Tensor, scheme: Scheme) -> Tensor:
    """`search_clip` of some rows, given G's diagonal blocks, shape `(n_groups, g, g)`."""
    groups = weight.unflatten(1, (-1, scheme.group_size)).transpose(0, 1).contiguous()  # (n_groups, out, g)
    peak = groups.abs().amax(-1, keepdim=True)
    best = torch.zeros_like(peak, dtype=torch.uint8)
    best_error = torch.full_like(peak, float("inf"))
    for step in range(CLIP_STEPS):
        limit = clip_limit(peak, best.new_tensor(step))
        delta = fake_quantize(groups.clamp(-limit, limit), scheme).sub_(groups)
        error = torch.bmm(delta, blocks).mul_(delta).sum(-1, keepdim=True)
        better = error < best_error
        best.masked_fill_(better, step)
        best_error = error.where(better, best_error)
    return best.squeeze(-1).T.contiguous()


def search(
    model: nn.Module,
    batches: Sequence[Batch],
    precisions: Sequence[Bits],
    group_size: int,
    symmetric: bool = False,
    *,
    min_tokens: int = MIN_TOKENS,
    progress: Callable[[str, int], None] | None = None,
) -> list[Recipe]:
    """Searches scales and clips for every precision in one pass over the calibration tokens.

    Args:
        model: a LLaMA-family causal language model in evaluation mode; it isn't changed.
        batches: calibration tokens, as arguments of `model.model`.
        precisions: each gives bits by linear.
        min_tokens: fewest tokens that a layer's search may rest on.
        progress: called after each layer with its name and its number of tokens.

    Returns:
        One recipe for each of `precisions`.

    Raises:
        ValueError: the group size doesn't fit, weights or activations have NaN or infinity, a layer saw too
            few tokens, or a search found no finite error.
    """
    for bits in precisions:
        check_model(model, bits, group_size)
    recipes = [Recipe("native", dict(bits), group_size, symmetric) for bits in precisions]
    for layer, run in layer_by_layer(model, batches):
        moments = collect_moments(layer, run, min_tokens)
        tokens = moments[LINEARS[0]].tokens
        with plain_float32(layer.linears[LINEARS[0]].weight.device):
            for recipe in recipes:
                _search_layer(layer, moments, recipe)
                recipe.tokens[layer.name] = tokens
        if progress:
            progress(layer.name, tokens)
        del moments  # before the next layer's are summed
    return recipes


def _search_layer(layer: DecoderLayer, moments: dict[str, Moments], recipe: Recipe) -> None:
    """Searches one decoder layer at the recipe's bits and writes what it finds into the recipe."""
    scheme = {name: recipe.scheme(layer.path(name)) for name in LINEARS}
    # [STEP 1] Scales, each mapping on the unscaled weights.
    for mapping in layer.scaled_mappings():
        weights = [layer.linears[name].weight.detach() for name in mapping.linears]
        schemes = [scheme[name] for name in mapping.linears]
        try:
            scale = search_scale(weights, moments[mapping.linears[0]], schemes)
        except ValueError as error:
            widths = ", ".join(f"{name} at {scheme[name].bits} bits" for name in mapping.linears)
            raise ValueError(f"{layer.name}, {widths}: {error}") from error
        recipe.scales[layer.path(mapping.previous)] = scale.cpu()
    # [STEP 2] Clips, on the weights with scaled columns and the inputs' scaled moments.
    for mapping in MAPPINGS:
        gram = moments[mapping.linears[0]].gram
        if (columns := recipe.scales.get(layer.path(mapping.previous))) is not None:
            gram = gram / (columns[:, None] * columns).to(gram)
        for name in mapping.linears:
            if name not in NOT_CLIPPED:
                scaled = layer.scaled_columns(name, recipe.scales)
                recipe.clips[layer.path(name)] = search_clip(scaled, gram, scheme[name]).cpu()
    # [STEP 3] What it gained.
    recipe.errors.update(output_errors(layer, moments, recipe))


def output_errors(layer: DecoderLayer, moments: dict[str, Moments], recipe: Recipe) -> dict[str, OutputError]:
    """The errors of a layer's linears under a recipe, by full name; all of them are of the unscaled outputs."""
    errors = {}
    for mapping in MAPPINGS:
        inputs = moments[mapping.linears[0]]
        scale = recipe.scales.get(layer.path(mapping.previous), torch.ones(())).to(inputs.gram)
        for name in mapping.linears:
            full, weight = layer.path(name), layer.linears[name].weight.detach()
            scheme, clips = recipe.scheme(full), recipe.clips.get(full)
            sums = [0.0, 0.0, 0.0]
            for first in range(0, len(weight), ROWS):
                rows = weight[first : first + ROWS].float()
                clipped = clip_weight(rows * scale, None if clips is None else clips[first : first + ROWS])
                deltas = (
                    fake_quantize(rows, scheme) - rows,
                    fake_quantize(clipped, scheme) / scale - rows,
                    rows,
                )
                for i, delta in enumerate(deltas):
                    sums[i] += output_error(delta, inputs.gram).item()
            errors[full] = OutputError(*(value / inputs.tokens / len(weight) for value in sums))
    return errors
