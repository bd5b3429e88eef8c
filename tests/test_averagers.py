"""Each averager against a few lines of float64."""

from __future__ import annotations

import errno
import math
import os

import pytest
import torch
from torch import nn

from averaging import EMA, LAWA, SWA
from averaging.memory import SnapshotFile


def stream(steps: int, dtype=torch.float32, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    weights, out = torch.randn(257), []
    for _ in range(steps):
        weights = weights + 0.01 * torch.randn(257)
        out.append({"w": weights.to(dtype)})
    return out


def feed(averager, snapshots, every: int = 1):
    for step, snapshot in enumerate(snapshots, 1):
        if step % every == 0:
            averager.update(snapshot, step)
    return averager.average()["w"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("memory", ["cpu", "device", "disk"])
@pytest.mark.parametrize("steps", [2, 3, 10, 23])
def test_lawa_is_the_rounded_float64_mean_of_the_last_k(dtype, memory, steps, tmp_path):
    snapshots = stream(steps, dtype)
    where = tmp_path if memory == "disk" else memory
    average = feed(LAWA(k=5, every=1, memory=where), snapshots)
    exact = torch.stack([s["w"].double() for s in snapshots[-5:]]).mean(0)
    assert torch.equal(average, exact.to(torch.promote_types(dtype, torch.float32)))


def test_lawa_forgets_a_nonfinite_snapshot_once_it_has_left_the_window():
    snapshots = stream(12)
    snapshots[5]["w"][0] = math.inf
    assert torch.isfinite(feed(LAWA(k=5, every=1), snapshots)).all()


def test_lawa_caches_until_the_next_absorption():
    averager = LAWA(k=2, every=2)
    snapshots = stream(5)
    for step in (1, 2):
        averager.update(snapshots[step], step)
    first = averager.average()["w"]
    averager.update(snapshots[3], 3)
    assert averager.average()["w"] is first
    averager.update(snapshots[4], 4)
    assert averager.average()["w"] is not first


def test_lawa_on_disk_never_reads_stale_files_and_cleans_up(tmp_path):
    one = LAWA(k=2, every=1, memory=tmp_path)
    feed(one, stream(4, seed=1))
    other = LAWA(k=2, every=1, memory=tmp_path)
    snapshots = stream(1, seed=2)
    assert torch.equal(feed(other, snapshots), snapshots[0]["w"])
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    del one, other
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_full_disk_is_a_clear_error_and_the_ring_stays_whole(tmp_path, monkeypatch):
    averager = LAWA(k=3, every=1, memory=tmp_path)
    snapshots = stream(4)
    feed(averager, snapshots[:2])
    before = averager.average()["w"].clone()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("averaging.memory.save_file", full)
        with pytest.raises(OSError, match=r"make room.*memory=\"cpu\"") as caught:
            averager.update(snapshots[2], 3)
    assert caught.value.errno == errno.ENOSPC
    assert torch.equal(averager.average()["w"], before)
    averager.update(snapshots[2], 3)
    exact = torch.stack([s["w"].double() for s in snapshots[:3]]).mean(0).float()
    assert torch.equal(averager.average()["w"], exact)


def test_a_smaller_k_on_resume_keeps_the_latest(tmp_path):
    snapshots = stream(6)
    averager = LAWA(k=4, every=1)
    feed(averager, snapshots)
    averager.save(tmp_path / "state")
    exact = torch.stack([s["w"].double() for s in snapshots[-2:]]).mean(0).float()
    assert torch.equal(LAWA(k=2, every=1).load(tmp_path / "state").average()["w"], exact)
    assert len(SnapshotFile(next((tmp_path / "state").glob("*.safetensors")))) == 1


@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize("settings", [{"decay": 0.95}, {"half_life": 20}, {"window": 39}])
def test_ema_at_any_stride_decays_per_optimizer_step(every, settings):
    beta = {"decay": 0.95, "half_life": 2 ** (-1 / 20), "window": 0.95}[next(iter(settings))]
    snapshots = stream(60)
    expected = None
    for step in range(every, 61, every):
        w = snapshots[step - 1]["w"].double()
        expected = w if expected is None else beta**every * expected + (1 - beta**every) * w
    average = feed(EMA(**settings, every=every), snapshots)
    torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("warmup", "decay_at"),
    [
        ("tensorflow", lambda t: (1 + t) / (10 + t)),
        ("power", lambda t: 1 - (1 + t) ** (-2 / 3)),
        ("edm2", lambda t: 2 ** (-1 / (0.09 * t))),
    ],
)
@pytest.mark.parametrize("every", [1, 4])
def test_ema_warmups(warmup, decay_at, every):
    snapshots = stream(100)
    expected = snapshots[every - 1]["w"].double()
    for step in range(2 * every, 101, every):
        beta = math.prod(min(0.98, decay_at(t)) for t in range(step - 2 * every + 1, step - every + 1))
        expected = beta * expected + (1 - beta) * snapshots[step - 1]["w"].double()
    average = feed(EMA(0.98, warmup=warmup, every=every), snapshots)
    torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("every", [1, 4])
def test_ema_debias_is_adams(every):
    snapshots = stream(40)
    zero, total = torch.zeros(257, dtype=torch.float64), 0
    for step in range(every, 41, every):
        zero = 0.9**every * zero + (1 - 0.9**every) * snapshots[step - 1]["w"].double()
        total = step
    average = feed(EMA(0.9, warmup="debias", every=every), snapshots)
    torch.testing.assert_close(average.double(), zero / (1 - 0.9**total), rtol=1e-6, atol=1e-7)


def test_ema_moves_where_bf16_would_stall():
    start, end = {"w": torch.ones(8, dtype=torch.bfloat16)}, {"w": torch.full((8,), 1.125, dtype=torch.bfloat16)}
    averager = EMA(0.999)
    averager.update(start, 1)
    for step in range(2, 5002):
        averager.update(end, step)
    expected = 1.125 - 0.125 * 0.999**5000
    torch.testing.assert_close(averager.average()["w"], torch.full((8,), expected), rtol=1e-4, atol=0)


def test_swa_is_the_mean_since_its_start():
    snapshots = stream(40)
    average = feed(SWA(start=0.5, every=4).prepare(total_steps=40), snapshots)
    exact = torch.stack([snapshots[t - 1]["w"].double() for t in range(20, 41, 4)]).mean(0)
    torch.testing.assert_close(average.double(), exact, rtol=1e-6, atol=1e-7)


def test_crossings_are_counted_when_the_counter_jumps():
    averager = LAWA(k=10, every=5)
    snapshots = stream(40)
    for step in range(3, 40, 3):
        averager.update(snapshots[step], step)
    assert averager.absorbed == 39 // 5


def test_a_plain_torch_loop_and_ddp_names():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average, seen = LAWA(k=2, every=2), []
    for _ in range(6):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)
        seen.append(model.weight.detach().clone())
    exact = torch.stack([seen[3].double(), seen[5].double()]).mean(0).float()
    assert torch.equal(average.average()["weight"], exact)


def test_loading_reads_each_tensor_once(tmp_path, monkeypatch):
    averager = LAWA(k=3, every=1)
    feed(averager, stream(5))
    averager.save(tmp_path / "state")
    read = []
    get = SnapshotFile.__getitem__
    monkeypatch.setattr(SnapshotFile, "__getitem__", lambda self, name: read.append(self.file.name) or get(self, name))
    LAWA(k=3, every=1).load(tmp_path / "state")
    assert sorted(read) == sorted(file.name for file in (tmp_path / "state").glob("*.safetensors"))
