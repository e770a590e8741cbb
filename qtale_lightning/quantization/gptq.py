"""GPTQ (Frantar et al., GPTQ: Accurate post-training quantization, ICLR 2023; reference: IST-DASLab/gptq).

A layer's columns are rounded one after the other. Each one's error is made good, as well as the columns that aren't
rounded yet can, in the least squares of the outputs: with the Hessian H = XᵀX of the calibration inputs and the upper
Cholesky factor U of its inverse, H⁻¹ = UᵀU,

    e = (w_i - Q(w_i)) / U_ii,    w_j -= e · U_ij  for j > i

The codes are the method's own: no rounding of the weight gives them.

Arithmetic: H's second moments are summed in float32, as every search's; the factor and the recursion are computed in
float64. A block of columns takes over the errors of those before it at once, by a matrix product, where the recursion
of the paper subtracts them one by one: in float64 the two differ by 1e-16 of a weight, so that codes are the same.
Groups never straddle blocks, so that a group's scale always comes from its columns as they are when it begins; the
reference implementation, which is looser there, takes them without the errors of their own block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtale_lightning.quantization.calibration import plain_float32
from qtale_lightning.quantization.errors import output_errors
from qtale_lightning.quantization.mappings import DecoderLayer
from qtale_lightning.quantization.recipe import Codes, Recipe
from qtale_lightning.quantization.rtn import Scheme, quantize
from qtale_lightning.quantization.search import Observed, Search

BLOCK = 128  # columns whose errors are passed on at once


@dataclass(frozen=True)
class Inverse:
    """What the recursion needs of the second moments of an input; float64.

    Attributes:
        factor: U, upper triangular, of (H + damping)⁻¹ = UᵀU, shape `(in, in)`.
        order: in which columns are rounded, shape `(in,)`; None: from first to last.
        dead: inputs that are always zero, shape `(in,)`.
    """

    factor: Tensor
    order: Tensor | None
    dead: Tensor

    @classmethod
    def of(cls, gram: Tensor, percdamp: float = 0.01, act_order: bool = False) -> "Inverse":
        """Of H = XᵀX, shape `(in, in)`.

        Args:
            percdamp: what is added to the diagonal, as a share of its mean.
            act_order: columns in order of falling second moments.

        Raises:
            ValueError: the damped H isn't positive definite.
        """
        hessian = gram.to(torch.float64, copy=True)
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else None
        if order is not None:
            hessian = hessian[order][:, order]
        hessian.diagonal().add_(percdamp * hessian.diagonal().mean())
        try:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
            return cls(torch.linalg.cholesky(inverse, upper=True), order, dead)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"the second moments of its inputs have no inverse ({error}): calibrate on more sequences, or give a "
                "larger percdamp"
            ) from error


def gptq_codes(weight: Tensor, inverse: Inverse, scheme: Scheme) -> Codes:
    """The codes of a weight, shape `(out, in)`, by GPTQ's recursion.

    A group's scale comes from its columns when the recursion reaches it; where columns have an order of their own,
    which spreads a group's, from the weight as it was (static groups). Weights of inputs that are always zero become
    zero.
    """
    columns, size = weight.to(torch.float64, copy=True), scheme.group_size
    columns[:, inverse.dead] = 0
    width, top, order = columns.shape[1], 2**scheme.bits - 1, [*range(columns.shape[1])]
    codes = torch.empty_like(columns)
    grid = quantize(columns, scheme)
    scales, zeros = grid.scales.squeeze(-1).double(), grid.zeros.squeeze(-1).double()
    if inverse.order is not None:
        order = inverse.order.tolist()
        columns = columns[:, inverse.order]
    step = max(1, BLOCK // size) * size
    for first in range(0, width, step):
        here = slice(first, first + step)
        block, factor = columns[:, here], inverse.factor[here, here]
        errors = torch.empty_like(block)
        for i in range(block.shape[1]):
            at = order[first + i]
            group = at // size
            if inverse.order is None and at % size == 0:
                grid = quantize(block[:, i : i + size], scheme)
                scales[:, group], zeros[:, group] = grid.scales[:, 0, 0], grid.zeros[:, 0, 0]
            scale, zero = scales[:, group], zeros[:, group]
            codes[:, at] = (block[:, i] / scale).round_().add_(zero).clamp_(0, top)
            errors[:, i] = (block[:, i] - (codes[:, at] - zero) * scale) / factor[i, i]
            block[:, i:] -= errors[:, i : i + 1] * factor[i, i:]
        columns[:, first + step :] -= errors @ inverse.factor[here, first + step :]
    return Codes(codes.to(torch.uint8), scales.float(), zeros.to(torch.uint8))


def _search_layer(
    layer: DecoderLayer, seen: Observed, recipe: Recipe, percdamp: float, act_order: bool
) -> None:
    """Writes the codes of a decoder layer's linears at the recipe's bits into the recipe."""
    with plain_float32(next(iter(layer.linears.values())).weight):
        for mapping in layer.architecture.mappings:
            first = mapping.linears[0]
            try:
                inverse = Inverse.of(seen.moments[first].gram, percdamp, act_order)
            except ValueError as error:
                raise ValueError(f"{layer.path(first)}: {error}") from error
            for name in mapping.linears:
                full, weight = layer.path(name), layer.linears[name].weight.detach()
                recipe.codes[full] = gptq_codes(weight, inverse, recipe.scheme(full)).cpu()
        recipe.errors.update(output_errors(layer, seen.moments, recipe))


search = Search(_search_layer)
"""GPTQ's codes for every precision; see `qtale_lightning.quantization.engines.gptq`."""
