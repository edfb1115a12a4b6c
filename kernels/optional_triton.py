"""Triton where it is installed, and otherwise a stand-in just large enough to define kernels with.

Kernel files take `triton` and `tl` from here, so that one file can hold an operation's reference,
its kernels and its torch path, and still be imported on platforms that have no Triton.
"""

import importlib.util
from types import SimpleNamespace
from typing import TYPE_CHECKING

HAS_TRITON = importlib.util.find_spec("triton") is not None

if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.knobs
    import triton.language as tl

    # Read once: TRITON_INTERPRET counts when a kernel is decorated, not when it is launched.
    IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
else:
    triton = SimpleNamespace(jit=lambda kernel: kernel)
    tl = SimpleNamespace(constexpr=lambda value: value)
    IS_INTERPRETED = False

__all__ = ["HAS_TRITON", "IS_INTERPRETED", "tl", "triton"]
