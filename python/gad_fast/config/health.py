"""What is watched while a run goes on: thresholds, windows, and what an alarm does."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from gad_fast.config.base import Settings

Action = Literal["off", "warn", "pause", "stop"]
"""`pause` leaves out one player's updates while the alarm lasts; `stop` ends the run after a
checkpoint."""


class Watch(Settings):
    """An alarm on the mean of a metric over a window of steps."""

    threshold: float
    """The mean beyond which the alarm is raised."""
    window: int = Field(default=10, ge=1)
    """Steps in the mean."""
    action: Action = "warn"
    """What the alarm does."""


class SaturationWatch(Watch):
    """`d_acc` stays above the threshold; `pause` pauses the discriminator."""

    threshold: float = Field(default=0.98, ge=0, le=1)
    window: int = Field(default=20, ge=1)


class ShortcutWatch(Watch):
    """`d_acc` is above the threshold at once; `pause` pauses the student."""

    threshold: float = Field(default=0.95, ge=0, le=1)
    window: int = Field(default=2, ge=1)
    within: int = Field(default=5, ge=1)
    """The first steps of the run, in which so good a discriminator has found a shortcut."""


class ExploitedWatch(Watch):
    """`d_acc` is below the threshold in the game; `pause` pauses the student."""

    threshold: float = Field(default=0.45, ge=0, le=1)
    window: int = Field(default=20, ge=1)


class LengthCorrelationWatch(Watch):
    """|correlation| of score and length within groups; `pause` pauses the student."""

    threshold: float = Field(default=0.6, ge=0, le=1)
    window: int = Field(default=20, ge=1)


class TruncationWatch(Watch):
    """Share of rollouts cut at the token limit; `pause` pauses the student."""

    threshold: float = Field(default=0.8, ge=0, le=1)
    window: int = Field(default=10, ge=1)


class RepetitionWatch(Watch):
    """Share of a rollout's 4-grams that it has had before; `pause` pauses the student."""

    threshold: float = Field(default=0.3, ge=0, le=1)
    window: int = Field(default=10, ge=1)


class ZeroVarianceWatch(Watch):
    """Share of groups whose scores are all alike; `pause` pauses the student."""

    threshold: float = Field(default=0.5, ge=0, le=1)
    window: int = Field(default=10, ge=1)


class _NoPauseWatch(Watch):
    """A watch on what a pause could not mend."""

    @field_validator("action")
    @classmethod
    def _is_not_pause(cls, action: Action) -> Action:
        if action == "pause":
            raise ValueError("a pause mends nothing here, allowed: 'off', 'warn', 'stop'")
        return action


class KLWatch(_NoPauseWatch):
    """KL to the student after warm-up, nats a token."""

    threshold: float = Field(default=0.5, ge=0)
    window: int = Field(default=5, ge=1)


class EngineGapWatch(_NoPauseWatch):
    """|gap| of the engine's log-probabilities from the student's, nats a token."""

    threshold: float = Field(default=0.1, ge=0)
    window: int = Field(default=3, ge=1)


class WeakGate(Settings):
    """Before the game: held-out pair accuracy below which there is nothing to learn."""

    threshold: float = Field(default=0.55, ge=0, le=1)
    """Least accuracy to start the game with."""
    action: Literal["off", "warn", "stop"] = "warn"
    """`stop` ends the run after warm-up, with a checkpoint."""


class RisingGate(Settings):
    """Before the game: held-out pair accuracy that still rises means a discriminator half made."""

    threshold: float = Field(default=0.02, ge=0, le=1)
    """A gain from one measurement to the next above which the accuracy counts as rising."""
    action: Literal["off", "warn", "pause", "stop"] = "warn"
    """`pause` trains the discriminator on, with the student paused, until it rises no more."""
    round_steps: int = Field(default=10, ge=1)
    """Steps from one measurement to the next while it is trained on."""
    max_steps: int = Field(default=50, ge=0)
    """At most so many steps are added."""


class HealthSettings(Settings):
    """The alarms of a run; a loss or gradient that is not finite always stops it."""

    saturation: SaturationWatch = SaturationWatch()
    """The discriminator tells every pair apart: its scores say little of which text is better."""
    shortcut: ShortcutWatch = ShortcutWatch()
    """The discriminator wins before it can have learned: a difference in form, not content."""
    exploited: ExploitedWatch = ExploitedWatch()
    """The student's rollouts score above the teacher's responses."""
    length_correlation: LengthCorrelationWatch = LengthCorrelationWatch()
    """The scores go by length."""
    truncation: TruncationWatch = TruncationWatch()
    """Rollouts do not end."""
    repetition: RepetitionWatch = RepetitionWatch()
    """Rollouts loop."""
    zero_variance: ZeroVarianceWatch = ZeroVarianceWatch()
    """Groups give no gradient."""
    kl: KLWatch = KLWatch()
    """The student leaves what warm-up has made."""
    engine_gap: EngineGapWatch = EngineGapWatch()
    """The engine samples from other weights than the student's."""
    weak_discriminator: WeakGate = WeakGate()
    """A start gate of the game."""
    rising_discriminator: RisingGate = RisingGate()
    """A start gate of the game."""
