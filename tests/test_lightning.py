"""Lightning's adapter, through real runs of its Trainer on a tiny model."""

from __future__ import annotations

import copy
import csv
import pickle
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning.pytorch")

import torchmetrics
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

import averaging
from averaging.lightning import EMA, LAWA, SWA, AveragingCallback, load_average

# Lightning's remarks on its surroundings, and what it still calls that is deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning"),
]

BATCHES = 4  # in an epoch
EPOCHS = 3
VALIDATION_BATCHES = 2

Weights = dict[str, Tensor]


# ---------------------------------------------------------------------- models


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """A batch that depends on its place in the run only, so that a run cut in mid-epoch sees the same data."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    return x, x.sum(dim=1, keepdim=True).sin()


class Regression(LightningModule):
    """Two layers. With dropout, training and validation draw random numbers."""

    def __init__(self, width: int = 3, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 1))
        self.dropout = dropout

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, _: Any, batch_idx: int) -> Tensor:
        return self.loss(*batch(1000 * self.current_epoch + batch_idx))

    def validation_step(self, _: Any, batch_idx: int) -> None:
        if self.dropout:
            torch.rand(3)
        self.log("val_loss", self.loss(*batch(-1 - batch_idx)), batch_size=8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(range(BATCHES))  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(range(VALIDATION_BATCHES))  # type: ignore[arg-type]


class TwoOptimizers(Regression):
    """Manual optimization, in which the step counter moves by 2 per batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, _: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(_, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[3])]


class Stateless(Regression):
    """Its optimizer has no state: Lightning builds new optimizers for every ``fit``."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Tied(Regression):
    """Two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1))
        self.net[2].weight = self.net[0].weight


class Breaks(Regression):
    """Raises in the validation of the second epoch, while the model holds the average."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def validation_step(self, _: Any, batch_idx: int) -> None:
        if self.current_epoch == 1:
            raise self.error("stop")


# ---------------------------------------------------------------------- runs


class Recorder(Callback):
    """The weights after every batch, and what was measured, seen from outside."""

    def __init__(self) -> None:
        self.online: dict[int, Weights] = {}
        self.measured: list[dict[str, float]] = []
        self.validated_at: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.online[trainer.global_step] = weights_of(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated_at.append(trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.measured.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    @property
    def last(self) -> Weights:
        return self.online[max(self.online)]

    def mean(self, *steps: int) -> Weights:
        """The float64 mean of the weights after ``steps``, rounded."""
        return {
            name: torch.stack([self.online[step][name].double() for step in steps]).mean(dim=0).float()
            for name in self.last
        }


def make_trainer(folder: Path, *callbacks: Callback, epochs: int = EPOCHS, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {**quiet, "enable_checkpointing": saves, "num_sanity_val_steps": 0, **options}
    return Trainer(accelerator="cpu", max_epochs=epochs, default_root_dir=folder, callbacks=list(callbacks), **options)


def fit(
    folder: Path,
    *callbacks: Callback,
    module: LightningModule | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> tuple[Trainer, LightningModule, Recorder]:
    recorder = Recorder()
    module = Regression() if module is None else module
    trainer = make_trainer(folder, *callbacks, recorder, **options)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer, module, recorder


def every_step(folder: Path) -> ModelCheckpoint:
    """Checkpoints ``step=<n>.ckpt`` after every optimizer step."""
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def weights_of(module: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}


def same(one: Any, other: Any) -> bool:
    """Equal bit for bit, through nested dicts."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def close(one: Weights, other: Weights) -> bool:
    return all(torch.allclose(one[name], other[name].to(one[name].dtype), rtol=1e-6, atol=1e-7) for name in other)


def state(*callbacks: AveragingCallback) -> dict[str, Any]:
    return {a.name: copy.deepcopy(a.state_dict()) for callback in callbacks for a in callback.averagers}


def validation_loss(weights: Weights, module: Regression) -> float:
    twin = Regression(**module.hparams)
    twin.load_state_dict(weights)
    twin.eval()
    with torch.no_grad():
        return sum(float(twin.loss(*batch(-1 - i))) for i in range(VALIDATION_BATCHES)) / VALIDATION_BATCHES


def content(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


# ---------------------------------------------------------------------- a callback like any other


@pytest.mark.parametrize("callback", [LAWA(k=5), EMA(0.9), SWA(), AveragingCallback(averaging.EMA(0.9))])
def test_is_a_callback_that_pickles(callback: AveragingCallback) -> None:
    assert isinstance(callback, Callback)
    again = pickle.loads(pickle.dumps(callback))
    assert type(again) is type(callback)
    assert again.averager.name == callback.averager.name


def test_pickles_after_a_run_and_keeps_its_average(tmp_path: Path) -> None:
    callback = LAWA(k=2, every=2)
    fit(tmp_path, callback)
    assert same(state(pickle.loads(pickle.dumps(callback))), state(callback))


def test_needs_no_list() -> None:
    callback = LAWA(k=5)
    assert callback in Trainer(callbacks=callback, logger=False, accelerator="cpu").callbacks


def test_lightning_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own use of it
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  logger: false\n  accelerator: cpu\n  callbacks:\n"
        "  - class_path: averaging.lightning.LAWA\n    init_args: {k: 3, every: 2, checkpoint: average}\n"
        "  - class_path: averaging.lightning.EMA\n    init_args: {half_life: 10%}\n"
    )
    cli = LightningCLI(
        Regression, args=["--config", str(config)], run=False, save_config_callback=None, seed_everything_default=0
    )
    lawa, ema = (callback for callback in cli.trainer.callbacks if isinstance(callback, AveragingCallback))
    assert isinstance(lawa, LAWA)
    assert (lawa.averager.k, lawa.averager.every.amount, lawa.checkpoint) == (3, 2, "average")
    assert isinstance(ema, EMA)


@pytest.mark.parametrize("as_list", [False, True])
def test_a_plain_averager_fails_at_once(as_list: bool) -> None:
    plain: Any = averaging.LAWA(k=5)
    with pytest.raises((AttributeError, TypeError), match=r"from averaging\.lightning import LAWA"):
        Trainer(callbacks=[plain] if as_list else plain, logger=False, accelerator="cpu")


@pytest.mark.parametrize("as_list", [False, True])
def test_the_other_trainers_callback_fails(as_list: bool) -> None:
    pytest.importorskip("transformers")
    from averaging.transformers import LAWA as Other

    callback: Any = Other(k=5)
    with pytest.raises((AttributeError, TypeError), match=r"import it from averaging\.lightning"):
        Trainer(callbacks=[callback] if as_list else callback, logger=False, accelerator="cpu").fit(Regression())


@pytest.mark.parametrize("together", [False, True])
def test_two_averages_of_one_name_are_an_error(together: bool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 averages are named 'ema'"):
        _ = (
            AveragingCallback(averaging.EMA(0.9), averaging.EMA(0.99))
            if together
            else fit(tmp_path, EMA(0.9), EMA(0.99))
        )


# ---------------------------------------------------------------------- the average


def test_lawa_is_the_exact_mean_of_the_last_snapshots(tmp_path: Path) -> None:
    callback = LAWA(k=3, every=2)
    _, module, recorder = fit(tmp_path, callback)
    expected = recorder.mean(8, 10, 12)
    assert same(dict(callback.averager.average()), expected)
    assert same(weights_of(module), expected), "at the end the model holds the average"
    assert not same(expected, recorder.last)


def ema(recorder: Recorder, decay: float) -> Weights:
    """In float64, over all recorded steps; a counter that moves by n decays by decayⁿ."""
    average, before = {}, 0
    for step, weights in sorted(recorder.online.items()):
        keep = decay ** (step - before) if average else 0.0
        average = {
            name: keep * average.get(name, 0.0) + (1 - keep) * tensor.double() for name, tensor in weights.items()
        }
        before = step
    return average


def test_ema(tmp_path: Path) -> None:
    callback = EMA(0.8)
    _, module, recorder = fit(tmp_path, callback)
    assert sorted(recorder.online) == list(range(1, 13))
    assert close(weights_of(module), ema(recorder, 0.8))


def test_steps_are_optimizer_steps_under_gradient_accumulation(tmp_path: Path) -> None:
    lawa, exponential = averaging.LAWA(k=2, every=2), averaging.EMA(0.8)
    _, _, recorder = fit(tmp_path, AveragingCallback(lawa, exponential), accumulate_grad_batches=2)
    del recorder.online[0]  # the first batch alone is no optimizer step
    assert max(recorder.online) == EPOCHS * BATCHES // 2
    assert same(dict(lawa.average()), recorder.mean(4, 6))
    assert exponential.absorbed == 6
    assert close(dict(exponential.average()), ema(recorder, 0.8))


def test_two_optimizers(tmp_path: Path) -> None:
    lawa, exponential = averaging.LAWA(k=3, every=3), averaging.EMA(0.8)
    _, _, recorder = fit(tmp_path, AveragingCallback(lawa, exponential), module=TwoOptimizers())
    assert sorted(recorder.online) == list(range(2, 25, 2))
    # Multiples of 3 are reached at 4, 6, 10, 12, 16, 18, 22, 24.
    assert same(dict(lawa.average()), recorder.mean(18, 22, 24))
    assert close(dict(exponential.average()), ema(recorder, 0.8))


def test_every_epoch(tmp_path: Path) -> None:
    lawa, swa = averaging.LAWA(k=2, every="epoch"), averaging.SWA(start=0.5)
    _, _, recorder = fit(tmp_path, AveragingCallback(lawa, swa))
    assert lawa.absorbed == EPOCHS
    assert same(dict(lawa.average()), recorder.mean(8, 12))
    assert close(dict(swa.average()), recorder.mean(8, 12))


class Unsized(Regression):
    """Its training data does not tell its length."""

    def train_dataloader(self) -> DataLoader[Any]:
        class Stream(torch.utils.data.IterableDataset[int]):
            def __iter__(self) -> Any:
                return iter(range(BATCHES))

        return DataLoader(Stream())


def test_every_epoch_of_data_without_length(tmp_path: Path) -> None:
    lawa, swa = averaging.LAWA(k=2, every="epoch"), averaging.SWA(start="2 epochs")
    _, module, recorder = fit(tmp_path, AveragingCallback(lawa, swa, evaluate="all"), module=Unsized())
    assert lawa.absorbed == EPOCHS
    assert same(dict(lawa.average()), recorder.mean(8, 12))
    assert close(dict(swa.average()), recorder.mean(8, 12))
    measured = [metrics["val_loss"] for metrics in recorder.measured]
    expected = [recorder.online[4], recorder.mean(4, 8), recorder.mean(8, 12)]
    assert measured == pytest.approx([validation_loss(weights, module) for weights in expected], rel=1e-6)


def test_the_default_window_is_one_percent_of_the_run(tmp_path: Path) -> None:
    callback = LAWA(k=2)
    fit(tmp_path, callback, max_steps=400, epochs=-1, limit_val_batches=0)
    assert callback.averager.absorbed == 200


def test_tied_weights(tmp_path: Path) -> None:
    callback = LAWA(k=2, every=2)
    _, module, recorder = fit(tmp_path, callback, every_step(tmp_path), module=Tied())
    assert module.net[2].weight is module.net[0].weight
    assert same(weights_of(module), recorder.mean(10, 12))
    average = load_average(tmp_path / "step=12.ckpt")
    assert average.keys() == module.state_dict().keys()
    assert torch.equal(average["net.0.weight"], average["net.2.weight"])
    Tied().load_state_dict(average)


# ---------------------------------------------------------------------- evaluation


def test_validation_measures_the_average(tmp_path: Path) -> None:
    _, module, recorder = fit(tmp_path, LAWA(k=2, every=2))
    measured = [metrics["val_loss"] for metrics in recorder.measured]
    expected = [recorder.mean(step - 2, step) for step in (4, 8, 12)]
    assert measured == pytest.approx([validation_loss(weights, module) for weights in expected], rel=1e-6)
    assert measured != pytest.approx([validation_loss(recorder.online[s], module) for s in (4, 8, 12)], rel=1e-6)


def test_validation_of_the_online_weights(tmp_path: Path) -> None:
    _, module, recorder = fit(tmp_path, LAWA(k=2, every=2, evaluate="online"))
    measured = [metrics["val_loss"] for metrics in recorder.measured]
    assert measured == pytest.approx([validation_loss(recorder.online[s], module) for s in (4, 8, 12)], rel=1e-6)


@pytest.mark.parametrize("evaluate", ["average", "online", "both", "all"])
def test_training_is_what_it_is_without_the_callback(evaluate: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_sanity_val_steps": 1, "val_check_interval": 2}
    _, _, without = fit(tmp_path, module=Regression(dropout=0.3), **options)
    callbacks = LAWA(k=2, every=1, evaluate=evaluate), EMA(0.8)
    _, _, recorder = fit(tmp_path, *callbacks, module=Regression(dropout=0.3), **options)
    assert same(recorder.online, without.online)
    assert recorder.validated_at == without.validated_at, "other callbacks see each validation once"


def test_both_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer, module, recorder = fit(tmp_path, LAWA(k=2, every=2, evaluate="both"), logger=logger)
    average = [validation_loss(recorder.mean(step - 2, step), module) for step in (4, 8, 12)]
    online = [validation_loss(recorder.online[step], module) for step in (4, 8, 12)]
    assert [metrics["val_loss"] for metrics in recorder.measured] == pytest.approx(average, rel=1e-6)
    assert [metrics["online_val_loss"] for metrics in recorder.measured] == pytest.approx(online, rel=1e-6)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [*csv.DictReader(file)]
    for name, expected in (("val_loss", average), ("online_val_loss", online)):
        logged = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        assert [value for _, value in logged] == pytest.approx(expected, rel=1e-6)
        assert [step for step, _ in logged] == [3, 7, 11]
    assert {"val_loss", "online_val_loss"} <= trainer.callback_metrics.keys()


def test_all_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callbacks = AveragingCallback(averaging.LAWA(k=2, every=2), averaging.EMA(0.8), evaluate="all"), SWA(9, every=1)
    _, module, recorder = fit(tmp_path, *callbacks, logger=logger)
    expected: dict[str, list[Weights]] = {"": [], "online_": [], "ema_": [], "swa_": []}
    for step in (4, 8, 12):
        seen = Recorder()
        seen.online = {t: weights for t, weights in recorder.online.items() if t <= step}
        expected[""].append(seen.mean(step - 2, step))
        expected["online_"].append(seen.last)
        expected["ema_"].append({name: tensor.float() for name, tensor in ema(seen, 0.8).items()})
        expected["swa_"].append(seen.mean(*range(9, step + 1)) if step >= 9 else seen.last)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [*csv.DictReader(file)]
    for prefix, weights in expected.items():
        name, losses = f"{prefix}val_loss", [validation_loss(average, module) for average in weights]
        assert [metrics[name] for metrics in recorder.measured] == pytest.approx(losses, rel=1e-6)
        assert [float(row[name]) for row in rows if row[name]] == pytest.approx(losses, rel=1e-6)


class Noisy(Regression):
    """Logs what depends on all random generators, and torchmetrics objects that live in the module."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3)
        random.seed(0)
        np.random.seed(0)
        self.error, self.manual = torchmetrics.MeanSquaredError(), torchmetrics.MeanSquaredError()

    def validation_step(self, _: Any, batch_idx: int) -> None:
        self.log("draw", torch.rand(()) + random.random() + float(np.random.rand()), batch_size=8)
        x, y = batch(-1 - batch_idx)
        self.error(self.net(x), y)
        self.manual.update(self.net(x), y)
        self.log("error", self.error, batch_size=8)
        self.log("val_loss", self.loss(x, y), batch_size=8)

    def on_validation_epoch_end(self) -> None:
        self.log("manual", self.manual.compute())
        self.manual.reset()


def test_all_are_measured_on_the_same_numbers_and_count_for_themselves(tmp_path: Path) -> None:
    callbacks = AveragingCallback(averaging.LAWA(k=2, every=1), averaging.EMA(0.8), evaluate="all")
    _, _, recorder = fit(tmp_path, callbacks, module=Noisy())
    _, _, plain = fit(tmp_path, module=Noisy())
    for measured, alone in zip(recorder.measured, plain.measured, strict=True):
        assert {measured[f"{prefix}draw"] for prefix in ("", "online_", "ema_")} == {alone["draw"]}
        for prefix in ("", "online_", "ema_"):
            for name in ("error", "manual"):
                assert measured[f"{prefix}{name}"] == pytest.approx(measured[f"{prefix}val_loss"], rel=1e-5)
        assert measured["online_error"] == alone["error"]
        assert measured["error"] != alone["error"]


@pytest.mark.parametrize(("error", "raised"), [(RuntimeError, RuntimeError), (KeyboardInterrupt, SystemExit)])
def test_an_exception_in_validation_leaves_the_online_weights(
    error: type[BaseException], raised: type[BaseException], tmp_path: Path
) -> None:
    _, _, undisturbed = fit(tmp_path)
    module = Breaks(error)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(raised):
            fit(tmp_path, LAWA(k=2, every=1), module=module)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert same(weights_of(module), undisturbed.online[8])


def test_before_the_first_absorption_validation_measures_the_model(tmp_path: Path) -> None:
    _, module, recorder = fit(tmp_path, LAWA(k=2, every=1, start=9))
    expected = [recorder.online[4], recorder.online[8], recorder.mean(11, 12)]
    measured = [metrics["val_loss"] for metrics in recorder.measured]
    assert measured == pytest.approx([validation_loss(weights, module) for weights in expected], rel=1e-6)


def test_an_average_that_never_started_keeps_the_trained_weights(tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="would be there after 99 optimizer steps but the run ends after 12"),
        pytest.warns(UserWarning, match="before there was an average 'lawa': the model keeps its trained weights"),
    ):
        _, module, recorder = fit(tmp_path, LAWA(k=2, every=1, start=99))
    assert same(weights_of(module), recorder.last)


# ---------------------------------------------------------------------- checkpoints


def test_a_checkpoint_holds_the_online_weights_and_each_average(tmp_path: Path) -> None:
    callbacks = LAWA(k=2, every=2), EMA(0.8)
    _, _, recorder = fit(tmp_path, *callbacks, every_step(tmp_path))
    file = tmp_path / "step=9.ckpt"
    assert same(dict(content(file)["state_dict"]), recorder.online[9])
    assert same(load_average(file), recorder.mean(6, 8))
    del recorder.online[10], recorder.online[11], recorder.online[12]
    assert close(load_average(file, "ema"), ema(recorder, 0.8))
    with pytest.raises(ValueError, match="no average 'swa', only lawa, ema"):
        load_average(file, "swa")


def test_a_checkpoint_can_hold_the_average(tmp_path: Path) -> None:
    _, _, recorder = fit(tmp_path, LAWA(k=2, every=2, checkpoint="average"), EMA(0.8), every_step(tmp_path))
    file = tmp_path / "step=9.ckpt"
    assert same(weights_of(Regression.load_from_checkpoint(file)), recorder.mean(6, 8))
    assert same(load_average(file), recorder.mean(6, 8))
    assert same(dict(content(file)["averaging"]["online"]), recorder.online[9])


def test_a_checkpoint_without_an_average(tmp_path: Path) -> None:
    fit(tmp_path, every_step(tmp_path))
    with pytest.raises(ValueError, match="holds no average"):
        load_average(tmp_path / "step=9.ckpt")


@pytest.mark.parametrize("checkpoint", ["online", "average"])
@pytest.mark.parametrize("evaluate", ["average", "both"])
def test_the_best_checkpoint_is_what_was_measured(checkpoint: Any, evaluate: Any, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1, filename="{step}")
    callback = LAWA(k=2, every=1, checkpoint=checkpoint, evaluate=evaluate)
    trainer, module, recorder = fit(tmp_path, callback, best, epochs=5)
    lowest = min(metrics["val_loss"] for metrics in recorder.measured)
    assert float(best.best_model_score) == lowest
    [metrics] = trainer.validate(module, ckpt_path="best", verbose=False)
    assert metrics["val_loss"] == lowest
    assert same(weights_of(module), load_average(best.best_model_path))


@pytest.mark.parametrize(
    ("checkpoint", "monitor"),
    [("average", "val_loss"), ("average", "online_val_loss"), ("online", "ema_val_loss"), ("online", None)],
)
def test_a_checkpoint_of_weights_only_holds_what_was_measured(
    checkpoint: Any, monitor: str | None, tmp_path: Path
) -> None:
    averagers = averaging.LAWA(k=2, every=1), averaging.EMA(0.8)
    callback = AveragingCallback(*averagers, checkpoint=checkpoint, evaluate="all")
    every = {} if monitor else {"every_n_train_steps": 1}
    best = ModelCheckpoint(tmp_path, monitor=monitor, mode="max", save_weights_only=True, filename="{step}", **every)
    _, module, recorder = fit(tmp_path, callback, best)
    saved = content(Path(best.best_model_path))
    assert "averaging" not in saved
    if monitor is None:
        assert same(dict(saved["state_dict"]), recorder.last)
        return
    highest = max(metrics[monitor] for metrics in recorder.measured)
    assert validation_loss(saved["state_dict"], module) == pytest.approx(highest, rel=1e-6)
    again = Regression.load_from_checkpoint(best.best_model_path)
    [metrics] = make_trainer(tmp_path).validate(again, verbose=False)
    assert metrics["val_loss"] == highest


def test_a_checkpoint_of_weights_only_that_would_hold_something_else(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_weights_only=True)
    with pytest.warns(UserWarning, match='picks by the average but would save the weights being trained.*="average"'):
        trainer, _, _ = fit(tmp_path, LAWA(k=2, every=1), best)
    assert trainer.save_checkpoint.__func__ is Trainer.save_checkpoint


MONITORS = {"val_loss": "lawa", "online_val_loss": "online", "slow_ema_val_loss": "slow_ema"}


@pytest.mark.parametrize("checkpoint", ["online", "average"])
@pytest.mark.parametrize("monitor", MONITORS)
def test_the_best_checkpoint_is_chosen_by_any_of_them(checkpoint: Any, monitor: str, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor=monitor, mode="max", filename="{step}", save_last=True)
    averagers = averaging.LAWA(k=2, every=1), averaging.EMA(0.8, name="slow_ema")
    callback = AveragingCallback(*averagers, checkpoint=checkpoint, evaluate="all")
    trainer, module, recorder = fit(tmp_path, callback, best)
    highest = max(metrics[monitor] for metrics in recorder.measured)
    assert float(best.best_model_score) == highest
    [metrics] = trainer.validate(module, ckpt_path="best", verbose=False)
    assert metrics["val_loss"] == highest
    renamed = tmp_path / "renamed.ckpt"
    Path(best.best_model_path).rename(renamed)
    assert same(weights_of(module), load_average(renamed))
    assert same(weights_of(module), load_average(renamed, MONITORS[monitor]))
    assert same(load_average(tmp_path / "last.ckpt"), recorder.mean(11, 12)), "chosen by no metric"
    assert same(load_average(tmp_path / "last.ckpt", "online"), recorder.last)


class Windows(averaging.LAWA):
    """Two averages from one ring: the latest snapshot alone, and the mean of all."""

    def views(self) -> Any:
        return {"latest": Latest(self), "mean": self}


class Latest:
    def __init__(self, ring: Windows) -> None:
        self.ring = ring

    @property
    def ready(self) -> bool:
        return self.ring.ready

    def average(self, *, rounded: bool = False) -> Any:
        return list(self.ring.tensors().values())[-1]


def test_an_averager_of_several_averages(tmp_path: Path) -> None:
    straight = AveragingCallback(Windows(k=3, every=2), evaluate="all")
    _, module, recorder = fit(tmp_path, straight, every_step(tmp_path))
    assert same(weights_of(module), recorder.last)
    measured = recorder.measured[-1]
    assert measured["val_loss"] == measured["online_val_loss"]
    assert measured["mean_val_loss"] == pytest.approx(validation_loss(recorder.mean(8, 10, 12), module), rel=1e-6)
    file = tmp_path / "step=9.ckpt"
    assert same(load_average(file), recorder.online[8])
    assert same(load_average(file, "mean"), recorder.mean(4, 6, 8))
    resumed = AveragingCallback(Windows(k=3, every=2), evaluate="all")
    _, other, _ = fit(tmp_path, resumed, module=Regression(seed=1), ckpt_path=file)
    assert same(weights_of(other), weights_of(module))
    assert same(state(resumed), state(straight))
    with pytest.raises(ValueError, match="2 averages are named 'mean'"):
        AveragingCallback(Windows(k=3, every=2), averaging.EMA(0.9, name="mean"))


# ---------------------------------------------------------------------- resuming


def averages(memory: str = "cpu", **options: Any) -> tuple[LAWA, EMA, SWA]:
    """Windows that reach across every cut tried."""
    return LAWA(k=3, every=2, memory=memory, **options), EMA(0.8, warmup="debias"), SWA(start=3, every=3)


@pytest.mark.parametrize("checkpoint", ["online", "average"])
@pytest.mark.parametrize("memory", ["cpu", "device", "disk"])
def test_a_resumed_run_equals_the_uninterrupted_one(checkpoint: Any, memory: str, tmp_path: Path) -> None:
    place = str(tmp_path / "snapshots") if memory == "disk" else memory
    straight = averages(place, checkpoint=checkpoint)
    _, module, recorder = fit(tmp_path, *straight, every_step(tmp_path))
    for cut in (1, 3, 4, 7, 9, 12):
        resumed = averages(place, checkpoint=checkpoint)
        _, other, rest = fit(tmp_path, *resumed, module=Regression(seed=1), ckpt_path=tmp_path / f"step={cut}.ckpt")
        assert same(rest.online, {step: recorder.online[step] for step in recorder.online if step > cut})
        assert same(state(*resumed), state(*straight))
        assert same(weights_of(other), weights_of(module))


def test_a_checkpoint_saved_in_validation_resumes_exactly(tmp_path: Path) -> None:
    class SavesInValidation(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    _, _, recorder = fit(tmp_path, *averages(), SavesInValidation())
    assert same(dict(content(tmp_path / "8.ckpt")["state_dict"]), recorder.online[8])
    assert same(load_average(tmp_path / "8.ckpt"), recorder.mean(4, 6, 8))


def test_missing_state(tmp_path: Path) -> None:
    _, _, recorder = fit(tmp_path, every_step(tmp_path))
    file = tmp_path / "step=8.ckpt"
    with pytest.raises(FileNotFoundError, match=r'no state of the average \'lawa\'.* missing="start"'):
        fit(tmp_path, LAWA(every=1), ckpt_path=file)
    callback = LAWA(k=2, every=2, missing="start")
    _, module, rest = fit(tmp_path, callback, ckpt_path=file)
    assert callback.averager.absorbed == 2
    assert same(rest.last, recorder.last)
    assert same(weights_of(module), recorder.mean(10, 12))


def test_another_models_state_is_an_error(tmp_path: Path) -> None:
    fit(tmp_path, EMA(0.9), every_step(tmp_path))
    file = tmp_path / "step=8.ckpt"
    checkpoint = content(file)
    layout = checkpoint["averaging"]["averages"]["ema"]["state"]["layout"]
    tensors = checkpoint["averaging"]["averages"]["ema"]["state"]["tensors"]["ema"]
    layout["net.9.weight"], tensors["net.9.weight"] = layout.pop("net.0.weight"), tensors.pop("net.0.weight")
    torch.save(checkpoint, file)
    with pytest.raises(ValueError, match=r"net\.9\.weight"):
        fit(tmp_path, EMA(0.9), ckpt_path=file)


def test_another_averagers_state_is_an_error(tmp_path: Path) -> None:
    fit(tmp_path, EMA(0.9, name="mine"), every_step(tmp_path))
    with pytest.raises(ValueError, match="the state of EMA, not of LAWA"):
        fit(tmp_path, LAWA(every=1, name="mine"), ckpt_path=tmp_path / "step=8.ckpt")


# ---------------------------------------------------------------------- after the end


@pytest.mark.parametrize("checkpoint", ["online", "average"])
def test_a_second_fit_continues_exactly(checkpoint: Any, tmp_path: Path) -> None:
    straight = averages(checkpoint=checkpoint)
    _, expected, recorder = fit(tmp_path, *straight, module=Stateless(), epochs=5)
    continued = averages(checkpoint=checkpoint)
    trainer, module, parts = fit(tmp_path, *continued, module=Stateless(), epochs=3)
    trainer.validate(module, verbose=False)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module)
    assert same(parts.online, recorder.online)
    assert same(state(*continued), state(*straight))
    assert same(weights_of(module), weights_of(expected))


@pytest.mark.parametrize("checkpoint", ["online", "average"])
def test_a_checkpoint_saved_after_fit_resumes_exactly(checkpoint: Any, tmp_path: Path) -> None:
    straight = averages(checkpoint=checkpoint)
    _, expected, recorder = fit(tmp_path, *straight, epochs=5)
    trainer, module, _ = fit(tmp_path, *averages(checkpoint=checkpoint), epochs=3)
    file = tmp_path / "after.ckpt"
    trainer.save_checkpoint(file)
    assert same(weights_of(Regression.load_from_checkpoint(file)), weights_of(module)), "it holds what the model holds"
    assert same(load_average(file), weights_of(module))
    continued = averages(checkpoint=checkpoint)
    _, other, rest = fit(tmp_path, *continued, epochs=5, module=Regression(seed=1), ckpt_path=file)
    assert same(rest.online, {step: recorder.online[step] for step in range(13, 21)})
    assert same(state(*continued), state(*straight))
    assert same(weights_of(other), weights_of(expected))


def test_a_new_run_of_the_same_callback_starts_anew(tmp_path: Path) -> None:
    callback = LAWA(k=3, every=2)
    fit(tmp_path, callback)
    _, module, recorder = fit(tmp_path, callback, module=Regression(seed=5), epochs=2)
    assert same(weights_of(module), recorder.mean(4, 6, 8))
    assert callback.averager.absorbed == 4


class Hears(averaging.EMA):
    """Keeps what it observes, and makes a tensor then that it writes to later."""

    def __init__(self, name: str) -> None:
        super().__init__(0.9, name=name)
        self.heard: list[tuple[int, dict[str, float]]] = []
        self.made = torch.zeros(1)

    def observe(self, metrics: Any, step: int) -> None:
        self.heard.append((step, dict(metrics)))
        self.made = torch.zeros(1)

    def absorb(self, weights: Any, step: int) -> None:
        self.made += 1
        super().absorb(weights, step)


def test_averagers_observe_every_validation_before_the_checkpoint(tmp_path: Path) -> None:
    ears = [Hears("one"), Hears("two")]

    class Saves(ModelCheckpoint):
        def on_save_checkpoint(self, *_: Any) -> None:
            assert all(averager.heard[-1][0] == _[0].global_step for averager in ears)

    callbacks = AveragingCallback(ears[0], evaluate="both"), AveragingCallback(ears[1])
    best = Saves(tmp_path, monitor="val_loss")
    trainer, module, recorder = fit(tmp_path, *callbacks, best, num_sanity_val_steps=1)
    trainer.validate(module, verbose=False)
    for averager in ears:
        assert [step for step, _ in averager.heard] == [4, 8, 12]
        for (_, heard), measured in zip(averager.heard, recorder.measured, strict=True):
            assert {name: heard[name] for name in ("val_loss", "online_val_loss")} == measured
