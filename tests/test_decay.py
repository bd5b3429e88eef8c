"""Weights that stand in for a decay of the learning rate, against the formula and against a decayed run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from averaging import LAWA, cli
from averaging.decay import decay_weights
from averaging.soups import uniform

RATE = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "inverse_sqrt": lambda x: 1 - math.sqrt(x),
}
every_decay = pytest.mark.parametrize("decay", RATE)


@every_decay
@pytest.mark.parametrize("k", [1, 2, 3, 10, 20])
def test_formula(decay, k):
    s = RATE[decay]
    expected = [s(j / k) - s((j + 1) / k) for j in range(k)]
    assert decay_weights(decay, k) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert math.fsum(decay_weights(decay, k)) == pytest.approx(1, rel=1e-15)
    assert min(decay_weights(decay, k)) > 0


@every_decay
@pytest.mark.parametrize("steps", [3, 15, 24])  # one snapshot, as many as the window has, more
def test_a_merge_at_a_constant_rate_is_the_run_at_the_decayed_rate(decay, steps):
    k, every = 5, 3
    torch.manual_seed(0)
    gradients = torch.randn(steps, 100, dtype=torch.float64)
    constant, averager = torch.randn(100, dtype=torch.float64), LAWA(k, every=every, weights=decay)
    taken = max(0, steps // every - k) * every + every  # steps up to the oldest snapshot, all at the full rate
    decayed = constant - 0.1 * gradients[:taken].sum(0)
    for step in range(1, steps + 1):
        constant = constant - 0.1 * gradients[step - 1]
        averager.update({"w": constant}, step)
    window = min(k, steps // every)
    for step in range(taken, steps):
        decayed = decayed - 0.1 * RATE[decay](((step - taken) // every + 1) / window) * gradients[step]
    torch.testing.assert_close(averager.average()["w"], decayed, rtol=1e-13, atol=1e-14)


@every_decay
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", ["cpu", "disk"])
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_lawa_rounds_the_float64_sum_once(decay, dtype, memory, count, tmp_path):
    torch.manual_seed(0)
    averager = LAWA(k=4, every=1, weights=decay, memory=str(tmp_path) if memory == "disk" else memory)
    snapshots = [torch.randn(301).to(dtype) for _ in range(count)]
    for step, snapshot in enumerate(snapshots, 1):
        averager.update({"w": snapshot}, step)
    n, s = min(count, 4), RATE[decay]
    exact = sum((s(j / n) - s((j + 1) / n)) * snapshots[count - n + j].double() for j in range(n))
    average = averager.average()["w"]
    for towards in (math.inf, -math.inf):  # no neighbour is nearer
        neighbour = torch.nextafter(average, torch.full_like(average, towards)).double()
        assert ((average.double() - exact).abs() <= (neighbour - exact).abs() + 1e-15).all()


@every_decay
def test_soups_take_the_same_weights(decay, tmp_path, capsys):
    torch.manual_seed(0)
    averager, paths = LAWA(k=4, every=1, weights=decay), []
    for step in range(1, 5):
        weights = {"w": torch.randn(301)}
        averager.update(weights, step)
        (tmp_path / f"checkpoint-{step}").mkdir()
        paths.append(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        save_file(weights, paths[-1])
    assert torch.equal(uniform(paths, weights=decay)["w"], averager.average()["w"])
    out = tmp_path / "out.safetensors"
    assert cli.main([*map(str, paths), "-o", str(out), "--weights", decay]) == 0
    assert torch.equal(load_file(out)["w"], averager.average()["w"])
    record = json.loads((tmp_path / "out.soup.json").read_text())
    shares = [ingredient["coefficient"] for ingredient in record["ingredients"]]
    assert shares == pytest.approx(decay_weights(decay, 4))


def test_what_makes_no_sense_is_refused(tmp_path, capsys):
    for step in (1, 2):
        save_file({"w": torch.full((3,), float(step))}, tmp_path / f"model-step={step}.safetensors")
    newest_first = [tmp_path / f"model-step={step}.safetensors" for step in (2, 1)]
    with pytest.raises(ValueError, match=r"order of their steps, not \[2, 1\]"):
        uniform(newest_first, weights="cosine")
    assert uniform(newest_first, weights="linear")["w"].tolist() == [1.5] * 3
    with pytest.raises(ValueError, match="give one of 'linear', 'cosine', 'inverse_sqrt'"):
        uniform(newest_first[::-1], weights="square")
    with pytest.raises(ValueError, match="give one of 'linear', 'cosine', 'inverse_sqrt'"):
        LAWA(k=5, weights="square")
    with pytest.raises(SystemExit):
        cli.main([*map(str, newest_first), "-o", str(tmp_path / "out"), "--weights", "square"])
    assert "linear, cosine, inverse_sqrt" in capsys.readouterr().err
