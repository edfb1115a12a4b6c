"""Plants bugs in the kernels, one at a time, and shows that the tests catch each.

    python tests/kernels/mutations.py            all of them; `make mutants`
    python tests/kernels/mutations.py NAME ...   some
    python tests/kernels/mutations.py --table    the table of docs/mutations.md

Every bug is one that somebody shipped, or a slip of the same kind. A bug is planted in a copy of
the package, and the test that should see it is run against that copy.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
    """A bug: what it does, where, and which tests must fail."""

    bug: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = {
    "tail": Mutant(
        "columns past the vocabulary count as logits of 0",
        "logprob_kernels.py",
        "other=MINUS_INFINITY, eviction_policy=EVICTION",
        "other=0.0, eviction_policy=EVICTION",
        "test_token_logprobs.py -k triton-fp32-257",
    ),
    "start-at-0": Mutant(
        "the running maximum starts at 0, so very negative rows underflow",
        "logprob_kernels.py",
        "_LOWEST_MAXIMUM = tl.constexpr(-1e30)",
        "_LOWEST_MAXIMUM = tl.constexpr(0.0)",
        "test_token_logprobs.py -k extreme",
    ),
    "bf16-p-minus-1": Mutant(
        "p is rounded to bfloat16 before 1 is taken from it at the label",
        "logprob_kernels.py",
        "b_p = tl.exp2(b_log2_p)\n    b_grad",
        "b_p = tl.exp2(b_log2_p).to(tl.bfloat16).to(tl.float32)\n    b_grad",
        "test_token_logprobs.py -k triton-bf16-257",
    ),
    "unshifted-entropy": Mutant(
        "the weighted sum is not moved to the new maximum",
        "logprob_kernels.py",
        "weighted = (weighted + shift * total) * rescale",
        "weighted = weighted * rescale",
        "test_token_logprobs.py -k triton-fp32-1000",
    ),
    "tile-merge": Mutant(
        "merging tiles forgets that a lower maximum shifts the entropy's sum",
        "linear_kernels.py",
        "(b_tile_weighted + b_tile_shift * b_tile_total)",
        "(b_tile_weighted)",
        "test_linear_token_logprobs.py -k triton",
    ),
    "no-temperature-in-gradient": Mutant(
        "the gradient of the logits is not divided by the temperature",
        "chunked_torch.py",
        "return self.logit_scale * self.inverse_temperature",
        "return self.logit_scale * torch.ones_like(self.inverse_temperature)",
        "test_linear_policy_loss.py -k head_options",
    ),
    "softcap-chain": Mutant(
        "the derivative of the softcap is left out",
        "chunked_torch.py",
        "derivative = 1 - x.square()",
        "derivative = torch.ones_like(x)",
        "test_linear_policy_loss.py -k head_options",
    ),
    "normaliser-drift": Mutant(
        "a micro-batch divides by its own tokens, not by those of the step",
        "policy_inputs.py",
        'num_tokens = options.get("num_tokens")',
        "num_tokens = None",
        "test_policy_loss.py -k micro_batches",
    ),
    "clip-keeps-gradient": Mutant(
        "a clipped token keeps its gradient",
        "policy_objective.py",
        "grad = free.masked_fill(is_clipped, 0.0)",
        "grad = free",
        "test_policy_loss.py -k torch",
    ),
    "dual-clip-both-signs": Mutant(
        "the dual clip binds for good tokens too",
        "policy_objective.py",
        "is_dual = tl.where((advantage < 0) & (pg > bound), 1.0, 0.0)",
        "is_dual = tl.where(pg > bound, 1.0, 0.0)",
        "test_policy_loss.py -k triton",
    ),
    "k3-sign": Mutant(
        "the KL pushes the student away from its reference",
        "policy_objective.py",
        'return growth - d, -growth if kl_type == "k3" else -d',
        'return growth - d, growth if kl_type == "k3" else d',
        "test_policy_loss.py -k torch",
    ),
    "entropy-sign": Mutant(
        "the entropy bonus is a penalty, in the gradient only",
        "policy_row_kernel.py",
        "weight * grad, -weight * entropy_coef,",
        "weight * grad, weight * entropy_coef,",
        "test_policy_loss_from_logits.py -k triton",
    ),
    "masked-by-product": Mutant(
        "masked tokens are multiplied by 0, so what they hold comes through as NaN",
        "policy_loss.py",
        "b_loss = tl.where(b_weight != 0, b_weight * b_loss, 0.0)",
        "b_loss = b_weight * b_loss",
        "test_policy_loss.py -k masked_tokens",
    ),
    "one-chunk-only": Mutant(
        "each chunk overwrites the weight's gradient",
        "chunked_linear.py",
        "total.addmm_(a, b, beta=0.0 if is_first else 1.0)",
        "total.addmm_(a, b, beta=0.0)",
        "test_linear_policy_loss.py -k chunks",
    ),
    "gradient-scaled-once": Mutant(
        "the upstream gradient is taken to be 1",
        "linear_policy_loss.py",
        "scaled_gradient(torch.atleast_2d(grad), grad_outputs[0], ctx.backend).view_as(grad)",
        "grad",
        "test_linear_policy_loss.py -k whole_logits",
    ),
    "population-std": Mutant(
        "advantages are divided by the population's standard deviation",
        "group_advantages.py",
        "tl.sum(b_centred * b_centred, 0) / DEGREES",
        "tl.sum(b_centred * b_centred, 0) / G",
        "test_group_advantages.py -k triton",
    ),
    "teacher-and-student-swapped": Mutant(
        "the discriminator learns to prefer the rollouts",
        "bradley_terry_loss.py",
        "b_gap = teacher - b_student",
        "b_gap = b_student - teacher",
        "test_bradley_terry_loss.py -k triton",
    ),
    "last-token-off-by-one": Mutant(
        "the score is read one token early",
        "last_token_score.py",
        "row = last_row(lengths, attention_mask, cu_seqlens, i_b, L, BLOCK_L)\n    is_there",
        "row = last_row(lengths, attention_mask, cu_seqlens, i_b, L, BLOCK_L) - 1\n    is_there",
        "test_last_token_score.py -k triton",
    ),
}


def is_caught(mutant: Mutant) -> bool:
    """Whether the tests fail on a copy of the package that has the bug, and not by an accident."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "gad_fast"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "python" / "gad_fast", package, ignore=ignored)
        source = package / "kernels" / mutant.file
        text = source.read_text()
        assert text.count(mutant.old) == 1, f"{mutant.file} has not one {mutant.old!r}"
        source.write_text(text.replace(mutant.old, mutant.new))
        file, *selection = mutant.tests.split(" ", 2)
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", f"tests/kernels/{file}", *selection],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    # 1 is "tests failed"; anything else, no tests or a broken import, proves nothing.
    assert result.returncode in (0, 1), result.stdout + result.stderr
    return result.returncode == 1


def table() -> str:
    """The planted bugs as a table in Markdown."""
    rows = [f"| {m.bug} | `{m.file}` | `{m.tests}` |" for m in MUTANTS.values()]
    return "\n".join(["| bug | planted in | caught by |", "|---|---|---|", *rows])


def main(arguments: list[str]) -> int:
    """Print what became of each mutant; the number of those that survived."""
    if arguments == ["--table"]:
        print(table())
        return 0
    survivors = 0
    for name in arguments or MUTANTS:
        caught = is_caught(MUTANTS[name])
        survivors += not caught
        print(f"{'caught  ' if caught else 'SURVIVED'} {name}: {MUTANTS[name].bug}", flush=True)
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
