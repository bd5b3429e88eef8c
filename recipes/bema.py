"""BEMA beside an EMA as slow: the average without its lag behind the weights.

    python recipes/bema.py

A small classifier learns scikit-learn's digits. Early on, when the weights still travel far, the EMA is far behind
them and BEMA is not (Block and Zhang 2025, arXiv:2508.00180). A few seconds.
"""

import lightning

from averaging import BEMA, EMA
from averaging.lightning import AveragingCallback
from common import digits, report

steps, out = report.arguments(__doc__, steps=800)

lightning.seed_everything(0, verbose=False)
history = digits.History()
averages = AveragingCallback(BEMA(every=max(1, steps // 100)), EMA(window=0.5), evaluate="all")
digits.trainer(steps, [averages, history]).fit(digits.Classifier(lr=1e-3), *digits.loaders())

curves = history.curves({"online": "online_val_loss", "EMA": "ema_val_loss", "BEMA": "val_loss"})
print("loss on 600 held-out digits")
print(report.table(["step", *curves], list(zip(history.steps, *curves.values(), strict=True))))
report.plot(out / "loss.png", report.Panel("digits", "held-out loss", history.steps, curves))
