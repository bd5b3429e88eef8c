"""Averages with BatchNorm statistics of their own in both trainers, on scikit-learn's digits."""

from __future__ import annotations

import copy
import math
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, TensorDataset

import averaging
from averaging.batchnorm import unnoticed

images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
images = (images.float() / 16).view(-1, 1, 8, 8)
train, test = slice(0, 256), slice(1280, 1600)
BATCH, STEPS_PER_EPOCH, EPOCHS = 64, 4, 3


def clone(tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[name].double(), other[name].double(), rtol=1e-5, atol=1e-6) for name in one
    )


# ---------------------------------------------------------------------- Lightning

pl = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from torchmetrics.classification import MulticlassAccuracy  # noqa: E402

from averaging.lightning import EMA, LAWA, AveragingCallback, load_average  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*(Checkpoint directory|callbacks used to create)"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Digits(pl.LightningModule):
    """Records its weights after each step, and logs what a training step must not log twice."""

    def __init__(self, seed: int = 0, shuffle: bool = True, dropout: float = 0.0, **loader) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(288, 10)
        )
        self.accuracy = MulticlassAccuracy(10)
        self.loader = {"batch_size": BATCH, "shuffle": shuffle, **loader}
        self.steps: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []  # as users collect outputs
        self.measured: list[float] = []
        self.calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        x, y = batch
        logits = self.net(x)
        loss = cross_entropy(logits, y)
        self.losses.append(loss.item())
        self.accuracy(logits, y)
        self.log("loss", loss, on_epoch=True, on_step=False)
        self.log_dict({"accuracy": self.accuracy}, on_epoch=True, on_step=False)
        return loss

    def on_train_batch_end(self, *args):
        self.steps.append(clone(self.state_dict()))

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", cross_entropy(self.net(x), y))

    def on_validation_epoch_end(self):
        self.measured.append(float(self.trainer.callback_metrics["val_loss"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)

    def train_dataloader(self):
        return DataLoader(TensorDataset(images[train], labels[train]), **self.loader)

    def val_dataloader(self):
        return DataLoader(TensorDataset(images[test], labels[test]), batch_size=320)


def fit(folder: Path, *callbacks, module=None, ckpt: Path | None = None, epochs=EPOCHS, **options):
    module = module or Digits()
    torch.manual_seed(11)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=folder, callbacks=list(callbacks), logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks), **options,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt)
    return trainer, module


def reference(module: Digits, average, number: int = STEPS_PER_EPOCH) -> nn.Module:
    """The net with ``average`` and PyTorch's update_bn over the first batches, in the order of the data."""
    net = copy.deepcopy(module.net)
    averaging.load_into(net, {name.removeprefix("net."): tensor for name, tensor in average.items()})
    net[4].p = 0.0
    update_bn([images[i * BATCH : (i + 1) * BATCH] for i in range(number)], net)
    return net.eval()


def loss_of(net: nn.Module) -> float:
    with torch.no_grad():
        return float(cross_entropy(net(images[test]), labels[test]))


def mean(module: Digits, *steps: int) -> dict[str, torch.Tensor]:
    parameters = [name for name, _ in module.named_parameters()]
    return {name: torch.stack([module.steps[s - 1][name].double() for s in steps]).mean(0) for name in parameters}


class TestLightning:
    def test_validation_measures_the_average_with_statistics_of_its_own(self, tmp_path):
        _, module = fit(tmp_path, LAWA(k=2, every=2), module=Digits(shuffle=False))
        averages = [mean(module, step - 2, step) for step in (4, 8, 12)]
        assert module.measured == pytest.approx([loss_of(reference(module, each)) for each in averages], rel=1e-4)
        assert close(module.net.state_dict(), reference(module, averages[-1]).state_dict()), "what it holds at the end"

    @pytest.mark.parametrize("evaluate", ["average", "all"])
    def test_training_is_the_same_bit_for_bit(self, evaluate, tmp_path):
        def run(folder, *callbacks):
            generator = torch.Generator().manual_seed(3)
            module = Digits(dropout=0.5, generator=generator)
            trainer, module = fit(tmp_path / folder, *callbacks, module=module, val_check_interval=2)
            return trainer, module, generator.get_state()

        plain, one, state = run("a")
        callback = AveragingCallback(averaging.LAWA(2, every=1), averaging.EMA(0.8), evaluate=evaluate)
        averaged, other, after = run("b", callback, ModelCheckpoint(tmp_path / "b", every_n_train_steps=3))
        assert all(same(a, b) for a, b in zip(one.steps, other.steps, strict=True))
        assert one.losses == other.losses
        assert plain.logged_metrics["accuracy"] == averaged.logged_metrics["accuracy"]
        assert plain.logged_metrics["loss"] == averaged.logged_metrics["loss"]
        assert torch.equal(state, after)
        assert other.calls > one.calls

    def test_running_workers_are_not_disturbed(self, tmp_path):
        options = {"num_workers": 1, "persistent_workers": True}
        _, one = fit(tmp_path / "a", module=Digits(**options), val_check_interval=2, epochs=2)
        _, other = fit(tmp_path / "b", LAWA(2, every=1), module=Digits(**options), val_check_interval=2, epochs=2)
        assert all(same(a, b) for a, b in zip(one.steps, other.steps, strict=True))

    def test_once_for_each_average_and_absorption(self, tmp_path):
        callback = LAWA(k=2, every=4, batchnorm=3)
        saves = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
        _, module = fit(tmp_path, callback, saves, val_check_interval=1)
        assert module.calls == 12 + 1 + 3 * 3, "training, the check at the start, and 3 averages"

    def test_checkpoints(self, tmp_path):
        every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        _, module = fit(tmp_path, LAWA(k=2, every=2), every_step, module=Digits(shuffle=False))
        content = torch.load(tmp_path / "step=8.ckpt", weights_only=True)
        assert same(content["state_dict"], module.steps[7])
        average = load_average(tmp_path / "step=8.ckpt")
        expected = reference(module, mean(module, 6, 8)).state_dict()
        assert close({n.removeprefix("net."): t for n, t in average.items()}, expected)

    @pytest.mark.parametrize("checkpoint", ["online", "average"])
    def test_what_is_loaded_is_what_was_measured(self, checkpoint, tmp_path):
        best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)
        trainer, module = fit(tmp_path, LAWA(k=2, every=1, checkpoint=checkpoint), best)
        lowest = min(module.measured)
        [metrics] = trainer.validate(module, ckpt_path="best", verbose=False)
        assert metrics["val_loss"] == lowest == float(best.best_model_score)

    @pytest.mark.parametrize("checkpoint", ["online", "average"])
    def test_resumes_exactly(self, checkpoint, tmp_path):
        every_epoch = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
        callback = LAWA(k=3, every=2, checkpoint=checkpoint)
        _, straight = fit(tmp_path, callback, every_epoch, module=Digits(shuffle=False))
        again = LAWA(k=3, every=2, checkpoint=checkpoint)
        _, resumed = fit(tmp_path, again, module=Digits(1, shuffle=False), ckpt=tmp_path / "step=8.ckpt")
        assert all(same(a, b) for a, b in zip(straight.steps[8:], resumed.steps, strict=True))
        assert same(straight.net.state_dict(), resumed.net.state_dict())
        assert straight.measured[2:] == resumed.measured

    def test_a_second_fit_continues_from_the_online_weights_and_statistics(self, tmp_path):
        trainer, module = fit(tmp_path, EMA(0.8))
        online, before = module.steps[-1], {}

        class Look(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                before.setdefault("first", clone(pl_module.state_dict()))

        assert not same(clone(module.state_dict()), online)
        trainer.save_checkpoint(tmp_path / "after.ckpt")
        trainer.callbacks.append(Look())
        trainer.fit_loop.max_epochs = EPOCHS + 1
        trainer.fit(module)
        assert same(before["first"], online)

    @pytest.mark.parametrize("options", [{"batchnorm": 0}, {"buffers": True}])
    def test_off(self, options, tmp_path):
        _, module = fit(tmp_path, LAWA(k=2, every=2, **options))
        assert module.calls == 12
        buffer = module.net[1].running_mean
        if options.get("buffers"):
            assert torch.equal(buffer, torch.stack([module.steps[s]["net.1.running_mean"] for s in (9, 11)]).mean(0))
        else:
            assert torch.equal(buffer, module.steps[-1]["net.1.running_mean"])

    def test_frozen_layers_keep_their_statistics(self, tmp_path):
        class Frozen(Digits):
            def on_train_epoch_start(self):
                self.net[1].eval()

        module = Frozen()
        own = clone(dict(module.net.named_buffers()))
        _, module = fit(tmp_path, EMA(0.8), module=module)
        assert same(clone(dict(module.net.named_buffers())), own)

    def test_a_new_run_of_the_same_callback(self, tmp_path):
        callback = LAWA(k=2, every=2)
        fit(tmp_path / "a", callback, module=Digits(shuffle=False))
        _, module = fit(tmp_path / "b", callback, module=Digits(1, shuffle=False))
        assert close(module.net.state_dict(), reference(module, mean(module, 10, 12)).state_dict())

    def test_two_optimizers_have_one_swa_lr(self, tmp_path):
        from averaging.lightning import SWA

        class Two(Digits):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False
                self.rates: list[float] = []

            def training_step(self, batch, batch_idx):
                optimizers = self.optimizers()
                self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
                loss = super().training_step(batch, batch_idx)
                self.manual_backward(loss)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()

            def configure_optimizers(self):
                return [
                    torch.optim.SGD(self.net[0].parameters(), lr=1.0),
                    torch.optim.SGD(self.net[5].parameters(), lr=0.1),
                ]

        module = Two()
        with pytest.warns(UserWarning, match="swa_lr sets the learning rate of all 2 optimizers"):
            fit(tmp_path, SWA(start=0.5, swa_lr=0.05, anneal=0, batchnorm=0), module=module, epochs=2)
        assert module.rates == [[1.0, 0.1]] * 4 + [[0.05, 0.05]] * 4

    def test_where_it_cannot_be_done_there_is_a_warning(self, tmp_path):
        class Once(IterableDataset):
            def __init__(self) -> None:
                self.rows = iter(range(256))

            def __iter__(self):
                return ((images[row], labels[row]) for row in self.rows)

        class Stream(Digits):
            def train_dataloader(self):
                return DataLoader(Once(), batch_size=64)

        class Manual(Digits):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()

        for kind, message in (Stream, "only once"), (Manual, "manual optimization"):
            with pytest.warns(UserWarning, match=f"BatchNorm statistics of the online weights.*{message}.*batchnorm=0"):
                _, module = fit(tmp_path, EMA(0.5), module=kind(), epochs=1)
            assert torch.equal(module.net[1].running_mean, module.steps[-1]["net.1.running_mean"])
            assert len(module.steps) == 4

    def test_settings(self, tmp_path):
        for wrong in (-1, True):
            with pytest.raises(ValueError, match="batchnorm="):
                EMA(0.9, batchnorm=wrong)
        callback = EMA(0.8)
        fit(tmp_path, callback)
        assert pickle.loads(pickle.dumps(callback)).batchnorm == callback.batchnorm


# ---------------------------------------------------------------------- data


def test_reading_the_data_once_more_leaves_no_trace():
    class Noisy(Dataset):
        """Draws from generators of its own, of every kind."""

        def __init__(self) -> None:
            self.rngs = np.random.default_rng(1), np.random.RandomState(1), random.Random(1)
            self.modern, self.legacy, self.python = self.rngs
            self.torch = torch.Generator().manual_seed(1)

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> float:
            drawn = self.modern.random() + self.legacy.rand() + self.python.random()
            return index + drawn + float(torch.rand((), generator=self.torch))

    class CountsEpochs(Sampler):
        epoch = 0

        def __iter__(self):
            self.epoch += 1
            return iter([self.epoch % 8, 1, 2, 3])

    class Position(IterableDataset):
        position = 0

        def __iter__(self):
            while self.position < 8:
                self.position += 1
                yield self.position
            self.position = 0

    for data, options in (
        (Noisy(), {"sampler": CountsEpochs()}),
        (Subset(Noisy(), [3, 2, 1]), {"shuffle": True, "generator": torch.Generator().manual_seed(2)}),
        (Position(), {}),
    ):
        loader = DataLoader(data, **options)
        twin = copy.deepcopy(loader)
        for expected in [*twin], [*twin]:
            iterator = iter(loader)
            seen = [next(iterator)]
            with unnoticed([loader]) as [own]:
                assert len([*own]) > 1
            assert [*seen, *iterator] == expected


@pytest.mark.parametrize("data", [(row for row in range(3)), iter([1])])
def test_data_that_can_be_read_once_only(data):
    with pytest.raises(ValueError, match="only once"), unnoticed([data]):
        raise AssertionError("not reached")


# ---------------------------------------------------------------------- transformers


def hugging_face(folder: Path, *callbacks, epochs: int = EPOCHS, batch: int = 256, resume=None, seed=0, **options):
    transformers = pytest.importorskip("transformers")

    class Recorder(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[dict[str, torch.Tensor]] = []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.steps.append(clone(model.state_dict()))

    torch.manual_seed(seed)
    model = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            num_channels=1, embedding_size=4, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=10
        )
    )
    rows = {"train": range(*train.indices(256)), "eval": range(*test.indices(1600))}
    data = {part: [{"pixel_values": images[i], "labels": labels[i]} for i in rows[part]] for part in rows}
    defaults = {
        "num_train_epochs": epochs, "per_device_train_batch_size": batch, "per_device_eval_batch_size": 320,
        "learning_rate": 1e-2, "save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch",
        "disable_tqdm": True, "report_to": "none", "use_cpu": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    recorder = Recorder()
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **{**defaults, **options}),
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        callbacks=[*callbacks, recorder],
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer, recorder.steps


def hf_reference(trainer, *steps) -> nn.Module:
    """The mean of the weights, with update_bn over the whole training set as one batch, which knows no order."""
    model = copy.deepcopy(trainer.model)
    names = [name for name, _ in model.named_parameters()]
    averaging.load_into(model, {name: torch.stack([step[name].double() for step in steps]).mean(0) for name in names})
    update_bn([images[train]], model)
    return model.eval()


def hf_loss(model) -> float:
    with torch.no_grad():
        return float(model(pixel_values=images[test], labels=labels[test]).loss)


class TestTransformers:
    def test_evaluations_checkpoints_and_the_end(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        from averaging.transformers import LAWA

        trainer, steps = hugging_face(tmp_path, LAWA(k=2, every=1))
        averages = [hf_reference(trainer, *steps[max(0, n - 2) : n]) for n in (1, 2, 3)]
        measured = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert measured == pytest.approx([hf_loss(model) for model in averages], rel=1e-4)
        assert close(trainer.model.state_dict(), averages[-1].state_dict())
        saved = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "checkpoint-2" / "lawa")
        assert close(saved.state_dict(), averages[1].state_dict())
        online = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "checkpoint-2")
        assert same(clone(online.state_dict()), steps[1])

    def test_training_is_the_same_bit_for_bit(self, tmp_path):
        from averaging.transformers import EMA, LAWA

        options = {"batch": 50, "gradient_accumulation_steps": 2, "eval_steps": 1, "eval_strategy": "steps"}
        _, one = hugging_face(tmp_path / "a", **options)
        _, other = hugging_face(tmp_path / "b", LAWA(k=2, every=1, evaluate="all"), EMA(0.8), **options)
        assert len(one) == 9
        assert all(same(a, b) for a, b in zip(one, other, strict=True))

    @pytest.mark.parametrize("checkpoint", ["online", "average"])
    def test_the_best_model_is_what_was_measured(self, checkpoint, tmp_path):
        from averaging.transformers import EMA

        callback = EMA(0.6, checkpoint=checkpoint)
        trainer, _ = hugging_face(tmp_path, callback, batch=64, load_best_model_at_end=True, learning_rate=0.1)
        assert math.isfinite(trainer.state.best_metric)
        assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric

    @pytest.mark.parametrize("checkpoint", ["online", "average"])
    def test_resumes_exactly(self, checkpoint, tmp_path):
        from averaging.transformers import LAWA

        straight, steps = hugging_face(tmp_path / "a", LAWA(k=3, every=2, checkpoint=checkpoint), batch=64)
        where = tmp_path / "a" / "checkpoint-8"
        callback = LAWA(k=3, every=2, checkpoint=checkpoint)
        resumed, rest = hugging_face(tmp_path / "b", callback, batch=64, resume=where, seed=1)
        assert all(same(a, b) for a, b in zip(steps[8:], rest, strict=True))
        assert same(straight.model.state_dict(), resumed.model.state_dict())

    def test_off(self, tmp_path):
        from averaging.transformers import LAWA

        trainer, steps = hugging_face(tmp_path, LAWA(k=2, every=1, batchnorm=0))
        buffers = dict(trainer.model.named_buffers())
        assert same(clone(buffers), {name: steps[-1][name] for name in buffers})
