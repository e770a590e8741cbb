"""Files of a finished run, cut, emptied, flipped and replaced: what reads them names them and the way out.

Never a traceback, and never another result without a word.
"""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qtale_lightning.__main__ import main
from qtale_lightning.results.store import load_results
from tests.faults.conftest import Count

pytestmark = pytest.mark.slow

# What reads each file, on the run's folder. A glob stands for any of its files.
READERS: dict[str, list[str]] = {
    "config.yaml": ["report"],
    "results.json": ["report"],
    "metrics.csv": ["thresholds"],  # `report` would make it anew
    "logs/*/metrics.csv": ["report"],
    "predictions/validation-16bit-*.jsonl": ["compare", "OTHER", "--to", "COMPARED"],
    "awq-search-4bit.safetensors": ["quantize", "--quantize.refit_norm", "false"],
    **{
        f"{folder}/{name}": ["evaluate", "--bits", bits]
        for folder, bits in {"model": "16", "model-awq-4bit": "4"}.items()
        for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
    },
    "model/model.safetensors": ["evaluate"],
    "model-awq-4bit/model.safetensors": ["evaluate", "--bits", "4"],
}
# Cut between two lines, these are sound files of fewer lines to whoever doesn't know how long they were.
OF_LINES = {"metrics.csv", "logs/*/metrics.csv"}


@dataclass(frozen=True)
class Damage:
    """What happens to a file."""

    kind: str
    place: float  # as a share of its length

    def __call__(self, path: Path) -> None:
        content = bytearray(path.read_bytes())
        at = int(self.place * len(content))
        match self.kind:
            case "cut":
                del content[at:]
            case "flipped":
                content[at] ^= 1 << at % 8
            case "empty":
                content.clear()
            case "replaced":
                content[:] = b"{}"
        path.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def finished(small: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which no test changes for good."""
    out = tmp_path_factory.mktemp("damaged")
    main(small(out))
    (run,) = out.glob("tiny-*")
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def command(reader: list[str], run: Path, other: Path) -> list[str]:
    words = {"OTHER": str(other), "COMPARED": str(run.parent / "compared")}
    name, *more = (words.get(word, word) for word in reader)
    return [name, str(run), *more]


def said(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command ends with, on standard error; nothing where it ends well."""
    capsys.readouterr()
    try:
        main(argv)
    except SystemExit as ended:
        output = capsys.readouterr().err
        return " ".join(output.split()) if ended.code == 1 else ""  # what isn't the user's fault
    except BaseException as error:
        return f"Traceback: {error!r}"
    return ""


def judged(message: str, path: Path) -> str:
    if not message:
        return "silent"
    if "Traceback" in message:
        return "traceback"
    if not any(str(part) in message for part in (path, path.parent)):
        return "without a name"
    return "named" if "remove" in message or "makes it anew" in message else "without a way out"


def inject(
    run: Path,
    other: Path,
    damages: list[tuple[str, Damage]],
    capsys: pytest.CaptureFixture[str],
) -> tuple[int, list[str]]:
    """Damage, read and restore files, one by one: how many, and those that weren't named with the way out."""
    tried, lost = 0, []
    for pattern, damage in damages:
        path = sorted(run.glob(pattern))[0]
        sound = path.read_bytes()
        damage(path)
        if path.read_bytes() != sound:
            message = said(command(READERS[pattern], run, other), capsys)
            tried += 1
            if (outcome := judged(message, path)) != "named":
                lost.append(f"{outcome}: {pattern} {damage} {message}")
        path.write_bytes(sound)
    return tried, lost


def test_a_damaged_file_is_named_with_the_way_out(
    run: Path,
    finished: Path,
    trials: Callable[[int], int],
    count: Count,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run has the digest of each."""
    kinds = ("cut", "flipped", "empty", "replaced")
    damages = [
        (pattern, Damage(kinds[(number + turn) % 4], random.Random(f"{pattern} {turn}").random()))
        for turn in range(trials(4))
        for number, pattern in enumerate(READERS)
    ]
    tried, lost = inject(run, finished, damages, capsys)
    count("a listed file cut, flipped, emptied or replaced", tried, len(lost))
    assert lost == []
    assert tried > 0.9 * len(damages)


def test_a_file_that_isnt_whole_is_named_where_nothing_lists_it(
    run: Path,
    finished: Path,
    trials: Callable[[int], int],
    count: Count,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As in runs of before there was a manifest. Flipped bits can't be told there."""
    (run / "manifest.json").unlink()
    kinds = ("cut", "empty", "replaced")
    damages = [
        (pattern, Damage(kinds[(number + turn) % 3], 0.8 * random.Random(f"{pattern} {turn}").random()))
        for turn in range(trials(4))
        for number, pattern in enumerate(READERS)
        if pattern not in OF_LINES
    ]
    tried, lost = inject(run, finished, damages, capsys)
    count("an unlisted file cut, emptied or replaced", tried, len(lost))
    assert lost == []


def test_the_way_out_leads_out(
    run: Path, small: Callable[[Path], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """What messages say to remove is made anew, and says the same as before."""
    before = load_results(run)
    other = run.rename(run.parent / "tiny-qtale-facts-s0")
    for name in ("config.yaml", "results.json", "metrics.csv", "awq-search-4bit.safetensors"):
        (other / name).unlink()
    for name in ("model", "model-awq-4bit", "predictions"):
        shutil.rmtree(other / name)
    assert said(small(other.parent), capsys) == ""
    after = load_results(other)
    timed = {"seconds": 0.0, "tokens_per_second": 0.0}
    assert [row | timed for row in after["evaluation"]] == [row | timed for row in before["evaluation"]]
    assert after["train"] | timed == before["train"] | timed
    assert after["run"]["made_from"] == before["run"]["made_from"]
