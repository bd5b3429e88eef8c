"""A small classifier of handwritten digits, scikit-learn's 1797 pictures of 8 × 8 pixels."""

from __future__ import annotations

import logging
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Pictures and labels: to train on, and 600 held out; always the same ones."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    pixels = (torch.tensor(data.data, dtype=torch.float32) / 16)[order]
    labels = torch.tensor(data.target)[order]
    return TensorDataset(pixels[600:], labels[600:]), TensorDataset(pixels[:600], labels[:600])


class Classifier(lightning.LightningModule):
    """A multilayer perceptron.

    Args:
        norm: the normalisation layer.
        lr: AdamW's learning rate, which stays constant.
        noise: what is added to the pixels (of 0 to 1) in training, so that there is always something to learn.
        width: of the hidden layers.
    """

    def __init__(
        self, norm: type[nn.Module] = nn.LayerNorm, lr: float = 1e-2, noise: float = 0.3, width: int = 128
    ) -> None:
        super().__init__()
        self.lr, self.noise = lr, noise
        self.net = nn.Sequential(
            nn.Linear(64, width),
            norm(width),
            nn.ReLU(),
            nn.Linear(width, width),
            norm(width),
            nn.ReLU(),
            nn.Linear(width, 10),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(pixels)

    def loss(self, batch: list[Tensor]) -> Tensor:
        pixels, digit = batch
        return cross_entropy(self(pixels), digit)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        pixels, digit = batch
        if self.noise:
            pixels = pixels + self.noise * torch.randn_like(pixels)
        return self.loss([pixels, digit])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pixels, digit = batch
        logits = self(pixels)
        self.log("val_loss", cross_entropy(logits, digit))
        self.log("val_accuracy", (logits.argmax(1) == digit).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class History(lightning.Callback):
    """Optimizer steps and metrics of every validation; to be listed after the averaging callback."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.metrics: list[dict[str, float]] = []

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.steps.append(trainer.global_step)
        self.metrics.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    def curves(self, metrics: dict[str, str]) -> dict[str, list[float]]:
        """The values of some metrics under other names: title → metric."""
        return {title: [values[metric] for values in self.metrics] for title, metric in metrics.items()}


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Batches of 32 to train on, and the held-out digits in one batch."""
    train, held_out = digits()
    return DataLoader(train, 32, shuffle=True), DataLoader(held_out, len(held_out))


def trainer(steps: int, callbacks: list[lightning.Callback], **options: Any) -> lightning.Trainer:
    """A quiet Trainer for ``steps`` optimizer steps that validates ten times; ``options`` are its own."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    defaults = {
        "accelerator": "cpu",
        "max_steps": steps,
        "val_check_interval": max(1, steps // 10),
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return lightning.Trainer(callbacks=callbacks, **{**defaults, **options})
