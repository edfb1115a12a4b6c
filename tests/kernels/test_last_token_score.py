"""`last_token_score` on both paths against float64 autograd of its reference."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gad_fast.kernels import sequence_ends
from gad_fast.kernels.last_token_score import last_token_score, last_token_score_reference
from gad_fast.kernels.sequence_ends import Ends
from kernel_cases import DEVICE, each_backend, each_dtype, needs_triton

MODULE = importlib.import_module("gad_fast.kernels.last_token_score")
B, L, D = 5, 37, 45
LENGTHS = (37, 1, 12, 36, 5)
WAYS = ["lengths", "attention_mask", "left padding", "cu_seqlens", "gathered"]
each_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small inputs cross blocks of columns, widths and sequences."""
    forward = {"BLOCK_L": 16, "BLOCK_D": 32, "num_warps": 1}
    backward = {"BLOCK_B": 2, "BLOCK_D": 32, "num_warps": 1}
    monkeypatch.setattr(MODULE, "launch_config", lambda _: forward)
    monkeypatch.setattr(MODULE, "backward_launch_config", lambda: backward)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)


def case_of(way: str) -> tuple[Tensor, dict[str, Any]]:
    """Hidden states in float64, and what tells their last tokens."""
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    columns = torch.arange(L, device=DEVICE)
    if way == "gathered":
        return random(B, D), {}
    if way == "cu_seqlens":
        offsets = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0)
        return random(sum(LENGTHS), D), {"cu_seqlens": offsets.int()}
    if way == "lengths":
        return random(B, L, D), {"lengths": lengths}
    if way == "left padding":
        return random(B, L, D), {"attention_mask": columns >= L - lengths[:, None]}
    # A hole before the last token, as a mask over several turns may have.
    mask = (columns < lengths[:, None]) & (columns != 3)
    return random(B, L, D), {"attention_mask": mask.long()}


def last_rows(hidden: Tensor, way: str) -> Tensor:
    """The last tokens' hidden states, by indices written out."""
    if way == "gathered":
        return hidden
    if way == "cu_seqlens":
        return hidden[[36, 37, 49, 85, 90]]
    columns = [36] * 5 if way == "left padding" else [36, 0, 11, 35, 4]
    return hidden[range(B), columns]


def truth(hidden: Tensor, weight: Tensor, bias: Tensor | None, way: str, upstream: Tensor):
    """Scores and gradients in float64."""
    inputs = [x.double().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    rows = last_rows(inputs[0], way)[:, None]
    scores = last_token_score_reference(
        rows, inputs[1].reshape(D), inputs[2] if bias is not None else None, Ends(None, None, None)
    )
    return scores.detach(), torch.autograd.grad((scores * upstream).sum(), inputs)


def differentiate(hidden, weight, bias, upstream: Tensor, **options: Any):
    inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    scores = last_token_score(*inputs, **options)
    return scores.detach(), torch.autograd.grad((scores * upstream.to(scores)).sum(), inputs)


def check(actual, expected, dtype: torch.dtype) -> None:
    # Sums of 45 products in fp32; in bf16, besides, the one rounding of a gradient's store.
    assert_close(actual[0].double(), expected[0], rtol=1e-6, atol=1e-5)
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-6
    for grad, true_grad in zip(actual[1], expected[1], strict=True):
        assert_close(grad.double(), true_grad, rtol=rtol, atol=2e-6)


@each_way
@each_dtype
@each_backend
@pytest.mark.parametrize("has_bias", [False, True])
def test_scores_and_gradients_match_the_reference(backend, dtype, way, has_bias):
    hidden, ends = case_of(way)
    weight, bias = random(1, D, seed=1), random(1, seed=2) if has_bias else None
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = bias if bias is None else bias.to(dtype)
    upstream = random(B, seed=3)
    actual = differentiate(hidden, weight, bias, upstream, **ends, backend=backend)
    assert actual[0].dtype == torch.float32
    assert all(grad.dtype == dtype for grad in actual[1])
    check(actual, truth(hidden, weight, bias, way, upstream), dtype)


@each_way
def test_torch_path_keeps_float64(way):
    hidden, ends = case_of(way)
    weight, bias, upstream = random(D, seed=1), random(1, seed=2), random(B, seed=3)
    actual = differentiate(hidden, weight, bias, upstream, **ends)
    expected = truth(hidden, weight, bias, way, upstream)
    assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-13)
    for grad, true_grad in zip(actual[1], expected[1], strict=True):
        assert_close(grad, true_grad, rtol=1e-12, atol=1e-13)


def test_reference_finds_the_last_tokens_of_every_way():
    weight = random(D, seed=1)
    for way in WAYS[:-1]:
        hidden, ends = case_of(way)
        sequences = hidden if hidden.dim() == 3 else hidden[None]
        known = {"lengths": None, "attention_mask": None, "cu_seqlens": None, **ends}
        scores = last_token_score_reference(sequences, weight, None, Ends(**known))
        assert_close(scores, last_rows(hidden, way) @ weight, rtol=1e-12, atol=1e-13)


@each_way
@each_backend
def test_only_the_last_tokens_get_a_gradient(backend, way):
    hidden, ends = case_of(way)
    hidden = hidden.float().requires_grad_()
    last_token_score(hidden, random(D).float(), **ends, backend=backend).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.reshape(-1, D).any(1).sum() == B


@each_backend
def test_shipped_blocks_match_the_reference(backend, monkeypatch):
    monkeypatch.undo()
    for way in ("attention_mask", "cu_seqlens"):
        hidden, ends = case_of(way)
        hidden, weight, upstream = hidden.float(), random(D, seed=1).float(), random(B, seed=3)
        actual = differentiate(hidden, weight, None, upstream, **ends, backend=backend)
        check(actual, truth(hidden, weight, None, way, upstream), torch.float32)


@each_backend
def test_head_may_have_another_dtype_than_the_hidden_states(backend):
    hidden, ends = case_of("lengths")
    hidden, weight, bias = hidden.bfloat16(), random(D, seed=1).float(), random(1, seed=2).float()
    upstream = random(B, seed=3)
    actual = differentiate(hidden, weight, bias, upstream, **ends, backend=backend)
    expected = truth(hidden, weight, bias, "lengths", upstream)
    check(actual, expected, torch.bfloat16)
    # The weight's gradient is not rounded to the hidden states' dtype.
    assert_close(actual[1][1].double(), expected[1][1], rtol=1e-6, atol=2e-6)


@each_backend
@pytest.mark.parametrize("layout", ["sequence stride", "column stride", "expanded"])
def test_strided_hidden_states_are_read_as_they_are(backend, layout):
    hidden, ends = case_of("lengths")
    hidden = hidden.float()
    if layout == "sequence stride":
        hidden = torch.nn.functional.pad(hidden, (3, 8, 2, 5), value=torch.nan)[:, 2:-5, 3:-8]
    elif layout == "column stride":
        hidden = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        hidden = hidden[:1].expand(B, L, D)
    weight, upstream = random(D, seed=1).float(), random(B, seed=3)
    contiguous = hidden.contiguous()
    actual = differentiate(contiguous, weight, None, upstream, **ends, backend=backend)
    given = hidden.detach().requires_grad_()
    scores = last_token_score(given, weight, **ends, backend=backend)
    assert torch.equal(scores, actual[0])
    (grad,) = torch.autograd.grad((scores * upstream.to(scores)).sum(), given)
    assert torch.equal(grad, actual[1][0])


@each_backend
@pytest.mark.parametrize("way", ["lengths", "attention_mask", "cu_seqlens"])
def test_a_sequence_without_a_token_scores_nan_and_gets_no_gradient(backend, way, monkeypatch):
    # As on a GPU, where no check may look.
    monkeypatch.setattr(sequence_ends, "can_look_at", lambda _: False)
    hidden, ends = case_of(way)
    if way == "cu_seqlens":
        # Nothing; all tokens from the start; a sequence past the end; one that runs backwards.
        ends["cu_seqlens"] = torch.tensor([0, 0, 91, 92, 5, 9], device=DEVICE)
        is_there = torch.tensor([False, True, False, False, True], device=DEVICE)
    elif way == "lengths":
        ends["lengths"] = torch.tensor([0, 3, L + 1, -1, L], device=DEVICE)
        is_there = torch.tensor([False, True, False, False, True], device=DEVICE)
    else:
        ends["attention_mask"][2] = 0
        is_there = torch.arange(B, device=DEVICE) != 2
    hidden = hidden.float()
    # Where a missing sequence's token could be looked for by mistake.
    hidden.view(-1, D)[0] = torch.nan
    hidden.requires_grad_()
    weight = random(D, seed=1).float().requires_grad_()
    bias = torch.zeros(1, device=DEVICE).requires_grad_()
    scores = last_token_score(hidden, weight, bias, **ends, backend=backend)
    assert torch.equal(scores.isfinite(), is_there)
    # Nor is anything read in its place: its row of what is kept for the backward pass is 0.
    sequences = hidden if hidden.dim() == 3 else hidden[None]
    given = (ends.get(name) for name in Ends._fields)
    op = torch.ops.gad_fast.last_token_score
    kept = op(sequences.detach(), weight.detach(), None, *given, backend)[2]
    assert torch.equal(kept.any(1), is_there)
    # A loss over broken scores has NaN gradients for them.
    scores.backward(torch.where(is_there, 1.0, torch.nan))
    assert hidden.grad is not None
    assert torch.equal(hidden.grad.reshape(-1, D).any(1).sum(), is_there.sum())
    assert_close(hidden.grad.sum((0, 1) if hidden.dim() == 3 else 0), is_there.sum() * weight)
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert bias.grad == is_there.sum()


@each_backend
def test_frozen_parts_get_no_gradient(backend):
    hidden, ends = case_of("lengths")
    weight = random(D, seed=1).float().requires_grad_()
    last_token_score(hidden.float(), weight, **ends, backend=backend).sum().backward()
    expected = last_rows(hidden, "lengths").sum(0)
    assert weight.grad is not None
    assert_close(weight.grad.double(), expected, rtol=1e-6, atol=1e-6)
    assert not last_token_score(hidden.float(), weight.detach(), **ends).requires_grad


@each_backend
def test_no_sequences_give_no_scores(backend):
    weight = torch.ones(D, device=DEVICE, requires_grad=True)
    hidden = torch.empty(0, D, device=DEVICE, requires_grad=True)
    scores = last_token_score(hidden, weight, backend=backend)
    assert scores.shape == (0,)
    scores.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("way", WAYS)
def test_custom_op_passes_opcheck(backend, way):
    hidden, ends = case_of(way)
    if hidden.dim() == 2:
        hidden = hidden[None] if ends else hidden[:, None]
    hidden, weight, bias = (x.float() for x in (hidden, random(D), random(1)))
    given = (ends.get(name) for name in Ends._fields)
    torch.library.opcheck(
        torch.ops.gad_fast.last_token_score.default,
        (*(x.requires_grad_() for x in (hidden, weight, bias)), *given, backend),
    )


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("needs_hidden", [False, True])
def test_backward_op_passes_opcheck(backend, needs_hidden):
    rows = torch.tensor([4, -1, 9], device=DEVICE)
    torch.library.opcheck(
        torch.ops.gad_fast.last_token_score_backward.default,
        (
            random(3).float(),
            rows,
            random(3, D).float(),
            random(D).float(),
            11,
            needs_hidden,
            backend,
        ),
    )


@each_backend
@each_way
@pytest.mark.parametrize("is_dynamic", [False, True])
def test_compiles_as_one_graph(backend, way, is_dynamic):
    hidden, ends = case_of(way)
    hidden, weight, bias = (
        x.float().requires_grad_() for x in (hidden, random(D, seed=1), random(1, seed=2))
    )

    def scores(hidden, weight, bias):
        return last_token_score(hidden, weight, bias, **ends, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(scores, fullgraph=True, dynamic=is_dynamic, backend="aot_eager")
    inputs = (hidden, weight, bias)
    expected = torch.autograd.grad(scores(*inputs).square().sum(), inputs)
    actual = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    for grad, true_grad in zip(actual, expected, strict=True):
        assert torch.equal(grad, true_grad)


FULL = torch.tensor([4, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": None}, r"hidden must be .*, got \(2, 4, 3\) with none"),
        ({"attention_mask": torch.ones(2, 4).int()}, r"with lengths, attention_mask$"),
        ({"hidden": torch.zeros(2, 3)}, r"hidden must be .*got \(2, 3\) with lengths"),
        ({"hidden": torch.zeros(2, 4, 3, 1)}, r"hidden must be .*got \(2, 4, 3, 1\)"),
        ({"hidden": torch.zeros(2, 0, 3)}, r"hidden must hold at least one token, got \(2, 0, 3\)"),
        ({"hidden": torch.zeros(2, 4, 3).int()}, r"hidden must be a float tensor"),
        (
            {"lengths": FULL[:1]},
            r"lengths must have the shape of the sequences, \(2,\), got \(1,\)",
        ),
        ({"lengths": FULL.float()}, r"lengths must be integers, got torch\.float32"),
        (
            {"lengths": torch.tensor([4, 0])},
            r"lengths must end each sequence within its 4 tokens, sequence 1 does not",
        ),
        ({"lengths": torch.tensor([5, 4])}, r"lengths must end .* sequence 0 does not"),
        (
            {"lengths": None, "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])},
            r"attention_mask must end .* sequence 1 does not",
        ),
        (
            {"lengths": None, "attention_mask": torch.ones(2, 5).int()},
            r"attention_mask must have the shape of the sequences, \(2, 4\), got \(2, 5\)",
        ),
        (
            {"hidden": torch.zeros(9, 3), "lengths": None, "cu_seqlens": torch.tensor([0, 9, 9])},
            r"cu_seqlens must end .* sequence 1 does not",
        ),
        (
            {"hidden": torch.zeros(9, 3), "lengths": None, "cu_seqlens": torch.zeros(1, 2).int()},
            r"cu_seqlens must be \[B \+ 1\], got \(1, 2\)",
        ),
        ({"weight": torch.zeros(4)}, r"weight must be \[3\] or \[1, 3\], got \(4,\)"),
        ({"weight": torch.zeros(3, 1)}, r"weight must be \[3\] or \[1, 3\], got \(3, 1\)"),
        ({"weight": torch.zeros(3).int()}, r"weight must be a float tensor, got torch\.int32"),
        ({"bias": torch.zeros(2)}, r"bias must be one number, got \(2,\)"),
        ({"backend": "cuda"}, r"backend must be one of auto, triton, torch, got 'cuda'"),
    ],
)
def test_unusable_arguments_are_refused(change, message):
    arguments = {"hidden": torch.zeros(2, 4, 3), "weight": torch.zeros(3), "lengths": FULL}
    with pytest.raises(ValueError, match=message):
        last_token_score(**{**arguments, **change})


def test_triton_refuses_float64():
    with pytest.raises(ValueError, match=r"backend 'triton' needs Triton and .*torch\.float64"):
        last_token_score(torch.zeros(2, 3), torch.zeros(3).double(), backend="triton")
