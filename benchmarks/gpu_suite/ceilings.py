"""What the device itself can do: bytes copied a second, and arithmetic of matrix products.

Every floor is one of these two, measured in the same run: datasheet rates are not reached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from gpu_suite.cases import Case, Results, Row, rows_of
from gpu_suite.scale import Scale
from gpu_suite.timing import measure

# Of an H100, where the section has failed and a floor is wanted all the same.
_NOMINAL_GB_PER_SECOND = 3000.0
_NOMINAL_TFLOP_PER_SECOND = 800.0


class Ceilings(NamedTuple):
    """The two rates that bound a kernel."""

    gb_per_second: float
    """Bytes read and bytes written, together."""
    tflop_per_second: float
    is_measured: bool

    def milliseconds(self, *, num_bytes: float = 0.0, flop: float = 0.0) -> float:
        """The floor: no version can take less."""
        bytes_ms = num_bytes / self.gb_per_second / 1e6
        return max(bytes_ms, flop / self.tflop_per_second / 1e9)


def ceilings_of(results: Results) -> Ceilings:
    """The best rates of this run, or nominal ones where there are none."""
    rows = rows_of(results, "ceilings")
    copies = [row["gb_per_second"] for row in rows if "gb_per_second" in row]
    products = [row["tflop_per_second"] for row in rows if "tflop_per_second" in row]
    if not copies or not products:
        return Ceilings(_NOMINAL_GB_PER_SECOND, _NOMINAL_TFLOP_PER_SECOND, is_measured=False)
    return Ceilings(max(copies), max(products), is_measured=True)


def cases(scale: Scale, results: Results) -> list[Case]:
    """Copies of some sizes, a square product, and the three products of each head."""
    del results
    heads = {shape.D: shape for shape in scale.timed_heads}
    return [
        *(Case(f"copy {mib} MiB", functools.partial(_copy, mib, scale)) for mib in scale.copy_mib),
        Case(f"product {scale.square}^3", functools.partial(_square, scale)),
        *(
            Case(f"head products {shape}", functools.partial(_head_products, *shape, scale))
            for shape in heads.values()
        ),
    ]


def _copy(mib: int, scale: Scale) -> list[Row]:
    source = torch.randint(-128, 127, (mib << 20,), dtype=torch.int8, device=scale.device)
    target = torch.empty_like(source)
    ms = measure(lambda: target.copy_(source), scale).milliseconds
    return [{"what": f"copy {mib} MiB", "ms": ms, "gb_per_second": 2 * (mib << 20) / ms / 1e6}]


def _square(scale: Scale) -> list[Row]:
    n = scale.square
    a, b = _random(n, n, scale), _random(n, n, scale)
    return [_product(f"{n}^3", lambda: a @ b, 2 * n**3, scale)]


def _head_products(T: int, V: int, D: int, scale: Scale) -> list[Row]:
    """X W^T, dZ W and dZ^T X, as cuBLAS does them: what a kernel around them cannot beat."""
    x, weight = _random(T, D, scale), _random(V, D, scale)
    grad = _random(T, V, scale)
    products: dict[str, Callable[[], torch.Tensor]] = {
        "X W^T": lambda: x @ weight.t(),
        "dZ W": lambda: grad @ weight,
        "dZ^T X": lambda: grad.t() @ x,
    }
    flop = 2 * T * V * D
    rows = [_product(f"{name} D{D}", run, flop, scale) for name, run in products.items()]
    return [{**row, "T": T, "V": V, "D": D} for row in rows]


def _product(what: str, run: Callable[[], torch.Tensor], flop: float, scale: Scale) -> Row:
    ms = measure(run, scale).milliseconds
    return {"what": what, "ms": ms, "tflop_per_second": flop / ms / 1e9}


def _random(rows: int, columns: int, scale: Scale) -> torch.Tensor:
    dtype = getattr(torch, scale.dtype)
    return torch.randn(rows, columns, dtype=dtype, device=scale.device)
