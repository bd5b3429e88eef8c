"""The demo: two small models at a constant learning rate, with LAWA while they train and a soup afterwards.

1. A byte-level transformer on the source of Python's standard library, with `transformers.Trainer`.
2. A classifier of scikit-learn's digits, with Lightning.

The online weights, LAWA and an EMA are evaluated side by side. Then the command `soup` averages the saved
checkpoints, and must give the very bits that LAWA gave during training. Everything is written to runs/demo.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from matplotlib.figure import Figure
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import averaging.lightning
import averaging.transformers
from averaging import EMA, LAWA, applied

OUT = Path("runs/demo")
K = 5
STEPS = 800
EVERY = 20  # steps between LAWA's snapshots, and between checkpoints
EVALUATE_EVERY = 40


@dataclass
class Curves:
    """Losses on held-out data against optimizer steps, and a progress bar that shows the latest."""

    title: str
    unit: str
    steps: list[int] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=lambda: {"online": [], "LAWA": [], "EMA": []})

    def __post_init__(self) -> None:
        self.bar = tqdm(total=STEPS, desc=self.title, unit="step", leave=True, dynamic_ncols=True, mininterval=0.5)

    def show_step(self, step: int) -> None:
        self.bar.update(step - self.bar.n)

    def add(self, step: int, **losses: float) -> None:
        self.steps.append(step)
        for name, loss in losses.items():
            self.losses[name].append(loss)
        self.bar.set_postfix_str(", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))


def averagers() -> tuple[LAWA, EMA]:
    """LAWA, and an EMA whose snapshots have the same mean age."""
    return LAWA(k=K, every=EVERY), EMA(window=K * EVERY, warmup="debias")


# ---------------------------------------------------------------- 1: transformers.Trainer, Python's own source

CONTEXT = 128


def library_source() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library in rows of CONTEXT, from files to train on and from others held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    rows = []
    for part in ([f for i, f in enumerate(files) if i % 10], files[::10]):
        data = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in part)), dtype=torch.uint8)
        rows.append(data[: len(data) // CONTEXT * CONTEXT].view(-1, CONTEXT).long())
    train, held_out = rows
    return train, held_out[torch.linspace(0, len(held_out) - 1, 96).long()]


def examples(rows: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in rows]


class TransformerCurves(transformers.TrainerCallback):
    """Records what Trainer evaluated (online and LAWA), and evaluates the EMA on the same data."""

    def __init__(self, curves: Curves, ema: EMA, held_out: Tensor) -> None:
        self.curves, self.ema, self.held_out = curves, ema, held_out

    def on_step_end(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        self.curves.show_step(state.global_step)

    @torch.no_grad()
    def on_evaluate(self, args: Any, state: Any, control: Any, *, model: Any, metrics: Any, **kwargs: Any) -> None:
        model.eval()
        with applied(model, self.ema):
            ema = model(input_ids=self.held_out, labels=self.held_out).loss.item()
        self.curves.add(state.global_step, online=metrics["eval_online_loss"], LAWA=metrics["eval_loss"], EMA=ema)


def train_transformer(out: Path) -> tuple[Curves, int]:
    """Train, soup the last checkpoints, compare; returns the curves and how many tensors were compared."""
    torch.set_num_threads(2)
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    train, held_out = library_source()
    curves = Curves("transformer", "nats per byte")
    lawa, ema = averagers()
    trainer = transformers.Trainer(
        transformers.LlamaForCausalLM(config),
        transformers.TrainingArguments(
            output_dir=str(out),
            max_steps=STEPS,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=len(held_out),
            learning_rate=2e-3,
            lr_scheduler_type="constant",
            eval_strategy="steps",
            eval_steps=EVALUATE_EVERY,
            save_steps=EVERY,
            save_total_limit=K,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=0,
        ),
        train_dataset=examples(train),
        eval_dataset=examples(held_out),
        callbacks=[
            averaging.transformers.AveragingCallback(lawa, ema, evaluate="both"),
            TransformerCurves(curves, ema, held_out),
        ],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    curves.bar.close()

    soup(out, "--last", str(K), "-o", out / "soup")
    last = out / f"checkpoint-{STEPS}"
    equal = require_equal(
        load_file(out / "soup" / "model.safetensors"), load_file(last / lawa.name / "model.safetensors")
    )
    return curves, equal


# ---------------------------------------------------------------- 2: Lightning, handwritten digits


class Classifier(lightning.LightningModule):
    """A multilayer perceptron for 8 × 8 pixels."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width),
            nn.LayerNorm(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.ReLU(),
            nn.Linear(width, 10),
        )

    def loss(self, batch: list[Tensor]) -> Tensor:
        pixels, digit = batch
        return cross_entropy(self.net(pixels), digit)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class LightningCurves(lightning.Callback):
    """Records what Lightning validated (online and LAWA), and evaluates the EMA on the same data."""

    def __init__(self, curves: Curves, ema: EMA, held_out: list[Tensor]) -> None:
        self.curves, self.ema, self.held_out = curves, ema, held_out

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        self.curves.show_step(trainer.global_step)

    @torch.no_grad()
    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        with applied(pl_module, self.ema):
            ema = pl_module.loss(self.held_out).item()
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.curves.add(trainer.global_step, online=metrics["online_val_loss"], LAWA=metrics["val_loss"], EMA=ema)


def train_classifier(out: Path) -> tuple[Curves, int]:
    """Train, soup the last checkpoints, compare; returns the curves and how many tensors were compared."""
    torch.set_num_threads(1)  # too small a model to share out
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    pixels = (torch.tensor(digits.data, dtype=torch.float32) / 16)[order]
    labels = torch.tensor(digits.target)[order]
    train, held_out = TensorDataset(pixels[600:], labels[600:]), TensorDataset(pixels[:600], labels[:600])
    curves = Curves("classifier", "nats per digit")
    lawa, ema = averagers()
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(
        out, every_n_train_steps=EVERY, monitor="step", mode="max", save_top_k=K, filename="{step}"
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        val_check_interval=EVALUATE_EVERY,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            averaging.lightning.AveragingCallback(lawa, ema, evaluate="both"),
            LightningCurves(curves, ema, list(held_out.tensors)),
            checkpoints,
        ],
    )
    trainer.fit(Classifier(), DataLoader(train, 32, shuffle=True), DataLoader(held_out, len(held_out)))
    curves.bar.close()

    soup(out, "--last", str(K), "-o", out / "soup.safetensors")
    equal = require_equal(
        load_file(out / "soup.safetensors"), averaging.lightning.load_average(checkpoints.best_model_path)
    )
    return curves, equal


# ---------------------------------------------------------------- the soup, and what came of it


def soup(*arguments: str | Path) -> None:
    """Run the command ``soup`` as it is run in a shell."""
    words = [str(argument) for argument in arguments]
    print("$ soup", *words, flush=True)
    subprocess.run([str(Path(sys.executable).with_name("soup")), *words], check=True)


def require_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> int:
    """Exit unless both hold the same tensors, bit for bit; returns how many."""
    if ours.keys() != theirs.keys():
        sys.exit(f"FAILED: only in the soup or only in LAWA: {', '.join(sorted(ours.keys() ^ theirs.keys()))}")
    for name, tensor in ours.items():
        other = theirs[name]
        if tensor.dtype != other.dtype or not torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)):
            sys.exit(f"FAILED: {name!r} in the soup differs from the average that LAWA kept during training")
    return len(ours)


def table(runs: list[Curves]) -> str:
    """The losses at the end of training."""
    lines = [f"{'held-out loss':<14}{'online':>9}{'LAWA':>9}{'EMA':>9}{'gain':>9}"]
    for run in runs:
        online, lawa, ema = (losses[-1] for losses in run.losses.values())
        lines.append(f"{run.title:<14}{online:>9.4f}{lawa:>9.4f}{ema:>9.4f}{online - lawa:>9.4f}  {run.unit}")
    return "\n".join(lines)


COLOURS = {"online": "#9aa0a6", "LAWA": "#0b6e99", "EMA": "#d9730d"}


def plot(runs: list[Curves], file: Path) -> None:
    """Loss against step, one panel a model."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(runs))
    for panel, run in zip(panels, runs, strict=True):
        for name, losses in run.losses.items():
            panel.plot(run.steps, losses, label=name, color=COLOURS[name], linewidth=1.8)
        panel.set(title=run.title, xlabel="optimizer steps", ylabel=f"held-out loss ({run.unit})")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    panels[0].legend(frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    started = time.monotonic()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    shutil.rmtree(OUT, ignore_errors=True)
    transformer, equal_there = train_transformer(OUT / "transformer")
    classifier, equal_here = train_classifier(OUT / "classifier")
    plot([transformer, classifier], OUT / "loss.png")
    print(f"\nsoup = LAWA, bit for bit: {equal_there} tensors of the transformer, {equal_here} of the classifier\n")
    print(table([transformer, classifier]))
    print(f"\nplot: {OUT / 'loss.png'} ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main()
