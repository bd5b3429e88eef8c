"""The compiled kernels of _kernels.c, ``None`` where there was no compiler at installation. No torch."""

try:
    from averaging import _kernels as kernels
except ImportError:
    kernels = None  # type: ignore[assignment]

__all__ = ["CODES", "kernels"]

CODES = {"bfloat16": 0, "float16": 1, "float32": 2, "float64": 3}
"""What they compute with, and their numbers for it."""
