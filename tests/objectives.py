"""Weights of losses as each method's file has them."""

from pathlib import Path
from typing import Any

import yaml

METHODS = Path(__file__).parent.parent / "experiments/methods"


def objective(method: str) -> dict[str, Any]:
    """Options of a module: the method, and the λ that its file sets."""
    return dict(yaml.safe_load((METHODS / f"{method}.yaml").read_text(encoding="utf-8"))["model"])
