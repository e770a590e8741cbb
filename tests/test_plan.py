"""``plan``: what a run would cost, held to models that are really made."""

import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qtale_lightning.__main__ import main
from qtale_lightning.architectures import known_models
from qtale_lightning.cli import QTALECLI
from qtale_lightning.models.families import routed_config
from qtale_lightning.models.sources import base_config
from qtale_lightning.module import QTALEModule
from qtale_lightning.routing import METHODS, Rows
from tests.objectives import objective

Options = Callable[..., list[str]]

Plan = Callable[..., dict[str, str]]


@pytest.fixture
def plan(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Plan:
    """Runs ``plan`` where neither network nor weights can be had, and reads its table."""

    def untouchable(*args: object, **kwargs: object) -> None:
        pytest.fail("plan reads weights, a tokenizer or the network")

    def run(model: str, method: str, *more: str) -> dict[str, str]:
        with monkeypatch.context() as patch:
            patch.setenv("COLUMNS", "160")
            patch.setattr(socket.socket, "connect", untouchable)
            patch.setattr("qtale_lightning.module.load_base", untouchable)
            patch.setattr("qtale_lightning.module.load_tokenizer", untouchable)
            patch.setattr(LlamaForCausalLM, "from_pretrained", untouchable)
            main(["plan", *options(model, method, "--out", str(tmp_path / "out"), *more)])
        assert not (tmp_path / "out").exists()
        table = capsys.readouterr().out
        return {
            key.strip(): value
            for key, value in re.findall(r"^│ (.+?) +│ (.+?) +│$", table, flags=re.MULTILINE)
        }

    return run


def number(text: str) -> int:
    return int(text.replace(",", ""))


def count(model: torch.nn.Module, only: str = "") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if only in name)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", known_models())
def test_planned_parameters_are_those_of_the_model(
    model: str, method: str, plan: Plan, options: Options
) -> None:
    module, base = QTALECLI(options(model, method), "fit").model, base_config(model)
    fields = module.routing(base.num_hidden_layers)
    with torch.device("meta"):
        if "num_hidden_layers" in fields:  # of some families, kinds of layers are listed
            dense = AutoModelForCausalLM.from_config(base)
            METHODS[method].change(dense, fields)
            base = dense.config
        made = AutoModelForCausalLM.from_config(routed_config(base, **fields))
    rows = plan(model, method)
    assert number(rows["parameters"]) == count(made)
    assert number(rows["of these routers"]) == count(made, ".router.")
    assert (count(made, ".router.") > 0) == METHODS[method].routers


def test_parameters_of_llama2_7b(plan: Plan) -> None:
    """Its published size; and D-LLM's routers (4096 → 512, norm, 512 → 2) in 30 of 32 layers."""
    routers = 30 * (4096 * 512 + 512 + 512 + 512 * 2 + 2)
    assert number(plan("llama2-7b", "full")["parameters"]) == 6_738_415_616
    assert number(plan("llama2-7b", "qtale")["parameters"]) == 6_738_415_616 + routers


@pytest.mark.parametrize(("method", "stand_ins"), [*((method, 0) for method in METHODS), ("qtale", 3)])
def test_trainable_parameters_are_those_of_the_module(method: str, stand_ins: int, plan: Plan) -> None:
    options = {"router_width": 32, "lora_rank": 4, "stand_in_rank": stand_ins}
    module = QTALEModule(name="tiny", **objective(method) | options)
    module.rows = Rows([[5, 6, 7, 8, 9]], 0.0)
    module.configure_model()
    more = [part for key, value in options.items() for part in (f"--model.{key}", str(value))]
    rows = plan("tiny", method, "--model.train_all", "false", *more)
    assert number(rows["trainable parameters"]) == sum(
        p.numel() for p in module.parameters() if p.requires_grad
    )


def test_training_everything_trains_everything(plan: Plan) -> None:
    rows = plan("tiny", "qtale")
    assert rows["trainable parameters"] == rows["parameters"]


def test_without_routers_nothing_is_skipped(plan: Plan) -> None:
    rows = plan("tiny", "full")
    assert rows["share of the dense model's"] == "1.000"
    assert float(plan("tiny", "qtale")["share of the dense model's"]) < 1


def test_steps_follow_from_rows_epochs_and_the_effective_batch(plan: Plan) -> None:
    """D-LLM's effective batch of 8, as 2 × 4: 100 rows are 25 batches, 13 steps an epoch; the last has one of them."""
    rows = plan("llama2-7b", "qtale", "--data.limit_train", "100", "--trainer.max_epochs", "3")
    assert rows["effective batch"] == "8 on 1 device(s)"
    assert rows["optimizer steps, about"].startswith("39 (3 epochs of 100 rows)")


def test_fewer_bits_need_less_memory(plan: Plan) -> None:
    rows = plan("llama2-7b", "qtale", "--quantize.bits", "[4,3,2]")
    sizes = [float(rows[f"memory to serve at {bits} bits"].split(" GiB")[0]) for bits in (16, 4, 3, 2)]
    assert sizes == sorted(sizes, reverse=True)
    # Weights of 2 bytes, routers of 4: nothing else is stored at 16 bits.
    routers = number(rows["of these routers"])
    assert sizes[0] == pytest.approx((2 * number(rows["parameters"]) + 2 * routers) / 2**30, abs=0.01)
