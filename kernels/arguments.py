"""What the operations ask of their arguments, and the one line that says what does not fit.

Every check but two looks at shapes, dtypes and devices only, so that none waits for the device. The
range of labels and of a temperature tensor is checked where that costs nothing, on a CPU, and on a
GPU with GAD_FAST_DEBUG=1; without it a kernel reads no label outside the vocabulary and gives NaN.
"""

import os

import torch
from torch import Tensor

IS_DEBUG = os.environ.get("GAD_FAST_DEBUG", "0") not in ("", "0")

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_shape(name: str, tensor: Tensor, shape: torch.Size, *, of: str) -> None:
    """Raises ValueError unless the tensor has the shape, which is that `of` something."""
    if tensor.shape != shape:
        msg = f"{name} must have the shape of {of}, {tuple(shape)}, got {tuple(tensor.shape)}"
        raise ValueError(msg)


def check_float(name: str, tensor: Tensor) -> None:
    """Raises ValueError for integers and for floats that no operation computes with."""
    if tensor.dtype not in FLOAT_DTYPES:
        msg = f"{name} must be a float tensor, got {tensor.dtype}"
        raise ValueError(msg)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError unless the tensor is on the device."""
    if tensor.device != device:
        msg = f"{name} must be on {device}, got {tensor.device}"
        raise ValueError(msg)


def check_range(
    name: str, number: float, low: float, high: float = float("inf"), *, is_open: bool = False
) -> None:
    """Raises ValueError unless low <= number <= high, or low < number if the range is open."""
    is_inside = low < number <= high if is_open else low <= number <= high
    if not is_inside:
        bound = "above" if is_open else "at least"
        limit = "" if high == float("inf") else f" and at most {high:g}"
        msg = f"{name} must be {bound} {low:g}{limit}, got {number}"
        raise ValueError(msg)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless the value is one of those allowed."""
    if value not in allowed:
        msg = f"{name} must be one of {', '.join(allowed)}, got {value!r}"
        raise ValueError(msg)


def flat_labels(
    labels: Tensor, shape: torch.Size, V: int, mask: Tensor | None, device: torch.device
) -> Tensor:
    """Labels as contiguous int64 [T]; raises ValueError where they cannot index a vocabulary.

    Args:
        labels: `[...]`, int32 or int64.
        shape: that of the rows, `[...]`.
        V: vocabulary, for the range of the labels.
        mask: bool [T]; labels outside it may be anything.
        device: that of the rows.
    """
    check_shape("labels", labels, shape, of="the rows of logits")
    check_device("labels", labels, device)
    if labels.dtype not in (torch.int32, torch.int64):
        msg = f"labels must be int32 or int64, got {labels.dtype}"
        raise ValueError(msg)
    flat = labels.reshape(-1).long().contiguous()
    if can_look_at(flat):
        kept = flat if mask is None else flat[mask]
        is_outside = (kept < 0) | (kept >= V)
        if is_outside.any():
            msg = f"labels must be in [0, {V}) where the mask keeps them, got {kept[is_outside][0]}"
            raise ValueError(msg)
    return flat


def flat_mask(mask: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor | None:
    """The mask as bool [T]; raises ValueError when its shape or device does not fit."""
    if mask is None:
        return None
    check_shape("mask", mask, shape, of="the tokens")
    check_device("mask", mask, device)
    return mask.reshape(-1).bool().contiguous()


def flat_floats(
    name: str, tensor: Tensor, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """A float tensor as contiguous [T] of the dtype; raises ValueError if it does not fit."""
    check_float(name, tensor)
    check_device(name, tensor, device)
    check_shape(name, tensor, shape, of="the tokens")
    return tensor.reshape(-1).to(dtype).contiguous()


def inverse_temperatures(
    temperature: float | Tensor, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """One over the temperature of each row, [T]; raises ValueError unless all are above 0."""
    if isinstance(temperature, Tensor):
        check_shape("temperature", temperature, shape, of="the tokens")
        check_device("temperature", temperature, device)
        flat = temperature.reshape(-1).to(dtype)
        if can_look_at(flat) and not (flat > 0).all():
            msg = f"temperature must be above 0, got {flat.min().item()}"
            raise ValueError(msg)
        return flat.reciprocal()
    check_range("temperature", temperature, 0, is_open=True)
    return torch.full((shape.numel(),), 1.0 / temperature, dtype=dtype, device=device)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


def can_look_at(tensor: Tensor) -> bool:
    """Whether a check may read values: not while compiling, and on a GPU only where asked for."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or IS_DEBUG
