"""`token_logprobs` on both paths against float64 autograd of its reference.

The data is peaked, as that of a trained model is: on flat logits a phantom token in the tail, or a
rounded p - 1 at the label, is too small to be seen.
"""

import importlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gad_fast.kernels import chunked_torch, token_logprobs, token_logprobs_reference
from gad_fast.kernels.optional_triton import HAS_TRITON, IS_INTERPRETED
from gad_fast.kernels.token_logprobs import Backend

DEVICE = "cpu" if IS_INTERPRETED or not torch.cuda.is_available() else "cuda"
CAN_RUN_TRITON = HAS_TRITON and (IS_INTERPRETED or DEVICE == "cuda")
needs_triton = pytest.mark.skipif(not CAN_RUN_TRITON, reason="Triton cannot run here")
each_backend = pytest.mark.parametrize(
    "backend", [pytest.param("triton", marks=needs_triton), "torch"]
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# In blocks of 128: a tail of one column, of most of a block, and of a few columns (50257 is the
# same residue as 785 modulo 16, so that no row after the first is aligned).
each_vocabulary = pytest.mark.parametrize("V", [257, 1000, 785])

TEMPERATURE = 0.8
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
    monkeypatch.setattr(MODULE, "_MAX_FORWARD_BLOCK", 128)
    monkeypatch.setattr(MODULE, "_MAX_BACKWARD_BLOCK", 128)
    monkeypatch.setattr(chunked_torch, "_CHUNK_BYTES", 3 * 4 * 785)


def peaked(T: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits whose largest p goes from 0.999 down to 0.3, and labels, two in three that token."""
    generator = torch.Generator().manual_seed(T * V)
    logits = 4.0 * torch.randn(T, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (T,), generator=generator)
    labels[0] = V - 1
    p = torch.linspace(0.999, 0.3, T, dtype=torch.float64)
    rest = torch.logsumexp(logits / TEMPERATURE, -1)
    logits[torch.arange(T), labels] = TEMPERATURE * (rest + torch.log(p / (1 - p)))
    labels[2::3] = (labels[2::3] + 1) % V
    return logits.to(DEVICE, dtype), labels.to(DEVICE)


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


def check_against_reference(
    logits: Tensor, labels: Tensor, backend: Backend, used: str = "both"
) -> None:
    def operation(logits, labels):
        return token_logprobs(
            logits, labels, temperature=TEMPERATURE, return_entropy=True, backend=backend
        )

    def reference(logits, labels):
        return token_logprobs_reference(logits, labels, temperature=TEMPERATURE)

    grads = upstream(labels.shape, used)
    logprobs, entropy, grad_logits = differentiate(operation, logits, labels, grads)
    expected = differentiate(reference, logits.double(), labels, grads)

    assert logprobs.dtype == entropy.dtype == torch.float32
    assert grad_logits.dtype == logits.dtype
    assert_close(logprobs.double(), expected[0], rtol=VALUE_RTOL, atol=VALUE_ATOL)
    assert_close(entropy.double(), expected[1], rtol=VALUE_RTOL, atol=VALUE_ATOL)
    rtol = GRAD_RTOL[logits.dtype]
    assert_close(grad_logits.double(), expected[2], rtol=rtol, atol=GRAD_ATOL)


@pytest.mark.parametrize("used", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("T", [1, 7])
@each_vocabulary
@each_dtype
@each_backend
def test_values_and_gradients_match_the_reference(backend, dtype, V, T, used):
    check_against_reference(*peaked(T, V, dtype), backend, used)


@each_dtype
@needs_triton
def test_shipped_blocks_match_the_reference(dtype, monkeypatch):
    monkeypatch.undo()
    # Two whole forward blocks and one column.
    check_against_reference(*peaked(2, 2 * 8192 + 1, dtype), "triton")


def test_reference_passes_gradcheck():
    logits, labels = peaked(3, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: token_logprobs_reference(x, labels, temperature=TEMPERATURE),
        logits.requires_grad_(),
    )


def test_torch_path_keeps_float64():
    logits, labels = peaked(7, 11, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: token_logprobs(x, labels, temperature=TEMPERATURE, return_entropy=True),
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
    check_against_reference(logits, labels, backend)


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
    check_against_reference(logits.reshape(2, 3, 257)[:, :-1], labels.reshape(2, 3)[:, 1:], backend)


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
    check_against_reference(logits, labels, backend)


@each_backend
def test_rows_without_upstream_gradient_get_exact_zeros(backend):
    logits, labels = peaked(3, 257)
    logits.requires_grad_()
    logprobs = token_logprobs(logits, labels, backend=backend)
    (grad_logits,) = torch.autograd.grad(logprobs[1], logits)
    assert torch.equal(grad_logits[[0, 2]], torch.zeros_like(grad_logits[[0, 2]]))
    assert grad_logits[1].any()


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


@needs_triton
@pytest.mark.parametrize("is_contiguous", [True, False])
def test_custom_op_passes_opcheck(is_contiguous):
    logits, labels = peaked(3, 257)
    if not is_contiguous:
        logits = torch.nn.functional.pad(logits, (0, 7))[:, :257]
    torch.library.opcheck(
        torch.ops.gad_fast.token_logprobs.default,
        (logits.detach().requires_grad_(), labels, TEMPERATURE),
    )


# Dynamo makes an instance of every autograd.Function that it traces, and warns itself about it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
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


@needs_triton
def test_auto_takes_the_torch_path_on_cpu(monkeypatch):
    logits, labels = peaked(2, 257)
    # A kernel that cannot launch: "auto" must not try to.
    monkeypatch.setattr(MODULE, "_forward_op", None)
    automatic = token_logprobs(logits.cpu(), labels.cpu())
    assert torch.equal(automatic, token_logprobs(logits.cpu(), labels.cpu(), backend="torch"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"one entry for each row.*\(2,\).*\(3,\)"),
        ({"labels": torch.zeros(2)}, r"int32 or int64, got torch\.float32"),
        ({"temperature": 0.0}, r"above 0, got 0\.0"),
        ({"temperature": float("nan")}, r"above 0, got nan"),
        ({"backend": "triton", "logits": torch.zeros(2, 5).double()}, r"got torch\.float64 on cpu"),
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
