"""A result knows its model and its questions: what has changed is made again, a quick look takes no place."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qtale_lightning.__main__ import main
from qtale_lightning.results.predictions import load_predictions, predictions_file
from qtale_lightning.results.series import other_rows, own_rows, validation_series
from qtale_lightning.results.store import load_results
from qtale_lightning.run import RunDirectory

pytestmark = pytest.mark.slow

SMALL = ("--data.limit_validation", "30", "--data.limit_train", "80", "--data.calibration_rows", "20")
SWEEP = ("--sweep.thresholds", "[0.6,0.3]", "--quantize.engine", "rtn", "--quantize.bits", "[4]")


@pytest.fixture(scope="module")
def made(make_run: Callable[..., RunDirectory], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs"), "qtale", *SMALL, *SWEEP).root
    main(["thresholds", str(run)])
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> RunDirectory:
    return RunDirectory(shutil.copytree(made, tmp_path / "run"))


def rows(run: RunDirectory, bits: float = 4) -> list[dict[str, Any]]:
    return [dict(row) for row in load_results(run.root)["evaluation"] if row["bits"] == bits]


def another_model(run: RunDirectory, bits: float) -> None:
    """Change a model behind the run's back, and take it off the list."""
    file = run.model(bits, "rtn") / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point() and "norm" in name)
    tensors[name] *= 1.5
    save_file(tensors, file, {"format": "pt"})
    (run.root / "manifest.json").unlink()


# ---------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("bits", [16, 4])
def test_a_changed_model_is_measured_again(run: RunDirectory, bits: float) -> None:
    before, others = rows(run, bits), rows(run, 20 - bits)
    another_model(run, bits)
    main(["thresholds", str(run.root)])
    after = rows(run, bits)
    assert [row["theta"] for row in after] == [row["theta"] for row in before], "each in its old one's place"
    assert all(new["average_nll"] != old["average_nll"] for new, old in zip(after, before, strict=True))
    assert len({row["fingerprint"]["model"] for row in [*before, *after]}) == 2
    assert rows(run, 20 - bits) == others
    for row in after:
        assert load_predictions(run.root, row) is not None


def test_evaluate_measures_a_changed_model_again(run: RunDirectory) -> None:
    (before,) = (row for row in rows(run) if (row["theta"], row["split"]) == (0.3, "validation"))
    again = ["evaluate", str(run.root), "--bits", "4", "--theta", "0.3"]
    main(again)
    assert before in rows(run)
    another_model(run, 4)
    main(again)
    (after,) = (row for row in rows(run) if (row["theta"], row["split"]) == (0.3, "validation"))
    assert after["average_nll"] != before["average_nll"]


def test_a_row_that_doesnt_say_its_model_is_measured_again(run: RunDirectory) -> None:
    """As those of before there were fingerprints; they are readable, and stay until then."""
    results = load_results(run.root)
    for row in results["evaluation"]:
        del row["fingerprint"]
    (run.root / "manifest.json").unlink()
    (run.root / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert len(own_rows(load_results(run.root))) == 4
    main(["report", str(run.root)])
    assert "fingerprints: 4 of 4 rows have none" in (run.root / "results.md").read_text(encoding="utf-8")
    main(["evaluate", str(run.root), "--bits", "4", "--theta", "0.3"])
    assert [row["theta"] for row in rows(run) if "fingerprint" in row] == [0.3]
    assert len(load_results(run.root)["evaluation"]) == 8, "in the place of the old one"


# ---------------------------------------------------------------------------------------------- the packed model


def test_what_is_there_from_the_same_stays_and_says_so(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    before = run.model(4, "rtn").stat().st_mtime_ns, load_results(run.root)
    main(["quantize", str(run.root)])
    assert (run.model(4, "rtn").stat().st_mtime_ns, load_results(run.root)) == before
    assert "4 bits: there already, of this model, rows and options" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--quantize.group_size", "64"), "--quantize.group_size 32"),
        (("--quantize.symmetric", "true"), "--quantize.symmetric False"),
        (("--quantize.patterns", '{"*.down_proj": 8}'), "other --quantize.patterns"),
    ],
)
def test_other_options_make_it_anew_and_its_figures_go(
    run: RunDirectory, more: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old = predictions_file(run.root, rows(run)[0])
    assert old.is_file()
    dense = rows(run, 16)
    main(["quantize", str(run.root), *more])
    said = " ".join(capsys.readouterr().out.split())
    assert f"was made with {says}: it stays until another is made" in said
    results = load_results(run.root)
    assert rows(run) == []
    assert [choice["bits"] for choice in results["selected"]] == [16]
    assert not old.is_file()
    assert rows(run, 16) == dense
    main(["quantize", str(run.root), *more])
    assert "there already" in capsys.readouterr().out
    main(["thresholds", str(run.root)])
    assert len(rows(run)) == 4


@pytest.mark.parametrize("kept", [None, {"model": "another", "sequences": "some", "group_size": 32}])
def test_a_packed_model_of_before_is_measured_as_it_is_and_made_anew(run: RunDirectory, kept: Any) -> None:
    file = run.model(4, "rtn") / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"]["made_from"] = kept
    file.write_text(json.dumps(config), encoding="utf-8")
    (run.root / "manifest.json").unlink()
    again = ["evaluate", str(run.root), "--bits", "4", "--theta", "0.3"]
    main(again)
    found = [row for row in rows(run) if row["fingerprint"]["quantization"] == {}]
    assert [row["theta"] for row in found] == [0.3]
    main(again)
    assert [row for row in rows(run) if row["fingerprint"]["quantization"] == {}] == found, (
        "it is known again"
    )
    main(["report", str(run.root)])
    main(["quantize", str(run.root)])
    assert rows(run) == []
    main(again)
    assert [row["fingerprint"]["quantization"]["group_size"] for row in rows(run)] == [32]


@pytest.mark.parametrize(
    ("more", "setting"),
    [
        (("--quantize.group_size", "64"), {"group_size": 64}),
        (("--quantize.symmetric", "true"), {"symmetric": True}),
        (("--quantize.patterns", '{"*.down_proj": 8}'), {"patterns": {"*.down_proj": 8}}),
    ],
)
def test_a_requantized_model_is_measured_and_its_row_says_how_it_was_made(
    run: RunDirectory, more: tuple[str, ...], setting: dict[str, Any]
) -> None:
    """Even where the rows of the old one are put back behind the run's back: their fingerprints tell them."""
    results = (run.root / "results.json").read_bytes()
    (before,) = (row for row in rows(run) if (row["theta"], row["split"]) == (0.3, "validation"))
    main(["quantize", str(run.root), *more])
    (run.root / "manifest.json").unlink()
    (run.root / "results.json").write_bytes(results)
    main(["evaluate", str(run.root), "--bits", "4", "--theta", "0.3"])
    (after,) = (row for row in rows(run) if (row["theta"], row["split"]) == (0.3, "validation"))
    assert after["average_nll"] != before["average_nll"]
    made, old = (row["fingerprint"]["quantization"] for row in (after, before))
    assert made == old | setting
    assert made["model"] == rows(run, 16)[0]["fingerprint"]["model"], "of the exported weights"
    assert rows(run, 16)[0]["fingerprint"]["quantization"] is None
    main(["report", str(run.root)])
    page = (run.root / "results.md").read_text(encoding="utf-8").replace("\\", "")
    (name, value), *_ = setting.items()
    assert f"{name} {value}" in page


def test_other_calibration_sequences_and_another_base_make_it_anew(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    native = ("--quantize.engine", "native", "--quantize.bits", "[4]")
    main(["quantize", str(run.root), *native, "--quantize.sequences", "40"])
    weights = run.model(4) / "model.safetensors"
    first, search = weights.read_bytes(), run.search(4).read_bytes()
    main(["quantize", str(run.root), *native, "--quantize.sequences", "41"])
    assert "was made with other training sequences" in " ".join(capsys.readouterr().out.split())
    assert weights.read_bytes() != first
    assert run.search(4).read_bytes() != search
    main(["quantize", str(run.root), *native, "--quantize.sequences", "40"])
    assert weights.read_bytes() == first
    another_model(run, 16)
    capsys.readouterr()
    main(["quantize", str(run.root), *native, "--quantize.sequences", "40"])
    assert "was made with another exported model" in " ".join(capsys.readouterr().out.split())
    assert weights.read_bytes() != first


def test_more_sequences_than_there_are_change_nothing_and_it_is_said(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    native = ("--quantize.engine", "native", "--quantize.bits", "[4]")
    main(["quantize", str(run.root), *native, "--quantize.sequences", "100"])
    capsys.readouterr()
    with caplog.at_level("INFO"):
        main(["quantize", str(run.root), *native, "--quantize.sequences", "8192"])
    assert "there already" in capsys.readouterr().out
    assert "--quantize.sequences 8192: there are" in caplog.text


def test_a_failed_quantization_leaves_the_old_model_and_its_figures(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows(run), (run.model(4, "rtn") / "model.safetensors").read_bytes()

    def full(self: Any, folder: Path, **_: Any) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qtale_lightning.models.modeling.RoutedForCausalLM.save_pretrained", full)
    monkeypatch.setenv("QTALE_TRACEBACK", "1")
    with pytest.raises(OSError, match=r"No space left on device: '.*model-rtn-4bit'"):
        main(["quantize", str(run.root), "--quantize.group_size", "64"])
    assert (rows(run), (run.model(4, "rtn") / "model.safetensors").read_bytes()) == before
    assert [path.name for path in run.root.glob(".*")] == [".lock"]


# -------------------------------------------------------------------------------------------------- the questions


def test_a_quick_look_stands_beside_the_whole(run: RunDirectory) -> None:
    before = load_results(run.root)
    main(["evaluate", str(run.root), "--theta", "0.3", "--data.limit_validation", "7"])
    results = load_results(run.root)
    assert [row["examples"] for row in other_rows(results)] == [7]
    assert own_rows(results) == own_rows(before)
    assert validation_series(results) == validation_series(before)
    main(["report", str(run.root)])
    own, others = (run.root / "results.md").read_text(encoding="utf-8").split("## Other questions")
    assert "| 7 | 16-bit | 0.3 |" in others
    assert "questions: 30" in own
    main(["evaluate", str(run.root), "--theta", "0.3"])
    main(["evaluate", str(run.root), "--theta", "0.3", "--data.limit_validation", "7"])
    assert load_results(run.root) == results, "both are known"
    for row in results["evaluation"]:
        assert load_predictions(run.root, row) is not None


def test_a_quick_sweep_selects_nothing(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    before = load_results(run.root)
    main(["thresholds", str(run.root), "--data.limit_validation", "7"])
    after = load_results(run.root)
    assert after["selected"] == before["selected"]
    assert own_rows(after) == own_rows(before)
    assert len(other_rows(after)) == 4
    assert "other validation questions than this run's own" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_searches_of_other_questions_take_no_place_and_are_not_taken(run: RunDirectory) -> None:
    budget = [
        "thresholds",
        str(run.root),
        "--quantize.bits",
        "[]",
        "--sweep.rule",
        "budget",
        "--sweep.budgets",
        "[0.8]",
    ]
    main(budget)
    (first,) = load_results(run.root)["searches"]
    main([*budget, "--data.calibration_rows", "12"])
    assert first in load_results(run.root)["searches"]
    assert len(load_results(run.root)["searches"]) == 2
    another_model(run, 16)
    main(budget)
    searches = load_results(run.root)["searches"]
    assert len(searches) == 2
    assert first not in searches


def question(number: int, right: str) -> str:
    choices = {"text": [str(number + 1), str(number + 7)], "label": ["A", "B"]}
    return json.dumps({"question": f"Which number follows {number}?", "answerKey": right, "choices": choices})


def local(root: Path) -> tuple[str, ...]:
    (root / "arc_easy").mkdir(parents=True)
    for split, count in {"train": 60, "validation": 20}.items():
        text = "\n".join(question(number, "A") for number in range(count))
        (root / "arc_easy" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return ("--data.tasks", "arc_easy", "--data.root", str(root), "--data.calibration_rows", "16")


@pytest.mark.slow
def test_corrected_questions_are_measured_and_moved_ones_known(
    make_run: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "out", "qtale", *local(tmp_path / "a"), "--quantize.bits", "[]")
    again = ["evaluate", str(run.root), "--theta", "0.3"]
    main(again)
    before = load_results(run.root)
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = [*again, "--data.root", str(tmp_path / "b")]
    main(moved)
    assert load_results(run.root) == before
    file = tmp_path / "b" / "arc_easy" / "validation.jsonl"
    file.write_text(
        file.read_text(encoding="utf-8").replace(question(3, "A"), question(3, "B")), encoding="utf-8"
    )
    main(moved)
    results = load_results(run.root)
    assert own_rows(results) == before["evaluation"]
    assert [row["examples"] for row in other_rows(results)] == [20]
