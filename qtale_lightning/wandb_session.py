"""A run of Weights & Biases, best effort: nobody waits for it longer than is said here, nothing stops because of it.

W&B uploads by a process of its own (wandb-core). Either it or the server may refuse, hang or die at any time, and most
of W&B's calls then raise, or never return. So all of them are made on a thread of their own, in order: who logs goes on
at once, and who starts or ends a run waits for that thread for a stated time.
"""

import atexit
import logging
import os
import secrets
import shlex
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import psutil

from qtale_lightning.files import replacing
from qtale_lightning.settings import WandbMode

if TYPE_CHECKING:
    from wandb import Run

log = logging.getLogger(__name__)

T = TypeVar("T")

START = 30
"""Seconds that the server has to take a run; it is recorded offline then."""

UPLOAD = 20
"""Seconds that W&B waits for its server at the end of a run. What isn't uploaded by then stays on the disk."""

END = 50
"""Seconds that the end of a run takes at most, W&B's own process included."""

BACKLOG = 10_000
"""Calls that may wait for W&B; more than these are dropped."""


class Session:
    """A started run.

    Attributes:
        run_id: W&B's name for it.
        folder: Its record on the disk, which ``wandb sync`` takes.
    """

    def __init__(self, run: "Run", thread: "_Thread") -> None:
        self.run_id, self.folder = run.id, Path(run.settings.sync_dir)
        with suppress(ValueError):
            self.folder = self.folder.relative_to(Path.cwd())
        self._run, self._thread = run, thread
        self._warned: set[str] = set()
        self._lost = False
        atexit.register(self.finish, 1)  # of a process that fails on its way to the end

    @classmethod
    def start(cls, root: Path, mode: WandbMode, project: str) -> "Session | None":
        """A run named like a folder, recorded in its ``wandb``; None where W&B is disabled or can't be used at all.

        A run that doesn't start online is recorded offline. A folder keeps its W&B id, so that a resumed run goes on in
        the same place.
        """
        if mode == "disabled":  # the package isn't needed, and may be missing
            return None
        import wandb  # noqa: F401 (here, where it takes none of the server's time)

        thread = _Thread()
        try:
            for attempt in _attempts(thread, mode):
                try:
                    run = thread.submit(partial(_begin, root, attempt, project)).result(START + 15)
                except Exception as error:  # its failures have many types
                    log.warning("W&B can't be used %s: %s", attempt, _words(error))
                    _end_service(thread)
                    continue
                session = cls(run, thread)
                where = run.url if attempt == "online" else f"offline; to upload it: {session.upload}"
                log.info("W&B: %s", where)
                return session
        except BaseException:
            _end_service(thread)
            raise
        thread.stop()
        return None

    @property
    def upload(self) -> str:
        """The command that uploads the record."""
        return f"wandb sync {shlex.quote(str(self.folder))}"

    def do(self, what: str, call: "Callable[[Run], object]") -> None:
        """Asks W&B for something, soon; that it fails is said the first time.

        Args:
            what: What W&B is given, as a warning names it.
            call: Makes all that it passes on itself, and so costs the caller no time.
        """
        if self._lost:
            return
        if self._thread.waiting >= BACKLOG:
            self._warn("the backlog", f"{BACKLOG:,} calls wait for it; later ones are dropped")
            return
        self._thread.submit(lambda: self._attempt(what, call))

    def finish(self, exit_code: int = 0) -> None:
        """Ends the run and W&B's process, within END seconds; says how to upload what isn't by then."""
        atexit.unregister(self.finish)
        if self._thread.stopped:
            return
        ended = self._thread.submit(lambda: self._end(exit_code))
        try:
            wait([ended], END - 5)
        finally:
            if not ended.done():
                self._lost = True
                _end_service(self._thread)
            self._thread.stop()
        if self._lost or ended.exception() is not None:
            log.warning("W&B: not uploaded: %s", self.upload)

    def _attempt(self, what: str, call: "Callable[[Run], object]") -> None:
        if self._lost:
            return
        try:
            call(self._run)
        except Exception as error:  # its failures have many types
            self._warn(what, _words(error))
            if _service() is None:
                self._lost = True

    def _warn(self, what: str, reason: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning("W&B did not take %s: %s", what, reason)

    def _end(self, exit_code: int) -> None:
        import wandb

        try:
            if not self._lost:
                self._run.finish(exit_code)
        finally:
            wandb.teardown(exit_code)


def has_key() -> bool:
    """Whether W&B finds a key, without asking for one and without its server.

    ``wandb.login`` would ask the server for the name of the key's owner.

    Raises:
        wandb.errors.AuthenticationError: What it finds is no key.
    """
    import wandb
    from wandb.sdk.lib import wbauth

    _prepare()
    host = wandb.setup().settings.base_url
    found = wbauth.authenticate_session(host=host, source=__name__, prompt=False, update_session=False)
    return found is not None


def _attempts(thread: "_Thread", mode: WandbMode) -> list[Literal["online", "offline"]]:
    """What to try, one after the other."""
    if mode == "auto":
        try:
            mode = thread.submit(_automatic).result(START)
        except Exception as error:
            log.warning("W&B can't be used online: %s", _words(error))
            mode = "offline"
    if mode == "disabled":
        return []
    return ["online", "offline"] if mode == "online" else ["offline"]


def _automatic() -> WandbMode:
    """By W&B's own settings, such as WANDB_MODE, then by whether there is a key."""
    import wandb

    _prepare()
    match wandb.setup().settings.mode:
        case "disabled":
            return "disabled"
        case "offline" | "dryrun":
            return "offline"
        case _:
            return "online" if has_key() else "offline"


def _prepare() -> None:
    """Settings of the process, before anything reads them."""
    import wandb

    if _service() is None:  # one that another process has started isn't ours to end
        os.environ.pop("WANDB_SERVICE", None)
    # Reports about W&B itself are sent from an exit hook, which waits for the server once more.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    wandb.setup(wandb.Settings(show_info=False))


def _begin(root: Path, mode: Literal["online", "offline"], project: str) -> "Run":
    import wandb

    _prepare()
    identity = root / "wandb" / "run-id.txt"
    if not identity.is_file():
        with replacing(identity) as temporary:
            temporary.write_text(secrets.token_hex(4), encoding="utf-8")
    return wandb.init(
        project=project,
        dir=root,
        name=root.name,
        id=identity.read_text(encoding="utf-8").strip(),
        resume="allow" if mode == "online" else None,
        # The mode belongs here: W&B has read its environment by now.
        settings=wandb.Settings(
            mode=mode, silent=True, init_timeout=START, finish_timeout=UPLOAD, finish_timeout_raises=True
        ),
    )


class _Thread:
    """Calls, one after the other. It doesn't keep the process: a call that never returns is left behind."""

    def __init__(self) -> None:
        self.stopped = False
        self._calls = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]()
        threading.Thread(target=self._work, name=__name__, daemon=True).start()

    @property
    def waiting(self) -> int:
        return self._calls.qsize()

    def submit(self, call: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def stop(self) -> None:
        """Once all calls are made."""
        self.stopped = True
        self._calls.put(None)

    def _work(self) -> None:
        while asked := self._calls.get():
            future, call = asked
            try:
                future.set_result(call())
            except BaseException as error:  # W&B exits where its process did
                future.set_exception(error)


def _service() -> psutil.Process | None:
    """W&B's own process, if it lives."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() == "wandb-core" and child.status() != psutil.STATUS_ZOMBIE:
                return child
    return None


def _end_service(thread: _Thread) -> None:
    """Ends W&B's process by force, and with it every call that waits for it, also in its exit hooks."""
    import wandb

    if (service := _service()) is not None:
        threading.excepthook = _quiet
        with suppress(psutil.Error):
            for process in (service, *service.children(recursive=True)):
                process.kill()
    wait([thread.submit(wandb.teardown)], 5)


def _quiet(arguments: threading.ExceptHookArgs) -> None:
    """Threads of W&B's that miss its process have nothing to say to the user."""
    if not issubclass(arguments.exc_type, ConnectionError):
        threading.__excepthook__(arguments)


def _words(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or ("no answer" if isinstance(error, TimeoutError) else repr(error))
