"""Which of a command's arguments are its own, and which are a run's; what is said where they are neither."""

from argparse import ArgumentError
from functools import partial
from typing import Any

import pytest

from qtale_lightning.__main__ import main
from qtale_lightning.commands import COMMANDS
from qtale_lightning.commands.mistakes import meant, plain
from qtale_lightning.commands.parser import Command, Group, parse
from tests.tables.files import asked


def given(*argv: str) -> dict[str, Any]:
    """What a command's function is called with."""
    _, run = parse(argv, COMMANDS)
    assert isinstance(run, partial)
    return run.keywords


@pytest.mark.parametrize(
    "argv",
    [
        ("evaluate", "RUN", "--bits", "4", "--theta", "0.3", "--data.limit_validation", "8"),
        ("evaluate", "--data.limit_validation", "8", "--theta=0.3", "--bits=4", "RUN"),
        ("evaluate", "--bits", "4", "RUN", "--data.limit_validation", "8", "--theta", "[0.3]"),
    ],
    ids=" ".join,
)
def test_a_commands_own_options_stand_anywhere(argv: tuple[str, ...]) -> None:
    assert given(*argv) == {
        "run": "RUN",
        "bits": 4,
        "theta": (0.3,),
        "activation_bits": 16,
        "head_bits": 16,
        "noise": 0.0,
        "random_gates": 0.0,
        "random_ratio": None,
        "draw": 0,
        "bits_schedule": None,
        "options": ("--data.limit_validation", "8"),
    }


def test_numbers_are_read_as_they_are_meant() -> None:
    assert [type(given("evaluate", "RUN", f"--bits={bits}")["bits"]) for bits in ("4", "3.5")] == [int, float]
    assert given("evaluate", "RUN", "--theta", "0.3,0")["theta"] == (0.3, 0)
    assert asked("table", ["csqa", "--model=tiny", "--seeds", "1,0,1"]).request.seeds == (1, 0)
    assert given("lm-eval", "RUN", "--batch_size", "auto:4")["batch_size"] == "auto:4"
    assert given("inspect", "RUN", "--text", "a, b", "--text", "[c")["text"] == ["a, b", "[c"]
    assert given("compare", "a", "b", "--to", "c") == {"runs": ["a", "b"], "to": "c"}


def test_a_flag_has_no_value() -> None:
    asked = given("table", "--plan", "csqa", "--model", "tiny", "--data.root", "rows")
    assert (asked["name"], asked["plan"], asked["options"]) == ("csqa", True, ("--data.root", "rows"))


def test_what_lightning_alone_understands_is_passed_on() -> None:
    more = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/loss", "--print_config")
    assert given("fit", *more, "--model.lr", "0.1")["options"] == (*more, "--model.lr", "0.1")


def test_what_stands_behind_two_dashes_is_for_every_run() -> None:
    asked = given("sweep", "start", "f.yaml", "--local", "--count", "2", "--", "--count", "3")
    assert (asked["file"], asked["local"], asked["count"], asked["options"]) == (
        "f.yaml",
        True,
        2,
        ("--count", "3"),
    )


def test_agents_arguments_are_passed_as_they_are() -> None:
    argv = ("--to=x", "fit", "--config=f", "--", "--a=1")
    assert given("sweep", "trial", *argv) == {"options": argv}


def test_a_configuration_is_printed(options: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", *options(), "--model.lr", "0.125", "--print_config"])
    assert end.value.code in (0, None)
    assert "lr: 0.125" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["evaluate", "RUN", "--quantize.bits", "--bits", "4"], "--quantize.bits: expected one argument"),
        (["evaluate", "RUN", "--bits"], "--bits: expected one argument"),
        (["evaluate", "RUN", "more"], "'more' is one argument too many"),
        (["evaluate", "RUN", "--theta", "0.5,nan"], "--theta nan: must be >= 0 and <= 1"),
        (["table", "csqa", "--model=tiny", "--seeds=0,1.5"], "--seeds 1.5: 1.5 not an integer"),
        (["fit", "--model.lr", "-1"], "fit: --model.lr -1: must be > 0 and < infinity"),
        (["fit", "--model.lora_rank", "2.5"], "--model.lora_rank 2.5: "),
        (
            ["fit", "--trainer.precision", "bf16-mixd"],
            "fit: --trainer.precision bf16-mixd: choose one of transformer-engine, transformer-engine-float16, "
            "16-true, 16-mixed, bf16-true, bf16-mixed, 32-true, 64-true, 64, 32, 16, bf16",
        ),
        (
            ["plan", "--trainer.deterministic", "wran"],
            "plan: --trainer.deterministic wran: expected bool, or choose one of 'warn'",
        ),
        (["report", "RUN", "--data.root", "x"], "there is no option --data.root"),
        (["sweep", "start", "f.yaml", "--count", "0"], "sweep start: --count 0: must be > 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_said_with_its_option(argv: list[str], says: str) -> None:
    with pytest.raises(ArgumentError) as refused:
        parse(argv, COMMANDS)
    assert says in str(refused.value)


def test_what_is_near_was_probably_meant() -> None:
    assert meant("--thet", ["--theta", "--bits"]) == "; did you mean --theta?"
    assert meant("--thet", ["--bits"]) == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Parser key \"a.b\":\n  Expected a <class 'float'>. Got value: x", "--a.b x: expected float"),
        (
            'Parser key "a":\n  Not of type Positive: 0.0 does not conform to restriction v>0 and v<inf',
            "--a 0.0: must be > 0 and < infinity",
        ),
        ('Parser key "a":\n  something else', "--a: something else"),
        (
            'Parser key "a":\n  Does not validate against any of the Union subtypes\nSubtypes: [list]\nErrors:\n'
            "  - Expected a dot import path string: foo\n  - Expected a <class 'NoneType'>\n"
            "Given value type: <class 'str'>\nGiven value: foo",
            "--a foo: expected a class path, such as package.Class",
        ),
        ("argument --a: expected one argument", "--a: expected one argument"),
    ],
)
def test_a_librarys_message_in_plain_words(text: str, said: str) -> None:
    assert plain(text) == said


def everyone(group: Group = COMMANDS) -> list[Command]:
    return [
        one
        for command in group.commands.values()
        for one in (everyone(command) if isinstance(command, Group) else [command])
    ]


@pytest.mark.parametrize("command", everyone(), ids=lambda command: command.function.__name__)
def test_an_example_is_what_its_command_takes(command: Command) -> None:
    name = next(
        [*path, name]
        for path, group in (([], COMMANDS), (["sweep"], COMMANDS.commands["sweep"]))
        for name, one in group.commands.items()  # type: ignore[union-attr]
        if one is command
    )
    assert parse([*name, *command.example.split()], COMMANDS)[0] is command
