"""LoRA with dropout at its output: values and gradients against PyTorch's own operations, and what drops out."""

from contextlib import nullcontext

import pytest
import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from qtale_lightning.models.adapters import DroppedOutput, add_lora, mark_trainable

Gradients = list[Tensor | None]


def adapted(drop: float, dtype: torch.dtype = torch.float32) -> Linear:
    """A frozen linear (24 → 20) with LoRA of rank 4, none of it zero, in training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20, dtype=dtype))
    add_lora(model, 4, 6.0, drop, "output", "normal", ["0"])
    linear = model.get_submodule("0")
    assert type(linear) is DroppedOutput
    nn.init.normal_(linear.lora_B["default"].weight)
    mark_trainable(model, everything=False)
    return linear


def run(linear: Linear, x: Tensor, grad: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Gradients]:
    """Its output and the gradients of x, A and B; by PyTorch's own operations with `keep`, which multiplies LoRA's."""
    down, up = (part["default"].weight for part in (linear.lora_A, linear.lora_B))
    x = x.clone().requires_grad_()
    down.grad = up.grad = None
    if keep is None:
        y = linear(x)
    else:
        base = linear.base_layer(x)
        with torch.autocast("cpu", enabled=False):
            change = (
                nn.functional.linear(nn.functional.linear(x.float(), down), up) * linear.scaling["default"]
            )
            y = base + (change * keep).to(base.dtype)
    y.backward(grad.to(y.dtype))
    return y.detach(), [x.grad, down.grad, up.grad]


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("drop", [0.0, 0.05, 0.5])
def test_values_and_gradients(drop: float, low: bool) -> None:
    """In float32 as close as sums in another order are; in bfloat16, of what is rounded once, to its last bit."""
    linear = adapted(drop, torch.bfloat16 if low else torch.float32)
    x, grad = torch.randn(3, 7, 24), torch.randn(3, 7, 20)
    with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
        given, gradients = run(linear, x, grad)
        base = linear.base_layer(x)
        kept = (given != base).float() / (1 - drop)
        expected, wanted = run(linear, x, grad, kept)
    tolerance = 2**-7 if low else 1e-5
    torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(gradients, wanted, strict=True):
        assert mine is not None
        assert theirs is not None
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("drop", [0.05, 0.5])
@pytest.mark.parametrize("tokens", [4001, 4003])
def test_what_is_dropped(drop: float, tokens: int) -> None:
    """Within 5 standard errors the share that is asked for, in all places, anew at each call; nothing in evaluation."""
    linear = adapted(drop)
    x = torch.randn(tokens, 24)
    with torch.no_grad():
        base = linear.base_layer(x)
        once, again = (linear(x) == base for _ in range(2))
        assert not (linear.eval()(x) == base).any()
    for dropped in (once, again):
        error = (drop * (1 - drop) / dropped.numel()) ** 0.5
        assert abs(dropped.float().mean().item() - drop) < 5 * error
        assert (dropped.float().mean(0) - drop).abs().max().item() < 5 * error * 20**0.5
    both = (once & again).float().mean().item()
    assert abs(both - drop**2) < 5 * (drop**2 / once.numel()) ** 0.5


def test_seeds_repeat_it() -> None:
    linear, x = adapted(0.5), torch.randn(5, 24)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(linear(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
