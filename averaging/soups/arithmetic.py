"""The engine's arithmetic on pieces of checkpoints: compiled, without torch; where that was not built, with torch.

Both give the same bits. The compiled kernels do in one pass over a piece, and without the GIL, what takes torch one
pass for each operation; and importing torch takes longer than mixing a gigabyte.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

from averaging import compiled
from averaging.compiled import CODES

if TYPE_CHECKING:
    from torch import Tensor

CACHE = 512 * 1024  # bytes of all ingredients together that are handled at a time
ROW = 1024  # bytes of a row of the checksum's matrix
SUMS = 8 * (256 + 128)  # bytes of its sums


_own = threading.local()  # each thread's `Torch`, which keeps its working memory


class Arithmetic(Protocol):
    """What the engine does with pieces of ingredients, which are bytes in memory. For one thread at a time."""

    def block(self, count: int, limit: int) -> int:
        """How many bytes of each of ``count`` ingredients to handle at a time, at most ``limit``: whole rows."""

    def combine(
        self,
        rows: Sequence[memoryview],
        dtype: str,
        coefficients: Sequence[float] | None,
        divisor: float,
        out: memoryview,
        dtype_out: str,
    ) -> bool:
        """Σ cᵢ·xᵢ / divisor in float64, summed in the order given and rounded once into ``out``.

        Returns whether the result is known to be finite.
        """

    def products(self, rows: Sequence[memoryview], dtype: str, total: memoryview) -> None:
        """Add the inner products of d₀ = x₀ and dᵢ = xᵢ − x₀ to ``total``, a matrix of float64: its upper triangle."""

    def sums(self, piece: memoryview, start: int, out: memoryview) -> None:
        """Row and column sums of 64-bit words, which come in pieces: ``piece`` begins at byte ``start`` of them."""


def arithmetic(*dtypes: str) -> Arithmetic:
    """What can compute with these dtypes; torch only if it must."""
    if compiled.kernels and CODES.keys() >= set(dtypes):
        return Compiled()
    if not hasattr(_own, "torch"):
        _own.torch = Torch()
    return cast(Torch, _own.torch)


class Compiled:
    """The kernels of _kernels.c."""

    def block(self, count: int, limit: int) -> int:
        return min(max(CACHE // count // ROW, 16) * ROW, limit)

    def combine(
        self,
        rows: Sequence[memoryview],
        dtype: str,
        coefficients: Sequence[float] | None,
        divisor: float,
        out: memoryview,
        dtype_out: str,
    ) -> bool:
        return compiled.kernels.combine(rows, CODES[dtype], coefficients, divisor, out, CODES[dtype_out])

    def products(self, rows: Sequence[memoryview], dtype: str, total: memoryview) -> None:
        compiled.kernels.products(rows, CODES[dtype], total)

    def sums(self, piece: memoryview, start: int, out: memoryview) -> None:
        compiled.kernels.sums(piece, start, out)


class Torch:
    """The kernels of kernels.py, with working memory of their own."""

    def __init__(self) -> None:
        from averaging import kernels

        self._combiner, self._products = kernels.Combiner(), kernels.Products()

    def block(self, count: int, limit: int) -> int:
        return limit  # calling an operation costs more than missing the cache

    def combine(
        self,
        rows: Sequence[memoryview],
        dtype: str,
        coefficients: Sequence[float] | None,
        divisor: float,
        out: memoryview,
        dtype_out: str,
    ) -> bool:
        return self._combiner((as_tensor(row, dtype) for row in rows), as_tensor(out, dtype_out), coefficients, divisor)

    def products(self, rows: Sequence[memoryview], dtype: str, total: memoryview) -> None:
        matrix = as_tensor(total, "float64").view(len(rows), len(rows))
        self._products((as_tensor(row, dtype) for row in rows), len(rows), matrix)

    def sums(self, piece: memoryview, start: int, out: memoryview) -> None:
        import torch

        totals, first, rows = as_tensor(out, "int64"), start // ROW, math.ceil(len(piece) / ROW)
        if start == 0:
            totals.zero_()
        words = torch.zeros(rows * ROW, dtype=torch.uint8)
        words[: len(piece)] = as_tensor(piece, "uint8")
        matrix = words.view(torch.int64).view(rows, -1)
        totals[first : first + rows] = matrix.sum(1)
        totals[256:] += matrix.sum(0)


def as_tensor(data: memoryview, dtype: str) -> Tensor:
    """The bytes as a flat tensor of ``dtype``, which shares their memory."""
    import torch

    return torch.frombuffer(data, dtype=getattr(torch, dtype))
