"""`policy_loss` on both paths against float64 autograd of its reference, for every objective."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gad_fast.kernels import policy_loss
from gad_fast.kernels.policy_inputs import PolicyInputs, PolicyOptions
from gad_fast.kernels.policy_loss import policy_loss_reference
from gad_fast.kernels.policy_objective import PolicyObjective
from kernel_cases import DEVICE, each_backend, needs_triton

T = 37
OBJECTIVES = [
    *({"loss_type": "ppo", "clip_ratio_c": c} for c in (None, 1.5)),
    {"loss_type": "cispo"},
    {"loss_type": "reinforce"},
    *({"kl_type": kind, "kl_coef": 0.3} for kind in ("k1", "k2", "k3", "k3+")),
    {"entropy_coef": 0.05, "kl_coef": 0.1, "clip_ratio_c": 2.0},
]
each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=str)


def tokens(seed: int = 0) -> dict[str, Any]:
    """Tokens with ratios on both sides of both clips, and advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(T, generator=generator, dtype=torch.float64)

    logp = -normal().abs()
    return {
        "logp": logp.to(DEVICE),
        "old_logp": (logp + 0.4 * normal()).to(DEVICE),
        "ref_logp": (logp + 0.5 * normal()).to(DEVICE),
        "advantages": normal().to(DEVICE),
        "entropy": normal().abs().to(DEVICE),
        "mask": (torch.arange(T) % 5 != 2).to(DEVICE),
        "rollout_is_weights": (1 + 0.2 * normal()).clamp(0.1, 2).to(DEVICE),
    }


def truth(case: dict[str, Any], objective: dict, weights: Tensor):
    """Loss and gradients of logp and entropy in float64."""
    logp = case["logp"].clone().requires_grad_()
    entropy = case["entropy"].clone().requires_grad_()
    inputs = PolicyInputs(
        case.get("old_logp"),
        case.get("ref_logp"),
        case["advantages"],
        weights,
        case.get("rollout_is_weights"),
    )
    loss = policy_loss_reference(logp, entropy, inputs, PolicyObjective(**objective))
    grads = torch.autograd.grad(loss, [logp, entropy], allow_unused=True)
    return loss.detach(), grads[0], grads[1]


def differentiate(case: dict[str, Any], backend: Any, dtype=torch.float32, **options: Any):
    """Loss, its gradients and metrics of the operation."""
    case = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.items()}
    logp, entropy = (case.pop(name).detach().requires_grad_() for name in ("logp", "entropy"))
    loss, metrics = policy_loss(
        logp,
        case.pop("old_logp", None),
        case.pop("advantages"),
        case.pop("mask", None),
        entropy=entropy,
        backend=backend,
        **case,
        **options,
    )
    (3.0 * loss).backward()
    assert logp.grad is not None
    assert entropy.grad is not None
    return loss.detach(), logp.grad / 3.0, entropy.grad / 3.0, metrics


@each_objective
@each_backend
@pytest.mark.parametrize("is_on_policy", [False, True])
def test_loss_and_gradients_match_the_reference(objective, backend, is_on_policy):
    case = tokens()
    if is_on_policy:
        del case["old_logp"]
    weights = case["mask"].double() / case["mask"].sum()
    expected = truth(case, objective, weights)
    actual = differentiate(case, backend, **objective)
    for value, true_value in zip(actual[:3], expected, strict=True):
        assert_close(value.double(), true_value, rtol=2e-6, atol=2e-7)


@each_objective
def test_torch_path_keeps_float64(objective):
    case = tokens()
    weights = case["mask"].double() / case["mask"].sum()
    expected = truth(case, objective, weights)
    actual = differentiate(case, "torch", dtype=torch.float64, **objective)
    for value, true_value in zip(actual[:3], expected, strict=True):
        assert_close(value, true_value, rtol=1e-12, atol=1e-14)


@each_backend
def test_far_drift_keeps_its_gradient_and_stays_finite(backend):
    case = tokens()
    case["old_logp"][:4] -= 90.0
    case["ref_logp"][4:8] += 90.0
    del case["mask"]
    objective = {"kl_coef": 0.1, "loss_type": "ppo"}
    expected = truth(case, objective, torch.full((T,), 1 / T, dtype=torch.float64, device=DEVICE))
    actual = differentiate(case, backend, **objective)
    assert actual[1].isfinite().all()
    assert (actual[1][4:8].abs() > 1e3).all()
    for value, true_value in zip(actual[:3], expected, strict=True):
        assert_close(value.double(), true_value, rtol=1e-5, atol=1e-7)


@each_backend
def test_masked_tokens_may_hold_anything(backend):
    case, clean = tokens(), tokens()
    for name in ("old_logp", "ref_logp", "advantages", "logp"):
        case[name][~case["mask"]] = torch.nan
    actual, expected = (differentiate(c, backend, kl_coef=0.1) for c in (case, clean))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    for name, value in actual[3].items():
        assert torch.equal(value, expected[3][name]), name


@each_backend
def test_nothing_kept_gives_zero_loss_and_gradient(backend):
    case = tokens()
    case["mask"] = torch.zeros_like(case["mask"])
    loss, grad_logp, grad_entropy, metrics = differentiate(case, backend, kl_coef=0.1)
    assert loss == 0
    assert not grad_logp.any()
    assert not grad_entropy.any()
    assert all(value == 0 for value in metrics.values())


def rectangle(values: Tensor) -> Tensor:
    """[36] tokens as [4, 9]."""
    return values[:36].reshape(4, 9)


AGGREGATIONS = {
    "token-mean": lambda m: m / m.sum(),
    "seq-mean-token-mean": lambda m: m / m.sum(1, keepdim=True).clamp_min(1) / 3,
    "seq-mean-token-sum": lambda m: m / 3,
    "seq-mean-token-sum-norm": lambda m: m / 3 / 50,
}


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("agg", AGGREGATIONS)
def test_aggregations_are_the_books(agg, is_packed):
    case = {name: rectangle(values) for name, values in tokens().items()}
    case["mask"][2] = False  # a fully masked sequence is no sequence
    weights = AGGREGATIONS[agg](case["mask"].double())
    expected = truth(case, {}, weights)
    options: dict[str, Any] = {"constant_length": 50} if agg.endswith("norm") else {}
    if is_packed:
        case = {name: values.reshape(-1) for name, values in case.items()}
        options["cu_seqlens"] = torch.arange(0, 37, 9, dtype=torch.int32, device=DEVICE)
    loss, grad, _, _ = differentiate(case, "torch", torch.float64, agg=agg, **options)
    assert_close(loss, expected[0], rtol=1e-12, atol=1e-14)
    assert_close(grad.reshape(4, 9), expected[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("agg", list(AGGREGATIONS)[:3])
def test_micro_batches_with_the_steps_normalisers_add_up_to_the_step(agg):
    case = {name: rectangle(values) for name, values in tokens().items()}
    whole = differentiate(dict(case), "torch", torch.float64, agg=agg)[:2]
    totals = {"num_tokens": case["mask"].sum(), "num_seqs": 4}
    parts = [
        differentiate({k: v[r] for k, v in case.items()}, "torch", torch.float64, agg=agg, **totals)
        for r in (slice(0, 1), slice(1, 4))
    ]
    assert_close(parts[0][0] + parts[1][0], whole[0], rtol=1e-12, atol=1e-14)
    assert_close(torch.cat([parts[0][1], parts[1][1]]), whole[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("is_packed", [False, True])
def test_sequence_level_ratio_is_gspos(is_packed):
    case = {name: rectangle(values) for name, values in tokens().items()}
    case["advantages"] = case["advantages"][:, 0]
    del case["rollout_is_weights"], case["ref_logp"]
    logp, mask = case["logp"].clone().requires_grad_(), case["mask"].double()
    log_ratio = ((logp - case["old_logp"]) * mask).sum(1) / mask.sum(1)
    ratio, A = log_ratio.exp(), case["advantages"]
    loss = -torch.minimum(ratio * A, ratio.clamp(0.9, 1.1) * A).mean()
    (grad,) = torch.autograd.grad(loss, logp)
    options = {"clip_low": 0.1, "clip_high": 0.1, "agg": "seq-mean-token-mean"}
    if is_packed:
        advantages = case.pop("advantages")
        case = {name: values.reshape(-1) for name, values in case.items()}
        case["advantages"] = advantages
        options["cu_seqlens"] = torch.arange(0, 37, 9, device=DEVICE)
    actual = differentiate(case, "torch", torch.float64, ratio_level="sequence", **options)
    assert_close(actual[0], loss.detach(), rtol=1e-12, atol=1e-14)
    assert_close(actual[1].reshape(4, 9), grad, rtol=1e-12, atol=1e-14)


@each_backend
def test_metrics_are_means_over_kept_tokens_whatever_the_aggregation(backend):
    case = {name: rectangle(values) for name, values in tokens().items()}
    kept = case["mask"]
    log_ratio = (case["logp"] - case["old_logp"])[kept]
    ratio = log_ratio.exp()
    d = (case["ref_logp"] - case["logp"])[kept]
    A = case["advantages"][kept]
    expected = {
        "pg_loss": -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A).mean(),
        "kl": (d.exp() - d - 1).mean(),
        "entropy": case["entropy"][kept].mean(),
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "approx_kl": -log_ratio.mean(),
        "approx_kl_k3": (ratio - 1 - log_ratio).mean(),
        "clip_fraction_low": ((ratio < 0.8) & (A < 0)).double().mean(),
        "clip_fraction_high": ((ratio > 1.2) & (A > 0)).double().mean(),
        "clip_fraction_dual": torch.zeros((), dtype=torch.float64, device=DEVICE),
        "num_tokens": kept.sum().double(),
    }
    for agg in ("token-mean", "seq-mean-token-sum"):
        metrics = differentiate(dict(case), backend, agg=agg)[3]
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert metrics[name].dim() == 0
            assert_close(metrics[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_custom_op_passes_opcheck(backend):
    case = {k: v.float() if v.is_floating_point() else v for k, v in tokens().items()}
    weights = case["mask"].float() / T
    torch.library.opcheck(
        torch.ops.gad_fast.policy_loss.default,
        (
            case["logp"].requires_grad_(),
            case["entropy"].requires_grad_(),
            case["old_logp"],
            None,
            case["advantages"],
            weights,
            case["rollout_is_weights"],
            *PolicyObjective(entropy_coef=0.1),
            backend,
        ),
    )


@each_backend
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_compiles_as_one_graph(backend, ratio_level):
    case = {
        k: rectangle(v).float() if v.is_floating_point() else rectangle(v)
        for k, v in tokens().items()
    }

    def loss(logp):
        return policy_loss(
            logp,
            case["old_logp"],
            case["advantages"],
            case["mask"],
            ref_logp=case["ref_logp"],
            kl_coef=0.1,
            agg="seq-mean-token-mean",
            ratio_level=ratio_level,
            backend=backend,
        )[0]

    logp = case["logp"].clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(logp), logp)
    (actual,) = torch.autograd.grad(compiled(logp), logp)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "grpo"}, r"loss_type must be one of ppo, cispo, reinforce, got 'grpo'"),
        ({"kl_type": "k4"}, r"kl_type must be one of k1, k2, k3, k3\+, got 'k4'"),
        ({"clip_low": 1.5}, r"clip_low must be at least 0 and at most 1, got 1\.5"),
        ({"clip_high": float("nan")}, r"clip_high must be at least 0, got nan"),
        ({"clip_ratio_c": 1.0}, r"clip_ratio_c must be above 1, got 1\.0"),
        ({"kl_coef": 0.1}, r"ref_logp must be given when kl_coef is not 0"),
        ({"entropy_coef": 0.1}, r"entropy must be given when entropy_coef is not 0"),
        ({"agg": "mean"}, r"agg must be one of token-mean, .*, got 'mean'"),
        ({"agg": "seq-mean-token-mean"}, r"must know the sequences.*got shape \(3,\)"),
        ({"ratio_level": "sequence"}, r"ratio_level='sequence' must know the sequences"),
        ({"constant_length": 5}, r"constant_length goes with agg='seq-mean-token-sum-norm', got 5"),
        ({"advantages": torch.zeros(2)}, r"advantages must have the shape of .*\(3,\), got \(2,\)"),
        (
            {"advantages": torch.zeros(3).long()},
            r"advantages must be a float tensor, got torch\.int64",
        ),
        ({"old_logp": torch.zeros(4)}, r"old_logp must have the shape"),
        ({"mask": torch.ones(2)}, r"mask must have the shape"),
        ({"backend": "cuda"}, r"backend must be one of auto, triton, torch, got 'cuda'"),
    ],
)
def test_unusable_arguments_are_refused(change, message):
    arguments: dict[str, Any] = {
        "logp": torch.zeros(3),
        "old_logp": torch.zeros(3),
        "advantages": torch.zeros(3),
    }
    with pytest.raises(ValueError, match=message):
        policy_loss(**{**arguments, **change})


def test_every_option_is_explained():
    explained = PolicyOptions.__doc__ or ""
    for name in PolicyOptions.__annotations__:
        assert f"        {name}: " in explained, name


def test_an_option_that_there_is_not_is_refused():
    with pytest.raises(TypeError, match="unexpected option 'klcoef'"):
        policy_loss(torch.zeros(3), None, torch.zeros(3), klcoef=0.1)  # pyright: ignore
