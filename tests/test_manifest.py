"""What a run has written is read only as it was written."""

import json
import os
import random
from pathlib import Path

import pytest

from qtale_lightning.manifest import FILE_NAME, DamagedFileError, digest, read_object, record, verify, writing


def write(root: Path, name: str, text: str) -> Path:
    with writing(root, root / name) as temporary:
        temporary.write_text(text)
    return root / name


def write_folder(root: Path, **files: str) -> Path:
    with writing(root, root / "model") as temporary:
        temporary.mkdir()
        for name, text in files.items():
            (temporary / name).write_text(text)
    return root / "model"


def test_what_was_written_is_read(tmp_path: Path) -> None:
    for text in ("one", "two"):
        path = write(tmp_path, "results.json", text)
        assert verify(tmp_path, path, "").read_text() == text


@pytest.mark.parametrize("seed", range(20))
def test_a_damage_anywhere_is_named(seed: int, tmp_path: Path) -> None:
    path = write(tmp_path, "last.ckpt", "x" * 4096)
    content = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(len(content))
    if seed % 2:
        content[place] ^= 1
    else:
        del content[place:]
    path.write_bytes(bytes(content))
    with pytest.raises(DamagedFileError, match=r"last\.ckpt isn't what this run wrote .*: remove it"):
        verify(tmp_path, path, "remove it")


def test_a_folder_is_checked_file_by_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, config="{}", weights="abc")
    verify(tmp_path, folder, "")
    (folder / "weights").unlink()
    with pytest.raises(DamagedFileError, match="weights is missing"):
        verify(tmp_path, folder, "")


def test_a_folder_that_is_made_again_forgets_files_that_it_has_no_more(tmp_path: Path) -> None:
    write_folder(tmp_path, one="1", two="2")
    folder = write_folder(tmp_path, one="3")
    verify(tmp_path, folder, "")
    assert sorted(path.name for path in folder.iterdir()) == ["one"]


def test_a_process_killed_before_the_new_file_took_its_place_leaves_a_sound_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "last.ckpt", "old")
    real = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target) == path:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, "last.ckpt", "new")
    assert verify(tmp_path, path, "").read_text() == "old"


def test_files_that_are_not_listed_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{}")
    assert verify(tmp_path, tmp_path / "old.json", "").read_text() == "{}"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sha256": 3}', '{"sha256": {"a": 1}}'])
def test_a_damaged_manifest_is_named_with_the_way_out(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(DamagedFileError, match=rf"{FILE_NAME} can't be read .*: remove it"):
        verify(tmp_path, tmp_path / "a", "")


def test_a_digest_is_of_content_and_names_alone(tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("1")
        digests.append(digest(tmp_path / name))
    assert digests[0] == digests[1]
    (tmp_path / "b" / "weights").write_text("2")
    assert digest(tmp_path / "b") != digests[0]
    assert json.loads((tmp_path / "a" / "weights").read_text()) == 1


def test_files_written_one_right_after_the_other_are_told_apart(tmp_path: Path) -> None:
    """They may share their place on the disk, their size and, by the file system's clock, their time."""
    digests = set()
    for number in range(200):
        with writing(tmp_path, tmp_path / "a") as temporary:
            temporary.write_text(f"{number:03d}")
        digests.add(digest(verify(tmp_path, tmp_path / "a", "")))
    assert len(digests) == 200


def test_a_process_killed_again_and_again_leaves_a_sound_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that only the old folder has, or only the new one, are no damage of it."""
    folder = write_folder(tmp_path, one="1", two="2")
    real = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == FILE_NAME:
            real(source, target)
        else:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        for text in "345":
            with pytest.raises(KeyboardInterrupt):
                write_folder(tmp_path, two=text, three=text)
            assert (verify(tmp_path, folder, "") / "two").read_text() == "2"
    write_folder(tmp_path, two="6", three="6")
    (folder / "two").write_text("2")
    with pytest.raises(DamagedFileError):
        verify(tmp_path, folder, "")


def test_logs_of_others_are_listed_as_they_are(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("step\n1\n")
    record(tmp_path, [log])
    verify(tmp_path, log, "")
    log.write_text("step\n2\n")
    with pytest.raises(DamagedFileError):
        verify(tmp_path, log, "")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_a_file_without_the_object_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"config\.json.*: remove it"):
        read_object(tmp_path, tmp_path / "config.json", "remove it", ["model_type"])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read_object(tmp_path, tmp_path / "config.json", "", ["model_type"]) == {"model_type": "llama"}
