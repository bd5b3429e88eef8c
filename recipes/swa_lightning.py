"""SWA in Lightning, for a model with BatchNorm: the mean of one snapshot per epoch over the last quarter.

    python recipes/swa_lightning.py

A small classifier learns scikit-learn's digits. BatchNorm's running statistics are buffers, not parameters: with
``buffers=True`` they are averaged too, so that the averaged weights are not measured with the statistics of others.
Some ten seconds.
"""

import lightning
from torch import nn

from averaging.lightning import SWA
from common import digits, report

steps, out = report.arguments(__doc__, steps=800)

rows: list[tuple[str, float]] = []
for title, buffers in (("the online weights' statistics", False), ("averaged statistics", True)):
    lightning.seed_everything(0, verbose=False)
    history = digits.History()
    swa = SWA(start=0.75, buffers=buffers, evaluate="both")
    digits.trainer(steps, [swa, history]).fit(digits.Classifier(norm=nn.BatchNorm1d), *digits.loaders())
    if not rows:
        rows.append(("online", history.metrics[-1]["online_val_loss"]))
    rows.append((f"SWA, {title}", history.metrics[-1]["val_loss"]))
print(report.table(["600 held-out digits", "loss"], rows))
