"""The command ``inspect`` on a run of the tiny model: its page, its data, and what it keeps in results.json."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qtale_lightning.__main__ import main
from qtale_lightning.report.routing_figure import plot_routing
from qtale_lightning.results.store import load_results
from qtale_lightning.run import RunDirectory

SMALL = ("--data.limit_validation", "40", "--data.limit_train", "64", "--data.calibration_rows", "8")
RTN = ("--quantize.engine", "rtn", "--quantize.bits", "[4,3]")


MakeRun = Callable[..., RunDirectory]


@pytest.fixture(scope="module")
def made(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_run(tmp_path_factory.mktemp("runs"), "qtale", *SMALL, *RTN)


@pytest.fixture
def run(made: RunDirectory, tmp_path: Path) -> RunDirectory:
    return RunDirectory(shutil.copytree(made.root, tmp_path / "run"))


def data_of(page: Path) -> dict[str, Any]:
    return json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))


def test_questions_are_traced_at_every_precision_there_is(run: RunDirectory) -> None:
    main(["inspect", str(run.root)])
    page = run.root / "inspect" / "theta-0.5.html"
    content = data_of(page)
    assert [(p["bits"], p["engine"]) for p in content["precisions"]] == [(16, "none"), (4, "rtn"), (3, "rtn")]
    assert len(content["texts"]) == 30  # of the 40 that were measured
    assert all(len(text["traces"]) == 3 and text["answer"] < len(text["tokens"]) for text in content["texts"])
    assert "Question: " in "".join(content["texts"][0]["tokens"])
    assert page.read_text(encoding="utf-8").count(json.dumps("executed")) >= 90
    rows = load_results(run.root)["changes"]
    assert [(row["bits"], row["theta"], row["examples"]) for row in rows] == [
        (16, 0.5, 40),
        (4, 0.5, 40),
        (3, 0.5, 40),
    ]
    same, four, three = rows
    assert same["decisions_changed"] == same["nll_difference_stderr"] == 0
    assert same["nll"] == same["nll_same_decisions"]
    assert 0 < four["decisions_changed"] < three["decisions_changed"]
    assert four["decisions_changed"] < four["paths_changed"]


@pytest.mark.slow
def test_another_threshold_and_precision_stand_beside(run: RunDirectory) -> None:
    main(["inspect", str(run.root), "--questions", "5"])
    main(["inspect", str(run.root), "--questions", "7", "--theta", "0.2", "--bits", "4"])
    main(["inspect", str(run.root), "--questions", "6", "--bits", "4"])
    rows = load_results(run.root)["changes"]
    found = [(row["theta"], row["bits"], row["examples"]) for row in rows]
    high = [(0.5, 16, 6), (0.5, 16, 5), (0.5, 4, 6), (0.5, 4, 5), (0.5, 3, 5)]
    assert found == [*high, (0.2, 16, 7), (0.2, 4, 7)], "other questions take no place of theirs"
    assert rows[5]["execution_ratio"] > rows[0]["execution_ratio"]
    figure = plot_routing(load_results(run.root), pd.DataFrame())
    assert figure is not None
    lines = [len(axes.lines) for axes in figure.axes if axes.get_ylabel() == "decisions unlike 16 bits"]
    assert lines == [2], "one for each precision"
    assert len(data_of(run.root / "inspect" / "theta-0.2.html")["texts"]) == 7


def test_a_text_of_ones_own_is_shown_and_not_measured(run: RunDirectory) -> None:
    main(["inspect", str(run.root), "--text", "A brick is made of clay.", "--text", "</script><b>"])
    content = data_of(run.root / "inspect" / "text-theta-0.5.html")
    assert ["".join(text["tokens"]) for text in content["texts"]] == [
        "<s>A brick is made of clay.",
        "<s></script><b>",
    ]
    assert [text["answer"] for text in content["texts"]] == [len(text["tokens"]) for text in content["texts"]]
    assert "changes" not in load_results(run.root)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--theta", "1.5"), "--theta 1.5: must be >= 0 and <= 1"),
        (("--questions", "0"), "--questions 0: must be > 0"),
        (("--text", " "), "--text ' ' is empty"),
        (("--bits", "2"), "model-rtn-2bit isn't there"),
    ],
)
def test_what_cant_be_is_refused(
    run: RunDirectory, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", str(run.root), *more])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (run.root / "inspect").exists()
    assert "changes" not in load_results(run.root)


def test_a_model_without_routers_has_nothing_to_inspect(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = make_run(tmp_path, "full", *SMALL, *RTN)
    with pytest.raises(SystemExit):
        main(["inspect", str(full.root)])
    assert "has no routers" in " ".join(capsys.readouterr().err.split())
