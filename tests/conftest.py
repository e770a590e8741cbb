"""One thread, no network, and the command lines that the tests start runs with."""

import ctypes.util
import json
import os

# Before anything imports the hub's client, W&B or PyTorch: they read their environment once. Tests run side by side,
# and threads of more processes than there are cores wait for each other.
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
# Without CUDA's driver, Triton's kernels run in its interpreter, which it decides when it is imported.
os.environ.setdefault("TRITON_INTERPRET", str(int(ctypes.util.find_library("cuda") is None)))

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qtale_lightning import cpu

TESTS = Path(__file__).parent
EXPERIMENTS = TESTS.parent / "experiments"

Options = Callable[..., list[str]]


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")


# The files that take longest, by seconds on a processor without AMX. Each runs in one process (`--dist loadfile`): one
# that begins late is what the others wait for.
LONGEST = (
    "tables/test_real_commands.py",
    "test_end_to_end.py",
    "tables/test_tables.py",
    "faults/test_killed.py",
    "test_wandb_faults.py",
    "parity/test_harness.py",
    "test_benchmarks.py",
    "test_distributed.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those with slow tests: beside the last, others still have something to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    first = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (first.get(item.path, len(first)), item.path not in slow))


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Only a power cut would show whether files were on the disk, and no test cuts it; the commands that tests start as
    processes wait as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def options() -> Options:
    """The options that choose a run: ``options(model, method, *more)``, on the built-in questions."""

    def choose(model: str = "tiny", method: str = "qtale", *more: str) -> list[str]:
        files = (
            EXPERIMENTS / "base.yaml",
            EXPERIMENTS / f"models/{model}.yaml",
            EXPERIMENTS / f"methods/{method}.yaml",
        )
        configs = [part for file in files for part in ("--config", str(file))]
        return [*configs, "--data.tasks", "facts", *more]

    return choose


@pytest.fixture(params=["our operations", "PyTorch's"])
def operations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """What a test runs by on a CPU; whether that is our operations."""
    ours = request.param == "our operations"
    if not ours:
        monkeypatch.setattr(cpu, "available", lambda: False)
    elif not cpu.available():
        pytest.skip("our CPU operations weren't built here")
    return ours


def _row(task: str, n: int) -> dict[str, Any]:
    if task == "mmlu":
        subject = "anatomy" if n % 2 else "virology"
        question = f"What do people use a {n}?"
        return {"question": question, "subject": subject, "choices": list("wxyz"), "answer": n % 4}
    if task == "alpaca":
        return {"instruction": f"Name what is number {n}.", "input": "", "output": f"A brick is number {n}."}
    return {"id": str(n), "dialogue": f"Ann: {n}?\r\nBob: Yes.", "summary": f"Bob says yes to {n}."}


@pytest.fixture(scope="session")
def generality(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of mmlu, alpaca and samsum: 24 training and 6 validation rows each, and 4 examples of mmlu."""
    root = tmp_path_factory.mktemp("generality")
    for task in ("mmlu", "alpaca", "samsum"):
        (root / task).mkdir()
        for split, numbers in {"train": range(24), "validation": range(50, 56), "dev": range(90, 94)}.items():
            lines = [json.dumps(_row(task, n)) for n in numbers]
            (root / task / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def real_root() -> Path:
    """Folder with real rows of the seven tasks of the suite."""
    folder = os.environ.get("QTALE_DATA")
    if not folder:
        pytest.skip("QTALE_DATA isn't set: it names a folder with <task>/{train,validation}.jsonl")
    return Path(folder)
