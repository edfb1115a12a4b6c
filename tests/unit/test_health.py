"""The watches one by one: windows, edges, and the state that a checkpoint keeps."""

import json
from typing import Any

import pytest

from gad_fast.config import HealthSettings, Recipe
from gad_fast.errors import ConfigError
from gad_fast.run.health import RULES, Health, Rule, rising_discriminator, weak_discriminator


def health(**watches: Any) -> Health:
    return Health(HealthSettings.model_validate(watches))


def test_an_alarm_is_told_once_until_it_has_passed() -> None:
    watched = health(truncation={"threshold": 0.5, "window": 2})
    rates = [1.0, 0.4, 0.8, 0.9, 0.1, 0.1, 1.0, 1.0]
    told = [
        [alarm.value for alarm in watched.observe(step, "game", {"rollout_truncation": rate})]
        for step, rate in enumerate(rates, start=1)
    ]
    assert told == [[], [0.7], [], [], [], [], [0.55], []]


def test_an_alarm_says_value_bound_and_a_way_out() -> None:
    watched = health(kl={"window": 1})
    (alarm,) = watched.observe(9, "game", {"kl": 2.0})
    assert str(alarm).startswith("kl is 2, bound 0.5: the student leaves")
    assert "game.kl_coef" in alarm.advice


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_watch_can_be_raised_and_turned_off(rule: Rule) -> None:
    bad = {rule.metric: 0.0 if rule.is_floor else 99.0}
    for action, expected in (("warn", True), ("off", False)):
        watched = health(**{rule.name: {"window": 1, "action": action}})
        names = [alarm.name for alarm in watched.observe(1, rule.stages[0], bad)]
        assert (rule.name in names) == expected


def test_a_shortcut_is_looked_for_in_the_first_steps_only() -> None:
    for first, expected in ((1, ["shortcut"]), (5, [])):
        watched = health()
        steps = range(first, first + 3)
        found = [a.name for s in steps for a in watched.observe(s, "warmup", {"d_acc": 1.0})]
        assert found == expected


def test_a_negative_correlation_counts_as_much() -> None:
    watched = health(length_correlation={"window": 1})
    (alarm,) = watched.observe(1, "game", {"length_correlation": -0.9})
    assert alarm.value == 0.9


def test_a_pause_lasts_as_long_as_its_alarm() -> None:
    watched = health(saturation={"threshold": 0.9, "window": 1, "action": "pause"})
    paused: list[tuple[bool, bool]] = []
    for step, accuracy in enumerate([0.5, 1.0, 1.0, 0.8], start=10):
        watched.observe(step, "game", {"d_acc": accuracy})
        paused.append((watched.is_paused("discriminator"), watched.is_paused("student")))
    assert paused == [(False, False), (True, False), (True, False), (False, False)]


def test_the_state_goes_through_json() -> None:
    settings = {"truncation": {"threshold": 0.5, "window": 3, "action": "pause"}}
    first, second = health(**settings), health(**settings)
    for step in (1, 2, 3):
        first.observe(step, "game", {"rollout_truncation": 0.9})
    second.restore(json.loads(json.dumps(first.state())))
    assert second.is_paused("student")
    assert second.state() == first.state()
    assert second.observe(4, "game", {"rollout_truncation": 0.9}) == []


def test_the_start_gates_go_by_held_out_accuracy() -> None:
    settings = HealthSettings()
    assert weak_discriminator(settings, 0.55) is None
    weak = weak_discriminator(settings, 0.54)
    assert weak is not None
    assert "chance" in str(weak)
    assert rising_discriminator(settings, [0.9]) is None
    assert rising_discriminator(settings, [0.7, 0.71]) is None
    assert rising_discriminator(settings, [0.9, 0.5]) is None
    rising = rising_discriminator(settings, [0.5, 0.6])
    assert rising is not None
    assert rising.value == pytest.approx(0.1)


def test_a_pause_that_mends_nothing_is_refused() -> None:
    values = {"health": {"kl": {"action": "pause"}}}
    with pytest.raises(ConfigError, match=r"health\.kl\.action: a pause mends nothing here"):
        Recipe.from_values({"name": "a", **values})
