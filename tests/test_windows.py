"""LAWA with several windows: each exact, all from one ring."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_lightning import ModelCheckpoint, every_step, fit, pytestmark, same, validation_loss, weights_of
from test_lightning import Recorder as LightningRecorder
from test_transformers import AutoModelForCausalLM, Recorder, assert_equal, loss_of, mean64, snapshot, trainer

import averaging
import averaging.lightning
import averaging.transformers
from averaging import LAWA, load_into
from averaging.decay import decay_weights

__all__ = ["pytestmark"]

WINDOWS = (3, 1, 5)


def feed(averager: LAWA, steps: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    snapshots = [torch.randn(257) for _ in range(steps)]
    for step, weights in enumerate(snapshots, 1):
        averager.update({"w": weights}, step)
    return snapshots


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("memory", ["cpu", "disk"])
@pytest.mark.parametrize("steps", [1, 2, 4, 11])
def test_each_window_is_the_float64_mean_of_its_own(steps, memory, decay, tmp_path):
    averager = LAWA(k=WINDOWS, every=1, weights=decay, memory=str(tmp_path) if memory == "disk" else memory)
    snapshots = feed(averager, steps)
    assert len(averager.tensors()) == min(steps, 5)
    assert [*averager.views()] == ["lawa-3", "lawa-1", "lawa-5"]
    for _ in range(2):  # the order of asking does not matter
        for k, view in zip(WINDOWS, averager.views().values(), strict=True):
            latest = torch.stack(snapshots[-k:]).double()
            shares = torch.tensor(decay_weights(decay, len(latest)), dtype=torch.float64)
            exact = latest.mean(0) if decay == "linear" else (latest * shares[:, None]).sum(0)
            torch.testing.assert_close(view.average()["w"], exact.float(), rtol=1e-7, atol=1e-9)
            assert decay != "linear" or torch.equal(view.average()["w"], exact.float())
    first = next(iter(averager.views().values()))
    assert torch.equal(first.average()["w"], averager.average()["w"])
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(257))
    load_into(model, averager.views()["lawa-5"])
    assert torch.equal(model.w, averager.views()["lawa-5"].average()["w"])


def test_names_and_spacing():
    assert [*LAWA(k=[5], every=1, name="late").views()] == ["late-5"]
    assert [*LAWA(k=5, every=1).views()] == ["lawa"]
    averager = LAWA(k=(5, 20)).prepare(total_steps=10_000)
    assert averager.default_every(averager.run).amount == 20  # the first window spans 1 % of the run


@pytest.mark.parametrize("k", [(), (5, 5), (5, 0), (5, True), "5", (5, 2.5)])
def test_bad_windows(k):
    with pytest.raises(ValueError, match="k="):
        LAWA(k=k, every=1)


def windows(**options):
    return {"k": WINDOWS, "every": 1, "evaluate": "all", **options}


def test_transformers(tmp_path: Path) -> None:
    def callback():
        return averaging.transformers.LAWA(**windows())

    straight, recorder = callback(), Recorder()
    run = trainer(tmp_path / "a", [straight, recorder])
    run.train()
    logged = {entry["step"]: entry for entry in run.state.log_history if "eval_loss" in entry}

    def mean(k: int, step: int):
        return mean64([recorder.weights[t] for t in range(max(1, step - k + 1), step + 1)])

    for step in (4, 8, 12):
        assert logged[step]["eval_loss"] == pytest.approx(loss_of(mean(3, step)), rel=1e-5)
        assert logged[step]["eval_online_loss"] == pytest.approx(loss_of(recorder.weights[step]), rel=1e-5)
        for k in (1, 5):
            assert logged[step][f"eval_lawa-{k}_loss"] == pytest.approx(loss_of(mean(k, step)), rel=1e-5)
        for k in WINDOWS:
            folder = tmp_path / "a" / f"checkpoint-{step}" / f"lawa-{k}"
            assert_equal(snapshot(AutoModelForCausalLM.from_pretrained(folder)), mean(k, step))
        assert len([*(tmp_path / "a" / f"checkpoint-{step}").rglob("snapshot-*")]) == min(step, 5)
    assert_equal(snapshot(run.model), mean(3, 12))

    trainer(tmp_path / "b", [callback()], steps=8).train()
    second, resumed = callback(), Recorder()
    trainer(tmp_path / "b", [second, resumed]).train(resume_from_checkpoint=True)
    assert_equal(resumed.weights[12], recorder.weights[12])
    for k in WINDOWS:
        average = second.averager.views()[f"lawa-{k}"].average()
        assert_equal(average, mean(k, 12))


def test_lightning(tmp_path: Path) -> None:
    def callback():
        return averaging.lightning.LAWA(**windows())

    recorder: LightningRecorder
    _, module, recorder = fit(tmp_path, callback(), every_step(tmp_path))

    def mean(k: int, step: int):
        return recorder.mean(*range(max(1, step - k + 1), step + 1))

    for step, measured in zip((4, 8, 12), recorder.measured, strict=True):
        assert measured["val_loss"] == pytest.approx(validation_loss(mean(3, step), module), rel=1e-5)
        for k in (1, 5):
            assert measured[f"lawa-{k}_val_loss"] == pytest.approx(validation_loss(mean(k, step), module), rel=1e-5)
    assert same(weights_of(module), mean(3, 12))
    for step in (2, 8):
        for k in WINDOWS:
            file = tmp_path / f"step={step}.ckpt"
            assert same(averaging.lightning.load_average(file, f"lawa-{k}"), mean(k, step))
        second = callback()
        _, _, rest = fit(tmp_path / "b", second, ckpt_path=file)
        assert same(rest.online[12], recorder.online[12])
        for k in WINDOWS:
            assert same(dict(second.averager.views()[f"lawa-{k}"].average()), mean(k, 12))


def test_lightning_picks_the_best_by_any_window(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="lawa-5_val_loss", filename="best")
    _, module, recorder = fit(tmp_path, averaging.lightning.LAWA(**windows()), best)
    losses = [measured["lawa-5_val_loss"] for measured in recorder.measured]
    step = (4, 8, 12)[losses.index(min(losses))]
    chosen = averaging.lightning.load_average(tmp_path / "best.ckpt")
    assert same(chosen, recorder.mean(*range(max(1, step - 4), step + 1)))
    assert validation_loss(chosen, module) == pytest.approx(min(losses), rel=1e-5)
