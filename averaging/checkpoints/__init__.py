"""Saved models as lazy named weights: find them, order them, read them tensor by tensor.

Headers are read and checked without torch (but a Lightning or torch file needs torch to be opened).
"""

from averaging.checkpoints.checkpoint import Checkpoint
from averaging.checkpoints.files import Entry
from averaging.checkpoints.finding import find, gather, select

__all__ = ["Checkpoint", "Entry", "find", "gather", "select"]
