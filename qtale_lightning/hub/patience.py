"""How long the hub may be silent: a limit for each request, one for all retries, and what is said meanwhile."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import tqdm
from huggingface_hub.utils._http import default_client_factory

from qtale_lightning.compat.http import httpx
from qtale_lightning.hub.errors import SilenceError

log = logging.getLogger(__name__)

REQUEST = 10.0
"""Seconds that one request may bring nothing."""

LIMIT = 45.0
"""Seconds without anything after which no further request is made; the last one may then still take `REQUEST`."""

SAID = 5.0
"""Seconds after which a wait is said."""

LINES = 30.0
"""Seconds between two lines of a download where there is no terminal."""


class Patience:
    """What is known of the present wait."""

    def __init__(self) -> None:
        self.answered = False
        self._moved = time.monotonic()
        self._said = False
        self._trouble = ""

    @property
    def silent(self) -> float:
        """Seconds since something came."""
        return time.monotonic() - self._moved

    def progress(self) -> None:
        """Something came."""
        self._moved, self._said = time.monotonic(), False

    def request(self) -> None:
        """A request is about to be made.

        Raises:
            SilenceError: It would be one too many.
        """
        if self.silent > LIMIT:
            what = self._trouble or "sent nothing"
            raise SilenceError(f"{constants.ENDPOINT} {what} for {self.silent:.0f} seconds")

    def response(self, status: int, body: bool) -> None:
        """A request was answered; if with a file's ``body``, its bytes are still to come."""
        if status >= 500:
            self._trouble = f"had trouble of its own ({status})"
            return
        self.answered = True
        if not body:
            self.progress()

    def say(self) -> None:
        """Tell the user of a wait, once."""
        if self.silent > SAID and not self._said:
            self._said = True
            log.info("waiting for %s, for %.0f seconds at most …", constants.ENDPOINT, LIMIT + REQUEST)


_present: Patience | None = None


@contextmanager
def patience() -> Iterator[Patience]:
    """Within the block, requests to the hub end when nothing comes for `LIMIT` seconds, and waits are said."""
    global _present
    _install()
    outer, _present = _present, (mine := Patience())
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAID / 5):
            mine.say()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield mine
    finally:
        done.set()
        watcher.join()
        _present = outer


def _limit(request: httpx.Request) -> None:
    limits = request.extensions.get("timeout", {})
    kinds = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {kind: min(limits.get(kind) or REQUEST, REQUEST) for kind in kinds}
    if _present is not None:
        _present.request()


def _note(response: httpx.Response) -> None:
    if _present is not None:
        path = response.request.url.path
        about = path.startswith("/api/") and not path.startswith("/api/resolve-cache/")
        _present.response(response.status_code, body=response.request.method == "GET" and not about)


def _client() -> httpx.Client:
    client = default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = {"request": [*hooks["request"], _limit], "response": [*hooks["response"], _note]}
    return client


@cache
def _install() -> None:
    """For all of the process: the client's own default is no limit at all.

    Files come by plain HTTP, which goes on where a download broke off and ends when nothing comes; Xet's client does
    neither.
    """
    set_client_factory(_client)
    constants.HF_HUB_DISABLE_XET = True
    constants.DOWNLOAD_CHUNK_SIZE = 128 * 1024  # of 10 MB, a slow line would seem to bring nothing
    logger = logging.getLogger("huggingface_hub")
    logger.propagate = False  # it has a handler of its own, so that every warning would be shown twice
    for handler in logger.handlers:
        handler.addFilter(_Once())


class _Once(logging.Filter):
    """Lets a warning of the hub's client pass once, and none that says what we say ourselves."""

    OURS = (
        "thrown while requesting",
        "Retrying in",
        "Trying to resume download",
        "Max retries exceeded",
        "Could not reach the Hub",
    )

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message in self._seen or any(part in message for part in self.OURS):
            return False
        self._seen.add(message)
        return True


class Bar(tqdm):
    """Bytes that have come: a bar on a terminal, elsewhere a line now and then."""

    title = ""

    def __init__(self, *args: Any, **options: Any) -> None:
        # The hub's client counts bytes twice and files besides; one bar is enough.
        self._shown = options.get("unit") == "B" and not str(options.get("name")).endswith(".transfer")
        options |= {"desc": self.title, "bar_format": None}
        super().__init__(*args, **(options if self._shown else {**options, "disable": True}))
        self._bytes, self._line = 0.0, time.monotonic()

    def update(self, n: float | None = 1) -> bool | None:
        """Bytes came."""
        if _present is not None and n:
            _present.progress()
        self._bytes += n or 0
        if self._shown and not sys.stderr.isatty() and time.monotonic() - self._line > LINES:
            self._line = time.monotonic()
            log.info("%s: %.1f of %.1f MB", self.title, self._bytes / 1e6, (self.total or 0) / 1e6)
        return super().update(n)

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        """That it is done, is all that the client says; the title stays."""
        self.close()

    set_description_str = set_description
