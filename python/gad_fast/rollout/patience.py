"""An engine's outputs, or an error when none has come for too long."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence

from gad_fast.errors import EngineError
from gad_fast.rollout.engine import GenOutput, GenRequest, RolloutEngine

_END = object()


def outputs_within(
    seconds: float, engine: RolloutEngine, requests: Sequence[GenRequest]
) -> Iterator[GenOutput]:
    """The outputs of `engine.generate`, which runs in a thread of its own.

    The thread of an engine that hangs cannot be stopped; it is left behind as a daemon.

    Args:
        seconds: longest wait for an output.
        engine: what samples.
        requests: what it is asked.

    Raises:
        EngineError: no output came in time, or the engine's own.
    """
    outputs: queue.SimpleQueue[object] = queue.SimpleQueue()
    is_unwanted = threading.Event()

    def work() -> None:
        try:
            for output in engine.generate(requests):
                outputs.put(output)
                if is_unwanted.is_set():
                    return
            outputs.put(_END)
        except BaseException as error:  # raised again in the caller's thread
            outputs.put(error)

    thread = threading.Thread(target=work, name="rollouts", daemon=True)
    thread.start()
    try:
        while (output := _next(outputs, seconds)) is not _END:
            assert isinstance(output, GenOutput)
            yield output
        thread.join()
    finally:
        is_unwanted.set()


def _next(outputs: queue.SimpleQueue[object], seconds: float) -> object:
    try:
        output = outputs.get(timeout=seconds)
    except queue.Empty:
        raise EngineError(
            f"the engine has finished no rollout for {seconds:.0f} s "
            f"(raise rollout.timeout_seconds, or lower rollout.max_sequences)"
        ) from None
    if isinstance(output, BaseException):
        raise output
    return output
