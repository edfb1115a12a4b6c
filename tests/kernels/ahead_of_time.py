"""Compile every shipped kernel configuration for GPUs without having one, and say what it uses.

A program of its own, since the kernels must be decorated without TRITON_INTERPRET. Prints a list of
records in JSON; with `--table`, writes them to docs/kernel_registers.md instead.

To add a kernel, yield a `Case` of it from one of the functions in `CASES`.
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gad_fast.kernels import linear_kernels, logprob_kernels, policy_row_kernel
from gad_fast.kernels.bradley_terry_loss import bradley_terry_kernel
from gad_fast.kernels.bradley_terry_loss import launch_config as bradley_terry_config
from gad_fast.kernels.group_advantages import group_advantages_kernel
from gad_fast.kernels.group_advantages import launch_config as group_advantages_config
from gad_fast.kernels.last_token_score import backward_launch_config as score_backward_config
from gad_fast.kernels.last_token_score import launch_config as score_config
from gad_fast.kernels.last_token_score import score_backward_kernel, score_kernel
from gad_fast.kernels.linear_tiles import TILES, Tile, exp_config, merge_config
from gad_fast.kernels.logprob_kernels import MAX_BACKWARD_BLOCK, MAX_FORWARD_BLOCK
from gad_fast.kernels.policy_loss import BLOCK_T, policy_loss_kernel
from gad_fast.kernels.policy_objective import PolicyObjective, kernel_options

ARCHITECTURES = (80, 90)
# Qwen's, whose rows are aligned, and GPT-2's, whose rows are not: other loads, so other registers.
VOCABULARIES = (151936, 50257)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TABLE = Path(__file__).parents[2] / "docs" / "kernel_registers.md"

# Objectives that between them take every arm of `policy_token`.
OBJECTIVES = {
    "ppo, dual clip, k3": PolicyObjective(clip_ratio_c=3.0, kl_coef=0.1, entropy_coef=0.1),
    "cispo, k2": PolicyObjective("cispo", kl_coef=0.1, kl_type="k2"),
}


class Case(NamedTuple):
    """One configuration of a kernel, as a launch would specialise it."""

    kernel: Any
    note: str
    """What tells it from the kernel's other configurations."""
    types: Mapping[str, str | None]
    """Of arguments, None for one that is None; those that `type_of` knows need no entry."""
    config: dict[str, Any]
    """Constants, warps and stages, as the launch passes them."""
    architectures: tuple[int, ...] = ARCHITECTURES
    unaligned: tuple[str, ...] = ()
    """Sizes that 16 does not divide."""


_INTEGER = re.compile(r"[A-Z]|\w+_stride|first_v")
_FLOAT = re.compile(r"logit_scale|clip_\w+|\w+_coef|eps|std_floor")


def type_of(name: str) -> str:
    """The type of an argument whose case leaves it out, by what kernels call it."""
    if name == "labels":
        return "*i64"
    if _FLOAT.fullmatch(name):
        return "fp32"
    return "i32" if _INTEGER.fullmatch(name) else "*fp32"


def row_cases() -> Iterator[Case]:
    """The kernels over rows of logits."""
    for V in VOCABULARIES:
        unaligned = () if V % 16 == 0 else ("V", "row_stride")
        for dtype in ("bf16", "fp32"):
            types = {"logits": f"*{dtype}", "grad_logits": f"*{dtype}", "mask": None}
            for kernel, max_block in (
                (logprob_kernels.token_logprobs_kernel, MAX_FORWARD_BLOCK),
                (logprob_kernels.token_logprobs_backward_kernel, MAX_BACKWARD_BLOCK),
            ):
                config = logprob_kernels.launch_config(V, max_block, None)
                note = f"{dtype}, V={V}"
                yield Case(kernel, note, types | {"softcap": None}, config, unaligned=unaligned)
                if VOCABULARIES[0] == V and dtype == "bf16":
                    capped = types | {"softcap": "fp32", "mask": "*i1"}
                    config = logprob_kernels.launch_config(V, max_block, 30.0)
                    yield Case(kernel, f"{note}, cap, mask", capped, config)
    for is_inplace in (False, True):
        types = {"gradient": "*bf16", "scaled": "*bf16"}
        config = logprob_kernels.scale_config(is_inplace)
        yield Case(logprob_kernels.scale_kernel, "in place" * is_inplace, types, config)


def policy_cases() -> Iterator[Case]:
    """The policy losses, from log-probabilities and from rows of logits."""
    V = VOCABULARIES[0]
    for note, objective in OBJECTIVES.items():
        options = kernel_options(objective, has_reference=True)
        constants = {name: value for name, value in options.items() if name.isupper()}
        yield Case(policy_loss_kernel, note, {}, constants | {"BLOCK_T": BLOCK_T})
        constants["HAS_ENTROPY"] = objective.entropy_coef != 0
        for cap in (None, 30.0) if constants["HAS_ENTROPY"] else (None,):
            types = {"logits": "*bf16", "grad_logits": "*bf16", "softcap": cap and "fp32"}
            config = logprob_kernels.launch_config(V, policy_row_kernel.MAX_BLOCK, cap)
            yield Case(
                policy_row_kernel.policy_loss_row_kernel,
                note + ", cap" * (cap is not None), types, constants | config,
            )  # fmt: skip


def linear_cases() -> Iterator[Case]:
    """The kernels over tiles of logits, plain and with all that a head may have."""
    for (arch, name), tile in TILES.items():
        kernel = linear_kernels.linear_stats_kernel
        types = [("", {"exponentials": "*bf16" if name == "stats_exp" else None})]
        if name.startswith("grad"):
            kernel = linear_kernels.linear_grad_kernel
            types = [("", {"grad_entropy": None}), (", entropy", {"grad_entropy": "*fp32"})]
        for note, head in HEADS[name].items():
            for more, output in types:
                given = _operands(tile) | head | output | {"grad_logits": "*bf16"}
                config = tile._asdict() | {"IS_ROUNDED": "rounded" in note}
                yield Case(kernel, f"{name}: {note}{more}", given, config, (arch,))
    yield Case(linear_kernels.merge_stats_kernel, "", {}, merge_config())
    for note, kind in (("plain", None), ("entropy", "*fp32")):
        types = {"exponentials": "*bf16", "grad_entropy": kind}
        config = exp_config(TILES[90, "stats_exp"].BLOCK_V)
        yield Case(linear_kernels.exp_to_grad_kernel, note, types, config)


HEADS: dict[str, dict[str, dict[str, str | None]]] = {
    "stats": {
        "plain": {"bias": None, "softcap": None},
        "bias, cap, rounded": {"bias": "*bf16", "softcap": "fp32"},
    },
    "stats_exp": {
        "plain": {"bias": None, "softcap": None},
        "bias, rounded": {"bias": "*bf16", "softcap": None},
    },
    "grad": {"bias": {"bias": "*bf16", "softcap": None}},
    "grad_shaped": {"bias, cap, rounded": {"bias": "*bf16", "softcap": "fp32"}},
}


def _operands(tile: Tile) -> dict[str, str | None]:
    if not tile.HAS_TMA:
        return {"hidden": "*bf16", "weight": "*bf16"}
    return {
        name: f"tensordesc<bf16[{num_rows}, {tile.BLOCK_D}]>"
        for name, num_rows in (("hidden", tile.BLOCK_T), ("weight", tile.BLOCK_V))
    }


def score_cases() -> Iterator[Case]:
    """The kernels of the discriminator and of its rewards."""
    absent = dict.fromkeys(("lengths", "attention_mask", "cu_seqlens"))
    operands = {"hidden": "*bf16", "weight": "*bf16", "bias": "*bf16", "last_hidden": "*bf16"}
    operands["rows"] = "*i64"
    for name, kind in (("lengths", "*i64"), ("attention_mask", "*i64"), ("cu_seqlens", "*i32")):
        yield Case(score_kernel, name, operands | absent | {name: kind}, score_config(3584))
    grads = operands | {"grad_hidden": "*bf16", "grad_weight": "*bf16"}
    yield Case(score_backward_kernel, "", grads, score_backward_config())
    for G in (8, 1000):
        yield Case(bradley_terry_kernel, f"G={G}", {}, bradley_terry_config(G))
        for kind in (True, False):
            choice = {"IS_SCALED": kind, "LEAVE_ONE_OUT": not kind}
            note = f"G={G}, {'std' if kind else 'leave one out'}"
            config = group_advantages_config(G) | choice
            yield Case(group_advantages_kernel, note, {}, config)


CASES = (row_cases, policy_cases, linear_cases, score_cases)


def compile_case(case: Case, arch: int) -> Any:
    """Compile with the types and the divisibility by 16 that a launch would find."""
    names = case.kernel.arg_names
    constants: dict[str, Any] = {name: None for name, kind in case.types.items() if kind is None}
    constants = {name: v for name, v in (constants | case.config).items() if name in names}
    signature = {
        name: "constexpr" if name in constants else case.types.get(name) or type_of(name)
        for name in names
    }
    divisible = [
        name
        for name, kind in signature.items()
        if kind.startswith("*") or (kind == "i32" and name not in case.unaligned)
    ]
    return triton.compile(
        ASTSource(
            fn=case.kernel,
            signature=signature,
            constexprs=constants,
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
        ),
        target=GPUTarget("cuda", arch, 32),
        options={name: value for name, value in case.config.items() if name not in names},
    )


def resource_usage(ptx: str, arch: int) -> dict[str, Any]:
    """Assemble once more, verbosely: what ptxas reports, and the instructions it chose."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        binary = source.with_suffix(".cubin")
        # Triton builds for 90a, which is 90 with its own instructions.
        target = f"sm_{arch}a" if arch == 90 else f"sm_{arch}"
        report = _run("ptxas", "-v", f"--gpu-name={target}", source, "-o", binary).stderr
        has_products = "mma." in ptx
        code = _run("cuobjdump", "-sass", binary).stdout if has_products else ""
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert registers is not None, report
    assert spills, report
    instructions = collections.Counter(re.findall(r"\b(HGMMA|HMMA)\.", code))
    return {
        "registers": int(registers[1]),
        "spill_bytes": sum(map(int, spills)),
        "hgmma": instructions["HGMMA"],
        "hmma": instructions["HMMA"],
        # C7515: products of warp groups that run one after the other.
        "warnings": sorted(set(re.findall(r"\((C\d+)\)", report))),
    }


def _run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True)


def measure(case: Case, arch: int) -> dict[str, Any]:
    """Compile one configuration and return its record."""
    compiled = compile_case(case, arch)
    return {
        "kernel": case.kernel.__name__,
        "note": case.note,
        "arch": arch,
        "has_dot": "BLOCK_D" in case.config and "HAS_TMA" in case.config,
        "num_warps": case.config.get("num_warps", 4),
        "shared_bytes": compiled.metadata.shared,
    } | resource_usage(compiled.asm["ptx"], arch)


INTRODUCTION = f"""# What the kernels use

Written by `python tests/kernels/ahead_of_time.py --table`, with Triton {triton.__version__} and the
ptxas of its wheel: registers a thread, of 255; bytes of shared memory a block; matrix instructions
in the code. It is what the compiler says, and nothing about time.
"""


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown."""
    columns = {
        "kernel": "kernel", "note": "configuration", "arch": "sm", "num_warps": "warps",
        "registers": "registers", "spill_bytes": "spilled bytes", "shared_bytes": "shared bytes",
        "hgmma": "HGMMA", "hmma": "HMMA",
    }  # fmt: skip
    lines = [INTRODUCTION]
    lines.append("| " + " | ".join(columns.values()) + " |")
    lines.append("|" + "---|" * len(columns))
    lines += ["| " + " | ".join(str(record[key]) for key in columns) + " |" for record in records]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the records of all cases, or write the table."""
    cases = [(case, arch) for make in CASES for case in make() for arch in case.architectures]
    # Most of the time goes to ptxas, a program of its own, so threads share it out.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        records = list(pool.map(lambda job: measure(*job), cases))
    if "--table" in sys.argv:
        TABLE.write_text(table(records))
    else:
        json.dump(records, sys.stdout)


if __name__ == "__main__":
    main()
