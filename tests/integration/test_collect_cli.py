"""`gad-fast collect` as a user types it: killed, interrupted, started twice, with a key to keep."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from chat_server import ChatServer, Reply, answer_to, echo, error, serve
from gad_fast.teacher.cache import TeacherCache

SECRET = "sk-test-Zx81kQ77"
COMMAND = [sys.executable, "-c", "from gad_fast.cli.main import main; main()", "collect"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "A_KEY": SECRET}


def write_recipe(
    folder: Path, url: str, *, count: int = 8, teacher: str = "", more: str = ""
) -> Path:
    rows = [{"prompt": f"q {index}"} for index in range(count)]
    tiny.write_rows(folder / "prompts.jsonl", rows)
    path = folder / "collect.toml"
    path.write_text(
        f"""
prompts = "{folder}/prompts.jsonl"
cache = "{folder}/teacher.cache"
{more}
[teachers.large]
model = "scripted"
base_url = "{url}"
concurrency = 8
{teacher}
[retry]
first_wait_seconds = 0.01
"""
    )
    return path


def start(*words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def run(*words: str | Path) -> tuple[int, str, str]:
    return finish(start(*words))


def cached(folder: Path) -> dict[str, str]:
    if not (folder / "teacher.cache").exists():
        return {}
    with TeacherCache.open(folder / "teacher.cache", read_only=True) as cache:
        return {row.request.messages[-1]["content"]: row.response.text for row in cache}


def wait_for_requests(server: ChatServer, count: int) -> None:
    while len(server.bodies) < count:
        server.seen.clear()
        assert server.seen.wait(30)


@pytest.mark.faults
@pytest.mark.timeout(180)
def test_twenty_kills_lose_nothing_and_buy_nothing_twice(tmp_path: Path) -> None:
    moments, count = random.Random(20261124), 1200
    bought: dict[str, int] = {}  # by prompt in the cache at a kill, how often it had been asked
    with serve() as server:
        recipe = write_recipe(tmp_path, server.url, count=count)
        for _ in range(20):
            process = start(recipe)
            wait_for_requests(server, len(server.bodies) + moments.randrange(1, 50))
            process.kill()
            process.wait()
            for prompt in cached(tmp_path).keys() - bought.keys():
                bought[prompt] = server.attempts[prompt]
        code, output, errors = run(recipe)
        assert (code, errors) == (0, "")
        assert f"{count} of {count} responses are in" in output
        assert len(bought) > 200
        assert all(server.attempts[prompt] == times for prompt, times in bought.items())
        # What was open when a kill came is asked again; that is eight requests a kill at most.
        assert len(server.bodies) <= count + 20 * 8
    assert cached(tmp_path) == {f"q {i}": answer_to(f"q {i}") for i in range(count)}


def test_ctrl_c_finishes_the_open_requests_and_the_next_start_goes_on(tmp_path: Path) -> None:
    with serve() as server:
        recipe = write_recipe(tmp_path, server.url, count=40)
        server.hold()
        process = start(recipe)
        wait_for_requests(server, 8)
        process.send_signal(signal.SIGINT)
        # The signal is taken in before the answers come: the server sees no ninth request.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        server.release()
        code, _, errors = finish(process)
        assert code == 130
        assert "8 of 40 responses are in" in errors
        assert "32 are left; the same command asks for them" in errors
        assert len(server.bodies) == len(cached(tmp_path)) == 8
        assert run(recipe)[0] == 0
        assert set(server.attempts.values()) == {1}


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    with serve() as server:
        recipe = write_recipe(tmp_path, server.url)
        server.hold()
        process = start(recipe)
        wait_for_requests(server, 8)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.send_signal(signal.SIGINT)
        code, _, errors = finish(process)
        assert code == 130
        assert "Traceback" not in errors


def test_a_second_collector_is_refused_in_one_line(tmp_path: Path) -> None:
    with serve() as server:
        recipe = write_recipe(tmp_path, server.url)
        server.hold()
        first = start(recipe)
        wait_for_requests(server, 8)
        code, _, errors = run(recipe)
        assert code == 2
        assert f"written to by process {first.pid}" in errors
        assert len(errors.splitlines()) == 1
        server.release()
        assert finish(first)[0] == 0


def refuse_with_the_key(server: ChatServer, body: dict[str, Any], attempt: int) -> Reply:
    """A server that repeats the key in everything it says is wrong."""
    kind = int(body["messages"][-1]["content"].split()[1]) % 3
    if kind == 0:
        return echo(server, body, attempt)
    return error(400 if kind == 1 else 500, f"Bearer {SECRET} may not")


@pytest.mark.parametrize("place", ["variable", "file"])
def test_the_key_is_in_no_file_and_on_no_screen(place: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "key").write_text(SECRET + "\n")
    teacher = {
        "variable": 'api_key_env = "A_KEY"',
        "file": f'api_key_file = "{tmp_path}/key"',
    }[place]
    with serve(refuse_with_the_key) as server:
        recipe = write_recipe(work, server.url, teacher=teacher, count=9)
        outputs = [*run(recipe, "--retry.max_attempts", "2", "--retry.max_failed_share", "1.0")[1:]]
        outputs += run(recipe, "--dry-run")[1:]
        outputs += run(recipe, "--retry.max_attempts", "1", "--retry.min_judged", "1")[1:]
        server.script = lambda *_: error(401, f"Incorrect API key provided: {SECRET}")
        outputs += run(recipe, "--teachers.large.model", "other")[1:]
        assert "Incorrect API key provided: [key]" in outputs[-1]
        assert any(
            f"authorization: bearer {SECRET.lower()}" in head.lower() for head in server.headers
        )
    assert not any(SECRET in text for text in outputs)
    for path in work.rglob("*"):
        assert SECRET.encode() not in path.read_bytes(), path
    rejected = (work / "teacher.cache.rejected.jsonl").read_text()
    assert "[key] may not" in json.loads(rejected.splitlines()[1])["reason"]


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ('api_key_env = "NOT_SET_ANYWHERE"', "teachers.large has no key: the variable that"),
        ('api_key_file = "nowhere"', "teachers.large has no key: cannot read the file nowhere"),
    ],
)
def test_a_missing_key_is_told_before_anything_is_asked(
    teacher: str, message: str, tmp_path: Path
) -> None:
    with serve() as server:
        code, _, errors = run(write_recipe(tmp_path, server.url, teacher=teacher))
        assert code == 2
        assert message in errors
        assert len(errors.splitlines()) == 1
        assert server.bodies == []


def test_a_dry_run_asks_nothing_and_writes_nothing(tmp_path: Path) -> None:
    with serve() as server:
        recipe = write_recipe(tmp_path, server.url)
        before = sorted(tmp_path.rglob("*"))
        code, output, _ = run(recipe, "--dry-run", "--responses_per_prompt", "2")
        assert code == 0
        assert "8 prompts; 16 responses wanted, 0 in" in output
        assert "large: 16 to ask of scripted" in output
        assert server.bodies == []
        assert sorted(tmp_path.rglob("*")) == before


def test_an_estimate_tells_requests_tokens_cost_and_time(tmp_path: Path) -> None:
    with serve() as server:
        prices = "prompt_price = 1.0\nresponse_price = 2.0"
        more = "estimate_prompts = 4"
        recipe = write_recipe(tmp_path, server.url, count=40, teacher=prices, more=more)
        code, output, errors = run(recipe, "--estimate")
        assert (code, errors) == (0, "")
        assert "large: 36 requests, about 7" in output
        assert "cost 0.001" in output
        assert "from a sample of 4" in output
        assert len(server.bodies) == 4


def test_help_explains_every_key() -> None:
    code, output, _ = run("--help")
    assert code == 0
    for key in ("--responses-per-prompt", "--budget.tokens", "--retry.max-attempts", "--estimate"):
        assert key in output
