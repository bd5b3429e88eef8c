"""SWAD: the validation loss says from when to when every step's weights are averaged.

    python recipes/swad.py

A small classifier learns a fifth of scikit-learn's digits, and then learns them by heart: its validation loss falls
and rises again. The average is over the valley (Cha et al. 2021, arXiv:2102.08604). A few seconds.
"""

import lightning
from torch.utils.data import DataLoader, Subset

from averaging.lightning import SWAD
from common import digits, report

steps, out = report.arguments(__doc__, steps=800)

lightning.seed_everything(0, verbose=False)
train, held_out = digits.loaders()
some = DataLoader(Subset(train.dataset, range(0, 1197, 5)), 32, shuffle=True)
history = digits.History()
trainer = digits.trainer(steps, [SWAD(), history], val_check_interval=max(1, steps // 40))
trainer.fit(digits.Classifier(noise=0), some, held_out)

curves = history.curves({"online": "online_val_loss", "SWAD": "val_loss"})
print("loss on 600 held-out digits")
rows = list(zip(history.steps, *curves.values(), strict=True))
print(report.table(["step", *curves], rows[3::4] or rows))
report.plot(out / "loss.png", report.Panel("digits", "held-out loss", history.steps, curves))
