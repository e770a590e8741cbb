"""The scripts' folder as a place to import from."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """``load("gpu_check.stages")``: a module of the scripts' folder; forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        __import__(name)
        return sys.modules[name]

    yield load
    for name in set(sys.modules) - before:
        if name.startswith("gpu_check") or name in ("latency", "common"):
            del sys.modules[name]
