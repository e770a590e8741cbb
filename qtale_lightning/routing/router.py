"""The router of one decoder layer: from a token's hidden state to its execute/skip logits."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from qtale_lightning import cpu
from qtale_lightning.huge_pages import placed
from qtale_lightning.watch import note_change, state_of

SKIP, EXECUTE = 0, 1

# D-LLM's initial bias of (skip, execute): training starts near 'execute', so near the pretrained model.
INITIAL_BIAS = (0.1, 2.0)

# Numbers that a router normalises at a time on a CPU: half a MB in float32, so that they stay in a core's cache.
CHUNK = 2**17
# Tokens of decoding: a router's time is that of reading its weights.
FEW = 8


class Router(nn.Module):
    """Linear(hidden → width) → RMSNorm → SiLU → Linear(width → 2); weights are float32 always (D-LLM).

    It reads the raw residual stream, not the normalised one: AWQ folds its scales into the layer's norm, and a
    router behind that norm would be rescaled with it.

    Args:
        hidden_size: Width of the residual stream.
        width: Width of the router. D-LLM uses 512.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, width, dtype=torch.float32)
        self.norm = nn.RMSNorm(width, eps=1e-6, dtype=torch.float32)
        self.out = nn.Linear(width, 2, dtype=torch.float32)
        self._fits = hidden_size % cpu.LANES == width % cpu.LANES == 0  # what the CPU's operations take
        # The wide product's weights in bfloat16, for inference, and the state of those that they were made from.
        self._low: tuple[object, Tensor, Tensor] | None = None
        if self.out.bias.device.type != "meta":
            self.begin_at(INITIAL_BIAS)

    @torch.no_grad()
    def begin_at(self, bias: Sequence[float]) -> None:
        """Begin training at a bias of (skip, execute)."""
        self.out.bias.copy_(torch.tensor(bias))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves to another device; a new floating dtype is for the model around it."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)

    def train(self, mode: bool = True) -> Self:
        """As ever; and the copy for inference is made anew, since a version doesn't tell of every change.

        Sharded training and `.data` write weights without one.
        """
        self._low = None
        return super().train(mode)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits (skip, execute), shape ``(..., 2)`` in float32, of hidden states ``(..., hidden)`` of any dtype."""
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.forward(hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        inference = not self.training and not torch.is_grad_enabled()
        few = inference and device == "cpu" and len(tokens) <= FEW
        low = inference and self._goes_low(tokens.dtype)
        ours = inference and self._fits and cpu.ready(tokens)
        if few and ours:
            down, bias = self._down(low)
            logits = cpu.route(tokens.contiguous(), down, bias, *self._rest())
        elif low and ours:
            logits = cpu.route_wide(self._low_product(tokens), *self._rest())
        elif low:
            logits = self._in_chunks(self._low_product(tokens))
        else:
            logits = self._logits(self.down(tokens.float()))
        return logits.view(*hidden_states.shape[:-1], 2)

    def _goes_low(self, dtype: torch.dtype) -> bool:
        """Whether tokens of a dtype are multiplied in bfloat16 at inference."""
        # Weights made in inference mode have no version to tell their changes by.
        return dtype == torch.bfloat16 and not self.down.weight.is_inference()

    def _down(self, low: bool) -> tuple[Tensor, Tensor]:
        return self._low_weights() if low else (self.down.weight, self.down.bias)

    def operands(self, dtype: torch.dtype) -> list[Tensor]:
        """What `cpu.decoder` takes of it, for tokens of a dtype."""
        norm, _, out, out_bias = self._rest()
        down, bias = self._down(self._goes_low(dtype))
        return [down, bias.float(), norm, out, out_bias]

    def _rest(self) -> tuple[Tensor, float, Tensor, Tensor]:
        """What follows the wide product, as the CPU's operations take it."""
        assert self.norm.eps is not None
        return self.norm.weight, self.norm.eps, self.out.weight, self.out.bias

    def _in_chunks(self, wide: Tensor) -> Tensor:
        """Logits ``(N, 2)`` of the wide product in bfloat16, ``(N, width)``."""
        rows = max(1, CHUNK // self.down.out_features) if wide.is_cpu else len(wide)
        parts = [self._logits(chunk.float()) for chunk in wide.split(rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.out(nn.functional.silu(self.norm(hidden)))

    def _low_product(self, tokens: Tensor) -> Tensor:
        """The wide product ``(N, width)`` of tokens ``(N, hidden)`` in their own precision, bfloat16.

        On a CPU that is several times as fast as float32, and rounds as every other product of the model does:
        benchmarks/router.py counts what it decides otherwise.
        """
        weight, bias = self._low_weights()
        if self._fits and cpu.ready(tokens, weight) and len(tokens) <= cpu.few_tokens():
            return cpu.dense_linear(tokens.contiguous(), weight, bias)
        if len(tokens) == 1 and tokens.is_cpu:
            return torch.addmv(bias, weight, tokens[0]).unsqueeze(0)
        return nn.functional.linear(tokens, weight, bias)

    def _low_weights(self) -> tuple[Tensor, Tensor]:
        sources = self.down.weight, self.down.bias
        state = tuple(map(state_of, sources))
        if self._low is None or self._low[0] != state:
            self._low = state, placed(sources[0].bfloat16()), sources[1].bfloat16()
            note_change()
        return self._low[1:]


def execute_probability(logits: Tensor) -> Tensor:
    """p(execute) = softmax(g)[execute], shape ``(...)`` from logits ``(..., 2)``."""
    return logits.softmax(-1)[..., EXECUTE]


def logit_gap(logits: Tensor) -> Tensor:
    """execute − skip, ``(...)`` from logits ``(..., 2)``: the log-odds of p(execute)."""
    return logits[..., EXECUTE] - logits[..., SKIP]


def gumbel_gate(logits: Tensor, temperature: float, noise: float = 1.0) -> Tensor:
    """Hard straight-through Gumbel-softmax decision w ∈ {0, 1}, shape ``(...)`` from logits ``(..., 2)``.

    The value is the hard decision, the gradient that of the soft one (paper, training decision; tau = 1 there).
    ``noise`` scales Gumbel's draws: with 0 the value is inference's decision at θ = 0.5.
    """
    draws = -torch.empty_like(logits).exponential_().log()
    soft = ((logits + noise * draws) / temperature).softmax(-1)[..., EXECUTE]
    hard = (soft >= 0.5).to(soft.dtype)
    return hard - soft.detach() + soft
