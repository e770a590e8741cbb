"""Building the CPU operations: once, into a cache, and quietly doing without where it can't be."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qtale_lightning import cpu
from qtale_lightning.cpu import build

CALL = "from qtale_lightning import cpu; print(cpu.available())"


def in_a_process(cache: Path, **environment: str) -> tuple[bool, str]:
    """Whether the operations are there in a new process, and what it logged."""
    code = "import logging; logging.basicConfig(level=logging.INFO); " + CALL
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip() == "True", done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not cpu.available(), reason="our CPU operations weren't built here")
def test_built_once_and_found_again(tmp_path: Path) -> None:
    works, log = in_a_process(tmp_path)
    assert works
    assert "building CPU operations" in log
    (library,) = (tmp_path / "qtale_lightning").iterdir()  # nothing half-built beside it
    built = library.stat().st_mtime_ns
    works, log = in_a_process(tmp_path, CXX="c++")
    assert works
    assert "building" not in log
    assert library.stat().st_mtime_ns == built


@pytest.mark.slow
@pytest.mark.skipif(not cpu.available(), reason="our CPU operations weren't built here")
@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "install g++"), ("false", "weren't built")]
)
def test_without_a_working_compiler(compiler: str, reason: str, tmp_path: Path) -> None:
    works, log = in_a_process(tmp_path, CXX=compiler)
    assert not works
    assert reason in log
    assert not any(tmp_path.glob("qtale_lightning/*"))


@pytest.mark.slow
def test_the_switch(tmp_path: Path) -> None:
    assert in_a_process(tmp_path, **{build.SWITCH: "0"})[0] is False
    assert not any(tmp_path.iterdir())


def test_other_processors_and_systems(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for variable in (build.SWITCH, build.CHOICE):
        monkeypatch.delenv(variable, raising=False)
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(build, "instruction_sets", list)
    assert build.available.__wrapped__() is False
    assert "AVX-512" in caplog.text
    monkeypatch.setattr(sys, "platform", "darwin")
    assert build.available.__wrapped__() is False
    assert "Linux" in caplog.text


def test_another_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "instruction_sets", lambda: ["avx512", "avx2"])
    monkeypatch.delenv(build.CHOICE, raising=False)
    assert build.instruction_set() == "avx512"
    monkeypatch.setenv(build.CHOICE, "AVX2")
    assert build.instruction_set() == "avx2"
    monkeypatch.setenv(build.CHOICE, "avx512_bf16")
    with pytest.raises(ValueError, match=r"avx512_bf16, which this processor hasn't.*; it has avx512, avx2"):
        build.instruction_set()
    monkeypatch.setenv(build.CHOICE, "sse4")
    with pytest.raises(ValueError, match="QTALE_CPU_ISA is sse4, but it is one of avx2, avx512"):
        build.instruction_set()


@pytest.mark.slow
def test_what_the_compiler_says(tmp_path: Path) -> None:
    """Its first error, not the headers that lead to it."""
    if build.unavailable():
        pytest.skip("nothing is compiled here")
    works, log = in_a_process(tmp_path, CXX="c++ -include no-such-header.h")
    assert not works
    (line,) = (line for line in log.splitlines() if "weren't built" in line)
    assert "error: no-such-header.h" in line


def test_a_broken_library_is_not_fatal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    monkeypatch.delenv(build.SWITCH, raising=False)
    monkeypatch.setattr(build, "unavailable", lambda: None)
    monkeypatch.setattr(build, "instruction_set", lambda: "avx2")
    monkeypatch.setattr(build, "operations", build.operations.__wrapped__)  # none that is loaded already
    monkeypatch.setattr(build, "_library", lambda instructions: broken)
    assert build.available.__wrapped__() is False
    assert "weren't built" in caplog.text
