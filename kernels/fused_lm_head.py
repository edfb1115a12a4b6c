"""A language model's head that gives log-probabilities and losses as well as logits.

`linear_token_logprobs` and `linear_policy_loss` read the weight of the head. What shards weights
(FSDP, ZeRO-3) puts a weight together only while the module that it belongs to runs; read from
outside, it is an empty shard. So the head is a module, and the operations run inside it.

Shapes: D width, V vocabulary.
"""

from typing import Any, Self

from torch import Tensor, nn

from gad_fast.kernels.linear_policy_loss import linear_policy_loss
from gad_fast.kernels.linear_token_logprobs import linear_token_logprobs


class FusedLMHead(nn.Linear):
    """An `nn.Linear` that, given labels, computes what a loss needs without whole logits.

    Without labels it is the layer that it replaces: same parameters, same names in a checkpoint, so
    generation, evaluation and saving go on as before.

        model.lm_head = FusedLMHead.from_linear(model.lm_head)
        hidden = model.model(input_ids).last_hidden_state[:, :-1]
        logprobs = model.lm_head(hidden, input_ids[:, 1:], temperature=0.8)
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """The head with the very parameters of a linear layer, so that tied embeddings stay tied.

        To be put in place before FSDP, DeepSpeed or accelerate wrap the model.

        Raises:
            ValueError: the layer is more than its weight and bias (an adapter, a quantised or
                sharded layer, hooks), and the rest would be left out.
        """
        _refuse_more_than_a_linear(linear)
        # On the meta device, because parameters of its own would be allocated to be dropped.
        head = cls(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        *,
        advantages: Tensor | None = None,
        old_logp: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Logits; with labels log-probabilities; with advantages too, the policy loss.

        Args:
            hidden: `[..., D]`.
            labels: `[...]`, or None for logits.
            advantages: `[...]` or one for each sequence, or None for no loss.
            old_logp: `[...]` under the policy that sampled the labels; None on-policy.
            options: those of `linear_token_logprobs`, or with advantages of `linear_policy_loss`.

        Returns:
            Logits `[..., V]`; what `linear_token_logprobs` returns; or the loss and the metrics of
            `linear_policy_loss`.

        Raises:
            ValueError: an argument that counts only beside one that is missing; and what the
                operations raise.
        """
        if labels is None:
            _refuse_without("labels", advantages=advantages, old_logp=old_logp, **options)
            return super().forward(hidden)
        if advantages is None:
            _refuse_without("advantages", old_logp=old_logp)
            return linear_token_logprobs(hidden, self.weight, labels, bias=self.bias, **options)
        return linear_policy_loss(
            hidden, self.weight, labels, old_logp, advantages, bias=self.bias, **options
        )


def _refuse_more_than_a_linear(linear: nn.Module) -> None:
    kind = type(linear).__name__
    way_out = "merge the adapter, or leave lm_head out of target_modules and of quantisation"
    if type(linear) is not nn.Linear:
        msg = (
            f"linear must be exactly a torch.nn.Linear, got {kind}, of which only the weight would "
            f"count and an adapter would be ignored ({way_out})"
        )
        raise ValueError(msg)
    # accelerate replaces the method of the instance; old weight norm and pruning are hooks.
    if linear._forward_pre_hooks or linear._forward_hooks or "forward" in vars(linear):
        msg = (
            f"linear must have no hooks, got {kind} with hooks that would be ignored (put the head "
            "in place before the model is wrapped)"
        )
        raise ValueError(msg)


def _refuse_without(missing: str, **arguments: Any) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        msg = f"{missing} must be given with {', '.join(given)}, got None"
        raise ValueError(msg)
