"""Values of options, as people write them on the command line and in YAML."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import PositiveInt

from qtale_lightning.commands import stages
from qtale_lightning.settings import ModelSettings
from qtale_lightning.values import (
    Floats,
    Names,
    NonNegative,
    Numbers,
    Positive,
    ShareBelowOne,
    UserPath,
    in_range,
    plain_numbers,
)


class Options:
    def __init__(
        self,
        bits: Numbers[int | float] = Numbers((4, 3)),  # noqa: B008
        thetas: Floats[float] = Floats((0.5,)),  # noqa: B008
        names: Names[str] = Names(("a",)),  # noqa: B008
        path: UserPath | None = None,
    ) -> None:
        pass


@pytest.fixture(params=["command line", "YAML"])
def parse(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Parses ``parse(bits="4")`` from either; returns the options and what is dumped of them."""
    monkeypatch.setenv("HOME", "/home/me")

    def run(**given: str) -> tuple[Any, dict[str, Any]]:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--config", action="config")
        parser.add_class_arguments(Options, "q")
        arguments = [f"--q.{name}={value}" for name, value in given.items()]
        if request.param == "YAML":
            (tmp_path / "c.yaml").write_text("\n".join(["q:", *(f"  {k}: {v}" for k, v in given.items())]))
            arguments = ["--config", str(tmp_path / "c.yaml")]
        parsed = parser.parse_args(arguments)
        return parsed.q, yaml.safe_load(parser.dump(parsed))["q"]

    return run


@pytest.mark.parametrize(
    ("written", "read"),
    [("4", [4]), ("[4, 3.5]", [4, 3.5]), ("4,3", [4, 3]), ("[]", []), ("1e-2", [0.01])],
)
def test_numbers_are_a_list_one_alone_or_joined_by_commas(
    parse: Callable[..., Any], written: str, read: list[float]
) -> None:
    options, dumped = parse(bits=written)
    assert list(options.bits) == dumped["bits"] == read


def test_whole_numbers_stay_whole_where_they_are_meant_to(parse: Callable[..., Any]) -> None:
    """Files are named by both."""
    options, dumped = parse(bits="[4, 3.5]", thetas="[1, 0, 0.3]")
    assert repr(list(options.bits)) == repr(dumped["bits"]) == "[4, 3.5]"
    assert repr(list(options.thetas)) == repr(dumped["thetas"]) == "[1.0, 0.0, 0.3]"


@pytest.mark.parametrize("written", ["four", "[4, four]", "true", "{a: 1}"])
def test_what_is_no_number_is_refused_in_words(parse: Callable[..., Any], written: str) -> None:
    with pytest.raises(ArgumentError, match=r"no number|give a list"):
        parse(bits=written)


@pytest.mark.parametrize(("written", "read"), [("a", ["a"]), ("[a, b]", ["a", "b"]), ("a,b", ["a", "b"])])
def test_names_likewise(parse: Callable[..., Any], written: str, read: list[str]) -> None:
    options, dumped = parse(names=written)
    assert list(options.names) == dumped["names"] == read


@pytest.mark.parametrize(
    ("written", "read"),
    [("~/runs", "/home/me/runs"), ("runs/~x", "runs/~x"), ("org/model", "org/model"), ("null", None)],
)
def test_a_home_folder_is_expanded(parse: Callable[..., Any], written: str, read: str | None) -> None:
    options, dumped = parse(path=written)
    assert options.path == dumped.get("path") == read


def declared(
    lr: Positive = 1.0,
    decay: NonNegative = 0.0,
    dropout: ShareBelowOne = 0.0,
    rank: PositiveInt | None = None,
) -> None:
    pass


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1])
@pytest.mark.parametrize("option", ["lr", "decay", "dropout"])
def test_ranges_have_no_number_that_is_none(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"--model.{option} (nan|-?inf|-0.1): must be "):
        in_range("model", declared, {option: value})


def test_ranges_know_their_bounds() -> None:
    in_range("", stages.evaluate, {"bits": 3.5, "theta": (0, 1)})
    in_range("model", declared, {"lr": 1e-9, "decay": 0, "dropout": 0, "rank": None})
    for option, value in (("lr", 0), ("dropout", 1), ("rank", 0), ("rank", 1.5)):
        with pytest.raises(ValueError, match=rf"--model.{option} {value}: "):
            in_range("model", declared, {option: value})


def test_what_was_parsed_is_plain() -> None:
    """What a checkpoint holds of other types isn't read again."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(declared, "model")
    parsed = plain_numbers(parser.parse_args(["--model.lr=0.1", "--model.rank=2"])).model
    assert [type(value) for value in (parsed.lr, parsed.rank)] == [float, int]
    assert yaml.safe_dump(parsed.as_dict())


def test_what_is_made_of_ranges_has_plain_numbers() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ModelSettings, "model")
    made = parser.instantiate(parser.parse_args(["--model.lr=0.1", "--model.router_width=16"])).model
    assert [type(value) for value in (made.lr, made.routing_options["router_width"])] == [float, int]
    with pytest.raises(ValueError, match=r"--model.lr 0: must be > 0"):
        ModelSettings(lr=0)
