"""What goes wrong with the hub, told apart, and each told in one paragraph that says what to do."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from qtale_lightning.compat.http import httpx
from qtale_lightning.hub.repository import Repository

AGAIN = "Run the same command again: what was downloaded is kept."


class HubError(ConnectionError):
    """Something can't be had from the hub; the message says why, and what to do.

    Attributes:
        of_the_machine: Whether the network or the disk is at fault, not what was asked for.
    """

    def __init__(self, message: str, of_the_machine: bool = False) -> None:
        super().__init__(message)
        self.of_the_machine = of_the_machine


class SilenceError(Exception):
    """The hub was asked for long and sent nothing. (No error that its client would try again after.)"""


@contextmanager
def explained(repository: Repository) -> Iterator[None]:
    """Turn the many errors of the hub's clients into a `HubError`.

    Raises:
        HubError: Instead of any of them; what isn't one of them passes.
    """
    try:
        yield
    except HubError:
        raise
    except (httpx.HTTPError, HFValidationError, OSError, RevisionResolutionError, SilenceError) as error:
        message = paragraph(repository, *reason_of(repository, error))
        raise HubError(message, is_of_the_machine(error)) from error


def paragraph(repository: Repository, reason: str, mend: str) -> str:
    """What is wrong, with what, and what to do."""
    what = f"{repository.kind} {repository.name} of the Hugging Face hub, at {repository.revision}"
    sentences = (f"{repository.wanted} can't be had ({what}): {reason}.", mend, repository.otherwise)
    return " ".join(sentence for sentence in sentences if sentence)


def is_of_the_network(error: BaseException) -> bool:
    """Whether it is an answer of the hub, or says that there was none."""
    return isinstance(error, httpx.TransportError | HfHubHTTPError | OfflineModeIsEnabled | SilenceError)


def root(error: BaseException) -> BaseException:
    """The error of a chain that says what happened on the network; the error itself where nothing did."""
    cause: BaseException | None = error
    while cause is not None and not is_of_the_network(cause):
        cause = cause.__cause__
    return cause or error


def is_of_the_machine(error: BaseException) -> bool:
    """Whether the network, the hub or the disk is at fault."""
    cause = root(error)
    full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or is_transient(cause) or isinstance(cause, httpx.TransportError | SilenceError)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later; what can't be reached at all isn't asked again."""
    cause = root(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code == 408 or cause.response.status_code >= 500
    broken_off = isinstance(cause, OSError) and "Consistency check failed" in str(cause)
    return broken_off or (
        isinstance(cause, httpx.TransportError)
        and not isinstance(cause, httpx.ConnectError | httpx.ProxyError)
    )


def reason_of(repository: Repository, error: BaseException) -> tuple[str, str]:
    """(the reason in words, what to do about it)."""
    cause = root(error)
    if isinstance(cause, HfHubHTTPError):
        return _answered(repository, cause)
    if isinstance(cause, OfflineModeIsEnabled) or (
        isinstance(cause, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
    ):
        cache = f"it isn't in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set"
        return cache, "Unset it, or download what is missing where there is a network: " + _by_hand(
            repository
        )
    if isinstance(cause, SilenceError):
        return str(cause), AGAIN
    if isinstance(cause, httpx.ProxyError):
        return f"the proxy refuses ({first_line(cause)})", "Check HTTPS_PROXY and NO_PROXY."
    if isinstance(cause, httpx.ConnectError):
        reason = f"{constants.ENDPOINT} can't be reached ({first_line(cause)})"
        return reason, f"Check the network (and HF_ENDPOINT, if you set it). {AGAIN}"
    if isinstance(cause, httpx.TimeoutException):
        return f"{constants.ENDPOINT} didn't answer in time ({type(cause).__name__})", AGAIN
    if isinstance(cause, httpx.TransportError) or "Consistency check failed" in str(cause):
        name = type(cause).__name__
        return f"the connection to {constants.ENDPOINT} broke off ({name}: {first_line(cause)})", AGAIN
    if isinstance(cause, HFValidationError):
        return "that is no name of a repository (owner/name)", ""
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = f"no space is left for the hub's cache, {constants.HF_HUB_CACHE}"
        return reason, f"Make room, or set HF_HOME to a folder on another disk. {AGAIN}"
    return first_line(cause), ""


def _answered(repository: Repository, error: HfHubHTTPError) -> tuple[str, str]:
    status, where = error.response.status_code, page(repository)
    login = "log in with `hf auth login` (or set HF_TOKEN)"
    if isinstance(error, GatedRepoError):
        if status == 401:
            reason = "it is gated, and you aren't logged in"
            return reason, f"Accept its licence on {where}, {login}, and run the same command again."
        reason = "it is gated, and the account that you are logged in with has no access to it"
        return (
            reason,
            f"Ask for access on {where} with this account, and run the same command again once it is given.",
        )
    if isinstance(error, RevisionNotFoundError):
        option = f" ({repository.option})" if repository.option else ""
        return f"it has no revision {repository.revision!r}{option}", f"{where}/tree/main shows those it has."
    if isinstance(error, RepositoryNotFoundError):
        if get_token() is None:
            return "there is no public repository of that name", f"If it is a private one, {login}."
        return "there is no repository of that name, or your account can't see it", f"Look at {where}."
    if status == 401:
        return "the hub refuses your token", f"Please {login} again."
    if status == 429:
        return (
            "the hub has had too many requests from here (429)",
            f"Wait some minutes, or {login}. {AGAIN}",
        )
    if status >= 500:
        return f"{constants.ENDPOINT} has trouble of its own ({status})", f"That passes. {AGAIN}"
    message = error.server_message or first_line(error)
    return f"{constants.ENDPOINT} answered {status} ({message})", f"Look at {where}."


def page(repository: Repository) -> str:
    """A repository's address in a browser."""
    return f"{constants.ENDPOINT}/{'datasets/' if repository.kind == 'dataset' else ''}{repository.name}"


def _by_hand(repository: Repository) -> str:
    kind = " --repo-type dataset" if repository.kind == "dataset" else ""
    return f"`hf download {repository.name}{kind} --revision {repository.revision}`."


def first_line(error: BaseException) -> str:
    """Of an error's text, without the punctuation at its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"[.: ]+$", "", lines[0]) if lines else type(error).__name__
