"""Stand-ins for skipped layers in closed form: the best low-rank prediction of what a layer adds, from second moments.

For a layer with inputs x and what it adds d = layer(x) − x, both centred over the tokens that may skip it, with
G = E[x xᵀ] and C = E[x dᵀ], least squares are W = G⁻¹C, and the best map of rank r (reduced-rank regression) is
W V Vᵀ, with V the r leading right singular vectors of G^½ W: directions of d of which x predicts most.
"""

from typing import Any

import torch
from torch import Tensor

from qtale_lightning.models.modeling import RoutedForCausalLM
from qtale_lightning.models.routing import Routing
from qtale_lightning.routing import Rows

RIDGE = 1e-3  # of the mean variance of x, added to all of them


class _Moments:
    """Sums over tokens of one layer, float64."""

    def __init__(self) -> None:
        self.count = 0
        self.x: Any = 0.0
        self.d: Any = 0.0
        self.xx: Any = 0.0
        self.xd: Any = 0.0

    def add(self, x: Tensor, d: Tensor) -> None:
        """Tokens ``(N, D)`` each."""
        x, d = x.double(), d.double()
        self.count += len(x)
        self.x, self.d = self.x + x.sum(0), self.d + d.sum(0)
        self.xx, self.xd = self.xx + x.T @ x, self.xd + x.T @ d

    def fit(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of ``down (rank, D)`` and ``up (D, rank)``, and the bias ``(D,)``."""
        x, d = self.x / self.count, self.d / self.count
        gram, cross = self.xx / self.count - torch.outer(x, x), self.xd / self.count - torch.outer(x, d)
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        root = torch.linalg.cholesky(gram)  # G = L Lᵀ; Lᵀ is a G^½ as good as any
        predicted = torch.linalg.solve_triangular(root, cross, upper=False)  # Lᵀ W
        leading = torch.linalg.eigh(predicted.T @ predicted).eigenvectors[:, -rank:]
        down = torch.linalg.solve_triangular(root.T, predicted @ leading, upper=True).T
        return down, leading, d - leading @ (down @ x)


@torch.no_grad()
def fit_stand_ins(model: RoutedForCausalLM, rows: Rows) -> None:
    """Fit all stand-ins of a model, in place, to what its layers do at full depth on training rows.

    Tokens that always execute aren't counted.
    """
    layers = [layer for layer in model.model.layers if layer.stand_in is not None]
    moments, first = [_Moments() for _ in layers], model.config.reserved_tokens

    def watch(found: _Moments) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            x, y = (states[0, first:].float() for states in (args[0], output))
            found.add(x, y - x)

        return hook

    handles = [
        layer.register_forward_hook(watch(found)) for layer, found in zip(layers, moments, strict=True)
    ]
    training = model.training
    model.eval()
    try:
        for sequence in rows.sequences:
            model.model(
                torch.tensor([sequence], device=model.device),
                routing=Routing(threshold=0.0, execution="packed"),
                use_cache=False,
            )
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    for layer, found in zip(layers, moments, strict=True):
        down, up, bias = found.fit(layer.stand_in.down.out_features)
        layer.stand_in.down.weight.copy_(down)
        layer.stand_in.up.weight.copy_(up)
        layer.stand_in.up.bias.copy_(bias)
