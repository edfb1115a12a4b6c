"""A collection from a real model behind `transformers serve` (`make serve-test`)."""

import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from collecting import chats, recipe
from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.collect import collect
from gad_fast.teacher.records import TeacherResponse

MODEL = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"

pytestmark = [
    pytest.mark.serve,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not MODEL.is_dir(), reason=f"needs make {MODEL.parent.name}/{MODEL.name}"),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    pytest.importorskip("uvicorn", reason="needs the extra serve-test")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [str(program), "serve", str(MODEL), *where]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as server:
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health", server)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def wait_until_healthy(health: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(health, timeout=5)
        except urllib.error.URLError:
            # Refused until the server listens: waiting for it to end is a wait for it to begin.
            try:
                server.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        else:
            return
    raise AssertionError(f"the server ended with {server.returncode}")


def collected(folder: Path, url: str, *, stream: bool) -> dict[str, TeacherResponse]:
    teacher = {"model": str(MODEL), "max_tokens": 12, "temperature": 0.0, "stream": stream}
    folder.mkdir()
    plan = recipe(folder, url, teacher={**teacher, "concurrency": 2})
    assert collect(plan, chats(3)).tally.num_new == 3
    with TeacherCache.open(plan.cache, read_only=True) as cache:
        return {row.request.messages[-1]["content"]: row.response for row in cache}


def test_a_real_server_gives_the_same_text_streamed_and_not(tmp_path: Path, url: str) -> None:
    whole = collected(tmp_path / "whole", url, stream=False)
    streamed = collected(tmp_path / "streamed", url, stream=True)
    for prompt, response in whole.items():
        assert response.text.strip()
        assert response.num_response_tokens is not None
        assert 1 <= response.num_response_tokens <= 12
        assert (response.num_prompt_tokens or 0) > 10
        assert (response.finish_reason == "length") == ("truncated" in response.flags)
        assert (streamed[prompt].text, streamed[prompt].finish_reason) == (
            response.text,
            response.finish_reason,
        )
