"""Post-hoc EMA: the EMA of any width, rebuilt after training from the snapshots of two.

    python recipes/post_hoc_ema.py

A small classifier learns scikit-learn's digits (Karras et al. 2023, arXiv:2312.02696). A width of 0.1 averages over
about a tenth of the training done; ``soup runs/post_hoc_ema/snapshots --post-hoc 0.1 -o ema.safetensors`` is the same
in a shell. Some ten seconds.
"""

import lightning
import torch

from averaging import applied
from averaging.lightning import PostHocEMA
from averaging.soups import post_hoc
from common import digits, report

steps, out = report.arguments(__doc__, steps=800)

lightning.seed_everything(0, verbose=False)
classifier = digits.Classifier()
average = PostHocEMA(out / "snapshots", widths=(0.05, 0.10), snapshots=max(1, steps // 40), evaluate="both")
history = digits.History()
digits.trainer(steps, [average, history]).fit(classifier, *digits.loaders())
held_out = list(digits.digits()[1].tensors)


@torch.no_grad()
def loss(width: float) -> float:
    with applied(classifier, post_hoc(out / "snapshots", width)):
        return classifier.loss(held_out).item()


rows = [("online weights", history.metrics[-1]["online_val_loss"])]
rows += [(f"width {width}", loss(width)) for width in (0.01, 0.02, 0.05, 0.07, 0.10, 0.15, 0.20, 0.25)]
print(report.table(["600 held-out digits", "loss"], rows))
