"""Every known kind of error ends in one paragraph of plain text and an exit status; others keep their traceback."""

import argparse
import errno
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
import torch
import yaml
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file
from wandb.errors import CommError

from qtale_lightning import errors
from qtale_lightning.__main__ import main
from qtale_lightning.run import RunDirectory

Raised = Callable[[Path], object]


def raising(error: BaseException) -> Raised:
    def run(_: Path) -> None:
        raise error

    return run


def cut_checkpoint(folder: Path) -> object:
    torch.save({"weight": torch.zeros(1000)}, folder / "last.ckpt")
    whole = (folder / "last.ckpt").read_bytes()
    (folder / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    return torch.load(folder / "last.ckpt", weights_only=True)


def empty_checkpoint(folder: Path) -> object:
    (folder / "last.ckpt").touch()
    return torch.load(folder / "last.ckpt", weights_only=True)


def pickled_object(folder: Path) -> object:
    torch.save({"anything": argparse.Namespace()}, folder / "last.ckpt")
    return torch.load(folder / "last.ckpt", weights_only=True)


def cut_weights(folder: Path) -> object:
    (folder / "model.safetensors").write_bytes(b"\x08\x00\x00")
    return load_file(folder / "model.safetensors")


def weights_nowhere(folder: Path) -> None:
    save_file({"weight": torch.zeros(4)}, folder / "nowhere" / "model.safetensors")


def full_disk(_: Path) -> None:
    with open("/dev/full", "w", encoding="utf-8") as file:
        file.write("x")


def system(number: int, path: str | None = None) -> Raised:
    return raising(OSError(number, os.strerror(number), path))


NOT_FOUND = httpx2.Response(404, request=httpx2.Request("GET", "https://hub.example"))
INPUT, MACHINE = errors.INPUT, errors.MACHINE
KINDS: dict[str, tuple[Raised, int, tuple[str, ...]]] = {
    "value": (raising(ValueError("--model.lr -1 must be positive")), INPUT, ("--model.lr -1 must be positive",)),
    "own message": (raising(FileNotFoundError("outputs/x is no run")), INPUT, ("outputs/x is no run",)),
    "no such file": (lambda folder: (folder / "a.json").read_text(), INPUT, ("a.json", "no such file")),
    "disk full": (full_disk, MACHINE, ("no space", "--out", "same command")),
    "disk full, path": (system(errno.ENOSPC, "/mnt/run/best.ckpt"), MACHINE, ("/mnt/run/best.ckpt", "no space")),
    "quota": (system(errno.EDQUOT, "/home/x"), MACHINE, ("/home/x", "no space")),
    "rights": (system(errno.EACCES, "/root/out"), MACHINE, ("/root/out", "permission denied", "--out")),
    "read-only": (system(errno.EROFS, "/mnt/out"), MACHINE, ("/mnt/out", "read-only")),
    "unreadable disk": (system(errno.EIO, "/mnt/out"), MACHINE, ("/mnt/out", "input/output error")),
    "reset": (raising(ConnectionResetError(errno.ECONNRESET, "reset by peer")), MACHINE, ("network", "same command")),
    "http": (raising(httpx2.ReadTimeout("timed out")), MACHINE, ("network", "timed out", "same command")),
    "offline": (raising(OfflineModeIsEnabled("cannot reach the hub")), INPUT, ("cannot reach the hub",)),
    "no repository": (
        raising(RepositoryNotFoundError("no such repository", response=NOT_FOUND)),
        INPUT,
        ("no such repository",),
    ),
    "dataset": (raising(DatasetGenerationError("could not make it")), INPUT, ("could not make it",)),
    "memory": (raising(MemoryError()), MACHINE, ("memory", "--data.batch_size", "plan")),
    "GPU memory": (
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")),
        MACHINE,
        ("memory for 2.00 GiB", "--data.batch_size"),
    ),
    "tensor too large": (lambda _: torch.empty(10**15), MACHINE, ("memory for 4000000000000000 bytes",)),
    "cut checkpoint": (cut_checkpoint, MACHINE, ("damaged",)),
    "empty checkpoint": (empty_checkpoint, MACHINE, ("damaged",)),
    "zip": (raising(zipfile.BadZipFile("File is not a zip file")), MACHINE, ("damaged", "not a zip file")),
    "unsafe checkpoint": (pickled_object, INPUT, ("more than tensors", "run code")),
    "cut weights": (cut_weights, MACHINE, ("damaged", "header")),
    "weights nowhere": (weights_nowhere, INPUT, ("nowhere", "no such file")),
    "YAML": (lambda _: yaml.safe_load("a: ["), INPUT, ("line 1",)),
    "option": (
        raising(argparse.ArgumentError(None, 'Parser key "model.lr":\n  Got value: x')),
        INPUT,
        ("--model.lr: Got value: x", "--help"),
    ),
    "Lightning": (raising(MisconfigurationException("no such strategy")), INPUT, ("no such strategy",)),
    "W&B": (raising(CommError("it is down")), MACHINE, ("W&B", "it is down", "--wandb offline")),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_kind_is_one_paragraph(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raised, status, words = KINDS[kind]
    assert errors.run(lambda _: raised(tmp_path) and None, []) == status
    shown = capsys.readouterr()
    message, hint = shown.err.splitlines()
    assert message.startswith("error: ")
    assert [word for word in words if word not in message] == []
    assert "Traceback" not in message
    assert hint == errors.HINT
    assert shown.out == ""


def test_what_a_caller_noted_comes_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def run(_: list[str]) -> None:
        try:
            cut_weights(tmp_path)
        except Exception as error:
            error.add_note(str(tmp_path / "model.safetensors"))
            raise

    errors.run(run, [])
    assert f"error: {tmp_path / 'model.safetensors'}: " in capsys.readouterr().err


@pytest.mark.parametrize("value", ["[/b]", "[bold]x[/bold]", "[red", "\\[x]", ":smile:"])
def test_a_value_is_shown_as_it_is(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    errors.run(raising(ValueError(f"unknown model {value}")), [])  # type: ignore[arg-type]
    assert f"unknown model {value}\n" in capsys.readouterr().err


def test_a_value_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    errors.run(raising(ValueError("a\x1b[2Jb\ud800")), [])  # type: ignore[arg-type]
    assert "a\\x1b[2Jb\\ud800" in capsys.readouterr().err


def test_an_unknown_kind_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert errors.run(lambda _: {}["key"], []) == 1
    message = capsys.readouterr().err
    assert "Traceback" in message
    assert "KeyError" in message.splitlines()[-1]
    assert f"{__file__}:" in message.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["--debug", "fit"], ["fit", "--debug"]])
def test_debug_keeps_every_traceback(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(errors.VARIABLE, "")
    given = []

    def run(argv: list[str]) -> None:
        given.append(argv)
        assert os.environ[errors.VARIABLE], "a process that the command starts knows nothing of it"
        raise ValueError("mistaken")

    with pytest.raises(ValueError, match="mistaken"):
        errors.run(run, arguments)
    assert given == [["fit"]]


@pytest.mark.parametrize(
    ("command", "words"), [("report", "stopped\n"), ("quantize", "stopped; the same command goes on")]
)
def test_an_interruption_is_one_line(
    command: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunDirectory, "require_config", raising(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as end:
        main([command, "run"])
    assert end.value.code == 130
    shown = capsys.readouterr().err
    assert shown.startswith(words)
    assert len(shown.splitlines()) == 1


def test_a_reader_that_leaves_is_no_error() -> None:
    usage = subprocess.Popen(
        [sys.executable, "-m", "qtale_lightning", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert usage.stdout is not None
    usage.stdout.close()  # long before there is anything to read
    assert usage.communicate(timeout=60)[1] == ""
    assert usage.returncode == 141


def test_sweeps_end_the_same_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["sweep", "start", str(tmp_path / "[/b].yaml"), "--local"])
    assert end.value.code == 2
    assert "there is no sweep" in (message := capsys.readouterr().err)
    assert "[/b].yaml" in message
