"""Products in blocks of columns are those of linear layers."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gad_fast.models import few_rows
from gad_fast.models.few_rows import few_row_products, in_blocks


@pytest.mark.parametrize("shape", [(7,), (1, 7), (5, 1, 7), (2, 3, 7)])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 12])
@pytest.mark.parametrize("has_bias", [True, False])
def test_blocks_give_what_one_product_gives(
    shape: tuple[int, ...], num_blocks: int, has_bias: bool
) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(shape), torch.randn(12, 7)
    bias = torch.randn(12) if has_bias else None
    found = in_blocks(rows, weight, bias, num_blocks)
    expected = nn.functional.linear(
        rows.double(), weight.double(), None if bias is None else bias.double()
    )
    assert_close(found, expected.float(), atol=1e-6, rtol=1e-6)


class _Layers(nn.Module):
    """A large layer, a small one, one of 64 bits, and one whose columns are a prime number."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(8, 9000)
        self.small = nn.Linear(8, 10)
        self.double_width = nn.Linear(8, 9000, dtype=torch.float64)
        self.prime = nn.Linear(8, 8999)


@pytest.fixture(autouse=True)
def _mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)


def _replaced(layers: nn.Module) -> list[str]:
    return [name for name, module in layers.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize(
    ("threads", "num_blocks"), [(1, 3), (2, 4), (100, 100), (300, None), (7, None)]
)
def test_large_float32_layers_have_blocks_for_all_threads(
    monkeypatch: pytest.MonkeyPatch, threads: int, num_blocks: int | None
) -> None:
    layers = _Layers()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    calls: list[Any] = []

    def noted(rows: Any, weight: Any, bias: Any, count: int) -> Any:
        calls.append(count)
        return in_blocks(rows, weight, bias, count)

    monkeypatch.setattr(few_rows, "in_blocks", noted)
    few, many = torch.randn(64, 1, 8), torch.randn(65, 1, 8)
    expected = layers.large(few), layers.large(many)
    with few_row_products(layers):
        assert _replaced(layers) == ([] if num_blocks is None else ["large"])
        assert_close((layers.large(few), layers.large(many)), expected)
    assert calls == ([] if num_blocks is None else [num_blocks])
    assert _replaced(layers) == []


def test_layers_are_as_before_after_an_error_and_where_products_are_not_mkls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = _Layers()
    with torch.autocast("cpu"), few_row_products(layers):
        assert _replaced(layers) == []
    with pytest.raises(KeyError), few_row_products(layers):
        raise KeyError
    assert _replaced(layers) == []
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    with few_row_products(layers):
        assert _replaced(layers) == []
