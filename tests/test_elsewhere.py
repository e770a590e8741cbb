"""Commands that are started in another folder than the checkout, and paths with a home folder's ~."""

from pathlib import Path

import pytest

from qtale_lightning.__main__ import main
from qtale_lightning.configuration import PlannedRun
from qtale_lightning.experiments import CHECKOUT, find, names
from qtale_lightning.options import with_files
from qtale_lightning.sweeps.trial import Trial
from tests.tables.files import asked

CONFIGS = [f"experiments/{file}" for file in ("base.yaml", "models/tiny.yaml", "methods/qtale.yaml")]
CONFIGURED = [part for file in CONFIGS for part in ("--config", file)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another folder, which is the user's home, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_files_of_the_checkout_are_found_from_anywhere(elsewhere: Path) -> None:
    ours = CHECKOUT / "experiments/base.yaml"
    assert find("experiments/base.yaml") == ours
    assert find("experiments/mine.yaml") == Path("experiments/mine.yaml"), "what is nowhere is named as given"
    assert find("README.md") == Path("README.md"), "only what belongs to experiments"
    (elsewhere / "experiments" / "tables").mkdir(parents=True)
    (elsewhere / "experiments" / "base.yaml").touch()
    (elsewhere / "experiments" / "tables" / "mine.yaml").touch()
    assert find("experiments/base.yaml") == Path("experiments/base.yaml"), "the user's own come first"
    assert {"mine", "csqa"} <= {*names("tables")}


def test_configuration_files_are_found_in_both_forms(elsewhere: Path) -> None:
    (elsewhere / "mine.yaml").write_text("{out: x}")
    given = [
        "--config",
        "experiments/base.yaml",
        "--config=experiments/models/tiny.yaml",
        "--config=~/mine.yaml",
    ]
    expected = [
        *(
            "--config",
            f"{CHECKOUT}/experiments/base.yaml",
            f"--config={CHECKOUT}/experiments/models/tiny.yaml",
        ),
        f"--config={elsewhere}/mine.yaml",
    ]
    assert with_files([*given, "--out", "experiments/base.yaml"]) == [
        *expected,
        "--out",
        "experiments/base.yaml",
    ]
    assert PlannedRun([*CONFIGURED, "--data.tasks", "facts"], "plan").model.name == "tiny"


@pytest.mark.parametrize("form", ["--out=~/runs", "yaml"])
def test_a_home_folder_is_expanded_where_no_shell_does(elsewhere: Path, form: str) -> None:
    """Checkpoints went to the right place, and all else to a folder named ~."""
    (elsewhere / "mine.yaml").write_text("out: ~/runs\n")
    run = PlannedRun([*CONFIGURED, *(["--config", "mine.yaml"] if form == "yaml" else [form])], "plan").run
    assert run.root.parent == elsewhere / "runs"


def test_a_table_is_found_from_anywhere(elsewhere: Path) -> None:
    found = asked("table", ["csqa", "--model", "tiny", "--out=~/runs", "--plan"])
    assert found.file == CHECKOUT / "experiments/tables/csqa.yaml"
    assert found.request.out == elsewhere / "runs"


@pytest.mark.parametrize("command", ["quantize", "thresholds", "evaluate", "lm-eval", "inspect", "report"])
def test_a_run_in_the_home_folder(command: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "~/run"])
    assert f"{elsewhere}/run is no run" in capsys.readouterr().err


def test_a_comparison_in_the_home_folder(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def compare(runs: list[str], to: str) -> Path:
        given.extend([*runs, to])
        page = elsewhere / "page.md"
        page.touch()
        return page

    monkeypatch.setattr("qtale_lightning.report.compare.compare", compare)
    main(["compare", "~/a", "b", "--to=~/c"])
    assert given == [f"{elsewhere}/a", "b", f"{elsewhere}/c"]


def test_a_sweep_in_the_home_folder(elsewhere: Path) -> None:
    trial = Trial.parse(["--to=~/runs/sweeps/x", "thresholds", "~/run", "--", "--sweep.margin=0.01"])
    assert trial.folder.parent == elsewhere / "runs" / "sweeps" / "x"
    assert trial.fixed == (f"{elsewhere}/run",)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["quantize"], ("quantize", "RUN", "--quantize.bits", "--quantize.sequences", "override")),
        (["quantize", "run"], ("RUN", "--quantize.bits")),
        (["thresholds"], ("RUN", "--sweep.thresholds", "--sweep.budgets")),
        (["evaluate", "run"], ("RUN", "--bits", "--theta")),
        (["report", "run"], ("RUN", "results.json")),
        (["compare"], ("RUN", "--to FOLDER")),
        (["table"], ("--seeds", "--plan", "csqa")),
        (["figures"], ("--seeds", "csqa")),
        (["lm-eval"], ("--tasks", "--batch_size")),
        (["inspect"], ("--questions", "--text")),
    ],
    ids=" ".join,
)
def test_every_command_has_its_own_help(
    command: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code in (0, None)
    shown = capsys.readouterr().out
    assert [word for word in words if word not in shown] == []


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        *(("evaluate", "--bits", value) for value in ("nan", "inf", "-4", "0", "four")),
        *(("evaluate", "--theta", value) for value in ("nan", "-0.1", "2")),
        *(("lm-eval", "--limit", value) for value in ("0", "-1", "some")),
        *(("lm-eval", "--batch_size", value) for value in ("0", "many")),
        ("inspect", "--questions", "0"),
    ],
)
def test_a_value_that_is_none_is_refused_by_its_option(
    command: str, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "run", f"{option}={value}"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert f"{command}: {option} {value}" in said
    assert "must be" in said or "number" in said
