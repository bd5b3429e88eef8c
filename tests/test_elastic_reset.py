"""Elastic Reset against float64, in a loop and in both trainers."""

from __future__ import annotations

import pytest
import torch
from write_backs import IGNORED_OF_LIGHTNING, linear, offers_while_accumulating, same, with_lightning, with_transformers

from averaging import EMA, ElasticReset, load_into, named_weights


def check(before, after, initial, resets, decay, dtype=torch.float32, tolerance=1e-6) -> None:
    """The weights after each optimizer step, before and after the callback, are those of Elastic Reset in float64."""
    assert {t for t in after if not same(before[t], after[t])} == set(resets)
    start = {n: w.double() for n, w in initial.items()}
    ema = start
    for t, weights in before.items():
        ema = {n: decay * ema[n] + (1 - decay) * w.double() for n, w in weights.items()}
        if t in resets:
            for name, tensor in after[t].items():
                assert tensor.dtype == dtype
                torch.testing.assert_close(tensor, ema[name].to(dtype), rtol=tolerance, atol=tolerance)
            ema = start


@pytest.mark.parametrize(
    ("every", "start", "resets"),
    [(7, 0, (7, 14, 21, 28)), ("epoch", 0, (8, 16, 24)), ("20%", 0, (6, 12, 18, 24, 30)), (5, 5, (10, 15, 20, 25, 30))],
)
def test_a_loop_against_float64(every, start, resets):
    averager = ElasticReset(every, 0.8, start=start).prepare(total_steps=30)
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    averager.update(model, 0, epoch=0.0)
    theta = linear().weight.detach().double()
    initial, ema = (theta, theta) if start == 0 else (None, None)
    for step in range(1, 31):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        (model(x) - x.sum(1, keepdim=True).sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if (restart := averager.update(model, step, epoch=step / 8)) is not None:
            load_into(model, restart)
        x = x.double()
        theta = theta - 0.2 * 2 * (x @ theta.T - x.sum(1, keepdim=True).sin()).T @ x / 16
        if initial is None and step == start:
            initial = ema = theta
        elif ema is not None:
            ema = 0.8 * ema + 0.2 * theta
            if step in resets:
                theta, ema = ema, initial
        assert (restart is not None) == (step in resets)
        torch.testing.assert_close(model.weight.detach().double(), theta, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(averager.average()["weight"].double(), ema, rtol=1e-5, atol=1e-6)


def test_never_between_optimizer_steps():
    assert offers_while_accumulating(ElasticReset("1 epoch", 0.8)) == [2, 3, 4]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("every", "moments", "lora", "precision"), [(3, "kept", True, "float32"), ("epoch", "reset", False, "bfloat16")]
)
def test_transformers(every, moments, lora, precision, tmp_path):
    pytest.importorskip("transformers")
    from averaging.transformers import AveragingCallback
    from averaging.transformers import ElasticReset as Callback

    assert Callback(5).averager.decay == 0.995

    def run(resume=None):
        averager, ema = ElasticReset(every, 0.8, moments=moments), EMA(0.5)
        callbacks = [AveragingCallback(averager), AveragingCallback(ema)]
        return with_transformers(tmp_path, callbacks, resume, lora, precision), averager, ema

    seen, averager, ema = run()
    resets = {3, 6, 9, 12} if every == 3 else {4, 8, 12}
    exact = precision == "float32"
    check(seen.before, seen.after, seen.initial, resets, 0.8, getattr(torch, precision), 1e-6 if exact else 1e-2)
    assert {t for t, count in seen.states.items() if not count} == (resets if moments == "reset" else set())
    assert same(named_weights(seen.model), ema.average(rounded=True))  # the EMA leads, and saw the resets
    expected: dict[str, torch.Tensor] = {}
    for weights in seen.after.values():
        expected = {n: 0.5 * expected.get(n, w.double()) + 0.5 * w.double() for n, w in weights.items()}
    for name, tensor in ema.average().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    for cut in (2, 4, 9):
        again, other, _ = run(str(tmp_path / f"checkpoint-{cut}"))
        assert all(same(again.after[t], seen.after[t]) for t in range(cut + 1, 13))
        assert same(other.average(), averager.average())


@pytest.mark.filterwarnings(*IGNORED_OF_LIGHTNING)
@pytest.mark.parametrize(("every", "moments"), [(3, "reset"), ("epoch", "kept")])
def test_lightning(every, moments, tmp_path):
    pytest.importorskip("lightning.pytorch")
    from averaging.lightning import ElasticReset as Callback

    def run(resume=None):
        callback = Callback(every, 0.8, moments=moments)
        return with_lightning(tmp_path, callback, resume), callback.averager

    seen, averager = run()
    assert same(seen.after[12], named_weights(seen.model))  # the model keeps what was trained
    resets = {3, 6, 9, 12} if every == 3 else {4, 8, 12}
    check(seen.before, seen.after, seen.initial, resets, 0.8)
    assert {t for t, count in seen.states.items() if not count} == (resets if moments == "reset" else set())
    for cut in (2, 3, 8):
        again, other = run(tmp_path / f"step={cut}.ckpt")
        assert all(same(again.after[t], seen.after[t]) for t in range(cut + 1, 13))
        assert same(other.average(), averager.average())
