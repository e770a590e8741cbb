"""The stage that tests: those of the suite that are marked `cuda`, where pytest is."""

from importlib.util import find_spec
from typing import Any

from gpu_check.stages import ROOT, Context, StageFailed

ALL_SKIPPED, NONE_FOUND = (
    0,
    5,
)  # pytest's exit statuses where there is no GPU, and where there are no such tests


class Outcomes:
    """What pytest reports, by outcome; a plugin of it."""

    def __init__(self, context: Context) -> None:
        self.context, self.found = context, {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test once, and keep why it failed."""
        if report.when == "call" or report.outcome != "passed":
            self.found[report.outcome] += 1
        if report.failed:
            self.failures[report.nodeid] = str(report.longrepr)[-1500:]
        self.context.save({"tests": self.found, "failures": self.failures})


def tests(context: Context) -> dict[str, Any]:
    """Numbers of tests by outcome.

    Raises:
        StageFailed: pytest isn't there, or a test failed, or none ran on a GPU.
    """
    if find_spec("pytest") is None:
        raise StageFailed("there is no pytest: the bundle brings it")
    import pytest

    outcomes = Outcomes(context)
    where = [str(ROOT / "tests" / "cuda"), str(ROOT / "tests" / "training" / "test_host_waits.py")]
    given = ["-m", "cuda", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    status = pytest.main([*where, *given], plugins=[outcomes])
    if outcomes.failures or status not in (ALL_SKIPPED, NONE_FOUND):
        raise StageFailed(
            f"{outcomes.found['failed']} tests failed, the first: {next(iter(outcomes.failures), status)}"
        )
    if context.device == "cuda" and not outcomes.found["passed"]:
        raise StageFailed("no test ran")
    return {"tests": outcomes.found}
