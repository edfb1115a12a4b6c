"""The batch form of the API on loopback: files, batches, and answers when they are due."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from chat_server import answer_to, completion, prompt_of


class BatchServer:
    """State of the provider; made by `serve_batches`."""

    def __init__(self) -> None:
        self.url = ""
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.polls_until_done = 2
        self.final_status = "completed"
        self.polled = threading.Event()
        self.created = threading.Event()
        """Set when a batch was created, before the client hears of it."""
        self.answers_creation = True
        """If not, the client never hears of a batch that is created."""
        self.failures_of_creation = 0
        """So many times, a batch is created and the client told 500."""

    def rows(self) -> list[dict[str, Any]]:
        """All requests of all batches."""
        inputs = [self.files[batch["input_file_id"]] for batch in self.batches.values()]
        return [json.loads(line) for content in inputs for line in content.splitlines()]

    def add_file(self, content: bytes) -> dict[str, Any]:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        kind = {"id": name, "object": "file", "purpose": "batch", "status": "processed"}
        return {**kind, "bytes": len(content), "created_at": 1, "filename": "x"}

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        batch = {
            "id": f"batch-{len(self.batches)}",
            "object": "batch",
            "status": "in_progress",
            "created_at": int(time.time()),
            **body,
        }
        self.batches[batch["id"]] = batch
        batch["polls"] = 0
        self.created.set()
        return batch

    def poll(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        batch["polls"] += 1
        self.polled.set()
        if batch["polls"] == self.polls_until_done:
            self._finish(batch)
        return batch

    def _finish(self, batch: dict[str, Any]) -> None:
        batch["status"] = self.final_status
        if self.final_status == "failed":
            error = {"code": "invalid", "message": "no batches for this model"}
            batch["errors"] = {"object": "list", "data": [error]}
            return
        requests = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        rows = [(self._row(row), prompt_of(row["body"])) for row in requests]
        # Answers come in an order of their own; "late" prompts expire, "bad" ones are refused.
        outputs = [row for row, prompt in reversed(rows) if not prompt.startswith(("late", "bad"))]
        errors = [row for row, prompt in rows if prompt.startswith(("late", "bad"))]
        for key, lines in (("output_file_id", outputs), ("error_file_id", errors)):
            if lines:
                content = "".join(json.dumps(line) + "\n" for line in lines)
                batch[key] = self.add_file(content.encode())["id"]

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        prompt = prompt_of(row["body"])
        answer = {"id": "1", "custom_id": row["custom_id"], "response": None, "error": None}
        if prompt.startswith("late"):
            error = {"code": "batch_expired", "message": "This request could not be executed."}
            return {**answer, "error": error}
        if prompt.startswith("bad"):
            body = {"error": {"message": "not this prompt", "code": None}}
            return {**answer, "response": {"status_code": 400, "request_id": "1", "body": body}}
        body = completion(answer_to(prompt))
        return {**answer, "response": {"status_code": 200, "request_id": "1", "body": body}}


def _handler(server: BatchServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

        def do_GET(self) -> None:
            path = self.path.removeprefix("/v1").split("?")[0]
            if path == "/batches":
                newest = list(reversed(server.batches.values()))
                self._send({"object": "list", "data": newest, "has_more": False})
            elif match := re.fullmatch("/batches/(.+)", path):
                self._send(server.poll(match[1]))
            elif match := re.fullmatch("/files/(.+)/content", path):
                self._send(server.files[match[1]])

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/files":
                part = re.search(rb'name="file".*?\r\n\r\n(.*?)\r\n--', content, re.DOTALL)
                assert part is not None
                self._send(server.add_file(part[1]))
            elif self.path == "/v1/batches":
                batch = server.create(json.loads(content))
                if not server.answers_creation:
                    self.close_connection = True
                elif server.failures_of_creation > 0:
                    server.failures_of_creation -= 1
                    self._send({"error": {"message": "try again"}}, 500)
                else:
                    self._send(batch)

        def _send(self, body: Any, status: int = 200) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler


@contextlib.contextmanager
def serve_batches() -> Iterator[BatchServer]:
    """A server in a thread of its own, until it is left."""
    server = BatchServer()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(server)) as listener:
        listener.daemon_threads = True
        server.url = f"http://127.0.0.1:{listener.server_port}/v1"
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join(10)
