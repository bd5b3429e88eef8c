"""A run that is killed while it saves resumes bit for bit, and no checkpoint is lost once its saving has ended.

Some points here; `scripts/kill_points.py` tries all.
"""

from __future__ import annotations

import platform
import shutil

import pytest
from kill_points import KILLED, SAVE_EVERY, start, summary


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64") or not shutil.which("cc"),
    reason="needs Linux's seccomp filters and a C compiler",
)
@pytest.mark.parametrize(
    ("trainer", "rotation", "every"),
    [
        ("transformers", True, 61),
        ("transformers", False, 97),
        ("lightning", True, 31),
        ("lightning", False, 31),
        ("lightning-fsdp2", True, 211),
    ],
)
def test_killed_while_saving(trainer, rotation, every, record_property):
    pytest.importorskip("transformers" if trainer == "transformers" else "lightning.pytorch")
    counts = start(trainer, "--every", str(every), "--offset", str(every // 2), *["--rotation"] * rotation)
    assert counts["problems"] == []
    assert counts["points"] == (counts["operations"] - every // 2 - 1) // every + 1
    for used in counts["used"].values():  # every checkpoint's turn came, but for the last one's without rotation
        assert {"nothing", *map(str, range(SAVE_EVERY, KILLED, SAVE_EVERY))} <= used.keys()
    record_property("count", summary(trainer, rotation, counts))
