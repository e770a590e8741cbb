"""One run of a sweep: from an agent's arguments to a folder, commands and a record."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from qtale_lightning.launching import Local
from qtale_lightning.sweeps.trial import Trial


def parse(tmp_path: Path, *given: str) -> Trial:
    return Trial.parse([f"--to={tmp_path}", "fit", "--config", "base.yaml", "--", *given])


def test_an_agents_arguments_run_the_right_run(tmp_path: Path) -> None:
    trial = parse(tmp_path, "--model.lambda_entropy=0.1", "--_wandb={'x': 1}", "--model.path=None")
    folder = f"{tmp_path}/lambda_entropy=0.1,path=null"
    assert trial.commands() == [
        ["fit", "--config", "base.yaml", f"--out={folder}", "--model.lambda_entropy=0.1", "--model.path=null"]
    ]
    alone = f"python -m qtale_lightning fit --config base.yaml --out={folder} --model.lambda_entropy=0.1"
    assert str(trial) == f"{alone} --model.path=null"


def test_stages_work_on_the_run_that_comes_first() -> None:
    trial = Trial.parse(
        ["--to=runs/a/sweeps/bits", "quantize,thresholds", "runs/a", "--", "--quantize.bits=[4]"]
    )
    assert trial.commands() == [
        [stage, "runs/a", "--quantize.bits=[4]"] for stage in ("quantize", "thresholds")
    ]
    assert trial.folder == Path("runs/a/sweeps/bits/bits=4")
    assert str(trial).count("&&") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "--", "--a=1"], "a trial is called as"),
        (["--to=x"], "a trial is called as"),
        (["--to=x", "fit", "--", "a=1"], "'a=1'"),
        (["--to=x", "fit", "--", "--a"], "'--a'"),
        (["--to=x", "evaluate", "--", "--theta=1"], "name the finished run"),
    ],
)
def test_a_call_of_another_form_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=r"trial|sweep's argument") as refusal:
        Trial.parse(arguments)
    assert words in str(refusal.value)


def test_folders_are_readable_and_never_shared(tmp_path: Path) -> None:
    assert parse(tmp_path, "--model.lr=0.1", "--sweep.rule=budget").label == "lr=0.1,rule=budget"
    assert parse(tmp_path, "--model.seed=1", "--data.seed=2").label == "model.seed=1,data.seed=2"
    strange = [parse(tmp_path, f"--model.path={path}").label for path in ("a/b", "ab", "a b")]
    assert len(set(strange)) == 3
    assert not any("/" in label for label in strange)
    long = [parse(tmp_path, f"--model.path={'x' * 300}{end}").label for end in "ab"]
    assert len(set(long)) == 2
    assert max(map(len, long)) < 120


class Launcher:
    """Stands for the suite: notes its commands, and returns the statuses it was given."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str], log: Path | None, lock: int | None) -> int:
        self.commands.append(list(command))
        return self.statuses.pop(0) if self.statuses else 0

    def run(self, trial: Trial) -> str:
        """How it ended, by its record."""
        Local(start=self).run([trial.job()])
        record = trial.record()
        assert record is not None
        return str(record["status"])


def test_a_finished_run_isnt_repeated_and_another_command_is(tmp_path: Path) -> None:
    launcher = Launcher()
    for _ in range(2):
        assert launcher.run(parse(tmp_path, "--a.b=1")) == "finished"
    assert len(launcher.commands) == 1
    other = Trial.parse([f"--to={tmp_path}", "fit", "--config", "other.yaml", "--", "--a.b=1"])
    assert not other.finished()
    launcher.run(other)
    assert len(launcher.commands) == 2


@pytest.mark.parametrize(("status", "said"), [(2, "failed (2)"), (143, "stopped"), (-15, "stopped")])
def test_a_run_that_failed_or_was_stopped_is_tried_again(tmp_path: Path, status: int, said: str) -> None:
    trial = parse(tmp_path, "--a.b=1")
    assert Launcher(status).run(trial) == said
    assert json.loads((trial.folder / "trial.json").read_text())["status"] == said
    assert Launcher(0).run(trial) == "finished"
    assert trial.finished()


def test_a_stage_that_fails_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    trial = Trial.parse([f"--to={tmp_path}/sweeps", "quantize,thresholds", str(tmp_path), "--", "--a=1"])
    launcher = Launcher(2)
    assert launcher.run(trial) == "failed (2)"
    assert [command[0] for command in launcher.commands] == ["quantize"]


def test_a_run_that_isnt_there_is_refused(tmp_path: Path) -> None:
    run = f"{tmp_path}/nowhere"
    trial = Trial.parse([f"--to={run}/sweeps", "evaluate", run, "--", "--theta=0.1"])
    with pytest.raises(ValueError, match="nowhere is no run"):
        trial.job()


def test_a_run_that_is_interrupted_says_so(tmp_path: Path) -> None:
    def interrupted(command: Sequence[str], log: Path | None, lock: int | None) -> int:
        raise KeyboardInterrupt

    trial = parse(tmp_path, "--a.b=1")
    with pytest.raises(KeyboardInterrupt):
        Local(start=interrupted).run([trial.job()])
    assert json.loads((trial.folder / "trial.json").read_text())["status"] == "stopped"
