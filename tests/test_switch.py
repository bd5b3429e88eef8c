"""Averages that training goes on from: EMA(switch=...), in a loop and in both trainers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from write_backs import IGNORED_OF_LIGHTNING, linear, offers_while_accumulating, same, with_lightning, with_transformers

from averaging import EMA, LAWA, load_into


def train_in_a_loop(averager, steps, model, optimizer, epoch_of=None):
    """Regression on fixed batches; returns the weights before and after each offer."""
    seen = []
    for step in steps:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step)).to(model.weight.dtype)
        loss = (model(x) - x.sum(1, keepdim=True).sin()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        before = model.weight.detach().clone()
        restart = averager.update(model, step, epoch=epoch_of and epoch_of(step))
        if restart is not None:
            load_into(model, restart)
        seen.append((before, model.weight.detach().clone()))
    return seen


@pytest.mark.parametrize(
    ("switch", "start", "switched"),
    [
        (5, 0, (5, 10, 15, 20, 25, 30)),  # hare and tortoise
        ("epoch", 0, (8, 16, 24)),  # Switch EMA
        ("2 epochs", 0, (16,)),
        (5, 12, (15, 20, 25, 30)),
        ("20%", 0, (6, 12, 18, 24, 30)),
    ],
)
@pytest.mark.parametrize("every", [1, 2])
def test_against_float64(switch, start, switched, every):
    averager = EMA(0.8, every=every, start=start, switch=switch).prepare(total_steps=30)
    model = linear()
    seen = train_in_a_loop(averager, range(1, 31), model, torch.optim.SGD(model.parameters(), 0.2), lambda t: t / 8)
    # The same training in float64, written out.
    theta, ema, keep = linear().weight.detach().double(), None, 0.8**every
    for step, (before, after) in enumerate(seen, 1):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step)).double()
        error = x @ theta.T - x.sum(1, keepdim=True).sin()
        theta = theta - 0.2 * 2 * error.T @ x / 16
        torch.testing.assert_close(before.double(), theta, rtol=1e-5, atol=1e-6)
        if step % every == 0 and step >= start:
            ema = theta if ema is None else keep * ema + (1 - keep) * theta
        if step in switched:
            theta = ema
        torch.testing.assert_close(after.double(), theta, rtol=1e-5, atol=1e-6)
        assert (step in switched) == (not torch.equal(before, after))
    torch.testing.assert_close(averager.average()["weight"].double(), ema, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_holds_the_average_and_the_moments_stay(dtype):
    averager, model = EMA(0.8, switch=7), linear(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    train_in_a_loop(averager, range(1, 7), model, optimizer)
    twin, other = copy.deepcopy(model), copy.deepcopy(averager)
    fork = torch.optim.AdamW(twin.parameters(), 0.05)
    fork.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.write_backs = None
    train_in_a_loop(averager, [7], model, optimizer)
    train_in_a_loop(other, [7], twin, fork)
    assert torch.equal(model.weight, averager.average()["weight"].to(dtype))
    assert not torch.equal(model.weight, twin.weight)
    assert torch.equal(averager.average()["weight"], other.average()["weight"])
    (moments,), (expected,) = optimizer.state.values(), fork.state.values()
    assert all(torch.equal(moments[name], expected[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_nothing_is_written_back_twice_nor_before_the_start():
    averager, model = EMA(0.8, switch=3, start=4), linear()
    returned = [averager.update(model, step) is not None for step in (1, 2, 3, 3, 4, 5, 6, 6, 7, 11, 11)]
    assert returned == [False] * 6 + [True, False, False, True, False]


def test_never_between_optimizer_steps():
    assert offers_while_accumulating(EMA(0.8, switch="1 epoch")) == [2, 3, 4]


def test_what_is_due_after_the_next_optimizer_step_survives_a_checkpoint(tmp_path):
    averager, model = EMA(0.8, switch="epoch"), linear()
    for step, epoch in ((1, 0.9), (1, 1.0)):  # the epoch ends while gradients are accumulated
        assert averager.update(model, step, epoch=epoch) is None
    averager.save(tmp_path / "state")
    resumed = EMA(0.8, switch="epoch").load(tmp_path / "state")
    assert [resumed.update(model, step, epoch=1.1) is not None for step in (1, 2, 3)] == [False, True, False]


# ---------------------------------------------------------------------- in the trainers


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("switch", "precision"), [(3, "mixed"), ("epoch", "bfloat16")])
def test_transformers(switch, precision, tmp_path):
    pytest.importorskip("transformers")
    from averaging.transformers import AveragingCallback

    def run(resume=None):
        ema, lawa = EMA(0.8, switch=switch), LAWA(k=2, every=2)
        return with_transformers(tmp_path, [AveragingCallback(ema, lawa)], resume, precision=precision), ema, lawa

    seen, ema, lawa = run()
    switched = {3: {3, 6, 9, 12}, "epoch": {4, 8, 12}}[switch]
    assert seen.written == switched
    expected: dict[str, Any] = {}
    for t, weights in seen.before.items():
        expected = {n: 0.8 * expected.get(n, w.double()) + 0.2 * w.double() for n, w in weights.items()}
        if t in switched:
            for name, tensor in seen.after[t].items():
                assert tensor.dtype == (torch.bfloat16 if precision == "bfloat16" else torch.float32)
                torch.testing.assert_close(tensor, expected[name].to(tensor.dtype), rtol=1e-2, atol=1e-6)
    assert same(seen.after[12], ema.average(rounded=True))
    snapshots = [seen.after[10], seen.after[12]]  # the other average absorbs what was written back
    for name, tensor in lawa.average().items():
        assert torch.equal(tensor, torch.stack([s[name].double() for s in snapshots]).mean(0).float())
    for cut in (3, 6):
        again, ema_again, lawa_again = run(str(tmp_path / f"checkpoint-{cut}"))
        assert all(same(again.after[t], seen.after[t]) for t in range(cut + 1, 13))
        assert same(ema_again.average(), ema.average())
        assert same(lawa_again.average(), lawa.average())


@pytest.mark.filterwarnings(*IGNORED_OF_LIGHTNING)
@pytest.mark.parametrize(("switch", "precision"), [(3, "bf16-true"), ("epoch", "bf16-mixed"), ("0.35 epochs", "32")])
def test_lightning(switch, precision, tmp_path):
    pytest.importorskip("lightning.pytorch")
    from averaging.lightning import EMA as Callback

    def run(resume=None):
        callback = Callback(0.8, switch=switch)
        return with_lightning(tmp_path, callback, resume, precision), callback.averager

    seen, ema = run()
    assert seen.written == {3: {3, 6, 9, 12}, "epoch": {4, 8, 12}, "0.35 epochs": {2, 3, 5, 6, 7, 9, 10, 12}}[switch]
    assert same(seen.after[12], ema.average(rounded=True))
    for cut in (2, 3, 4, 7):
        again, other = run(tmp_path / f"step={cut}.ckpt")
        assert all(same(again.after[t], seen.after[t]) for t in range(cut + 1, 13))
        assert same(other.average(), ema.average())
