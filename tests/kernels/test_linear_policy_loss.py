"""`linear_policy_loss` against float64 autograd over whole logits."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gad_fast.kernels.linear_head import LinearHead
from gad_fast.kernels.linear_policy_loss import linear_policy_loss
from gad_fast.kernels.policy_chunk import ChunkSettings, Tokens, rounded_chunk, tile_chunk
from gad_fast.kernels.policy_inputs import PolicyInputs
from gad_fast.kernels.policy_loss import policy_loss_reference
from gad_fast.kernels.policy_objective import PolicyObjective
from gad_fast.kernels.token_logprobs import token_logprobs_reference
from kernel_cases import DEVICE, each_backend, needs_triton, peaked_head, relative_error

T, D, V = 23, 24, 257
OBJECTIVES = [
    {},
    {"kl_coef": 0.3, "clip_ratio_c": 1.5},
    {"loss_type": "cispo", "entropy_coef": 0.05},
    {"loss_type": "reinforce", "kl_type": "k2", "kl_coef": 0.2},
]
each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
# Relative norms: a few fp32 roundings, or the one of dZ to bfloat16 (kernels.md measured 1.6e-3).
GRAD_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3}


UNIFORM = torch.full((T,), 1 / T, dtype=torch.float64, device=DEVICE)


def case(dtype: torch.dtype, *, has_bias: bool = False) -> dict[str, Tensor]:
    hidden, weight, labels = peaked_head(T, D, V, dtype)
    generator = torch.Generator().manual_seed(3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    logp = token_logprobs_reference(hidden.double() @ weight.double().t(), labels)[0]
    tokens = {
        "hidden": hidden,
        "weight": weight,
        "labels": labels,
        "old_logp": (logp + 0.3 * normal(T)).to(wide),
        "advantages": normal(T).to(wide),
        "ref_logp": (logp + 0.3 * normal(T)).to(wide),
    }
    if has_bias:
        tokens["bias"] = normal(V).to(dtype)
    return tokens


def truth(
    tokens: dict[str, Tensor],
    objective: dict,
    weights: Tensor,
    head: dict,
    *,
    is_rounded: bool = False,
) -> list[Tensor]:
    """Loss and gradients of hidden, weight and bias in float64, of logits rounded or not."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in tokens.items()}
    leaves = [wide[k].clone().requires_grad_() for k in ("hidden", "weight", "bias") if k in wide]
    logits = leaves[0] @ leaves[1].t()
    if len(leaves) > 2:
        logits = logits + leaves[2]
    if is_rounded:
        logits = logits + (logits.bfloat16().double() - logits).detach()
    logits = logits * head.get("logit_scale", 1.0)
    if "softcap" in head:
        logits = head["softcap"] * torch.tanh(logits / head["softcap"])
    temperature = torch.as_tensor(head.get("temperature", 1.0), dtype=torch.float64)
    logits = logits / (temperature[:, None] if temperature.dim() else temperature)
    logp, entropy = token_logprobs_reference(logits, tokens["labels"].clamp(0, V - 1))
    inputs = PolicyInputs(
        wide.get("old_logp"), wide.get("ref_logp"), wide["advantages"], weights, None
    )
    loss = policy_loss_reference(logp, entropy, inputs, PolicyObjective(**objective))
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def differentiate(tokens: dict[str, Any], scale: float = 1.0, **options: Any) -> list[Tensor]:
    """Loss, and the gradients of hidden, weight and bias under an upstream gradient."""
    tokens = dict(tokens)
    names = [name for name in ("hidden", "weight", "bias") if name in tokens]
    leaves = {name: tokens.pop(name).detach().requires_grad_() for name in names}
    loss, _ = linear_policy_loss(
        leaves["hidden"],
        leaves["weight"],
        tokens.pop("labels"),
        tokens.pop("old_logp", None),
        tokens.pop("advantages"),
        tokens.pop("mask", None),
        bias=leaves.get("bias"),
        **tokens,
        **options,
    )
    grads = torch.autograd.grad(scale * loss, list(leaves.values()))
    return [loss.detach(), *(grad / scale for grad in grads)]


def check(
    actual: list[Tensor],
    expected: list[Tensor],
    dtype: torch.dtype,
    limit: float | None = None,
) -> None:
    assert_close(actual[0].double(), expected[0], rtol=1e-5, atol=2e-5)
    for grad, true_grad in zip(actual[1:], expected[1:], strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, true_grad) < (limit or GRAD_ERROR[dtype])


@each_objective
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradients_match_whole_logits(objective, dtype):
    tokens = case(dtype)
    # The product of a CPU rounds its bfloat16 result.
    is_rounded = dtype == torch.bfloat16 and DEVICE == "cpu"
    expected = truth(tokens, objective, UNIFORM, {}, is_rounded=is_rounded)
    check(differentiate(tokens, 3.0, backend="torch", **objective), expected, dtype)


@needs_triton
@each_objective
@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
def test_kernels_match_whole_logits(objective, logits_dtype):
    tokens = case(torch.bfloat16)
    options = {"logits_dtype": logits_dtype, **objective}
    actual = differentiate(tokens, 3.0, backend="triton", **options)
    is_rounded = logits_dtype == "bfloat16"
    check(actual, truth(tokens, objective, UNIFORM, {}, is_rounded=is_rounded), torch.bfloat16)


HEADS = [
    {"logit_scale": 0.5, "softcap": 6.0},
    {"temperature": 0.7},
    {"temperature": torch.linspace(0.5, 2.0, T, dtype=torch.float64)},
]


@each_backend
@pytest.mark.parametrize("head", HEADS, ids=["softcap", "temperature", "temperatures"])
def test_head_options_match_whole_logits(head, backend):
    dtype = torch.bfloat16 if backend == "triton" else torch.float64
    tokens, objective = case(dtype, has_bias=True), {"entropy_coef": 0.05}
    head = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in head.items()}
    expected = truth(tokens, objective, UNIFORM, head)
    options: dict[str, Any] = objective | head
    check(differentiate(tokens, backend=backend, **options), expected, dtype)


@each_backend
def test_chunks_change_nothing_but_roundings(backend, monkeypatch):
    dtype = torch.bfloat16 if backend == "triton" else torch.float64
    tokens, objective = case(dtype, has_bias=True), {"entropy_coef": 0.05, "kl_coef": 0.1}
    whole = differentiate(tokens, backend=backend, **objective)
    # The package exports a function of the module's own name, so only this gives the module.
    module = importlib.import_module("gad_fast.kernels.linear_policy_loss")
    monkeypatch.setattr(module, "workspace_bytes", lambda *_: 5 * 8 * V)
    chunked = differentiate(tokens, backend=backend, **objective)
    assert_close(chunked[0], whole[0], rtol=1e-6, atol=1e-7)
    limit = 1e-12 if dtype == torch.float64 else 4e-3
    assert max(map(relative_error, chunked[1:], whole[1:])) < limit


@each_backend
def test_masked_tokens_are_dropped_and_may_hold_anything(backend):
    dtype = torch.bfloat16 if backend == "triton" else torch.float64
    tokens, objective = case(dtype), {"kl_coef": 0.1}
    mask = torch.arange(T, device=DEVICE) % 3 != 1
    weights = mask.double() / mask.sum()
    expected = truth(tokens, objective, weights, {})
    tokens["labels"][~mask] = -100
    for name in ("old_logp", "ref_logp", "advantages"):
        tokens[name][~mask] = torch.nan
    actual = differentiate({**tokens, "mask": mask}, backend=backend, **objective)
    check(actual, expected, dtype)
    assert not actual[1][~mask].any()


@each_backend
def test_nothing_kept_gives_zero_loss_and_gradients(backend):
    tokens = case(torch.bfloat16)
    mask = torch.zeros(T, dtype=torch.bool, device=DEVICE)
    actual = differentiate({**tokens, "mask": mask}, backend=backend)
    assert all(not x.any() for x in actual)


@each_backend
@pytest.mark.parametrize("wanted", ["hidden", "weight", "neither"])
def test_only_what_needs_a_gradient_gets_one(backend, wanted):
    tokens = case(torch.bfloat16)
    expected = differentiate(tokens, backend=backend)
    leaves = {name: tokens[name].requires_grad_(name == wanted) for name in ("hidden", "weight")}
    loss, _ = linear_policy_loss(
        tokens["hidden"],
        tokens["weight"],
        tokens["labels"],
        tokens["old_logp"],
        tokens["advantages"],
        backend=backend,
    )
    assert torch.equal(loss.detach(), expected[0])
    assert loss.requires_grad == (wanted != "neither")
    if wanted != "neither":
        loss.backward()
        index = 1 if wanted == "hidden" else 2
        grad = leaves[wanted].grad
        assert grad is not None
        assert torch.equal(grad, expected[index])
        other = "weight" if wanted == "hidden" else "hidden"
        assert leaves[other].grad is None


@each_backend
def test_no_gradients_are_kept_without_grad_mode(backend):
    tokens = case(torch.bfloat16)
    with torch.no_grad():
        loss, _ = linear_policy_loss(
            tokens["hidden"].requires_grad_(),
            tokens["weight"],
            tokens["labels"],
            tokens["old_logp"],
            tokens["advantages"],
            backend=backend,
        )
    assert not loss.requires_grad


def test_float32_master_weights_under_autocast_get_a_float32_gradient():
    tokens = case(torch.float32)
    rounded = {k: tokens[k].bfloat16().float() for k in ("hidden", "weight")}
    is_rounded = DEVICE == "cpu"
    expected = truth(tokens | rounded, {}, UNIFORM, {}, is_rounded=is_rounded)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = differentiate(tokens)
    check([actual[0]], expected[:1], torch.float32)
    # Hidden states are rounded on their way in, and their gradient on its way back.
    assert relative_error(actual[1], expected[1]) < 6e-3
    assert actual[2].dtype == torch.float32
    assert relative_error(actual[2], expected[2]) < 6e-3


@each_backend
def test_sequence_level_ratio_matches_whole_logits(backend):
    dtype = torch.bfloat16 if backend == "triton" else torch.float64
    tokens = {k: v if k == "weight" else v[:20] for k, v in case(dtype).items()}
    del tokens["ref_logp"]
    shaped = {k: v if k == "weight" else v.reshape(4, 5, *v.shape[1:]) for k, v in tokens.items()}
    shaped["advantages"] = shaped["advantages"][:, 0]
    wide = {k: v.double() if v.is_floating_point() else v for k, v in shaped.items()}
    leaves = [wide[k].clone().requires_grad_() for k in ("hidden", "weight")]
    logp = token_logprobs_reference(leaves[0] @ leaves[1].t(), shaped["labels"])[0]
    ratio, A = (logp - wide["old_logp"]).mean(1).exp(), wide["advantages"]
    loss = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A).mean()
    expected = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    options = {"ratio_level": "sequence", "agg": "seq-mean-token-mean", "backend": backend}
    check(differentiate(shaped, **options), expected, dtype)


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_both_ways_refuse_the_same_labels_and_workspace(ratio_level):
    tokens = {k: v if k == "weight" else v[None] for k, v in case(torch.float64).items()}
    options = {"ratio_level": ratio_level, "agg": "seq-mean-token-mean"}
    with pytest.raises(ValueError, match="max_workspace_mb must be above 0, got -1"):
        differentiate(tokens, max_workspace_mb=-1, **options)
    tokens["labels"][0, 3] = -100
    with pytest.raises(ValueError, match=r"labels must be in \[0, 257\).*got -100"):
        differentiate(tokens, **options)


@each_backend
def test_one_token_and_strided_hidden_states(backend):
    dtype = torch.bfloat16 if backend == "triton" else torch.float64
    tokens = {k: v if k == "weight" else v[:1] for k, v in case(dtype).items()}
    tokens["hidden"] = torch.nn.functional.pad(tokens["hidden"], (8, 8))[:, 8:-8]
    assert tokens["hidden"].stride(0) == D + 16
    expected = truth(tokens, {}, torch.ones(1, dtype=torch.float64, device=DEVICE), {})
    # Of one token the roundings of exponentials, dZ and dW, 2^-9 each, do not average out.
    limit = 3 * 2**-9 if backend == "triton" else None
    check(differentiate(tokens, backend=backend), expected, dtype, limit)


@needs_triton
@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
def test_p_minus_one_at_the_label_is_finished_in_float32(logits_dtype):
    tokens = case(torch.bfloat16)
    tokens["hidden"] = 2 * tokens["hidden"]
    tokens["labels"] = (tokens["hidden"].float() @ tokens["weight"].float().t()).argmax(-1)
    wide = tokens["hidden"].double() @ tokens["weight"].double().t()
    if logits_dtype == "bfloat16":
        wide = wide.bfloat16().double()
    p = wide.softmax(-1).gather(-1, tokens["labels"][:, None]).squeeze(-1)
    assert 0.99 < p.max() < 0.9999
    flat = Tokens(
        tokens["hidden"],
        tokens["labels"],
        torch.ones(T, device=DEVICE),
        PolicyInputs(None, None, torch.ones(T, device=DEVICE), UNIFORM.float(), None),
    )
    head = LinearHead(tokens["weight"], None, 1.0, None)
    settings = ChunkSettings(head, PolicyObjective(), logits_dtype, True)
    run = tile_chunk if logits_dtype == "float32" else rounded_chunk
    grad_logits = run(flat, settings)[1]
    assert grad_logits is not None
    at_label = grad_logits.gather(-1, tokens["labels"][:, None]).squeeze(-1)
    assert_close(at_label.double(), (p - 1) / T, rtol=2**-8, atol=1e-7)


def test_backward_may_run_twice():
    tokens = case(torch.float64)
    hidden = tokens["hidden"].requires_grad_()
    loss, _ = linear_policy_loss(
        hidden, tokens["weight"], tokens["labels"], tokens["old_logp"], tokens["advantages"]
    )
    (first,) = torch.autograd.grad(2.0 * loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    assert_close(first, 2.0 * second, rtol=1e-14, atol=0)


@each_backend
def test_compiles_as_one_graph(backend):
    tokens = case(torch.bfloat16)
    mask = torch.arange(T, device=DEVICE) % 3 != 1

    def loss(hidden):
        return linear_policy_loss(
            hidden,
            tokens["weight"],
            tokens["labels"],
            tokens["old_logp"],
            tokens["advantages"],
            mask,
            backend=backend,
        )[0]

    hidden = tokens["hidden"].requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(hidden), hidden)
    (actual,) = torch.autograd.grad(compiled(hidden), hidden)
    assert_close(actual, expected, rtol=2**-7, atol=1e-6)


@each_backend
def test_custom_op_passes_opcheck(backend):
    tokens = case(torch.bfloat16)
    tokens["hidden"].requires_grad_()
    tokens["weight"].requires_grad_()
    torch.library.opcheck(
        torch.ops.gad_fast.linear_policy_loss.default,
        (
            tokens["hidden"],
            tokens["weight"],
            None,
            tokens["labels"],
            torch.ones(T, device=DEVICE),
            tokens["old_logp"],
            None,
            tokens["advantages"],
            UNIFORM.float(),
            None,
            *PolicyObjective(),
            1.0,
            None,
            [True, True, False],
            "float32",
            1 << 20,
            backend,
        ),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 4).half()}, r"hidden must be bfloat16, float32 or float64"),
        ({"weight": torch.zeros(5, 3)}, r"weight must be \[V, D\] with the D of hidden, 4"),
        ({"weight": torch.zeros(0)}, r"sharded weight is empty.*use FusedLMHead"),
        ({"bias": torch.zeros(4)}, r"bias must be \[V\] with the V of weight, 5, got \(4,\)"),
        ({"labels": torch.tensor([0, 5, 1])}, r"labels must be in \[0, 5\) .* got 5"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels must have the shape"),
        ({"logits_dtype": "float16"}, r"logits_dtype must be one of float32, bfloat16"),
        ({"softcap": 0.0}, r"softcap must be above 0, got 0\.0"),
        ({"temperature": torch.tensor([1.0, -1.0, 1.0])}, r"temperature must be above 0, got -1"),
        ({"max_workspace_mb": 0}, r"max_workspace_mb must be above 0, got 0"),
        ({"backend": "triton"}, r"backend 'triton' needs Triton and bfloat16 on CUDA"),
    ],
)
def test_unusable_arguments_are_refused(change, message):
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(5, 4),
        "labels": torch.zeros(3, dtype=torch.int64),
        "old_logp": None,
        "advantages": torch.zeros(3),
    }
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**{**arguments, **change})
