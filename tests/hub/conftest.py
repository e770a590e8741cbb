"""A hub on this machine's own loopback, with as much of its HTTP API as its client needs, and faults."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import datasets
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from qtale_lightning.hub import download, patience

FIRST, SECOND = "a" * 40, "b" * 40


class LoopbackHub(ThreadingHTTPServer):
    """Repositories by name, and what may go wrong.

    Attributes:
        files: Content of a repository's files, by (name, commit).
        main: The commit of each repository's main branch.
        gated: Repositories whose files are for those only who have the token "granted".
        fault: Called with each request's method and path; a status is the answer, "hang" is none, "drop" is half of a
            body.
        requests: "METHOD path" of all.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.main: dict[str, str] = {}
        self.gated: set[str] = set()
        self.fault: Callable[[str, str], int | str | None] = lambda method, path: None
        self.requests: list[str] = []
        self.closing = threading.Event()

    def publish(self, name: str, files: dict[str, bytes], commit: str = FIRST) -> None:
        """A commit of a repository, which becomes its main."""
        self.files[name, commit] = files
        self.main[name] = commit

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    server: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        fault = self.server.fault(self.command, path)
        if fault == "hang":
            self.server.closing.wait(30)
            self.close_connection = True
        elif isinstance(fault, int):
            self.answer(fault, b"")
        else:
            self.route(path, cut=fault == "drop")

    def route(self, path: str, cut: bool) -> None:
        parts = path.strip("/").split("/")
        api = parts[0] == "api"
        parts = [part for part in parts if part not in ("api", "models", "datasets")]
        name, verb, revision = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", (parts + [""] * 4)[3]
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", "granted", "other"):
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        if name not in self.server.main:
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        commit = self.server.main[name] if revision in ("", "main") else revision
        files = self.server.files.get((name, commit))
        if files is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if api and verb == "tree":
            listing = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in files.items()
            ]
            return self.answer(200, json.dumps(listing).encode())
        if api:
            info = {
                "id": name,
                "sha": commit,
                "private": False,
                "siblings": [],
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
            return self.answer(200, json.dumps(info).encode())
        if name in self.server.gated and token != "granted":
            return self.refuse(403 if token else 401, "GatedRepo", "Access is restricted")
        file = "/".join(parts[4:])
        if file not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        headers = {"ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"', "X-Repo-Commit": commit}
        return self.answer(200, files[file], headers, cut)

    def refuse(self, status: int, code: str | None, message: str) -> None:
        self.answer(status, b"", {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start and status == 200 else status)
        for key, value in {"Content-Length": str(len(body) - start), **(headers or {})}.items():
            self.send_header(key, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.command != "HEAD":
            left = body[start:]
            self.wfile.write(left[: (len(left) + 1) // 2] if cut else left)
        self.close_connection = self.close_connection or cut

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub that this process's clients ask, an empty cache, and little patience."""
    server = LoopbackHub()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    url = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(patience, "REQUEST", 0.3)
    monkeypatch.setattr(patience, "LIMIT", 0.8)
    monkeypatch.setattr(patience, "SAID", 0.1)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.1)))  # between the client's tries
    close_session()
    download.resolve.cache_clear()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    close_session()
    download.resolve.cache_clear()


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, bytes]]:
    """A repository's files of a model like tiny, by the seed of its weights."""
    from qtale_lightning.models.sources import load_base, load_tokenizer

    @cache
    def files(seed: int) -> dict[str, bytes]:
        folder = tmp_path_factory.mktemp("tiny")
        load_base("tiny", seed=seed).save_pretrained(folder)
        load_tokenizer("tiny").save_pretrained(folder)
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    return files
