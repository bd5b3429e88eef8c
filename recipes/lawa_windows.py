"""How long a window? Several of LAWA's in one run, from one ring of snapshots, all evaluated side by side.

    python recipes/lawa_windows.py

A small classifier learns scikit-learn's digits. Some ten seconds.
"""

import lightning

from averaging.lightning import LAWA
from common import digits, report

steps, out = report.arguments(__doc__, steps=1600)

lengths = (2, 5, 10, 20, 50)
lightning.seed_everything(0, verbose=False)
history = digits.History()
trainer = digits.trainer(steps, [LAWA(k=lengths, every=max(1, steps // 100), evaluate="all"), history])
trainer.fit(digits.Classifier(), *digits.loaders())

# The first average has the usual name of the metric, the others have theirs before it.
metrics = {"online": "online_val_loss"} | {f"k={k}": f"lawa-{k}_val_loss" for k in lengths} | {"k=2": "val_loss"}
curves = history.curves(metrics)
print("loss on 600 held-out digits; LAWA's snapshots are 1 % of the run apart")
print(report.table(["step", *curves], list(zip(history.steps, *curves.values(), strict=True))))
report.plot(out / "loss.png", report.Panel("LAWA's window", "held-out loss", history.steps, curves))
