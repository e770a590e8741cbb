"""The side of an engine's process: load what the first line of the input says, then run what each line asks for.

Needs nothing but Python, since every engine has packages of its own. A request is `decode` or `prompt`, an answer one
line of JSON.
"""

import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any


class Engine(ABC):
    """A model that has been loaded: greedy, one sequence at a time.

    Attributes:
        context: Tokens that decoding starts from.
        prompt: Tokens of the prompt that is timed.
        warm: Tokens decoded before the timed ones, since another process had the processor and its caches.
        steps: Tokens that are timed.
        settings: What was chosen for either request.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.context: list[int] = config["context"]
        self.prompt: list[int] = config["prompt"]
        self.warm: int = config["warm"]
        self.steps: int = config["steps"]
        self.settings: dict[str, dict[str, Any]] = config["settings"]

    @abstractmethod
    def decode(self) -> tuple[float, list[int]]:
        """Seconds of `steps` tokens behind the context, and the tokens chosen: the first, the warm ones, the timed."""

    @abstractmethod
    def read(self) -> float:
        """Seconds of the prompt, from an empty cache to the logits of its last position."""

    @abstractmethod
    def instructions(self) -> str:
        """The processor's instructions that this engine says, or shows, that it uses."""


def serve(make: Callable[[dict[str, Any]], Engine]) -> None:
    """Answer until the input ends; what libraries print goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    engine = make(json.loads(sys.stdin.readline()))
    answer({"instructions": engine.instructions()})
    for line in sys.stdin:
        if line.strip() == "decode":
            seconds, tokens = engine.decode()
            answer({"seconds": seconds, "tokens": tokens})
        else:
            answer({"seconds": engine.read()})
