"""`FusedLMHead` against `nn.Linear` and the references, alone and inside a model."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from gad_fast.kernels import token_logprobs_reference
from gad_fast.kernels.fused_lm_head import FusedLMHead
from gad_fast.kernels.policy_inputs import PolicyInputs
from gad_fast.kernels.policy_loss import policy_loss_reference
from gad_fast.kernels.policy_objective import PolicyObjective
from kernel_cases import DEVICE, peaked_head
from tiny import llama_config

B, L, D, V = 3, 5, 16, 61
TEMPERATURE = 0.8


def pair(*, has_bias: bool = True) -> tuple[nn.Linear, FusedLMHead, Tensor, Tensor]:
    """A linear layer, the head that shares its parameters, hidden [B, L, D] and labels [B, L]."""
    hidden, weight, labels = peaked_head(B * L, D, V, torch.float64)
    linear = nn.Linear(D, V, bias=has_bias, device=DEVICE, dtype=torch.float64)
    linear.weight.data.copy_(weight)
    head = FusedLMHead.from_linear(linear)
    return linear, head, hidden.view(B, L, D).requires_grad_(), labels.view(B, L)


def gradients(loss: Tensor, module: nn.Module, hidden: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [hidden, *module.parameters()]))


def check(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for grad, true_grad in zip(actual, expected, strict=True):
        assert_close(grad, true_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("has_bias", [False, True])
def test_without_labels_it_is_the_linear_layer(has_bias):
    linear, head, hidden, _ = pair(has_bias=has_bias)
    assert torch.equal(head(hidden), linear(hidden))
    check(
        gradients(head(hidden).square().sum(), head, hidden),
        gradients(linear(hidden).square().sum(), linear, hidden),
    )


@pytest.mark.parametrize("has_bias", [False, True])
def test_with_labels_it_gives_log_probabilities_and_entropy(has_bias):
    linear, head, hidden, labels = pair(has_bias=has_bias)
    expected = token_logprobs_reference(linear(hidden), labels, temperature=TEMPERATURE)
    actual = head(hidden, labels, temperature=TEMPERATURE, return_entropy=True)
    for value, true_value in zip(actual, expected, strict=True):
        assert_close(value, true_value, rtol=1e-10, atol=1e-12)
    alone = head(hidden, labels, temperature=TEMPERATURE)
    assert_close(alone, expected[0], rtol=1e-10, atol=1e-12)
    check(
        gradients((actual[0] + 0.3 * actual[1]).sum(), head, hidden),
        gradients((expected[0] + 0.3 * expected[1]).sum(), linear, hidden),
    )


@pytest.mark.parametrize("is_on_policy", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_with_advantages_it_gives_the_policy_loss(is_on_policy, has_bias):
    linear, head, hidden, labels = pair(has_bias=has_bias)
    mask = torch.arange(B * L, device=DEVICE).view(B, L) % 4 != 1
    logp, entropy = token_logprobs_reference(linear(hidden), labels, temperature=TEMPERATURE)
    drift = torch.linspace(-0.5, 0.5, B * L, dtype=torch.float64, device=DEVICE).view(B, L)
    old_logp = None if is_on_policy else logp.detach() + drift
    advantages = torch.tensor([1.5, -0.7, 0.4], dtype=torch.float64, device=DEVICE)
    flat_old = None if old_logp is None else old_logp.reshape(-1)
    spread = advantages.repeat_interleave(L)
    weights = mask.reshape(-1).double() / mask.sum()
    inputs = PolicyInputs(flat_old, None, spread, weights, None)
    objective = PolicyObjective(clip_high=0.3, entropy_coef=0.01)
    expected = policy_loss_reference(logp.reshape(-1), entropy.reshape(-1), inputs, objective)

    labels = labels.masked_fill(~mask, -100)
    options = {"mask": mask, "temperature": TEMPERATURE, "clip_high": 0.3, "entropy_coef": 0.01}
    loss, metrics = head(hidden, labels, advantages=advantages, old_logp=old_logp, **options)
    assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    assert metrics["num_tokens"] == mask.sum()
    check(gradients(loss, head, hidden), gradients(expected, linear, hidden))


def test_hooks_of_the_module_run_around_every_operation():
    # What FSDP and ZeRO do: the weight is whole between the two hooks only.
    _, head, hidden, labels = pair()
    whole = head.weight.data

    def gather(*_):
        head.weight.data = whole

    def shard(*_):
        head.weight.data = whole.new_empty(0)

    head.register_forward_pre_hook(gather)
    head.register_forward_hook(shard)
    shard()
    with torch.no_grad():
        assert head(hidden).shape == (B, L, V)
        assert head(hidden, labels).isfinite().all()
        assert head(hidden, labels, advantages=torch.ones_like(hidden[..., 0]))[0].isfinite()
    assert head.weight.numel() == 0


@pytest.mark.parametrize("has_bias", [False, True])
def test_parameters_are_shared_and_keep_their_names(has_bias):
    linear, head, _, _ = pair(has_bias=has_bias)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert head.state_dict().keys() == linear.state_dict().keys()
    assert (head.in_features, head.out_features) == (D, V)


@pytest.mark.parametrize("is_training", [False, True])
def test_the_mode_is_that_of_the_layer_and_no_random_number_is_drawn(is_training):
    linear = nn.Linear(D, V).train(is_training)
    state = torch.get_rng_state()
    assert FusedLMHead.from_linear(linear).training == is_training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_deep_copy_has_parameters_of_its_own():
    _, head, hidden, labels = pair()
    twin = copy.deepcopy(head)
    assert type(twin) is FusedLMHead
    assert torch.equal(twin(hidden, labels), head(hidden, labels))
    with torch.no_grad():
        twin.weight.zero_()
    assert head.weight.any()


def llama(*, is_tied: bool) -> Any:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(llama_config(vocab_size=V, tie_word_embeddings=is_tied))
    return model.to(DEVICE).eval()


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_model_with_the_head_generates_and_saves_the_same(is_tied, tmp_path):
    model = llama(is_tied=is_tied)
    prompt = torch.tensor([[1, 7, 9, 30], [1, 12, 5, 44]], device=DEVICE)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 9, "pad_token_id": 0}
    expected = model.generate(prompt, **options)
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    model.lm_head = FusedLMHead.from_linear(model.lm_head)
    assert torch.equal(model.generate(prompt, **options), expected)
    assert model.state_dict().keys() == weights.keys()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == is_tied
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.lm_head) is nn.Linear
    for name, value in loaded.state_dict().items():
        assert torch.equal(value.to(DEVICE), weights[name]), name


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_model_trains_through_the_head_as_through_its_logits(is_tied):
    model = llama(is_tied=is_tied).double()
    ids = torch.randint(V, (B, L + 1), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    expected, _ = token_logprobs_reference(model(ids[:, :-1]).logits, ids[:, 1:])
    expected_grads = torch.autograd.grad(expected.sum(), list(model.parameters()))

    model.lm_head = FusedLMHead.from_linear(model.lm_head)
    hidden = model.model(ids[:, :-1]).last_hidden_state
    logprobs = model.lm_head(hidden, ids[:, 1:])
    assert_close(logprobs, expected, rtol=1e-10, atol=1e-12)
    # Tied, the one gradient holds both uses of the weight.
    check(list(torch.autograd.grad(logprobs.sum(), list(model.parameters()))), list(expected_grads))


class LoraLinear(nn.Module):
    """As peft wraps a layer."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight


class QuantisedLinear(nn.Linear):
    """As bitsandbytes derives a layer."""


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LoraLinear(nn.Linear(D, V)), r"exactly a torch\.nn\.Linear, got LoraLinear, .* adapter"),
        (QuantisedLinear(D, V), r"exactly a torch\.nn\.Linear, got QuantisedLinear"),
        (nn.Embedding(V, D), r"got Embedding, .*\(merge the adapter, or leave lm_head out"),
    ],
    ids=["wrapped", "derived", "other"],
)
def test_what_is_more_than_a_linear_layer_is_refused(layer, message):
    with pytest.raises(ValueError, match=message):
        FusedLMHead.from_linear(layer)


@pytest.mark.parametrize("kind", ["pre-hook", "hook", "method"])
def test_a_layer_with_hooks_is_refused(kind):
    linear = nn.Linear(D, V)
    if kind == "pre-hook":
        linear.register_forward_pre_hook(lambda *_: None)
    elif kind == "hook":
        linear.register_forward_hook(lambda *_: None)
    else:
        linear.forward = nn.Linear(D, V).forward
    with pytest.raises(ValueError, match=r"linear must have no hooks, got Linear with hooks"):
        FusedLMHead.from_linear(linear)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.5}, r"labels must be given with temperature, got None"),
        ({"advantages": torch.ones(B)}, r"labels must be given with advantages, got None"),
        ({"old_logp": torch.ones(B, L)}, r"labels must be given with old_logp, got None"),
        (
            {"labels": torch.zeros(B, L).long(), "old_logp": torch.ones(B, L)},
            r"advantages must be given with old_logp, got None",
        ),
    ],
)
def test_arguments_that_would_not_count_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        FusedLMHead(D, V)(torch.zeros(B, L, D), **given)
