"""Mistakes on the command line are refused before training, in words that name the option and what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from qtale_lightning.__main__ import main
from qtale_lightning.cli import QTALECLI
from qtale_lightning.models.sources import load_tokenizer
from qtale_lightning.module import QTALEModule
from qtale_lightning.results.metadata import run_metadata
from qtale_lightning.results.store import load_results, update_results

Options = Callable[..., list[str]]
Refusal = Callable[..., str]

SMALL = (
    *("--data.limit_train", "16", "--data.limit_validation", "8", "--data.calibration_rows", "8"),
    *("--data.batch_size", "4", "--trainer.max_steps", "2", "--wandb", "disabled"),
)
RUN = "tiny-qtale-facts-s0"
GOOD_ROW = {"goal": "warm hands", "sol1": "wear gloves", "sol2": "hold ice", "label": 0}


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal that comes after the first step comes too late."""

    def too_late(*args: object) -> None:
        pytest.fail("training has started")

    monkeypatch.setattr(QTALEModule, "training_step", too_late)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Runs a command that must be refused, and returns its message."""

    def run(*command: str, status: int = 2) -> str:
        with pytest.raises(SystemExit) as end:
            main(list(command))
        message = capsys.readouterr().err
        assert end.value.code == status, message
        assert "Traceback" not in message
        return " ".join(message.split())

    return run


@pytest.fixture
def fit(options: Options, tmp_path: Path, refused: Refusal) -> Refusal:
    """Runs a ``fit`` that must be refused: ``fit(*options, model=…, method=…)``."""

    def run(*more: str, model: str = "tiny", method: str = "qtale", status: int = 2) -> str:
        chosen = options(model, method, *SMALL, "--out", str(tmp_path / "out"), *more)
        return refused("fit", *chosen, status=status)

    return run


# ---------------------------------------------------------------------------------------------- option values


@pytest.mark.parametrize(
    ("more", "words"),
    [
        pytest.param(("--model.name", "gpt9"), ("'gpt9'", "--model.name", "tiny", "llama2-7b"), id="model"),
        pytest.param(
            ("--model.method", "lora"), ("'lora'", "--model.method", "dllm, full, mod, qtale"), id="method"
        ),
        pytest.param(("--data.tasks", "gsm8k"), ("'gsm8k'", "csqa", "facts"), id="task"),
        pytest.param(("--data.tasks", '["piqa","gsm8k"]'), ("'gsm8k'", "csqa", "facts"), id="task of a list"),
        pytest.param(
            ("--data.prompt_style", "essay"), ("prompt_style", "'essay'", "cloze, choice"), id="prompt style"
        ),
        pytest.param(
            ("--model.target_ratio", "1.5"),
            ("--model.target_ratio 1.5: must be >= 0 and <= 1",),
            id="target ratio",
        ),
        pytest.param(
            ("--model.target_ratio", "-0.1"),
            ("--model.target_ratio -0.1: must be >= 0",),
            id="target ratio below 0",
        ),
        pytest.param(
            ("--sweep.thresholds", "[0.5,1.5]"),
            ("--sweep.thresholds 1.5: must be >= 0 and <= 1",),
            id="threshold",
        ),
        pytest.param(("--sweep.thresholds", "[]"), ("--sweep.thresholds", "at least one"), id="no threshold"),
        pytest.param(("--sweep.rule", "best"), ("sweep.rule", "best", "tolerance", "budget"), id="rule"),
        pytest.param(("--sweep.rule", "budget"), ("needs --sweep.budgets",), id="no budget"),
        pytest.param(
            ("--sweep.rule", "budget", "--sweep.budgets", "[0.7,0.3]"),
            ("--sweep.budgets 0.3", "0.333 of all", "--model.start_layer"),
            id="budget below the layers without a router",
        ),
        pytest.param(("--sweep.margin", "2"), ("--sweep.margin 2: must be > 0 and < 1",), id="margin"),
        pytest.param(
            ("--quantize.group_size", "256"), ("group_size 256", "128", "q_proj", "64"), id="group size"
        ),
        pytest.param(("--quantize.bits", "[9]"), ("bits", "from 2 to 8", "9"), id="bits"),
        pytest.param(("--model.start_layer", "6"), ("--model.start_layer 6", "6 layers"), id="start layer"),
        pytest.param(
            ("--model.lora_rank", "129", "--model.train_all", "false"),
            ("--model.lora_rank 129", "width 128"),
            id="LoRA's rank",
        ),
        pytest.param(
            ("--model.stand_in_rank", "129"), ("--model.stand_in_rank 129", "width 128"), id="stand-ins' rank"
        ),
        pytest.param(
            ("--model.lora_targets", "[]", "--model.train_all", "false"),
            ("--model.lora_targets is empty", "--model.train_all"),
            id="no LoRA",
        ),
        pytest.param(("--seed_everything", "-1"), ("--seed_everything -1", "from 0"), id="seed"),
        pytest.param(
            ("--quantize.bits", "2.000001"), ("--quantize.bits", "too many digits"), id="bits' digits"
        ),
        pytest.param(("--validations", "0"), ("--validations 0: must be > 0",), id="validations"),
        pytest.param(
            ("--data.tasks", "mmlu", "--data.choice_labels", "roman"),
            ("--data.choice_labels", "'roman'", "letters, numbers"),
            id="choice labels",
        ),
        pytest.param(
            ("--data.tasks", "alpaca", "--data.shots", "5"),
            ("--data.shots 5", "alpaca"),
            id="shots of a task without",
        ),
        pytest.param(
            ("--data.tasks", "winogrande", "--data.answers", "generated"),
            ("--data.answers", "winogrande", "--data.prompt_style choice"),
            id="answers",
        ),
        pytest.param(
            ("--data.tasks", "mmlu,alpaca", "--sweep.rule", "tolerance"),
            ("--sweep.rule tolerance", "alpaca has none", "one-standard-error"),
            id="a rule of accuracies without them",
        ),
        pytest.param(
            ("--model.lr", "fast"), ("--model.lr fast: expected a number", "--help"), id="a word for a number"
        ),
        pytest.param(
            ("--model.learning_rate", "1"), ("--model.learning_rate", "--help"), id="unknown option"
        ),
    ],
)
def test_a_value_that_cant_be(
    fit: Refusal, tmp_path: Path, more: tuple[str, ...], words: tuple[str, ...]
) -> None:
    message = fit(*more)
    assert [word for word in words if word not in message] == [], message
    assert not (tmp_path / "out").exists(), "a refused start leaves nothing behind"


@pytest.mark.parametrize(
    ("more", "option"),
    [
        pytest.param(("--data.tasks", "gsm8k"), "--data.tasks", id="tasks"),
        pytest.param(("--data.prompt_style", "essay"), "--data.prompt_style", id="prompt_style"),
        pytest.param(("--data.mix", "random"), "--data.mix", id="mix"),
        pytest.param(("--data.batch_size", "0"), "--data.batch_size", id="batch_size"),
        pytest.param(("--quantize.group_size", "256"), "--quantize.group_size", id="group_size"),
        pytest.param(("--quantize.bits", "[9]"), "--quantize.bits", id="bits"),
    ],
)
def test_the_message_names_the_option_in_full(fit: Refusal, more: tuple[str, ...], option: str) -> None:
    assert option in fit(*more).split("error:")[-1]


@pytest.mark.parametrize("method", ["dllm", "full"])
def test_an_entropy_loss_without_the_method_for_it(fit: Refusal, method: str) -> None:
    message = fit("--model.lambda_entropy", "0.5", method=method)
    assert f"method {method}" in message
    assert "--model.lambda_entropy is 0.5, and must be 0" in message


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(("--model.router_width", "0"), id="router_width"),
        pytest.param(("--model.reserved_tokens", "0"), id="reserved_tokens"),
    ],
)
def test_a_routing_configuration_that_cant_be(fit: Refusal, more: tuple[str, ...]) -> None:
    try:
        message = fit(*more)
    except Exception as error:
        raise AssertionError("a traceback instead of a message") from error
    assert more[0].rpartition(".")[2] in message


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(("--model.lambda_ratio", "-1"), id="lambda_ratio"),
        pytest.param(("--model.router_lr", "-1"), id="router_lr"),
        pytest.param(("--model.lora_dropout", "2"), id="lora_dropout"),
    ],
)
def test_a_value_that_would_train_to_no_avail(fit: Refusal, more: tuple[str, ...]) -> None:
    assert more[0] in fit(*more)


@pytest.mark.slow
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize(
    "option",
    [
        *(
            "model.target_ratio",
            "model.lambda_ratio",
            "model.lambda_entropy",
            "model.temperature",
            "model.lr",
        ),
        *(
            "model.ratio_schedule",
            "model.lora_alpha",
            "model.lora_dropout",
            "model.router_lr",
            "model.warmup",
        ),
        *("model.weight_decay", "quantize.bits", "sweep.thresholds", "sweep.budgets", "sweep.margin"),
        *("trainer.gradient_clip_val", "trainer.limit_train_batches", "trainer.limit_val_batches"),
    ],
)
def test_what_is_no_number_is_never_trained_with(planned: Refusal, option: str, value: str) -> None:
    for written in (value, f"[{value}]"):  # in a list, it is YAML's number
        assert option in planned(f"--{option}={written}").split("error:")[-1]


# ---------------------------------------------------------------------------------------------------- trainer


@pytest.fixture
def planned(options: Options, refused: Refusal) -> Refusal:
    """Runs a ``plan`` that must be refused: what it refuses, ``fit`` does by the same check."""

    def run(*more: str) -> str:
        return refused("plan", *options("tiny", "qtale", *SMALL, *more))

    return run


@pytest.mark.parametrize(
    ("more", "words"),
    [
        pytest.param(("accumulate_grad_batches", "0"), ("at least 1",), id="accumulation"),
        pytest.param(("max_steps", "0"), ("--trainer.max_epochs",), id="no steps"),
        pytest.param(("max_epochs", "0"), ("trains nothing", "--trainer.max_steps"), id="no epochs"),
        pytest.param(("max_epochs", "-5"), ("trains nothing",), id="negative epochs"),
        pytest.param(("max_steps", "-1"), ("no end", "--trainer.max_epochs"), id="no end"),
        pytest.param(("limit_val_batches", "0"), ("number of batches",), id="no validation"),
        pytest.param(("limit_train_batches", "0"), ("number of batches",), id="no training"),
        pytest.param(("limit_train_batches", "1.5"), ("a share in (0, 1]",), id="more than all"),
        pytest.param(("gradient_clip_val", "-1"), ("0 (no clipping) or more",), id="clipping"),
        pytest.param(
            ("fast_dev_run", "true"), ("--trainer.max_steps 2", "--data.limit_train"), id="fast_dev_run"
        ),
        pytest.param(("barebones", "true"), ("no checkpoint",), id="barebones"),
        pytest.param(("overfit_batches", "1"), ("--data.limit_train",), id="overfit_batches"),
        pytest.param(("enable_checkpointing", "false"), ("suite's own", "exported"), id="checkpointing"),
        pytest.param(("default_root_dir", "x"), ("suite's own", "--out"), id="default_root_dir"),
        pytest.param(
            ("val_check_interval", "0.5"), ("suite's own", "--validations"), id="val_check_interval"
        ),
        pytest.param(
            ("check_val_every_n_epoch", "2"), ("suite's own", "--validations"), id="check_val_every"
        ),
        pytest.param(("use_distributed_sampler", "false"), ("suite's own",), id="use_distributed_sampler"),
    ],
)
def test_the_trainers_options_that_cant_be(
    planned: Refusal, more: tuple[str, str], words: tuple[str, ...]
) -> None:
    message = planned(f"--trainer.{more[0]}", more[1])
    assert [word for word in (f"--trainer.{more[0]}", *words) if word not in message] == [], message


def test_what_older_runs_recorded_of_the_suites_own_options_is_read(options: Options, tmp_path: Path) -> None:
    """They were part of a run's configuration once, with the values that the suite keeps; they identify nothing."""
    from qtale_lightning.cli import QTALECLI
    from qtale_lightning.run import identity

    (tmp_path / "old.yaml").write_text(
        "trainer: {default_root_dir: null, val_check_interval: null, check_val_every_n_epoch: 1, "
        "use_distributed_sampler: true, enable_checkpointing: null, fast_dev_run: false}"
    )
    command = options("tiny", "qtale", *SMALL)
    old, new = QTALECLI([*command, "--config", str(tmp_path / "old.yaml")], "fit"), QTALECLI(command, "fit")
    old.check_training()
    assert identity(yaml.safe_load(old.config_text()), {}) == identity(yaml.safe_load(new.config_text()), {})


def test_a_list_of_one_is_the_same_run(options: Options) -> None:
    from qtale_lightning.cli import QTALECLI

    texts = [
        QTALECLI(options("tiny", "qtale", *SMALL, "--model.lora_targets", one), "fit").config_text()
        for one in ("q_proj", "[q_proj]")
    ]
    assert texts[0] == texts[1]


def test_classes_of_lightning_that_the_suite_has_its_own_of(fit: Refusal, tmp_path: Path) -> None:
    for option, name, word in (
        ("logger", "WandbLogger", "--wandb online"),
        ("plugins", "AsyncCheckpointIO", "small"),
        ("strategy.class_path", "FSDPStrategy", "--trainer.strategy fsdp"),
    ):
        message = fit(f"--trainer.{option}={name}")
        assert name in message
        assert word in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(("--trainer.strategy", "nonsense"), id="strategy"),
        pytest.param(("--trainer.profiler", "nonsense"), id="profiler"),
        pytest.param(("--trainer.accelerator", "nonsense"), id="accelerator"),
        pytest.param(("--trainer.devices", "0"), id="no devices"),
        pytest.param(("--trainer.devices", "x"), id="devices"),
        pytest.param(("--trainer.num_nodes", "0"), id="nodes"),
        pytest.param(("--trainer.devices", "99"), id="more devices than batches"),
        pytest.param(("--trainer.limit_val_batches", "0.0001"), id="share without a batch"),
        pytest.param(("--trainer.max_time", "00:00:00:00"), id="no time"),
        pytest.param(("--trainer.max_time", "soon"), id="time"),
    ],
)
def test_what_lightning_refuses_leaves_nothing_behind(
    fit: Refusal, tmp_path: Path, more: tuple[str, ...]
) -> None:
    assert "error:" in fit(*more)
    assert not (tmp_path / "out").exists()


def test_classes_by_path_reach_the_trainer(options: Options, tmp_path: Path) -> None:
    """As everybody writes them for a LightningCLI, beside what the suite adds."""
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ProgressBar, RichProgressBar
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.profilers import SimpleProfiler
    from lightning.pytorch.strategies import SingleDeviceStrategy

    from qtale_lightning.cli import QTALECLI

    more = (
        *("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"),
        *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=train/loss"),
        *("--trainer.callbacks+=RichProgressBar", "--trainer.profiler=SimpleProfiler"),
        *("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'mine'}"),
        *("--trainer.strategy.class_path=SingleDeviceStrategy", "--trainer.strategy.device=cpu"),
    )
    cli = QTALECLI(options("tiny", "qtale", *SMALL, "--out", str(tmp_path), *more), "fit")
    cli.check()
    cli.check_training()
    cli.prepare_data()
    cli.check_rows()
    trainer = cli.make_trainer()
    kinds = [type(callback) for callback in trainer.callbacks]
    assert {EarlyStopping, ModelCheckpoint, RichProgressBar} <= {*kinds}
    assert sum(issubclass(kind, ProgressBar) for kind in kinds) == 1
    assert isinstance(trainer.profiler, SimpleProfiler)
    assert isinstance(trainer.strategy, SingleDeviceStrategy)
    cli.start_logging(trainer)
    folders = [Path(logger.save_dir or "") for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    assert folders == [cli.run.root, tmp_path / "mine"]
    assert trainer.logger is trainer.loggers[0], "the suite's own comes first: its folder is the run's"


def test_a_plan_knows_nothing_of_those_classes(options: Options) -> None:
    """They need Lightning, whose import takes seconds; `fit` checks them."""
    from qtale_lightning.configuration import PlannedRun

    more = (
        *("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss"),
        *("--trainer.callbacks+=Timer", "--trainer.callbacks.duration", "00:01:00:00"),
        *("--trainer.strategy.class_path=DDPStrategy", "--trainer.strategy.find_unused_parameters", "true"),
    )
    run = PlannedRun(options("tiny", "qtale", *SMALL, *more, "--model.lr", "0.5"), "plan")
    run.check_training()
    assert run.model.lr == 0.5


def test_validations_are_spread_over_the_batches_of_each_device(options: Options, tmp_path: Path) -> None:
    from qtale_lightning.cli import QTALECLI

    more = (
        "--trainer.max_steps",
        "-1",
        "--trainer.max_epochs",
        "4",
        "--trainer.devices",
        "2",
        "--validations",
        "2",
    )
    cli = QTALECLI(options("tiny", "qtale", *SMALL, *more), "fit")
    cli.prepare_data()
    assert (cli.schedule.epoch, cli.schedule.batches) == (2, 8)  # 16 rows, 4 on each device
    assert cli.make_trainer().val_check_interval == 4


# ------------------------------------------------------------------------------------------------------- data


def write_rows(root: Path, *rows: object) -> None:
    folder = root / "piqa"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_a_data_folder_that_isnt_there(fit: Refusal, tmp_path: Path) -> None:
    message = fit("--data.tasks", "piqa", "--data.root", str(tmp_path / "nowhere"))
    assert f"--data.root {tmp_path / 'nowhere'}" in message
    assert "<task>/train.jsonl" in message


def test_a_data_folder_without_the_task(fit: Refusal, tmp_path: Path) -> None:
    write_rows(tmp_path / "data", GOOD_ROW)
    message = fit("--data.tasks", "boolq", "--data.root", str(tmp_path / "data"))
    assert str(tmp_path / "data" / "boolq" / "train.jsonl") in message
    assert "--data.root" in message


def test_a_malformed_row(fit: Refusal, tmp_path: Path) -> None:
    """Named by file, line and field; and the output directory isn't taken."""
    write_rows(tmp_path / "data", GOOD_ROW, {**GOOD_ROW, "sol2": None})
    message = fit("--data.tasks", "piqa", "--data.root", str(tmp_path / "data"))
    assert f"{tmp_path}/data/piqa/train.jsonl:2: field 'sol2'" in message
    assert not (tmp_path / "out").exists()


def test_rows_that_the_network_would_have_to_bring(fit: Refusal) -> None:
    message = fit("--data.tasks", "piqa")
    assert all(words in message for words in ("baber/piqa", "--data.root FOLDER", "--data.tasks facts"))


def test_fewer_rows_than_a_batch(fit: Refusal) -> None:
    message = fit("--data.batch_size", "17")
    assert "16 training rows" in message
    assert "--data.batch_size" in message


def test_a_budget_that_reserved_tokens_leave_no_room_for(fit: Refusal, tmp_path: Path) -> None:
    """Known before training: they execute every layer, and so do the layers without a router, a third of all."""
    message = fit("--data.limit_train", "32", "--sweep.rule", "budget", "--sweep.budgets", "0.34")
    assert "--sweep.budgets 0.34 can't be reached" in message
    assert "reserved tokens are 0.3" in message
    assert not (tmp_path / "out").exists()


def test_rows_too_few_to_calibrate_on(fit: Refusal, tmp_path: Path) -> None:
    """Known before training: 8 rows × 2 reserved tokens are all that a skipped layer would see."""
    message = fit("--data.limit_train", "8")
    assert "16 tokens of 8 training rows" in message
    assert "32" in message
    assert "--data.limit_train" in message
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ models


def test_a_model_that_cant_be_reached(fit: Refusal) -> None:
    """One paragraph with the ways out: a folder, a download elsewhere."""
    message = fit(model="llama2-7b")
    for words in (
        "'llama2-7b'",
        "--model.path",
        "hf download meta-llama/Llama-2-7b-hf --revision",
    ):
        assert words in message
    assert "HF_HUB_OFFLINE" in message


def test_a_model_folder_that_isnt_there(fit: Refusal, tmp_path: Path) -> None:
    message = fit("--model.path", str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in message
    assert "--model.path" in message


def test_a_model_folder_is_not_taken_for_a_hub_id(fit: Refusal, tmp_path: Path) -> None:
    assert "hf download" not in fit("--model.path", str(tmp_path / "nowhere"))


def test_a_model_folder_of_another_architecture(fit: Refusal, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=64).save_pretrained(tmp_path / "other")
    load_tokenizer("tiny").save_pretrained(tmp_path / "other")
    message = fit("--model.path", str(tmp_path / "other"))
    assert "hidden_size 64 instead of 128" in message
    assert "--model.path" in message
    assert "--model.name" in message


# --------------------------------------------------------------------------------------------- run directories


def save_checkpoint(run: Path, router_width: int) -> None:
    """A last.ckpt of a tiny model with routers of this width."""
    module = QTALEModule(name="tiny", router_width=router_width, train_all=True)
    module.configure_model()
    checkpoint = {
        "pytorch-lightning_version": "2.6.6",
        "epoch": 0,
        "global_step": 1,
        "state_dict": module.state_dict(),
    }
    (run / "checkpoints").mkdir(parents=True)
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")


def test_a_directory_of_another_configuration(fit: Refusal, tmp_path: Path) -> None:
    """Refused by its differing keys; what is in it stays."""
    run = tmp_path / "out" / RUN
    save_checkpoint(run, router_width=32)
    text = "model: {lr: 0.5}\ndata: {}\ntrainer: {}\nquantize: {}\nsweep: {}\n"
    (run / "config.yaml").write_text(text, encoding="utf-8")
    message = fit()
    assert "another configuration" in message
    assert str(run) in message
    assert "--out" in message
    assert (run / "config.yaml").read_text(encoding="utf-8") == text


def test_other_rows_than_a_run_began_with(fit: Refusal, tmp_path: Path, options: Options) -> None:
    """Refused by their task and split, whatever the options say; what is in the run stays."""
    cli = QTALECLI(options("tiny", "qtale", *SMALL, "--out", str(tmp_path / "out")), "test")
    rows = cli.prepare_data().digests()
    began_with = {"base": None, "files": None, "rows": {**rows, "validation": {"facts": "others"}}}
    metadata = run_metadata("tiny", "qtale", "facts", 0, "fit", "here")
    cli.run.claim(cli.config_text())
    update_results(cli.run.root, "run", metadata | {"made_from": began_with})
    message = fit()
    assert "began with other validation rows of facts (--data.root)" in message
    assert str(cli.run.root) in message
    assert "--out" in message
    assert load_results(cli.run.root)["run"]["made_from"] == began_with


def test_nothing_to_resume(fit: Refusal, tmp_path: Path) -> None:
    message = fit("--ckpt_path", "last")
    assert "nothing to resume from" in message
    assert str(tmp_path / "out" / RUN / "checkpoints" / "last.ckpt") in message
    assert "Leave --ckpt_path out" in message


def test_a_trained_model_whose_checkpoints_are_gone_isnt_trained_anew(fit: Refusal, tmp_path: Path) -> None:
    (tmp_path / "out" / RUN / "model").mkdir(parents=True)
    message = fit()
    assert str(tmp_path / "out" / RUN / "checkpoints" / "last.ckpt") in message
    assert "is gone" in message
    assert "quantize|thresholds|report" in message
    assert "--out" in message


def test_a_checkpoint_that_isnt_there(fit: Refusal, tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere.ckpt") in fit("--ckpt_path", str(tmp_path / "nowhere.ckpt"))


@pytest.mark.slow
def test_a_checkpoint_of_another_architecture(fit: Refusal, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "out" / RUN, router_width=16)
    message = fit()
    assert "the checkpoint belongs to another model or configuration" in message
    assert "model.layers.2.router.down.bias (16,) instead of (32,)" in message
    assert "start a new run" in message


@pytest.mark.parametrize(
    "mistake",
    [("--data.batch_size", "17"), ("--ckpt_path", "last", "--model.lr", "5")],
    ids=lambda more: more[0],
)
def test_a_corrected_mistake_may_start(fit: Refusal, mistake: tuple[str, ...]) -> None:
    fit(*mistake)
    message = fit("--ckpt_path", "last")  # stops right behind the claim, so that nothing is trained
    assert "another configuration" not in message


# -------------------------------------------------------------------------------------------------- commands


def test_an_unknown_instruction_set(
    refused: Refusal, options: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QTALE_CPU_ISA", "sse4")
    message = refused("fit", *options("tiny", "qtale", "--out", str(tmp_path)))
    assert "QTALE_CPU_ISA is sse4, but it is one of avx2, avx512, avx512_bf16, neon" in message
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["quantize", "thresholds", "evaluate", "report"])
def test_a_stage_on_a_folder_that_is_no_run(refused: Refusal, tmp_path: Path, command: str) -> None:
    message = refused(command, str(tmp_path))
    assert f"{tmp_path} is no run" in message
    assert "config.yaml" in message
    assert "make train" in message


@pytest.mark.parametrize("command", ["quantize", "thresholds", "evaluate", "report"])
def test_a_stage_without_a_run_shows_the_usage(command: str, refused: Refusal) -> None:
    assert f"required: RUN. Usage: python -m qtale_lightning {command} RUN" in refused(command)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["trian"], ("trian", "choose one of fit, plan")),
        (["quantise"], ("did you mean quantize?",)),
        (["sweep", "outputs/run"], ("choose one of start, join", "θ of one run: `thresholds`")),
        (["fit", "--data.tsks", "csqa"], ("there is no option --data.tsks", "did you mean --data.tasks")),
        (["lm-eval", "run", "--batch-size", "3"], ("did you mean --batch_size",)),
        (["evaluate", "run", "--theta", "0.3", "0.2"], ("'0.2'", "0.3,0.2")),
        (["table", "csqa"], ("required: --model",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_was_meant_is_said(command: list[str], words: tuple[str, ...], refused: Refusal) -> None:
    message = refused(*command)
    assert [word for word in words if word not in message] == [], message


def test_a_key_of_a_file_is_an_option(refused: Refusal, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {router_with: 8}")
    message = refused("plan", "--config", str(tmp_path / "mine.yaml"))
    assert "there is no option --model.router_with; did you mean --model.router_width" in message


@pytest.fixture
def claimed(options: Options, tmp_path: Path) -> str:
    """A run that has its configuration and nothing else."""
    from qtale_lightning.cli import QTALECLI

    cli = QTALECLI(options("tiny", "qtale", *SMALL, "--out", str(tmp_path)), "fit")
    cli.run.claim(cli.config_text())
    return str(cli.run.root)


def test_a_stage_before_its_model(refused: Refusal, claimed: str) -> None:
    for command in ("quantize", "thresholds", "evaluate"):
        message = refused(command, claimed)
        assert f"{claimed}/model isn't there" in message
        assert "make train" in message


def test_a_stage_of_an_interrupted_run_names_the_command_that_resumes_it(
    refused: Refusal, claimed: str, tmp_path: Path
) -> None:
    """With all of its options, as the run has recorded it."""
    command = (
        "python -m qtale_lightning fit --config experiments/base.yaml --data.tasks facts --seed_everything 3"
    )
    update_results(claimed, "run", run_metadata("tiny", "qtale", "facts", 3, command, "random"))
    for stage in ("evaluate", "quantize"):
        assert f"goes on from where it was, and makes it: `{command}`" in refused(stage, claimed)


def test_no_bits_are_nothing_to_quantize(refused: Refusal, claimed: str) -> None:
    message = refused("quantize", claimed, "--quantize.bits", "[]")
    assert "--quantize.bits is empty, so nothing is to be quantized" in message


def test_a_threshold_that_is_none(refused: Refusal, claimed: str) -> None:
    assert "--theta 2.0: must be >= 0 and <= 1" in refused("evaluate", claimed, "--theta", "2")


def test_a_precision_that_isnt_there(refused: Refusal, claimed: str) -> None:
    message = refused("evaluate", claimed, "--bits", "5")
    assert "model-awq-5bit isn't there" in message
    assert "quantize" in message


@pytest.mark.parametrize(
    "more",
    [("--bits", "four"), ("--bits=5",), ("--data.limit_validation", "8", "--bits", "5")],
    ids=["no number", "with =", "behind another option"],
)
def test_evaluates_own_options_are_parsed_as_all_others(
    refused: Refusal, claimed: str, more: tuple[str, ...]
) -> None:
    message = refused("evaluate", claimed, *more).split("error:")[-1]
    assert "--bits" in message or "model-awq-5bit isn't there" in message
    assert "unrecognized" not in message


def test_report_refuses_options_that_it_hasnt(
    refused: Refusal, claimed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtale_lightning.report.write_report", lambda run: pytest.fail("reported"))
    assert "--theta" in refused("report", claimed, "--theta", "0.5")
