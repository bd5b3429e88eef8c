"""SWAD against the paper's algorithm in float64: alone, and in both trainers."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import nn

import averaging
from averaging import SWAD


def interval(losses, optimum=3, overfit=6, tolerance=1.3):
    """Algorithm 1 of the paper over evaluations: (t_s, t_e, whether the end was found), or None."""
    start = limit = None
    for i in range(len(losses)):
        if limit is None:
            window = losses[i - optimum + 1 : i + 1]
            if i >= optimum - 1 and window[0] == min(window):
                start, limit = i - optimum + 1, tolerance / optimum * sum(window)
        elif i >= overfit and limit < min(losses[i - overfit + 1 : i + 1]):
            return start, i - overfit, True
    if limit is None:
        return None
    return start, max(i for i, loss in enumerate(losses) if loss <= limit), False


def reference(weights, evaluations, **settings):
    """The mean over the segments that `interval` chooses, of step → weights and step → loss."""
    steps = sorted(evaluations)
    chosen = interval([evaluations[step] for step in steps], **settings)
    if chosen is None:
        return None
    before = steps[chosen[0] - 1] if chosen[0] else 0
    inside = [w.double() for t, w in weights.items() if before < t <= steps[chosen[1]]]
    return torch.stack(inside).mean(0)


def valley(seed: int, length: int) -> list[float]:
    """Losses that fall, stay and rise, with noise."""
    generator = random.Random(seed)
    low, high = generator.uniform(0.1, 0.5), generator.uniform(0.4, 0.9)
    noise = generator.choice([0.02, 0.2, 0.5])
    return [
        max(0, low - x) + 3 * max(0, x - high) + 0.3 + noise * generator.random()
        for x in (i / length for i in range(length))
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [(3, 6, 1.3), (3, 3, 1.2), (1, 1, 1.0), (2, 5, 1.1), (4, 4, 1.05)])
def test_against_the_algorithm(settings, dtype):
    optimum, overfit, tolerance = settings
    found = ended = 0
    for seed in range(25):
        losses, generator = valley(seed, 30), torch.Generator().manual_seed(seed)
        averager = SWAD(optimum, overfit, tolerance=tolerance)
        weights: dict[int, torch.Tensor] = {}
        evaluations: dict[int, float] = {}
        step = 0
        for loss in losses:
            for _ in range(1 + seed % 4 if seed % 2 else random.Random(step).randint(1, 6)):
                step += 1
                weights[step] = torch.randn(5, generator=generator).add(3).to(dtype)
                averager.update({"w": weights[step]}, step)
            evaluations[step] = loss
            averager.observe({"val_loss": loss}, step)
            choice = {"optimum": optimum, "overfit": overfit, "tolerance": tolerance}
            expected = reference(weights, evaluations, **choice)
            assert averager.ready == (expected is not None)
            copies = len(averager.tensors()) + (averager.tensors().keys() == {"open"})
            assert copies <= (2 if averager.ready else optimum)
            if expected is not None:
                torch.testing.assert_close(averager.average()["w"].double(), expected, rtol=1e-6, atol=1e-6)
                rounded = averager.average(rounded=True)["w"]
                torch.testing.assert_close(rounded, expected.to(dtype), rtol=2**-7, atol=1e-6)
                assert averager.ended == interval([*evaluations.values()], **choice)[2]
        found, ended = found + averager.ready, ended + averager.ended
    assert found > 10
    assert ended > 3


def observed(losses, **settings):
    averager = SWAD(**settings)
    for step, loss in enumerate(losses, 1):
        averager.update({"w": torch.tensor([float(step)])}, step)
        averager.observe({"val_loss": loss}, step)
    return averager


def test_what_is_no_number_is_no_valley():
    averager = observed([5, math.nan, 4, math.inf, 3, 2, 2.1, 2.2, math.nan, 2.0], tolerance=1.1)
    assert averager.average()["w"].item() == 8  # 6, 7, 8, 9, 10: the NaN is above the limit, and was left again
    assert not observed([math.nan] * 20).ready
    assert not observed([5, 4, 3, 2, 1]).ready


def test_losses_below_zero_have_a_tolerance_too():
    averager = observed([-1, -1, -1, -0.8, -0.5, -0.8], tolerance=1.25, overfit_patience=2)
    assert averager.limit == pytest.approx(-0.75)
    assert averager.average()["w"].item() == 3.5


def test_evaluations_without_training_between_count_once():
    averager = SWAD(2)
    averager.observe({"val_loss": 9.0}, 0)
    for step, loss in enumerate([3.0, 2.0, 2.5], 1):
        averager.update({"w": torch.tensor([float(step)])}, step)
        averager.observe({"val_loss": loss}, step)
        averager.observe({"val_loss": loss}, step)
    assert averager.average()["w"].item() == 2.5


def test_a_metric_that_never_arrives_is_an_error():
    averager = SWAD(metric="eval_one_loss")
    for name in ("two", "three"):  # several sets are evaluated one after the other
        averager.observe({f"eval_{name}_loss": 1.0}, 5)
    with pytest.raises(ValueError, match=r"'eval_one_loss', but .* 5 and 10 measured only eval_two_loss: .*metric="):
        averager.observe({"eval_two_loss": 1.0}, 10)
    averager = SWAD(metric="eval_one_loss")
    for step in (5, 10, 15):
        averager.observe({"eval_one_loss": 1.0}, step)
        averager.observe({"eval_two_loss": 1.0}, step)


def test_after_the_end_nothing_is_absorbed():
    averager = observed([2, 1, 1, 1, 1, 5, 5, 1, 1], overfit_patience=2)
    assert averager.ended
    assert averager.average()["w"].item() == 3.5  # 2, 3, 4, 5
    assert len(averager.tensors()) == 1


# ---------------------------------------------------------------------- in the trainers


def check(averager, weights, losses):
    """The average against the algorithm, on what was seen from outside."""
    for name, tensor in averager.average().items():
        expected = reference({t: w[name] for t, w in weights.items()}, losses, optimum=2, overfit=3, tolerance=1.0)
        assert expected is not None
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-6)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("evaluate", ["both", "online"])
def test_transformers(evaluate, tmp_path):
    transformers = pytest.importorskip("transformers")
    from averaging.transformers import SWAD as Callback

    class Recorder(transformers.TrainerCallback):
        def __init__(self):
            self.weights = {}

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.weights[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters()}

    def run(resume=None):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1,
        )  # fmt: skip
        tokens = torch.randint(0, 16, (32, 6), generator=torch.Generator().manual_seed(1))
        rows = [{"input_ids": row, "labels": row} for row in tokens]
        recorder, callback = Recorder(), Callback(2, 3, tolerance=1.0, evaluate=evaluate)
        trainer = transformers.Trainer(
            model=transformers.LlamaForCausalLM(config),
            args=transformers.TrainingArguments(
                output_dir=str(tmp_path), max_steps=36, per_device_train_batch_size=4, save_steps=4, eval_steps=2,
                eval_strategy="steps", eval_on_start=True, learning_rate=0.2, lr_scheduler_type="constant",
                report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=100, seed=1,
            ),
            train_dataset=rows[:24],
            eval_dataset=rows[24:],
            callbacks=[callback, recorder],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        losses = {e["step"]: e for e in trainer.state.log_history if "eval_loss" in e and e["step"]}
        key = "eval_online_loss" if evaluate == "both" else "eval_loss"
        return {t: e[key] for t, e in losses.items()}, recorder.weights, callback.averager, trainer.model

    losses, weights, averager, model = run()
    check(averager, weights, losses)
    assert same(dict(model.named_parameters()), averager.average(rounded=True))
    for cut in (4, 12) if evaluate == "both" else ():
        _, again, other, _ = run(str(tmp_path / f"checkpoint-{cut}"))
        assert same(again[36], weights[36])
        assert same(other.average(), averager.average())


@pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create",
    "ignore:.*resuming from a checkpoint that ended before the epoch ended",
)
@pytest.mark.parametrize("evaluate", ["both", "online"])
def test_lightning(evaluate: Any, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from averaging.lightning import SWAD as Callback

    checkpoints = lightning.callbacks.ModelCheckpoint

    class Regression(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))

        def loss(self, seed):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
            return (self.net(x) - x.sum(1, keepdim=True).sin()).square().mean()

        def training_step(self, _, batch_idx):
            return self.loss(100 * self.current_epoch + batch_idx)

        def validation_step(self, _, batch_idx):
            self.log("val_loss", self.loss(10_000 + batch_idx), batch_size=8)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.3)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(range(4))

        def val_dataloader(self):
            return torch.utils.data.DataLoader(range(2))

    class Recorder(lightning.Callback):
        def __init__(self):
            self.weights, self.losses = {}, {}

        def on_train_batch_end(self, trainer, module, *_):
            self.weights[trainer.global_step] = {n: p.detach().clone() for n, p in module.named_parameters()}

        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking:
                key = "online_val_loss" if evaluate == "both" else "val_loss"
                self.losses[trainer.global_step] = float(trainer.callback_metrics[key])

    def run(resume=None):
        recorder, callback, module = Recorder(), Callback(2, 3, tolerance=1.0, evaluate=evaluate), Regression()
        lightning.Trainer(
            accelerator="cpu", max_epochs=9, val_check_interval=2, default_root_dir=tmp_path,
            callbacks=[callback, recorder,
                checkpoints(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1),  # between evaluations
                checkpoints(tmp_path, filename="val-{step}", every_n_epochs=1, save_top_k=-1)],  # after each
            logger=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(module, ckpt_path=resume)  # fmt: skip
        return recorder.losses, recorder.weights, callback.averager, module

    losses, weights, averager, module = run()
    check(averager, weights, losses)
    assert same(dict(module.named_parameters()), averager.average(rounded=True))
    for cut in ("step=3", "val-step=4", "val-step=12", "step=15") if evaluate == "both" else ():
        _, again, other, _ = run(tmp_path / f"{cut}.ckpt")
        assert same(again[36], weights[36])
        assert same(other.average(), averager.average())


def test_the_average_cannot_choose_itself():
    from averaging.callbacks import CallbackCore

    with pytest.raises(ValueError, match=r'evaluate="both"'):
        CallbackCore(averaging.SWAD())
    CallbackCore(averaging.SWAD(), evaluate="both")
