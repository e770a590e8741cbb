"""Any configuration is accepted, and then says itself again, or is refused in words before anything starts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtale_lightning.cli import QTALECLI
from qtale_lightning.errors import explain

numbers = st.one_of(
    st.integers(-3, 70), st.floats(), st.sampled_from([0, 1, 0.5, 1e-9, 1e30, 2**70]), st.floats(0, 1)
)
words = st.sampled_from(
    [
        "",
        "null",
        "true",
        "nan",
        "[]",
        "[4]",
        "[4, 3.5]",
        "[nan]",
        "{}",
        "auto",
        "facts",
        "[/b]",
        "-",
        "é",
        "4 3",
        "a,b",
    ]
)
lists = st.lists(numbers, max_size=3)
values = st.one_of(numbers, words, lists).map(str)
OPTIONS = (
    "model.router_width", "model.start_layer", "model.reserved_tokens", "model.target_ratio", "model.lambda_ratio",
    "model.lambda_entropy", "model.temperature", "model.ratio_schedule", "model.noise_schedule", "model.train_all",
    "model.lora_rank", "model.lora_dropout", "model.lora_targets", "model.lr", "model.router_lr", "model.warmup",
    "model.method", "model.betas", "model.router_bias", "model.ratio_ascent", "model.distillation", "model.teacher",
    "model.noise_bits",
    "data.tasks", "data.batch_size", "data.max_length", "data.limit_train", "data.calibration_rows", "data.shots",
    "data.prompt_style", "data.choice_labels", "data.mix", "quantize.bits", "quantize.group_size", "quantize.engine",
    "quantize.sequences", "quantize.symmetric", "quantize.patterns", "sweep.thresholds", "sweep.rule", "sweep.budgets",
    "sweep.margin", "validations", "seed_everything", "trainer.max_steps", "trainer.max_epochs", "trainer.precision",
    "trainer.accumulate_grad_batches", "trainer.devices", "wandb",
)  # fmt: skip


def configured(arguments: list[str]) -> QTALECLI | str:
    """The configuration, or how it was refused: by an error of a kind that is known and said in words."""
    try:
        cli = QTALECLI(arguments, "fit")
        cli.check()
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        return explained.text
    return cli


@pytest.mark.slow
@settings(max_examples=40)
@given(given=st.dictionaries(st.sampled_from(OPTIONS), values, min_size=1, max_size=3))
def test_a_configuration_is_accepted_or_refused(
    given: dict[str, str], options: Callable[..., list[str]], tmp_path: Path
) -> None:
    more = [f"--{name}={value}" for name, value in given.items()]
    found = configured([*options("tiny", "qtale", "--out", str(tmp_path)), *more])
    if isinstance(found, str):
        assert found.strip()
    else:
        file, text = tmp_path / "config.yaml", found.config_text()
        file.write_text(text, encoding="utf-8")
        again = configured(["--config", str(file)])
        assert isinstance(again, QTALECLI), again
        assert again.config_text() == text
