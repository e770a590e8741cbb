"""Files of the hub: at one commit, once, and in bounded time."""

import logging
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from qtale_lightning.hub import patience
from qtale_lightning.hub.download import resolve, snapshot
from qtale_lightning.hub.errors import HubError
from qtale_lightning.hub.repository import Repository
from tests.hub.conftest import FIRST, SECOND, LoopbackHub

FILES = {"config.json": b"{}", "weights.bin": bytes(range(256)) * 4000, "other.txt": b"not wanted"}
WANTED = ("*.json", "*.bin")


def repository(revision: str = FIRST, name: str = "someone/thing") -> Repository:
    return Repository(name, "model", revision, "the model 'thing'", "Or give a folder.", "--model.revision")


@pytest.fixture(autouse=True)
def published(hub: LoopbackHub) -> None:
    hub.publish("someone/thing", FILES)


def test_what_is_wanted_is_downloaded_once(hub: LoopbackHub) -> None:
    folder = snapshot(repository(), WANTED)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        name: FILES[name] for name in ("config.json", "weights.bin")
    }
    hub.requests.clear()
    assert snapshot(repository(), WANTED) == folder
    assert hub.requests == []


def test_a_branch_is_looked_up_once_and_a_commit_never(hub: LoopbackHub) -> None:
    assert resolve(repository(SECOND)) == SECOND
    assert hub.requests == []
    assert [resolve(repository("main")) for _ in range(2)] == [FIRST, FIRST]
    assert len(hub.requests) == 1


def test_a_commit_is_read_although_a_newer_one_is_in_the_cache(hub: LoopbackHub) -> None:
    old = snapshot(repository(FIRST), WANTED)
    hub.publish("someone/thing", {"config.json": b"new", "weights.bin": b"new"}, SECOND)
    new = snapshot(repository(resolve(repository("main"))), WANTED)
    hub.fault = lambda method, path: "hang"
    assert (new / "config.json").read_bytes() == b"new"
    assert snapshot(repository(FIRST), WANTED) == old
    assert (old / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize("fault", ["drop", 503])
def test_what_passes_is_tried_again(hub: LoopbackHub, fault: int | str) -> None:
    """A dropped download goes on where it broke off."""
    left = iter([fault, fault])
    hub.fault = lambda method, path: next(left, None) if path.endswith("weights.bin") else None
    folder = snapshot(repository(), WANTED)
    assert (folder / "weights.bin").read_bytes() == FILES["weights.bin"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["/api/", "/resolve/", "weights.bin"])
def test_a_hub_that_never_answers_ends_in_a_message(
    hub: LoopbackHub, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fault = lambda method, path: "hang" if where in path else None
    caplog.set_level(logging.INFO, "qtale_lightning")
    started = time.monotonic()
    with pytest.raises(HubError, match=r"sent nothing for .* seconds.*Run the same command again") as refusal:
        snapshot(repository(), WANTED)
    assert time.monotonic() - started < 5
    assert refusal.value.of_the_machine
    assert "\n" not in str(refusal.value)
    assert [record for record in caplog.records if "waiting for" in record.message]


@pytest.mark.slow
def test_a_download_that_stalls_ends_in_a_message_and_is_kept(hub: LoopbackHub) -> None:
    """Each try is answered, but brings nothing: an answer alone is no progress."""
    body = FILES["weights.bin"]
    hub.fault = lambda method, path: "hang" if path.endswith("weights.bin") and method == "GET" else None
    with pytest.raises(HubError, match="what was downloaded is kept"):
        snapshot(repository(), WANTED)
    hub.fault = lambda method, path: None
    hub.requests.clear()
    assert (snapshot(repository(), WANTED) / "weights.bin").read_bytes() == body
    assert not [request for request in hub.requests if "config.json" in request]


def test_with_the_hub_down_a_branch_is_what_the_cache_remembers(
    hub: LoopbackHub, caplog: pytest.LogCaptureFixture
) -> None:
    resolve(repository("main"))
    resolve.cache_clear()
    hub.fault = lambda method, path: "hang"
    assert resolve(repository("main")) == FIRST
    assert f"main of someone/thing is taken to be {FIRST}" in caplog.text


def test_with_the_hub_down_and_nothing_cached_it_says_so(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(patience, "LIMIT", 5.0)
    for ask in (lambda: resolve(repository("main")), lambda: snapshot(repository(), WANTED)):
        with pytest.raises(HubError, match=r"127.0.0.1:9 can't be reached .*Check the network") as refusal:
            ask()
        assert "\n" not in str(refusal.value)


def test_what_is_cached_needs_no_network(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = snapshot(repository(), WANTED)
    resolve(repository("main"))
    resolve.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (snapshot(repository(), WANTED), resolve(repository("main"))) == (folder, FIRST)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set.*hf download someone/thing --revision aaaa"):
        snapshot(repository(), ("*.txt",))


def test_a_full_disk_is_named(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qtale_lightning.hub.download.snapshot_download", full)
    with pytest.raises(HubError, match=r"no space is left for the hub's cache, .*HF_HOME"):
        snapshot(repository(), WANTED)


REFUSALS = {
    "gated, a stranger": (
        "",
        "someone/gated",
        FIRST,
        ["is gated, and you aren't logged in", "hf auth login"],
    ),
    "gated, not on the list": ("other", "someone/gated", FIRST, ["has no access to it", "Ask for access on"]),
    "a bad token": ("bad", "someone/gated", FIRST, ["the hub refuses your token", "hf auth login"]),
    "no repository, a stranger": (
        "",
        "no/such",
        FIRST,
        ["no public repository of that name", "hf auth login"],
    ),
    "no repository": (
        "other",
        "no/such",
        FIRST,
        ["no repository of that name, or your account can't see it"],
    ),
    "no commit": ("", "someone/thing", SECOND, [f"no revision '{SECOND}' (--model.revision)"]),
    "no name": ("", "a b/c", FIRST, ["that is no name of a repository"]),
}


@pytest.mark.parametrize(("token", "name", "commit", "words"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_told_apart(
    hub: LoopbackHub,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    name: str,
    commit: str,
    words: list[str],
) -> None:
    hub.publish("someone/gated", FILES)
    hub.gated.add("someone/gated")
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError) as refusal:
        snapshot(repository(commit, name), WANTED)
    message = str(refusal.value)
    assert message.startswith(
        f"the model 'thing' can't be had (model {name} of the Hugging Face hub, at {commit}"
    )
    assert message.endswith("Or give a folder.")
    assert not refusal.value.of_the_machine
    assert "\n" not in message
    for part in words:
        assert part in message


def test_an_unknown_branch(hub: LoopbackHub) -> None:
    with pytest.raises(HubError, match=r"no revision 'nowhere' \(--model.revision\)"):
        resolve(repository("nowhere"))


def test_whoever_has_access_gets_the_files(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("someone/thing")
    monkeypatch.setenv("HF_TOKEN", "granted")
    assert (snapshot(repository(), WANTED) / "config.json").is_file()


def test_warnings_of_the_client_appear_once() -> None:
    resolve(repository("main"))
    logger = logging.getLogger("huggingface_hub")
    handler = logger.handlers[0]  # its own; pytest adds others
    passed = [
        bool(handler.filter(logger.makeRecord(logger.name, logging.WARNING, "", 0, text, (), None)))
        for text in ("take care", "take care", "Retrying in 1s [Retry 1/5].")
    ]
    assert passed == [True, False, False]
    assert not logger.propagate
