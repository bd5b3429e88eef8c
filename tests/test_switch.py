"""Averages that training goes on from: EMA(switch=...), in a loop and in both trainers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from averaging import EMA, LAWA, load_into


def train_in_a_loop(averager, steps, model, optimizer, epoch_of=None):
    """Regression on fixed batches; returns the weights before and after each offer."""
    seen = []
    for step in steps:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step)).to(model.weight.dtype)
        loss = (model(x) - x.sum(1, keepdim=True).sin()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        before = model.weight.detach().clone()
        restart = averager.update(model, step, epoch=epoch_of and epoch_of(step))
        if restart is not None:
            load_into(model, restart)
        seen.append((before, model.weight.detach().clone()))
    return seen


def linear(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(4, 1, bias=False).to(dtype)


@pytest.mark.parametrize(
    ("switch", "start", "switched"),
    [
        (5, 0, (5, 10, 15, 20, 25, 30)),  # hare and tortoise
        ("epoch", 0, (8, 16, 24)),  # Switch EMA
        ("2 epochs", 0, (16,)),
        (5, 12, (15, 20, 25, 30)),
        ("20%", 0, (6, 12, 18, 24, 30)),
    ],
)
@pytest.mark.parametrize("every", [1, 2])
def test_against_float64(switch, start, switched, every):
    averager = EMA(0.8, every=every, start=start, switch=switch).prepare(total_steps=30)
    model = linear()
    seen = train_in_a_loop(averager, range(1, 31), model, torch.optim.SGD(model.parameters(), 0.2), lambda t: t / 8)
    # The same training in float64, written out.
    theta, ema, keep = linear().weight.detach().double(), None, 0.8**every
    for step, (before, after) in enumerate(seen, 1):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step)).double()
        error = x @ theta.T - x.sum(1, keepdim=True).sin()
        theta = theta - 0.2 * 2 * error.T @ x / 16
        torch.testing.assert_close(before.double(), theta, rtol=1e-5, atol=1e-6)
        if step % every == 0 and step >= start:
            ema = theta if ema is None else keep * ema + (1 - keep) * theta
        if step in switched:
            theta = ema
        torch.testing.assert_close(after.double(), theta, rtol=1e-5, atol=1e-6)
        assert (step in switched) == (not torch.equal(before, after))
    torch.testing.assert_close(averager.average()["weight"].double(), ema, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_holds_the_average_and_the_moments_stay(dtype):
    averager, model = EMA(0.8, switch=7), linear(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    train_in_a_loop(averager, range(1, 7), model, optimizer)
    twin, other = copy.deepcopy(model), copy.deepcopy(averager)
    fork = torch.optim.AdamW(twin.parameters(), 0.05)
    fork.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.switch = None
    train_in_a_loop(averager, [7], model, optimizer)
    train_in_a_loop(other, [7], twin, fork)
    assert torch.equal(model.weight, averager.average()["weight"].to(dtype))
    assert not torch.equal(model.weight, twin.weight)
    assert torch.equal(averager.average()["weight"], other.average()["weight"])
    (moments,), (expected,) = optimizer.state.values(), fork.state.values()
    assert all(torch.equal(moments[name], expected[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_nothing_is_written_back_twice_nor_before_the_start():
    averager, model = EMA(0.8, switch=3, start=4), linear()
    returned = [averager.update(model, step) is not None for step in (1, 2, 3, 3, 4, 5, 6, 6, 7, 11, 11)]
    assert returned == [False] * 6 + [True, False, False, True, False]


# ---------------------------------------------------------------------- in the trainers


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("switch", "precision"), [(3, "mixed"), ("epoch", "bfloat16")])
def test_transformers(switch, precision, tmp_path):
    transformers = pytest.importorskip("transformers")
    from averaging.transformers import AveragingCallback

    class Recorder(transformers.TrainerCallback):
        def __init__(self):
            self.weights = {}

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.weights[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters()}

    def run(folder, resume=None):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        if precision == "bfloat16":
            model.to(torch.bfloat16)
        tokens = torch.randint(0, 16, (32, 6), generator=torch.Generator().manual_seed(1))
        ema, lawa = EMA(0.8, switch=switch), LAWA(k=2, every=2)
        before, after = Recorder(), Recorder()
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=str(folder), max_steps=12, per_device_train_batch_size=4, save_steps=3,
                gradient_accumulation_steps=2, learning_rate=1e-2, lr_scheduler_type="constant", report_to="none",
                use_cpu=True, bf16=precision == "mixed", disable_tqdm=True, logging_steps=100, seed=1,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
            callbacks=[before, AveragingCallback(ema, lawa), after],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return before.weights, after.weights, ema, lawa

    before, after, ema, lawa = run(tmp_path / "a")
    switched = {3: {3, 6, 9, 12}, "epoch": {4, 8, 12}, "0.35 epochs": {2, 3, 5, 6, 7, 9, 10, 12}}[switch]
    assert {t for t in after if not same(before[t], after[t])} == switched
    expected: dict[str, Any] = {}
    for t, weights in before.items():
        expected = {n: 0.8 * expected.get(n, w.double()) + 0.2 * w.double() for n, w in weights.items()}
        if t in switched:
            for name, tensor in after[t].items():
                assert tensor.dtype == (torch.bfloat16 if precision == "bfloat16" else torch.float32)
                torch.testing.assert_close(tensor, expected[name].to(tensor.dtype), rtol=1e-2, atol=1e-6)
    assert same(after[12], ema.average(rounded=True))
    snapshots = [after[10], after[12]]  # the other average absorbs what was written back
    for name, tensor in lawa.average().items():
        assert torch.equal(tensor, torch.stack([s[name].double() for s in snapshots]).mean(0).float())
    for cut in (3, 6):
        *_, again, ema_again, lawa_again = run(tmp_path / "a", resume=str(tmp_path / "a" / f"checkpoint-{cut}"))
        assert all(same(again[t], after[t]) for t in range(cut + 1, 13))
        assert same(ema_again.average(), ema.average())
        assert same(lawa_again.average(), lawa.average())


@pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create",
    "ignore:.*resuming from a checkpoint that ended before the epoch ended",
)
@pytest.mark.parametrize(("switch", "precision"), [(3, "bf16-true"), ("epoch", "bf16-mixed"), ("0.35 epochs", "32")])
def test_lightning(switch, precision, tmp_path: Path):
    lightning = pytest.importorskip("lightning.pytorch")
    from averaging.lightning import EMA as Callback

    class Regression(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))

        def training_step(self, _, batch_idx):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * self.current_epoch + batch_idx))
            x = x.to(self.net[0].weight.dtype)
            return (self.net(x) - x.sum(1, keepdim=True).sin()).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.05)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(range(8))

    class Recorder(lightning.Callback):
        def __init__(self):
            self.weights = {}

        def on_train_batch_end(self, trainer, module, *_):
            weights = {n: p.detach().clone() for n, p in module.named_parameters()}
            known = self.weights.setdefault(trainer.global_step, weights)
            # Listed after the average, it sees no change while gradients are accumulated.
            assert trainer.callbacks[0] is self or same(known, weights)

    def run(folder, resume=None):
        before, average, after, module = Recorder(), Callback(0.8, switch=switch), Recorder(), Regression()
        lightning.Trainer(
            accelerator="cpu", max_epochs=3, precision=precision, accumulate_grad_batches=2, default_root_dir=folder,
            callbacks=[before, average, after, lightning.callbacks.ModelCheckpoint(
                folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
            logger=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(module, ckpt_path=resume)  # fmt: skip
        return before.weights, after.weights, average.averager

    before, after, ema = run(tmp_path)
    switched = {3: {3, 6, 9, 12}, "epoch": {4, 8, 12}, "0.35 epochs": {2, 3, 5, 6, 7, 9, 10, 12}}[switch]
    assert {t for t in after if not same(before[t], after[t])} == switched
    assert same(after[12], ema.average(rounded=True))
    for cut in (2, 3, 4, 7):
        _, again, other = run(tmp_path, tmp_path / f"step={cut}.ckpt")
        assert all(same(again[t], after[t]) for t in range(cut + 1, 13))
        assert same(other.average(), ema.average())


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
