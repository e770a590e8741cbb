"""The sweep's rules on a run of the tiny model: what is measured, what is repeated, what is selected and said."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtale_lightning.__main__ import main
from qtale_lightning.evaluation.scoring import Scores, score_thresholds
from qtale_lightning.paths import path_distance
from qtale_lightning.report import write_markdown
from qtale_lightning.results.predictions import compare_predictions, load_predictions, predictions_file
from qtale_lightning.results.series import own_rows
from qtale_lightning.results.store import load_results, save_results
from qtale_lightning.run import RunDirectory

pytestmark = pytest.mark.slow

SMALL = ("--data.limit_validation", "60", "--data.limit_train", "150", "--data.calibration_rows", "60")
SWEEP = ("--sweep.thresholds", "[0.6,0.3]", "--quantize.engine", "rtn", "--quantize.bits", "[4]")
PRECISIONS = [(16, "none"), (4, "rtn")]

Passes = list[tuple[str, list[Any]]]


@pytest.fixture(scope="module")
def made(make_run: Callable[..., RunDirectory], tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_run(tmp_path_factory.mktemp("runs"), "qtale", *SMALL, *SWEEP)


@pytest.fixture
def run(made: RunDirectory, tmp_path: Path) -> Path:
    return shutil.copytree(made.root, tmp_path / "run")


@pytest.fixture(scope="module")
def grid(made: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run after a sweep of its grid, which no test changes."""
    run = shutil.copytree(made.root, tmp_path_factory.mktemp("grid") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qtale_lightning.report.write_report", lambda run: None)
        sweep(run)
    return run


@pytest.fixture
def swept(grid: Path, tmp_path: Path) -> Path:
    return shutil.copytree(grid, tmp_path / "run")


@pytest.fixture
def reported() -> None:
    """For tests of what is printed and written: figures and pages are made."""


@pytest.fixture(autouse=True)
def unreported(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "reported" not in request.fixturenames:
        monkeypatch.setattr("qtale_lightning.report.write_report", lambda run: None)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """What was scored: the stage that asked, and the θ of each call."""
    calls: Passes = []

    def spy(stage: str) -> Callable[..., list[Scores]]:
        def scored(model: Any, questions: Any, thresholds: list[Any], **options: Any) -> list[Scores]:
            calls.append((stage, list(thresholds)))
            return score_thresholds(model, questions, thresholds, **options)

        return scored

    evaluate = sys.modules["qtale_lightning.stages.evaluate"]  # the package's attribute is the function
    monkeypatch.setattr(evaluate, "score_thresholds", spy("evaluate"))
    monkeypatch.setattr("qtale_lightning.evaluation.budget.score_thresholds", spy("search"))
    return calls


def sweep(run: Path, *options: str) -> dict[str, Any]:
    main(["thresholds", str(run), *options])
    return dict(load_results(run))


def rows(results: dict[str, Any], split: str, bits: float = 16) -> dict[Any, dict[str, Any]]:
    """Rows by θ."""
    chosen = [row for row in results["evaluation"] if (row["split"], row["bits"]) == (split, bits)]
    return {str(row["theta"]): row for row in chosen}


# ------------------------------------------------------------------------------------------------- the grid


def test_all_thresholds_of_a_split_are_scored_at_once(run: Path, passes: Passes) -> None:
    results = sweep(run)
    assert passes == [("evaluate", [0.6, 0.3])] * 4  # 2 precisions × 2 splits
    assert [(choice["bits"], choice["engine"]) for choice in results["selected"]] == PRECISIONS
    for choice in results["selected"]:
        calibration = rows(results, "calibration", choice["bits"])
        assert choice["rule"].startswith("one-standard-error: the lowest execution ratio")
        assert choice["passes"] == 2
        assert choice["seconds"] == sum(row["seconds"] for row in calibration.values()) > 0
        row = rows(results, "validation", choice["bits"])[str(choice["theta"])]
        assert (choice["average"], choice["execution_ratio"]) == (row["average"], row["execution_ratio"])


def test_every_row_has_its_predictions(grid: Path) -> None:
    results = load_results(grid)
    assert len(results["evaluation"]) == 8
    for row in results["evaluation"]:
        outcomes = load_predictions(grid, row)
        assert outcomes is not None
        assert sum(one.scores["value"] for one in outcomes) / 60 == pytest.approx(row["average"], abs=1e-12)
        assert sum(one.scores["nll"] for one in outcomes) / 60 == pytest.approx(row["average_nll"], abs=1e-9)
    assert len(list((grid / "predictions").iterdir())) == 8


def test_the_averages_error_is_the_bootstraps(grid: Path) -> None:
    """Near the task's own, of which there is one: 0.7 % of noise, and (n − 1)/n in the variance."""
    for row in map(dict[str, Any], load_results(grid)["evaluation"]):
        (task,) = row["accuracy"].values()
        for found, expected in (("average_stderr", "stderr"), ("average_nll_stderr", "nll_stderr")):
            assert row[found] == pytest.approx(task[expected], rel=0.04)
            assert row[found] != task[expected]


def test_a_second_sweep_repeats_nothing(swept: Path, passes: Passes) -> None:
    before = load_results(swept)
    assert sweep(swept) == before
    assert passes == []


# ------------------------------------------------------------------------------------------------- tolerance


def test_tolerance_scores_full_execution_and_nothing_again(swept: Path, passes: Passes) -> None:
    run, before = swept, load_results(swept)
    results = sweep(run, "--sweep.rule", "tolerance")
    assert passes == [("evaluate", [0.0])] * 4
    assert [row for row in results["evaluation"] if row["theta"] != 0] == before["evaluation"]
    for choice, (bits, _) in zip(results["selected"], PRECISIONS, strict=True):
        calibration = rows(results, "calibration", bits)
        reference = load_predictions(run, calibration["0.0"])
        good = []
        for row in calibration.values():
            ours = load_predictions(run, row)
            assert ours is not None
            assert reference is not None
            difference = compare_predictions(ours, reference)
            if difference.high >= 0:
                good.append(row)
            if row["theta"] == choice["theta"]:
                assert choice["difference"]["value"] == difference.value
                assert choice["difference"]["high"] == difference.high
        cheapest = min(good, key=lambda row: row["execution_ratio"])
        assert choice["theta"] == cheapest["theta"]
        assert choice["rule"].startswith("tolerance: ")
        assert choice["passes"] == 3


def test_a_row_without_predictions_is_known_to_the_grid_and_scored_again_for_pairs(
    swept: Path, passes: Passes
) -> None:
    before = dict(load_results(swept))
    predictions_file(swept, rows(before, "calibration")["0.3"]).unlink()
    predictions_file(swept, rows(before, "validation")["0.3"]).unlink()
    sweep(swept)
    assert passes == []
    after = sweep(swept, "--sweep.rule", "tolerance")
    calibration, validation, *_ = passes
    assert calibration == ("evaluate", [0.3, 0.0])
    assert validation == ("evaluate", [0.0]), "no pairs are needed there"
    old, new = (rows(one, "calibration")["0.3"] for one in (before, after))
    assert {**old, "seconds": 0} == {**new, "seconds": 0}
    assert load_predictions(swept, new) is not None


def test_a_margin_is_shown_or_full_execution_stays(swept: Path) -> None:
    """60 questions can show no 0.1 points, unless nothing differs."""
    results = sweep(swept, "--sweep.rule", "tolerance", "--sweep.margin", "0.001")
    for choice in results["selected"]:
        assert choice["difference"]["low"] > -0.001
        assert "above −0.1 points" in choice["rule"]
    wide = sweep(swept, "--sweep.rule", "tolerance", "--sweep.margin", "0.99")
    assert [choice["theta"] for choice in wide["selected"]] == [0.6, 0.6]


def test_a_sweep_of_one_precision_keeps_what_was_selected_at_others(swept: Path) -> None:
    before = dict(load_results(swept))["selected"]
    after = sweep(swept, "--quantize.bits", "[]", "--sweep.thresholds", "[0.3]")["selected"]
    assert [(choice["bits"], choice["engine"]) for choice in after] == PRECISIONS
    assert after[0]["theta"] == 0.3
    assert after[1] == before[1]


# ---------------------------------------------------------------------------------------------------- budget


def test_a_budget_is_met_on_calibration_and_on_validation_questions(run: Path, passes: Passes) -> None:
    """Within 0.005 on those that it was searched on, and within 0.02 on others."""
    results = sweep(run, "--sweep.rule", "budget", "--sweep.budgets", "[0.85,0.7]")
    assert [(choice["bits"], choice["budget"]) for choice in results["selected"]] == [
        (16, 0.85),
        (16, 0.7),
        (4, 0.85),
        (4, 0.7),
    ]
    for choice in results["selected"]:
        theta = str(choice["theta"])
        calibration = rows(results, "calibration", choice["bits"])[theta]
        assert abs(calibration["execution_ratio"] - choice["budget"]) <= 0.005
        assert abs(choice["execution_ratio"] - choice["budget"]) <= 0.02
        assert (
            choice["execution_ratio"] == rows(results, "validation", choice["bits"])[theta]["execution_ratio"]
        )
        assert load_predictions(run, calibration) is not None
    searched = [thetas for stage, thetas in passes if stage == "search"]
    assert all(len(thetas) == 1 for thetas in searched)
    assert sum(search["passes"] for search in results["searches"]) == len(searched)
    scored = [thetas for stage, thetas in passes if stage == "evaluate"]
    assert scored == [[choice["theta"]] for choice in results["selected"]], "validation questions alone"


def test_a_budget_is_met_on_real_rows_that_were_held_out(
    make_run: Callable[..., RunDirectory], real_root: Path, tmp_path: Path
) -> None:
    """θ comes from training rows of the seven tasks, the ratio is that of validation rows; at 16 bits."""
    rows_of_all = ("--data.tasks", "csqa", "--data.root", str(real_root), "--data.calibration_rows", "24")
    run = make_run(tmp_path, "qtale", *rows_of_all, "--data.limit_validation", "24", *SWEEP)
    results = sweep(
        run.root, "--quantize.bits", "[]", "--sweep.rule", "budget", "--sweep.budgets", "[0.8,0.6]"
    )
    assert [choice["budget"] for choice in results["selected"]] == [0.8, 0.6]
    for choice in results["selected"]:
        assert abs(choice["execution_ratio"] - choice["budget"]) <= 0.02


def test_a_search_isnt_repeated_even_after_another_rule(run: Path, passes: Passes) -> None:
    options = ("--sweep.rule", "budget", "--sweep.budgets", "[0.7]")
    first = sweep(run, *options)
    sweep(run)
    passes.clear()
    again = sweep(run, *options)
    assert passes == []
    assert again["selected"] == first["selected"]
    assert again["searches"] == first["searches"]
    sweep(run, *options, "--data.calibration_rows", "50")
    assert [stage for stage, _ in passes].count("search") > 0, "other questions, another search"


def test_a_budget_out_of_reach_is_refused_with_what_can_be_had(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for budget, words in (("0.1", "layers without a router are 0.333 of all"), ("0.34", "above that")):
        with pytest.raises(SystemExit) as end:
            main(["thresholds", str(run), "--sweep.rule", "budget", "--sweep.budgets", f"[{budget}]"])
        assert end.value.code == 2
        message = " ".join(capsys.readouterr().err.split())
        assert "--sweep.budgets" in message
        assert "can't be reached" in message
        assert words in message


def test_a_budget_out_of_reach_leaves_the_others_to_be_met(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every precision, and in the report; the message comes last."""
    reports: list[Path] = []
    monkeypatch.setattr("qtale_lightning.report.write_report", reports.append)
    with pytest.raises(SystemExit) as end:
        sweep(run, "--sweep.rule", "budget", "--sweep.budgets", "[0.34,0.7]")
    assert end.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "16 bits: an execution ratio of 0.34 can't be reached" in message
    assert "4 bits: an execution ratio of 0.34 can't be reached" in message
    selected = load_results(run)["selected"]
    assert [(choice["bits"], choice["budget"]) for choice in selected] == [(16, 0.7), (4, 0.7)]
    assert reports == [run]


def test_layers_get_their_own_thresholds_and_reports_show_them(
    run: Path, passes: Passes, reported: None, capsys: pytest.CaptureFixture[str]
) -> None:
    common = sweep(run, "--sweep.rule", "budget", "--sweep.budgets", "[0.7]")
    passes.clear()
    results = sweep(run, "--sweep.rule", "layer-budget", "--sweep.budgets", "[0.7]")
    by_layer = [choice for choice in results["selected"] if isinstance(choice["theta"], list)]
    assert by_layer, "one θ was better for all layers: nothing is tested"
    for choice in by_layer:
        assert len(choice["theta"]) == 4  # layers 2 to 5
        row = rows(results, "calibration", choice["bits"])[str(choice["theta"])]
        assert abs(row["execution_ratio"] - 0.7) <= 0.005
        one = next(c for c in common["selected"] if c["bits"] == choice["bits"])
        assert (
            row["average_nll"] < rows(common, "calibration", choice["bits"])[str(one["theta"])]["average_nll"]
        )
        assert choice["rule"].startswith("layer-budget: a θ for each layer")
    shown = f"{min(by_layer[0]['theta']):.2g}…{max(by_layer[0]['theta']):.2g} by layer"
    page = (run / "results.md").read_text(encoding="utf-8")
    assert shown in page
    assert "layer-budget 0.7" in page
    json.loads((run / "results.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)  # plain JSON
    passes.clear()
    thetas = [f"{theta}" for theta in by_layer[0]["theta"]]
    main(["evaluate", str(run), "--bits", str(by_layer[0]["bits"]), "--theta", ",".join(thetas)])
    assert passes == [], "the sweep has measured it"
    assert "by layer" in capsys.readouterr().out


def test_a_wrong_number_of_thresholds_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(run), "--theta", "0.3,0.2"])
    assert end.value.code == 2
    assert "2 thresholds for 4 routed layers" in " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------------------------- reporting


def test_the_cost_of_selecting_is_reported(
    swept: Path, reported: None, capsys: pytest.CaptureFixture[str]
) -> None:
    results = sweep(swept, "--sweep.rule", "tolerance")
    printed = capsys.readouterr().out
    assert "passes over 60 calibration questions" in " ".join(printed.split())
    assert "Cost of selecting θ" in printed
    page = (swept / "results.md").read_text(encoding="utf-8")
    for choice in results["selected"]:
        low, high = (100 * choice["difference"][end] for end in ("low", "high"))
        assert f"| 3 | {choice['seconds']:,.1f} | " in page
        assert f"[{low:+.2f}, {high:+.2f}]" in page


def test_results_without_costs_are_still_read(swept: Path) -> None:
    """As written before there were any."""
    results = load_results(swept)
    for choice in results["selected"]:
        del choice["passes"], choice["seconds"]
    save_results(swept, results)
    write_markdown(swept)
    assert "Cost of selecting θ" not in (swept / "results.md").read_text(encoding="utf-8")


def test_two_runs_are_compared_in_pairs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same model at another θ, as another run: its differences, and their intervals."""
    results = sweep(run, "--sweep.thresholds", "[0.6]")
    other = shutil.copytree(run, tmp_path / "other")
    theirs = sweep(other, "--sweep.thresholds", "[0.1]")
    capsys.readouterr()
    main(["compare", str(run), str(other), "--to", str(tmp_path / "out")])
    page = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    for bits in (16, 4):
        one, two = rows(theirs, "validation", bits)["0.1"], rows(results, "validation", bits)["0.6"]
        pair = load_predictions(other, one), load_predictions(run, two)
        assert pair[0] is not None
        assert pair[1] is not None
        found = compare_predictions(pair[0], pair[1])
        (line,) = [text for text in page.splitlines() if f"θ = 0.6 | {bits}-bit" in text]
        assert "qtale, θ = 0.1 − qtale, θ = 0.6" in line
        assert f"{100 * found.value:+.2f} ± {100 * found.stderr:.2f}" in line
    shutil.rmtree(run / "predictions")
    main(["compare", str(run), str(other), "--to", str(tmp_path / "out")])
    assert "paired" not in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")


def test_lighter_rows_are_their_own(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens in 8 bits and a head in 4 change numbers: their rows say so, and stand beside the others."""
    before = load_results(swept)["evaluation"]
    command = ["evaluate", str(swept), "--bits", "4", "--theta", "0.3", *SWEEP[2:4]]
    main([*command, "--activation_bits", "8", "--head_bits", "4"])
    assert "rtn+a8+h4" in capsys.readouterr().out
    after = load_results(swept)["evaluation"]
    (new,) = (row for row in after if row not in before)
    assert len(after) == len(before) + 1
    assert (new["bits"], new["engine"], new["theta"]) == (4, "rtn+a8+h4", 0.3)
    assert (new["protocol"]["activation_bits"], new["protocol"]["head_bits"]) == (8, 4)
    (plain,) = (row for row in before if (row["bits"], row["theta"], row["split"]) == (4, 0.3, "validation"))
    assert "head_bits" not in plain["protocol"]
    assert new["average_nll"] != plain["average_nll"]
    assert new["average_nll"] == pytest.approx(plain["average_nll"], abs=0.1)
    main([*command])
    assert load_results(swept)["evaluation"] == after, "the plain row is as it was measured before"
    with pytest.raises(SystemExit):
        main(["evaluate", str(swept), "--activation_bits", "8"])
    assert "this model has none" in "".join(capsys.readouterr())


def test_perturbed_decisions_take_no_ones_place(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their rows and searches say so, stand beside the others, select nothing, and are known again."""
    before = load_results(swept)
    command = ["thresholds", str(swept), *SWEEP[2:], "--sweep.rule", "budget", "--sweep.budgets", "[0.8]"]
    main([*command, "--noise", "1"])
    assert "what is selected stays as it was" in " ".join(capsys.readouterr().out.split())
    after = load_results(swept)
    assert after["selected"] == before["selected"]
    assert [row for row in after["evaluation"] if row in before["evaluation"]] == before["evaluation"]
    new = [row for row in after["evaluation"] if row not in before["evaluation"]]
    assert {(row["bits"], row["split"]) for row in new} == {
        (bits, split) for bits, _ in PRECISIONS for split in ("calibration", "validation")
    }
    assert all(row["protocol"]["perturbation"] == {"noise": 1.0} for row in new)
    assert all(
        row["execution_ratio"] == pytest.approx(0.8, abs=0.005)
        for row in new
        if row["split"] == "calibration"
    )
    assert [search["perturbation"] for search in after["searches"]] == [{"noise": 1.0}] * 2
    assert own_rows(after) == own_rows(before)
    main([*command, "--noise", "1"])
    assert load_results(swept) == after
    main(command)
    assert len(load_results(swept)["searches"]) == 4
    at = ["evaluate", str(swept), "--theta", "0.3", "--random_gates", "0.2"]
    with pytest.raises(SystemExit) as refused:
        main(at)
    assert refused.value.code == 2
    assert "--random_gates needs --random_ratio" in " ".join(capsys.readouterr().err.split())
    main([*at, "--random_ratio", "0.7"])
    assert "20 % random gates" in capsys.readouterr().out
    (row,) = (row for row in load_results(swept)["evaluation"] if "random_gates" in str(row["protocol"]))
    assert row["protocol"]["perturbation"] == {"random_gates": 0.2, "random_ratio": 0.7}
    (plain,) = (row for row in own_rows(before) if (row["bits"], row["theta"]) == (16, 0.3))
    assert path_distance(row["execution_ratio_per_layer"]) > path_distance(plain["execution_ratio_per_layer"])
    write_markdown(swept)
    assert "16-bit, 20 % random gates" in (swept / "results.md").read_text(encoding="utf-8")
