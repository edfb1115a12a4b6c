"""What the compiler says of the kernels, on a machine that cannot run them."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HAS_PTXAS = sys.platform == "linux" and platform.machine() == "x86_64"
PROGRAM = Path(__file__).with_name("ahead_of_time.py")
KERNELS = Path(__file__).parents[2] / "kernels"
# What a block may have: 164 KiB on an A100 and 228 KiB on an H100, of which the system takes 1.
MAX_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}

pytestmark = [
    pytest.mark.skipif(not HAS_PTXAS, reason="Triton ships ptxas in its Linux x86-64 wheel only"),
    # Half a minute on two cores, and more where they are shared.
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One record for each configuration and architecture."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        # Fresh, so that the compiler is tested and not the cache of an earlier run.
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    result = subprocess.run(
        [sys.executable, PROGRAM], env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_kernel_is_compiled_for_every_architecture(records):
    names = {
        name
        for path in KERNELS.glob("*.py")
        for name in re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", path.read_text())
    }
    assert {(r["kernel"], r["arch"]) for r in records} == {(n, a) for n in names for a in (80, 90)}


def test_no_kernel_spills_registers(records):
    assert [record for record in records if record["spill_bytes"] > 0] == []


def test_shared_memory_fits_the_gpu(records):
    assert [r for r in records if r["shared_bytes"] > MAX_SHARED_BYTES[r["arch"]]] == []


def test_products_use_the_matrix_units(records):
    with_dot = [record for record in records if record["has_dot"]]
    assert with_dot
    instructions = {80: "hmma", 90: "hgmma"}
    assert [r for r in with_dot if r[instructions[r["arch"]]] == 0] == []


def test_no_product_waits_for_another(records):
    assert [record for record in records if "C7515" in record["warnings"]] == []
