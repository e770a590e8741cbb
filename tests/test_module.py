"""The LightningModule: gradients, invariances, checkpoints and resuming."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.losses import Losses
from qtale_lightning.models.routing import Routing
from qtale_lightning.module import QTALEModule
from tests.objectives import objective
from tests.tolerance import close, depth

Make = Callable[..., QTALEModule]


def make_module(**options: Any) -> QTALEModule:
    """The tiny model with LoRA and routers, its decisions mixed."""
    module = QTALEModule(**{"name": "tiny", "router_width": 16, "lora_dropout": 0.0, **options})
    module.configure_model()
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)  # zero at first: then LoRA's A would get no gradient
            if name.endswith("router.out.bias"):
                parameter.zero_()
    return module


def make_batch(lengths: tuple[int, ...] = (12, 9, 7, 10)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    width, count = max(lengths), torch.tensor(lengths)
    ids = torch.randint(3, 700, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < count[:, None]).long()
    answer = mask.bool() & (torch.arange(width) >= count[:, None] - 3)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(~answer, -100)}


def rows(batch: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: value[start:stop] for name, value in batch.items()}


def decided(module: QTALEModule, batch: dict[str, Tensor]) -> Routing:
    """A routing for training's execution whose decisions are the routers' own, so that losses can be compared."""
    return Routing(sample=False, execution="masked")


def test_a_fresh_module_is_in_training_mode() -> None:
    assert all(part.training for part in make_module().modules())


def test_gradient_reaches_lora_and_the_router_of_every_layer() -> None:
    module = make_module()
    torch.manual_seed(0)
    module.losses(make_batch(), Routing(), 0.5).total.backward()
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    routers = {
        name.split(".")[2]
        for name, p in module.model.named_parameters()
        if ".router." in name and p.requires_grad
    }
    assert routers == {"2", "3", "4", "5"}


def test_cross_entropy_alone_reaches_every_router() -> None:
    """Through the mix and through the attention's gates, without the help of the other losses."""
    module = make_module()
    torch.manual_seed(0)
    module.losses(make_batch(), Routing(), 0.5).ce.backward()
    for layer in module.model.model.layers[2:]:
        assert layer.router.down.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["qtale", "mod"])
def test_losses_do_not_depend_on_padding(method: str) -> None:
    module, batch = make_module(**objective(method)), make_batch()
    wider = {
        name: torch.nn.functional.pad(value, (0, 6), value=-100 if name == "labels" else 0)
        for name, value in batch.items()
    }
    narrow, wide = (module.losses(b, decided(module, b), 0.5) for b in (batch, wider))
    assert wide.terms.keys() == narrow.terms.keys() == module.lambdas.keys() & wide.terms.keys() != set()
    for one, other in ((wide.ce, narrow.ce), (wide.total, narrow.total), *_pairs(wide, narrow)):
        close(one, other, depth(module.model.config))


def _pairs(one: Losses, other: Losses) -> list[tuple[Tensor, Tensor]]:
    return [(one.terms[name], other.terms[name]) for name in one.terms]


def test_gradients_do_not_depend_on_accumulation() -> None:
    module, batch = make_module(), make_batch()
    module.losses(batch, decided(module, batch), 0.5).total.backward()
    whole = {n: p.grad.clone() for n, p in module.model.named_parameters() if p.grad is not None}
    module.zero_grad()
    for start in (0, 2):
        part = rows(batch, start, start + 2)
        (module.losses(part, decided(module, part), 0.5).total / 2).backward()
    for name, parameter in module.model.named_parameters():
        if name in whole:
            close(parameter.grad, whole[name], 2 * depth(module.model.config))  # forward and back


def test_full_method_has_no_routers_and_no_routing_losses() -> None:
    module = make_module(**objective("full"))
    losses = module.losses(make_batch(), Routing(), 0.5)
    assert losses.terms == {}
    assert torch.equal(losses.total, losses.ce)
    assert not [name for name, _ in module.model.named_parameters() if ".router." in name]


def test_checkpoint_holds_trainable_weights_only_and_refuses_others() -> None:
    module = make_module()
    state = module.state_dict()
    assert state
    assert all("lora_" in name or ".router." in name for name in state)
    other = make_module(router_width=8)
    with pytest.raises(ValueError, match=r"another model or configuration.*router"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="missing"):
        make_module().load_state_dict(dict(list(state.items())[:-1]))


def test_lora_drops_out_of_its_output() -> None:
    """D-LLM's: y = Wx + dropout(B(Ax)), scale 1, A normal with a standard deviation of 1 / rank, B zero."""
    module = QTALEModule(name="tiny", router_width=16, lora_rank=4, lora_dropout=0.5)
    module.configure_model()
    linear = module.model.model.layers[0].self_attn.q_proj
    assert linear.lora_A["default"].weight.std().item() == pytest.approx(1 / 4, rel=0.1)
    assert linear.scaling["default"] == 1.0
    assert not linear.lora_B["default"].weight.any()
    x = torch.randn(64, linear.in_features)
    with torch.no_grad():
        linear.lora_B["default"].weight.normal_()
        base, change = linear.base_layer(x), linear.lora_B["default"](linear.lora_A["default"](x))
        given = linear(x) - base
        dropped = given.abs() < 1e-6
        assert 0.45 < dropped.float().mean().item() < 0.55
        close(given[~dropped], 2 * change[~dropped], 2)
        close(linear.eval()(x), base + change, 2)


def test_lora_of_peft_is_an_option() -> None:
    options = {"lora_dropout_at": "input", "lora_init": "uniform", "lora_alpha": 16.0}
    linear = make_module(**options).model.model.layers[0].self_attn.q_proj
    assert type(linear) is peft.tuners.lora.Linear
    assert linear.scaling["default"] == 2.0
    assert linear.lora_A["default"].weight.abs().max().item() <= linear.in_features**-0.5


def test_merging_keeps_the_logits() -> None:
    module, batch = make_module(), make_batch()
    module.eval()
    with torch.no_grad():
        before = module.model(batch["input_ids"], routing=Routing(threshold=0.5), use_cache=False).logits
        after = module.merge()(batch["input_ids"], routing=Routing(threshold=0.5), use_cache=False).logits
    close(after, before, depth(module.model.config))
    assert not [name for name, _ in module.model.named_parameters() if "lora" in name]


def stepping(module: QTALEModule, step: int, steps: int) -> QTALEModule:
    """The module within a training of so many steps."""
    module._trainer = SimpleNamespace(global_step=step, estimated_stepping_batches=steps)  # type: ignore[assignment]
    return module


@pytest.mark.parametrize(("schedule", "noises"), [(0.0, [1.0] * 3), (0.8, [1.0, 0.375, 0.0])])
def test_the_noise_in_decisions_falls(schedule: float, noises: list[float]) -> None:
    module = QTALEModule(name="tiny", noise_schedule=schedule)
    found = [stepping(module, step, 20).scheduled_noise() for step in (0, 10, 18)]
    assert found == pytest.approx(noises)


@pytest.mark.parametrize(
    ("schedule", "shares"), [("sine", [0.0, math.sqrt(0.5), 1.0]), ("constant", [1.0] * 3)]
)
def test_the_ratio_weight_rises_along_a_sine(schedule: str, shares: list[float]) -> None:
    module = QTALEModule(name="tiny", lambda_ratio=4.0, lambda_ratio_schedule=schedule)
    for step, share in zip((0, 10, 20), shares, strict=True):
        lambdas = stepping(module, step, 20).scheduled_lambdas()
        assert lambdas["ratio"] == pytest.approx(4.0 * share)
        assert lambdas["entropy"] == 0.5


@pytest.mark.parametrize(("decays", "vectors"), [("matrices", 0.0), ("all", 0.02)])
def test_biases_and_norms_do_not_decay(decays: str, vectors: float) -> None:
    module = stepping(make_module(weight_decay_on=decays, router_lr=1e-3), 0, 20)
    optimizer = module.configure_optimizers()["optimizer"]
    decay = {
        parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
    }
    trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
    assert len(decay) == len(trained)
    for name, parameter in trained.items():
        assert decay[parameter] == (vectors if name.endswith(("bias", "norm.weight")) else 0.02), name
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    rates = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
    assert rates["weights"] == 2.8e-4
    assert rates["routers"] == 1e-3


class Interrupt(Callback):
    """Stops training as a crash would, behind a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.should_stop = True


# Every tool for training at once.
TOOLS: dict[str, Any] = {
    "ratio_budget": "sequence",
    "ratio_ascent": 0.5,
    "router_bias": (0.0, 1.0),
    "distillation": 0.5,
    "stages": "lora-first",
    "noise_bits": 3,
    "noise_schedule": 0.8,
    "keep_kv": True,
    "stand_in_rank": 4,
}
SUBLAYERS: dict[str, Any] = {"gates": "sublayer", "ratio_ascent": 0.5}  # which doesn't go with the last two


def train(
    root: Path,
    resume: Path | None = None,
    interrupt: int | None = None,
    accumulate: int = 1,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> QTALEModule:
    """Ten steps on a few facts, with dropout, Gumbel noise, a schedule and a shuffled order."""
    module = QTALEModule(
        name="tiny",
        router_width=16,
        train_all=False,
        ratio_schedule=0.5,
        lr=1e-3,
        lora_dropout=0.1,
        **options,
    )
    data = CommonsenseDataModule(
        "facts", batch_size=8, limit_train=56, limit_validation=8, calibration_rows=8
    )
    data.tokenizer = module.tokenizer
    checkpoint = ModelCheckpoint(dirpath=root, save_last=True, every_n_train_steps=1, save_top_k=0)
    trainer = L.Trainer(
        max_steps=10, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[checkpoint, *([Interrupt(interrupt)] if interrupt else [])], use_distributed_sampler=False,
        limit_val_batches=0, accumulate_grad_batches=accumulate, default_root_dir=root,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return module


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # each part keeps its checkpoints apart
@pytest.mark.slow
@pytest.mark.parametrize(
    ("interrupt", "accumulate", "options"),
    [(3, 1, {}), (6, 1, {}), (7, 1, {}), (4, 2, {}), (7, 2, TOOLS), (7, 1, SUBLAYERS)],
)
def test_resumed_training_equals_uninterrupted(
    tmp_path: Path, interrupt: int, accumulate: int, options: dict[str, Any]
) -> None:
    """Interrupted within the first epoch of six batches, at its end, and within the second: bit for bit the same."""
    whole = train(tmp_path / "whole", accumulate=accumulate, options=options)
    train(tmp_path / "part", interrupt=interrupt, accumulate=accumulate, options=options)
    resumed = train(
        tmp_path / "rest", resume=tmp_path / "part" / "last.ckpt", accumulate=accumulate, options=options
    )
    assert resumed.multiplier.value == whole.multiplier.value
    assert bool(options) == (whole.multiplier.value > 0)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_options_are_taken_as_a_configuration_has_them() -> None:
    """Lists of YAML, such as a run's own config.yaml has."""
    module = QTALEModule(name="tiny", betas=[0.8, 0.9], router_bias=[0, 1], lora_targets=["q_proj"])
    assert module.betas == (0.8, 0.9)
    with pytest.raises(ValueError, match=r"--model.betas 1.0: must be >= 0 and < 1"):
        QTALEModule(name="tiny", betas=[0.9, 1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "gpt2"}, "unknown model 'gpt2'.*llama2-7b"),
        ({"method": "magic"}, "unknown method 'magic'.*qtale"),
        ({"target_ratio": 1.5}, "target_ratio 1.5"),
        ({"method": "dllm", "lambda_entropy": 0.5}, "lambda_entropy"),
        ({"method": "mod", "lambda_entropy": 0.0}, "lambda_ratio is 5.0, and must be 0"),
        ({"lambda_prediction": 1.0}, "method qtale has no prediction loss"),
        ({"lr": 0.0}, "--model.lr"),
        ({"lr": float("nan")}, "--model.lr nan: must be > 0 and < infinity"),
        ({"router_lr": float("inf")}, "--model.router_lr inf"),
        ({"lambda_ratio": float("nan")}, "--model.lambda_ratio nan"),
        ({"weight_decay": -0.1}, "--model.weight_decay -0.1"),
        ({"target_ratio": float("nan")}, "target_ratio nan"),
        ({"betas": (0.9,)}, r"--model.betas \[0.9\]: give two"),
        ({"router_bias": (0.1, float("inf"))}, r"--model.router_bias \[0.1, inf\]: give two numbers"),
        ({**objective("random"), "noise_schedule": 0.5}, "random has no noise in its decisions"),
        ({"noise_schedule": 1.5}, "noise_schedule 1.5"),
        ({"noise_bits": 9}, "--model.noise_bits 9: must be >= 2 and <= 8"),
        ({"distillation": float("nan")}, "--model.distillation nan"),
        ({"teacher": "there"}, "--model.teacher there has no effect without --model.distillation"),
        ({**objective("full"), "distillation": 1.0}, "full skips nothing.*another --model.teacher"),
        ({**objective("static"), "stand_in_rank": 8}, "static skips nothing by tokens"),
        ({"stand_in_rank": -1}, "--model.stand_in_rank -1"),
        ({**objective("full"), "keep_kv": True}, "--model.keep_kv: method full skips nothing by tokens"),
        ({**objective("static"), "gates": "sublayer"}, "--model.gates sublayer: method static skips nothing"),
        ({"gates": "sublayer", "keep_kv": True}, "--model.gates sublayer doesn't go with --model.keep_kv"),
        ({"gates": "sublayer", "stand_in_rank": 4}, "doesn't go with --model.stand_in_rank"),
        ({**objective("full"), "ratio_ascent": 0.1}, "full has no ratio loss, so --model.ratio_ascent"),
        ({**objective("mod"), "ratio_budget": "sequence"}, "mod has no ratio loss, so --model.ratio_budget"),
        (
            {**objective("random"), "stages": "lora-first"},
            "random has no routers, so --model.stages lora-first",
        ),
        ({"betas": (0.9, 1.0)}, "--model.betas 1.0"),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QTALEModule(**options)
