"""What stands in for a layer that a token skips: a low-rank map, y = x + up(down(x)) instead of y = x."""

from torch import Tensor, nn


class StandIn(nn.Module):
    """Linear(hidden → rank) → Linear(rank → hidden), to be added to what skips; it changes nothing until it is fitted.

    After FlexiDepth's adapter and Informed Routing's forecaster (arXiv 2510.13831), at a rank that costs next to
    nothing.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """What the layer would add to hidden states ``(..., hidden)``, about."""
        return self.up(self.down(hidden_states))
