"""The router of one decoder layer: from a token's hidden state to its execute/skip logits."""

import torch
from torch import Tensor, nn

SKIP, EXECUTE = 0, 1

# D-LLM's initial bias of (skip, execute): training starts near 'execute', so near the pretrained model.
INITIAL_BIAS = (0.1, 2.0)


class Router(nn.Module):
    """Linear(hidden → width) → RMSNorm → SiLU → Linear(width → 2), always in float32 (D-LLM).

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
        if self.out.bias.device.type != "meta":
            with torch.no_grad():
                self.out.bias.copy_(torch.tensor(INITIAL_BIAS))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits (skip, execute), shape ``(..., 2)`` in float32, of hidden states ``(..., hidden)`` of any dtype."""
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.forward(hidden_states)
        hidden = self.down(hidden_states.float())
        return self.out(nn.functional.silu(self.norm(hidden)))


def execute_probability(logits: Tensor) -> Tensor:
    """p(execute) = softmax(g)[execute], shape ``(...)`` from logits ``(..., 2)``."""
    return logits.softmax(-1)[..., EXECUTE]


def gumbel_gate(logits: Tensor, temperature: float) -> Tensor:
    """Hard straight-through Gumbel-softmax decision w ∈ {0, 1}, shape ``(...)`` from logits ``(..., 2)``.

    The value is the hard decision, the gradient that of the soft one (paper, training decision; tau = 1 there).
    """
    return nn.functional.gumbel_softmax(logits, tau=temperature, hard=True)[..., EXECUTE]
