"""A loop under accelerate needs no adapter of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from averaging import EMA, LAWA

accelerate = pytest.importorskip("accelerate")


def train(folder: Path, stop: int, resume: bool, hooks: bool = False) -> tuple[dict[str, torch.Tensor], ...]:
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, data = nn.Linear(4, 1), torch.utils.data.TensorDataset(torch.randn(48, 4))
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.Adam(model.parameters(), lr=0.1), torch.utils.data.DataLoader(data, batch_size=2)
    )
    averages = LAWA(k=3, every=2), EMA(0.9)
    if hooks:
        for average in averages:
            accelerator.register_save_state_pre_hook(lambda _, __, out, a=average: a.save(f"{out}/{a.name}"))
            accelerator.register_load_state_pre_hook(lambda _, out, a=average: a.load(f"{out}/{a.name}"))
    else:
        accelerator.register_for_checkpointing(*averages)
    done = 0
    if resume:
        accelerator.load_state(folder / "5")
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
        if not resume and accelerator.sync_gradients and averages[0].step in (stop - 1, stop) and stop < 12:
            accelerator.save_state(folder / str(averages[0].step))
    return tuple({n: t.clone() for n, t in average.average().items()} for average in averages)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("hooks", [False, True])
def test_an_accelerate_loop_resumes_exactly(tmp_path, hooks):
    straight = train(tmp_path, 12, resume=False)
    train(tmp_path, 5, resume=False, hooks=hooks)
    for one, other in zip(straight, train(tmp_path, 12, resume=True, hooks=hooks), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    snapshots = [*tmp_path.glob("*/lawa/snapshot-*.safetensors")]
    assert len(snapshots) == 4 * hooks  # of steps 2 and 4, in both checkpoints
    assert len({file.stat().st_ino for file in snapshots}) == 2 * hooks
