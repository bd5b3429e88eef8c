"""EMA in Lightning: one callback, and validation logs the average's metrics and the online weights' beside them.

    python recipes/ema_lightning.py

A small classifier learns scikit-learn's digits. A few seconds.
"""

import lightning
import torch

from averaging.lightning import EMA, load_average
from common import digits, report

steps, out = report.arguments(__doc__, steps=800)

lightning.seed_everything(0, verbose=False)
classifier = digits.Classifier()
history = digits.History()
trainer = digits.trainer(steps, [EMA(half_life=0.05, evaluate="both"), history])  # forgets half in 5 % of the run
trainer.fit(classifier, *digits.loaders())
trainer.save_checkpoint(out / "last.ckpt")

# The model holds the average now, and any checkpoint gives it again.
again = digits.Classifier()
again.load_state_dict(load_average(out / "last.ckpt"))
assert all(torch.equal(one, other) for one, other in zip(again.parameters(), classifier.parameters(), strict=True))

curves = history.curves({"online": "online_val_loss", "EMA": "val_loss"})
print("loss on 600 held-out digits")
print(report.table(["step", *curves], list(zip(history.steps, *curves.values(), strict=True))))
