"""Collection against a fast local server: responses a second on the client's side, and its memory.

Question: does the client side keep up with 500 responses/s at 64 open requests on two cores, every
response committed to the cache before it counts, and does its memory stay flat? A server in another
process answers at once with a text of 1.2 kB; what is timed is a whole collection, from taking
stock to the closed cache. The limit in the same run is the official client alone, without limits,
budget, retries and cache, on the transport that the collection uses and on its default one.

    python benchmarks/collect.py [--smoke] [--folder DISK] [--output FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib.metadata
import io
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
from rich.console import Console

from gad_fast.config import CollectRecipe
from gad_fast.records import Message
from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.collect import collect

NUM_OPEN = 64
RATE_GOAL = 500.0
TEXT = "A sentence of the teacher, as long as others. " * 26


class Answers(asyncio.Protocol):
    """Answers each request with the same completion, as cheaply as Python can."""

    body = json.dumps(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "fast",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": TEXT},
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 20, "completion_tokens": 260, "total_tokens": 280},
        }
    ).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    answer = head % len(body) + body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins with nothing received."""
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport, self._received = transport, b""

    def data_received(self, data: bytes) -> None:
        """Answers when a whole request is there."""
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        fields = self._received[:end].lower().split(b"content-length:")[1]
        length = end + 4 + int(fields.split(b"\r\n")[0])
        if len(self._received) >= length:
            self._received = self._received[length:]
            self._transport.write(self.answer)


async def serve() -> None:
    """Prints the port, and answers for ever."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Answers, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def running_server() -> Iterator[str]:
    """The URL of a server in another process."""
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.terminate()


def chats(count: int) -> list[list[Message]]:
    """Prompts of about 20 tokens."""
    return [
        [Message(role="user", content=f"What is to be said about the number {i}, in short?")]
        for i in range(count)
    ]


def collect_seconds(url: str, folder: Path, prompts: list[list[Message]]) -> float:
    """Time of a whole collection into a new cache."""
    recipe = CollectRecipe.from_values(
        {
            "prompts": "prompts.jsonl",
            "cache": folder / f"{time.monotonic_ns()}.cache",
            "teachers": {
                "fast": {
                    "model": "fast",
                    "base_url": url,
                    "concurrency": NUM_OPEN,
                    "max_tokens": 512,
                }
            },
            "budget": {"tokens": 10**9},
        }
    )
    console = Console(file=io.StringIO())
    started = time.perf_counter()
    collection = collect(recipe, prompts, console=console)
    seconds = time.perf_counter() - started
    assert collection.tally.num_new == len(prompts), collection
    with TeacherCache.open(recipe.cache, read_only=True) as cache:
        assert len(cache) == len(prompts)
    return seconds


def client_seconds(url: str, count: int, *, on_aiohttp: bool) -> float:
    """Time of the official client alone."""

    async def ask_all() -> float:
        transport = openai.DefaultAioHttpClient() if on_aiohttp else None
        client = openai.AsyncOpenAI(api_key="x", base_url=url, http_client=transport)
        feed = iter(chats(count))

        async def ask() -> None:
            for chat in feed:
                await client.chat.completions.create(model="fast", messages=chat)  # pyright: ignore[reportArgumentType]

        started = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(NUM_OPEN)))
        seconds = time.perf_counter() - started
        await client.close()
        return seconds

    return asyncio.run(ask_all())


def resident_mib() -> float:
    """Memory of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def measure(url: str, folder: Path, count: int, repeats: int) -> dict[str, Any]:
    """Rates turn by turn, and memory after each collection."""
    rates: dict[str, list[float]] = {"collect": [], "client_aiohttp": [], "client_default": []}
    memory: list[float] = []
    for turn in range(-1, repeats):
        seconds = {
            "collect": collect_seconds(url, folder, chats(count)),
            "client_aiohttp": client_seconds(url, count, on_aiohttp=True),
            "client_default": client_seconds(url, count, on_aiohttp=False),
        }
        if turn >= 0:  # the one before is the warm-up
            memory.append(resident_mib())
            for name, taken in seconds.items():
                rates[name].append(count / taken)
    # The prompts are the caller's; what is added to them grows with the length of a collection.
    prompts = chats(10 * count)
    before = resident_mib()
    collect_seconds(url, folder, prompts)
    return {
        "responses_per_second": rates,
        "resident_mib": memory,
        "resident_mib_added_by_ten_times_as_many": resident_mib() - before,
    }


def main() -> None:
    """Print the rates; write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-prompts", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--smoke", action="store_true", help="few prompts, once")
    parser.add_argument("--serve", action="store_true", help="be the server")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve())
        return
    if arguments.smoke:
        arguments.num_prompts, arguments.repeats = 200, 1
    with running_server() as url, tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        figures = measure(url, Path(name), arguments.num_prompts, arguments.repeats)
    for name, rates in figures["responses_per_second"].items():
        goal = f", goal >= {RATE_GOAL:.0f}" if name == "collect" else ""
        print(
            f"{name:16} {statistics.median(rates):7.0f} responses/s "
            f"({min(rates):.0f} to {max(rates):.0f}{goal})"
        )
    added = figures["resident_mib_added_by_ten_times_as_many"]
    print(f"memory {figures['resident_mib'][-1]:.0f} MiB; ten times as many add {added:.1f} MiB")
    if arguments.output:
        record = {
            "question": (__doc__ or "").splitlines()[0],
            "num_prompts": arguments.num_prompts,
            "num_open": NUM_OPEN,
            "processor": platform.processor() or platform.machine(),
            "python": sys.version.split()[0],
            "versions": {
                name: importlib.metadata.version(name) for name in ("openai", "aiohttp", "httpx2")
            },
            **figures,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
