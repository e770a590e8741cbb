"""Rows of datasets on the hub."""

import io
from collections.abc import Sequence

import pytest
from datasets import Dataset

from qtale_lightning.hub.errors import HubError
from qtale_lightning.hub.repository import Repository
from qtale_lightning.hub.rows import read_dataset
from tests.hub.conftest import FIRST, SECOND, LoopbackHub

CARD = b"---\nconfigs:\n- config_name: first\n  data_files: [{split: train, path: first/train-*}]\n---\n"


def parquet(numbers: Sequence[int]) -> bytes:
    file = io.BytesIO()
    Dataset.from_dict({"number": [*numbers]}).to_parquet(file)
    return file.getvalue()


def repository(name: str, commit: str = FIRST) -> Repository:
    return Repository(name, "dataset", commit, "the rows of task 'sums'", "Or pass --data.root FOLDER.")


@pytest.fixture(autouse=True)
def published(hub: LoopbackHub) -> None:
    files = {
        f"{config}/{split}-00000-of-00001.parquet": parquet(range(start, start + 9))
        for config, start in (("first", 0), ("second", 100))
        for split in ("train", "dev")
    }
    hub.publish("team/sums", {"README.md": CARD, **files, "second/dev-00000-of-00001.parquet": parquet([7])})
    hub.publish("team/plain", {"train.jsonl": b'{"number": 1}\n{"number": 2}\n'})
    hub.publish("team/script", {"README.md": b"old", "script.py": b"raise SystemExit"})
    hub.publish("team/damaged", {"train.jsonl": b'{"number": 1}\n{"num'})


@pytest.mark.parametrize(
    ("name", "config", "split", "numbers"),
    [
        ("team/sums", "first", "train[:-7]", [0, 1]),
        ("team/sums", "second", "train[-2:]", [107, 108]),
        ("team/sums", "second", "dev", [7]),
        ("team/plain", None, "train", [1, 2]),
    ],
)
def test_a_split_of_a_configuration(
    hub: LoopbackHub, name: str, config: str | None, split: str, numbers: list[int]
) -> None:
    assert list(read_dataset(repository(name), config, split)["number"]) == numbers
    assert not [path for path in hub.requests if config == "second" and "/first/" in path]


def test_the_commit_that_is_asked_for_is_read_without_a_network(hub: LoopbackHub) -> None:
    """Where a newer one is in the cache, too."""
    read_dataset(repository("team/plain"), None, "train")
    hub.publish("team/plain", {"train.jsonl": b'{"number": 3}\n'}, SECOND)
    assert list(read_dataset(repository("team/plain", SECOND), None, "train")["number"]) == [3]
    hub.fault = lambda method, path: "hang"
    hub.requests.clear()
    assert list(read_dataset(repository("team/plain"), None, "train")["number"]) == [1, 2]
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "config", "split", "words"),
    [
        ("team/sums", "third", "train", "it has no configuration 'third'"),
        ("team/sums", "first", "test", "it has no split 'test' of 'first' (first/dev-"),
        ("team/plain", None, "test", "it has no split 'test' (train.jsonl)"),
        (
            "team/script",
            None,
            "train",
            "it is published as a loading script (script.py), and those aren't run",
        ),
        ("team/script", "plain", "train", "it is published as a loading script"),
        ("team/damaged", None, "train", "its files can't be read ("),
    ],
)
def test_what_isnt_there_is_told_apart(name: str, config: str | None, split: str, words: str) -> None:
    with pytest.raises(HubError) as refusal:
        read_dataset(repository(name), config, split)
    message = str(refusal.value)
    assert message.startswith(
        f"the rows of task 'sums' can't be had (dataset {name} of the Hugging Face hub, at aaaa"
    )
    assert words in message
    assert message.endswith("Or pass --data.root FOLDER.")
    assert "\n" not in message
