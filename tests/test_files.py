"""Files are there whole or not at all: full disks, killed processes, and what they leave."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from qtale_lightning.files import remove_leftovers, replacing


def write_and_fail(target: Path, error: Exception) -> None:
    with replacing(target) as temporary:
        temporary.write_text("half")
        raise error


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="broken"):
        write_and_fail(target, RuntimeError("broken"))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert target.read_text() == "old"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_names_the_file_whatever_library_wrote(error: Exception, tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    with pytest.raises(OSError, match=r"No space left on device: .*model\.safetensors") as raised:
        write_and_fail(target, error)
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(target)


def test_a_full_disk_is_seen_where_what_followed_it_says_nothing(tmp_path: Path) -> None:
    """As PyTorch ends: the file's own error, then that the archive is short."""
    short = RuntimeError("unexpected pos 768 vs 662")
    short.__context__ = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=r"No space left on device: .*last\.ckpt"):
        write_and_fail(tmp_path / "last.ckpt", short)


def test_an_error_of_the_content_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        write_and_fail(tmp_path / "a", FileNotFoundError(errno.ENOENT, "no such file", "elsewhere"))


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".last.ckpt.123.tmp").write_text("half")
    (tmp_path / ".model.123.tmp").mkdir()
    (tmp_path / ".hidden").write_text("the user's own")
    assert len(remove_leftovers(tmp_path)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "checkpoints"]
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_folder_moved_aside_by_a_killed_process_is_put_back(tmp_path: Path) -> None:
    aside = tmp_path / f".model.{os.getpid()}.old"
    aside.mkdir()
    (aside / "config.json").write_text("{}")
    remove_leftovers(tmp_path)
    assert (tmp_path / "model" / "config.json").read_text() == "{}"
