"""Soups: averages of saved checkpoints. Importing this imports no torch."""

from averaging.soups.uniform import uniform

__all__ = ["uniform"]
