"""Processes killed at random times: the same command goes on, and ends with what an uninterrupted run has."""

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtale_lightning.manifest import digest
from qtale_lightning.results.store import load_results
from tests.faults.conftest import Count
from tests.faults.starter import Starter

RUN = "tiny-qtale-facts-s0"

Outcome = dict[str, Any]


def outcome(root: Path) -> Outcome:
    """What must not depend on interruptions: models, what was trained on, and every figure."""
    results = load_results(root)
    rows = [
        (row["bits"], row["theta"], row["split"], row["average"], row["average_nll"], row["execution_ratio"])
        for row in results["evaluation"]
    ]
    train = {key: results["train"][key] for key in ("steps", "examples", "tokens", "final_losses")}  # type: ignore[literal-required]
    weights = {folder: digest(root / folder / "model.safetensors") for folder in ("model", "model-awq-4bit")}
    return {
        "weights": weights,
        "train": train,
        "routing": results["routing"],
        "rows": rows,
        "selected": [(one["bits"], one["theta"]) for one in results["selected"]],
    }


@pytest.fixture(scope="module")
def uninterrupted(
    starter: Starter, small: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Outcome, float]:
    """The outcome of a run that nothing disturbs, and its seconds."""
    out = tmp_path_factory.mktemp("uninterrupted")
    ended = starter.run(small(out))
    assert ended.status == 0, ended.output
    return outcome(out / RUN), ended.seconds


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_a_run_killed_at_random_times_ends_as_an_uninterrupted_one(
    how: signal.Signals,
    uninterrupted: tuple[Outcome, float],
    starter: Starter,
    small: Callable[[Path], list[str]],
    tmp_path: Path,
    trials: Callable[[int], int],
    count: Count,
) -> None:
    expected, seconds = uninterrupted
    chance = random.Random(f"{how.name}")
    wanted, killed, lost = trials(1), 0, 0
    while killed < wanted:
        # Until it ends by itself: killed again and again, later and later on average, at every stage of the run.
        for _ in range(50):
            ended = starter.run(small(tmp_path), chance.uniform(0.02, 1.1) * seconds, how)
            if ended.status == 0:
                break
            killed += 1
            assert "Traceback" not in ended.output, ended.output
        assert not list((tmp_path / RUN).rglob(".*.tmp")), "an unfinished file was left behind"
        lost += outcome(tmp_path / RUN) != expected
        shutil.rmtree(tmp_path / RUN)
    count(f"{how.name} at a random time", killed, lost)
    assert lost == 0
