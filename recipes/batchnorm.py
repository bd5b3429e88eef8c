"""BatchNorm under an average: whose running statistics?

    python recipes/batchnorm.py

An EMA of a small classifier of scikit-learn's digits is evaluated with the running statistics of the online weights,
with averaged statistics, and with statistics recomputed from training batches for the averaged weights. A few seconds.
"""

import lightning
import torch
from torch import nn

from averaging import EMA, applied, recalibrated
from common import digits, report

steps, out = report.arguments(__doc__, steps=400)

lightning.seed_everything(0, verbose=False)
train, held_out = digits.loaders()
test = list(held_out.dataset.tensors)
classifier = digits.Classifier(norm=nn.BatchNorm1d)
optimizer = classifier.configure_optimizers()
weights, buffers_too = EMA(half_life=max(1, steps // 20)), EMA(half_life=max(1, steps // 20), buffers=True)


@torch.no_grad()
def loss() -> float:
    classifier.eval()
    nats = classifier.loss(test).item()
    classifier.train()
    return nats


rows, step = [], 0
while step < steps:
    for batch in train:
        classifier.training_step(batch, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        weights.update(classifier, step)
        buffers_too.update(classifier, step)
        if step % max(1, steps // 8) == 0:
            losses = [loss()]
            with applied(classifier, weights):
                losses.append(loss())
            with applied(classifier, buffers_too):
                losses.append(loss())
            with recalibrated(classifier, weights, train):
                losses.append(loss())
            rows.append((step, *losses))
        if step == steps:
            break

print("loss on 600 held-out digits")
print(report.table(["step", "online", "EMA, online statistics", "averaged", "recalibrated"], rows))
