"""Token-budgeted micro-batches: which groups, or which responses, go through a model together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from gad_fast import _core
from gad_fast.errors import ConfigError
from gad_fast.models.batch import Batch, Item, pad, share_prompts


def plan(items: Sequence[Item], *, token_budget: int, is_shared: bool) -> list[list[int]]:
    """Indices of the items of each micro-batch; an item is never torn apart.

    Args:
        items: prompts with their responses, in any order.
        token_budget: most tokens a batch may hold, padding included.
        is_shared: whether an item's responses share its prompt.

    Raises:
        ConfigError: an item alone is over the budget.
    """
    planned = _plan_shared if is_shared else _plan_padded
    return planned(items, token_budget)


def _plan_shared(items: Sequence[Item], token_budget: int) -> list[list[int]]:
    sizes = [len(item.prompt_ids) + sum(map(len, item.responses)) for item in items]
    require_budget(max(sizes), token_budget)
    indices, ends = _core.pack_sequences(np.array(sizes, dtype=np.int64), token_budget=token_budget)
    return [part.tolist() for part in np.split(indices, ends[1:-1])]


def _plan_padded(items: Sequence[Item], token_budget: int) -> list[list[int]]:
    sizes = [
        (len(item.responses), len(item.prompt_ids), max(map(len, item.responses))) for item in items
    ]
    rows, prompts, responses = np.array(sizes, dtype=np.int64).T.copy()
    require_budget(int((rows * (prompts + responses)).max()), token_budget)
    parts = _core.plan_micro_batches(rows, prompts, responses, token_budget=token_budget)
    return [part.tolist() for part in parts]


def require_budget(num_tokens: int, token_budget: int) -> None:
    """Raises ConfigError when a group of so many tokens would not fit a micro-batch."""
    if num_tokens > token_budget:
        raise ConfigError(
            f"batch.tokens_per_micro_batch is {token_budget}, but a group takes {num_tokens} "
            f"tokens in one pass (set batch.tokens_per_micro_batch = {num_tokens}, or lower "
            f"data.max_response_tokens or rollout.group_size)"
        )


def lay_out(items: Sequence[Item], *, is_shared: bool, pad_id: int, device: torch.device) -> Batch:
    """The items as one batch."""
    if is_shared:
        return share_prompts(items, device=device)
    return pad(items, pad_id=pad_id, device=device)


def micro_batches(
    items: Sequence[Item], *, token_budget: int, is_shared: bool, device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of responses, each with the indices of its responses among those of all items.

    Without shared prompts there is no reason to keep the responses of an item together.
    """
    if not is_shared:
        items = [Item(item.prompt_ids, [r]) for item in items for r in item.responses]
    starts = np.cumsum([0, *(len(item.responses) for item in items)])
    for part in plan(items, token_budget=token_budget, is_shared=is_shared):
        indices = [i for index in part for i in range(starts[index], starts[index + 1])]
        # Padding is masked: any token will do.
        chosen = [items[index] for index in part]
        yield indices, lay_out(chosen, is_shared=is_shared, pad_id=0, device=device)
