"""Each finding of `diagnose` on a model that has it, and a clean bill for models that are well."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from averaging import EMA, LAWA, SWA, Averager, Trajectory, diagnose, load_into
from averaging.averager import Weights

pytestmark = pytest.mark.filterwarnings("ignore:.*with a decay of .* per step:UserWarning")  # what is diagnosed here


class Net(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.b = nn.Linear(8, 1)
        self.register_buffer("constant", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x)).relu()) * self.constant


def train(model: nn.Module, averager: Averager, steps: int = 60, first: int = 1, lr: float = 0.05) -> None:
    torch.manual_seed(first)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(first, first + steps):
        x = torch.randn(16, 8)
        (model(x).squeeze(1) - x.sum(1).sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averager.update(model, step)


def net(norm: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(norm)


@pytest.mark.parametrize(
    "averager", [LAWA(k=5, every=5), EMA(0.9), EMA(0.999, warmup="debias"), SWA(start=10, every=5)], ids=repr
)
def test_a_healthy_average(averager):
    model = net()
    train(model, averager)
    found = diagnose(model, averager)
    assert found.findings == []
    assert str(found).splitlines()[1:] == ["- nothing is the matter"]
    own = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    average = torch.cat([t.double().flatten() for t in averager.average().values()])
    assert found.distance == pytest.approx(((average - own).norm() / own.norm()).item(), rel=1e-9)
    assert found.apart == pytest.approx((average.float() != own.float()).double().mean().item())
    assert (found.name, found.step, found.stalled) == (averager.name, 60, 0)


def test_before_the_first_absorption():
    model, averager = net(), EMA(0.9, start=100)
    train(model, averager, 3)
    assert "nothing was absorbed yet" in str(diagnose(model, averager))


def test_an_average_that_is_the_online_weights():
    model, averager = net(), LAWA(k=5, every=5)
    train(model, averager)
    load_into(model, averager)
    found = diagnose(model, averager)
    assert (found.distance < 1e-7, found.apart) == (True, 0)
    assert "the average is the online weights" in str(found)
    once = EMA(decay=0)
    train(model, once)
    assert "the average is the online weights" in str(diagnose(model, once))


def test_a_decay_too_large_for_the_run():
    model, averager = net(), EMA(0.999)
    train(model, averager)
    found = diagnose(model, averager)
    assert found.first == pytest.approx(0.999**59)
    (finding,) = found.findings
    assert "94% of the average is still what it first absorbed, 60 absorptions ago" in finding


@pytest.mark.parametrize("warmup", [None, "tensorflow", "power", "debias", "edm2"])
@pytest.mark.parametrize("every", [1, 4])
def test_the_share_of_the_first_weights(warmup, every):
    # An average of a stream that is one at first and zero ever after is that share.
    model, averager = nn.Linear(1, 1, bias=False).double(), EMA(0.99, warmup=warmup, every=every)
    with torch.no_grad():
        for step in range(1, 41):
            model.weight.fill_(float(step <= every))
            averager.update(model, step)
    share = averager.average()["weight"].item()
    assert diagnose(model, averager).first == pytest.approx(share, rel=1e-9)


def test_a_stall_in_float32():
    model, averager = net(), EMA(0.9999999)
    train(model, averager, lr=1e-3)
    found = diagnose(model, averager)
    exact = EMA(0.9999999, compensated=True)
    again = net()
    train(again, exact, lr=1e-3)
    assert found.stalled > 0.9
    assert "stalled" in str(found)
    assert "compensated=True" in str(found)
    assert diagnose(again, exact).stalled == 0


def test_nothing_is_absorbed_with_a_decay_of_one():
    model, averager = net(), EMA(decay=1.0)
    train(model, averager)
    assert diagnose(model, averager).stalled == 1
    assert diagnose(model, averager).first == 1


class NarrowEMA(Averager):
    """What goes wrong where an average is kept in the weights' own dtype."""

    def absorb(self, weights: Weights, step: int) -> None:
        if not self.absorbed:
            self.kept = {name: tensor.detach().clone() for name, tensor in weights.items()}
        for name, tensor in weights.items():
            self.kept[name].lerp_(tensor, 0.001)

    def average(self, *, rounded: bool = False) -> Weights:
        return self.kept

    def tensors(self):
        return {"kept": self.kept} if self.absorbed else {}

    def restore(self, tensors, numbers) -> None:
        self.kept = dict(tensors.get("kept", {}))


def test_an_average_kept_in_bfloat16():
    model, averager = nn.Sequential(nn.Linear(8, 1)).bfloat16(), NarrowEMA()
    for step in range(1, 10):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(1, 8), alpha=0.1)
        averager.update(model, step)
    found = diagnose(model, averager)
    assert found.narrow == ("0.weight", "0.bias")
    assert "'0.weight' and 1 more: kept in less than float32" in str(found)


def test_infinity_in_the_average():
    model, averager = net(), EMA(0.9)
    train(model, averager, 5)
    with torch.no_grad():
        model.a.weight[0, 0] = float("inf")
    averager.update(model)
    found = diagnose(model, averager)
    assert found.nonfinite == ("a.weight",)
    assert "NaN or infinite" in str(found)


def test_unfrozen_and_frozen_since():
    model, averager = net(), LAWA(k=5, every=5)
    model.b.requires_grad_(False)
    train(model, averager)
    model.b.requires_grad_(True)
    model.a.bias.requires_grad_(False)
    found = diagnose(model, averager)
    assert found.untracked == ("b.weight", "b.bias")
    assert found.frozen == ("a.bias",)
    assert "trainable but not averaged" in str(found)
    assert "averaged but frozen" in str(found)

    model = net()
    model.b.requires_grad_(False)
    averager = LAWA(k=5, every=5, frozen=True)
    train(model, averager)
    model.b.requires_grad_(True)
    model.a.bias.requires_grad_(False)
    assert diagnose(model, averager).findings == []


def test_a_tied_weight_is_tracked_under_any_name():
    model, averager = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)), LAWA(k=5, every=5)
    model[1].weight = model[0].weight
    train(model, averager)
    assert diagnose(model, averager).findings == []


def test_another_model():
    model, averager = net(), LAWA(k=5, every=5)
    train(model, averager)
    other = net()
    other.a = nn.Linear(8, 4)
    found = diagnose(other, averager)
    assert found.foreign == ("a.weight", "a.bias")
    assert "another model" in str(found)


def test_running_statistics_of_the_online_weights():
    model, averager = net(norm=True), EMA(0.9)
    train(model, averager)
    found = diagnose(model, averager)
    assert found.stale == ("norm.running_mean", "norm.running_var")
    assert "recalibrate(model, batches)" in str(found)

    averaged = EMA(0.9, buffers=True)
    model = net(norm=True)
    train(model, averaged)
    assert diagnose(model, averaged).findings == []

    model, averager = net(norm=True), EMA(0.9)
    model.norm.eval()  # frozen: its statistics do not move
    train(model, averager)
    assert diagnose(model, averager).findings == []


def test_wrapped_models_and_recorders(tmp_path):
    model, averager = net(norm=True), LAWA(k=5, every=5)
    wrapped = torch.compile(model, backend="eager")
    train(wrapped, averager)
    assert diagnose(wrapped, averager) == diagnose(model, averager)
    with pytest.raises(ValueError, match="keeps no average"):
        diagnose(model, Trajectory(tmp_path, every=5))
