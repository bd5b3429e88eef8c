"""Snapshots in page-locked memory: the same numbers as anywhere, whatever happens to the weights right after."""

from __future__ import annotations

import pickle

import pytest
import torch

from averaging import LAWA
from averaging.memory import PinnedMemory, memory

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_without_cuda_weights_it_is_plain_cpu_memory():
    plain, pinned = LAWA(k=3, every=1), LAWA(k=3, every=1, memory="pinned")
    weights = {"w": torch.randn(1000), "complex": torch.randn(3, dtype=torch.complex64), "scalar": torch.randn(())}
    for step in range(1, 9):
        for tensor in weights.values():
            tensor.mul_(1.01)
        plain.update(weights, step)
        pinned.update(weights, step)
    for name, tensor in plain.average().items():
        assert torch.equal(pinned.average()[name], tensor)
        assert not any(snapshot[name].is_pinned() for snapshot in pinned.tensors().values())


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_overwritten_right_after_are_not_torn(dtype):
    """The transfer of 128 MB takes milliseconds, the writes that follow on the training's stream microseconds."""
    held, averager = memory("pinned"), LAWA(k=3, every=1, memory="pinned")
    weights = {"w": torch.zeros(2**27 // dtype.itemsize, dtype=dtype, device="cuda"), "cpu": torch.zeros(5)}
    weights["strided"] = torch.zeros(300, 200, dtype=dtype, device="cuda").t()
    assert isinstance(held, PinnedMemory)
    for step in range(1, 12):
        for tensor in weights.values():
            tensor.fill_(step)
        held.store(f"{step}", weights, recycle=f"{step - 3}" if step > 3 else None)
        averager.update(weights, step)
        for _ in range(3):
            for tensor in weights.values():
                tensor.fill_(-1)
        torch.empty(2**27, dtype=torch.uint8, device="cuda").fill_(7)  # would land in memory freed too early
    for step in (9, 10, 11):
        for name, tensor in held[f"{step}"].items():
            assert tensor.is_pinned()
            assert tensor.device.type == "cpu"
            assert (tensor == step).all(), (step, name)
    for tensor in averager.average().values():
        assert (tensor == 10).all()


@gpu
def test_update_waits_for_nothing():
    averager = LAWA(k=2, every=1, memory="pinned")
    weights = {"w": torch.zeros(2**26, device="cuda")}
    averager.update(weights, 1)
    averager.update(weights, 2)
    torch.cuda.synchronize()
    torch.cuda._sleep(2**31)  # the training's stream is busy for about a second
    averager.update(weights, 3)
    assert not torch.cuda.current_stream().query()


@gpu
def test_a_resumed_and_a_pickled_ring_go_on(tmp_path):
    straight = LAWA(k=3, every=1, memory="pinned")
    weights = {"w": torch.randn(1000, device="cuda")}
    seen = []

    def advance(averagers, steps):
        for step in steps:
            weights["w"].mul_(1.01)
            seen.append(weights["w"].cpu())
            for averager in averagers:
                averager.update(weights, step)

    advance([straight], range(1, 6))
    straight.save(tmp_path / "state")
    loaded = LAWA(k=3, every=1, memory="pinned").load(tmp_path / "state")
    copied = pickle.loads(pickle.dumps(straight))
    advance([straight, loaded, copied], range(6, 8))
    exact = torch.stack(seen[-3:]).double().mean(0).float()
    for averager in (straight, loaded, copied):
        assert torch.equal(averager.average()["w"], exact)
    advance([loaded], range(8, 12))
    assert all(snapshot["w"].is_pinned() for snapshot in loaded.tensors().values())
