"""Your own training loop: two averages, one saved and resumed in the middle.

    python recipes/plain_loop.py

A byte-level transformer learns Python's standard library at a constant learning rate. About two minutes on two cores.
"""

import torch

from averaging import EMA, LAWA, applied, load_into
from common import report, text

steps, out = report.arguments(__doc__, steps=600)

model = text.transformer()
train, held_out = text.library_source()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
lawa = LAWA(k=5, every=max(1, steps // 40))
ema = EMA(half_life=max(1, steps // 20))

rows: list[tuple[str | float, ...]] = []
for step in range(1, steps + 1):
    batch = train[torch.randint(len(train), (16,))]
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    lawa.update(model, step)
    ema.update(model, step)

    if step == steps // 2:  # save beside the model's own checkpoint, and go on from there: nothing changes
        lawa.save(out / "lawa")
        lawa = LAWA(k=5, every=max(1, steps // 40)).load(out / "lawa")

    if step % max(1, steps // 10) == 0:
        losses = [text.loss(model, held_out)]
        for average in (lawa, ema):
            with applied(model, average):  # the model's own weights come back afterwards, bit for bit
                losses.append(text.loss(model, held_out))
        rows.append((step, *losses))

load_into(model, lawa)  # for good
model.save_pretrained(out / "model")

print(report.table(["step", "online", "LAWA", "EMA"], rows))
print(f"nats per held-out byte; {out / 'model'} holds the mean of the latest {lawa.k} snapshots")
