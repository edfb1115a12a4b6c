"""The teacher cache under what a long collection meets: kills, readers, and full disks.

A log that is torn in its last frame, and a database that may grow no more, are in the tests of
`rust/core`.
"""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gad_fast.errors import CacheError
from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.records import TeacherRequest, TeacherResponse

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform == "win32", reason="signals and limits are of POSIX"),
]

# What both sides agree on: text of a row, hard to compress.
ROWS = """
import random, sys
from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.records import TeacherRequest, TeacherResponse

def request(index):
    return TeacherRequest("teacher", [{"role": "user", "content": f"question {index}"}])

def response(index):
    return TeacherResponse(random.Random(index).randbytes(600).hex(), created=float(index))
"""

# Prints a line for every row that was acknowledged, at once and unbuffered.
WRITER = (
    ROWS
    + """
import asyncio, itertools, os, threading

def acknowledge(index):
    os.write(1, f"{index}\\n".encode())

def put_for_ever(first):
    for index in itertools.count(first, 64):
        cache.put(request(index), response(index))
        acknowledge(index)

async def aput_for_ever(first):
    for index in itertools.count(first, 64):
        await cache.aput(request(index), response(index))
        acknowledge(index)

async def aput_all(start):
    await asyncio.gather(*(aput_for_ever(start + caller) for caller in range(64)))

cache = TeacherCache.open(sys.argv[1])
start = int(sys.argv[2])
if sys.argv[3] == "tasks":
    asyncio.run(aput_all(start))
for caller in range(64):
    threading.Thread(target=put_for_ever, args=(start + caller,)).start()
"""
)

READER = (
    ROWS
    + """
cache, count = TeacherCache.open(sys.argv[1], read_only=True), int(sys.argv[2])
num_passes = seen = last = 0
while seen < count:
    assert len(cache) >= seen
    # Every row of the pass is checked against its hash; none comes twice, none is left out.
    for row in cache.rows(after=last):
        assert row.request == request(row.id - 1)
        assert row.response == response(row.id - 1)
        assert row.id == last + 1
        last, seen = row.id, seen + 1
    num_passes += 1
print(num_passes)
"""
)

# Puts until the disk is full, from one caller or 64 tasks, then says why and what was acknowledged.
FILLER = (
    ROWS
    + """
import asyncio
from gad_fast.errors import CacheError

cache = TeacherCache.open(sys.argv[1])
acknowledged, refused = [], []

def put_all():
    for index in range(20_000):
        cache.put(request(index), response(index))
        acknowledged.append(index)

async def aput_from(first):
    for index in range(first, 20_000, 64):
        try:
            await cache.aput(request(index), response(index))
        except CacheError as error:
            refused.append(error)
            return
        acknowledged.append(index)

async def aput_all():
    await asyncio.gather(*(aput_from(caller) for caller in range(64)))
    # Every task was told: a put that nobody answers would wait for ever.
    assert len(refused) == 64, len(refused)
    raise refused[0]

try:
    put_all() if sys.argv[2] == "one" else asyncio.run(aput_all())
except CacheError as error:
    print(error)
for index in acknowledged:
    assert cache.get(request(index)) == response(index)
try:
    cache.put(request(-1), response(3))
except CacheError:
    pass
cache.close()
reader = TeacherCache.open(sys.argv[1], read_only=True)
assert reader.verify().problems == [], reader.verify()
assert all(reader.get(request(index)) == response(index) for index in acknowledged)
print(len(acknowledged))
"""
)


def request(index: int) -> TeacherRequest:
    return TeacherRequest("teacher", [{"role": "user", "content": f"question {index}"}])


def response(index: int) -> TeacherResponse:
    return TeacherResponse(random.Random(index).randbytes(600).hex(), created=float(index))


def run(script: str, *arguments: object, prefix: tuple[str, ...] = ()) -> list[str]:
    """Lines that a script prints."""
    command = [*prefix, sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(
        command, check=True, timeout=60, capture_output=True, text=True
    ).stdout.splitlines()


def acknowledged_before_kill(path: Path, start: int, callers: str, num_rows: int) -> list[int]:
    """Starts a writer and kills it once it has acknowledged `num_rows` rows."""
    command = [sys.executable, "-c", WRITER, str(path), str(start), callers]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(num_rows)]
        writer.kill()
        # What it wrote before it died counts too, but for a line that is torn.
        lines += writer.stdout.readlines()
    return [int(line) for line in lines if line.endswith(b"\n")]


@pytest.mark.timeout(180)
def test_sixty_kills_lose_no_acknowledged_row(tmp_path: Path) -> None:
    path = tmp_path / "teacher.cache"
    moments = random.Random(20261124)
    start, acknowledged = 0, set[int]()
    for kill in range(60):
        callers = ("threads", "tasks")[kill % 2]
        # Some in the middle of opening, which after a kill is recovery.
        num_rows = 0 if kill % 10 == 7 else moments.randrange(1, 400)
        indices = acknowledged_before_kill(path, start, callers, num_rows)
        start = max([start, *(index + 64 for index in indices)])
        acknowledged.update(indices)
        with TeacherCache.open(path) as cache:
            lost = [i for i in indices if cache.get(request(i)) != response(i)]
            assert lost == []
    with TeacherCache.open(path, read_only=True) as cache:
        assert len(acknowledged) > 3000
        assert len(cache) >= len(acknowledged)
        assert cache.verify().problems == []
        assert all(request(index) in cache for index in acknowledged)


def test_two_processes_read_while_a_third_writes(tmp_path: Path) -> None:
    path, count = tmp_path / "teacher.cache", 3000
    with TeacherCache.open(path) as cache:
        cache.put(request(0), response(0))
        command = [sys.executable, "-c", READER, str(path), str(count)]
        readers = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for first in range(1, count, 8):
            rows = [(request(i), response(i)) for i in range(first, min(first + 8, count))]
            assert all(cache.put_many(rows))
        for reader in readers:
            output, errors = reader.communicate(timeout=60)
            assert reader.returncode == 0, errors
            assert int(output) >= 1


LIMIT = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, resource.RLIM_INFINITY))
"""


@pytest.mark.parametrize("callers", ["one", "tasks"])
def test_a_file_that_may_grow_no_more_loses_nothing(tmp_path: Path, callers: str) -> None:
    path = tmp_path / "teacher.cache"
    message, count = run(LIMIT + FILLER, path, callers)
    assert f"cannot write to the cache {path}" in message
    assert "bytes are free there" in message
    assert int(count) > 50
    # Without the limit, the cache goes on.
    with TeacherCache.open(path) as cache:
        assert len(cache) >= int(count)
        assert cache.put(request(-2), response(-2))
        assert cache.verify().problems == []


@pytest.mark.parametrize("callers", ["one", "tasks"])
def test_a_full_disk_loses_nothing(tmp_path: Path, callers: str) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare of util-linux")
    # A file system of four megabytes, which only the process below sees.
    mount = f'mount -t tmpfs -o size=4m none {tmp_path} && exec "$@"'
    prefix = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
    probe = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {probe.stderr.decode().strip()}")
    path = tmp_path / "teacher.cache"
    message, count = run(FILLER, path, callers, prefix=prefix)
    assert f"cannot write to the cache {path}" in message
    assert "full" in message
    assert "bytes are free there" in message
    assert int(count) > 50


def test_a_folder_without_room_for_a_new_cache_is_named(tmp_path: Path) -> None:
    path = tmp_path / "teacher.cache"
    script = """
import resource, signal, sys
from gad_fast.errors import CacheError
from gad_fast.teacher.cache import TeacherCache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    TeacherCache.open(sys.argv[1])
except CacheError as error:
    print(error)
"""
    (message,) = run(script, path)
    assert str(path) in message
    with TeacherCache.open(path) as cache:
        assert cache.put(request(0), response(0))


def test_a_writer_that_was_killed_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "teacher.cache"
    acknowledged_before_kill(path, 0, "threads", 10)
    with TeacherCache.open(path) as cache:
        with pytest.raises(CacheError, match="written to by process"):
            TeacherCache.open(path)
        assert len(cache) >= 10
