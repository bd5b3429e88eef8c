"""SWA in Lightning, for a model with BatchNorm: the mean of one snapshot per epoch over the last quarter.

    python recipes/swa_lightning.py

A small classifier learns scikit-learn's digits. BatchNorm's running statistics are those of the online weights; for
the average the callback recomputes them from training batches, and ``buffers=True`` averages them instead. Some
twenty seconds.
"""

from typing import Any

import lightning
from torch import nn

from averaging.lightning import SWA
from common import digits, report

steps, out = report.arguments(__doc__, steps=800)

rows: list[tuple[str, float]] = []
settings: dict[str, dict[str, Any]] = {
    "the online weights' statistics": {"batchnorm": 0},
    "averaged statistics": {"buffers": True},
    "recomputed statistics, the default": {},
}
for title, setting in settings.items():
    lightning.seed_everything(0, verbose=False)
    history = digits.History()
    swa = SWA(start=0.75, evaluate="both", **setting)
    digits.trainer(steps, [swa, history]).fit(digits.Classifier(norm=nn.BatchNorm1d), *digits.loaders())
    if not rows:
        rows.append(("online", history.metrics[-1]["online_val_loss"]))
    rows.append((f"SWA, {title}", history.metrics[-1]["val_loss"]))
print(report.table(["600 held-out digits", "loss"], rows))
