"""Tasks of lm-evaluation-harness whose rows are on the hub."""

from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from huggingface_hub import constants

from qtale_lightning.hub.download import reach
from qtale_lightning.hub.errors import HubError
from qtale_lightning.hub.rows import reason_without
from tests.hub.conftest import FIRST, LoopbackHub

pytest.importorskip("lm_eval", reason="needs requirements-lm-eval.txt")

from qtale_lightning.harness.backend import commit_of, evaluate_tasks, find_tasks, harness_model
from qtale_lightning.models.sources import load_base, load_tokenizer

TASK = """
task: sums
dataset_path: {path}
dataset_name: first
output_type: multiple_choice
validation_split: train
test_split: train
doc_to_text: "{{{{number}}}} is"
doc_to_choice: [even, odd]
doc_to_target: "{{{{number % 2}}}}"
"""


@pytest.fixture(autouse=True)
def published(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish("team/script", {"README.md": b"old", "script.py": b"raise SystemExit"})
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", constants.ENDPOINT)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("team/script", r"loading script \(script.py\), and those aren't run"),
        ("no/such", "'no/such' doesn't exist on the Hub|no/such: there is no public repository"),
    ],
)
def test_what_isnt_there_is_said(tmp_path: Path, path: str, words: str) -> None:
    (tmp_path / "sums.yaml").write_text(TASK.format(path=path), encoding="utf-8")
    lm = harness_model(load_base("tiny"), load_tokenizer("tiny"), 2)
    with pytest.raises(HubError, match=rf"rows of its tasks \(sums\): .*({words}).*--data.root") as refusal:
        evaluate_tasks(lm, ["sums"], find_tasks(["sums"], tmp_path, defaults=False))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ValueError("BuilderConfig 'third' not found. Available: ['first']"),
            "BuilderConfig 'third' not found",
        ),
        (
            ConnectionError("Couldn't reach 'team/sums' on the Hub (ConnectError)"),
            "Couldn't reach 'team/sums'",
        ),
        (ZeroDivisionError("a fault of ours"), None),
    ],
)
def test_only_errors_of_the_hub_are_taken_for_them(error: Exception, words: str | None) -> None:
    reason = reason_without(error)
    assert reason is None if words is None else words in (reason or "")


def test_a_hub_that_cant_be_reached_is_asked_no_more(
    hub: LoopbackHub, caplog: pytest.LogCaptureFixture
) -> None:
    reach()
    assert not constants.HF_HUB_OFFLINE
    hub.fault = lambda method, path: "hang"
    reach()
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (True, True)
    assert "only what is cached is read" in caplog.text
    asked = len(hub.requests)
    reach()
    assert len(hub.requests) == asked


def test_the_commit_that_was_read_is_known() -> None:
    def split(file: str) -> SimpleNamespace:
        return SimpleNamespace(cache_files=[{"filename": file}])

    assert commit_of({"test": split(f"/cache/team___sums/first/0.0.0/{FIRST}/sums-test.arrow")}) == FIRST
    assert commit_of({"test": split("/cache/json/default/0.0.0/0123456789abcdef/json-test.arrow")}) is None
    assert commit_of(None) is None
