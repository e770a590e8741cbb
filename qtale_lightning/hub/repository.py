"""A repository of the hub, as it is asked for."""

import re
from dataclasses import dataclass
from typing import Literal

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repository:
    """A repository of the hub, and who asks for it.

    Attributes:
        name: ``owner/name``.
        revision: A commit, a branch or a tag.
        wanted: What it is needed for, in words: "the model 'llama2-7b'".
        otherwise: What to do without the hub, a sentence or more.
        option: The option that chose the revision; empty where there is none.
    """

    name: str
    kind: Literal["model", "dataset"]
    revision: str
    wanted: str
    otherwise: str
    option: str = ""

    @property
    def pinned(self) -> bool:
        """Whether its revision is a commit, which never moves."""
        return COMMIT.fullmatch(self.revision) is not None
