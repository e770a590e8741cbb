"""The Makefile hands its variables on as they were given, and knows of no others."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make isn't installed")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What make would run; nothing is run."""
    return subprocess.run(["make", "-n", "-o", "setup", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "MODEL=tiny", "OUT=my runs"), "--out 'my runs'"),
        (("plan", "OUT=it's"), r"--out 'it'\''s'"),
        (("train", 'DATA=["piqa", "boolq"]'), """--data.tasks '["piqa", "boolq"]'"""),
        (
            ("lm-eval", "RUN=my runs/tiny", "TASKS=arc_easy,piqa"),
            "lm-eval 'my runs/tiny' --tasks 'arc_easy,piqa'",
        ),
        (
            ("table", "TABLE=csqa", "OUT=my runs"),
            "table csqa --model smollm2-135m --data.tasks 'facts' --seeds 0 --out 'my runs'",
        ),
        (("table", "TABLE=csqa", "LAUNCH=slurm", "JOBS=2"), "--launch slurm --jobs 2"),
        (
            ("sweep", "SWEEP=lambda2", "LAUNCH=slurm", "JOBS=2"),
            "start sweeps/lambda2.yaml --launch slurm --jobs 2",
        ),
        (("figures", "TABLE=csqa", "OUT=my runs"), "--out 'my runs'"),
        (("sweep", "SWEEP=lambda2", "OUT=my runs", "RUN=my runs/tiny"), "OUT='my runs' RUN='my runs/tiny'"),
        (("doctor", "MODEL=tiny", "OUT=my runs"), "--out 'my runs'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_value_is_one_word_of_the_shell(arguments: tuple[str, ...], words: str) -> None:
    done = make(*arguments)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


@pytest.mark.parametrize("given", ["model=tiny", "Model=tiny", "out=runs"])
def test_a_variable_in_lower_case_is_refused(given: str) -> None:
    """Make would ignore it, and train the default model."""
    done = make("plan", given)
    assert done.returncode == 2
    assert f"unknown variable {given.split('=')[0]}: write {given.split('=')[0].upper()}" in done.stderr


def test_an_unknown_variable_is_named_and_the_environments_are_not() -> None:
    assert "MODLE is no variable of this Makefile (MODEL METHOD" in make("plan", "MODLE=tiny").stderr
    assert make("plan", "MODEL=tiny", "OMP_NUM_THREADS=1", "QTALE_DATA=rows").stderr == ""
