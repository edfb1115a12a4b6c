"""Watches a run by its metrics: alarms with advice, and what they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from gad_fast.config import HealthSettings, Watch

Side = Literal["student", "discriminator"]


class Rule(NamedTuple):
    """What a watch looks at."""

    name: str
    """That of its section in the recipe, too."""
    metric: str
    pauses: Side
    """Whose updates `pause` leaves out."""
    advice: str
    is_floor: bool = False
    """The alarm is below the threshold, not above."""
    stages: tuple[str, ...] = ("warmup", "discriminator", "game")


RULES = (
    Rule(
        "saturation",
        "d_acc",
        "discriminator",
        "the discriminator tells every pair apart, and its scores say little: lower its learning "
        "rate, raise the student's, or pause it",
    ),
    Rule(
        "shortcut",
        "d_acc",
        "student",
        "the discriminator won before it can have learned: look in samples.jsonl for a difference "
        "in form, such as endings, markup or length",
    ),
    Rule(
        "exploited",
        "d_acc",
        "student",
        "the rollouts score above the teacher's responses: the discriminator lags, so raise its "
        "learning rate or lower the student's",
        is_floor=True,
        stages=("game",),
    ),
    Rule(
        "length_correlation",
        "length_correlation",
        "student",
        "the scores go by length: compare rollout_length with teacher_length, and cut or filter "
        "the teacher's responses to like lengths",
    ),
    Rule(
        "truncation",
        "rollout_truncation",
        "student",
        "rollouts run into the token limit: raise data.max_response_tokens or warm up for longer",
    ),
    Rule(
        "repetition",
        "repetition",
        "student",
        "rollouts loop: lower the student's learning rate, or raise game.kl_coef",
    ),
    Rule(
        "zero_variance",
        "zero_variance_groups",
        "student",
        "whole groups score alike and give no gradient: raise rollout.temperature or group_size, "
        "or stop here",
    ),
    Rule(
        "kl",
        "kl",
        "student",
        "the student leaves what warm-up has made: lower its learning rate or raise game.kl_coef",
        stages=("game",),
    ),
    Rule(
        "engine_gap",
        "engine_gap",
        "student",
        "the engine's log-probabilities are not the student's: its weights or settings are others, "
        "so use rollout.engine = 'reference' to compare",
    ),
)
"""Every watch, in the order in which alarms are told."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """A threshold was passed."""

    name: str
    value: float
    threshold: float
    action: str
    advice: str

    def __str__(self) -> str:
        return f"{self.name} is {self.value:.3g}, bound {self.threshold:.3g}: {self.advice}"


class Health:
    """The watches of a run with their windows; an alarm is told once until it has passed."""

    def __init__(self, settings: HealthSettings) -> None:
        self._settings = settings
        self._windows: dict[str, list[float]] = {rule.name: [] for rule in RULES}
        self._raised: set[str] = set()

    def observe(self, step: int, stage: str, metrics: Mapping[str, float]) -> list[Alarm]:
        """Takes in a step's metrics.

        Args:
            step: number of the step in the run, from 1.
            stage: its stage.
            metrics: its line of metrics.jsonl.

        Returns:
            The alarms that this step has raised; those that were raised before are not among them.
        """
        new: list[Alarm] = []
        for rule in RULES:
            watch = self._watch(rule)
            if rule.metric in metrics and stage in rule.stages and _is_on(watch, step):
                window = self._windows[rule.name]
                window.append(abs(metrics[rule.metric]))
                del window[: -watch.window]
                alarm = _alarm(rule, watch, window)
                if alarm is not None and rule.name not in self._raised:
                    new.append(alarm)
                (self._raised.discard if alarm is None else self._raised.add)(rule.name)
        return new

    def is_paused(self, side: Side) -> bool:
        """Whether an alarm pauses a player's updates."""
        return any(
            rule.pauses == side and rule.name in self._raised
            for rule in RULES
            if self._watch(rule).action == "pause"
        )

    def state(self) -> dict[str, Any]:
        """What `restore` takes, fit for JSON."""
        windows = {name: list(window) for name, window in self._windows.items()}
        return {"windows": windows, "raised": sorted(self._raised)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        self._windows |= {name: list(window) for name, window in state["windows"].items()}
        self._raised = set(state["raised"])

    def _watch(self, rule: Rule) -> Watch:
        watch = getattr(self._settings, rule.name)
        assert isinstance(watch, Watch), rule.name
        return watch


def weak_discriminator(settings: HealthSettings, accuracy: float) -> Alarm | None:
    """The start gate against a discriminator that cannot tell the sides apart."""
    gate = settings.weak_discriminator
    if gate.action == "off" or accuracy >= gate.threshold:
        return None
    return Alarm(
        "weak_discriminator",
        accuracy,
        gate.threshold,
        gate.action,
        "held-out pairs are told apart hardly better than by chance, so the game would add noise "
        "only: warm up for longer, or take a stronger discriminator",
    )


def rising_discriminator(settings: HealthSettings, accuracies: Sequence[float]) -> Alarm | None:
    """The start gate against a discriminator that is not done.

    Args:
        settings: the recipe's.
        accuracies: held-out pair accuracy, measured during and after warm-up; the first is not
            taken to be a starting point, so two at least are needed.
    """
    gate = settings.rising_discriminator
    if gate.action == "off" or len(accuracies) < 2:
        return None
    gain = accuracies[-1] - accuracies[-2]
    if gain <= gate.threshold:
        return None
    return Alarm(
        "rising_discriminator",
        gain,
        gate.threshold,
        gate.action,
        "held-out pair accuracy still rises: warm up for longer, or set "
        "health.rising_discriminator.action = 'pause' to train the discriminator on",
    )


def _is_on(watch: Watch, step: int) -> bool:
    return watch.action != "off" and step <= getattr(watch, "within", step)


def _alarm(rule: Rule, watch: Watch, window: Sequence[float]) -> Alarm | None:
    if len(window) < watch.window:
        return None
    mean = sum(window) / len(window)
    if mean >= watch.threshold if rule.is_floor else mean <= watch.threshold:
        return None
    return Alarm(rule.name, mean, watch.threshold, watch.action, rule.advice)
