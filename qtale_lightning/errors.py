"""The command line's last line of defence: a known kind of error ends in one paragraph, any other in its traceback.

Messages are plain text, whatever the values in them hold. The exit status is 2 where the input is at fault, 1 where
the machine is (disk, memory, network, a damaged file) or this program, and 130 where the user stopped it.
"""

import errno
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

INPUT, MACHINE = 2, 1

DEBUG = "--debug"
VARIABLE = "QTALE_TRACEBACK"  # what --debug sets, so that processes that a command starts do the same
HINT = f"({DEBUG} shows where it was raised)"

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
_NETWORK = {errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}


@dataclass(frozen=True)
class Explained:
    """An error in words, and the exit status that it ends in."""

    text: str
    status: int


def run(main: Callable[[list[str]], int | None], argv: Sequence[str]) -> int:
    """The exit status of a command line; errors are said on standard error.

    Args:
        main: Runs the arguments. What it notes on a KeyboardInterrupt is said behind "stopped".
        argv: ``--debug`` anywhere in them keeps tracebacks, for this process and those that it starts.
    """
    if DEBUG in argv:
        os.environ[VARIABLE] = "1"
    try:
        try:
            return main([argument for argument in argv if argument != DEBUG]) or 0
        finally:
            sys.stdout.flush()  # here, where a reader that has gone is known for what it is
    except KeyboardInterrupt as stopped:
        if os.environ.get(VARIABLE):
            raise
        say("; ".join(["stopped", *getattr(stopped, "__notes__", ())]))
        return 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return 128 + signal.SIGPIPE
        if os.environ.get(VARIABLE):
            raise
        explained = explain(error)
        if explained is None:
            traceback.print_exc()
            say(
                f"This is no known kind of error, so probably a fault of the suite: {_place(error)}. If the same "
                "command ends here again, report it with the lines above."
            )
            return MACHINE
        say(f"error: {explained.text}")
        say(HINT)
        return explained.status


def say(text: str) -> None:
    """A message for the user: plain text, and nothing in it that steers a terminal."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    print(shown, file=sys.stderr, flush=True)


def explain(error: BaseException) -> Explained | None:
    """A known kind of error in one paragraph; None of another kind.

    Libraries' classes are known by name, so that nothing is imported for it. What a caller has added by ``add_note``,
    such as the file that was read, comes first.
    """
    for kind in type(error).__mro__:
        if explainer := _KINDS.get(f"{kind.__module__}.{kind.__qualname__}"):
            explained = explainer(error)
            if explained is None:
                continue
            notes = " ".join(getattr(error, "__notes__", ()))
            return Explained(f"{notes}: {explained.text}" if notes else explained.text, explained.status)
    return None


def _given(error: BaseException) -> Explained:
    return Explained(str(error) or type(error).__name__, INPUT)


def _option(error: BaseException) -> Explained:
    """What a parser of options refuses."""
    text = re.sub(r'Parser key "([\w.]+)":', r"--\1:", str(error))
    return Explained(f"{_line(text)} (`--help` lists the options)", INPUT)


def _system(error: BaseException) -> Explained:
    """Errors of the system have a number; those without one are the suite's own, or a library's, in words."""
    assert isinstance(error, OSError)
    return _numbered(error.errno, error.filename, _line(str(error)), error.filename2) or Explained(
        str(error) or type(error).__name__, INPUT
    )


def _numbered(
    number: int | None, path: object = None, text: str = "", other: object = None
) -> Explained | None:
    """A failed call of the system; None without a number of one."""
    if number is None:
        return None
    paths = " → ".join(str(p) for p in (path, other) if p is not None)
    at = f"{paths}: " if paths else ""
    if number in _FULL:
        return Explained(
            f"{at}no space is left on the disk{_full_folders(path)}. What was written before is whole. Free some, or "
            "give a folder on another disk (--out; TMPDIR for temporary files, HF_HOME for downloads), then the same "
            "command again.",
            MACHINE,
        )
    if number in _FORBIDDEN:
        reason = os.strerror(number).lower()
        return Explained(
            f"{at}{reason}. Give a folder that you may write to (--out; TMPDIR, HF_HOME), or change its rights.",
            MACHINE,
        )
    if number in _ABSENT:
        return Explained(f"{at}{os.strerror(number).lower()}", INPUT)
    if number == errno.ENOMEM:
        return _memory_text(text)
    if number in _NETWORK or number < 0:  # below 0: a name that wasn't resolved
        return _network_text(text)
    return Explained(f"{at}{os.strerror(number).lower()}", MACHINE)


def _full_folders(path: object) -> str:
    """Which of the folders that are written to is (almost) full, where the error doesn't say."""
    if path is not None:
        return ""
    cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
    folders = {tempfile.gettempdir(), os.getcwd(), os.path.expanduser(cache)}
    full = [f for f in sorted(folders) if os.path.isdir(f) and shutil.disk_usage(f).free < 2**26]
    return f" (almost full: {', '.join(full)})" if full else ""


def _memory(error: BaseException) -> Explained:
    return _memory_text(_line(str(error)))


def _memory_text(text: str) -> Explained:
    asked = re.search(r"(?:allocate|allocated) ([\d.]+ (?:bytes|[KMGT]iB))", text)
    what = f" for {asked[1]}" if asked else ""
    return Explained(
        f"there isn't enough memory{what}. Lower --data.batch_size (and raise --trainer.accumulate_grad_batches as "
        "much, so that training stays the same), --data.max_length or --quantize.sequences, or take a smaller model; "
        "`plan` says what a run needs.",
        MACHINE,
    )


def _network(error: BaseException) -> Explained:
    return _network_text(_line(str(error)) or type(error).__name__)


def _network_text(text: str) -> Explained:
    return Explained(
        f"the network failed: {text}. Run the same command again: what was downloaded stays. Without a network, "
        "HF_HUB_OFFLINE=1 takes what is in the hub's cache, and --wandb offline keeps the log here.",
        MACHINE,
    )


def _reader(error: BaseException) -> Explained | None:
    """RuntimeErrors are many things; those of PyTorch's files and of its memory are known by their text."""
    text = _line(str(error))
    if "PytorchStreamReader" in text or "failed finding central directory" in text:
        return _damaged(error)
    if "PytorchStreamWriter" in text or "inline_container" in text:
        return Explained(
            f"a checkpoint could not be written{_full_folders(None)}: {text}. Is the disk full? The checkpoint before "
            "is whole, and the same command goes on from it.",
            MACHINE,
        )
    if "can't allocate memory" in text or "out of memory" in text.lower():
        return _memory_text(text)
    return None


def _damaged(error: BaseException) -> Explained:
    first = re.split(r"\. (?=[A-Z])|\n", str(error).strip())[0]
    return Explained(
        f"a file is damaged or was cut off while it was written ({first or type(error).__name__}). Remove it: the same "
        "command makes it again, or goes on from the state before.",
        MACHINE,
    )


def _safetensors(error: BaseException) -> Explained:
    """The library names the call that failed in its text alone."""
    text = _line(str(error))
    number = re.search(r"\(os error (\d+)\)", text)
    path = re.search(r'at path "([^"]+)"', text)
    told = _numbered(int(number[1]), path[1] if path else None, text) if number else None
    return told or _damaged(error)


def _unsafe(error: BaseException) -> Explained:
    return Explained(
        "a checkpoint holds more than tensors and plain values, or is none. It isn't read, since that can run code: "
        "give one that the suite has written.",
        INPUT,
    )


def _library(error: BaseException) -> Explained:
    return Explained(_line(str(error)) or type(error).__name__, INPUT)


def _hub(error: BaseException) -> Explained:
    return Explained(str(error), MACHINE if getattr(error, "of_the_machine", False) else INPUT)


def _wandb(error: BaseException) -> Explained:
    return Explained(
        f"W&B failed: {_line(str(error))}. --wandb offline keeps its records in the run's folder.", MACHINE
    )


# By full name, the most special class of an error first. The hub's clients come in two generations.
_KINDS: dict[str, Callable[[BaseException], Explained | None]] = {
    "argparse.ArgumentError": _option,
    "argparse.ArgumentTypeError": _option,
    "qtale_lightning.hub.errors.HubError": _hub,
    "qtale_lightning.manifest.DamagedFileError": _hub,
    "builtins.ValueError": _given,
    "builtins.OSError": _system,
    "builtins.MemoryError": _memory,
    "builtins.EOFError": _damaged,
    "builtins.RuntimeError": _reader,
    "torch.OutOfMemoryError": _memory,
    "_pickle.UnpicklingError": _unsafe,
    "zipfile.BadZipFile": _damaged,
    "zlib.error": _damaged,
    "safetensors._safetensors_rust.SafetensorError": _safetensors,
    "safetensors_rust.SafetensorError": _safetensors,
    "yaml.error.YAMLError": _library,
    "httpx.HTTPError": _network,
    "httpx2.HTTPError": _network,
    "requests.exceptions.RequestException": _network,
    "huggingface_hub.errors.HfHubHTTPError": _network,
    "huggingface_hub.errors.OfflineModeIsEnabled": _library,
    "huggingface_hub.errors.EntryNotFoundError": _library,
    "huggingface_hub.errors.RepositoryNotFoundError": _library,
    "huggingface_hub.errors.RevisionNotFoundError": _library,
    "datasets.exceptions.DatasetsError": _library,
    "lightning.fabric.utilities.exceptions.MisconfigurationException": _library,
    "wandb.errors.errors.Error": _wandb,
}


def _line(text: str) -> str:
    """A library's message as a part of a sentence."""
    return " ".join(text.split()).rstrip(".")


def _place(error: BaseException) -> str:
    """Where an error was raised, and by which line of the suite."""
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(__file__).parent)
    own = [frame for frame in frames if frame.filename.startswith(package)]
    raised, ours = frames[-1], own[-1] if own else frames[0]
    called = "" if raised is ours else f", called by {ours.filename}:{ours.lineno}"
    return f"{type(error).__name__} in {raised.filename}:{raised.lineno}{called}"


def _reader_has_gone() -> bool:
    """Whether nobody reads standard output any more, as behind ``| head``; nothing is written to it then."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else its last flush fails, too
    return gone
