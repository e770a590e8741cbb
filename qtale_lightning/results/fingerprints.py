"""Fingerprints: by what a result is known again. They say what made it, by content and by options.

A row of results, a file of predictions, a search and a row of `lm_eval.json` carry the `Fingerprint` of what made them,
a packed model and what an engine's search found the part of it that is theirs. Whoever would use one again computes
what it would carry if it were made now, and makes it again where that differs. What was kept before there were
fingerprints, or in another format, is readable, but never known again.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NotRequired

from typing_extensions import TypedDict

from qtale_lightning.digests import of

FORMAT = 2
"""Of what is made, measured and kept; with another one nothing is known again."""

LATER: Mapping[str, Any] = {"refit_routers": False}
"""What older folders don't say of their making, and what it was."""

WHENCE = ("root", "revisions", "limit_train", "limit_validation", "calibration_rows", "seed", "mix")
"""What of a protocol says where questions came from and how they were chosen; which they are, their digest says."""


class Fingerprint(TypedDict):
    """What made a result, θ apart; digests are SHA-256, in hexadecimal.

    Attributes:
        format: `FORMAT` of the code that made it; the first one isn't named.
        model: Of the weights and the configuration that were measured, as they lay on the disk.
        quantization: What these were made from, as their packed folder says it: the digest of the exported `model`,
            the engine with all its options, and the calibration sequences. None at 16 bits.
        questions: As they were encoded, with their choices and answers.
        protocol: How they were asked and measured.
    """

    format: NotRequired[int]
    model: str
    quantization: NotRequired[dict[str, Any] | None]
    questions: str
    protocol: str


def made(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a packed folder was made from, by its `quantization_config`: None at 16 bits, empty where it isn't said in
    this format."""
    if config is None:
        return None
    found = config.get("made_from") or {}
    return dict(found) if found.get("format") == FORMAT else {}


def differences(made_from: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Names of what something was made from otherwise than is asked."""
    said = {**LATER, **made_from}
    return [name for name, value in asked.items() if name not in said or said[name] != value]


def fingerprint(
    model: str, quantization: Mapping[str, Any] | None, questions: str, protocol: Mapping[str, Any]
) -> Fingerprint:
    """Of what is measured now: digest of the model, what `made` it, digest of the questions, and the protocol."""
    return {
        "format": FORMAT,
        "model": model,
        "quantization": None if quantization is None else dict(quantization),
        "questions": questions,
        "protocol": of(comparable(protocol)),
    }


def comparable(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What of a protocol must agree where rows of the same questions are compared."""
    return {key: value for key, value in protocol.items() if key not in WHENCE}


def asked(found: Fingerprint) -> tuple[int, str, str]:
    """What of a fingerprint two rows that are compared must share, whatever model answered."""
    return found.get("format", 1), found["questions"], found["protocol"]


def same_questions(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows of results answer the same questions, asked and measured alike.

    Of rows without a fingerprint their number and the protocol is all that is known.
    """
    one, two = row.get("fingerprint"), other.get("fingerprint")
    if one and two:
        return asked(one) == asked(two)
    return (row["examples"], comparable(row["protocol"])) == (
        other["examples"],
        comparable(other["protocol"]),
    )


def unidentified(rows: Iterable[Mapping[str, Any]]) -> int:
    """How many rows don't say what made them, or say it in a format of before."""
    return sum((row.get("fingerprint") or {}).get("format") != FORMAT for row in rows)
