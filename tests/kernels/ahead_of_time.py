"""Compile every shipped kernel configuration for a GPU without having one, and print what it uses.

A program of its own, since the kernels must be decorated without TRITON_INTERPRET. Prints a list of
records in JSON: kernel, arch, dtype, V, registers, spill_bytes, shared_bytes.
"""

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90)
# Qwen's, whose rows are aligned, and GPT-2's, whose rows are not: other loads, so other registers.
VOCABULARIES = (151936, 50257)
LOGITS_DTYPES = ("bf16", "fp32")
# Of arguments that are not a pointer to fp32.
ARGUMENT_TYPES = {
    "labels": "*i64",
    "row_stride": "i32",
    "V": "i32",
    "scale": "fp32",
    "inverse_temperature": "fp32",
    "BLOCK_V": "constexpr",
}
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def shipped_configurations() -> list[tuple[Any, dict[str, int], int]]:
    """List kernel, launch configuration and vocabulary size."""
    module = importlib.import_module("gad_fast.kernels.token_logprobs")
    kernels = (
        (module._fwd_kernel, module._MAX_FORWARD_BLOCK),
        (module._bwd_kernel, module._MAX_BACKWARD_BLOCK),
    )
    return [
        (kernel, module._launch_config(V, max_block), V)
        for kernel, max_block in kernels
        for V in VOCABULARIES
    ]


def compile_kernel(kernel: Any, config: dict[str, int], V: int, dtype: str, arch: int) -> Any:
    """Compile with the types and the divisibility by 16 that a launch on such logits would find."""
    types = {"logits": f"*{dtype}", "grad_logits": f"*{dtype}"} | ARGUMENT_TYPES
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    divisible = [
        name
        for name, kind in signature.items()
        if kind.startswith("*") or (name in ("V", "row_stride") and V % 16 == 0)
    ]
    return triton.compile(
        ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={"BLOCK_V": config["BLOCK_V"]},
            attrs={
                (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible
            },
        ),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config["num_warps"]},
    )


def resource_usage(ptx: str, arch: int) -> dict[str, int]:
    """Assemble once more, verbosely: the registers and spills that ptxas reports."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        # Triton builds for 90a, which is 90 with its own instructions.
        target = f"sm_{arch}a" if arch == 90 else f"sm_{arch}"
        command = [PTXAS, "-v", f"--gpu-name={target}", source, "-o", source.with_suffix(".cubin")]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert registers is not None, report
    assert spills, report
    return {"registers": int(registers[1]), "spill_bytes": sum(map(int, spills))}


def measure(case: tuple[tuple[Any, dict[str, int], int], str, int]) -> dict[str, Any]:
    """Compile one configuration and return its record."""
    (kernel, config, V), dtype, arch = case
    compiled = compile_kernel(kernel, config, V, dtype, arch)
    labels = {"kernel": kernel.__name__, "arch": arch, "dtype": dtype, "V": V}
    usage = resource_usage(compiled.asm["ptx"], arch)
    return labels | usage | {"shared_bytes": compiled.metadata.shared}


def main() -> None:
    """Print the records of all cases."""
    cases = list(itertools.product(shipped_configurations(), LOGITS_DTYPES, ARCHITECTURES))
    # Most of the time goes to ptxas, a program of its own, so threads share it out.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        records = list(pool.map(measure, cases))
    json.dump(records, sys.stdout)


if __name__ == "__main__":
    main()
