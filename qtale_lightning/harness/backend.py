"""Calls of lm-evaluation-harness as it is: its `hf` backend on a loaded model, its task files, its table."""

import difflib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtale_lightning.harness.tasks import LOCAL
from qtale_lightning.hub.repository import COMMIT

# The backend's own default is the model's dtype: in bfloat16, log-likelihoods near -10 come in steps of 1/16 nat,
# choices tie, and the first of them wins.
SOFTMAX_DTYPE = "float32"


class HarnessUnavailableError(OSError):
    """lm-evaluation-harness isn't installed; the message says what to do."""


def harness_version() -> str:
    """The installed version.

    Raises:
        HarnessUnavailableError: There is none.
    """
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise HarnessUnavailableError(
            "lm-evaluation-harness isn't installed. In the project's folder: "
            f"`{sys.executable} -m pip install -r requirements-lm-eval.txt` (`make lm-eval` does it by itself)."
        ) from None


def harness_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | str,
    softmax_dtype: str | None = SOFTMAX_DTYPE,
) -> Any:
    """The harness's `HFLM` around a model that is loaded, on the device where it is.

    By a folder's name it would load one, too, but for AutoAWQ's 4-bit layout it makes a `quantization_config` of its
    own, which isn't that of the registered quantizer.

    Args:
        model: Any causal language model of transformers.
        tokenizer: The model's.
        batch_size: Requests in a batch; "auto" lets the harness try (on a GPU: it relies on running out of memory).
        softmax_dtype: What log-probabilities are computed in; None is the harness's default, the model's dtype.

    Raises:
        HarnessUnavailableError: The harness isn't installed.
    """
    harness_version()
    from lm_eval.models.huggingface import HFLM

    with _without_warnings("lm_eval.models.huggingface"):  # that the model is loaded already
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=softmax_dtype)


def find_tasks(names: Sequence[str], folder: Path | None, defaults: bool = True) -> Any:
    """The harness's `TaskManager`, which knows every one of the names.

    Args:
        names: Tasks, groups or tags of the harness, or tasks of the folder.
        folder: With task files of our own.
        defaults: Read the harness's own thousands of task files, too, which takes seconds.

    Raises:
        HarnessUnavailableError: The harness isn't installed.
        ValueError: A name is unknown; similar ones are listed.
    """
    harness_version()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=defaults)
    for name in names:
        if name not in manager.task_index:
            similar = difflib.get_close_matches(name, manager.task_index, n=5)
            raise ValueError(
                f"lm-evaluation-harness {harness_version()} knows no task {name!r} (--tasks)"
                + (f"; similar: {', '.join(similar)}" if similar else "")
            )
    return manager


def evaluate_tasks(lm: Any, names: Sequence[str], manager: Any, limit: int | None = None) -> dict[str, Any]:
    """What the harness's `simple_evaluate` returns, every question's answers (`samples`) included.

    Args:
        lm: See :func:`harness_model`.
        names: Known to the manager.
        manager: See :func:`find_tasks`.
        limit: Questions of each task, the first ones; None takes all.

    Raises:
        HubError: A task's rows can't be had; the message says what to do.
    """
    from lm_eval import simple_evaluate

    loaded = _load(manager, names)
    holding = copy(manager)
    holding.load = lambda specs: loaded  # so that the hub isn't asked twice
    found = simple_evaluate(model=lm, tasks=list(names), task_manager=holding, limit=limit)
    assert found is not None  # it is on other ranks than the first, and there is one
    commits = {name: commit_of(task.dataset) for name, task in loaded["tasks"].items()}
    return {**found, "commits": commits}


def _load(manager: Any, names: Sequence[str]) -> Any:
    """What the manager's `load` returns, with rows from the hub in bounded time, or from the cache."""
    from qtale_lightning.hub.download import patience, reach
    from qtale_lightning.hub.errors import HubError, is_of_the_machine
    from qtale_lightning.hub.rows import reason_without

    if any(not name.endswith(LOCAL) for name in names):
        reach()
    try:
        with patience():
            return manager.load(list(names))
    except Exception as error:
        if (reason := reason_without(error)) is None:
            raise
        raise HubError(
            f"lm-evaluation-harness can't have the rows of its tasks ({', '.join(names)}): {reason} Or give "
            "--data.root FOLDER to ask questions of local files.",
            is_of_the_machine(error),
        ) from error


def commit_of(rows: Any) -> str | None:
    """The commit of the hub's repository that `datasets` read rows from; None where they are from elsewhere."""
    for split in rows.values() if isinstance(rows, dict) else []:
        for file in split.cache_files:
            name = Path(file["filename"]).parent.name  # datasets keeps what it read in a folder of that name
            if COMMIT.fullmatch(name):
                return name
    return None


def table(found: dict[str, Any]) -> str:
    """The harness's own table of results, in Markdown; a second one of groups where tasks have them."""
    from lm_eval.utils import make_table

    columns = ["results", *(["groups"] if found.get("groups") else [])]
    return "\n".join(make_table(found, column) for column in columns)


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
