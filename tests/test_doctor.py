"""``doctor``: what is missing is found, named with what to do, and told apart from what is only worth knowing."""

import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from qtale_lightning import doctor, machine
from qtale_lightning.__main__ import main
from qtale_lightning.architectures import known_model


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache of the hub, which can't be reached, and no key of W&B's."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr("qtale_lightning.wandb_session.has_key", lambda: False)
    monkeypatch.setattr(machine, "PATIENCE", 0.5)
    machine.hub.cache_clear()
    yield
    machine.hub.cache_clear()


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def answering() -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def find(model: str, *options: str) -> dict[str, machine.Finding]:
    """The findings on a model, by what they are about."""
    return {finding.thing: finding for finding in doctor.needs(doctor.planned(model, [*options]))}


def test_nothing_is_missing_for_the_smallest_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["doctor", "--model", "tiny", "--out", str(tmp_path / "[/b]"), "--data.tasks", "facts"])
    shown = capsys.readouterr().out
    things = ("Python", "packages", "processor", "products", "memory", "runs' folder", "hub's cache")
    things += ("temporary folder", "CPU operations", "W&B", "weights of tiny", "training", "rows of facts")
    for thing in things:
        assert f" {thing} " in shown
    assert "missing" not in {line.split()[0] for line in shown.splitlines() if line.strip()}
    assert "[/b]" in shown.replace("\n", "")
    assert not (tmp_path / "[/b]").exists()


@pytest.mark.slow
def test_the_status_says_that_something_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--model", "llama2-7b", "--data.tasks", "facts"])
    assert end.value.code == 1
    assert "--model.path" in capsys.readouterr().out


def test_options_of_a_run_need_a_model() -> None:
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--data.tasks", "facts"])
    assert end.value.code == 2


# -------------------------------------------------------------------------------------------------- the machine


def test_packages_that_are_absent_or_of_another_version(tmp_path: Path) -> None:
    pins = tmp_path / "requirements.txt"
    pins.write_text("# ours\n-r other.txt\nno-such-package==1.0\ntorch==0.1\njsonargparse[signatures]==0.2\n")
    found = {finding.thing: finding for finding in machine.versions(pins)}
    assert found["no-such-package"].mark == "missing"
    assert "no-such-package==1.0" in found["no-such-package"].advice
    assert {name: found[name].mark for name in ("torch", "jsonargparse", "Python")} == {
        "torch": "warn", "jsonargparse": "warn", "Python": "ok",
    }  # fmt: skip


def test_the_pinned_packages_are_found() -> None:
    pins = Path(__file__).parent.parent / "requirements.txt"
    assert {finding.mark for finding in machine.versions(pins)} == {"ok"}


@pytest.mark.parametrize(("free", "mark"), [(2**40, "ok"), (2**31, "warn"), (2**20, "missing")])
def test_room_on_a_disk(free: int, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_disk", lambda folder: free)
    found = machine.disk("runs' folder", tmp_path / "not" / "there", "--out")
    assert found.mark == mark
    assert ("--out" in found.advice) == (mark != "ok")


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = machine.disk("temporary folder", tmp_path, "TMPDIR")
    assert (found.mark, "TMPDIR" in found.advice) == ("missing", True)


def test_the_speed_is_that_of_a_product() -> None:
    import torch

    assert 0.01 < machine.speed(torch.float32, seconds=0.02) < 1e6


@pytest.mark.parametrize("failure", ["refuses", "hangs"])
def test_a_silent_hub_is_waited_for_shortly(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listening:
        if failure == "hangs":
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        started = time.monotonic()
        found = machine.hub()
    assert time.monotonic() - started < 5
    assert found.mark == "warn"
    assert "no answer" in found.found


def test_a_hub_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering() as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert machine.hub().mark == "ok"


def test_a_hub_that_must_not_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    assert "HF_HUB_OFFLINE" in machine.hub().found


def test_a_key_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def malformed() -> bool:
        raise ValueError("API key must have 40+ characters, has 3.")

    monkeypatch.setattr("qtale_lightning.wandb_session.has_key", malformed)
    found = machine.wandb()
    assert found.mark == "warn"
    assert "40+ characters" in found.found


# ------------------------------------------------------------------------------------------------------ a model


def test_weights_in_a_folder(tmp_path: Path) -> None:
    assert find("llama2-7b", "--model.path", str(tmp_path))["weights of llama2-7b"].mark == "ok"


def test_weights_in_the_cache(tmp_path: Path) -> None:
    _, model = known_model("llama3.2-1b")
    assert model.hub is not None
    folder = tmp_path / "hub" / f"models--{model.hub.replace('/', '--')}" / "snapshots" / str(model.revision)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    found = find("llama3.2-1b")["weights of llama3.2-1b"]
    assert (found.mark, "in the hub's cache" in found.found) == ("ok", True)


@pytest.mark.slow
def test_weights_to_download(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering() as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(doctor, "free_disk", lambda folder: 2**36)
        found = find("llama2-7b", "--data.tasks", "piqa")
        assert found["weights of llama2-7b"].mark == found["rows of piqa"].mark == "ok"
        assert "12.55 GiB to download" in found["weights of llama2-7b"].found
        monkeypatch.setattr(doctor, "free_disk", lambda folder: 2**30)
        assert "HF_HOME" in find("llama2-7b")["weights of llama2-7b"].advice


def test_memory_for_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "free_memory", lambda: 2**30)
    assert find("tiny")["training"].mark == "ok"
    assert find("llama2-7b")["training"].mark == "missing"


def test_rows_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "train.jsonl").touch()
    found = find("tiny", "--data.tasks", "piqa", "--data.root", str(tmp_path))["rows of piqa"]
    assert (found.mark, "no validation.jsonl" in found.found) == ("missing", True)
    (tmp_path / "piqa" / "validation.jsonl").touch()
    assert find("tiny", "--data.tasks", "piqa", "--data.root", str(tmp_path))["rows of piqa"].mark == "ok"


def test_rows_that_nobody_can_bring() -> None:
    found = find("tiny", "--data.tasks", "piqa")["rows of piqa"]
    assert (found.mark, "--data.root" in found.advice) == ("missing", True)
