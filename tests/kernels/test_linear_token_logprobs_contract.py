"""What `linear_token_logprobs` is to autograd, to the compiler, and to a caller who is wrong."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gad_fast.kernels import linear_logprobs_op as module
from gad_fast.kernels.linear_token_logprobs import (
    linear_token_logprobs,
    linear_token_logprobs_reference,
)
from kernel_cases import DEVICE, each_backend, needs_triton, peaked_head
from linear_cases import D, T, V, each_path, gradients, leaves, logprobs, normal, shrink_tiles


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_tiles(monkeypatch)


@each_path
def test_graph_keeps_no_logits(backend, dtype):
    inputs = leaves(*peaked_head(T, D, V, dtype)[:2])
    labels = peaked_head(T, D, V, dtype)[2]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        logprobs(inputs, labels, return_entropy=True, backend=backend)
    given = {x.data_ptr() for x in inputs}
    assert all(x.numel() <= T for x in kept if x.data_ptr() not in given)


@each_path
def test_backward_may_run_twice(backend, dtype):
    hidden, weight, labels = peaked_head(T, D, V, dtype)
    inputs = leaves(hidden, weight)
    logp = logprobs(inputs, labels, backend=backend)
    first = torch.autograd.grad(logp.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(logp.sum(), inputs)
    assert all(map(torch.equal, first, second))


@each_backend
def test_autocast_takes_hidden_states_in_its_dtype(backend):
    hidden, weight, labels = peaked_head(T, D, V, torch.float32)
    inputs = leaves(hidden, weight)
    with torch.autocast(DEVICE, torch.bfloat16):
        logp = logprobs(inputs, labels, backend=backend)
        actual = gradients((logp, logp), inputs, "logp")
    same = leaves(hidden, weight)
    expected = linear_token_logprobs(same[0].bfloat16(), same[1], labels, backend=backend)
    assert torch.equal(logp, expected)
    for grad, true_grad in zip(actual, gradients((expected, expected), same, "logp"), strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, true_grad)


def test_backward_within_autocast_keeps_float32():
    hidden, weight, labels = peaked_head(T, D, V, torch.float32)
    inputs = leaves(hidden, weight)
    logp = logprobs(inputs, labels, backend="torch")
    expected = torch.autograd.grad(logp.sum(), inputs, retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = torch.autograd.grad(logp.sum(), inputs)
    assert all(map(torch.equal, actual, expected))


@each_path
def test_custom_ops_pass_opcheck(backend, dtype):
    hidden, weight, labels = peaked_head(5, D, V, dtype)
    inputs = leaves(hidden, weight, normal(V).to(dtype))
    inverse = torch.ones(5, dtype=torch.promote_types(dtype, torch.float32), device=DEVICE)
    mask = torch.arange(5, device=DEVICE) != 2
    options = (0.9, 12.0, "float32", True, torch.float32, 2**20, backend)
    op = torch.ops.gad_fast.linear_token_logprobs.default
    torch.library.opcheck(op, (*inputs, labels, inverse, mask, *options))
    torch.library.opcheck(op, (*inputs[:2], None, labels, inverse, None, *options))
    plain = [x.detach() for x in inputs]
    *stats, index, count = op(*plain, labels, inverse, mask, *options)
    backward = (stats, index, count, inverse, None, *options, [True, False, True])
    torch.library.opcheck(
        torch.ops.gad_fast.linear_token_logprobs_backward.default,
        (*plain, labels, inverse, *backward),
    )


@each_path
@pytest.mark.parametrize("has_mask", [False, True])
def test_compiles_as_one_graph(backend, dtype, has_mask):
    hidden, weight, labels = peaked_head(5, D, V, dtype)
    mask = torch.arange(5, device=DEVICE) != 2 if has_mask else None

    def loss(hidden, weight):
        logp, entropy = linear_token_logprobs(
            hidden, weight, labels, mask=mask, return_entropy=True, softcap=9.0, backend=backend
        )
        return (2.0 * logp - 0.5 * entropy).sum()

    inputs = leaves(hidden, weight)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs), inputs)
    actual = torch.autograd.grad(compiled(*inputs), inputs)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_the_torch_path_on_a_cpu(dtype, monkeypatch):
    hidden, weight, labels = (x.cpu() for x in peaked_head(3, D, V, dtype))
    expected = linear_token_logprobs(hidden, weight, labels, backend="torch")
    monkeypatch.setattr(module, "linear_stats", None)
    assert torch.equal(linear_token_logprobs(hidden, weight, labels), expected)


def test_reference_passes_gradcheck():
    hidden, weight, labels = peaked_head(3, 4, 5, torch.float64)
    options = {"bias": normal(5), "softcap": 3.0, "logit_scale": 0.7}
    assert torch.autograd.gradcheck(
        lambda x, w: linear_token_logprobs_reference(x, w, labels, **options),
        leaves(hidden, weight),
    )


def good_arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "hidden": torch.zeros(2, 3, 8, dtype=dtype),
        "weight": torch.zeros(5, 8, dtype=dtype),
        "labels": torch.zeros(2, 3, dtype=torch.int64),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 9)}, r"weight must be \[V, D\].*8, got \(5, 9\)"),
        ({"hidden": torch.zeros(2, 3, 8).half()}, r"hidden must be bfloat16, float32 or float64"),
        ({"hidden": torch.zeros(2, 3, 8).long()}, r"hidden must be a float tensor, got"),
        ({"labels": torch.zeros(2, 4).long()}, r"labels must have the shape of .*\(2, 3\), got"),
        ({"labels": torch.zeros(2, 3)}, r"labels must be int32 or int64, got torch\.float32"),
        ({"labels": torch.full((2, 3), 5)}, r"labels must be in \[0, 5\).*got 5"),
        ({"labels": torch.full((2, 3), -1)}, r"labels must be in \[0, 5\).*got -1"),
        ({"mask": torch.ones(6)}, r"mask must have the shape of the tokens, \(2, 3\), got \(6,\)"),
        ({"bias": torch.zeros(4)}, r"bias must be \[V\] with the V of weight, 5, got \(4,\)"),
        ({"temperature": 0.0}, r"temperature must be above 0, got 0\.0"),
        ({"temperature": torch.zeros(2, 3)}, r"temperature must be above 0, got 0\.0"),
        ({"temperature": torch.ones(3)}, r"temperature must have the shape"),
        ({"softcap": -1.0}, r"softcap must be above 0, got -1"),
        ({"logit_scale": 0.0}, r"logit_scale must be above 0, got 0"),
        ({"logits_dtype": "fp32"}, r"logits_dtype must be one of float32, bfloat16, got 'fp32'"),
        ({"accum_dtype": torch.float16}, r"accum_dtype must be one of .*, got 'torch\.float16'"),
        ({"max_workspace_mb": 0}, r"max_workspace_mb must be above 0, got 0"),
        ({"backend": "triton"}, r"backend 'triton' needs Triton and bfloat16 .* got .*float32"),
    ],
)  # fmt: skip
def test_unusable_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        linear_token_logprobs(**{**good_arguments(), **change})


@needs_triton
def test_kernels_refuse_a_width_that_tma_cannot_address():
    arguments = good_arguments(torch.bfloat16)
    arguments["hidden"], arguments["weight"] = (
        arguments["hidden"][..., :6],
        arguments["weight"][:, :6],
    )
    with pytest.raises(ValueError, match=r"needs hidden with D a multiple of 8, got D=6"):
        linear_token_logprobs(**arguments, backend="triton")
    linear_token_logprobs(**arguments)
