"""Each averager against a few lines of float64."""

from __future__ import annotations

import errno
import math
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from averaging import BEMA, EMA, LAWA, SWA, load_into
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


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_lawa_of_large_tensors_in_any_grad_mode(mode):
    """Blocks of large tensors go to other threads, for which the caller's mode does not count by itself."""
    averager, threads = LAWA(k=3, every=1), torch.get_num_threads()
    snapshots = [{"large": torch.randn(2, 200_003), "small": torch.randn(7)} for _ in range(3)]
    for step, snapshot in enumerate(snapshots, 1):
        averager.update(snapshot, step)
    with mode():
        average = averager.average()
    for name, tensor in average.items():
        assert torch.equal(tensor, torch.stack([s[name].double() for s in snapshots]).mean(0).float())
    assert torch.get_num_threads() == threads


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


@pytest.mark.parametrize("memory", ["cpu", "pinned", "a folder"])
def test_a_ring_that_will_not_fit_is_told_of_beforehand(tmp_path, monkeypatch, memory):
    place = tmp_path / "not" / "yet" if memory == "a folder" else memory
    monkeypatch.setattr("averaging.memory.free_memory", lambda: 3500)
    monkeypatch.setattr(
        "averaging.memory.shutil.disk_usage", lambda folder: SimpleNamespace(free=3500 if folder.exists() else -1)
    )
    weights = {"w": torch.zeros(250), "v": torch.zeros(2)}
    LAWA(k=3, every=1, memory=place).update(weights)
    where = f"in {place}" if memory == "a folder" else "in CPU memory"
    with pytest.warns(UserWarning, match=f"lawa: 4 snapshots are 4.0 kB, but 3.5 kB are free {where}: make room"):
        LAWA(k=(2, 4), every=1, memory=place).update(weights)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.warns(UserWarning, match="bema: 2 snapshots are 16.1 kB in 8 processes"):
        BEMA(every=1, memory=place).update(weights, 0)


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


@pytest.mark.parametrize("settings", [{"decay": 0.9}, {"half_life": 0.25}, {"window": "30%"}])
@pytest.mark.parametrize("warmup", [None, "tensorflow", "power", "debias", "edm2"])
@pytest.mark.parametrize("compensated", [False, True])
def test_ema_of_a_late_start_and_a_counter_that_jumps(settings, warmup, compensated):
    decay = {"decay": 0.9, "half_life": 2 ** (-1 / 20), "window": 1 - 2 / 25}[next(iter(settings))]
    steps = [t for t in range(3, 81, 2) if t % 7]
    snapshots = dict(zip(steps, stream(len(steps)), strict=True))
    averager = EMA(**settings, every=3, start=10, warmup=warmup, compensated=compensated).prepare(total_steps=80)
    absorbed = []
    for step in steps:
        count = averager.absorbed
        averager.update(snapshots[step], step)
        absorbed += [step] * (averager.absorbed - count)
    first = absorbed[0]

    def beta(t):  # of the optimizer step that is the t-th after the first absorption
        grown = {
            "tensorflow": lambda: (1 + t) / (10 + t),
            "power": lambda: 1 - (1 + t) ** (-2 / 3),
            "edm2": lambda: 2 ** (-1 / (0.09 * t)),
        }
        return min(decay, grown[warmup]()) if warmup in grown else decay

    expected, weight = torch.zeros(257, dtype=torch.float64), 1.0
    if warmup == "debias":
        last = first - 3  # the first absorption stands for as many steps as `every`
    else:
        expected, last = snapshots[first]["w"].double(), first
    for step in absorbed:
        keep = math.prod(beta(t - first) for t in range(last + 1, step + 1))
        expected = keep * expected + (1 - keep) * snapshots[step]["w"].double()
        weight, last = weight * keep, step
    if warmup == "debias":
        expected = expected / (1 - weight)
    average = averager.average()["w"]
    assert average.dtype == (torch.float64 if compensated else torch.float32)
    tolerance = 1e-12 if compensated else 1e-6
    torch.testing.assert_close(average.double(), expected, rtol=tolerance, atol=0.1 * tolerance)


def recovered(averager, offset: float, steps: int) -> float:
    """The share of a constant relative offset that the average has made up for."""
    start, end = torch.linspace(-2, 3, 16), torch.linspace(-2, 3, 16) * (1 + offset)
    averager.update({"w": start}, 1)
    for step in range(2, steps + 2):
        averager.update({"w": end}, step)
    return float(((averager.average()["w"].double() - start.double()) / (end.double() - start.double())).min())


def test_a_compensated_ema_does_not_stall():
    assert recovered(EMA(0.9999, compensated=True), 1e-4, 80_000) > 0.999
    with pytest.warns(UserWarning, match=r"compensated=True .* every=2"):
        assert recovered(EMA(0.9999), 1e-4, 10_000) < 0.1
    # As slow as it must be, and still moving where only a thousandth is missing.
    averager = EMA(0.99999, compensated=True)
    assert recovered(averager, 1e-4, 20_000) == pytest.approx(1 - 0.99999**20_000, rel=1e-6)
    state, end = averager.state_dict(), torch.linspace(-2, 3, 16) * (1 + 1e-4)
    state["tensors"]["ema"] = {"w": end.double() * (1 - 1e-7)}
    averager.load_state_dict(state)
    for step in range(20_002, 40_002):
        averager.update({"w": end}, step)
    missing = (end.double() - averager.average()["w"]) / end.double()
    torch.testing.assert_close(missing, torch.full_like(missing, 1e-7 * 0.99999**20_000), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("decay", "dtype"), [(0.9999, torch.bfloat16), (0.99999, torch.float32)])
def test_a_compensated_ema_over_many_steps_of_training(decay, dtype):
    generator = torch.Generator().manual_seed(5)
    # A decaying trend with the noise of the gradients, as weights move in training.
    trend = 1 - 0.5 * torch.exp(-torch.arange(100_000) / 20_000)
    stream = torch.randn(8, generator=generator) * 0.05 * trend[:, None]
    stream = (stream + torch.randn(100_000, 8, generator=generator) * 1e-4).to(dtype)
    averager = EMA(decay, compensated=True)
    for step, weights in enumerate(stream):
        averager.update({"w": weights}, step + 1)
    shares = (1 - decay) * decay ** torch.arange(99_999, -1, -1, dtype=torch.float64)
    shares[0] /= 1 - decay
    expected = shares @ stream.double()
    torch.testing.assert_close(averager.average()["w"], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(averager.average(rounded=True)["w"], expected.to(dtype))


def test_a_device_without_float64_is_an_error():
    weight = SimpleNamespace(shape=(2,), dtype=torch.float32, device=torch.device("mps"))
    with pytest.raises(ValueError, match=r"'w' is on mps, which has no float64"):
        EMA(0.9999, compensated=True).update({"w": weight}, 1)


def test_a_compensated_average_is_rounded_once():
    # Just above the middle of two bfloat16 numbers: by way of float32 it would come to lie on it.
    state = EMA(0.9, compensated=True)
    state.update({"w": torch.ones(3, dtype=torch.bfloat16)}, 1)
    content = state.state_dict()
    content["tensors"]["ema"] = {"w": torch.tensor([1 + 2**-8 + 2**-40] * 3, dtype=torch.float64)}
    state.load_state_dict(content)
    assert (state.average(rounded=True)["w"] == 1 + 2**-7).all()
    model = nn.ParameterDict({"w": torch.ones(3, dtype=torch.bfloat16)})
    load_into(model, state)
    assert (model["w"] == 1 + 2**-7).all()


@pytest.mark.parametrize(
    ("averager", "stalls"),
    [
        (EMA(0.9999), True),
        (EMA(0.9999, every=10), False),
        (EMA(0.999), False),
        (EMA(window=40_000), True),
        (EMA(0.99999, warmup="debias"), True),
        (EMA(1.0), False),
        (EMA(0.99999, compensated=True), False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_decays_at_which_float32_stalls_are_warned_of_once(averager, stalls, dtype):
    averager.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 41):
            averager.update({"w": torch.ones(3, dtype=dtype)}, step)
    assert len(caught) == (stalls and dtype != torch.float64)


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
