"""What a parser refuses, in words for the user: the option, the value, what is allowed, and what was probably meant."""

import re
from argparse import ArgumentError, ArgumentParser
from collections.abc import Iterable
from difflib import get_close_matches

from qtale_lightning.values import range_in_words


def corrected(
    error: ArgumentError, command: str, own: ArgumentParser, *others: ArgumentParser
) -> ArgumentError:
    """A parser's refusal in plainer words.

    Args:
        error: Of jsonargparse.
        command: The sub-command's name.
        own: Its parser.
        others: Those whose options it takes besides.
    """
    text = re.sub(
        r"Group '([\w.]+)' does not accept option '(\w+)'", r"unrecognized arguments: --\1.\2", str(error)
    )
    if found := re.search(r"unrecognized arguments: (.*)", text, flags=re.DOTALL):
        known = [name for parser in (own, *others) for one in parser._actions for name in one.option_strings]
        text = _unknown(found[1].split(), known)
    elif found := re.search(r"the following arguments are required: (.*)", text):
        missing = {name.rpartition(".")[2] for name in found[1].split(", ")}
        names = [(one.option_strings or [str(one.metavar)])[0] for one in own._actions if one.dest in missing]
        text = f"required: {', '.join(names)}. Usage: {own.usage}"
    return ArgumentError(None, f"{command}: {plain(text)}")


def meant(given: str, known: Iterable[str]) -> str:
    """A question for what was probably meant; empty where nothing is near."""
    near = get_close_matches(given, list(known), n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def plain(text: str) -> str:
    """A message of jsonargparse: its option, value and reasons, without what only its programmer needs."""
    text = re.sub(r"^Call to compute_fn of link .* failed: ", "", text)
    text = re.sub(r"^argument (-[\w.-]+): ", r"\1: ", text)
    parts = re.match(r'Parser key "([\w.]+)":\s*(.*)', text, flags=re.DOTALL)
    if not parts:
        return text
    option, said = f"--{parts[1]}", parts[2]
    if union := re.match(r".*Errors:(.*?)\s+Given value type:.*?Given value: (.*)", said, flags=re.DOTALL):
        reasons = [_reason(line) for line in re.split(r"\n\s*- ", union[1]) if line.strip()]
        kept = dict.fromkeys(reason for reason in reasons if "NoneType" not in reason)
        return f"{option} {union[2]}: {', or '.join(kept)}"
    if found := re.match(r"(.*)\. Got value: (.*)", said, flags=re.DOTALL):
        return f"{option} {found[2]}: {_reason(found[1])}"
    if found := re.match(r"Not of type \w+: (\S+) (does not conform.*)", said):
        return f"{option} {found[1]}: {_reason(found[2])}"
    if found := re.match(r"Not of type \w+: (.*): '(.*)'", said):
        return f"{option} {found[2]}: {_reason(found[1])}"
    return f"{option}: {_reason(said)}"


def _reason(text: str) -> str:
    """One of the reasons that a value was refused for."""
    text = re.sub(r"^Not of type \w+: ", "", text.strip())
    text = re.sub(
        r"^Expected a dot import path string: .*", "expected a class path, such as package.Class", text
    )
    text = re.sub(r"^Expected a path but \S+ either not accessible or invalid", "no such file", text)
    text = re.sub(r"^Expected an? <class '(?:\w+\.)*(\w+)'>", r"expected \1", text)
    text = re.sub(r"^Expected a typing\.Literal\[(.*)\]", r"choose one of \1", text)
    text = re.sub(
        r"^invalid literal for int\(\).*|^int\(\) argument must be .*", "expected a whole number", text
    )
    text = re.sub(
        r"^could not convert string to float.*|^float\(\) argument must be .*", "expected a number", text
    )
    return range_in_words(text)


def _unknown(given: list[str], known: list[str]) -> str:
    first = next((word for word in given if word.startswith("-")), given[0])
    name = first.partition("=")[0]
    if not name.startswith("-"):
        return f"{name!r} is one argument too many: a list is written as 0.3,0.2 or [0.3,0.2]"
    return f"there is no option {name}{meant(name, known)}"
