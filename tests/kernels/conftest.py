"""Kernel tests run in the interpreter, repaired, with uninitialised memory full of NaN."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gad_fast.kernels.optional_triton import IS_INTERPRETED


def _load_sibling(name: str):
    # By path, so that it does not matter with which import mode pytest runs.
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if IS_INTERPRETED:
    _load_sibling("interpreter").repair()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill every `torch.empty` with NaN, so that what no kernel writes cannot pass by luck."""
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", True)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was_deterministic)
