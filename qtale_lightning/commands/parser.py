"""The parser of the command line: sub-commands declared by functions, and a run's options beside them."""

import inspect
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from qtale_lightning.commands.mistakes import corrected, meant
from qtale_lightning.options import (
    of_the_trainer,
    of_training,
    options_help,
    run_parser,
    with_files,
    without_lightnings,
)
from qtale_lightning.values import in_range, plain_numbers

PROG = "python -m qtale_lightning"

_VALUES = {"to": "FOLDER", "out": "FOLDER", "tasks": "TASK,…", "seeds": "SEED,…"}
"""What values are called in help, where it isn't their option's name."""

_HELP = {"-h", "--help"}
_ALL = (
    "Lightning's Trainer has more options: `fit --trainer.help` lists them. Callbacks, loggers, plugins, profilers\n"
    "and strategies are given by class path, as in any LightningCLI."
)
_OTHERS = "Options of a run override its configuration; `fit --help` lists all of them."


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's, which leaves the lines of a docstring as they are."""


@dataclass(frozen=True)
class Command:
    """A sub-command: a function whose parameters are its options, and whose docstring is its help.

    Parameters without a default are positional, or must be given where they are keyword-only; ``bool`` is a flag, and
    ``list[str] | None`` an option that may be given several times. The parameter ``options`` isn't one of them: it
    gets arguments as they were written.

    Attributes:
        example: Arguments, as its help shows them.
        options: Which of its arguments ``options`` gets: those of a run, wherever they stand, checked as far as they
            can be without Lightning; what stands behind ``--``; or all, for commands that programs call.
        shows: Which of the run's options its help shows, by their names.
        goes_on: Stopped and given again, it goes on where it was.
    """

    function: Callable[..., int | None]
    example: str
    options: Literal["the run's", "behind --", "all"] | None = None
    shows: Callable[[str], bool] | None = None
    goes_on: bool = False

    @cached_property
    def _docstring(self) -> docstring_parser.Docstring:
        return docstring_parser.parse(inspect.getdoc(self.function) or "")

    @property
    def summary(self) -> str:
        """What it does, in one line."""
        return (self._docstring.short_description or "").rstrip(".")

    def declare(self, parser: ArgumentParser) -> None:
        """Add its options, and what its help says besides."""
        types, usage = get_type_hints(self.function), [parser.prog]
        texts = {one.arg_name: one.description for one in self._docstring.params}
        for name, one in inspect.signature(self.function).parameters.items():
            if name == "options":
                continue
            kind, text = types[name], texts[name]
            required, shown = one.default is one.empty, _VALUES.get(name, name.upper())
            if kind is bool:
                parser.add_argument(f"--{name}", action="store_true", help=text)
            elif kind == list[str] | None:
                parser.add_argument(f"--{name}", type=str, action="append", metavar=shown, help=text)
            elif not required:
                parser.add_argument(f"--{name}", type=kind, default=one.default, metavar=shown, help=text)
            elif one.kind is one.KEYWORD_ONLY:
                parser.add_argument(f"--{name}", type=kind, required=True, metavar=shown, help=text)
                usage.append(f"--{name} {shown}")
            elif get_origin(kind) is list:
                shown = shown.removesuffix("S")
                parser.add_argument(name, type=get_args(kind)[0], nargs="+", metavar=shown, help=text)
                usage.append(f"{shown} …")
            else:
                parser.add_argument(name, type=kind, metavar=shown, help=text)
                usage.append(shown)
        parser.usage = " ".join([*usage, "[OPTIONS]"])
        parser.description = "\n\n".join(
            text
            for text in (self._docstring.short_description, self._docstring.long_description)
            if text is not None
        )
        parser.epilog = f"example:\n  {parser.prog} {self.example}"
        if self.options == "the run's":
            sections = [options_help(self.shows)] if self.shows else []
            more = _ALL if self.shows is of_training else _OTHERS
            parser.epilog = "\n\n".join([*sections, more, parser.epilog])


@dataclass(frozen=True)
class Group:
    """Sub-commands, of the command line or of one of its commands.

    Attributes:
        summary: What they do, in one line.
    """

    summary: str
    commands: Mapping[str, "Command | Group"]


def parse(argv: Sequence[str], group: Group) -> tuple[Command, Callable[[], int | None]]:
    """The command that is asked for, and what runs it.

    Raises:
        SystemExit: Help was asked for, and given.
        ArgumentError: The arguments aren't what the command takes; the message names them, and what to do.
        ValueError: There is no such command, or a configuration can't be read.
    """
    command, path = _find(argv, group)
    top = ArgumentParser(PROG, description=group.summary, exit_on_error=False, allow_abbrev=False)
    top.formatter_class = _Formatter
    own = _add(top, path, group)
    args = argv[len(path) :]
    if command is None or _HELP & {*args}:
        print(own.format_help())
        raise SystemExit(0)
    args, options = _divided(args, command, own)
    name = " ".join(path)
    if command.options == "the run's":
        _check(options, name, own)
    try:
        given = top.parse_args([*path, *args])
    except ArgumentError as error:
        raise corrected(error, name, own) from None
    for part in path:
        given = given[part]
    plain_numbers(given)
    named = {one: given[one] for one in inspect.signature(command.function).parameters if one in given}
    try:
        in_range("", command.function, named)
    except ValueError as error:
        raise ArgumentError(None, f"{name}: {error}") from None
    if command.options is not None:
        named["options"] = tuple(options)
    return command, partial(command.function, **named)


def _find(argv: Sequence[str], group: Group) -> tuple[Command | None, list[str]]:
    """The command, and the words that name it; none where help of a group of them is asked for."""
    path: list[str] = []
    for word in argv:
        if word in _HELP:
            return None, path
        if word not in group.commands:
            near, known = meant(word, group.commands), ", ".join(group.commands)
            what = f" ({group.summary})" if path else ""
            raise ValueError(
                f"there is no command {' '.join([*path, word])}{near}: choose one of {known}{what}"
            )
        path.append(word)
        found = group.commands[word]
        if isinstance(found, Command):
            return found, path
        group = found
    return None, path


def _add(parent: ArgumentParser, path: Sequence[str], group: Group) -> ArgumentParser:
    """Add a group's parsers. Returns that of the command that is asked for, the only one that gets its options."""
    chosen = parent
    parent.usage = f"{parent.prog} COMMAND …"
    choices = parent.add_subcommands(dest="command", title="commands", metavar="COMMAND")
    for name, command in group.commands.items():
        child = ArgumentParser(description=command.summary)
        choices.add_subcommand(name, child, help=command.summary)
        child.prog = f"{parent.prog} {name}"
        if [name] == path[:1] and isinstance(command, Group):
            chosen = _add(child, path[1:], command)
        elif [name] == path[:1] and isinstance(command, Command):
            command.declare(child)
            chosen = child
    return chosen


def _divided(args: Sequence[str], command: Command, own: ArgumentParser) -> tuple[list[str], list[str]]:
    """A command's own arguments, and its `options`. Every option but a flag has one value, joined by = or behind it."""
    if command.options == "all":
        return [], [*args]
    if command.options == "behind --":
        at = args.index("--") if "--" in args else len(args)
        return [*args[:at]], [*args[at + 1 :]]
    if command.options is None:
        return [*args], []
    valued = {option: action.nargs != 0 for action in own._actions for option in action.option_strings}
    ours: list[str] = []
    options: list[str] = []
    at = 0
    while at < len(args):
        name, joined, _ = args[at].partition("=")
        alone = joined or not name.startswith("-") or not valued.get(name, True)
        alone = alone or at + 1 == len(args) or args[at + 1].startswith("--")
        end = at + 1 if alone else at + 2
        (ours if name in valued or not name.startswith("-") else options).extend(args[at:end])
        at = end
    return ours, options


def _check(options: Sequence[str], command: str, own: ArgumentParser) -> None:
    """Refuse options that no run has, or whose values can't be, as far as it is known without Lightning."""
    if "--trainer.help" in options:
        print(options_help(of_the_trainer))
        raise SystemExit(0)
    parser = run_parser(f"{PROG} {command}")
    options = [
        option for option in options if not option.startswith("--print_config")
    ]  # for the command itself
    try:
        parser.parse_args(without_lightnings(with_files(options)))
    except ArgumentError as error:
        raise corrected(error, command, own, parser) from None
