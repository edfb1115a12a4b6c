"""Repairs to Triton's CPU interpreter, for tests only.

As shipped (3.6), the interpreter keeps bfloat16 as raw uint16, and so

- truncates float32 to bfloat16 where every device rounds to nearest even,
- multiplies and adds the raw bits in `tl.dot` and in plain arithmetic.

It gives a comparison the dtype of its operands, so that a scalar condition cannot mask a block;
lets NumPy warn where devices follow IEEE in silence (0 * inf in the arm of a `tl.where` not taken);
and with NumPy 2.4 or later fails on a `range` over a run-time value, because NumPy no longer turns
a one-element array into an int.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair() -> None:
    """Patch the interpreter in place. To be called once, before the first kernel runs."""
    _repair_casts()
    _repair_dot()
    _repair_arithmetic()
    _repair_index()


def _widen(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = np.asarray(handle.data).astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _round_to_bfloat16(data: np.ndarray) -> TensorHandle:
    rounded = torch.from_numpy(np.array(data, np.float32)).to(torch.bfloat16)
    return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


def _repair_casts() -> None:
    cast, convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def cast_impl(self, src, dst_type):
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return cast(self, src, dst_type)
        if dst_type.scalar == tl.bfloat16:
            return _round_to_bfloat16(cast(self, _widen(src), tl.float32).data)
        return cast(self, _widen(src), dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return convert(self, src, dst_type, rounding_mode)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def _repair_dot() -> None:
    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return dot(self, _widen(a), _widen(b), d, input_precision, max_num_imprecise_acc)

    InterpreterBuilder.create_dot = create_dot


def _repair_arithmetic() -> None:
    apply_two, apply_one = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op

    def binary_op(self, lhs, rhs, op):
        _require_wide(lhs, op)
        with np.errstate(all="ignore"):
            result = apply_two(self, lhs, rhs, op)
        if result.data.dtype == np.bool_:
            result.dtype = tl.int1
        return result

    def unary_op(self, arg, op):
        _require_wide(arg, op)
        with np.errstate(all="ignore"):
            return apply_one(self, arg, op)

    InterpreterBuilder.binary_op, InterpreterBuilder.unary_op = binary_op, unary_op


def _require_wide(operand: TensorHandle, op) -> None:
    # Our kernels compute in float32. One that forgets to widen must not pass on raw bits.
    if operand.dtype.scalar == tl.bfloat16:
        msg = f"bfloat16 operand in {op.__name__} (widen it with .to(tl.float32))"
        raise TypeError(msg)


def _repair_index() -> None:
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
