"""What a collection has done so far: counts, tokens, money and time."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from gad_fast.teacher.budget import Usage
from gad_fast.teacher.records import TeacherResponse

_REPORTED_TOKENS_WEIGHT = 0.05


@dataclass(slots=True)
class Tally:
    """Counts of one start of a collection, with those it found done."""

    num_wanted: int
    """Responses that the recipe asks for."""
    num_kept: int
    """Of them, responses that earlier starts have brought."""
    num_rejected_before: int
    """Of them, requests that earlier starts found rejected."""
    num_new: int = 0
    """Responses committed to the cache by this start."""
    num_rejected: int = 0
    """Requests that will never succeed, found by this start."""
    num_given_up: int = 0
    """Requests left for the next start, after `max_attempts`."""
    failures: Counter[str] = field(default_factory=Counter[str])
    """Failed attempts by kind."""
    flags: Counter[str] = field(default_factory=Counter[str])
    """New responses by flag."""
    used: Usage = field(default_factory=Usage)
    """Of this start, as far as the servers told."""
    mean_response_tokens: float | None = None
    """Recent responses weigh more."""
    seconds_asking: float = 0.0
    """Sum over new responses of the time from sending the request to having the response."""
    started: float = field(default_factory=time.monotonic)

    @property
    def num_settled(self) -> int:
        """Requests that this start is done with."""
        return self.num_new + self.num_rejected + self.num_given_up

    @property
    def num_done(self) -> int:
        """Requests that need no further work in this start, earlier ones included."""
        return self.num_kept + self.num_rejected_before + self.num_settled

    @property
    def num_left(self) -> int:
        """Responses that a next start would ask for."""
        return self.num_wanted - self.num_done + self.num_given_up

    @property
    def responses_per_second(self) -> float:
        """Of this start."""
        return self.num_new / max(time.monotonic() - self.started, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """At the rate so far, or None before the first response."""
        left = self.num_wanted - self.num_done
        return left / self.responses_per_second if self.num_new else None

    def count(self, response: TeacherResponse, used: Usage, seconds: float) -> None:
        """Counts a response that is in the cache, asked `seconds` ago."""
        self.num_new += 1
        self.seconds_asking += seconds
        self.flags.update(response.flags)
        self.used += used
        if response.num_response_tokens is not None:
            before = self.mean_response_tokens
            drift = 0.0 if before is None else response.num_response_tokens - before
            start = response.num_response_tokens if before is None else before
            self.mean_response_tokens = start + _REPORTED_TOKENS_WEIGHT * drift
