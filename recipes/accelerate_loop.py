"""A loop under accelerate: gradient accumulation, and an average that is saved and resumed with everything else.

    python recipes/accelerate_loop.py         (or: accelerate launch recipes/accelerate_loop.py)

A small classifier learns scikit-learn's digits. The run is interrupted in the middle, and resumed. A few seconds.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from averaging import LAWA, applied
from common import digits, report

steps, out = report.arguments(__doc__, steps=400)


def run(first: int, last: int, resume: bool) -> list[tuple[str, float, float]]:
    """Train from one optimizer step to another, and measure; twice two batches make a step."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    train, held_out = digits.digits()
    model = digits.Classifier()
    model, optimizer, batches = accelerator.prepare(model, model.configure_optimizers(), DataLoader(train, 16))
    average = LAWA(k=5, every=max(1, steps // 40))
    accelerator.register_for_checkpointing(average)
    if resume:
        accelerator.load_state(str(out / "checkpoint"))

    step = first
    while step < last:
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(accelerator.unwrap_model(model).loss(batch))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                average.update(accelerator.unwrap_model(model), step)
                if step == last:
                    break
    accelerator.save_state(str(out / "checkpoint"))

    classifier = accelerator.unwrap_model(model)
    with torch.no_grad():
        online = classifier.loss(held_out.tensors).item()
        with applied(classifier, average):
            return [(f"step {step}", online, classifier.loss(held_out.tensors).item())]


rows = run(0, steps // 2, resume=False) + run(steps // 2, steps, resume=True)
print(report.table(["600 held-out digits", "online", "LAWA"], rows))
