"""What every averager must do: one battery over a table of all of them."""

from __future__ import annotations

import atexit
import pickle
import subprocess
import sys
import tempfile

import pytest
import torch
from torch import nn

from averaging import BEMA, EMA, LAWA, SWA, SWAD, ElasticReset, EMAAnchor, PostHocEMA, applied, load_into, named_weights


class Watched(SWAD):
    """SWAD in a run that is evaluated after every other step."""

    def update(self, model, step=None, *, epoch=None):
        super().update(model, step, epoch=epoch)
        if step % 2 == 0:
            self.observe({"val_loss": 1 + abs(step - 4) / 20}, step)


FOLDERS = tempfile.TemporaryDirectory()
atexit.register(FOLDERS.cleanup)
TABLE = {
    "lawa": lambda **o: LAWA(k=3, every=2, **o),
    "lawa-device": lambda **o: LAWA(k=3, every=2, memory="device", **o),
    "lawa-windows": lambda **o: LAWA(k=(2, 4), every=2, **o),
    "lawa-pinned": lambda **o: LAWA(k=3, every=2, memory="pinned", **o),
    "ema": lambda **o: EMA(0.9, **o),
    "ema-strided": lambda **o: EMA(half_life=5, every=3, **o),
    "ema-debias": lambda **o: EMA(0.95, warmup="debias", every=2, **o),
    "ema-tensorflow": lambda **o: EMA(0.99, warmup="tensorflow", **o),
    "ema-power": lambda **o: EMA(0.99, warmup="power", **o),
    "ema-edm2": lambda **o: EMA(0.99, warmup="edm2", **o),
    "ema-compensated": lambda **o: EMA(0.9999, compensated=True, **o),
    "post-hoc-ema": lambda **o: PostHocEMA(tempfile.mkdtemp(dir=FOLDERS.name), every=2, snapshots=4, **o),
    "ema-switch": lambda **o: EMA(0.9, switch=4, **o),
    "elastic-reset": lambda **o: ElasticReset(4, 0.9, **o),
    "ema-anchor": lambda **o: EMAAnchor(0.3, every=2, **o),
    "bema": lambda **o: BEMA(every=2, **o),
    "bema-device": lambda **o: BEMA(0.9, 0.5, rho=2, every=3, memory="device", **o),
    "swad": lambda **o: Watched(2, 3, **o),
    "swa": lambda **o: SWA(start=3, every=2, **o),
}
every_averager = pytest.mark.parametrize("build", TABLE.values(), ids=TABLE.keys())


class Model(nn.Module):
    """Tied, frozen, 0-dim, complex and empty parameters, and a mask of −inf among the buffers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(7, 5, dtype=dtype))
        self.head = self.embed
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.nothing = nn.Parameter(torch.empty(0, dtype=dtype))
        self.frozen = nn.Parameter(torch.randn(4, dtype=dtype), requires_grad=False)
        self.register_buffer("mask", torch.full((2, 2), float("-inf")))
        self.register_buffer("count", torch.tensor(0))


def walk(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype), alpha=0.1)


def clone(weights) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def assert_same(one, other) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def run(averager, model, steps) -> None:
    for step in steps:
        walk(model, step)
        if (restart := averager.update(model, step)) is not None:
            load_into(model, restart)


@every_averager
def test_a_constant_stream_is_a_fixed_point(build):
    averager, model = build(), Model()
    for step in range(1, 30):
        averager.update(model, step)
    for name, tensor in averager.average().items():
        torch.testing.assert_close(tensor, named_weights(model)[name], rtol=3e-7, atol=0, check_dtype=False)


@every_averager
def test_shares_no_memory_with_the_model(build):
    averager, model = build(), Model()
    run(averager, model, range(1, 10))
    before = clone(averager.average())
    walk(model, 99)
    assert_same(clone(averager.average()), before)


@every_averager
@pytest.mark.parametrize("cut", [1, 4, 7])
@pytest.mark.parametrize("way", ["dict", "folder", "file"])
def test_a_resumed_run_equals_the_uninterrupted_one(build, cut, way, tmp_path):
    torch.manual_seed(0)
    straight, model = build(), Model()
    weights = clone(model.state_dict())
    run(straight, model, range(1, 15))
    torch.manual_seed(0)
    first, again = build(), Model()
    again.load_state_dict(weights)
    run(first, again, range(1, cut + 1))
    second = build()
    if way == "folder":
        first.save(tmp_path / "state")
        second.load(tmp_path / "state")
    elif way == "file":
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    else:
        second.load_state_dict(first.state_dict())
        run(first, Model(), range(cut + 1, cut + 9))  # the copy must not follow the original
    run(second, again, range(cut + 1, 15))
    assert_same(clone(second.average()), clone(straight.average()))


@every_averager
def test_bf16_weights_are_averaged_in_float32(build):
    torch.manual_seed(0)
    half, single = Model(torch.bfloat16), Model()
    narrow, wide = build(), build()
    for step in range(1, 15):
        walk(half, step)
        load_into(single, named_weights(half))
        narrow.update(half, step)
        wide.update(single, step)
    assert_same(clone(narrow.average()), clone(wide.average()))
    for name, tensor in narrow.average(rounded=True).items():
        assert tensor.dtype == named_weights(half)[name].dtype


@every_averager
def test_offering_a_step_twice_is_harmless_and_an_earlier_one_an_error(build):
    torch.manual_seed(0)
    once, twice, model = build(), build(), Model()
    for step in range(1, 12):
        walk(model, step)
        once.update(model, step)
        twice.update(model, step)
        twice.update(model, step)
    assert_same(clone(once.average()), clone(twice.average()))
    with pytest.raises(ValueError, match="reset"):
        once.update(model, 3)


@every_averager
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_online_weights_come_back_bit_for_bit(build, error):
    averager, model = build(), Model(torch.bfloat16)
    run(averager, model, range(1, 12))
    before = clone(model.state_dict())
    try:
        with applied(model, averager):
            assert_same(clone(named_weights(model)), clone(averager.average(rounded=True)))
            assert model.head is model.embed
            if error:
                raise error("stop")
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert_same(clone(model.state_dict()), before)


@every_averager
def test_before_the_first_absorption_the_average_is_the_model(build):
    averager, model = build(), Model()
    before = clone(model.state_dict())
    with applied(model, averager):
        assert_same(clone(model.state_dict()), before)
    with pytest.raises(RuntimeError, match="absorbed no weights"):
        averager.average()


@every_averager
def test_pickle_and_reset(build):
    averager, model = build(), Model()
    run(averager, model, range(1, 12))
    copy = pickle.loads(pickle.dumps(averager))
    assert_same(clone(copy.average()), clone(averager.average()))
    averager.reset()
    assert not averager.absorbed
    run(averager, model, range(1, 12))
    assert averager.absorbed


@every_averager
def test_another_models_weights_are_refused(build):
    averager = build()
    run(averager, Model(), range(1, 12))
    with pytest.raises(ValueError, match="embed"):
        averager.update(nn.Linear(3, 3), 20)
    with pytest.raises(ValueError, match="bfloat16"):
        averager.update(Model(torch.bfloat16), 20)


@every_averager
def test_states_of_others_are_refused(build, tmp_path):
    averager, model = build(), Model()
    run(averager, model, range(1, 12))
    kind = SWA(0, every=1) if not isinstance(averager, SWA) else EMA(0.9)
    with pytest.raises(ValueError, match="not of"):
        kind.load_state_dict(averager.state_dict())
    with pytest.raises(ValueError, match="later version"):
        build().load_state_dict({**averager.state_dict(), "version": 99})
    with pytest.raises(ValueError, match="not the state"):
        build().load_state_dict({})
    with pytest.raises(FileNotFoundError):
        build().load(tmp_path)
    averager.save(tmp_path / "state")
    part = next((tmp_path / "state").glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        build().load(tmp_path / "state")
    part.unlink()
    with pytest.raises(FileNotFoundError, match=part.name):
        build().load(tmp_path / "state")


def test_names_are_the_bare_models():
    model = Model()
    names = set(named_weights(model))
    assert names == {"embed", "scale", "phase", "nothing"}
    assert set(named_weights(nn.DataParallel(model))) == names
    assert set(named_weights(torch.compile(model, backend="eager"))) == names
    assert "frozen" in named_weights(model, frozen=True)
    assert "mask" in named_weights(model, buffers=True)
    assert "count" not in named_weights(model, buffers=True)


def test_nothing_to_average_is_an_error():
    with pytest.raises(ValueError, match="nothing to average"):
        EMA(0.9).update(nn.ReLU())
    with pytest.raises(ValueError, match="nothing to average"):
        EMA(0.9).update(nn.Linear(2, 2).requires_grad_(False))


def test_unfreezing_during_training_is_an_error_that_says_what_to_do():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    averager = EMA(0.9)
    averager.update(model)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match="frozen=True"):
        averager.update(model)


def test_applied_checks_before_it_writes():
    model = nn.Linear(2, 2)
    before = clone(model.state_dict())
    for wrong in (
        {"bias": torch.zeros(2), "weight": torch.zeros(1, 2)},
        {"bias": torch.zeros(2), "other": torch.zeros(1)},
    ):
        with pytest.raises(ValueError, match="another model"):
            load_into(model, wrong)
        assert_same(clone(model.state_dict()), before)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LAWA(k=0), "at least 1"),
        (lambda: LAWA(k=2, every=1, window=3), "not both"),
        (lambda: EMA(decay=1.5), "between 0"),
        (lambda: EMA(decay=0.9, half_life=3), "one of"),
        (lambda: EMA(0.9, warmup="slow"), "warmup"),
        (lambda: EMA(0.9, every=0), "positive"),
        (lambda: EMA(0.9, switch=0), "switch=0"),
        (lambda: EMA(0.9, switch="epoch").update(nn.Linear(2, 2)), "epoch="),
        (lambda: EMA(0.9, every="sometimes"), "optimizer steps"),
        (lambda: SWA(start=-1), "optimizer steps"),
        (lambda: SWAD(0), "optimum_patience=0"),
        (lambda: SWAD(tolerance=0.9), "at least 1"),
        (lambda: ElasticReset(0), "every=0"),
        (lambda: ElasticReset(5, 1.5), "decay=1.5"),
        (lambda: ElasticReset(5, moments="lost"), "moments='lost'"),
        (lambda: ElasticReset("epoch").update(nn.Linear(2, 2)), "epoch="),
        (lambda: BEMA(eta=-1), "eta=-1"),
        (lambda: BEMA(rho=0.5), "at least 1"),
        (lambda: SWA(start=1.5), "fraction"),
        (lambda: EMA(0.9, name="../up"), "letters"),
        (lambda: EMA(0.9, name="online"), "online"),
        (lambda: LAWA(k=3).update(nn.Linear(2, 2)), "length is not known"),
        (lambda: EMA().update(nn.Linear(2, 2)), "length is not known"),
        (lambda: SWA(0.5, every=1).update(nn.Linear(2, 2)), "length is not known"),
        (lambda: SWA(0, every="epoch").update(nn.Linear(2, 2)), "epoch="),
    ],
)
def test_bad_settings(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_a_start_after_the_end_warns():
    with pytest.warns(UserWarning, match="trained weights"):
        SWA(start=200, every=1).prepare(total_steps=100)


def test_importing_the_package_imports_neither_torch_nor_a_trainer():
    code = "import sys, averaging; print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
