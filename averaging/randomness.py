"""The state of the random generators."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import torch


def random_state() -> Callable[[], None]:
    """Remember where the random generators stand, of Python, NumPy and torch; calling the result brings them back."""
    python, legacy, cpu = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    device: Any = torch.get_device_module() if torch.accelerator.is_available() else None
    accelerator = device.get_rng_state() if device else None

    def bring_back() -> None:
        random.setstate(python)
        numpy.random.set_state(legacy)
        torch.set_rng_state(cpu)
        if device:
            device.set_rng_state(accelerator)

    return bring_back
