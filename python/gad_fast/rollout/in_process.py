"""What engines that sample from the trainer's own weights have in common."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from transformers import PreTrainedModel

from gad_fast.models.loading import Precision
from gad_fast.rollout.endings import Endings
from gad_fast.rollout.engine import Capacity, SyncReport, WeightSource


class InProcessEngine:
    """The student's live model; an update needs no transfer."""

    def __init__(
        self, model: PreTrainedModel, precision: Precision, *, endings: Endings, capacity: Capacity
    ) -> None:
        """Samples from nothing yet.

        Args:
            model: the student, whose weights are shared.
            precision: that of the trainer's forward passes.
            endings: where responses end.
            capacity: how much may be sampled at once.
        """
        self._model, self._precision = model, precision
        self._endings, self._capacity = endings, capacity
        self._weight_version = 0

    @property
    def _waits_for_a_device(self) -> bool:
        return self._precision.device.type != "cpu"

    def sync_weights(self, source: WeightSource, version: int) -> SyncReport:
        """Notes the version: the engine samples from the trainer's own weights."""
        del source
        self._weight_version = version
        return SyncReport(version, num_tensors=0, seconds=0.0)

    def health(self) -> None:
        """Always well: it lives in this process."""

    def close(self) -> None:
        """Nothing to free: what an engine takes lives as long as a call of `generate`."""

    def _own_random_state(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which drawing leaves the trainer's random numbers as they are."""
        device = self._precision.device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])
