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
    ("trainer", "rotation", "every", "of_one"),
    [
        ("transformers", True, 91, 0),
        ("transformers", False, 97, 0),
        ("lightning", True, 71, 0),
        ("lightning", False, 31, 0),
        ("lightning-ddp", True, 71, 151),
        ("loop-fsdp2", True, 101, 151),
        ("lightning-fsdp2", True, 401, 701),
        ("transformers-fsdp2", False, 151, 401),
    ],
)
def test_killed_while_saving(trainer, rotation, every, of_one, record_property):
    library = trainer.partition("-")[0]
    pytest.importorskip({"lightning": "lightning.pytorch", "loop": "torch"}.get(library, library))
    options = {"every": every, "every-of-one": of_one, "offset": every // 2}
    counts = start(
        trainer, *[f"--{name}={value}" for name, value in options.items() if value], *["--rotation"] * rotation
    )
    assert counts["problems"] == []
    for who, seen in counts["killed"].items():
        points = len(range(every // 2, seen["operations"], of_one if "alone" in who else every))
        assert seen["points"] == points or ("alone" in who and 0 < seen["points"] < points)
    for used in next(iter(counts["killed"].values()))["used"].values():  # every one's turn came, but for the last's
        assert {"0", *map(str, range(SAVE_EVERY, KILLED, SAVE_EVERY))} <= used.keys()
    for line in summary(trainer, rotation, counts):
        record_property("count", line)
