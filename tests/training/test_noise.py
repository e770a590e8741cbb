"""Noise of quantization: what a rounded block computes, its gradient, and how many blocks are drawn."""

import pytest
import torch

from qtale_lightning.models.routing import Routing
from qtale_lightning.quantization.rtn import Scheme, fake_quantize
from qtale_lightning.training import noise, noise_bits, rounded_blocks
from tests.test_module import make_batch, make_module, stepping
from tests.tolerance import close, depth


def test_only_the_second_half_is_noisy() -> None:
    assert [noise_bits(3, progress) for progress in (0.0, 0.49, 0.5, 1.0)] == [None, None, 3, 3]


def test_a_rounded_block_computes_what_its_merged_and_rounded_weights_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(noise, "SHARE", 1.0)
    module, batch = make_module(lora_alpha=16.0), make_batch()
    with torch.no_grad(), rounded_blocks(module.model, 3):
        noisy = module.model(
            batch["input_ids"], routing=Routing(threshold=0.0, sample=False), use_cache=False
        ).logits
    model = module.merge()
    with torch.no_grad():
        plain = model(batch["input_ids"], routing=Routing(threshold=0.0), use_cache=False).logits
        for layer in model.model.layers:
            for name, linear in layer.named_modules():
                if isinstance(linear, torch.nn.Linear) and not name.startswith("router"):
                    linear.weight.copy_(fake_quantize(linear.weight, Scheme(3, 128)))
        rounded = model(batch["input_ids"], routing=Routing(threshold=0.0), use_cache=False).logits
    close(noisy, rounded, 4 * depth(model.config))
    assert (noisy - plain).abs().max() > 100 * (noisy - rounded).abs().max()


def test_gradients_pass_as_if_nothing_were_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the same output's gradient, that of LoRA is the clean one."""
    monkeypatch.setattr(noise, "SHARE", 1.0)
    module = make_module()
    linear = module.model.model.layers[0].self_attn.q_proj
    x, gradients = torch.randn(5, linear.in_features), []
    for bits in (None, 2):
        with rounded_blocks(module.model, bits):
            output = linear(x)
        output.backward(torch.ones_like(output))
        gradients.append(linear.lora_B["default"].weight.grad.clone())
        linear.zero_grad()
    assert torch.equal(*gradients)


def test_half_of_the_blocks_are_drawn_anew_in_every_step() -> None:
    module, counts = make_module(), []
    torch.manual_seed(0)
    for _ in range(200):
        with rounded_blocks(module.model, 3):
            counts.append(sum(bool(layer.mlp.up_proj._forward_hooks) for layer in module.model.model.layers))
    assert not module.model.model.layers[0].mlp.up_proj._forward_hooks
    assert sum(counts) / 200 == pytest.approx(3.0, abs=0.4)  # of 6; four standard errors
    assert len(set(counts)) > 3


def test_training_is_noisy_and_validation_is_not() -> None:
    module, batch = stepping(make_module(noise_bits=2), 15, 20), make_batch()
    losses = {}
    for name, lambdas in (("train", module.scheduled_lambdas()), ("validation", None)):
        torch.manual_seed(0)
        losses[name] = module.losses(batch, Routing(sample=False, execution="masked"), 0.5, lambdas).ce
    module.noise_bits = None
    clean = module.losses(
        batch, Routing(sample=False, execution="masked"), 0.5, module.scheduled_lambdas()
    ).ce
    close(losses["validation"], clean, depth(module.model.config))
    assert (losses["train"] - clean).abs() > 1e-3
