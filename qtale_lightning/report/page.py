"""The inspection page: one HTML file that shows traces and asks nothing of any network.

Style, script and data are in the page. Its content security policy allows nothing else, so that a browser would refuse
even a request that a token's text managed to ask for.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib import resources
from string import Template
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_hex

SHADES = 33
WHITE = 0.25


def render_page(traces: Mapping[str, Any]) -> str:
    """The page of traces as `qtale_lightning.evaluation.trace.document` gives them."""
    style, script = _template("page.css"), _template("page.js")
    # '<' can't occur in the data then, so no text of a token can end the element that holds it.
    data = json.dumps(
        {**traces, "palette": palette()}, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )
    return Template(_template("page.html")).substitute(
        title=html.escape(f"{traces['title']}: layers of each token"),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=data.replace("<", "\\u003c"),
    )


def palette() -> list[str]:
    """Colours from few to many, "#rrggbb": viridis from light to dark, behind text and so mixed with some white.

    Its steps of lightness are nearly equal: colour-blind readers, and grey prints, keep the order.
    """
    colours = mpl.colormaps["viridis"].reversed()(np.linspace(0, 1, SHADES))
    return [to_hex(colour) for colour in WHITE + (1 - WHITE) * colours[:, :3]]


def _template(name: str) -> str:
    return (resources.files(__package__) / "template" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names an inline script or style that it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
