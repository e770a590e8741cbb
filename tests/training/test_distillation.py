"""Self-distillation: its loss by hand, its two teachers, and what it leaves alone."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtale_lightning.losses import answer_places
from qtale_lightning.models.families import route, routed_config
from qtale_lightning.models.routing import Routing
from qtale_lightning.models.sources import load_base
from qtale_lightning.settings import ModelSettings
from qtale_lightning.training import distillation_loss
from tests.test_module import make_batch, make_module, stepping
from tests.tolerance import close, depth


def test_loss_by_hand() -> None:
    answer = torch.tensor([[False, True, True], [True, False, False]])
    teacher = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, math.log(3.0)]])  # p = 1/2 1/2, 1/2 1/2, 1/4 3/4
    student = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)], [0.0, 0.0]])
    one = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    two = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    expected = ((0 + one) / 2 + two) / 2
    assert distillation_loss(student, teacher, answer).item() == pytest.approx(expected)


def test_the_teacher_is_the_model_at_full_depth() -> None:
    """Without dropout, gradient, or a trace in the model: it goes on training as it was."""
    module, batch = make_module(distillation=1.0, lora_dropout=0.5), make_batch()
    answer = batch["labels"][:, 1:] != -100
    taught = module.teacher.logits(batch, answer_places(batch["labels"]))
    assert not taught.requires_grad
    assert all(part.training for part in module.modules())
    module.eval()
    with torch.no_grad():
        full = module.model(
            batch["input_ids"], batch["attention_mask"], routing=Routing(threshold=0.0), use_cache=False
        ).logits[:, :-1][answer]
    close(taught, full, depth(module.model.config))


def test_it_is_part_of_the_loss_in_training_alone() -> None:
    module, batch = stepping(make_module(distillation=2.0), 10, 20), make_batch()
    torch.manual_seed(0)
    losses = module.losses(batch, Routing(), 0.5, module.scheduled_lambdas())
    others = losses.ce + sum(module.scheduled_lambdas()[n] * losses.terms[n] for n in ("ratio", "entropy"))
    assert losses.terms["distillation"] > 0  # random routers skip layers, and decide otherwise than θ = 0
    close(losses.total, others + 2.0 * losses.terms["distillation"], 4)
    assert "distillation" not in module.losses(batch, Routing(sample=False), 0.5).terms


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run, as far as a teacher is concerned."""
    base = load_base("tiny", seed=3)
    route(base, routed_config(base.config, router_width=16, start_layer=6, method="full")).save_pretrained(
        tmp_path / "model"
    )
    (tmp_path / "config.yaml").touch()
    return tmp_path


def test_another_run_teaches(folder: Path) -> None:
    module = make_module(distillation=1.0, teacher=str(folder))
    batch = make_batch()
    answer = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        expected = load_base("tiny", seed=3).eval()(batch["input_ids"], batch["attention_mask"]).logits
    close(
        module.teacher.logits(batch, answer_places(batch["labels"])),
        expected[:, :-1][answer],
        depth(module.model.config),
    )
    assert not [name for name in module.state_dict() if "teacher" in name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model" / "config.json").unlink(), "holds no model.*give a finished run"),
        (
            lambda folder: (folder / "model" / "config.json").write_text(
                '{"vocab_size": 7}', encoding="utf-8"
            ),
            "has 7 tokens, tiny has .*the same tokenizer",
        ),
    ],
)
def test_a_teacher_that_can_not_teach_is_refused(
    folder: Path, change: Callable[[Path], None], message: str
) -> None:
    settings = ModelSettings(name="tiny", distillation=1.0, teacher=str(folder))
    settings.check_teacher()
    change(folder)
    with pytest.raises(ValueError, match=message):
        settings.check_teacher()
