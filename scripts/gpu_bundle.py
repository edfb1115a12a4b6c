"""Wheels for the GPU suite on a machine that has torch, and neither network nor Rust.

    python scripts/gpu_bundle.py [--output .gpu-bundle]

The machine is Linux on x86-64 with Python 3.12 and what `PRESENT` names; the bundle has the rest:
this package, built here against an old glibc, what it needs at run time, and the peers of the
suite. `make gpu-suite` installs the folder beside itself there, and changes nothing that is there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections import Counter
from email import message_from_bytes
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parents[1]
LIMIT_MB = 60
GLIBC = (2, 28)
PYTHON = "3.12"

# Our dependencies and theirs. Versions are those of the test set, from constraints.txt.
NEEDED = (
    "annotated-types", "datasets", "defusedxml", "dill", "docstring-parser", "multiprocess",
    "nltk", "pydantic", "pydantic-core", "typeguard", "typing-extensions", "typing-inspection",
    "tyro",
)  # fmt: skip
# No wheel on the index, and nothing in it to compile.
NEEDED_SOURCES = ("rouge-score",)
PEERS = ("cut-cross-entropy==25.1.1", "liger-kernel==0.8.5", "trl==1.16.0")
# What the machine brings; older or newer there is as it is, only absence would matter.
PRESENT = frozenset({
    "absl-py", "accelerate", "click", "filelock", "fsspec", "huggingface-hub", "jinja2", "joblib",
    "numpy", "packaging", "pandas", "psutil", "pyarrow", "pyyaml", "regex", "rich", "safetensors",
    "six", "torch", "tqdm", "transformers", "triton", "xxhash",
})  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> None:
    """Makes the folder anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / ".gpu-bundle")
    output: Path = parser.parse_args().output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    check_own_wheel(build_own_wheel(output))
    download(output)
    report(output)


def build_own_wheel(output: Path) -> Path:
    """Our wheel, linked by zig against the old glibc, whatever this machine's is."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        tools = Path(folder) / "bin"
        run([str(tools / "python"), "-m", "pip", "install", "--quiet", "maturin[zig]>=1.9.4,<2"])
        # maturin finds zig through the first python3 of the path.
        path = os.pathsep.join([str(tools), os.environ["PATH"]])
        compatibility = f"manylinux_{GLIBC[0]}_{GLIBC[1]}"
        run(
            [
                str(tools / "maturin"), "build", "--quiet", "--release", "--strip", "--zig",
                "--compatibility", compatibility, "--interpreter", sys.executable,
                "--target-dir", str(ROOT / "target" / "manylinux"), "--out", str(output),
            ],
            environment={**os.environ, "PATH": path},
        )  # fmt: skip
    (wheel,) = output.glob("gad_fast-*.whl")
    return wheel


def check_own_wheel(wheel: Path) -> None:
    """Exits unless the wheel runs on any Python from 3.11 and any glibc from 2.28, and is whole."""
    tags = {str(tag) for tag in parse_wheel_filename(wheel.name)[3]}
    wanted = f"cp311-abi3-manylinux_{GLIBC[0]}_{GLIBC[1]}_x86_64"
    if wanted not in tags:
        raise SystemExit(f"{wheel.name} is not for {wanted}")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        missing = {"gad_fast/_core.abi3.so", "gad_fast/kernels/token_logprobs.py"} - names
        if missing:
            raise SystemExit(f"{wheel.name} lacks {', '.join(sorted(missing))}")
        library = archive.read("gad_fast/_core.abi3.so")
    # The names of the symbol versions that it asks the loader for.
    versions = {(int(a), int(b)) for a, b in re.findall(rb"GLIBC_(\d+)\.(\d+)", library)}
    if max(versions, default=GLIBC) > GLIBC:
        raise SystemExit(f"{wheel.name} needs glibc {max(versions)}, above {GLIBC}")


def download(output: Path) -> None:
    """What we need and the peers, as wheels for the machine."""
    pip = [sys.executable, "-m", "pip"]
    common = ["--quiet", "--no-deps", "--constraint", str(ROOT / "constraints.txt")]
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    abis = ["--implementation=cp", "--abi=cp312", "--abi=abi3", "--abi=none"]
    target = ["--only-binary=:all:", f"--python-version={PYTHON}", *abis, *platforms]
    run([*pip, "download", *common, *target, "--dest", str(output), *NEEDED, *PEERS])
    run([*pip, "wheel", *common, "--wheel-dir", str(output), *NEEDED_SOURCES])


def report(output: Path) -> None:
    """Sizes; exits when something is missing, twice there, or the whole too large."""
    wheels = sorted(output.glob("*.whl"))
    names = Counter(parse_wheel_filename(wheel.name)[0] for wheel in wheels)
    twice = [name for name, count in names.items() if count > 1]
    missing = {name for wheel in wheels for name in needs_of(wheel)} - set(names) - PRESENT
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:6.2f} MB  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{total:6.2f} MB  {output}, of at most {LIMIT_MB}")
    if twice or missing or total > LIMIT_MB:
        raise SystemExit(f"twice: {twice}; missing: {sorted(missing)}; too large: {total:.0f} MB")


def needs_of(wheel: Path) -> set[str]:
    """Names of what a wheel needs on the machine, without extras."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
    machine = {"python_version": PYTHON, "sys_platform": "linux", "extra": ""}
    needs = [Requirement(line) for line in lines]
    return {
        canonicalize_name(need.name)
        for need in needs
        if need.marker is None or need.marker.evaluate(machine)
    }


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Runs a command; its failure is the script's."""
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[:4])} ... failed, see above")


if __name__ == "__main__":
    main()
