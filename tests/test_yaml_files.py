"""YAML from outside is read up to a stated size, makes no objects, and is refused with its file and line."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from qtale_lightning.configuration import PlannedRun
from qtale_lightning.yaml_files import MAX_BYTES, RefusedYamlError, check_yaml, read_yaml


def bomb(levels: int, width: int = 9) -> str:
    """width ** levels values in a few lines."""
    lines = [f"a0: &a0 [{', '.join('x' * width)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb(12), (":6: ", "aliases", "100,000 values")),
        ("a: 1\nb: !!python/object/apply:os.system [id]", (":2: ", "!!python/object/apply:os.system", "run code")),
        ("a: !!python/name:os.system", (":1: ", "run code")),
        ("a: !mine 3", (":1: ", "!mine")),
        ("a: " + "[" * 101 + "]" * 101, (":1: ", "100 deep")),
        ("a: " + "[" * 100_000, (":1: ", "100 deep")),
        ("a: &a [*a]", (":1: ", "aliases")),
        ("a: *b", (":1: ", "not YAML", "alias")),
        ("a: [1\nb: 2", (":2: ", "not YAML")),
        ("a:\n\tb: 1", (":2: ", "not YAML")),
        ("a: 2026-99-99", ("not YAML", "month")),
        ("a: 1\n---\nb: 2", ("not YAML",)),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_refused(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RefusedYamlError) as refusal:
        read_yaml(file)
    message = str(refusal.value)
    assert message.startswith(str(file))
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


def test_files_that_are_no_text_or_too_large(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"a: 1\nb: \xff")
    with pytest.raises(RefusedYamlError, match=r"run\.yaml isn't UTF-8: byte 9 is 0xff"):
        read_yaml(file)
    file.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(RefusedYamlError, match=r"1,048,577 bytes"):
        read_yaml(file)


def test_plain_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: &x {b: [1, 2.5, yes, null, !!str 3]}\nc: *x\n")
    assert read_yaml(file) == {"a": (shared := {"b": [1, 2.5, True, None, "3"]}), "c": shared}


def test_aliases_may_repeat_a_little() -> None:
    check_yaml(bomb(5), "a file")


def test_every_file_of_the_suite_passes() -> None:
    root = Path(__file__).parent.parent
    files = [*root.glob("experiments/**/*.yaml"), *root.glob("sweeps/*.yaml")]
    assert files
    assert all(isinstance(read_yaml(file), dict) for file in files)


@pytest.mark.parametrize(
    "given", ["--config FILE", "--config=FILE", "--model FILE", "-c FILE", "--config NESTING"]
)
def test_a_configuration_is_checked_however_it_is_given(given: str, tmp_path: Path) -> None:
    file, nesting = tmp_path / "mine.yaml", tmp_path / "nesting.yaml"
    file.write_text("name: !!python/name:os.system", encoding="utf-8")
    nesting.write_text(f"model: {file}", encoding="utf-8")
    arguments = given.replace("FILE", str(file)).replace("NESTING", str(nesting)).split()
    with pytest.raises(Exception, match=r":1: !!python/name:os\.system asks for an object") as refusal:
        PlannedRun(arguments, "plan")
    assert ("mine.yaml" in str(refusal.value)) == ("NESTING" not in given)


@pytest.mark.parametrize("content", ["", "text", "[1]"])
def test_a_configuration_is_a_mapping(content: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.yaml is .*, not a configuration"):
        PlannedRun(["--config", str(tmp_path / "mine.yaml")], "plan")


def test_an_alias_bomb_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(bomb(30), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "qtale_lightning", "plan", "--config", str(tmp_path / "bomb.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)),
    )
    assert done.returncode == 2, done.stderr[-1000:]
    assert "aliases" in done.stderr
