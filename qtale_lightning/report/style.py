"""How figures look: Okabe and Ito's colours, which colour-blind readers can tell apart, and markers and lines."""

from typing import Any

STYLES: list[dict[str, Any]] = [
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
    {"color": "#000000", "marker": "v", "linestyle": (0, (5, 1))},
    {"color": "#E69F00", "marker": "P", "linestyle": (0, (1, 1))},
]
TRAINING_STYLE: dict[str, Any] = {"color": "#777777", "marker": "x", "linestyle": "-"}
DPI = 150


def plain(text: str) -> str:
    """Text as it is, for matplotlib, which would read a formula between two dollars."""
    return text.replace("$", r"\$")
