"""The recipe of a collection: what it refuses, and that no key comes back in a message."""

from typing import Any

import pytest

from gad_fast.config import CollectRecipe
from gad_fast.errors import ConfigError

SECRET = "sk-proj-abcdef123456"


def values(**teacher: Any) -> dict[str, Any]:
    return {
        "prompts": "prompts.jsonl",
        "cache": "teacher.cache",
        "teachers": {"large": {"model": "m", **teacher}},
    }


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            {"temprature": 1.0},
            "unknown key 'teachers.large.temprature', did you mean 'temperature'",
        ),
        ({"temperature": -1}, "teachers.large.temperature: input should be greater than or equal"),
        ({"extra": {"top_p": 1}}, "extra must leave top_p to the settings of that name"),
        ({"api_key_env": "A", "api_key_file": "b"}, "takes one of api_key_env and api_key_file"),
        ({"prompt_price": 1.0}, "needs both of prompt_price and response_price"),
        ({"mode": "batch", "stream": True}, "a batch has no stream"),
        ({"base_url": "localhost:8000"}, "must start with http:// or https://"),
    ],
)
def test_a_mistake_is_told_in_one_line(teacher: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CollectRecipe.from_values(values(**teacher))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "teacher",
    [
        {"api_key": SECRET},
        {"api_key_env": SECRET},
        {"base_url": f"https://user:{SECRET}@host/v1"},
        {"base_url": f"https://host/v1?key={SECRET}"},
    ],
)
def test_a_key_in_the_wrong_place_does_not_come_back(teacher: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        CollectRecipe.from_values(values(**teacher))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("budget", [{"tokens": 100}, {"cost": 1.0}])
def test_a_budget_that_one_response_could_pass_is_refused(budget: dict[str, Any]) -> None:
    prices = {"prompt_price": 1.0, "response_price": 2.0}
    with pytest.raises(ConfigError, match=r"needs max_tokens of teachers\.large"):
        CollectRecipe.from_values({**values(**prices), "budget": budget})
    with pytest.raises(ConfigError, match=r"budget\.cost needs prompt_price"):
        CollectRecipe.from_values({**values(max_tokens=5), "budget": {"cost": 1.0}})


def test_sampling_holds_what_decides_the_response_and_costs_are_by_the_million() -> None:
    recipe = CollectRecipe.from_values(
        values(
            temperature=0.5,
            max_tokens=7,
            max_tokens_field="max_completion_tokens",
            extra={"reasoning_effort": "low"},
            prompt_price=2.0,
            response_price=8.0,
        )
    )
    teacher = recipe.teachers["large"]
    assert teacher.sampling == {
        "temperature": 0.5,
        "max_completion_tokens": 7,
        "reasoning_effort": "low",
    }
    assert teacher.cost_of(1000, 500) == pytest.approx(0.002 + 0.004)
