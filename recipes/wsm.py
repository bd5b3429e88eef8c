"""WSM: an average that stands in for a decay of the learning rate.

    python recipes/wsm.py

A small classifier learns scikit-learn's digits at a constant rate; LAWA over the last 40 % of the run is weighted as if
the rate had fallen there, along a line, a cosine or an inverse root (Tian et al. 2025, arXiv:2507.17634). Beside it a
run whose rate did fall along the line. Some ten seconds.
"""

import lightning
import torch

from averaging import LAWA
from averaging.lightning import AveragingCallback
from common import digits, report

steps, out = report.arguments(__doc__, steps=800)


class Decayed(digits.Classifier):
    """The learning rate falls to zero over the last 40 % of the run."""

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (steps - step) / (0.4 * steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


decays = ("linear", "cosine", "inverse_sqrt")
averages = [LAWA(k=20, window=0.4, weights=decay, name=decay) for decay in decays]
lightning.seed_everything(0, verbose=False)
history = digits.History()
trainer = digits.trainer(steps, [AveragingCallback(*averages, evaluate="all"), history])
trainer.fit(digits.Classifier(), *digits.loaders())

lightning.seed_everything(0, verbose=False)
decayed = digits.History()
digits.trainer(steps, [decayed]).fit(Decayed(), *digits.loaders())

last = history.metrics[-1]
rows = [("constant rate", last["online_val_loss"]), ("constant rate, weights='linear'", last["val_loss"])]
rows += [(f"constant rate, weights={decay!r}", last[f"{decay}_val_loss"]) for decay in decays[1:]]
rows += [("rate that falls", decayed.metrics[-1]["val_loss"])]
print(report.table(["600 held-out digits", "loss"], rows))
