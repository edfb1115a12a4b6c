"""`linear_token_logprobs` against float64 autograd over whole logits."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gad_fast.kernels import chunked_linear
from gad_fast.kernels import linear_logprobs_op as module
from gad_fast.kernels.linear_tiles import TILES
from gad_fast.kernels.linear_token_logprobs import (
    linear_token_logprobs,
    linear_token_logprobs_reference,
)
from kernel_cases import DEVICE, each_backend, needs_triton, peaked_head, relative_error
from linear_cases import D, T, V, each_path, gradients, leaves, logprobs, normal, shrink_tiles

WORKSPACE_MB = 2 * 48 * 128 / 2**20  # 128 columns of all tokens, or 2 tokens of the torch path
# Log-probability: sums of bf16 products in fp32. Entropy: p log p of a thousand terms besides.
LOGP_ATOL = {torch.bfloat16: 2e-5, torch.float32: 2e-5, torch.float64: 1e-10}
ENTROPY_ATOL = {torch.bfloat16: 1e-4, torch.float32: 1e-4, torch.float64: 1e-10}
# Relative norm: one rounding of dZ and one of the product to bf16; fp32 sums.
GRAD_ERROR = {torch.bfloat16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_tiles(monkeypatch)


HEADS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0.8},
    "bias": {"bias": normal(V)},
    "all": {
        "bias": normal(V),
        "softcap": 12.0,
        "logit_scale": 0.9,
        "temperature": 0.5 + normal(T).abs(),
    },
}
each_head = pytest.mark.parametrize("head", HEADS)


def options_of(head: str, dtype: torch.dtype) -> dict[str, Any]:
    """Keywords for a head, its bias in the dtype of the operands."""
    options = dict(HEADS[head])
    if "bias" in options:
        options["bias"] = options["bias"].to(dtype)
    return options


def check(
    hidden: Tensor, weight: Tensor, labels: Tensor, options: dict[str, Any], used: str = "both",
    **paths: Any,
) -> None:  # fmt: skip
    """Values and gradients of the operation against those of the reference in float64."""
    inputs = leaves(hidden, weight, options.get("bias"))
    bias = {"bias": inputs[2]} if len(inputs) == 3 else {}
    outputs = logprobs(inputs[:2], labels, return_entropy=True, **{**options, **bias, **paths})
    actual = gradients(outputs, inputs, used)

    doubles = leaves(*(x.double() for x in inputs))
    bias = {"bias": doubles[2]} if len(inputs) == 3 else {}
    expected = linear_token_logprobs_reference(
        doubles[0], doubles[1], labels, **{**options, **bias}
    )
    dtype = hidden.dtype
    assert {x.dtype for x in outputs} == {torch.promote_types(dtype, torch.float32)}
    assert_close(outputs[0].double(), expected[0], rtol=0, atol=LOGP_ATOL[dtype])
    assert_close(outputs[1].double(), expected[1], rtol=0, atol=ENTROPY_ATOL[dtype])
    for grad, true_grad, leaf in zip(
        actual, gradients(expected, doubles, used), inputs, strict=True
    ):
        assert grad.dtype == leaf.dtype
        assert relative_error(grad, true_grad) < GRAD_ERROR[dtype]


@pytest.mark.parametrize("used", ["logp", "entropy", "both"])
@each_head
@each_path
def test_values_and_gradients_match_the_reference(backend, dtype, head, used):
    check(*peaked_head(T, D, V, dtype), options_of(head, dtype), used, backend=backend)


@each_head
@each_path
def test_parts_of_a_small_workspace_match_the_reference(backend, dtype, head, monkeypatch):
    parts = []
    whole = chunked_linear.head_gradients

    def head_gradients(*args, **kwargs):
        parts.append((len(args[4]), len(args[5])))
        return whole(*args, **kwargs)

    monkeypatch.setattr(module, "head_gradients", head_gradients)
    for workspace in (WORKSPACE_MB, 1e-5):
        check(
            *peaked_head(T, D, V, dtype),
            options_of(head, dtype),
            backend=backend,
            max_workspace_mb=workspace,
        )
    if backend == "triton":
        assert parts == [(1, 3), (2, 3)]
    else:
        assert {slices for _, slices in parts} == {1}
        assert parts[1][0] == T


@pytest.mark.parametrize("has_tma", [True, False])
@needs_triton
def test_shipped_tiles_match_the_reference(has_tma, monkeypatch):
    monkeypatch.undo()
    for name in ("stats", "grad", "grad_shaped"):
        monkeypatch.setitem(TILES, (90, name), TILES[90 if has_tma else 80, name])  # pyright: ignore[reportArgumentType]
    for head in HEADS:
        check(*peaked_head(T, 72, V, torch.bfloat16), options_of(head, torch.bfloat16),
              backend="triton")  # fmt: skip


@each_backend
def test_bfloat16_is_no_worse_than_eager(backend):
    hidden, weight, labels = peaked_head(T, D, V, torch.bfloat16)

    def errors(function) -> list[float]:
        inputs = leaves(hidden, weight)
        outputs = function(*inputs)
        return [relative_error(x, y) for x, y in
                zip([*outputs, *gradients(outputs, inputs)], truth, strict=True)]  # fmt: skip

    doubles = leaves(hidden.double(), weight.double())
    true_outputs = linear_token_logprobs_reference(doubles[0], doubles[1], labels)
    truth = [*true_outputs, *gradients(true_outputs, doubles)]
    ours = errors(
        lambda x, w: linear_token_logprobs(x, w, labels, return_entropy=True, backend=backend)
    )
    eager = errors(lambda x, w: linear_token_logprobs_reference(x, w, labels))
    assert all(a <= 1.5 * b for a, b in zip(ours, eager, strict=True)), (ours, eager)


@each_backend
def test_bfloat16_logits_are_those_of_an_engine_with_such_a_head(backend):
    hidden, weight, labels = peaked_head(T, D, V, torch.bfloat16)
    logits = (hidden.float() @ weight.float().t()).bfloat16().double()
    expected = torch.log_softmax(logits, -1).gather(-1, labels[:, None]).squeeze(-1)
    rounded, exact = (
        linear_token_logprobs(hidden, weight, labels, logits_dtype=kind, backend=backend)
        for kind in ("bfloat16", "float32")
    )
    # A sum in another order is rounded to the other side now and then.
    assert_close(rounded.double(), expected, rtol=0, atol=1e-3)
    if backend == "triton":
        assert (exact - expected).abs().max() > 1e-2


@each_path
def test_bfloat16_logits_have_the_gradient_of_the_rounded_values(backend, dtype):
    hidden, weight, labels = peaked_head(T, D, V, dtype)
    inputs = leaves(hidden, weight)
    logp = logprobs(inputs, labels, logits_dtype="bfloat16", backend=backend)
    actual = gradients((logp, logp), inputs, "logp")
    doubles = leaves(hidden.double(), weight.double())
    z = doubles[0] @ doubles[1].t()
    rounded = z + (z.bfloat16().double() - z).detach()
    log_p = torch.log_softmax(rounded, -1).gather(-1, labels[:, None]).squeeze(-1)
    for grad, true_grad in zip(actual, gradients((log_p, log_p), doubles, "logp"), strict=True):
        assert relative_error(grad, true_grad) < 4e-3


@each_path
def test_tokens_that_do_not_count_may_hold_anything(backend, dtype):
    hidden, weight, labels = peaked_head(T, D, V, dtype)
    mask = torch.arange(T, device=DEVICE) % 3 != 1
    kept = mask & (torch.arange(T, device=DEVICE) % 4 != 2)
    clean = leaves(hidden[kept], weight)
    expected = logprobs(clean, labels[kept], return_entropy=True, backend=backend)
    hidden[~kept] = torch.nan
    labels[~mask], labels[mask & ~kept] = V + 7, -100
    inputs = leaves(hidden, weight)
    outputs = logprobs(inputs, labels, mask=mask, return_entropy=True, backend=backend)
    for output, true_output in zip(outputs, expected, strict=True):
        assert torch.equal(output[kept], true_output)
        assert not output[~kept].any()
    actual = torch.autograd.grad((outputs[0] + outputs[1]).sum(), inputs)
    true_grads = torch.autograd.grad((expected[0] + expected[1]).sum(), clean)
    assert torch.equal(actual[0][kept], true_grads[0])
    assert not actual[0][~kept].any()
    assert torch.equal(actual[1], true_grads[1])


@pytest.mark.parametrize("num_tokens", [0, 3])
@each_path
def test_nothing_kept_gives_zeros(backend, dtype, num_tokens):
    hidden, weight, labels = peaked_head(3, D, V, dtype)
    inputs = leaves(hidden[:num_tokens], weight, normal(V).to(dtype))
    labels = torch.full_like(labels[:num_tokens], -100)
    logp = logprobs(inputs[:2], labels, bias=inputs[2], backend=backend)
    assert logp.shape == (num_tokens,)
    assert not logp.any()
    for grad, leaf in zip(torch.autograd.grad(logp.sum(), inputs), inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@each_path
def test_without_ignore_index_all_tokens_count(backend, dtype):
    hidden, weight, labels = peaked_head(T, D, V, dtype)
    everything = linear_token_logprobs(hidden, weight, labels, ignore_index=None, backend=backend)
    # An index that is a token of the vocabulary.
    token = int(labels[4])
    some = linear_token_logprobs(hidden, weight, labels, ignore_index=token, backend=backend)
    assert not some[labels == token].any()
    assert torch.equal(some[labels != token], everything[labels != token])


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
@each_backend
def test_what_needs_no_gradient_costs_no_product(backend, needs, monkeypatch):
    dtype = torch.bfloat16 if backend == "triton" else torch.float32
    hidden, weight, labels = peaked_head(T, D, V, dtype)
    inputs = leaves(hidden, weight, normal(V).to(dtype))
    for leaf, is_needed in zip(inputs, needs, strict=True):
        leaf.requires_grad_(is_needed)
    shapes, product = [], chunked_linear._sum_product

    def sum_product(total, a, b, *, is_first):
        shapes.append(tuple(total.shape))
        product(total, a, b, is_first=is_first)

    monkeypatch.setattr(chunked_linear, "_sum_product", sum_product)
    logprobs(inputs[:2], labels, bias=inputs[2], backend=backend).sum().backward()
    assert [leaf.grad is not None for leaf in inputs] == list(needs)
    assert shapes == [s for s, is_needed in zip(((T, D), (V, D)), needs, strict=False) if is_needed]


@each_backend
def test_master_weights_get_their_gradient_in_float32(backend):
    hidden, weight, labels = peaked_head(T, D, V, torch.bfloat16)
    inputs = leaves(hidden, weight.float() + 1e-3 * normal(V, D).float())
    logp = logprobs(inputs, labels, logits_dtype="bfloat16", backend=backend)
    same = leaves(hidden, inputs[1].bfloat16())
    expected = logprobs(same, labels, logits_dtype="bfloat16", backend=backend)
    assert torch.equal(logp, expected)
    actual = gradients((logp, logp), inputs, "logp")
    true_grads = gradients((expected, expected), same, "logp")
    assert actual[1].dtype == torch.float32
    assert torch.equal(actual[0], true_grads[0])
    assert relative_error(actual[1], true_grads[1]) < 4e-3


@pytest.mark.parametrize("accum_dtype", [torch.float32, torch.bfloat16])
@each_backend
def test_sums_over_blocks_are_kept_in_the_accumulators_dtype(backend, accum_dtype):
    hidden, weight, labels = peaked_head(T, D, V, torch.bfloat16)
    inputs = leaves(hidden, weight)
    options = {"accum_dtype": accum_dtype, "logits_dtype": "bfloat16", "backend": backend}
    logp = logprobs(inputs, labels, max_workspace_mb=1e-5, **options)
    whole = logprobs(inputs, labels, **options)
    actual, expected = (gradients((x, x), inputs, "logp") for x in (logp, whole))
    # One rounding at the end, against one for each of up to T blocks.
    assert relative_error(actual[1], expected[1]) < (4e-3 if accum_dtype == torch.float32 else 2e-2)


@each_path
def test_strided_operands_and_leading_dimensions_match_the_reference(backend, dtype):
    hidden, weight, labels = peaked_head(12, D, V, dtype)
    wide = torch.nn.functional.pad(hidden, (3, 4), value=float("nan"))
    strided = wide.reshape(2, 6, D + 7)[:, :5, 3:-4]
    columns = weight.t().contiguous().t()
    odd = torch.nn.functional.pad(weight, (1, 0))[:, 1:]
    labels = labels.reshape(2, 6)[:, :5]
    expected = linear_token_logprobs(strided.contiguous(), weight, labels, backend=backend)
    assert expected.shape == (2, 5)
    for other in (columns, odd):
        actual = linear_token_logprobs(strided, other, labels.int(), backend=backend)
        assert_close(actual, expected, rtol=0, atol=LOGP_ATOL[dtype])


@each_backend
def test_banned_columns_and_extreme_logits_stay_finite(backend):
    dtype = torch.bfloat16 if backend == "triton" else torch.float32
    hidden, weight, labels = peaked_head(T, D, V, dtype)
    bias = normal(V).to(dtype)
    bias[:140] = -torch.inf  # a whole tile, and some
    labels = labels.clamp(min=140)
    check(hidden, weight, labels, {"bias": bias}, backend=backend)
    bias[140:] -= 1e4  # far below where a maximum that starts at 0 would stay
    inputs = leaves(hidden, weight)
    outputs = logprobs(inputs, labels, bias=bias, return_entropy=True, backend=backend)
    grads = gradients(outputs, inputs)
    assert all(x.isfinite().all() for x in (*outputs, *grads))
