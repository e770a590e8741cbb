"""AWQ's search for scales and clips, from second moments (Lin et al., AWQ, MLSys 2024; reference: AutoAWQ).

For a linear W with calibration inputs X, the matrix G = XᵀX holds all that the output error needs:

    ‖X·ΔWᵀ‖² = tr(ΔW·G·ΔWᵀ)

so that X needn't be stored and one pass over the calibration tokens feeds the searches of every precision.

What this shares with AutoAWQ and where it differs:
- Scales of `o_proj` and `down_proj`: AutoAWQ's objective exactly (up to its mean over outputs).
- Scales of `q,k,v` and of `gate,up`: as AutoAWQ, by the output error of the whole attention block and of the whole
  MLP, which second moments don't give: the block is run again, on some of the tokens. Unlike AutoAWQ, a token's error
  is relative to the residual stream that it is added to, whose norm the next layer divides by; and 9 of the 20
  candidates are tried instead of all.
- Clips: AutoAWQ's objective without its token dimension. AutoAWQ takes a stride of about 512 tokens; here all
  tokens count. `q` and `k` are not clipped, as in AutoAWQ.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from qtale_lightning.architectures import Architecture, ScaleMapping
from qtale_lightning.quantization.calibration import Moments, plain_float32
from qtale_lightning.quantization.damage import damage_behind
from qtale_lightning.quantization.errors import output_error, output_errors
from qtale_lightning.quantization.mappings import DecoderLayer
from qtale_lightning.quantization.recipe import Recipe, clip_limit
from qtale_lightning.quantization.replay import Replay
from qtale_lightning.quantization.rtn import Scheme, fake_quantize
from qtale_lightning.quantization.search import Observed, Search

SCALE_STEPS = 20  # ratios 0, 1/20, …, 19/20 between weight and activation magnitude
ROWS = 256  # outputs searched at a time: little memory, and a working set that a core's cache holds
RECORDED_TOKENS = 1024  # padded calibration tokens on which blocks are run again, at least one batch
SAMPLE = 8  # of the outputs of a linear, one in eight ranks its candidate scales, ...
SHORTLIST = 4  # ... and the first of them are compared on all outputs;
FEWEST_SAMPLED = 64  # of fewer outputs than these times eight, all candidates are
CLIP_STEPS = 10  # a group's largest magnitude is shrunk by 0, 1/20, …, 9/20


Objective = Callable[[Tensor], float]
"""The error of some outputs under input scales, shape `(in,)`."""


def scale_candidates(weights: Sequence[Tensor], moments: Moments, group_size: int) -> list[Tensor]:
    """AWQ's candidates for the input scales of linears that share an input, each of shape `(in,)`.

        s = mean|x|^r / mean(w)^(1-r),  r = 0, 1/20, …, 19/20

    where w is |W| relative to its group's largest value, and s is normalised by √(max(s)·min(s)) (AutoAWQ's
    `duo_scaling`).

    Args:
        weights: the linears' weights, each of shape `(out, in)`; computed in float32.
    """
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


def linear_objective(weight: Tensor, gram: Tensor, scheme: Scheme) -> Objective:
    """‖X·(Q(W·s)/s - W)ᵀ‖² of one linear, of weight `(out, in)` or some of its rows, from G = XᵀX alone."""

    def error(scale: Tensor) -> float:
        total = 0.0
        for rows in weight.split(ROWS):
            rows = rows.float()
            total += output_error(fake_quantize(rows * scale, scheme).div_(scale).sub_(rows), gram).item()
        return total

    return error


def block_objective(
    replay: Replay,
    weights: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
    residuals: Iterable[Tensor],
) -> Objective:
    """Σ_t ‖B(x_t; Q(W·s)/s) - B(x_t; W)‖² / ‖h_t‖² of a block B, whose output is added to the residual stream h.

    Args:
        replay: the block; those of its linears that share the scales are overwritten.
        weights: theirs, by their names in the block.
        schemes: how each of them is rounded.
        residuals: h of each of the replayed calls, shape `(…, D)`.
    """
    linears = {name: replay.module.get_submodule(name).get_parameter("weight") for name in weights}
    expected = [output.float() for output in replay.outputs()]
    shares = [h.float().square().sum(-1, keepdim=True).clamp(min=1e-12).reciprocal() for h in residuals]

    def error(scale: Tensor) -> float:
        for name, weight in weights.items():
            for rows, changed in zip(weight.split(ROWS), linears[name].split(ROWS), strict=True):
                changed.copy_(fake_quantize(rows.float() * scale, schemes[name]).div_(scale))
        return sum(
            ((found.float() - exact).square_() * share).sum().item()
            for found, exact, share in zip(replay.outputs(), expected, shares, strict=True)
        )

    return error


def best_of_all(
    candidates: Sequence[Tensor], error: Objective, estimate: Objective | None = None
) -> tuple[Tensor, float]:
    """The candidate of least error, and its error.

    Every one is tried, as AutoAWQ does; with an estimate of the error, those that it ranks first.

    Raises:
        ValueError: no candidate has a finite error.
    """
    tried = list(range(len(candidates)))
    if estimate is not None:
        estimates = {i: value for i in tried if math.isfinite(value := estimate(candidates[i]))}
        tried = sorted(estimates, key=estimates.__getitem__)[:SHORTLIST]
    errors = {i: error(candidates[i]) for i in tried}
    best = _least(errors)
    return candidates[best], errors[best]


def best_by_halving(candidates: Sequence[Tensor], error: Objective) -> tuple[Tensor, float]:
    """The candidate of least error, and its error, where errors fall, then rise along them, as they do but for noise.

    Every fourth is tried, then the neighbours of the best at half the distance, and so on: 9 of 20 are.

    Raises:
        ValueError: no candidate has a finite error.
    """
    step = 4
    errors = {i: error(candidates[i]) for i in range(0, len(candidates), step)}
    while step > 1:
        step //= 2
        best = _least(errors)
        errors |= {i: error(candidates[i]) for i in (best - step, best + step) if 0 <= i < len(candidates)}
    best = _least(errors)
    return candidates[best], errors[best]


def _least(errors: Mapping[int, float]) -> int:
    finite = [i for i, error in errors.items() if math.isfinite(error)]
    if not finite:
        raise ValueError("no AWQ scale has a finite output error: its weights or activations are too large")
    return min(finite, key=errors.__getitem__)


def search_clip(weight: Tensor, gram: Tensor, scheme: Scheme, columns: Tensor | None = None) -> Tensor:
    """AWQ's search for how far to clip each output's groups before rounding.

    A group's own part of the output is compared, so its error needs G's diagonal block of that group alone.

    Args:
        weight: shape `(out, in)`, unscaled.
        gram: second moment of the inputs, shape `(in, in)`, unscaled.
        columns: the scales that the weight's columns are multiplied and the inputs divided by, shape `(in,)`.

    Returns:
        Steps of `CLIP_STEP`, shape `(out, in / group_size)`, uint8.
    """
    by_group = (-1, scheme.group_size)
    blocks = gram.unflatten(1, by_group).unflatten(0, by_group).diagonal(dim1=0, dim2=2)  # (g, g, n_groups)
    blocks = blocks.permute(2, 0, 1).contiguous()  # (n_groups, g, g)
    scales = torch.ones(()) if columns is None else columns
    scales = scales.to(gram).expand(len(gram))
    grouped = scales.unflatten(0, by_group)
    blocks /= grouped[:, :, None] * grouped[:, None, :]
    return torch.cat([_search_clip(rows.float() * scales, blocks, scheme) for rows in weight.split(ROWS)])


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


def _search_layer(layer: DecoderLayer, seen: Observed, recipe: Recipe) -> None:
    """Searches one decoder layer at the recipe's bits and writes what it finds into the recipe."""
    family = layer.architecture
    # [STEP 1] Scales, each mapping on the unscaled weights.
    for mapping in layer.scaled_mappings():
        scale, error = _search_scale(layer, seen, recipe, mapping)
        recipe.scales[layer.path(mapping.previous)] = scale.cpu()
        if len(mapping.linears) > 1:
            tokens = sum(h.shape[:-1].numel() for h in _residuals(seen, family, mapping))
            recipe.damage[layer.path(mapping.previous)] = error / tokens
    with plain_float32(layer.linears[family.linears[0]].weight):
        # [STEP 2] Clips, on the weights with scaled columns.
        for mapping in family.mappings:
            gram = seen.moments[mapping.linears[0]].gram
            columns = recipe.scales.get(layer.path(mapping.previous))
            for name in mapping.linears:
                if name not in family.not_clipped:
                    weight = layer.linears[name].weight.detach()
                    clips = search_clip(weight, gram, recipe.scheme(layer.path(name)), columns)
                    recipe.clips[layer.path(name)] = clips.cpu()
        # [STEP 3] The errors that are left.
        recipe.errors.update(output_errors(layer, seen.moments, recipe))
        for mapping in family.mappings:
            if len(mapping.linears) == 1:  # it writes into the residual stream
                linear = mapping.linears[0]
                outputs, error = layer.linears[linear].out_features, recipe.errors[layer.path(linear)]
                stream = torch.cat(
                    [h.float().square().sum(-1).flatten() for h in _residuals(seen, family, mapping)]
                )
                recipe.damage[layer.path(mapping.previous)] = outputs * error / stream.mean().item()

    for mapping in family.mappings:
        if behind := family.norms_behind.get(mapping.block):
            calls, residuals = seen.calls[mapping.block], _residuals(seen, family, mapping)
            recipe.damage[layer.path(mapping.previous)] = damage_behind(
                layer, calls, residuals, recipe, mapping, behind
            )


def _residuals(seen: Observed, family: Architecture, mapping: ScaleMapping) -> list[Tensor]:
    """The residual stream that a mapping's block adds to, in the recorded calls, each of shape `(…, D)`.

    Where a routed layer is asked for some of the tokens that leave keys and values, it is those tokens'.
    """
    found = []
    calls = zip(seen.calls[family.norm_of(mapping)], seen.calls[mapping.block], strict=True)
    for ((stream, *_), _), (args, kwargs) in calls:
        routed = [one for one in (*args, *kwargs.values()) if hasattr(one, "asked")]
        found.append(routed[0].asked(stream) if routed else stream)
    return found


# Autocast is left as it is: a block must run as it ran in calibration.
@torch.inference_mode(False)
@torch.no_grad()
def _search_scale(
    layer: DecoderLayer, seen: Observed, recipe: Recipe, mapping: ScaleMapping
) -> tuple[Tensor, float]:
    """The scales of one mapping, shape `(in,)`, and the error that they leave by their objective.

    Raises:
        ValueError: no candidate has a finite error; names the layer and its linears.
    """
    weights = {name: layer.linears[name].weight.detach() for name in mapping.linears}
    schemes = {name: recipe.scheme(layer.path(name)) for name in mapping.linears}
    first = mapping.linears[0]
    with plain_float32(weights[first]):
        moments = seen.moments[first]
        candidates = scale_candidates([*weights.values()], moments, recipe.group_size)
    try:
        if len(weights) == 1:
            with plain_float32(weights[first]):
                weight, gram, scheme = weights[first], moments.gram, schemes[first]
                exact, sample = (linear_objective(rows, gram, scheme) for rows in (weight, weight[::SAMPLE]))
                return best_of_all(
                    candidates, exact, sample if len(weight) >= FEWEST_SAMPLED * SAMPLE else None
                )
        block = mapping.inspected
        inside = {name.removeprefix(f"{block}."): weight for name, weight in weights.items()}
        rounded = {name.removeprefix(f"{block}."): scheme for name, scheme in schemes.items()}
        replay = Replay(layer.module.get_submodule(block), seen.calls[block], changed=inside)
        objective = block_objective(replay, inside, rounded, _residuals(seen, layer.architecture, mapping))
        return best_by_halving(candidates, objective)
    except ValueError as error:
        widths = ", ".join(f"{name} at {scheme.bits} bits" for name, scheme in schemes.items())
        raise ValueError(f"{layer.name}, {widths}: {error}") from error


def _recorded(architecture: Architecture) -> list[str]:
    """What a block objective compares: the blocks' calls, and the inputs of the norms before them, the stream."""
    blocks = [mapping for mapping in architecture.mappings if len(mapping.linears) > 1]
    return [name for mapping in blocks for name in (architecture.norm_of(mapping), mapping.inspected)]


search = Search(_search_layer, _recorded, recorded_tokens=RECORDED_TOKENS)
"""AWQ's scales and clips for every precision."""
