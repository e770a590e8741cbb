"""Choosing an engine's settings: one after the other, each value against what was chosen of the others so far."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer.contenders import MEASURES, Contender
from qtale_lightning.files import replacing

MARGIN = 0.02  # of the seconds: what is gained by a setting that is chosen instead of the usual one
Settings = dict[str, dict[str, Any]]


def search(
    usual: Settings, choices: dict[str, list[Any]], seconds: Callable[[Settings], dict[str, float]]
) -> tuple[Settings, dict[str, float]]:
    """Settings for each measure, the best of their own, and the seconds they take.

    Args:
        usual: Of each measure, to start from.
        choices: Values to try of each setting.
        seconds: Of each measure, with settings; infinite where they don't work.
    """
    chosen, best = usual, seconds(usual)
    for key, values in choices.items():
        for value in values:
            tried = {measure: chosen[measure] | {key: value} for measure in MEASURES}
            if tried == chosen:
                continue
            took = seconds(tried)
            for measure in MEASURES:
                if took[measure] < (1 - MARGIN) * best[measure]:
                    chosen = chosen | {measure: tried[measure]}
                    best = best | {measure: took[measure]}
    return chosen, best


def remembered(file: Path, contender: Contender, machine: str) -> Settings | None:
    """What was chosen before, for these choices of this version on this machine; None if nothing was."""
    if not file.is_file():
        return None
    content: dict[str, Settings] = json.loads(file.read_text(encoding="utf-8"))
    return content.get(_key(contender, machine))


def remember(file: Path, contender: Contender, machine: str, settings: Settings) -> None:
    """Keep a choice."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    with replacing(file) as temporary:
        temporary.write_text(
            json.dumps(content | {_key(contender, machine): settings}, indent=1), encoding="utf-8"
        )


def _key(contender: Contender, machine: str) -> str:
    parts = [machine, contender.name, contender.config, contender.version, contender.choices]
    return json.dumps([*parts, contender.environment])
