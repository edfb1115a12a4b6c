"""`policy_loss_from_logits` on both paths against float64 autograd of the references."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch.testing import assert_close

from gad_fast.kernels import chunked_torch, policy_row_kernel
from gad_fast.kernels.backend import Backend
from gad_fast.kernels.policy_inputs import PolicyInputs
from gad_fast.kernels.policy_loss import policy_loss, policy_loss_reference
from gad_fast.kernels.policy_loss_from_logits import policy_loss_from_logits
from gad_fast.kernels.policy_objective import NUM_TERMS, PolicyObjective
from gad_fast.kernels.token_logprobs import token_logprobs, token_logprobs_reference
from kernel_cases import (
    DEVICE,
    TEMPERATURE,
    each_backend,
    each_dtype,
    each_vocabulary,
    needs_triton,
    peaked,
    relative_error,
)

OBJECTIVES: list[dict[str, Any]] = [
    *({"loss_type": "ppo", "clip_ratio_c": c} for c in (None, 1.5)),
    {"loss_type": "cispo"},
    {"loss_type": "reinforce"},
    *({"kl_type": kind, "kl_coef": 0.3} for kind in ("k1", "k2", "k3", "k3+")),
    {"entropy_coef": 0.05, "kl_coef": 0.1, "clip_ratio_c": 2.0},
]
# Norm of the error over the norm: fp32 roundings; in bf16 that of the store, to 8 significant bits.
GRAD_ERROR = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
# Norm of the error of a row whose p is so near 1 that the gradient is but a few roundings of it.
GRAD_ATOL = 1e-6

# The package exports a function of the module's own name, so only this gives the module.
MODULE = importlib.import_module("gad_fast.kernels.policy_loss_from_logits")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small inputs cross blocks and chunks."""
    monkeypatch.setattr(policy_row_kernel, "MAX_BLOCK", 128)
    monkeypatch.setattr(chunked_torch, "_CHUNK_BYTES", 3 * 4 * 785)


def tokens(T: int, V: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Peaked rows with ratios on both sides of both clips, and advantages of both signs."""
    logits, labels = peaked(T, V, dtype)
    generator = torch.Generator().manual_seed(T + V)

    def normal() -> Tensor:
        return torch.randn(T, generator=generator, dtype=torch.float64).to(DEVICE)

    logp, _ = token_logprobs_reference(logits.double(), labels, temperature=TEMPERATURE)
    return {
        "logits": logits,
        "labels": labels,
        "old_logp": logp + 0.4 * normal(),
        "ref_logp": logp + 0.5 * normal(),
        "advantages": normal(),
        "mask": torch.arange(T, device=DEVICE) % 5 != 2,
        "rollout_is_weights": (1 + 0.2 * normal()).clamp(0.1, 2),
    }


def truth(
    case: dict[str, Tensor], objective: dict[str, Any], weights: Tensor, **scaling: Any
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the logits in float64."""
    logits = case["logits"].double().requires_grad_()
    logp, entropy = token_logprobs_reference(
        logits, case["labels"], **{"temperature": TEMPERATURE, **scaling}
    )
    inputs = PolicyInputs(
        case.get("old_logp"),
        case.get("ref_logp"),
        case["advantages"],
        weights,
        case.get("rollout_is_weights"),
    )
    loss = policy_loss_reference(logp, entropy, inputs, PolicyObjective(**objective))
    (grad,) = torch.autograd.grad(loss, logits)
    return loss.detach(), grad


def differentiate(
    case: dict[str, Tensor], backend: Backend = "auto", **options: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, its gradient and metrics of the operation; the gradient through a factor of 3."""
    dtype = torch.float64 if case["logits"].dtype == torch.float64 else torch.float32
    case = {
        name: values.to(dtype) if values.is_floating_point() and name != "logits" else values
        for name, values in case.items()
    }
    logits = case.pop("logits").detach().clone().requires_grad_()
    options = {"temperature": TEMPERATURE, **options}
    loss, metrics = policy_loss_from_logits(
        logits,
        case.pop("labels"),
        case.pop("old_logp", None),
        case.pop("advantages"),
        case.pop("mask", None),
        backend=backend,
        ref_logp=case.pop("ref_logp", None),
        rollout_is_weights=case.pop("rollout_is_weights", None),
        **options,
    )
    assert not case
    (grad,) = torch.autograd.grad(3.0 * loss, logits)
    return loss.detach(), grad, metrics


def token_mean(case: dict[str, Tensor]) -> Tensor:
    return case["mask"].double() / case["mask"].sum()


def assert_matches_reference(
    case: dict[str, Tensor], objective: dict[str, Any], backend: Backend, **scaling: Any
) -> None:
    expected_loss, expected_grad = truth(case, objective, token_mean(case), **scaling)
    loss, grad, _ = differentiate(case, backend, **objective, **scaling)
    assert expected_loss != 0
    assert grad.dtype == case["logits"].dtype
    assert_close(loss.double(), expected_loss, rtol=5e-6, atol=1e-6)
    error = (grad.double() - 3.0 * expected_grad).norm()
    assert error <= GRAD_ERROR[grad.dtype] * 3.0 * expected_grad.norm() + GRAD_ATOL


@pytest.mark.parametrize("is_on_policy", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@each_dtype
@each_backend
def test_loss_and_gradient_match_the_reference(backend, dtype, objective, is_on_policy):
    case = tokens(7, 257, dtype)
    if is_on_policy:
        del case["old_logp"]
    assert_matches_reference(case, objective, backend)


@pytest.mark.parametrize("T", [1, 7])
@each_vocabulary
@each_dtype
@each_backend
def test_every_length_of_row_matches_the_reference(backend, dtype, V, T):
    assert_matches_reference(tokens(T, V, dtype), OBJECTIVES[-1], backend)


@each_dtype
@each_backend
def test_scaled_and_capped_logits_match_the_reference(backend, dtype):
    case = tokens(7, 257, dtype)
    temperature = torch.linspace(0.6, 1.4, 7, device=DEVICE)
    scaling = {"temperature": temperature, "logit_scale": 1.2, "softcap": 9.0}
    logp, _ = token_logprobs_reference(case["logits"].double(), case["labels"], **scaling)
    case["old_logp"] = logp + torch.linspace(-0.5, 0.5, 7, device=DEVICE)
    case["ref_logp"] = logp - 0.2
    assert_matches_reference(case, OBJECTIVES[-1], backend, **scaling)


@needs_triton
@each_dtype
def test_shipped_blocks_match_the_reference(dtype, monkeypatch):
    monkeypatch.undo()
    # Two whole blocks and one column.
    case = tokens(2, 2 * 8192 + 1, dtype)
    assert_matches_reference(case, OBJECTIVES[-1], "triton")


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_torch_path_keeps_float64(objective):
    case = tokens(7, 257, torch.float64)
    loss, grad = truth(case, objective, token_mean(case))
    actual = differentiate(case, "torch", **objective)
    assert_close(actual[0], loss, rtol=1e-12, atol=1e-14)
    assert_close(actual[1], 3.0 * grad, rtol=1e-10, atol=1e-14)


@each_backend
def test_agrees_with_the_two_operations_it_stands_for(backend):
    case = {k: v.float() if v.is_floating_point() else v for k, v in tokens(6, 257).items()}
    case = {name: values.reshape(2, 3, *values.shape[1:]) for name, values in case.items()}
    options = {"agg": "seq-mean-token-mean", "num_seqs": 5, "kl_coef": 0.1, "entropy_coef": 0.02}
    _, grad, metrics = differentiate(case, backend, **options)
    logits = case["logits"].requires_grad_()
    logp, entropy = token_logprobs(
        logits, case["labels"], temperature=TEMPERATURE, return_entropy=True, backend=backend
    )
    loss, expected = policy_loss(
        logp,
        case["old_logp"],
        case["advantages"],
        case["mask"],
        entropy=entropy,
        ref_logp=case["ref_logp"],
        rollout_is_weights=case["rollout_is_weights"],
        backend=backend,
        **options,
    )
    (expected_grad,) = torch.autograd.grad(3.0 * loss, logits)
    assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].dim() == 0
        assert_close(metrics[name], value, rtol=1e-5, atol=1e-6, msg=name)


@each_backend
def test_masked_tokens_may_hold_anything(backend):
    case, clean = tokens(7, 257), tokens(7, 257)
    outside = ~case["mask"]
    for name in ("logits", "old_logp", "ref_logp", "advantages", "rollout_is_weights"):
        case[name][outside] = torch.nan
    case["labels"][outside] = -100
    actual, expected = (differentiate(c, backend, **OBJECTIVES[-1]) for c in (case, clean))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[1][outside], torch.zeros_like(actual[1][outside]))
    for name, value in actual[2].items():
        assert torch.equal(value, expected[2][name]), name


@each_backend
def test_nothing_kept_gives_zero_loss_and_gradient(backend):
    case = tokens(7, 257)
    case["mask"] = torch.zeros_like(case["mask"])
    loss, grad, metrics = differentiate(case, backend, kl_coef=0.1)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(grad))
    assert all(value == 0 for value in metrics.values())


@each_backend
def test_no_tokens_give_zero_loss_and_an_empty_gradient(backend):
    case = {name: values[:0] for name, values in tokens(7, 257).items()}
    loss, grad, _ = differentiate(case, backend)
    assert loss == 0
    assert grad.shape == (0, 257)


@each_backend
@pytest.mark.parametrize("layout", ["row stride", "column stride"])
def test_strided_logits_give_what_contiguous_ones_give(backend, layout):
    case = tokens(7, 257)
    expected = differentiate(case, backend)
    wide = torch.nn.functional.pad(case["logits"], (3, 8), value=float("nan"))
    strided = wide[:, 3:-8] if layout == "row stride" else case["logits"].t().contiguous().t()
    assert not strided.is_contiguous()
    leaf = strided.detach().requires_grad_()
    loss, _ = policy_loss_from_logits(
        leaf,
        case["labels"],
        case["old_logp"].float(),
        case["advantages"].float(),
        case["mask"],
        ref_logp=case["ref_logp"].float(),
        rollout_is_weights=case["rollout_is_weights"].float(),
        temperature=TEMPERATURE,
        backend=backend,
    )
    (grad,) = torch.autograd.grad(3.0 * loss, leaf)
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


def call(case: dict[str, Tensor], logits: Tensor, backend: Backend, **options: Any) -> Tensor:
    """The loss of a case whose logits are given apart."""
    old_logp, advantages = case["old_logp"].float(), case["advantages"].float()
    loss, _ = policy_loss_from_logits(
        logits, case["labels"], old_logp, advantages, case["mask"], backend=backend, **options
    )
    return loss


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@each_dtype
@each_backend
def test_gradient_written_over_the_logits_is_the_same(backend, dtype, ratio_level, factor):
    case = {k: v.reshape(2, 3, *v.shape[1:]) for k, v in tokens(6, 257, dtype).items()}
    options = {"ratio_level": ratio_level, "entropy_coef": 0.1}
    separate, over = (case["logits"].clone().requires_grad_() for _ in range(2))
    expected_loss = call(case, separate, backend, **options)
    loss = call(case, over, backend, inplace_backward=True, **options)
    (expected,) = torch.autograd.grad(factor * expected_loss, separate)
    (actual,) = torch.autograd.grad(factor * loss, over)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(actual, expected)
    assert actual.data_ptr() == over.data_ptr()
    assert torch.equal(separate.detach(), case["logits"])


@each_backend
def test_whoever_still_needs_overwritten_logits_is_told(backend):
    case = tokens(3, 257)
    leaf = case["logits"].requires_grad_()
    loss = call(case, leaf.exp(), backend, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_backend
def test_overwritten_logits_serve_one_backward_pass(backend):
    case = tokens(3, 257)
    leaf = case["logits"].requires_grad_()
    loss = call(case, leaf, backend, inplace_backward=True)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)


@each_backend
def test_kept_gradient_serves_every_backward_pass(backend):
    case = tokens(3, 257)
    leaf = case["logits"].requires_grad_()
    loss = call(case, leaf, backend)
    (twice,) = torch.autograd.grad(2.0 * loss, leaf, retain_graph=True)
    (once,) = torch.autograd.grad(loss, leaf)
    assert once.any()
    assert torch.equal(twice, 2.0 * once)


@each_backend
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_without_need_of_a_gradient_there_is_none(backend, inplace_backward, monkeypatch):
    name = "launch_policy_rows" if backend == "triton" else "torch_policy_rows"
    original, rooms = getattr(MODULE, name), []

    def spy(*arguments):
        rooms.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(MODULE, name, spy)
    case = tokens(7, 257)
    before = case["logits"].clone()
    expected = call(case, case["logits"].clone().requires_grad_(), backend)
    loss = call(case, case["logits"], backend, inplace_backward=inplace_backward)
    with torch.no_grad():
        again = call(case, case["logits"].clone().requires_grad_(), backend)
    assert not loss.requires_grad
    assert loss == expected == again
    assert torch.equal(case["logits"], before)
    assert [room is None for room in rooms] == [False, True, True]


@pytest.mark.parametrize("is_packed", [False, True])
@each_backend
def test_sequence_level_ratio_is_gspos(backend, is_packed):
    case = {k: v.reshape(2, 4, *v.shape[1:]) for k, v in tokens(8, 257).items()}
    del case["ref_logp"], case["rollout_is_weights"]
    logits = case["logits"].double().requires_grad_()
    logp, entropy = token_logprobs_reference(logits, case["labels"], temperature=TEMPERATURE)
    mask, A = case["mask"].double(), case["advantages"][:, 0]
    case["advantages"] = A
    ratio = (((logp - case["old_logp"]) * mask).sum(1) / mask.sum(1)).exp()
    bonus = (0.1 * entropy * mask).sum(1) / mask.sum(1)
    loss = (-torch.minimum(ratio * A, ratio.clamp(0.9, 1.1) * A) - bonus).mean()
    (expected,) = torch.autograd.grad(loss, logits)
    options = {"agg": "seq-mean-token-mean", "ratio_level": "sequence", "entropy_coef": 0.1}
    options |= {"clip_low": 0.1, "clip_high": 0.1}
    if is_packed:
        case = {k: v if k == "advantages" else v.flatten(0, 1) for k, v in case.items()}
        options["cu_seqlens"] = torch.tensor([0, 4, 8], device=DEVICE)
    actual = differentiate(case, backend, **options)
    assert_close(actual[0].double(), loss.detach(), rtol=5e-6, atol=1e-6)
    assert relative_error(actual[1].reshape(2, 4, 257), 3.0 * expected) <= 1e-5


@each_backend
def test_label_that_nobody_checked_gives_nan_and_is_not_read(backend, monkeypatch):
    # As on a GPU, where no label is looked at.
    monkeypatch.setattr("gad_fast.kernels.arguments.can_look_at", lambda _tensor: False)
    case = tokens(3, 257)
    case["labels"][1] = 257
    loss, grad, _ = differentiate(case, backend)
    assert loss.isnan()
    assert grad[0].isfinite().all()


@each_backend
@pytest.mark.parametrize("has_grad", [True, False])
def test_custom_op_passes_opcheck(backend, has_grad):
    case = {k: v.float() if v.is_floating_point() else v for k, v in tokens(3, 257).items()}
    arguments = (
        case["logits"].requires_grad_(has_grad),
        case["labels"],
        torch.full((3,), 1 / TEMPERATURE, device=DEVICE),
        1.0,
        9.0,
        case["old_logp"],
        None,
        case["advantages"],
        case["mask"].float() / 2,
        case["rollout_is_weights"],
        *PolicyObjective(entropy_coef=0.1),
        backend,
        has_grad,
    )
    op = torch.ops.gad_fast.policy_loss_from_logits.default
    assert op(*arguments)[1].shape == (NUM_TERMS, 3)
    torch.library.opcheck(op, arguments)


@each_backend
def test_scaling_op_passes_opcheck_and_rounds_once(backend):
    gradient, _ = peaked(3, 257, torch.bfloat16)
    factor = torch.tensor(1 / 3, device=DEVICE)
    op = torch.ops.gad_fast.scaled_gradient.default
    torch.library.opcheck(op, (gradient, factor, backend))
    assert torch.equal(op(gradient, factor, backend), (gradient.float() * factor).bfloat16())


@each_backend
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_compiles_as_one_graph(backend, ratio_level):
    case = {k: v.reshape(2, 3, *v.shape[1:]) for k, v in tokens(6, 257).items()}
    logits = case["logits"].requires_grad_()

    def loss(logits):
        options = {"agg": "seq-mean-token-mean", "ratio_level": ratio_level, "entropy_coef": 0.1}
        return 2.0 * call(case, logits, backend, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(logits), logits)
    (actual,) = torch.autograd.grad(compiled(logits), logits)
    assert torch.equal(actual, expected)


def test_overwriting_logits_is_refused_under_compile():
    case = tokens(3, 257)
    logits = case["logits"].requires_grad_()
    compiled = torch.compile(
        lambda x: call(case, x, "torch", inplace_backward=True), fullgraph=True, backend="eager"
    )
    with pytest.raises(Unsupported, match="inplace_backward must be False"):
        compiled(logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3).long()}, r"labels must have the shape .*\(2,\), got \(3,\)"),
        ({"labels": torch.tensor([0, 5])}, r"labels must be in \[0, 5\) .*, got 5"),
        ({"logits": torch.zeros(2, 5).long()}, r"logits must be a float tensor, got torch\.int64"),
        ({"mask": torch.ones(3)}, r"mask must have the shape .*\(2,\), got \(3,\)"),
        ({"advantages": torch.zeros(3)}, r"advantages must have the shape of .*\(2,\), got \(3,\)"),
        ({"temperature": 0.0}, r"temperature must be above 0, got 0\.0"),
        ({"softcap": 0.0}, r"softcap must be above 0, got 0\.0"),
        ({"kl_coef": 0.1}, r"ref_logp must be given when kl_coef is not 0"),
        ({"loss_type": "grpo"}, r"loss_type must be one of ppo, cispo, reinforce, got 'grpo'"),
        ({"ratio_level": "sequence"}, r"ratio_level='sequence' must know the sequences"),
        ({"backend": "triton", "logits": torch.zeros(2, 5).double()}, r"got torch\.float64 on cpu"),
        (
            {"inplace_backward": True, "logits": torch.zeros(5, 2).t().requires_grad_()},
            r"logits must be contiguous for inplace_backward, got strides \(1, 2\)",
        ),
    ],
)
def test_unusable_arguments_are_refused(change, message):
    arguments: dict[str, Any] = {
        "logits": torch.zeros(2, 5),
        "labels": torch.zeros(2).long(),
        "old_logp": torch.zeros(2),
        "advantages": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=message):
        policy_loss_from_logits(**{**arguments, **change})
