"""A weight's rounding and clipping, and a step of sign gradient descent on both: what `signround` learns.

A group of weights w, with a value v in [-1/2, 1/2] for each of them, and α and β in [0, 1] for the group, is rounded to

    s = (β·max(w) - α·min(w)) / (2^bits - 1),   z = round(-α·min(w) / s)
    Q(w) = s · (clamp(round(w/s + v) + z, 0, 2^bits - 1) - z)

where max(w) ≥ 0 ≥ min(w); symmetric, s = max(β·max(w), -α·min(w)) / (2^(bits-1) - 1) and z = 2^(bits-1). The gradient
passes `round` as if it weren't there, and `clamp` where that changes nothing.

What follows from the gradient of Q(w) for v, α and β is written out here, in float32: PyTorch's own would hold a dozen
tensors of the weight's size, and pass memory as often. On a CPU that can, `cpu.round_groups` and `cpu.round_step` do it
in one pass each; elsewhere some rows are taken at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qtale_lightning import cpu
from qtale_lightning.quantization.recipe import CLIP_STEP, Codes
from qtale_lightning.quantization.rtn import Scheme

ROWS = 64  # outputs taken at a time: little memory, and a working set that a core's cache holds;
ROWS_ELSEWHERE = 4096  # on a GPU as many as keep it busy
REACH = 0.5  # of v: a weight goes to one of its two neighbours


class Rounding:
    """How a weight is rounded, and learns to be; see the module's formulas.

    Attributes:
        values: v, shape `(out, n_groups, group_size)`, float32.
        shares: α and β, shape `(2, out, n_groups, 1)`, float32.
    """

    def __init__(
        self, weight: Tensor, scheme: Scheme, clips: Tensor | None = None, reach: float = REACH
    ) -> None:
        """Rounds to nearest, first.

        Args:
            weight: shape `(out, in)`; kept in float32.
            clips: steps of `CLIP_STEP` of each group's largest magnitude, shape `(out, n_groups)`; None clips nothing.
            reach: largest magnitude of v.
        """
        self.scheme, self.reach = scheme, reach
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

    def _step_of(self, bits: int | None) -> int:
        """How many neighbouring codes have the same highest `bits`."""
        return 2 ** (self.scheme.bits - (bits or self.scheme.bits))

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
    def write(self, weight: Tensor, bits: int | None = None) -> None:
        """Writes what the weight is rounded to into a tensor, `(out, in)`: by its codes' highest `bits`, or all."""
        scales, zeros = self._grid()
        if self._fast:
            cpu.round_groups(self.groups, self.values, scales, zeros, self._top, self._step_of(bits), weight)
            return
        for w, v, s, z, to in self._by_rows(scales, zeros, weight):
            levels = (w / s).add_(v).round_().clamp_(-z, self._top - z)
            to.copy_(_kept(levels, z, self._step_of(bits)).mul_(s).flatten(1))

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: float, bits: int | None = None) -> None:
        """Moves v, α and β by `rate` against the sign of their gradients, given that of the rounded weight.

        Args:
            gradient: of what `write` wrote, shape `(out, in)`.
            bits: as `write` took it.
        """
        scales, zeros = self._grid()
        top, step = self._top, self._step_of(bits)
        if self._fast:
            slopes = gradient.contiguous()
            parts = [
                cpu.round_step(self.groups, self.values, scales, zeros, top, step, slopes, rate, self.reach)
            ]
        else:
            parts = [
                _step_rows(top, step, rate, self.reach, *rows)
                for rows in self._by_rows(scales, zeros, gradient)
            ]
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
        rows = ROWS if self.groups.is_cpu else ROWS_ELSEWHERE
        return zip(*(part.split(rows) for part in (self.groups, self.values, *by_output)), strict=True)

    @torch.no_grad()
    def codes(self) -> Codes:
        """The codes that the weight is rounded to."""
        scales, zeros = self._grid()
        codes = [
            (w / s).add_(v).round_().add_(z).clamp_(0, self._top).flatten(1).byte()
            for w, v, s, z in self._by_rows(scales, zeros)
        ]
        return Codes(torch.cat(codes), scales.squeeze(-1), zeros.squeeze(-1).byte())


def _kept(levels: Tensor, zeros: Tensor, step: int) -> Tensor:
    """Levels, code - z, without their codes' lowest bits: of `step` neighbours the middle."""
    if step == 1:
        return levels
    return (levels + zeros).div_(step).floor_().mul_(step).add_((step - 1) / 2).sub_(zeros)


def _step_rows(
    top: int,
    step: int,
    rate: float,
    reach: float,
    w: Tensor,
    v: Tensor,
    scales: Tensor,
    zeros: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, Tensor]:
    """`cpu.round_step` by PyTorch."""
    slope = gradient.float().view_as(w)
    plain = w / scales
    levels = (plain + v).round_()
    within = levels.clamp(-zeros, top - zeros)
    free = slope * (levels == within)  # of weights that no end of the grid holds
    held = slope.sum(-1, keepdim=True).sub_(free.sum(-1, keepdim=True))
    of_scale = _kept(within, zeros, step).mul_(slope).sub_(plain.mul_(free)).sum(-1, keepdim=True)
    v.sub_(free.sign_().mul_(rate)).clamp_(-reach, reach)
    return held, of_scale
