"""What the compiler says of the kernels, on a machine that cannot run them."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HAS_PTXAS = sys.platform == "linux" and platform.machine() == "x86_64"


@pytest.mark.skipif(not HAS_PTXAS, reason="Triton ships ptxas in its Linux x86-64 wheel only")
def test_shipped_configurations_compile_without_spills(tmp_path):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        # Fresh, so that the compiler is tested and not the cache of an earlier run.
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    program = Path(__file__).with_name("ahead_of_time.py")
    result = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    records = json.loads(result.stdout)
    # Kernels, vocabularies, dtypes, architectures.
    assert len(records) == 2 * 2 * 2 * 2
    assert [record for record in records if record["spill_bytes"] > 0] == []
