"""Switch EMA: training goes on from the average after every epoch.

    python recipes/switch_ema.py

A small classifier learns scikit-learn's digits, with an EMA beside the training, and with one that is copied into the
model at each epoch's end (Li et al. 2024, arXiv:2402.09240). Some ten seconds.
"""

import lightning

from averaging.lightning import EMA
from common import digits, report

steps, out = report.arguments(__doc__, steps=800)

curves: dict[str, list[float]] = {}
for suffix, switch in (("", None), (", switched", "epoch")):
    lightning.seed_everything(0, verbose=False)
    history = digits.History()
    average = EMA(half_life=0.02, switch=switch, evaluate="both")
    digits.trainer(steps, [average, history]).fit(digits.Classifier(), *digits.loaders())
    curves |= history.curves({f"online{suffix}": "online_val_loss", f"EMA{suffix}": "val_loss"})
print("loss on 600 held-out digits")
print(report.table(["step", *curves], list(zip(history.steps, *curves.values(), strict=True))))
