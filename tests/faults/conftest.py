"""Faults are injected for real, so many times as QTALE_FAULT_TRIALS says, and counted at the end of the session."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.starter import Starter

TRIALS = int(os.environ.get("QTALE_FAULT_TRIALS", "0"))
COUNTED = "faults"

Count = Callable[[str, int, int], None]


@pytest.fixture(scope="session")
def trials() -> Callable[[int], int]:
    """``trials(few)``: how often a fault is injected; a few times in the daily suite, many in `make test-faults`."""
    return lambda few: TRIALS or few


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Count:
    """``count(fault, trials, lost)`` adds a line to the table of the session, whichever process tests run in."""
    kept = request.node.user_properties
    return lambda fault, tried, lost: kept.append((COUNTED, (fault, tried, lost)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    found = [
        value
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name == COUNTED
    ]
    if found:
        terminalreporter.section("faults")
        for fault, tried, lost in found:
            terminalreporter.write_line(f"| {fault} | {tried} | {lost} |")


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Starts commands quickly."""
    with Starter(tmp_path_factory.mktemp("starter") / "log") as process:
        yield process


@pytest.fixture(scope="session")
def small(options: Callable[..., list[str]]) -> Callable[[Path], list[str]]:
    """``small(out)``: the command of a whole run of a few seconds, from training to report."""
    more = (
        *("--data.batch_size", "8", "--data.limit_train", "64", "--data.limit_validation", "16"),
        *("--data.calibration_rows", "8", "--trainer.max_steps", "12", "--trainer.log_every_n_steps", "1"),
        *("--validations", "3", "--quantize.sequences", "32", "--quantize.bits", "[4]"),
        *("--sweep.thresholds", "[0.5]", "--wandb", "disabled", "--trainer.enable_progress_bar", "false"),
    )
    return lambda out: ["fit", *options("tiny", "qtale", *more), "--out", str(out)]
