"""Recipes: what is accepted, and how a mistake is told."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gad_fast.config import CollectRecipe, Recipe
from gad_fast.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "recipes"

MINIMAL: dict[str, Any] = {
    "name": "minimal",
    "output": "runs/minimal",
    "student": {"model": "student"},
    "data": {"train": "rows.jsonl"},
    "warmup": {"steps": 1},
    "game": {"steps": 1},
}


def with_value(path: str, value: Any) -> dict[str, Any]:
    section, _, key = path.rpartition(".")
    values = {**MINIMAL}
    if section:
        values[section] = {**values.get(section, {}), key: value}
    else:
        values[key] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("rollout.group_sise", 4, "unknown key 'rollout.group_sise', did you mean 'group_size'?"),
        ("sede", 1, "unknown key 'sede', did you mean 'seed'?"),
        ("data.zzz", 1, "unknown key 'data.zzz', allowed: train, validation"),
        ("rollout.group_size", "four", "rollout.group_size: input should be a valid integer"),
        ("rollout.temperature", 0, "rollout.temperature: input should be greater than 0, got 0"),
        ("rollout.temperature", float("nan"), "rollout.temperature: input should be a finite"),
        (
            "batch.tokens_per_micro_batch",
            0,
            "batch.tokens_per_micro_batch: input should be greater",
        ),
        ("method", "dpo", "method: input should be 'gad' or 'seqkd', got 'dpo'"),
        ("rollout.group_size", 1, "rollout.group_size must be at least 2 to centre the rewards"),
        ("game.epochs", 2, "game: needs exactly one of steps and epochs"),
        ("warmup.steps", None, "warmup: needs exactly one of steps and epochs"),
        ("student", {}, "student.model is missing"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_what_is_allowed(
    path: str, value: Any, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_values(with_value(path, value))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_group_of_one_is_enough_where_nothing_is_centred() -> None:
    values = with_value("rollout.group_size", 1)
    assert Recipe.from_values({**values, "game": {"steps": 0}}).rollout.group_size == 1
    assert Recipe.from_values({**values, "method": "seqkd"}).rollout.group_size == 1


def test_a_missing_or_broken_file_is_told_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read recipe .*nowhere.toml: No such file"):
        Recipe.from_toml(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(ConfigError, match=r"broken.toml is not valid TOML: Invalid value"):
        Recipe.from_toml(tmp_path / "broken.toml")


def test_a_stage_in_epochs_drops_the_last_short_batch() -> None:
    game = Recipe.from_values({**MINIMAL, "game": {"epochs": 2}}).game
    assert game.num_steps(num_prompts=192_014, prompts_per_step=256) == 1500
    assert game.num_steps(num_prompts=255, prompts_per_step=256) == 0


def test_the_paper_recipe_holds_the_papers_numbers() -> None:
    """Every number of appendix A.2 and of the official 7B scripts."""
    recipe = Recipe.from_toml(RECIPES / "paper-qwen2.5-7b.toml")
    assert recipe.student.model == "Qwen/Qwen2.5-7B-Instruct"
    assert recipe.discriminator.model == "student"
    assert recipe.batch.prompts_per_step == 256
    assert recipe.batch.tokens_per_micro_batch == 16384
    assert recipe.data.max_prompt_tokens == 2048
    assert recipe.data.max_response_tokens == 1536
    assert recipe.rollout.temperature == 0.8
    assert recipe.rollout.group_size == 8
    assert recipe.game.kl_coef == 0.001
    assert recipe.game.advantage_scale == "std"
    assert recipe.game.std_floor == 0.0
    assert recipe.optimizer.max_grad_norm == 0.2
    assert (recipe.optimizer.beta1, recipe.optimizer.beta2) == (0.9, 0.999)
    assert recipe.optimizer.weight_decay == 0.01
    for stage in (recipe.warmup, recipe.game):
        for rate in (stage.student, stage.discriminator):
            assert (rate.peak, rate.schedule, rate.ramp_steps) == (1e-6, "constant", 0)
    assert (recipe.warmup.epochs, recipe.game.epochs) == (1, 2)
    assert recipe.warmup.discriminator_only_steps == 9
    assert recipe.run.checkpoint_every_steps == 50


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    if path.stem.startswith("collect-"):
        assert CollectRecipe.from_toml(path).teachers
    else:
        assert Recipe.from_toml(path).name


def test_recipes_and_help_import_no_torch() -> None:
    program = (
        "import sys, gad_fast, gad_fast.config, gad_fast.cli.main\n"
        "assert gad_fast.Recipe is gad_fast.config.Recipe\n"
        "heavy = {'torch', 'transformers', 'datasets', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, timeout=30, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
