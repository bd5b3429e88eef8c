"""A loop under accelerate, and processes under torchrun, need no adapter of their own."""

from __future__ import annotations

import subprocess
import sys
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


DDP = """
import sys
import torch
from torch import distributed, nn
from averaging import LAWA

distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
average, seen = LAWA(k=3, every=2), []
for step in range(1, 11):
    torch.manual_seed(10 * step + rank)
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update(model, step)
    seen.append(model.module.weight.detach().double().clone())
exact = torch.stack([seen[t - 1] for t in (6, 8, 10)]).mean(0).float()
ours = average.average()["weight"]
gathered = [torch.empty_like(ours) for _ in range(2)]
distributed.all_gather(gathered, ours)
same = torch.equal(ours, exact) and torch.equal(gathered[0], gathered[1])
open(f"{sys.argv[1]}/{rank}", "w").write(str(same))
distributed.barrier()
distributed.destroy_process_group()
"""


def test_every_rank_of_ddp_holds_the_same_average(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DDP)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    # Judged by what the ranks wrote: gloo sometimes aborts at exit.
    subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, timeout=120)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True", "True"]
