"""The HTTP client of the hub's client: httpx2 since huggingface_hub 2, httpx before, alike in what is used here."""

from importlib import import_module
from typing import TYPE_CHECKING

from huggingface_hub.errors import HfHubHTTPError

if TYPE_CHECKING:
    import httpx2 as httpx
else:
    httpx = import_module(
        next(base.__module__.split(".")[0] for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    )

__all__ = ["httpx"]
