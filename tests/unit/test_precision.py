"""Which products a device multiplies in."""

import pytest
import torch

from gad_fast.config import HardwareSettings
from gad_fast.models.loading import Precision


@pytest.mark.parametrize(
    ("has_tiles", "has_avx512", "expected"),
    [
        (False, False, torch.float32),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
    ],
)
def test_by_itself_a_cpu_multiplies_in_bfloat16_where_it_has_instructions_for_it(
    monkeypatch, has_tiles, has_avx512, expected
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512)
    precision = Precision(HardwareSettings(device="cpu"))
    assert precision.compute_dtype is expected
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is expected
    assert str(precision) == f"cpu, {str(expected).removeprefix('torch.')}"
    assert Precision(HardwareSettings(device="cpu", compute_dtype="weights")).compute_dtype is None
