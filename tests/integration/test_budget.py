"""A token budget that is too small for a group is told before the first step."""

import pytest

import tiny
from gad_fast import train
from gad_fast.errors import ConfigError
from gad_fast.training import dry_run


@pytest.mark.parametrize("start", [train, dry_run])
def test_a_budget_below_a_group_of_full_length_leaves_no_run_behind(tmp_path, start):
    recipe = tiny.recipe(tmp_path, batch={"tokens_per_micro_batch": 30})
    # Prompts of 6 tokens at most, three rollouts and the teacher's response of up to 6 each.
    with pytest.raises(ConfigError, match=r"is 30, but a group takes 3\d tokens in one pass"):
        start(recipe)
    assert not recipe.output.exists()
