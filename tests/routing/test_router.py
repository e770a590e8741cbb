"""The router: float32 while training, its wide product in bfloat16 for inference.

Tolerance of the bfloat16 path: weights and hidden values are rounded to 8 bits, about 2⁻⁹ of their size each, in
independent directions; behind the norm hidden values are of size 1, so a logit moves by about 2⁻⁸ · ‖w_out‖. Four
times that is never reached by chance, and a wrong weight, bias or order of tokens is far beyond.
"""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qtale_lightning import cpu
from qtale_lightning.routing import router as module
from qtale_lightning.routing.router import EXECUTE, Router, gumbel_gate
from tests.tolerance import close

HIDDEN, WIDTH = 64, 32


@pytest.fixture
def router() -> Router:
    torch.manual_seed(0)
    router = Router(HIDDEN, WIDTH)
    nn.init.normal_(router.out.weight)
    return router.eval()


def states(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def reference(router: Router, x: Tensor) -> Tensor:
    """The definition, in float64."""
    down, bias, norm, out, last = (parameter.double() for parameter in router.parameters())
    hidden = x.double() @ down.T + bias
    hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6) * norm
    return hidden * hidden.sigmoid() @ out.T + last


def tolerance(router: Router) -> dict[str, float]:
    return {"rtol": 0.0, "atol": 4 * 2**-8 * float(router.out.weight.norm(dim=1).max())}


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 40), (2, 300), ()])
def test_inference_in_bfloat16_is_near_float32(router: Router, shape: tuple[int, ...]) -> None:
    x = states(*shape)
    logits = router(x)
    assert logits.shape == (*shape, 2)
    assert logits.dtype == torch.float32
    expected = reference(router, x).float()
    torch.testing.assert_close(logits, expected, **tolerance(router))
    close(router(x.float()), expected, HIDDEN + WIDTH)  # the float32 path itself
    assert not torch.equal(logits, router(x.float()))  # the two are different paths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_and_gradients_stay_in_float32(router: Router, dtype: torch.dtype) -> None:
    x = states(2, 6, dtype=dtype)
    with torch.no_grad():
        expected = router(x.float())
        router(x)  # a copy for inference may exist
        assert torch.equal(router.train()(x), expected)
    for training in (True, False):
        logits = router.train(training)(x)
        assert torch.equal(logits, expected)
        logits.sum().backward()
        assert router.down.weight.grad is not None
        assert router.down.weight.grad.any()


@torch.no_grad()
def test_autocast_does_not_reach_the_router(router: Router) -> None:
    for x in (states(2, 6), states(2, 6, dtype=torch.float32)):
        expected = router(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(router(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunks_do_not_change_results(router: Router, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs where our operations can't."""
    monkeypatch.setattr(cpu, "available", lambda: False)
    x = states(3, 50)
    whole = router(x)
    monkeypatch.setattr(module, "CHUNK", chunk * router.down.out_features)
    parts = router(x)
    # Products of other sizes may be summed in another order: a hidden value moves by its last bit.
    torch.testing.assert_close(parts, whole, **tolerance(router))
    alone = torch.cat([router(part) for part in x.flatten(0, 1).split(chunk)]).view_as(parts)
    assert torch.equal(parts, alone)


def step(router: Router) -> None:
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1)
    with torch.enable_grad():
        router(states(4)).sum().backward()
    optimizer.step()


def load(router: Router, **options: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    state = {k: torch.randn(v.shape, generator=generator) for k, v in router.state_dict().items()}
    router.load_state_dict(state, **options)


def replace(router: Router) -> None:
    router.down.weight = nn.Parameter(router.down.weight * -1)


def sharded(router: Router) -> None:
    """As FSDP writes: without a version. Training and back to inference must show it."""
    router.train()
    router.down.weight.data.mul_(-1)
    router.eval()


CHANGES: dict[str, Callable[[Router], object]] = {
    "in place": lambda router: router.down.weight.mul_(-1),
    "the bias alone": lambda router: router.down.bias.add_(3.0),
    "the norm": lambda router: router.norm.weight.mul_(-1),
    "optimizer": step,
    "load_state_dict": load,
    "load_state_dict, assigned": lambda router: load(router, assign=True),
    "another parameter": replace,
    "without a version": sharded,
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("length", [1, 5])
def test_a_changed_weight_is_seen(router: Router, change: str, length: int) -> None:
    x = states(length)
    before = router(x)
    CHANGES[change](router)
    fresh = Router(HIDDEN, WIDTH).eval()
    fresh.load_state_dict(router.state_dict())
    assert torch.equal(router(x), fresh(x))
    torch.testing.assert_close(router(x), reference(router, x).float(), rtol=0.0, atol=0.15)
    assert (router(x) - before).abs().max() > 0.2  # the change matters


@torch.no_grad()
def test_a_copy_is_independent(router: Router) -> None:
    x = states(5)
    before = router(x)
    twin = copy.deepcopy(router)
    assert torch.equal(twin(x), before)
    twin.down.weight.mul_(-1)
    assert not torch.equal(twin(x), before)
    assert torch.equal(router(x), before)
    saved = io.BytesIO()
    torch.save(router, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False)(x), before)


@torch.no_grad()
def test_the_copy_for_inference_is_not_saved(router: Router) -> None:
    keys = {"down.weight", "down.bias", "norm.weight", "out.weight", "out.bias"}
    router(states(5))
    assert set(router.state_dict()) == keys
    assert {name for name, _ in (*router.named_parameters(), *router.named_buffers())} == keys


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_for_the_model_around_it(router: Router, dtype: torch.dtype) -> None:
    before, x = copy.deepcopy(router.state_dict()), states(5)
    logits = router(x)
    around = nn.ModuleList([router, nn.Linear(2, 2)]).to(dtype)
    assert around[1].weight.dtype == dtype
    for name, value in router.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    assert torch.equal(router(x), logits)
    assert {p.device.type for p in router.to("meta", dtype).parameters()} == {"meta"}


def test_weights_made_in_inference_mode_are_float32() -> None:
    with torch.inference_mode():
        router = Router(HIDDEN, WIDTH).eval()
        assert torch.equal(router(states(5)), router(states(5).float()))


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_sampled_decision_is_gumbel_softmaxs(temperature: float) -> None:
    """Value and gradient of PyTorch's, from the same draws: bit for bit."""
    logits = torch.randn(100, 2, requires_grad=True)
    made, gradients = [], []
    for sample in (
        lambda: gumbel_gate(logits, temperature),
        lambda: nn.functional.gumbel_softmax(logits, tau=temperature, hard=True)[..., EXECUTE],
    ):
        torch.manual_seed(0)
        made.append(sample())
        gradients.append(torch.autograd.grad(made[-1].sum(), logits)[0])
    assert torch.equal(*made)
    assert torch.equal(*gradients)


def test_a_decision_without_noise_is_inferences_with_the_soft_ones_gradient() -> None:
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.5], [0.3, 0.3]], requires_grad=True)
    decided = gumbel_gate(logits, 1.0, noise=0.0)
    assert decided.tolist() == [1.0, 0.0, 1.0]  # p(execute) ≥ 0.5
    (gradient,) = torch.autograd.grad(decided.sum(), logits)
    p = logits.detach().softmax(-1)[:, EXECUTE]
    close(gradient[:, EXECUTE], p * (1 - p), 1)
