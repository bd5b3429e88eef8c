"""SWA's learning rate in both trainers against PyTorch's SWALR, on scikit-learn's digits."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import SWALR
from torch.utils.data import DataLoader, TensorDataset

import averaging
from averaging.learning_rate import SWALearningRate

images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
images = (images.float() / 16).view(-1, 1, 8, 8)
STEPS_PER_EPOCH, EPOCHS = 4, 5
TOTAL = STEPS_PER_EPOCH * EPOCHS
rows = slice(0, 32 * STEPS_PER_EPOCH)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(144, 10)

    def forward(self, image, labels=None):
        logits = self.head(self.body(image))
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def groups_of(net: Net) -> list[dict]:
    return [{"params": net.body.parameters(), "lr": 0.1}, {"params": net.head.parameters(), "lr": 0.02}]


def decay(step: int) -> float:
    """The run's own schedule: a factor on the initial learning rate."""
    return 0.97**step


# ---------------------------------------------------------------------- references


def swalr(start: int, swa_lr, length: int, strategy: str, factor=decay) -> list[list[float]]:
    """The learning rate of each step, when PyTorch's SWALR takes over from the run's own schedule at ``start``."""
    optimizer = torch.optim.SGD(groups_of(Net()))
    rates = [[group["lr"] * factor(step) for group in optimizer.param_groups] for step in range(start + 1)]
    for group, rate in zip(optimizer.param_groups, rates.pop(), strict=True):
        group["lr"] = rate
    scheduler = SWALR(optimizer, swa_lr, anneal_epochs=length, anneal_strategy=strategy)
    for _ in range(start, TOTAL):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def cyclic(start: int, cycle: int, max_lr, swa_lr: float) -> list[list[float]]:
    """Section 3.1 of the paper: α(i) = (1 − t(i)) α₁ + t(i) α₂, t(i) = (mod(i − 1, c) + 1)/c, in step i = 1, 2, …"""
    rates = [[0.1 * decay(step), 0.02 * decay(step)] for step in range(start)]
    highest = max_lr or [0.1 * decay(start), 0.02 * decay(start)]
    for i in range(start + 1, TOTAL + 1):
        t = (math.fmod(i - 1, cycle) + 1) / cycle
        rates.append([(1 - t) * high + t * swa_lr for high in highest])
    return rates


CASES = {
    "cos": ({"start": 8, "swa_lr": 0.05, "anneal": 6}, lambda f: swalr(8, 0.05, 6, "cos", f)),
    "linear": ({"start": 0.5, "swa_lr": [0.01, 0.03], "anneal": "1 epoch", "anneal_strategy": "linear"},
               lambda f: swalr(10, [0.01, 0.03], 4, "linear", f)),
    "at once": ({"start": "2 epochs", "swa_lr": 0.05, "anneal": 0}, lambda f: swalr(8, 0.05, 0, "cos", f)),
    "from the beginning": ({"start": 0, "swa_lr": 0.0, "anneal": 1.0}, lambda f: swalr(0, 0.0, 20, "cos", f)),
}  # fmt: skip
every_case = pytest.mark.parametrize(("settings", "expected"), CASES.values(), ids=CASES.keys())


def assert_rates(rates, expected) -> None:
    assert len(rates) == len(expected)
    for step, (one, other) in enumerate(zip(rates, expected, strict=True)):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-12), f"in the step after {step}"


# ---------------------------------------------------------------------- transformers


class Optimizer:
    """What transformers' Trainer is given: two parameter groups, and a scheduler that steps with the optimizer."""

    def __call__(self, net: Net):
        optimizer = torch.optim.SGD(groups_of(net))
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, decay)


def hugging_face(folder: Path, settings: dict, resume: Path | None = None, stop: int | None = None, **options):
    transformers = pytest.importorskip("transformers")
    from averaging.transformers import SWA

    class Rates(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.rates: list[list[float]] = []

        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            self.rates.append([float(group["lr"]) for group in optimizer.param_groups])

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == stop

    net, seen = Net(), Rates()
    swa = SWA(**settings)
    trainer = transformers.Trainer(
        net,
        transformers.TrainingArguments(
            folder, num_train_epochs=EPOCHS, per_device_train_batch_size=32, logging_steps=1, save_steps=1,
            max_grad_norm=0.0, disable_tqdm=True, report_to="none", use_cpu=True, **{"save_strategy": "no", **options},
        ),
        train_dataset=[{"image": images[row], "labels": labels[row]} for row in range(rows.stop)],
        callbacks=[swa, seen],
        optimizers=Optimizer()(net),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer, seen.rates, swa


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:training ended before there was an average 'swa'")
class TestTransformers:
    @every_case
    def test_is_swalr_and_is_what_is_logged(self, settings, expected, tmp_path):
        trainer, rates, _ = hugging_face(tmp_path, settings)
        assert_rates(rates, expected(decay))
        logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
        assert logged == pytest.approx([first for first, _ in expected(decay)], rel=1e-9)

    def test_cyclic(self, tmp_path):
        settings = {"start": 8, "swa_lr": 0.01, "cycle": 4, "max_lr": [0.2, 0.1]}
        _, rates, swa = hugging_face(tmp_path, settings)
        assert_rates(rates, cyclic(8, 4, [0.2, 0.1], 0.01))
        assert swa.averager.absorbed == 4  # after 8, 12, 16 and 20 steps

    @pytest.mark.parametrize("cut", [7, 8, 11])
    def test_resumes_exactly(self, cut, tmp_path):
        settings = {"start": 8, "swa_lr": 0.05, "anneal": 6, "every": 2}
        straight, rates, swa = hugging_face(tmp_path / "a", settings)
        hugging_face(tmp_path / "b", settings, stop=cut, save_strategy="steps")
        resumed, rest, again = hugging_face(tmp_path / "b", settings, resume=tmp_path / "b" / f"checkpoint-{cut}")
        assert rest == rates[cut:]
        for name, tensor in swa.averager.average().items():
            assert torch.equal(tensor, again.averager.average()[name])
        for name, tensor in straight.model.state_dict().items():
            assert torch.equal(tensor, resumed.model.state_dict()[name])


# ---------------------------------------------------------------------- Lightning


def lightning(
    folder: Path, settings: dict, per: str = "step", kind: str = "decay", ckpt: Path | None = None, save=False
):
    pl = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    from averaging.lightning import SWA

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.rates: list[list[float]] = []

        def training_step(self, batch, batch_idx):
            now = slice(32 * batch_idx, 32 * batch_idx + 32)  # a run cut in mid-epoch begins the data anew
            loss = self.net(images[now], labels[now])["loss"]
            self.log("loss", loss, on_epoch=True, on_step=False)
            return loss

        def train_dataloader(self):
            return DataLoader(TensorDataset(images[rows], labels[rows]), batch_size=32)

        def on_before_optimizer_step(self, optimizer):
            self.rates.append([float(group["lr"]) for group in optimizer.param_groups])

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(groups_of(self.net), lr=0.1)
            if kind == "plateau":
                scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
            else:
                scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": per, "monitor": "loss"},
            }

    module, swa = Module(), SWA(**settings)
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    logger = CSVLogger(folder)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, logger=logger, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, default_root_dir=folder,
        callbacks=[LearningRateMonitor("step"), swa, *([saves] if save else [])], enable_checkpointing=save,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt)
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = [float(row["lr-SGD/pg1"]) for row in csv.DictReader(file) if row.get("lr-SGD/pg1")]
    return module, logged, swa


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*(Checkpoint directory|does not have many workers|callbacks used to create)")
@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended")
class TestLightning:
    @every_case
    @pytest.mark.parametrize("per", ["step", "epoch"])
    def test_is_swalr_and_is_what_is_logged(self, settings, expected, per, tmp_path):
        def factor(step):
            return decay(step if per == "step" else step // STEPS_PER_EPOCH)

        module, logged, _ = lightning(tmp_path, settings, per)
        assert_rates(module.rates, expected(factor))
        assert logged == pytest.approx([first for first, _ in expected(factor)], rel=1e-6)

    def test_takes_over_from_a_plateau_scheduler(self, tmp_path):
        module, _, _ = lightning(tmp_path, {"start": "1 epoch", "swa_lr": 0.05, "anneal": 0}, "epoch", "plateau")
        assert_rates(module.rates, [[0.1, 0.02]] * 4 + [[0.05, 0.05]] * 16)

    def test_cyclic_from_the_rate_at_the_start(self, tmp_path):
        module, _, swa = lightning(tmp_path, {"start": 0.3, "swa_lr": 0.01, "cycle": "epoch"})
        assert_rates(module.rates, cyclic(6, 4, None, 0.01))
        assert swa.averager.absorbed == 4  # after 8, 12, 16 and 20 steps

    @pytest.mark.parametrize("cut", [7, 8, 11])
    def test_resumes_exactly(self, cut, tmp_path):
        settings = {"start": 8, "swa_lr": 0.05, "anneal": 6, "every": 2}
        straight, _, swa = lightning(tmp_path / "a", settings, save=True)
        resumed, _, again = lightning(tmp_path / "b", settings, ckpt=tmp_path / "a" / f"step={cut}.ckpt")
        assert resumed.rates == straight.rates[cut:]
        for name, tensor in swa.averager.average().items():
            assert torch.equal(tensor, again.averager.average()[name])
        for name, tensor in straight.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name])


# ---------------------------------------------------------------------- the rest


def test_several_optimizers_and_rates_that_are_tensors():
    average = averaging.SWA(start=0, every=1).prepare(total_steps=10)
    optimizers = [
        torch.optim.Adam(nn.Linear(2, 2).parameters(), lr=torch.tensor(0.5)),
        torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1),
    ]
    rates = SWALearningRate([0.1, 0.3], anneal=2, anneal_strategy="linear").apply(optimizers, 1, average)
    assert rates == pytest.approx([0.3, 0.2])
    assert isinstance(optimizers[0].param_groups[0]["lr"], torch.Tensor)
    with pytest.raises(ValueError, match="swa_lr is a list of 1, but the optimizer has 2 parameter groups"):
        SWALearningRate([0.1]).apply(optimizers, 1, average)


def test_an_optimizer_of_an_earlier_run_starts_anew():
    average = averaging.SWA(start=2, every=1).prepare(total_steps=10)
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.5)
    rate = SWALearningRate(0.1, anneal=0)
    own = copy.deepcopy(optimizer.state_dict())
    assert rate.apply([optimizer], 1, average) is None
    assert rate.apply([optimizer], 2, average) == [0.1]
    assert rate.apply([optimizer], 1, average) is None
    assert optimizer.state_dict()["param_groups"][0].keys() == own["param_groups"][0].keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"swa_lr": -0.1}, "cannot be negative"),
        ({"swa_lr": [0.1, float("nan")]}, "cannot be negative"),
        ({"swa_lr": 0.1, "anneal_strategy": "exp"}, "give 'cos' or 'linear'"),
        ({"swa_lr": 0.1, "cycle": 0}, "must be positive"),
        ({"swa_lr": 0.1, "max_lr": 0.2}, "give cycle="),
        ({"cycle": 4}, "give swa_lr="),
    ],
)
def test_settings_that_cannot_work(settings, message):
    pytest.importorskip("transformers")
    from averaging.transformers import SWA

    with pytest.raises(ValueError, match=message):
        SWA(**settings)


@pytest.mark.filterwarnings("ignore:You are adding a")  # transformers, of two callbacks of one class
def test_two_callbacks_that_set_the_learning_rate(tmp_path):
    """One would undo what the other did."""
    pl, transformers = pytest.importorskip("lightning.pytorch"), pytest.importorskip("transformers")
    from lightning.pytorch.demos.boring_classes import BoringModel

    import averaging.lightning
    import averaging.transformers

    message = "'swa1' and 'swa2' both set the learning rate: give swa_lr= to one of them"
    two = [averaging.lightning.SWA(start=start, swa_lr=0.1, name=f"swa{start}") for start in (1, 2)]
    with pytest.raises(ValueError, match=message):
        pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=two, logger=False, default_root_dir=tmp_path).fit(
            BoringModel()
        )
    two = [averaging.transformers.SWA(start=start, swa_lr=0.1, name=f"swa{start}") for start in (1, 2)]
    arguments = transformers.TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    rows = [{"image": images[row], "labels": labels[row]} for row in range(8)]
    with pytest.raises(ValueError, match=message):
        transformers.Trainer(Net(), arguments, train_dataset=rows, callbacks=two).train()
