"""How numbers and places are shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def size(count: float) -> str:
    """A number of bytes: ``3.6 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def place(devices: Iterable[object]) -> str:
    """Where tensors on these devices lie: ``in CPU memory``, ``on cuda:0``."""
    names = sorted({str(device) for device in devices})
    return "in CPU memory" if names == ["cpu"] else f"on {' and '.join(names)}"


def aligned(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """The lines of a table: columns two spaces apart, texts on the left or on the right of theirs."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    fit = str.rjust if right else str.ljust
    return ["  ".join(map(fit, row, widths)) for row in rows]
