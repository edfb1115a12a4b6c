"""Optimizer states and random states as safetensors and JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gad_fast.models.saving import copy_tensors

StateDict = dict[str, Any]
"""What `torch.optim.Optimizer.state_dict` gives."""

_TENSORS, _VALUES = "tensors.safetensors", "values.json"


def copy_optimizer(state: StateDict) -> Callable[[Path], None]:
    """Copies an optimizer's state now; the result writes it later."""
    entries: dict[int, dict[str, Any]] = state["state"]
    flat = {f"{index}.{key}": v for index, entry in entries.items() for key, v in entry.items()}
    tensors = copy_tensors({name: v for name, v in flat.items() if isinstance(v, Tensor)})
    values = {
        "entries": {name: v for name, v in flat.items() if not isinstance(v, Tensor)},
        "param_groups": state["param_groups"],
    }
    return _writer(tensors, values)


def read_optimizer(folder: Path) -> StateDict:
    """The state that `copy_optimizer` has written."""
    values = json.loads((folder / _VALUES).read_text(encoding="utf-8"))
    entries: dict[int, dict[str, Any]] = {}
    for name, value in {**values["entries"], **load_file(folder / _TENSORS)}.items():
        index, key = name.split(".", maxsplit=1)
        entries.setdefault(int(index), {})[key] = value
    return {"state": entries, "param_groups": values["param_groups"]}


def copy_random() -> Callable[[Path], None]:
    """Copies the states of Python's, NumPy's and torch's global random numbers."""
    numpy_state = cast("tuple[str, Any, int, int, float]", np.random.get_state())
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(numpy_state[1].astype(np.int64)),
        **{f"cuda{i}": state for i, state in enumerate(_cuda_states())},
    }
    return _writer(tensors, {"python": random.getstate(), "numpy": numpy_state[2:]})


def restore_random(folder: Path) -> None:
    """Sets the states that `copy_random` has written."""
    tensors = load_file(folder / _TENSORS)
    values = json.loads((folder / _VALUES).read_text(encoding="utf-8"))
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *values["numpy"]))
    torch.set_rng_state(tensors["torch"])
    for index in range(len(_cuda_states())):
        if f"cuda{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{index}"], index)


def _cuda_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _writer(tensors: dict[str, Tensor], values: Any) -> Callable[[Path], None]:
    text = json.dumps(values)

    def write(folder: Path) -> None:
        save_file(tensors, folder / _TENSORS)
        (folder / _VALUES).write_text(text + "\n", encoding="utf-8")

    return write
