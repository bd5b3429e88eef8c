"""What averaging adds to the time of training: two models under both trainers, as ratios of runs in turn.

    pip install -e '.[dev]'
    python scripts/bench/overhead.py [--steps 40] [--repeats 9]

Each repeat trains the same model afresh without an average, with an EMA that absorbs after every step, with LAWA (5
snapshots, one every 10 steps, in CPU memory), and once more without an average, which shows how far the ratios can be
trusted. Counted is the time from the end of the fifth step to the end of the last. A ratio is that of a run to the
mean of the two runs without an average in the same repeat; printed are the median and the quartiles over repeats.
On a machine that is shared these say little about a per cent; so beside them stands the share of that time which was
spent in the callback's offer of the weights, where all absorptions happen.

    text     a byte-level Llama of 4.9 million parameters, batches of 16 × 128 bytes
    image    a residual convolutional network of 1.2 million parameters on 8 × 8 digits, batches of 128
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads must not take a core from the next
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))  # for the data they share

import lightning
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import averaging.lightning
import averaging.transformers
from common import digits, text

SKIPPED = 5


def watch(callback: Any) -> list[tuple[float, float]]:
    """When each of the ``callback``'s offers of weights began and ended, from now on."""
    offers: list[tuple[float, float]] = []
    offer = callback.offer

    def timed(*args: Any) -> None:
        began = time.perf_counter()
        offer(*args)
        offers.append((began, time.perf_counter()))

    callback.offer = timed
    return offers


class Image(nn.Module):
    """A residual convolutional network."""

    def __init__(self, width: int = 128, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.stem(pixels.view(-1, 1, 8, 8))
        for block in self.blocks:
            x = x + block(x)
        return {"loss": nn.functional.cross_entropy(self.head(x.mean((2, 3))), labels)}


def image() -> tuple[nn.Module, list[dict[str, Tensor]], int]:
    """Model, examples and batch size."""
    torch.manual_seed(0)
    return Image(), [{"pixels": pixels, "labels": label} for pixels, label in digits.digits()[0]], 128


def language() -> tuple[nn.Module, list[dict[str, Tensor]], int]:
    """Model, examples and batch size."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config), text.examples(text.library_source()[0]), 16


class HuggingFaceClock(transformers.TrainerCallback):
    """When each step was over; listed after the average."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


class LightningClock(lightning.Callback):
    """When each step was over; listed after the average."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


class Module(lightning.LightningModule):
    """Any model whose output has a loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch)["loss"]
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def in_transformers(build: Callable[[], Any], callback: Any, steps: int, folder: str) -> list[float]:
    model, examples, batch = build()
    clock = HuggingFaceClock()
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-3,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    callbacks = [callback, clock] if callback else [clock]
    trainer = transformers.Trainer(model, arguments, train_dataset=examples, callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return clock.times


def in_lightning(build: Callable[[], Any], callback: Any, steps: int, folder: str) -> list[float]:
    model, examples, batch = build()
    clock = LightningClock()
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback, clock] if callback else [clock],
    )
    trainer.fit(Module(model), DataLoader(examples, batch, shuffle=True))  # type: ignore[arg-type]
    return clock.times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainers = {
        "transformers": (in_transformers, averaging.transformers),
        "Lightning": (in_lightning, averaging.lightning),
    }
    models: dict[str, Callable[[], Any]] = {"text": language, "image": image}
    bar = tqdm(total=len(trainers) * len(models) * options.repeats * 4 * options.steps, unit="step", desc="overhead")
    print(f"torch {torch.__version__}, {options.repeats} repeats of {options.steps} steps\n")
    print("| model | trainer | ms per step | average | × without | quartiles | in the callback |")
    print("|---|---|---:|---|---:|---:|---:|")
    for model, build in models.items():
        for trainer, (train, adapter) in trainers.items():
            contenders: dict[str, Callable[[], Any]] = {
                "before": lambda: None,
                "EMA": lambda adapter=adapter: adapter.EMA(0.999),
                "LAWA": lambda adapter=adapter: adapter.LAWA(5, every=10),
                "after": lambda: None,
            }
            ratios: dict[str, list[float]] = {"EMA": [], "LAWA": [], "none, again": []}
            shares: dict[str, list[float]] = {name: [] for name in ratios}
            milliseconds = []
            for _ in range(options.repeats):
                taken = {}
                for name, make in contenders.items():
                    offers = watch(callback) if (callback := make()) else []
                    with tempfile.TemporaryDirectory() as folder:
                        times = train(build, callback, options.steps, folder)
                    begin, end = times[SKIPPED - 1], times[-1]
                    taken[name] = end - begin
                    if offers:
                        inside = sum(stop - start for start, stop in offers if begin <= start <= end)
                        shares[name].append(inside / (end - begin))
                    bar.update(options.steps)
                without = (taken["before"] + taken["after"]) / 2
                milliseconds.append(without / (options.steps - SKIPPED) * 1e3)
                ratios["EMA"].append(taken["EMA"] / without)
                ratios["LAWA"].append(taken["LAWA"] / without)
                ratios["none, again"].append(taken["after"] / taken["before"])
            for name, values in ratios.items():
                low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
                step = statistics.median(milliseconds)
                share = f"{statistics.median(shares[name]):.2%}" if shares[name] else ""
                row = f"| {model} | {trainer} | {step:.0f} | {name} | {middle:.3f} | {low:.3f} – {high:.3f} | {share} |"
                print(row, flush=True)
    bar.close()


if __name__ == "__main__":
    main()
