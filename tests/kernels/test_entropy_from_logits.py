"""`entropy_from_logits` on both paths against float64 autograd of its reference."""

import pytest
import torch
from torch.testing import assert_close

from gad_fast.kernels.entropy_from_logits import entropy_from_logits
from gad_fast.kernels.token_logprobs import token_logprobs_reference
from kernel_cases import DEVICE, TEMPERATURE, each_backend, each_dtype, each_vocabulary, peaked

SCALINGS = [{}, {"logit_scale": 1.2, "softcap": 8.0}]
# A few fp32 roundings; in bf16, besides, the one rounding of the store to 8 significant bits.
GRAD_RTOL = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@each_vocabulary
@each_dtype
@each_backend
def test_entropy_and_gradient_match_the_reference(backend, dtype, V, scaling):
    logits, labels = peaked(5, V, dtype)
    upstream = torch.linspace(-2.0, 1.5, 5, dtype=torch.float64, device=DEVICE)
    temperature = torch.linspace(0.6, 1.4, 5, device=DEVICE)

    truth = logits.double().requires_grad_()
    _, expected = token_logprobs_reference(truth, labels, temperature=temperature, **scaling)
    (expected_grad,) = torch.autograd.grad(expected, truth, upstream)
    logits.requires_grad_()
    entropy = entropy_from_logits(logits, temperature=temperature, backend=backend, **scaling)
    (grad_logits,) = torch.autograd.grad(entropy, logits, upstream.float())

    # Results are fp32 after sums of up to a thousand terms, of logits rounded at the cap.
    assert_close(entropy.double(), expected.detach(), rtol=2e-6, atol=4e-6)
    assert grad_logits.dtype == dtype
    assert_close(grad_logits.double(), expected_grad, rtol=GRAD_RTOL[dtype], atol=4e-6)


@each_backend
def test_masked_rows_give_zero_and_may_hold_anything(backend):
    logits, _ = peaked(6, 257)
    mask = torch.tensor([True, False, True, True, False, True], device=DEVICE)
    expected = entropy_from_logits(logits[mask], temperature=TEMPERATURE, backend=backend)
    logits = logits.masked_fill(~mask[:, None], torch.nan).reshape(2, 3, 257).requires_grad_()
    entropy = entropy_from_logits(
        logits, temperature=TEMPERATURE, mask=mask.reshape(2, 3), backend=backend
    )
    (grad_logits,) = torch.autograd.grad(entropy.sum(), logits)
    assert entropy.shape == (2, 3)
    assert torch.equal(entropy.reshape(-1)[mask], expected)
    assert not entropy.reshape(-1)[~mask].any()
    assert not grad_logits.reshape(6, 257)[~mask].any()
    assert grad_logits.reshape(6, 257)[mask].any(-1).all()


def test_torch_path_keeps_float64():
    logits, _ = peaked(4, 11, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: entropy_from_logits(x, temperature=TEMPERATURE, softcap=9.0),
        logits.requires_grad_(),
    )


@each_backend
def test_compiles_as_one_graph(backend):
    logits, _ = peaked(3, 257)
    logits.requires_grad_()

    def loss(logits):
        return entropy_from_logits(logits, temperature=TEMPERATURE, backend=backend).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(logits), logits)
    (actual,) = torch.autograd.grad(compiled(logits), logits)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(())}, r"logits must have a vocabulary .*, got \(\)"),
        ({"logits": torch.zeros(2, 3).int()}, r"logits must be a float tensor, got torch\.int32"),
        ({"temperature": -1.0}, r"temperature must be above 0, got -1\.0"),
        ({"mask": torch.ones(3)}, r"mask must have the shape .*\(2,\), got \(3,\)"),
    ],
)
def test_unusable_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        entropy_from_logits(**{"logits": torch.zeros(2, 5), **change})
