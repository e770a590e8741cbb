"""Run directories: who owns them, how logs of several starts are joined, and how pieces are replaced."""

import csv
import re
from pathlib import Path

import pytest
import yaml

from qtale_lightning.files import replacing
from qtale_lightning.manifest import DamagedFileError
from qtale_lightning.run import RunDirectory, identity

CONFIG = {
    "seed_everything": 0,
    "out": "outputs",
    "validations": 4,
    "trainer": {"max_steps": 8, "accelerator": "cpu", "devices": 1, "precision": 32},
    "model": {"name": "tiny", "lr": 1e-3, "lora_targets": ["q_proj"]},
    "data": {"tasks": "facts", "root": None},
    "quantize": {"bits": [4]},
    "sweep": {"thresholds": [0.5]},
}


def text(**changes: object) -> str:
    """CONFIG as YAML, with dotted keys changed."""
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    for key, value in changes.items():
        *path, last = key.split("__")
        place = config
        for part in path:
            place = place[part]
        place[last] = value
    return yaml.safe_dump(config)


def logged(run: RunDirectory, start: str, rows: list[dict[str, object]]) -> None:
    """Write a start's log as CSVLogger does."""
    folder = run.root / "logs" / start
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def merged(run: RunDirectory) -> list[dict[str, str]]:
    with run.merge_logs().open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------- claim


def test_a_new_directory_keeps_its_configuration(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a" / "run")
    run.claim(text())
    assert yaml.safe_load(run.config.read_text(encoding="utf-8")) == CONFIG
    assert run.require_config() == run.config


def test_the_same_configuration_is_accepted_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.claim(text())
    run.claim(text())
    assert yaml.safe_load(run.config.read_text(encoding="utf-8")) == CONFIG


def test_another_configuration_is_refused_and_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.claim(text())
    with pytest.raises(ValueError, match="another configuration") as refusal:
        run.claim(text(model__lr=0.5, trainer__max_steps=9))
    message = str(refusal.value)
    assert str(tmp_path) in message
    assert "model.lr is 0.001 there, 0.5 here" in message
    assert "trainer.max_steps is 8 there, 9 here" in message
    assert "model.name" not in message
    assert "--out" in message
    assert yaml.safe_load(run.config.read_text(encoding="utf-8")) == CONFIG


def test_a_key_that_only_one_side_has_is_a_difference(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.claim(text())
    with pytest.raises(ValueError, match=r"model\.router_width is None there, 32 here"):
        run.claim(text(model__router_width=32))


def test_an_option_that_came_later_is_no_difference_where_it_changes_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.claim(text())
    run.check_claim(text(model__lambda_prediction=0.0))
    with pytest.raises(ValueError, match=r"lambda_prediction is None there, 1.0 here"):
        run.check_claim(text(model__lambda_prediction=1.0))


def test_many_differences_are_cut_short(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.claim(text())
    with pytest.raises(ValueError, match="…") as refusal:
        run.claim(text(**{f"model__option_{n}": n for n in range(7)}))
    assert str(refusal.value).count(" there, ") == 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("out", "elsewhere"),
        ("validations", 2),
        ("sweep__thresholds", [0.5, 0.1]),
        ("trainer__accelerator", "gpu"),
        ("trainer__devices", 8),
    ],
)
def test_where_it_runs_and_what_follows_may_differ(tmp_path: Path, key: str, value: object) -> None:
    run = RunDirectory(tmp_path)
    run.claim(text())
    run.claim(text(**{key: value}))
    assert run.config.read_text(encoding="utf-8") == text(**{key: value})


ROWS = {"train": {"facts": "t", "piqa": "u"}, "calibration": {"facts": "c"}, "validation": {"facts": "v"}}
MADE_FROM = {"base": None, "files": "f", "rows": ROWS}


def test_the_same_rows_and_base_may_lie_elsewhere(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.claim(text(data__root="a", model__path="/base"), MADE_FROM)
    run.claim(text(data__root="b", model__path="/moved"), MADE_FROM | {"files": "g"}, MADE_FROM)
    assert run.read_config()["data"]["root"] == "b"


def test_other_rows_are_refused_by_their_tasks(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.claim(text(data__root="a"), MADE_FROM)
    others = ROWS | {"train": {"facts": "t", "piqa": "corrected"}, "validation": {"facts": "corrected"}}
    words = "other training rows of piqa (--data.root) and other validation rows of facts (--data.root)"
    with pytest.raises(ValueError, match=f"began with {re.escape(words)}.*--out"):
        run.claim(text(data__root="a"), MADE_FROM | {"rows": others}, MADE_FROM)
    with pytest.raises(ValueError, match=r"another base model \(--model\.path\)"):
        run.claim(text(data__root="a"), MADE_FROM | {"base": "another"}, MADE_FROM)


def test_a_run_that_doesnt_say_its_rows_has_them_where_they_were(tmp_path: Path) -> None:
    """As those of before it was recorded."""
    run = RunDirectory(tmp_path)
    run.claim(text(data__root="a"))
    run.claim(text(data__root="a"), MADE_FROM)
    with pytest.raises(ValueError, match=r"data\.root is a there, b here"):
        run.claim(text(data__root="b"), MADE_FROM)


def test_runs_are_one_by_content(tmp_path: Path) -> None:
    def known(files: str, **changes: object) -> str:
        return identity(yaml.safe_load(text(**changes)), MADE_FROM | {"files": files})

    assert known("f", data__root="a") == known("f", data__root="b", out="elsewhere")
    assert known("f", data__root="a") != known("g", data__root="a")
    assert known("f") != known("f", model__lr=0.5)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_a_cut_configuration_is_named_and_runs_with_no_other_settings(tmp_path: Path, share: float) -> None:
    run = RunDirectory(tmp_path)
    run.claim(text())
    whole = run.config.read_text(encoding="utf-8")
    run.config.write_text(whole[: int(share * len(whole))], encoding="utf-8")
    with pytest.raises(
        DamagedFileError, match=r"config\.yaml isn't what this run wrote .*: remove it and start"
    ):
        run.require_config()
    (tmp_path / "manifest.json").unlink()  # as of a run from before there was one
    with pytest.raises(DamagedFileError, match=r"config\.yaml.*: remove it and start"):
        run.claim(text())


@pytest.mark.parametrize("content", ["{}", "[", "a: !!python/object:os.system x", "\x00"])
def test_what_is_no_configuration_is_named(tmp_path: Path, content: str) -> None:
    run = RunDirectory(tmp_path)
    run.config.write_text(content, encoding="utf-8")
    with pytest.raises(DamagedFileError, match=r"config\.yaml.*: remove it and start"):
        run.require_config()


def test_a_folder_without_a_configuration_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no run.*config\.yaml.*make train"):
        RunDirectory(tmp_path).require_config()


# ----------------------------------------------------------------------------------------------- merge_logs


def test_every_start_has_a_log_of_its_own(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.next_log() == "000"
    logged(run, "000", [{"step": 1, "loss": 2.0}])
    assert run.next_log() == "001"


def test_logs_of_all_starts_are_joined(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    logged(run, "000", [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 1.5}])
    logged(run, "001", [{"step": 5, "loss": 1.0, "val/loss": 0.5}])
    assert merged(run) == [
        {"step": "1", "loss": "2.0", "val/loss": ""},
        {"step": "3", "loss": "1.5", "val/loss": ""},
        {"step": "5", "loss": "1.0", "val/loss": "0.5"},
    ]


def test_steps_that_were_trained_again_count_once(tmp_path: Path) -> None:
    """The first start got to step 7, but its last checkpoint was at step 4; the later start's values hold."""
    run = RunDirectory(tmp_path)
    logged(run, "000", [{"step": step, "loss": 10 + step} for step in (1, 3, 5, 7)])
    logged(run, "001", [{"step": step, "loss": 20 + step} for step in (5, 7, 9)])
    assert [(row["step"], row["loss"]) for row in merged(run)] == [
        ("1", "11"),
        ("3", "13"),
        ("5", "25"),
        ("7", "27"),
        ("9", "29"),
    ]


def test_a_start_that_logged_nothing_takes_nothing_away(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    logged(run, "000", [{"step": 1, "loss": 2.0}])
    (run.root / "logs" / "001").mkdir()
    (run.root / "logs" / "001" / "metrics.csv").write_text("step,loss\n", encoding="utf-8")
    assert len(merged(run)) == 1


def test_a_line_that_a_killed_process_began_isnt_read(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    logged(run, "000", [{"step": 1, "loss": 2.0}])
    with (run.root / "logs" / "000" / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write("3,1.")
    assert [row["step"] for row in merged(run)] == ["1"]


@pytest.mark.parametrize("line", ["3", "3,1.0,2.0", "x,1.0", ",1.0"])
def test_a_damaged_log_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    run = RunDirectory(tmp_path)
    logged(run, "000", [{"step": 1, "loss": 2.0}])
    with (run.root / "logs" / "000" / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    with pytest.raises(DamagedFileError, match=r"000/metrics\.csv:3 .*: remove it"):
        run.merge_logs()


def test_a_log_is_listed_when_its_start_has_ended(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    logged(run, "000", [{"step": 1, "loss": 2.0}])
    run.list_logs()
    run.merge_logs()
    log = run.root / "logs" / "000" / "metrics.csv"
    log.write_text(log.read_text(encoding="utf-8").replace("2.0", "3.0"), encoding="utf-8")
    with pytest.raises(DamagedFileError, match=r"000/metrics\.csv isn't what this run wrote"):
        run.merge_logs()


def test_joining_twice_changes_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    logged(run, "000", [{"step": 1, "loss": 2.0}])
    assert merged(run) == merged(run)


# ------------------------------------------------------------------------------------------------ replacing


def test_a_file_takes_the_old_ones_place(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    for content in ("old", "new"):
        with replacing(target) as temporary:
            temporary.write_text(content, encoding="utf-8")
        assert target.read_text(encoding="utf-8") == content
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_takes_the_old_ones_place_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in ("old", "new"):
        with replacing(target) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [file.name for file in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_what_was_there_and_no_litter(tmp_path: Path, kind: str, existing: bool) -> None:
    target = tmp_path / "target"

    def write(place: Path, content: str) -> None:
        if kind == "folder":
            place.mkdir()
            place = place / "inner"
        place.write_text(content, encoding="utf-8")

    if existing:
        write(target, "old")
    with pytest.raises(RuntimeError, match="power cut"), replacing(target) as temporary:  # noqa: PT012
        write(temporary, "half of the new")
        raise RuntimeError("power cut")
    assert list(tmp_path.iterdir()) == ([target] if existing else [])
    if existing:
        assert (target / "inner" if kind == "folder" else target).read_text(encoding="utf-8") == "old"


def test_a_block_that_wrote_nothing_doesnt_remove_what_was_there(tmp_path: Path) -> None:
    """Removing comes after writing: the old folder stays if there is nothing to take its place."""
    target = tmp_path / "model"
    target.mkdir()
    with pytest.raises(FileNotFoundError), replacing(target):
        pass
    assert target.is_dir()
