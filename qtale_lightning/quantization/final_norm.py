"""The final norm, fitted to what rounding did to the layers before it.

It is the last weight between the quantized layers and the head, and keeps full precision, so that a better one costs
nothing at inference. Norm tweaking (Li et al., AAAI 2024) trains all norms on generated text; for the last one alone,
with a squared error of the logits, the best weight solves a linear system.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtale_lightning.architectures import architecture_of
from qtale_lightning.quantization.calibration import (
    Batch,
    every_nth,
    layer_by_layer,
    plain_float32,
    real_tokens,
)
from qtale_lightning.quantization.mappings import DecoderLayer
from qtale_lightning.quantization.recipe import Recipe, check_recipe, quantized_layer

TOKENS = 2048  # padded calibration tokens that the fit rests on, at least one batch
CHUNK = 256  # tokens whose logits are held at a time
DRAWS = 8  # vocabulary entries that a token's probabilities are sampled by
SHIFT = 0.1  # weight of a shift that all logits of a token share: no probability depends on it, logits do
RIDGE = 1e-2  # pull towards the weight as it was, relative to what each of its elements explains


def refit_final_norm(
    model: nn.Module, recipe: Recipe, batches: Sequence[Batch], routers: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The weight of the final norm with which a quantized model's logits are closest to the model's own.

    Minimises over γ, for the hidden states before the norm's weight, x of the model and y of the quantized one, and
    δ = W·(γ ∘ y - γ₀ ∘ x), with the head W and the model's probabilities p,

        Σ_tokens  Var_p(δ) + Var_uniform(δ) + SHIFT · mean(δ)²

    Var_p is twice the KL divergence to second order, and is estimated by draws from p; Var_uniform keeps the fit from
    ignoring what p says nothing about.

    Args:
        model: a LLaMA-family causal language model in full precision, in evaluation mode; it isn't changed.
        recipe: what a search found for it.
        batches: calibration tokens, as arguments of `model.model`.
        routers: parameters of its routers, by name, that fit the recipe; see `refit_routers`.

    Returns:
        Shape `(D,)`, float32.

    Raises:
        ValueError: the recipe is of another model, hidden states have NaN or infinity, or the fit has.
    """
    check_recipe(model, recipe)
    some = batches[:: every_nth(batches, TOKENS)]
    exact = _normalised(model, some, lambda layer: layer.module)
    found = _normalised(model, some, lambda layer: quantized_layer(layer, recipe, routers))
    if not found.isfinite().all():
        raise ValueError("the quantized model's hidden states have NaN or infinity: quantize at more bits")
    offset = architecture_of(model.config).norm_offset
    norm = model.get_parameter("model.norm.weight").detach().float() + offset
    head = model.get_parameter("lm_head.weight").detach()
    wanted = exact * norm
    with plain_float32(norm):
        uniform = _uniform_terms(head.float(), found, wanted)
    sampled = _sampled_terms(head, found, wanted)
    quadratic, linear = (one + other for one, other in zip(uniform, sampled, strict=True))
    ridge = RIDGE * quadratic.diagonal().clamp(min=1e-6 * quadratic.diagonal().mean().item())
    system = (quadratic + ridge.diag()).double()
    fitted = torch.linalg.solve(system, (linear + ridge * norm).double()).float()
    if not fitted.isfinite().all():
        raise ValueError(
            "the final norm can't be fitted to what rounding did: give --quantize.refit_norm false"
        )
    return fitted - offset


def _normalised(
    model: nn.Module, batches: Sequence[Batch], module_of: Callable[[DecoderLayer], nn.Module]
) -> Tensor:
    """The final norm's values before its weight, shape `(tokens, D)`, float32; `module_of` gives each layer to run."""
    states: list[Tensor] = []
    for layer, run in layer_by_layer(model, batches):
        states = run(module_of(layer))
    real = [hidden[real_tokens(batch)] for hidden, batch in zip(states, batches, strict=True)]
    norm: Any = model.get_submodule("model.norm")
    tokens = torch.cat(real).float()
    epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon  # families name it so or so
    return nn.functional.rms_norm(tokens, tokens.shape[-1:], eps=epsilon)


def _uniform_terms(head: Tensor, found: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Var_uniform + SHIFT · mean², as γᵀAγ - 2bᵀγ: shapes `(D, D)` and `(D,)`.

    Args:
        head: W, shape `(V, D)`.
        found, exact: y and γ₀ ∘ x, shape `(tokens, D)`.
    """
    mean = head.mean(0)
    metric = head.T @ head / len(head) - (1 - SHIFT) * mean.outer(mean)
    return metric * (found.T @ found), (metric * (found.T @ exact)).sum(1)


def _sampled_terms(head: Tensor, found: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """The same of Var_p, the mean over `DRAWS` entries v drawn from p of ((W_v - p·W)·(γ ∘ y - γ₀ ∘ x))²."""
    generator = torch.Generator(head.device).manual_seed(0)
    wide, width = head.float(), found.shape[1]
    quadratic, linear = found.new_zeros(width, width), found.new_zeros(width)
    for y, x in zip(found.split(CHUNK), exact.split(CHUNK), strict=True):
        with plain_float32(head):
            probabilities = (x @ wide.T).softmax(-1)
            mean = probabilities @ wide
        with plain_float32(x):
            drawn = probabilities.multinomial(DRAWS, replacement=True, generator=generator)
            rows = (head[drawn].float() - mean[:, None]).flatten(0, 1)  # (CHUNK · DRAWS, D)
            target = (rows * x.repeat_interleave(DRAWS, 0)).sum(-1) / DRAWS
            rows *= y.repeat_interleave(DRAWS, 0)
            quadratic.addmm_(rows.T, rows, alpha=1 / DRAWS)
            linear += rows.T @ target
    return quadratic, linear
