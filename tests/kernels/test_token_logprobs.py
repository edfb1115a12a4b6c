"""`token_logprobs` on both paths against float64 autograd of its reference."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch.testing import assert_close

from gad_fast.kernels import chunked_torch, logprob_kernels, token_logprobs
from gad_fast.kernels.backend import Backend
from gad_fast.kernels.token_logprobs import token_logprobs_reference
from kernel_cases import (
    DEVICE,
    TEMPERATURE,
    each_backend,
    each_dtype,
    each_vocabulary,
    needs_triton,
    peaked,
)

# Results are fp32 after sums of up to a thousand terms: a few roundings, relative or against 1.
VALUE_RTOL, VALUE_ATOL = 1e-6, 2e-6
# A few fp32 roundings; in bf16, besides, the one rounding of the store to 8 significant bits.
GRAD_RTOL = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
# A few fp32 roundings of a p near 1, in units of an upstream gradient near 1 over TEMPERATURE.
GRAD_ATOL = 1e-6

# The package exports a function of the module's own name, so only this gives the module.
MODULE = importlib.import_module("gad_fast.kernels.token_logprobs")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small inputs cross blocks and chunks."""
    monkeypatch.setattr(logprob_kernels, "MAX_FORWARD_BLOCK", 128)
    monkeypatch.setattr(logprob_kernels, "MAX_BACKWARD_BLOCK", 128)
    monkeypatch.setattr(chunked_torch, "_CHUNK_BYTES", 3 * 4 * 785)


def upstream(shape: torch.Size, used: str) -> tuple[Tensor, Tensor]:
    """Gradients of log-probabilities and entropy, about 1 in size, of either sign."""
    generator = torch.Generator().manual_seed(7)
    grads = torch.randn(2, *shape, generator=generator, dtype=torch.float64).clamp(-2, 2)
    return grads[0] * (used != "entropy"), grads[1] * (used != "logprobs")


def differentiate(
    function, logits: Tensor, labels: Tensor, grads: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    logprobs, entropy = function(logits, labels)
    losses = [
        (output * grad.to(output)).sum()
        for output, grad in zip((logprobs, entropy), grads, strict=True)
        if grad.any()
    ]
    (grad_logits,) = torch.autograd.grad(torch.stack(losses).sum(), logits)
    return logprobs.detach(), entropy.detach(), grad_logits


def assert_matches_reference(
    logits: Tensor, labels: Tensor, backend: Backend, used: str = "both", **options
) -> None:
    options = {"temperature": TEMPERATURE, **options}

    def operation(logits, labels):
        return token_logprobs(logits, labels, return_entropy=True, backend=backend, **options)

    def reference(logits, labels):
        return token_logprobs_reference(logits, labels, **options)

    grads = upstream(labels.shape, used)
    logprobs, entropy, grad_logits = differentiate(operation, logits, labels, grads)
    expected = differentiate(reference, logits.double(), labels, grads)

    assert logprobs.dtype == entropy.dtype == torch.float32
    assert grad_logits.dtype == logits.dtype
    # A few fp32 roundings of a tanh near 1, times the cap; p has the same error, relative.
    of_cap = (options.get("softcap") or 0.0) * 2**-22
    value_atol, grad_atol = VALUE_ATOL + of_cap, GRAD_ATOL + of_cap
    assert_close(logprobs.double(), expected[0], rtol=VALUE_RTOL, atol=value_atol)
    assert_close(entropy.double(), expected[1], rtol=VALUE_RTOL, atol=value_atol)
    rtol = GRAD_RTOL[logits.dtype] + of_cap
    assert_close(grad_logits.double(), expected[2], rtol=rtol, atol=grad_atol)


@pytest.mark.parametrize("used", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("T", [1, 7])
@each_vocabulary
@each_dtype
@each_backend
def test_values_and_gradients_match_the_reference(backend, dtype, V, T, used):
    assert_matches_reference(*peaked(T, V, dtype), backend, used)


SCALINGS = [
    {"logit_scale": 1.3},
    {"softcap": 6.0},
    {"softcap": 20.0, "logit_scale": 0.7},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("is_temperature_each", [False, True])
@each_dtype
@each_backend
def test_scaled_and_capped_logits_match_the_reference(backend, dtype, scaling, is_temperature_each):
    each = torch.linspace(0.6, 1.4, 5, device=DEVICE)
    temperature = each if is_temperature_each else TEMPERATURE
    assert_matches_reference(*peaked(5, 257, dtype), backend, temperature=temperature, **scaling)


@pytest.mark.parametrize("softcap", [None, 30.0])
@each_dtype
@needs_triton
def test_shipped_blocks_match_the_reference(dtype, softcap, monkeypatch):
    monkeypatch.undo()
    # Two whole forward blocks and one column.
    assert_matches_reference(*peaked(2, 2 * 8192 + 1, dtype), "triton", softcap=softcap)


def test_reference_passes_gradcheck():
    logits, labels = peaked(3, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: token_logprobs_reference(x, labels, temperature=TEMPERATURE),
        logits.requires_grad_(),
    )


@pytest.mark.parametrize("softcap", [None, 9.0])
def test_torch_path_keeps_float64(softcap):
    logits, labels = peaked(7, 11, torch.float64)
    options = {
        "temperature": torch.linspace(0.6, 1.4, 7, dtype=torch.float64, device=DEVICE),
        "mask": torch.arange(7, device=DEVICE) != 2,
        "softcap": softcap,
        "logit_scale": 1.1,
    }
    assert torch.autograd.gradcheck(
        lambda x: token_logprobs(x, labels, return_entropy=True, **options),
        logits.requires_grad_(),
    )


@each_backend
@pytest.mark.parametrize("layout", ["row stride", "column stride", "expanded"])
def test_strided_logits_match_the_reference(backend, layout):
    logits, labels = peaked(5, 257)
    if layout == "row stride":
        logits = torch.nn.functional.pad(logits, (3, 8), value=float("nan"))[:, 3:-8]
    elif layout == "column stride":
        logits = logits.t().contiguous().t()
    else:
        logits, labels = logits[:1].expand(5, -1), labels[:1].expand(5)
    assert not logits.is_contiguous()
    assert_matches_reference(logits, labels, backend)


@each_backend
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3)])
def test_results_have_the_shape_of_the_labels(backend, shape):
    flat_logits, flat_labels = peaked(6, 257)
    count = torch.Size(shape).numel()
    logits = flat_logits[:count].reshape(*shape, 257)
    labels = flat_labels[:count].reshape(shape)
    logprobs, entropy = token_logprobs(logits, labels, return_entropy=True, backend=backend)
    expected = token_logprobs_reference(logits, labels)
    assert_close((logprobs, entropy), expected, rtol=VALUE_RTOL, atol=VALUE_ATOL)


@each_backend
def test_shifted_batch_matches_the_reference(backend):
    logits, labels = peaked(6, 257)
    assert_matches_reference(
        logits.reshape(2, 3, 257)[:, :-1], labels.reshape(2, 3)[:, 1:], backend
    )


@each_backend
def test_int32_labels_give_what_int64_labels_give(backend):
    logits, labels = peaked(3, 257)
    assert torch.equal(
        token_logprobs(logits, labels.int(), backend=backend),
        token_logprobs(logits, labels, backend=backend),
    )


@each_backend
def test_without_entropy_the_logprobs_are_the_same(backend):
    logits, labels = peaked(3, 257)
    alone = token_logprobs(logits, labels, temperature=TEMPERATURE, backend=backend)
    pair = token_logprobs(
        logits, labels, temperature=TEMPERATURE, return_entropy=True, backend=backend
    )
    assert torch.equal(alone, pair[0])


@each_backend
def test_no_tokens_give_empty_results_and_gradient(backend):
    logits = torch.empty(0, 257, device=DEVICE, requires_grad=True)
    labels = torch.empty(0, dtype=torch.int64, device=DEVICE)
    logprobs, entropy = token_logprobs(logits, labels, return_entropy=True, backend=backend)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, 257)


@each_backend
@pytest.mark.parametrize("case", ["huge", "all very negative", "-inf column", "-inf block"])
def test_extreme_logits_match_the_reference(backend, case):
    logits, labels = peaked(4, 785)
    if case == "huge":
        logits[:, ::2], logits[:, 1::2] = 1e4, -1e4
        labels[:] = torch.tensor([0, 1, 2, 784], device=DEVICE)
    elif case == "all very negative":
        logits -= 1e4
    elif case == "-inf column":
        logits[torch.arange(4), (labels + 1) % 785] = -torch.inf
    else:
        # The first block of a row, so that the running maximum meets nothing finite at first.
        logits[:, :128] = -torch.inf
        labels[:] = 784
    assert_matches_reference(logits, labels, backend)


@each_backend
def test_rows_without_upstream_gradient_get_exact_zeros(backend):
    logits, labels = peaked(3, 257)
    logits.requires_grad_()
    logprobs = token_logprobs(logits, labels, backend=backend)
    (grad_logits,) = torch.autograd.grad(logprobs[1], logits)
    assert torch.equal(grad_logits[[0, 2]], torch.zeros_like(grad_logits[[0, 2]]))
    assert grad_logits[1].any()


def masked_case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and labels that hold what nobody may read outside the mask, and the mask."""
    logits, labels = peaked(7, 257, dtype)
    mask = torch.tensor([True, False, True, True, False, False, True], device=DEVICE)
    return logits.masked_fill(~mask[:, None], torch.nan), labels.masked_fill(~mask, -100), mask


@each_dtype
@each_backend
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_masked_rows_give_zero_and_may_hold_anything(backend, dtype, softcap):
    logits, labels, mask = masked_case(dtype)
    options = {"temperature": TEMPERATURE, "softcap": softcap, "return_entropy": True}

    def masked(logits, labels):
        return token_logprobs(logits, labels, mask=mask, backend=backend, **options)

    def kept(logits, labels):
        return token_logprobs(logits, labels, backend=backend, **options)

    grads = upstream(labels.shape, "both")
    actual = differentiate(masked, logits, labels, grads)
    expected = differentiate(kept, logits[mask], labels[mask], (grads[0][mask], grads[1][mask]))
    for value, kept_value in zip(actual, expected, strict=True):
        assert torch.equal(value[mask], kept_value)
        assert torch.equal(value[~mask], torch.zeros_like(value[~mask]))


@each_backend
def test_nothing_kept_gives_zeros(backend):
    logits, labels, mask = masked_case()
    logits.requires_grad_()
    logprobs = token_logprobs(logits, labels, mask=torch.zeros_like(mask), backend=backend)
    (grad_logits,) = torch.autograd.grad(logprobs.sum(), logits)
    assert torch.equal(logprobs, torch.zeros_like(logprobs))
    assert torch.equal(grad_logits, torch.zeros_like(grad_logits))


@each_dtype
@each_backend
@pytest.mark.parametrize("used", ["logprobs", "both"])
def test_gradient_written_over_the_logits_is_the_same(backend, dtype, used):
    logits, labels, mask = masked_case(dtype)
    grads = upstream(labels.shape, used)

    def run(leaf: Tensor, is_inplace: bool) -> Tensor:
        outputs = token_logprobs(
            leaf.reshape(1, 7, 257),
            labels[None],
            mask=mask[None],
            softcap=9.0,
            return_entropy=True,
            inplace_backward=is_inplace,
            backend=backend,
        )
        used_outputs = outputs if used == "both" else outputs[:1]
        (grad_logits,) = torch.autograd.grad(
            used_outputs, leaf, [g[None].float() for g in grads[: len(used_outputs)]]
        )
        return grad_logits

    separate, over = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected, actual = run(separate, False), run(over, True)
    assert torch.equal(separate.detach().nan_to_num(), logits.nan_to_num())
    assert torch.equal(actual, expected)
    assert actual.data_ptr() == over.data_ptr()


@each_backend
def test_whoever_still_needs_overwritten_logits_is_told(backend):
    logits, labels = peaked(3, 257)
    logits.requires_grad_()
    outer = logits.exp()  # keeps its result for its own backward pass
    logprobs = token_logprobs(outer, labels, inplace_backward=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


@each_backend
def test_overwritten_logits_serve_one_backward_pass(backend):
    logits, labels = peaked(3, 257)
    logits.requires_grad_()
    loss = token_logprobs(logits, labels, inplace_backward=True, backend=backend).sum()
    torch.autograd.grad(loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


@each_backend
@pytest.mark.parametrize("label", [-1, 257, 2**32])
def test_label_that_nobody_checked_gives_nan_and_is_not_read(backend, label, monkeypatch):
    # As on a GPU, where no label is looked at.
    monkeypatch.setattr("gad_fast.kernels.arguments.can_look_at", lambda _tensor: False)
    logits, labels = peaked(3, 257)
    expected = token_logprobs(logits, labels, backend=backend)
    labels[1] = label
    logits.requires_grad_()
    logprobs, entropy = token_logprobs(logits, labels, return_entropy=True, backend=backend)
    torch.autograd.grad(logprobs[[0, 2]].sum() + entropy.sum(), logits)
    assert logprobs[1].isnan()
    assert torch.equal(logprobs[[0, 2]], expected[[0, 2]])
    assert entropy.isfinite().all()


@each_backend
def test_graph_keeps_no_second_matrix(backend):
    logits, labels = peaked(7, 257)
    logits.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        token_logprobs(logits, labels, return_entropy=True, backend=backend)
    beside_logits = [x for x in kept if x.data_ptr() != logits.data_ptr()]
    assert len(beside_logits) < len(kept)
    assert all(x.numel() == 7 for x in beside_logits)


@each_backend
def test_unused_entropy_adds_nothing_to_the_backward_pass(backend, monkeypatch):
    logits, labels = peaked(3, 257)
    logits.requires_grad_()
    seen = []

    def spy(*args):
        seen.append(args[-1])
        return torch.zeros_like(args[0])

    monkeypatch.setattr(MODULE, "_backward_op", spy)
    logprobs, _ = token_logprobs(logits, labels, return_entropy=True, backend=backend)
    logprobs.sum().backward()
    assert seen == [None]


def op_arguments(logits: Tensor, labels: Tensor, backend: str, softcap: float | None) -> tuple:
    inverse = torch.full((len(labels),), 1 / TEMPERATURE, device=DEVICE)
    mask = torch.arange(len(labels), device=DEVICE) != 1
    return logits, labels, inverse, 1.0, softcap, mask, backend


@each_backend
@pytest.mark.parametrize("has_entropy", [True, False])
@pytest.mark.parametrize("is_contiguous", [True, False])
def test_custom_op_passes_opcheck(backend, is_contiguous, has_entropy):
    logits, labels = peaked(3, 257)
    if not is_contiguous:
        logits = torch.nn.functional.pad(logits, (0, 7))[:, :257]
    arguments = op_arguments(logits.detach().requires_grad_(), labels, backend, 9.0)
    torch.library.opcheck(
        torch.ops.gad_fast.token_logprobs.default, (*arguments, has_entropy, False)
    )


@each_backend
@pytest.mark.parametrize("name", ["token_logprobs_backward", "token_logprobs_backward_"])
def test_backward_ops_pass_opcheck(backend, name):
    arguments = op_arguments(*peaked(3, 257), backend, None)
    numbers = torch.rand(5, 3, device=DEVICE)
    op = getattr(torch.ops.gad_fast, name).default
    torch.library.opcheck(op, (*arguments, *numbers.unbind()))


@each_backend
def test_compiles_as_one_graph(backend):
    def loss(logits, labels):
        logprobs, entropy = token_logprobs(
            logits, labels, temperature=TEMPERATURE, return_entropy=True, backend=backend
        )
        return (2.0 * logprobs - 0.5 * entropy).sum()

    logits, labels = peaked(3, 257)
    logits.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(logits, labels), logits)
    (actual,) = torch.autograd.grad(compiled(logits, labels), logits)
    assert torch.equal(actual, expected)


def test_overwriting_logits_is_refused_under_compile():
    logits, labels = peaked(3, 257)
    compiled = torch.compile(
        lambda x: token_logprobs(x, labels, inplace_backward=True), fullgraph=True, backend="eager"
    )
    with pytest.raises(Unsupported, match="inplace_backward must be False"):
        compiled(logits)


@needs_triton
def test_auto_takes_the_torch_path_on_cpu(monkeypatch):
    logits, labels = peaked(2, 257)
    # A kernel that cannot launch: "auto" must not try to.
    monkeypatch.setattr(MODULE, "launch_logprobs", None)
    automatic = token_logprobs(logits.cpu(), labels.cpu())
    assert torch.equal(automatic, token_logprobs(logits.cpu(), labels.cpu(), backend="torch"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3).long()}, r"labels must have the shape .*\(2,\), got \(3,\)"),
        ({"labels": torch.zeros(2)}, r"labels must be int32 or int64, got torch\.float32"),
        ({"labels": torch.tensor([0, 5])}, r"labels must be in \[0, 5\) .*, got 5"),
        ({"logits": torch.zeros(2, 5).long()}, r"logits must be a float tensor, got torch\.int64"),
        ({"logits": torch.zeros(2, 0)}, r"logits must have a vocabulary .*, got \(2, 0\)"),
        ({"temperature": 0.0}, r"temperature must be above 0, got 0\.0"),
        ({"temperature": float("nan")}, r"temperature must be above 0, got nan"),
        ({"temperature": torch.ones(3)}, r"temperature must have the shape .*, got \(3,\)"),
        ({"temperature": torch.tensor([1.0, -1.0])}, r"temperature must be above 0, got -1\.0"),
        ({"mask": torch.ones(3)}, r"mask must have the shape .*, got \(3,\)"),
        ({"logit_scale": 0.0}, r"logit_scale must be above 0, got 0\.0"),
        ({"softcap": -1.0}, r"softcap must be above 0, got -1\.0"),
        (
            {"inplace_backward": True, "logits": torch.zeros(5, 2).t()},
            r"logits must be contiguous for inplace_backward, got strides \(1, 2\)",
        ),
        ({"backend": "triton", "logits": torch.zeros(2, 5).double()}, r"got torch\.float64 on cpu"),
        ({"backend": "cuda"}, r"backend must be one of auto, triton, torch, got 'cuda'"),
    ],
)
def test_unusable_arguments_are_refused(change, message):
    arguments = {"logits": torch.zeros(2, 5), "labels": torch.zeros(2, dtype=torch.int64), **change}
    with pytest.raises(ValueError, match=message):
        token_logprobs(**arguments)


def test_without_triton_the_torch_path_still_works():
    program = """
import sys
sys.modules["triton"] = None  # makes the import fail, as where it is not installed
import torch
from gad_fast.kernels import token_logprobs
logits, labels = torch.tensor([[0.0, 0.0]]), torch.tensor([1])
assert abs(token_logprobs(logits, labels).item() - torch.tensor(0.5).log().item()) < 1e-6
try:
    token_logprobs(logits, labels, backend="triton")
except ValueError as error:
    assert "needs Triton" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
