"""BatchNorm recalibration against PyTorch's update_bn and float64 done by hand, on scikit-learn's digits."""

from __future__ import annotations

import copy
import random
from collections import UserDict, namedtuple
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from averaging import EMA, load_into, recalibrate, recalibrated
from averaging.batchnorm import STATISTICS

images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
images = (images.float() / 16).view(-1, 1, 8, 8)
train, test = slice(0, 1280), slice(1280, None)


class Net(nn.Module):
    """Two convolutions and a hidden layer, each with a BatchNorm; one of them nested, one without momentum."""

    def __init__(self, seed: int = 0, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.block = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.Sequential(norm(8), nn.ReLU()))
        self.conv = nn.Conv2d(8, 16, 3, bias=False)
        self.norm = norm(16, momentum=None)
        self.hidden = nn.Linear(64, 32)
        self.flat_norm = nn.BatchNorm1d(32, affine=False)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(32, 10)

    def forward(self, image, label=None):
        x = self.norm(self.conv(self.block(image))).relu()
        x = self.flat_norm(self.hidden(nn.functional.max_pool2d(x, 2).flatten(1))).relu()
        logits = self.head(self.dropout(x))
        return logits if label is None else (cross_entropy(logits, label), logits)


def trained(steps: int = 60, **options) -> tuple[Net, EMA]:
    """A model trained on digits, in training mode, and the average of its weights."""
    model = Net(**options)
    average = EMA(0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for step in range(1, steps + 1):
        rows = torch.randint(0, 1280, (64,), generator=torch.Generator().manual_seed(step))
        loss, _ = model(images[rows], labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step)
    return model, average


def batches(number: int = 10, size: int = 64) -> list[list[torch.Tensor]]:
    return [[images[i * size : (i + 1) * size], labels[i * size : (i + 1) * size]] for i in range(number)]


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_buffers()}


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(one, other) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


def assert_close(one, other, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name].double(), other[name].double(), rtol=rtol, atol=atol, msg=name)


def by_hand(model: Net, average, inputs: list[torch.Tensor]) -> tuple[Net, dict[str, torch.Tensor]]:
    """The average in float64 and its statistics: each batch normalised with its own mean and variance."""
    wide = copy.deepcopy(model).double().eval()
    load_into(wide, {name: tensor.double() for name, tensor in average.average().items()})

    def normalise(x, name, weight, bias):
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        means[name].append(x.mean(dims))
        variances[name].append(x.var(dims, correction=1))
        x = (x - x.mean(dims, keepdim=True)) / (x.var(dims, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * weight.view(shape) + bias.view(shape)

    names = ("block.1.0", "norm", "flat_norm")
    means, variances = ({name: [] for name in names} for _ in range(2))
    with torch.no_grad():
        for x in inputs:
            inner = wide.block[1][0]
            x = normalise(wide.block[0](x.double()), "block.1.0", inner.weight, inner.bias).relu()
            x = normalise(wide.conv(x), "norm", wide.norm.weight, wide.norm.bias).relu()
            x = wide.hidden(nn.functional.max_pool2d(x, 2).flatten(1))
            normalise(x, "flat_norm", torch.ones(32).double(), torch.zeros(32).double())
    statistics = {}
    for name in names:
        statistics[f"{name}.running_mean"] = torch.stack(means[name]).mean(0)
        statistics[f"{name}.running_var"] = torch.stack(variances[name]).mean(0)
        statistics[f"{name}.num_batches_tracked"] = torch.tensor(len(inputs))
    load_into(wide, statistics)
    return wide, statistics


def test_the_average_evaluates_as_one_computed_by_hand_in_float64():
    model, average = trained()
    expected, statistics = by_hand(model, average, [x for x, _ in batches()])
    load_into(model, average)
    stale = cross_entropy(copy.deepcopy(model).eval()(images[test]), labels[test])
    recalibrate(model, batches())
    assert_close(buffers(model), statistics)
    with torch.no_grad():
        logits, exact = model.eval()(images[test]), expected(images[test].double())
    torch.testing.assert_close(logits.double(), exact, rtol=1e-4, atol=1e-4)
    assert cross_entropy(logits, labels[test]) < stale - 0.01


def test_is_what_update_bn_computes():
    model, average = trained()
    load_into(model, average)
    model.dropout.p = 0.0  # which update_bn leaves on
    reference = copy.deepcopy(model)
    update_bn(batches(), reference)
    recalibrate(model, batches())
    assert_close(buffers(model), buffers(reference), rtol=1e-6, atol=1e-7)


def test_update_bn_leaves_dropout_on_and_this_does_not():
    dropout_first = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1))
    x = torch.ones(4096, 1) + torch.arange(4096).view(-1, 1) % 2
    recalibrate(dropout_first, [x])
    torch.testing.assert_close(dropout_first[1].running_var, x.var(0))


Pair = namedtuple("Pair", "image label")


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: x,
        lambda x, y: [x, y],
        lambda x, y: (x, y),
        lambda x, y: Pair(x, y),
        lambda x, y: {"image": x, "label": y, "index": 3},
        lambda x, y: UserDict(image=x, note="text"),
        lambda x, y: ({"image": x}, y),
    ],
    ids=["tensor", "list", "tuple", "namedtuple", "dict", "userdict", "tuple of dict"],
)
def test_forms_of_batches(form):
    model = Net()
    expected = copy.deepcopy(model)
    recalibrate(expected, [x for x, _ in batches(3)])
    recalibrate(model, [form(x, y) for x, y in batches(3)])
    assert_same(buffers(model), buffers(expected))


def test_a_hugging_face_model_and_batch():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
    )
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config)
    reference = copy.deepcopy(model)
    encoded = [transformers.BatchEncoding({"pixel_values": x, "labels": y, "path": "a"}) for x, y in batches(3)]
    recalibrate(model, encoded)
    update_bn([x for x, _ in batches(3)], reference)
    assert_close(buffers(model), buffers(reference))
    assert int(model.resnet.embedder.embedder.normalization.num_batches_tracked) == 3


def test_any_call():
    class Odd(Net):
        def forward(self, *, scale, first):
            return super().forward(first["deep"] * scale)

    model, expected = Odd(), Net()
    recalibrate(expected, [2 * x for x, _ in batches(3)])
    recalibrate(
        model,
        [{"outer": {"deep": x}, "other": (y,)} for x, y in batches(3)],
        forward=lambda m, batch: m(scale=2, first=batch["outer"]),
    )
    assert_same(buffers(model), buffers(expected))


def test_limit():
    model, expected = Net(), Net()
    taken = []

    def endless():
        while True:
            for batch in batches(5):
                taken.append(1)
                yield batch

    recalibrate(model, endless(), limit=4)
    recalibrate(expected, batches(4), limit=None)
    assert len(taken) == 4
    assert_same(buffers(model), buffers(expected))
    with pytest.raises(ValueError, match="limit=0"):
        recalibrate(model, batches(1), limit=0)


def test_modes_momenta_and_random_state_are_kept():
    model = Net().train()
    model.block.eval()
    model.dropout.train()
    before = [(part.training, getattr(part, "momentum", 0)) for part in model.modules()]
    loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=64, shuffle=True)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    parameters = dict(model.named_parameters())
    recalibrate(model, loader, limit=3)
    draws = random.random(), np.random.rand(), torch.rand(1)
    assert [(part.training, getattr(part, "momentum", 0)) for part in model.modules()] == before
    assert dict(model.named_parameters()) == parameters
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert draws == (random.random(), np.random.rand(), torch.rand(1))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_within_a_block_and_back_bit_for_bit(error):
    model, average = trained(20)
    before = everything(model)
    expected = copy.deepcopy(model)
    load_into(expected, average)
    recalibrate(expected, batches())
    with pytest.raises(error) if error else nullcontext(), recalibrated(model, average, batches()):
        assert_same(everything(model), everything(expected))
        if error:
            model.norm.running_mean.fill_(7)
            raise error
    assert_same(everything(model), before)
    assert model.training
    with recalibrated(model, EMA(0.9), batches()):  # has absorbed nothing: the model as it is
        assert_same(everything(model), before)


def test_an_error_in_the_forward_pass_changes_nothing():
    model, average = trained(5)
    before = everything(model)
    with pytest.raises(RuntimeError), recalibrated(model, average, [*batches(2), torch.zeros(4, 3, 8, 8)]):
        raise AssertionError("not reached")
    assert_same(everything(model), before)
    assert model.training
    assert model.norm.momentum is None
    assert model.flat_norm.momentum == 0.1


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm, nn.LazyBatchNorm2d])
def test_kinds_of_batchnorm(norm):
    if norm is nn.LazyBatchNorm2d:
        model = Net()
        model.block[1][0] = norm()
        with pytest.raises(ValueError, match="lazy"):
            recalibrate(model, batches(2))
        model(images[:4])
    else:
        model = Net(norm=norm)
    expected = Net()
    recalibrate(expected, batches(4))
    recalibrate(model, batches(4))
    assert_close(buffers(model), buffers(expected))


def test_frozen_layers_and_layers_without_statistics():
    model = Net()
    model.norm = nn.BatchNorm2d(16, track_running_stats=False)
    before = buffers(model)
    recalibrate(model, batches(3), layers=[model.flat_norm])
    after = buffers(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"flat_norm.{name}" for name in STATISTICS}
    untouched = nn.Linear(2, 2)
    recalibrate(untouched, [])


def test_a_layer_that_is_used_twice_and_one_that_is_not_used():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.other = nn.BatchNorm1d(3)
            self.unused = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.other(2 * self.one(x))

    model = Shared()
    x = torch.randn(50, 3) * 5 + 1
    recalibrate(model, [x])
    normalised = 2 * (x - x.mean(0)) / x.std(0, correction=0)
    torch.testing.assert_close(model.one.running_var, (x.var(0) + normalised.var(0)) / 2)
    assert int(model.one.num_batches_tracked) == 2
    assert torch.equal(model.unused.running_mean, torch.zeros(3))
    assert int(model.unused.num_batches_tracked) == 0


@pytest.mark.parametrize(
    ("data", "message"), [([], "no batch"), ([torch.zeros(2, 2)], r"reached no BatchNorm layer: give forward=")]
)
def test_nothing_to_compute_from(data, message):
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2)})
    with pytest.raises(ValueError, match=message):
        recalibrate(model, data, forward=lambda m, x: m["used"](x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_collect_in_float32(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False)).to(dtype)
    data = [(torch.randn(64, 8) * 3 + 100).to(dtype) for _ in range(50)]
    parameters = dict(model.named_parameters())
    recalibrate(model, data)
    for name, exact in (
        ("running_mean", torch.stack([x.double().mean(0) for x in data]).mean(0)),
        ("running_var", torch.stack([x.double().var(0) for x in data]).mean(0)),
    ):
        statistic = model[0].get_buffer(name)
        assert statistic.dtype == dtype
        assert torch.equal(statistic, exact.float().to(dtype)), "rounded once"
    assert dict(model.named_parameters()) == parameters


def test_under_autocast():
    model, expected = Net(), Net()
    recalibrate(expected, batches(5))
    with torch.autocast("cpu", torch.bfloat16):
        recalibrate(model, batches(5))
    assert model.norm.running_var.dtype == torch.float32
    assert_close(buffers(model), buffers(expected), rtol=2e-2, atol=1e-2)
    assert not torch.equal(model.norm.running_var, expected.norm.running_var)


def test_in_inference_mode():
    model, expected = Net(), Net()
    recalibrate(expected, batches(2))
    with torch.inference_mode():
        recalibrate(model, batches(2))
    assert_same(buffers(model), buffers(expected))
    model.train()(images[:8], labels[:8])[0].backward()  # the buffers can be written to


def test_a_compiled_model():
    model, expected = Net(), Net()
    recalibrate(expected, batches(2))
    model.compile(backend="eager")
    compiled = torch.compile(model, backend="eager")
    recalibrate(compiled, batches(2))
    assert_same(buffers(model), buffers(expected))
