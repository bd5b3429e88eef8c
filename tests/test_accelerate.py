"""A loop under accelerate needs no adapter of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from averaging import EMA, LAWA

accelerate = pytest.importorskip("accelerate")


def train(folder: Path, stop: int, resume: bool) -> tuple[dict[str, torch.Tensor], ...]:
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, data = nn.Linear(4, 1), torch.utils.data.TensorDataset(torch.randn(48, 4))
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.Adam(model.parameters(), lr=0.1), torch.utils.data.DataLoader(data, batch_size=2)
    )
    averages = LAWA(k=3, every=2), EMA(0.9)
    accelerator.register_for_checkpointing(*averages)
    done = 0
    if resume:
        accelerator.load_state(folder)
        done = averages[0].step
    for i, (batch,) in enumerate(loader):
        if i < 2 * done or averages[0].step == stop:
            continue
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            for average in averages:
                average.update(accelerator.unwrap_model(model))
    if not resume and stop < 12:
        accelerator.save_state(folder)
    return tuple({n: t.clone() for n, t in average.average().items()} for average in averages)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_accelerate_loop_resumes_exactly(tmp_path):
    straight = train(tmp_path, 12, resume=False)
    train(tmp_path, 5, resume=False)
    for one, other in zip(straight, train(tmp_path, 12, resume=True), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
