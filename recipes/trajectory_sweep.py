"""Choose the average afterwards: snapshots from the whole run on disk, and any window of them.

    python recipes/trajectory_sweep.py

A small classifier learns scikit-learn's digits, and `Trajectory` stores its weights 80 times. Then soups of the last
few of all snapshots, or of every n-th, are compared. In a shell ``soup runs/trajectory_sweep/snapshots --last 8 --every
2 -o soup.safetensors`` cooks one. Some ten seconds.
"""

import lightning
import torch

from averaging import applied
from averaging.checkpoints import gather, select
from averaging.lightning import Trajectory
from averaging.soups import uniform
from common import digits, report

steps, out = report.arguments(__doc__, steps=800)

lightning.seed_everything(0, verbose=False)
classifier = digits.Classifier()
digits.trainer(steps, [Trajectory(out / "snapshots", every=max(1, steps // 80))]).fit(classifier, *digits.loaders())
snapshots = gather([out / "snapshots"])
held_out = list(digits.digits()[1].tensors)


@torch.no_grad()
def loss(last: int, every: int) -> float:
    with applied(classifier, uniform(select(snapshots, last, every))):
        return classifier.loss(held_out).item()


spacings = (1, 2, 5)
rows = [(f"the last {last}", *(loss(last, every) for every in spacings)) for last in (2, 4, 8, 16)]
print(f"loss on 600 held-out digits; the online weights': {classifier.loss(held_out).item():.4f}")
print(report.table(["snapshots", *(f"of every {n}" for n in spacings)], rows))
