"""A chat endpoint on loopback that does what its script says, right or wrong, and counts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

HANG = None
"""A scripted reply: there is none, and the connection stays open."""


@dataclass
class Reply:
    """What is sent for one request."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    sent_bytes: int | None = None
    """The connection is cut after so many bytes of the body."""
    drip_seconds: float | None = None
    """Time between the bytes of the body."""
    times: int = 1
    """How often the whole reply is sent."""


Script = Callable[["ChatServer", dict[str, Any], int], Reply | None]


def completion(text: str, **changes: Any) -> dict[str, Any]:
    """A chat completion as servers send it; `changes` go into its choice."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    return {
        "id": "chat-1",
        "object": "chat.completion",
        "created": 1,
        "model": "scripted",
        "choices": [{**choice, **changes}],
        "usage": {"prompt_tokens": 10, "completion_tokens": len(text), "total_tokens": 99},
    }


def error(status: int, message: str = "no", **headers: str) -> Reply:
    """An error as OpenAI sends it; underscores in header names stand for hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {"error": {"message": message, "code": None}}, named)


def echo(server: ChatServer, body: dict[str, Any], attempt: int) -> Reply:
    """Answers a prompt with a text that belongs to it."""
    del server, attempt
    return Reply(body=completion(answer_to(prompt_of(body))))


def answer_to(prompt: str) -> str:
    """What `echo` says."""
    return f"about {prompt}"


def prompt_of(body: dict[str, Any]) -> str:
    """The last turn of a request."""
    return body["messages"][-1]["content"]


class ChatServer:
    """Counts requests and connections; made by `serve`."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.attempts: Counter[str] = Counter()
        self.num_open = self.most_open = 0
        self.seen = threading.Event()
        """Set by every request."""
        self.url = ""

    async def run(self, started: threading.Event) -> None:
        """Serves until `stop`."""
        self._loop, self._stopped, self._gate = (
            asyncio.get_running_loop(),
            asyncio.Event(),
            asyncio.Event(),
        )
        self._gate.set()
        listener = await asyncio.start_server(self.handle, "127.0.0.1", 0, backlog=256)
        self.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
        started.set()
        await self._stopped.wait()
        listener.close()

    def stop(self) -> None:
        """Closes the port and all connections."""
        self._loop.call_soon_threadsafe(self._stopped.set)

    def hold(self) -> None:
        """Answers nothing until `release`."""
        self._loop.call_soon_threadsafe(self._gate.clear)

    def release(self) -> None:
        """Answers what was held and what comes."""
        self._loop.call_soon_threadsafe(self._gate.set)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Cancelled when the server stops: streams would log that as an error of ours.
        with contextlib.suppress(
            ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError
        ):
            while await self._answer_one(reader, writer):
                pass
        writer.close()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body = json.loads(await reader.readexactly(int(fields.get("content-length", 0))) or b"{}")
        self.headers.append(head)
        self.bodies.append(body)
        prompt = prompt_of(body) if "messages" in body else head.split()[1]
        self.attempts[prompt] += 1
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        self.seen.set()
        try:
            return await self._send(self.script(self, body, self.attempts[prompt]), writer)
        finally:
            self.num_open -= 1

    async def _send(self, reply: Reply | None, writer: asyncio.StreamWriter) -> bool:
        await self._gate.wait()
        if reply is None:
            await asyncio.Event().wait()
        assert reply is not None
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        named = "".join(f"{name}: {value}\r\n" for name, value in reply.headers.items())
        head = (
            f"HTTP/1.1 {reply.status} Scripted\r\nContent-Type: {reply.content_type}\r\n"
            f"{named}Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        if reply.drip_seconds is not None:
            writer.write(head)
            for byte in body:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(reply.drip_seconds)
            return True
        writer.write((head + body[: reply.sent_bytes]) * reply.times)
        await writer.drain()
        return reply.sent_bytes is None


def cut(server: ChatServer, body: dict[str, Any], attempt: int) -> Reply:
    """Cuts the connection in the middle of a body."""
    reply = echo(server, body, attempt)
    reply.sent_bytes = 20
    return reply


@contextlib.contextmanager
def serve(script: Script = echo) -> Iterator[ChatServer]:
    """A server in a thread of its own, until it is left."""
    server, started = ChatServer(script), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(server.run(started)))
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)
