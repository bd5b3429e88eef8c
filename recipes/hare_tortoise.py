"""Hare and Tortoise: a network that is set back to its slow average from time to time learns less by heart.

    python recipes/hare_tortoise.py

For the first half of the run the hare sees a tenth of scikit-learn's digits, with half of the labels wrong, and learns
them by heart; then it sees all of them. With ``switch`` the hare is set back to the tortoise, its slow EMA, every 5 %
of the run (Lee et al. 2024, arXiv:2406.02596). Some ten seconds.
"""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

from averaging import EMA, applied, load_into
from common import digits, report

steps, out = report.arguments(__doc__, steps=1600)

train, held_out = digits.digits()
few, wrong = train.tensors[0][::10], train.tensors[1][::10].clone()
wrong[::2] = wrong[::2].roll(1)
parts = (TensorDataset(few, wrong), train)


def run(switch: float | None) -> list[tuple[int, float, float]]:
    """Step, loss of the hare and loss of the tortoise, ten times."""
    lightning.seed_everything(0, verbose=False)
    hare = digits.Classifier(noise=0)
    optimizer = hare.configure_optimizers()
    tortoise = EMA(half_life=0.05, switch=switch).prepare(total_steps=steps)
    losses = []
    batches = iter(())
    for step in range(1, steps + 1):
        if (batch := next(batches, None)) is None or step == steps // 2 + 1:
            batches = iter(DataLoader(parts[step > steps // 2], 32, shuffle=True))
            batch = next(batches)
        hare.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (restart := tortoise.update(hare, step)) is not None:
            load_into(hare, restart)
        if step % max(1, steps // 10) == 0:
            with torch.no_grad():
                loss = hare.loss(held_out.tensors).item()
                with applied(hare, tortoise):
                    losses.append((step, loss, hare.loss(held_out.tensors).item()))
    return losses


alone, together = run(switch=None), run(switch=0.05)
rows = [(*one, other[2]) for one, other in zip(alone, together, strict=True)]
print("loss on 600 held-out digits")
print(report.table(["step", "alone", "its EMA", "hare and tortoise"], rows))
