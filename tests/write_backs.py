"""Small runs with averagers that write into the model, recorded before and after each write-back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from averaging import named_weights
from averaging.averager import Averager

IGNORED_OF_LIGHTNING = (
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create",
    "ignore:.*resuming from a checkpoint that ended before the epoch ended",
)


class Recorded(NamedTuple):
    """The weights before training, and those before and after the callbacks of each optimizer step.

    Of the optimizer ``states`` holds after each step for how many parameters it has moments.
    """

    initial: dict[str, torch.Tensor]
    before: dict[int, dict[str, torch.Tensor]]
    after: dict[int, dict[str, torch.Tensor]]
    states: dict[int, int]
    model: nn.Module

    @property
    def written(self) -> set[int]:
        """The steps after which the model was written to."""
        return {step for step in self.after if not same(self.before[step], self.after[step])}


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def clone(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in named_weights(model).items()}


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 1, bias=False).to(dtype)


def with_transformers(
    folder: Path, callbacks: Sequence[Any], resume: str | None = None, lora: bool = False, precision: str = "float32"
) -> Recorded:
    """12 steps, 4 to an epoch, with gradients accumulated and a checkpoint after each."""
    transformers = pytest.importorskip("transformers")

    class Recorder(transformers.TrainerCallback):
        def __init__(self):
            self.weights, self.states = {}, {}

        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            self.weights[state.global_step] = clone(model)
            self.states[state.global_step] = len(optimizer.state)

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    if precision == "bfloat16":
        model.to(torch.bfloat16)
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    initial, before, after = clone(model), Recorder(), Recorder()
    tokens = torch.randint(0, 16, (32, 6), generator=torch.Generator().manual_seed(1))
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder), max_steps=12, per_device_train_batch_size=4, save_steps=1,
            gradient_accumulation_steps=2, learning_rate=1e-2, lr_scheduler_type="constant", report_to="none",
            use_cpu=True, bf16=precision == "mixed", disable_tqdm=True, logging_steps=100, seed=1,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=[before, *callbacks, after],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return Recorded(initial, before.weights, after.weights, after.states, trainer.model)


def with_lightning(folder: Path, callback: Any, resume: Path | None = None, precision: str = "32") -> Recorded:
    """12 steps, 4 to an epoch, with gradients accumulated and a checkpoint after each."""
    lightning = pytest.importorskip("lightning.pytorch")

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
            self.weights, self.states = {}, {}

        def on_train_batch_end(self, trainer, module, *_):
            step, weights = trainer.global_step, clone(module)
            known = self.weights.setdefault(step, weights)
            # Listed after the average, it sees no change while gradients are accumulated.
            assert trainer.callbacks[0] is self or same(known, weights)
            self.states.setdefault(step, len(trainer.optimizers[0].state))

    before, after, module = Recorder(), Recorder(), Regression()
    initial = clone(module)
    lightning.Trainer(
        accelerator="cpu", max_epochs=3, precision=precision, accumulate_grad_batches=2, default_root_dir=folder,
        callbacks=[before, callback, after, lightning.callbacks.ModelCheckpoint(
            folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, ckpt_path=resume)  # fmt: skip
    before.weights.pop(0, None), after.weights.pop(0, None), after.states.pop(0, None)
    return Recorded(initial, before.weights, after.weights, after.states, module)


def offers_while_accumulating(averager: Averager) -> list[int]:
    """The steps after which a loop that offers the weights after each batch is told to go on from others."""
    model = linear()
    averager.update(model, 0, epoch=0.0)
    offers = [(0, 0.5), (1, 0.9), (1, 1.0), (1, 1.1), (2, 1.4), (2, 2.1), (3, 2.2), (3, 2.2), (3, 2.9), (4, 3.0)]
    returned = [averager.update(model, step, epoch=epoch) is not None for step, epoch in offers]
    return [step for (step, _), restart in zip(offers, returned, strict=True) if restart]
