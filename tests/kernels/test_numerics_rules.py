"""The rules of arithmetic that every kernel keeps, one test a rule; each was broken once."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from gad_fast import kernels
from gad_fast.kernels import token_logprobs, token_logprobs_reference
from gad_fast.kernels.optional_triton import IS_INTERPRETED
from kernel_cases import DEVICE, each_backend, needs_triton, peaked, peaked_head, relative_error

KERNELS = Path(kernels.__file__).parent


@each_backend
@pytest.mark.parametrize("V", [257, 129, 785])
def test_vocabulary_tail_is_masked_before_max_and_sum(backend, V):
    # All logits far below 0: a phantom token with logit 0 would be all there is.
    logits, labels = peaked(4, V)
    logits -= 50.0
    logprobs, entropy = token_logprobs(logits, labels, return_entropy=True, backend=backend)
    expected = token_logprobs_reference(logits.double(), labels)
    assert_close((logprobs.double(), entropy.double()), expected, rtol=1e-6, atol=1e-5)


@each_backend
def test_running_maximum_starts_below_any_logit(backend):
    logits, labels = peaked(3, 257)
    logits -= 1e6
    logprobs = token_logprobs(logits, labels, backend=backend)
    assert_close(logprobs.double(), token_logprobs_reference(logits.double(), labels)[0])


@each_backend
def test_a_block_without_a_finite_logit_gives_no_nan(backend):
    logits, labels = peaked(3, 785)
    logits[:, 128:256] = -torch.inf
    labels[:] = 0
    logits.requires_grad_()
    logprobs, entropy = token_logprobs(logits, labels, return_entropy=True, backend=backend)
    (grad,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)
    assert logprobs.isfinite().all()
    assert entropy.isfinite().all()
    assert grad.isfinite().all()


@each_backend
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_entropy_does_not_cancel_at_large_logits(backend, shift):
    generator = torch.Generator().manual_seed(0)
    # Multiples of 1/16, which stay exact when 10000 is added.
    logits = (torch.randn(3, 300, generator=generator) * 16).round().div(16).to(DEVICE) + shift
    labels = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    entropy = token_logprobs(logits, labels, return_entropy=True, backend=backend)[1]
    expected = token_logprobs_reference(logits.double(), labels)[1]
    assert_close(entropy.double(), expected, rtol=0, atol=5e-6)


@each_backend
def test_p_minus_one_is_finished_in_float32_before_the_one_store(backend):
    logits = torch.zeros(1, 300, device=DEVICE)
    logits[0, 7] = 12.0
    label = torch.tensor([7], device=DEVICE)
    rounded = logits.bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(token_logprobs(rounded, label, backend=backend).sum(), rounded)
    p = logits.double().softmax(-1)[0, 7]
    assert 0.995 < p < 0.9999
    assert_close(grad[0, 7].double(), 1 - p, rtol=2**-8, atol=0)


def test_head_gradient_is_summed_in_float32_over_chunks():
    hidden, weight, labels = peaked_head(150, 24, 257, torch.bfloat16)
    advantages = torch.randn(150, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def grad_weight(hidden: torch.Tensor, leaf: torch.Tensor, megabytes: float) -> torch.Tensor:
        leaf.requires_grad_()
        loss, _ = kernels.linear_policy_loss(
            hidden, leaf, labels, None, advantages.to(leaf.dtype), max_workspace_mb=megabytes
        )
        return torch.autograd.grad(loss, leaf)[0]

    one_token = 257 * 2 / 2**20
    truth = grad_weight(hidden.double(), weight.double(), 64.0)
    # Master weights, so that the sum comes back as it is.
    whole = relative_error(grad_weight(hidden, weight.float(), 64.0), truth)
    chunked = relative_error(grad_weight(hidden, weight.float(), one_token), truth)
    assert chunked < 1.2 * whole  # 1.9 times with a bfloat16 total of the 150 chunks


def test_float16_is_refused_where_gradients_would_underflow():
    hidden, weight, labels = (
        x.half() if x.is_floating_point() else x for x in peaked_head(3, 8, 33)
    )
    message = "hidden must be bfloat16, float32 or float64"
    with pytest.raises(ValueError, match=message):
        kernels.linear_token_logprobs(hidden, weight, labels)
    with pytest.raises(ValueError, match=message):
        kernels.linear_policy_loss(hidden, weight, labels, None, torch.zeros(3, device=DEVICE))


@needs_triton
def test_row_offsets_are_int64(tmp_path):
    # Three rows 2^30 elements apart, in a sparse file: the last starts where int32 ends.
    (stride, V), path = (2**30, 257), tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2 * (2 * stride + V))
    if not IS_INTERPRETED:
        pytest.skip("a file is no memory of a GPU")
    flat = torch.from_file(str(path), shared=True, size=2 * stride + V, dtype=torch.bfloat16)
    logits, labels = peaked(3, V, torch.bfloat16)
    far = flat.as_strided((3, V), (stride, 1))
    far.copy_(logits)
    assert torch.equal(
        token_logprobs(far, labels, backend="triton"),
        token_logprobs(logits, labels, backend="triton"),
    )


def test_grids_have_one_axis():
    # The others end at 65535 programs.
    sources = list(KERNELS.glob("*.py"))
    assert len(sources) > 10
    for source in sources:
        text = source.read_text()
        assert "program_id(1)" not in text, source.name
        assert "program_id(axis=1)" not in text, source.name


@each_backend
def test_labels_may_start_anywhere_in_memory(backend):
    logits, labels = peaked(5, 257)
    shifted = torch.cat([labels.new_tensor([0]), labels])[1:]
    assert shifted.storage_offset() == 1
    assert torch.equal(
        token_logprobs(logits, shifted, backend=backend),
        token_logprobs(logits, labels, backend=backend),
    )


@each_backend
def test_python_floats_are_no_float64_under_compile(backend):
    logits, labels = peaked(3, 257)

    def logprobs(logits, temperature):
        return token_logprobs(logits, labels, temperature=temperature, backend=backend)

    compiled = torch.compile(logprobs, fullgraph=True, backend="aot_eager", dynamic=True)
    for temperature in (0.7, 0.9, 1.3):
        assert torch.equal(compiled(logits, temperature), logprobs(logits, temperature))


@each_backend
@pytest.mark.parametrize("ignored", [-100, 2**40])
def test_labels_of_ignored_rows_are_never_an_index(backend, ignored):
    logits, labels = peaked(4, 257)
    labels[1:3] = ignored
    mask = labels != ignored
    logits.requires_grad_()
    logprobs = token_logprobs(logits, labels, mask=mask, backend=backend)
    (grad,) = torch.autograd.grad(logprobs.sum(), logits)
    assert not logprobs[1:3].any()
    assert not grad[1:3].any()
    assert grad[0].any()
