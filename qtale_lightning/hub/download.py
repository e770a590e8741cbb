"""From a repository's name to a folder with its files at one commit."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_cached_repo_tree, get_session, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import enable_progress_bars

from qtale_lightning.compat.http import httpx
from qtale_lightning.hub.errors import SilenceError, explained, is_transient
from qtale_lightning.hub.patience import Bar, Patience, patience
from qtale_lightning.hub.repository import Repository

log = logging.getLogger(__name__)

# Seconds before another try of what the client itself doesn't try again.
_WAITS = (1.0, 3.0)

T = TypeVar("T")


@contextmanager
def asking(repository: Repository) -> Iterator[Patience]:
    """Within the block, requests to the hub have their limits, and its errors are one paragraph.

    Raises:
        HubError: See :func:`explained`.
    """
    with explained(repository), patience() as waiting:
        yield waiting


@cache
def resolve(repository: Repository) -> str:
    """The commit that a repository's revision stands for, asked once in a process.

    Where the hub can't be reached it is the one that the cache remembers, which is said.

    Raises:
        HubError: There is no such revision, or it can't be asked for.
    """
    if repository.pinned:
        return repository.revision
    with asking(repository) as waiting:
        found = _retried(
            lambda: HfApi().resolve_revision(
                repository.name, repo_type=repository.kind, revision=repository.revision
            )
        )
        if not waiting.answered and not constants.HF_HUB_OFFLINE:
            log.warning(
                "%s can't be reached: %s of %s is taken to be %s, as the cache remembers it",
                *(constants.ENDPOINT, repository.revision, repository.name, found.resolved),
            )
        return found.resolved


def reach() -> None:
    """Where the hub doesn't answer, this process asks it no more, and reads what is cached at once; which is said.

    For libraries that ask it on their own, and again and again.
    """
    from datasets import config  # here, since it takes a second

    if constants.HF_HUB_OFFLINE:
        return
    try:
        with patience():
            get_session().head(constants.ENDPOINT)
    except (httpx.TransportError, SilenceError) as error:
        log.warning("%s can't be reached (%s): only what is cached is read", constants.ENDPOINT, error)
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True


def snapshot(repository: Repository, files: Sequence[str]) -> Path:
    """Folder with a repository's files, downloaded where the cache hasn't them; then nothing is asked for.

    Args:
        repository: Its revision is a commit.
        files: Patterns of names, such as "*.json"; ``*`` stands for slashes, too.

    Raises:
        HubError: They can't be had.
    """
    if not repository.pinned:
        raise ValueError(f"{repository.name} at {repository.revision}: that isn't a commit")
    options: dict[str, Any] = {
        "repo_type": repository.kind,
        "revision": repository.revision,
        "allow_patterns": [*files],
    }
    with explained(repository), suppress(CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        # Without the list of its files there is no telling whether a copy is whole.
        get_cached_repo_tree(repository.name, repo_type=repository.kind, revision=repository.revision)
        return Path(snapshot_download(repository.name, **options, local_files_only=True))
    if not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        enable_progress_bars("huggingface_hub.snapshot_download")
    bar = type("Bar", (Bar,), {"title": f"downloading {repository.name}"})
    with asking(repository):
        return Path(
            _retried(lambda: snapshot_download(repository.name, **options, max_workers=4, tqdm_class=bar))
        )


def _retried(call: Callable[[], T]) -> T:
    failed: Exception | None = None
    for wait in (*_WAITS, None):
        try:
            return call()
        except SilenceError:
            if failed is not None:
                raise failed  # noqa: B904  # it says more, and its cause tells what happened
            raise
        except Exception as error:
            if wait is None or not is_transient(error):
                raise
            failed = error
            time.sleep(wait)
    raise AssertionError  # the last try returns or raises
