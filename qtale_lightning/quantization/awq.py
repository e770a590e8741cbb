"""AWQ's search for scales and clips, from second moments (Lin et al., AWQ, MLSys 2024; reference: AutoAWQ).

For a linear W with calibration inputs X, the matrix G = XᵀX holds all that the output error needs:

    ‖X·ΔWᵀ‖² = tr(ΔW·G·ΔWᵀ)

so that X is never stored and one forward pass of the model feeds the searches of every bit width.

What this shares with AutoAWQ and where it differs:
- Scales of `o_proj` and `down_proj`: AutoAWQ's objective exactly (up to its mean over outputs).
- Scales of `q,k,v` and of `gate,up`: AutoAWQ compares the outputs of the whole attention block and of the
  whole MLP. Here the objective is the summed output error of the linears themselves, an approximation.
- Clips: AutoAWQ's objective without its token dimension. AutoAWQ takes a stride of about 512 tokens; here all
  tokens count. `q` and `k` are not clipped, as in AutoAWQ.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtale_lightning.quantization.mappings import (
    LINEARS,
    MAPPINGS,
    NOT_CLIPPED,
    DecoderLayer,
    decoder_layers,
    quantized_linear_names,
)
from qtale_lightning.quantization.result import (
    AWQSearch,
    OutputError,
    apply,
    apply_scales,
    clip_weight,
    scaled_weight,
)
from qtale_lightning.quantization.rtn import check_quantizable, fake_quantize

__all__ = [
    "AWQSearch",
    "apply",
    "apply_scales",
    "quantized_linear_names",
    "search",
    "search_clip",
    "search_scale",
]

MIN_TOKENS = 32  # fewest calibration tokens that a layer's search may rest on
SCALE_STEPS = 20  # ratios 0, 1/20, …, 19/20 between weight and activation magnitude
CLIP_STEPS, CLIP_STEP = 10, 1 / 20  # a group's largest magnitude is shrunk by 0, 1/20, …, 9/20
MOMENT_ROWS = 4096  # tokens converted to float32 at a time while moments are summed


@dataclass
class Moments:
    """Sums over the calibration tokens X of one input: G = XᵀX, shape `(in, in)`, and |x|, shape `(in,)`."""

    gram: Tensor
    abs_sum: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, width: int, device: torch.device | str = "cpu") -> "Moments":
        return cls(torch.zeros(width, width, device=device), torch.zeros(width, device=device))

    def add(self, inputs: Tensor) -> None:
        """Adds tokens, shape `(..., in)`, in float32."""
        for rows in inputs.reshape(-1, inputs.shape[-1]).split(MOMENT_ROWS):
            rows = rows.float()
            self.gram.addmm_(rows.T, rows)
            self.abs_sum.add_(rows.abs().sum(0))
            self.tokens += len(rows)


def output_error(delta: Tensor, gram: Tensor) -> Tensor:
    """‖X·ΔWᵀ‖² = tr(ΔW·G·ΔWᵀ) of a weight change, shape `(out, in)`, and G = XᵀX, shape `(in, in)`."""
    return (delta @ gram).mul_(delta).sum()


def search_scale(weight: Tensor, moments: Moments, bits: int, group_size: int) -> Tensor:
    """AWQ's grid search for the input scales of linears that share an input.

        s = argmin ‖X·(Q(W·s)/s - W)ᵀ‖²,  s = mean|x|^r / mean(w)^(1-r),  r = 0, 1/20, …, 19/20

    where w is |W| relative to its group's largest value, and s is normalised by √(max(s)·min(s)) (AutoAWQ's
    `duo_scaling`).

    Args:
        weight: the linears' weights below one another, shape `(out, in)`, float32.

    Returns:
        Shape `(in,)`.

    Raises:
        ValueError: no candidate has a finite error.
    """
    groups = weight.abs().unflatten(-1, (-1, group_size))
    w_mean = (groups / (groups.amax(-1, keepdim=True) + 1e-6)).flatten(-2).mean(0)
    x_mean = moments.abs_sum / moments.tokens
    best_scale, best_error = None, float("inf")
    for step in range(SCALE_STEPS):
        ratio = step / SCALE_STEPS
        scale = (x_mean.pow(ratio) / (w_mean.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        scale = scale.where(scale.isfinite(), 1.0)
        delta = fake_quantize(weight * scale, bits, group_size).div_(scale).sub_(weight)
        error = output_error(delta, moments.gram).item()
        if error < best_error:
            best_scale, best_error = scale, error
    if best_scale is None:
        raise ValueError("no AWQ scale has a finite output error: its weights or activations are too large")
    return best_scale


def search_clip(weight: Tensor, gram: Tensor, bits: int, group_size: int) -> Tensor:
    """AWQ's search for the largest magnitude in each output's groups: how far to clip before rounding.

    A group's own part of the output is compared, so its error needs G's diagonal block of that group alone.

    Args:
        weight: shape `(out, in)`, float32, scaled.
        gram: second moment of the scaled inputs, shape `(in, in)`.

    Returns:
        Shape `(out, in / group_size)`.
    """
    by_group = (-1, group_size)
    blocks = gram.unflatten(1, by_group).unflatten(0, by_group).diagonal(dim1=0, dim2=2)  # (g, g, n_groups)
    blocks = blocks.permute(2, 0, 1).contiguous()  # (n_groups, g, g)
    groups = weight.unflatten(1, by_group).transpose(0, 1).contiguous()  # (n_groups, out, g)
    peak = groups.abs().amax(-1, keepdim=True)
    best, best_error = peak, torch.full_like(peak, float("inf"))
    for step in range(CLIP_STEPS):
        limit = peak * (1 - step * CLIP_STEP)
        delta = fake_quantize(groups.clamp(-limit, limit), bits, group_size).sub_(groups)
        error = torch.bmm(delta, blocks).mul_(delta).sum(-1, keepdim=True)
        better = error < best_error
        best, best_error = limit.where(better, best), error.where(better, best_error)
    return best.squeeze(-1).T.contiguous()


def search(
    model: nn.Module,
    forward: Callable[[], Any],
    bits: Sequence[int],
    group_size: int,
    *,
    min_tokens: int = MIN_TOKENS,
    progress: Callable[[str, int], None] | None = None,
) -> dict[int, AWQSearch]:
    """Searches scales and clips for every bit width in one forward pass.

    The model is never changed, so later layers see full-precision inputs, as in AutoAWQ, and only one layer's
    moments exist at any time. Every token that reaches a linear counts: a routed layer that calls its linears
    for its executing tokens alone is measured on those, and padding must not get there.

    Args:
        model: a LLaMA-family causal language model in evaluation mode.
        forward: runs the calibration tokens through the model in one call; `model.model(...)` suffices, and
            saves the logits' memory.
        min_tokens: fewest tokens that a layer's search may rest on.
        progress: called after each layer with its name and its number of tokens.

    Returns:
        One result for each of `bits`.

    Raises:
        ValueError: the group size doesn't fit, weights or activations have NaN or infinity, a layer saw too
            few tokens or ran more than once, or a search found no finite error.
    """
    layers = decoder_layers(model)
    linears = {layer.path(name): linear for layer in layers for name, linear in layer.linears.items()}
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    for width in bits:
        check_quantizable(shapes, width, group_size)
    for name, linear in linears.items():
        if not linear.weight.isfinite().all():
            raise ValueError(
                f"the weights of {name} have NaN or infinity: check the checkpoint and the merge"
            )
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() before the AWQ search")

    results = {width: AWQSearch(width, group_size) for width in bits}
    tokens: dict[str, int] = {}
    moments: dict[str, Moments] = {}  # of the layer that is running, by the first linear that reads the input

    def accumulate(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0]
            with _float32(inputs.device):
                if name not in moments:
                    moments[name] = Moments.zeros(inputs.shape[-1], inputs.device)
                moments[name].add(inputs)

        return hook

    def finish(layer: DecoderLayer) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if layer.name in tokens:
                raise ValueError(f"{layer.name} ran twice: give all calibration tokens in one model call")
            _check_moments(layer, moments, min_tokens)
            with _float32(layer.linears[LINEARS[0]].weight.device):
                for result in results.values():
                    _search_layer(layer, moments, result)
            tokens[layer.name] = moments[LINEARS[0]].tokens
            moments.clear()
            if progress:
                progress(layer.name, tokens[layer.name])

        return hook

    handles = []
    try:
        for layer in layers:
            for mapping in MAPPINGS:
                first = mapping.linears[0]
                handles.append(layer.linears[first].register_forward_pre_hook(accumulate(first)))
            handles.append(layer.module.register_forward_hook(finish(layer)))
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        if layer.name not in tokens:
            _check_moments(layer, {}, min_tokens)
    for result in results.values():
        result.tokens.update(tokens)
    return results


def _search_layer(layer: DecoderLayer, moments: dict[str, Moments], result: AWQSearch) -> None:
    """Searches one decoder layer at the result's bit width and writes what it finds into the result."""
    bits, group_size = result.bits, result.group_size
    # [STEP 1] Scales, each mapping on the unscaled weights.
    for mapping in layer.scaled_mappings():
        weight = torch.cat([layer.linears[name].weight.float() for name in mapping.linears])
        try:
            scale = search_scale(weight, moments[mapping.linears[0]], bits, group_size)
        except ValueError as error:
            raise ValueError(f"{layer.name}, {', '.join(mapping.linears)}, {bits} bits: {error}") from error
        result.scales[layer.path(mapping.previous)] = scale.cpu()
    for mapping in MAPPINGS:
        # [STEP 2] Clips, on the scaled weights and the inputs' scaled moments.
        inputs = moments[mapping.linears[0]]
        unscaled = torch.ones(())
        columns = result.scales.get(layer.path(mapping.previous), unscaled).to(inputs.gram)
        gram = inputs.gram / (columns.reshape(-1, 1) * columns)
        for name in mapping.linears:
            scaled = scaled_weight(layer, name, result.scales)
            clip = None if name in NOT_CLIPPED else search_clip(scaled, gram, bits, group_size)
            if clip is not None:
                result.clips[layer.path(name)] = clip.cpu()
            # [STEP 3] The errors before and after, both of the unscaled outputs.
            weight = layer.linears[name].weight.float()
            rows = result.scales.get(layer.path(name), unscaled).to(weight).reshape(-1, 1)
            rtn = fake_quantize(weight, bits, group_size)
            awq = fake_quantize(clip_weight(scaled, clip), bits, group_size) / columns * rows
            result.errors[layer.path(name)] = OutputError(
                *(output_error(w - weight, inputs.gram).item() / inputs.tokens / len(w) for w in (rtn, awq))
            )


def _check_moments(layer: DecoderLayer, moments: dict[str, Moments], min_tokens: int) -> None:
    """Raises ValueError where a layer's search would rest on too few tokens, or on NaN or infinity."""
    for mapping in MAPPINGS:
        name = layer.path(mapping.linears[0])
        seen = moments.get(mapping.linears[0])
        tokens = seen.tokens if seen else 0
        if seen is None or tokens < max(min_tokens, 1):
            raise ValueError(
                f"{name} saw {tokens} calibration tokens, the AWQ search needs {max(min_tokens, 1)} or more: "
                "calibrate on more rows, or at a lower router threshold"
            )
        if not seen.gram.diagonal().isfinite().all():
            raise ValueError(
                f"the activations into {name} have NaN or infinity: check the model on these rows"
            )


@contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """Plain float32 arithmetic, whatever autocast or inference mode the calibration forward runs in."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
