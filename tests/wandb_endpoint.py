"""A W&B server on the loopback that takes runs, and fails in the ways that real ones do. Standard library only."""

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal["none", "hang", "error", "drop", "refuse"]
FAULTS: tuple[Fault, ...] = ("hang", "error", "drop", "refuse")
PROJECT = {"id": "project", "name": "qtale", "entity": {"id": "entity", "name": "loopback"}}
VIEWER = {"id": "viewer", "entity": "loopback", "username": "loopback", "flags": "{}", "teams": {"edges": []}}


class Endpoint(ThreadingHTTPServer):
    """Answers as W&B does until a fault is set: no answer, status 500, half an answer, or no connection at all.

    Attributes:
        fault: What happens to requests from now on.
        history: Rows of metrics that arrived, of all runs.
        summary: The last summary that arrived.
        exits: Exit codes of runs that ended.
        operations: Names of all GraphQL requests.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault: Fault = "none"
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.exits: list[int] = []
        self.operations: list[str] = []

    @property
    def url(self) -> str:
        """What WANDB_BASE_URL is to be."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, fault: Fault) -> None:
        """From now on."""
        self.fault = fault
        if fault == "refuse":
            self.shutdown()
            self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


@contextmanager
def serving() -> Iterator[Endpoint]:
    """An endpoint that runs."""
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.fail("refuse")


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        match self.server.fault:
            case "hang":
                time.sleep(600)
            case "error":
                return self._send({"error": "out of order"}, 500)
            case "drop":
                return self._drop()
            case "refuse":  # of a connection that was open already
                self.close_connection = True
                return None
        if self.path == "/graphql":
            request = json.loads(body)
            return self._send({"data": self._answer(request["query"], request.get("variables") or {})})
        if self.path.endswith("/file_stream"):
            self._stream(json.loads(body))
        return self._send({"exitcode": None, "limits": {}})

    do_PUT = do_GET = do_POST

    def _answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else ""
        self.server.operations.append(name)
        bucket = {"id": "bucket", "name": given.get("name"), "displayName": given.get("displayName") or "run"}
        bucket |= {"config": "{}", "sweepName": None, "project": PROJECT, "historyLineCount": 0}
        sequence = {"id": "sequence", "latestArtifact": {"id": "artifact", "versionIndex": 0}}
        artifact = {"id": "artifact", "state": "COMMITTED", "artifactSequence": sequence, "versionIndex": 0}
        uploads = [{"name": file, "uploadUrl": f"{self.server.url}/file"} for file in given.get("files", [])]
        answers: dict[str, dict[str, Any]] = {
            "Viewer": {"viewer": VIEWER},
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "ServerInfo": {"serverInfo": {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "features": []}},
            "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
            "RunResumeStatus": {"model": {**PROJECT, "bucket": None}},
            "CreateRunFiles": {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": uploads}},
            "RunStoppedStatus": {"project": {"run": {"stopped": False}}},
            "CreateArtifact": {"createArtifact": {"artifact": artifact}},
            "ArtifactType": {"project": {"artifact": {"artifactType": {"name": "run_table"}}}},
            "UseArtifact": {"useArtifact": {"artifact": {"id": "artifact"}}},
            "UpsertSweep": {"upsertSweep": {"sweep": {"id": "s1", "name": "s1", "project": PROJECT}}},
        }
        return answers.get(name, {})

    def _stream(self, body: dict[str, Any]) -> None:
        files = body.get("files") or {}
        for line in (files.get("wandb-history.jsonl") or {}).get("content") or []:
            self.server.history.append(json.loads(line))
        for line in (files.get("wandb-summary.json") or {}).get("content") or []:
            self.server.summary = json.loads(line)
        if body.get("complete"):
            self.server.exits.append(body.get("exitcode"))

    def _body(self) -> bytes:
        if (length := self.headers.get("Content-Length")) is not None:
            return self.rfile.read(int(length))
        body = b""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def _send(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _drop(self) -> None:
        """Half of an answer's head."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-")
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""
