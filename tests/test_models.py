"""Models of many kinds: wrapped, adapted, quantised, parametrised; each through training, evaluation and resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune

from averaging import EMA, LAWA, SWA, SWAD, applied, load_into

AVERAGES = {
    "lawa": lambda: LAWA(k=3, every=2),
    "ema": lambda: EMA(0.9),
}
STEPS = 8


class Net(nn.Module):
    """Two layers; subclasses replace parts of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight


class Odd(Net):
    """Complex, 0-dim and transposed parameters, and one without entries."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.randn(6, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.a.weight = nn.Parameter(torch.randn(6, 6).t())
        self.nothing = nn.Parameter(torch.empty(0, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) * self.phase).abs() * self.scale + self.nothing.sum()


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 7, 3, padding=1)
        self.head = nn.Conv2d(7, 3, 3)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat(1, 1, 30).view(len(x), 5, 6, 6).contiguous(memory_format=torch.channels_last)
        return self.head(self.conv(x).relu())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(6, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x.unsqueeze(1))[0]


class Quantised(nn.Module):
    """A frozen layer in int8 beside a low-rank update that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-128, 128, (6, 6), dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.tensor(0.01))
        self.down = nn.Parameter(torch.randn(2, 6))
        self.up = nn.Parameter(torch.zeros(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.scale).t() + x @ self.down.t() @ self.up.t()


def parametrised(parametrise: Callable[[nn.Module], nn.Module]) -> Net:
    net = Net()
    parametrise(net.a)
    return net


def part_compiled(net: Net) -> Net:
    net.a = torch.compile(net.a, backend="eager")  # type: ignore[assignment]
    return net


def compiled_in_place(net: Net) -> Net:
    net.compile(backend="eager")
    return net


def part_checkpointed(net: Net) -> Net:
    net.a = checkpoint_wrapper(net.a)  # type: ignore[assignment]
    return net


def with_lora(net: Net) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["a"]))


def same(net: nn.Module) -> nn.Module:
    return net


# For each kind: the bare model, and what is wrapped around it.
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "compiled": (Net, lambda net: torch.compile(net, backend="eager")),
    "compiled-aot": (Net, lambda net: torch.compile(net, backend="aot_eager")),
    "compiled-in-place": (Net, compiled_in_place),
    "compiled-part": (Net, part_compiled),
    "ddp": (Net, nn.parallel.DistributedDataParallel),
    "compiled-ddp": (Net, lambda net: torch.compile(nn.parallel.DistributedDataParallel(net), backend="eager")),
    "ddp-compiled": (Net, lambda net: nn.parallel.DistributedDataParallel(torch.compile(net, backend="eager"))),
    "lora": (lambda: with_lora(Net()), same),
    "quantised": (Quantised, same),
    "tied": (Tied, same),
    "weight-norm": (lambda: parametrised(parametrizations.weight_norm), same),
    "weight-norm-hook": (lambda: parametrised(nn.utils.weight_norm), same),
    "spectral-norm": (lambda: parametrised(parametrizations.spectral_norm), same),
    "orthogonal": (lambda: parametrised(parametrizations.orthogonal), same),
    "odd": (Odd, same),
    "channels-last": (ChannelsLast, same),
    "recurrent": (Recurrent, same),
    "pruned": (lambda: parametrised(lambda layer: prune.random_unstructured(layer, "weight", 0.5)), same),
    "data-parallel": (Net, nn.DataParallel),
    "part-checkpointed": (Net, part_checkpointed),
    "traced": (Net, torch.fx.symbolic_trace),
    "scripted": (Net, torch.jit.script),
    "float64": (lambda: Net().double(), same),
    "bfloat16": (lambda: Net().bfloat16(), same),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_average = pytest.mark.parametrize("average", AVERAGES)

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning", "ignore:.*:DeprecationWarning"
)


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("gloo") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Run:
    """A model in training: the bare one, the wrapped one, and float64 copies of what was trained after each step."""

    def __init__(self, kind: str) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        build, wrap = KINDS[kind]
        self.bare = build()
        self.parameters = dict(self.bare.named_parameters())
        self.model = wrap(self.bare)
        self.optimizer = torch.optim.SGD([p for p in self.parameters.values() if p.requires_grad], lr=0.05)
        self.seen: list[dict[str, Tensor]] = []

    def input(self, seed: int) -> Tensor:
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
        return x.to(next(p.dtype for p in self.parameters.values() if p.dtype.is_floating_point))

    def train(self, average, first: int, last: int) -> None:
        self.model.train()
        for step in range(first, last + 1):
            self.model(self.input(step)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            average.update(self.model, step)
            self.seen.append({name: wide(p) for name, p in self.parameters.items() if p.requires_grad})

    def exact(self, average) -> dict[str, Tensor]:
        """The average in float64, from the weights seen after each step."""
        if isinstance(average, EMA):
            result = self.seen[0]
            for seen in self.seen[1:]:
                result = {name: 0.9 * result[name] + 0.1 * seen[name] for name in result}
            return result
        picked = [self.seen[step - 1] for step in (4, 6, 8)]
        return {name: torch.stack([seen[name] for seen in picked]).mean(0) for name in picked[0]}

    def bits(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in (*self.parameters.items(), *self.bare.named_buffers())}

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        return self.model.eval()(self.input(1000))


def wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)


def assert_same(one, other) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@every_kind
@every_average
def test_average_applied_and_loaded(kind, average):
    averager, run = AVERAGES[average](), Run(kind)
    run.train(averager, 1, STEPS)
    exact = run.exact(averager)
    assert averager.average().keys() == exact.keys()
    for name, tensor in averager.average().items():
        assert tensor.shape == exact[name].shape
        torch.testing.assert_close(wide(tensor), exact[name], rtol=1e-6, atol=1e-7)

    before = run.bits()
    online = run.evaluate()
    with applied(run.model, averager):
        measured = run.evaluate()
        held = run.bits()
    assert_same(run.bits(), before)
    torch.testing.assert_close(run.evaluate(), online, rtol=0, atol=0)

    # What the averaged weights give in a model of the same kind that never saw the library.
    twin = Run(kind)
    with torch.no_grad():
        for name, tensor in (*twin.parameters.items(), *twin.bare.named_buffers()):
            tensor.copy_(exact.get(name, before[name]))
    tolerance = 1e-5 if run.input(0).dtype == torch.float32 else 2e-2
    torch.testing.assert_close(measured, twin.evaluate(), rtol=tolerance, atol=tolerance)
    assert not torch.equal(measured, online)

    load_into(run.model, averager)
    assert_same(run.bits(), held)
    torch.testing.assert_close(run.evaluate(), measured, rtol=0, atol=0)


@every_kind
@every_average
def test_resumes_bit_for_bit(kind, average, tmp_path):
    straight, whole = AVERAGES[average](), Run(kind)
    whole.train(straight, 1, STEPS)

    first, run = AVERAGES[average](), Run(kind)
    run.train(first, 1, 5)
    first.save(tmp_path / "average")
    torch.save({"model": run.bare.state_dict(), "average": first.state_dict()}, tmp_path / "checkpoint")
    checkpoint = torch.load(tmp_path / "checkpoint", weights_only=True)
    from_folder, from_file = AVERAGES[average]().load(tmp_path / "average"), AVERAGES[average]()
    from_file.load_state_dict(checkpoint["average"])
    assert_same(from_folder.average(), from_file.average())

    again = Run(kind)
    again.bare.load_state_dict(checkpoint["model"])
    again.train(from_folder, 6, STEPS)
    assert_same(from_folder.average(), straight.average())
    assert_same(from_folder.average(rounded=True), straight.average(rounded=True))


# TorchScript itself cannot train before and after inference mode.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "scripted"])
def test_evaluating_in_inference_mode_does_not_touch_training(kind):
    straight, whole = AVERAGES["lawa"](), Run(kind)
    whole.train(straight, 1, STEPS)
    averager, run = AVERAGES["lawa"](), Run(kind)
    for first in range(1, STEPS, 2):
        run.train(averager, first, first + 1)
        with torch.inference_mode(), applied(run.model, averager):
            run.model.eval()(run.input(1000))
    assert_same(run.bits(), whole.bits())
    assert_same(averager.average(), straight.average())


@every_kind
def test_wrapping_does_not_change_names(kind):
    averager, run = EMA(0.9), Run(kind)
    run.train(averager, 1, 2)
    averager.update(run.bare, 3)  # the bare model is the same one
    load_into(run.bare, averager)


MORE = {**AVERAGES, "swa": lambda: SWA(0, every=1), "swad": lambda: SWAD(1, 1, metric="loss")}


@pytest.mark.parametrize("average", MORE.values(), ids=MORE)
def test_updates_inside_and_outside_inference_mode(average):
    averager, plain, run = average(), average(), Run("tied")
    for step in range(1, STEPS + 1):
        run.train(plain, step, step)
        with torch.inference_mode(step % 3 == 1):  # the first absorption, among others
            averager.update(run.model, step)
            averager.observe({"loss": 1.0}, step)
            if averager.ready:
                averager.average()
        plain.observe({"loss": 1.0}, step)
    assert_same(averager.average(), plain.average())
    load_into(run.model, averager)
    run.train(averager, STEPS + 1, STEPS + 1)


def test_a_lazy_module_must_have_seen_an_input():
    model, averager = nn.Sequential(nn.Linear(6, 6), nn.LazyLinear(2)), EMA(0.9)
    with pytest.raises(ValueError, match=r"'1\.weight' .* run it on a batch first"):
        averager.update(model)
    with pytest.raises(ValueError, match="run it on a batch first"):
        load_into(model, {"1.weight": torch.zeros(2, 6)})
    model(torch.zeros(1, 6))
    averager.update(model)
    load_into(model, averager)
