"""Soups: averages of saved checkpoints. Importing this imports no torch."""

from averaging.soups.post_hoc import post_hoc
from averaging.soups.sweep import Sweep, sweep
from averaging.soups.uniform import uniform

__all__ = ["Sweep", "post_hoc", "sweep", "uniform"]
