"""YAML from outside: plain values up to a stated size, or a refusal that names the file and the line."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

# Configurations are a few kilobytes. Aliases that repeat one another make gigabytes of one.
MAX_BYTES = 2**20
MAX_VALUES = 100_000
MAX_DEPTH = 100

# libyaml's, where PyYAML was built with it: several times as fast, on texts that tables read again and again.
_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class RefusedYamlError(yaml.YAMLError, ValueError):
    """A text that isn't YAML, or YAML that isn't loaded; the message says where and why."""


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: dicts, lists and plain values.

    Raises:
        OSError: It can't be read.
        RefusedYamlError: It can't be loaded.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise RefusedYamlError(f"{path} has {size:,} bytes; a configuration has {MAX_BYTES:,} at most")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise RefusedYamlError(f"{path} isn't UTF-8: byte {error.start + 1} is {byte:#04x}") from None
    return load_yaml(text, str(path))


def load_yaml(text: str, name: str) -> Any:
    """What a YAML text holds.

    Args:
        text: One document.
        name: What messages call it.

    Raises:
        RefusedYamlError: It can't be loaded.
    """
    check_yaml(text, name)
    try:
        return plain_yaml(text)
    except (yaml.YAMLError, ValueError) as error:  # 2026-99-99 is a ValueError
        raise _not_yaml(name, error) from None


def plain_yaml(text: str) -> Any:
    """What a YAML text of our own holds, which needs no check.

    Raises:
        yaml.YAMLError: It isn't YAML, or asks for objects.
    """
    return yaml.load(text, _LOADER)


def check_yaml(text: str, name: str) -> None:
    """Refuses a YAML text by its events, before anything is made of it.

    Raises:
        RefusedYamlError: It isn't YAML, asks for objects, is nested too deeply, or stands for too much.
    """
    try:
        for event, depth, values in _measured(yaml.parse(text, Loader=_LOADER)):
            problem = None
            tag = getattr(event, "tag", None)
            if tag not in (None, "!") and tag not in yaml.SafeLoader.yaml_constructors:
                shown = tag.replace("tag:yaml.org,2002:", "!!")
                problem = f"{shown} asks for an object to be made, which can run code: write a plain value"
            elif depth > MAX_DEPTH:
                problem = f"nested more than {MAX_DEPTH} deep"
            elif values > MAX_VALUES:
                problem = f"with its aliases (*name) written out, it has more than {MAX_VALUES:,} values"
            if problem:
                line = event.start_mark.line + 1 if event.start_mark else "?"
                raise RefusedYamlError(f"{name}:{line}: {problem}")
    except RefusedYamlError:
        raise
    except (yaml.YAMLError, UnicodeEncodeError) as error:
        raise _not_yaml(name, error) from None


def _measured(events: Iterable[yaml.Event]) -> Iterator[tuple[yaml.Event, int, float]]:
    """Every event with its depth, and how many values all before it stand for: an alias for all that it repeats."""
    sizes: dict[str | None, float] = {}  # by anchor
    open_: list[
        tuple[str | None, float]
    ] = []  # anchors of the collections around, and the values before each
    values = 0.0
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, values))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            sizes[anchor] = values - before + 1
        if isinstance(event, yaml.AliasEvent):
            around = any(anchor == event.anchor for anchor, _ in open_)
            values += (
                math.inf if around else sizes.get(event.anchor, 1)
            )  # an unknown one is refused on loading
        elif isinstance(event, yaml.NodeEvent):
            values += 1
        yield event, len(open_), values


def _not_yaml(name: str, error: Exception) -> RefusedYamlError:
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark is not None else ""
    said = (getattr(error, "context", None), getattr(error, "problem", None))
    reason = ", ".join(part for part in said if part) or " ".join(str(error).split())
    return RefusedYamlError(f"{name}{line}: not YAML ({reason})")
