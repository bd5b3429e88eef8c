"""Elastic Reset against float64, in a loop and in both trainers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from averaging import EMA, ElasticReset, load_into


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check(before, after, initial, resets, decay, dtype=torch.float32, tolerance=1e-6) -> None:
    """The weights after each optimizer step, before and after the callback, are those of Elastic Reset in float64."""
    assert {t for t in after if not same(before[t], after[t])} == set(resets)
    start = {n: w.double() for n, w in initial.items()}
    ema = start
    for t, weights in before.items():
        ema = {n: decay * ema[n] + (1 - decay) * w.double() for n, w in weights.items()}
        if t in resets:
            for name, tensor in after[t].items():
                assert tensor.dtype == dtype
                torch.testing.assert_close(tensor, ema[name].to(dtype), rtol=tolerance, atol=tolerance)
            ema = start


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 1, bias=False)


@pytest.mark.parametrize(
    ("every", "start", "resets"),
    [(7, 0, (7, 14, 21, 28)), ("epoch", 0, (8, 16, 24)), ("20%", 0, (6, 12, 18, 24, 30)), (5, 5, (10, 15, 20, 25, 30))],
)
def test_a_loop_against_float64(every, start, resets):
    averager = ElasticReset(every, 0.8, start=start).prepare(total_steps=30)
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    averager.update(model, 0, epoch=0.0)
    theta = linear().weight.detach().double()
    initial, ema = (theta, theta) if start == 0 else (None, None)
    for step in range(1, 31):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        (model(x) - x.sum(1, keepdim=True).sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if (restart := averager.update(model, step, epoch=step / 8)) is not None:
            load_into(model, restart)
        x = x.double()
        theta = theta - 0.2 * 2 * (x @ theta.T - x.sum(1, keepdim=True).sin()).T @ x / 16
        if initial is None and step == start:
            initial = ema = theta
        elif ema is not None:
            ema = 0.8 * ema + 0.2 * theta
            if step in resets:
                theta, ema = ema, initial
        assert (restart is not None) == (step in resets)
        torch.testing.assert_close(model.weight.detach().double(), theta, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(averager.average()["weight"].double(), ema, rtol=1e-5, atol=1e-6)


def test_never_between_optimizer_steps():
    """Lightning offers the weights after each batch: epochs pass while gradients are accumulated."""
    averager, model = ElasticReset("1 epoch", 0.8), linear()
    averager.update(model, 0, epoch=0.0)
    offers = [(0, 0.5), (1, 0.9), (1, 1.0), (1, 1.1), (2, 1.4), (2, 2.1), (3, 2.2), (3, 2.2), (3, 2.9), (4, 3.0)]
    returned = [averager.update(model, step, epoch=epoch) is not None for step, epoch in offers]
    assert [step for (step, _), restart in zip(offers, returned, strict=True) if restart] == [2, 3, 4]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("every", "moments", "lora", "bf16"), [(3, "kept", True, False), ("epoch", "reset", False, True)]
)
def test_transformers(every, moments, lora, bf16, tmp_path):
    transformers = pytest.importorskip("transformers")
    from averaging import named_weights
    from averaging.transformers import AveragingCallback
    from averaging.transformers import ElasticReset as Callback

    assert Callback(5).averager.decay == 0.995

    class Recorder(transformers.TrainerCallback):
        def __init__(self):
            self.weights, self.states = {}, {}

        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            self.weights[state.global_step] = {n: w.clone() for n, w in named_weights(model).items()}
            self.states[state.global_step] = len(optimizer.state)

    def run(folder, resume=None):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        if bf16:
            model.to(torch.bfloat16)
        if lora:
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        initial = {n: w.clone() for n, w in named_weights(model).items()}
        tokens = torch.randint(0, 16, (32, 6), generator=torch.Generator().manual_seed(1))
        averager, ema = ElasticReset(every, 0.8, moments=moments), EMA(0.5)
        before, after = Recorder(), Recorder()
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=str(folder), max_steps=12, per_device_train_batch_size=4, save_steps=1,
                gradient_accumulation_steps=2, learning_rate=1e-2, lr_scheduler_type="constant", report_to="none",
                use_cpu=True, disable_tqdm=True, logging_steps=100, seed=1,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
            callbacks=[before, AveragingCallback(averager), AveragingCallback(ema), after],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return initial, before, after, averager, ema, trainer

    initial, before, after, averager, ema, trainer = run(tmp_path)
    resets = {3, 6, 9, 12} if every == 3 else {4, 8, 12}
    dtype = torch.bfloat16 if bf16 else torch.float32
    check(before.weights, after.weights, initial, resets, 0.8, dtype, 1e-2 if bf16 else 1e-6)
    assert {t for t, count in after.states.items() if not count} == (resets if moments == "reset" else set())
    assert same(named_weights(trainer.model), ema.average(rounded=True))  # the EMA leads, and saw the resets
    expected: dict[str, torch.Tensor] = {}
    for weights in after.weights.values():
        expected = {n: 0.5 * expected.get(n, w.double()) + 0.5 * w.double() for n, w in weights.items()}
    for name, tensor in ema.average().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    for cut in (2, 4, 9):
        _, _, again, other, *_ = run(tmp_path, resume=str(tmp_path / f"checkpoint-{cut}"))
        assert all(same(again.weights[t], after.weights[t]) for t in range(cut + 1, 13))
        assert same(other.average(), averager.average())


@pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create",
    "ignore:.*resuming from a checkpoint that ended before the epoch ended",
)
@pytest.mark.parametrize(("every", "moments"), [(3, "reset"), ("epoch", "kept")])
def test_lightning(every, moments, tmp_path: Path):
    lightning = pytest.importorskip("lightning.pytorch")
    from averaging.lightning import ElasticReset as Callback

    class Regression(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))

        def training_step(self, _, batch_idx):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * self.current_epoch + batch_idx))
            return (self.net(x) - x.sum(1, keepdim=True).sin()).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.05)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(range(8))

    class Recorder(lightning.Callback):
        def __init__(self):
            self.weights, self.states = {}, {}

        def on_train_batch_end(self, trainer, module, *_):
            step = trainer.global_step
            if step and step not in self.weights:
                self.weights[step] = {n: p.detach().clone() for n, p in module.named_parameters()}
                self.states[step] = len(trainer.optimizers[0].state)

    def run(folder, resume=None):
        before, callback, after, module = Recorder(), Callback(every, 0.8, moments=moments), Recorder(), Regression()
        initial = {n: p.detach().clone() for n, p in module.named_parameters()}
        lightning.Trainer(
            accelerator="cpu", max_epochs=3, accumulate_grad_batches=2, default_root_dir=folder,
            callbacks=[before, callback, after, lightning.callbacks.ModelCheckpoint(
                folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
            logger=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(module, ckpt_path=resume)  # fmt: skip
        assert same(after.weights[12], dict(module.named_parameters()))  # the model keeps what was trained
        return initial, before, after, callback.averager

    initial, before, after, averager = run(tmp_path)
    resets = {3, 6, 9, 12} if every == 3 else {4, 8, 12}
    check(before.weights, after.weights, initial, resets, 0.8)
    assert {t for t, count in after.states.items() if not count} == (resets if moments == "reset" else set())
    for cut in (2, 3, 8):
        _, _, again, other = run(tmp_path, tmp_path / f"step={cut}.ckpt")
        assert all(same(again.weights[t], after.weights[t]) for t in range(cut + 1, 13))
        assert same(other.average(), averager.average())
