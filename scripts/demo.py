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
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import averaging.lightning
import averaging.transformers
from averaging import EMA, LAWA, applied
from common import digits, report, text

STEPS, OUT = report.arguments(__doc__, steps=800)
K = 5
EVERY = max(1, STEPS // 40)  # steps between LAWA's snapshots, and between checkpoints
EVALUATE_EVERY = max(1, STEPS // 20)


@dataclass
class Curves:
    """Losses on held-out data against optimizer steps, and a progress bar that shows the latest."""

    title: str
    unit: str
    steps: list[int] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=lambda: {"online": [], "LAWA": [], "EMA": []})

    @cached_property
    def bar(self) -> Any:
        # Made at the first step, below what the averagers log when training starts.
        return tqdm(total=STEPS, desc=self.title, unit="step", leave=True, dynamic_ncols=True, mininterval=0.5)

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


class TransformerCurves(transformers.TrainerCallback):
    """Records what Trainer evaluated (online and LAWA), and evaluates the EMA on the same data."""

    def __init__(self, curves: Curves, ema: EMA, held_out: Tensor) -> None:
        self.curves, self.ema, self.held_out = curves, ema, held_out

    def on_step_end(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        self.curves.show_step(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, *, model: Any, metrics: Any, **kwargs: Any) -> None:
        with applied(model, self.ema):
            ema = text.loss(model, self.held_out)
        self.curves.add(state.global_step, online=metrics["eval_online_loss"], LAWA=metrics["eval_loss"], EMA=ema)


def train_transformer(out: Path) -> tuple[Curves, int]:
    """Train, soup the last checkpoints, compare; returns the curves and how many tensors were compared."""
    torch.set_num_threads(2)
    held_out = text.library_source()[1]
    curves = Curves("transformer", "nats per byte")
    lawa, ema = averagers()
    trainer = text.trainer(
        text.transformer(),
        out,
        callbacks=[
            averaging.transformers.AveragingCallback(lawa, ema, evaluate="both"),
            TransformerCurves(curves, ema, held_out),
        ],
        max_steps=STEPS,
        eval_strategy="steps",
        eval_steps=EVALUATE_EVERY,
        save_strategy="steps",
        save_steps=EVERY,
        save_total_limit=K,
    )
    trainer.train()
    curves.bar.close()

    soup(out, "--last", str(K), "-o", out / "soup")
    last = out / f"checkpoint-{STEPS}"
    equal = require_equal(
        load_file(out / "soup" / "model.safetensors"), load_file(last / lawa.name / "model.safetensors")
    )
    return curves, equal


# ---------------------------------------------------------------- 2: Lightning, handwritten digits


class LightningCurves(lightning.Callback):
    """Records what Lightning validated (online and LAWA), and evaluates the EMA on the same data."""

    def __init__(self, curves: Curves, ema: EMA, held_out: list[Tensor]) -> None:
        self.curves, self.ema, self.held_out = curves, ema, held_out

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        self.curves.show_step(trainer.global_step)

    @torch.no_grad()
    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, digits.Classifier)
        with applied(pl_module, self.ema):
            ema = pl_module.loss(self.held_out).item()
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.curves.add(trainer.global_step, online=metrics["online_val_loss"], LAWA=metrics["val_loss"], EMA=ema)


def train_classifier(out: Path) -> tuple[Curves, int]:
    """Train, soup the last checkpoints, compare; returns the curves and how many tensors were compared."""
    torch.set_num_threads(1)  # too small a model to share out
    lightning.seed_everything(0, verbose=False)
    held_out = digits.digits()[1]
    curves = Curves("classifier", "nats per digit")
    lawa, ema = averagers()
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(
        out, every_n_train_steps=EVERY, monitor="step", mode="max", save_top_k=K, filename="{step}"
    )
    trainer = digits.trainer(
        STEPS,
        callbacks=[
            averaging.lightning.AveragingCallback(lawa, ema, evaluate="both"),
            LightningCurves(curves, ema, list(held_out.tensors)),
            checkpoints,
        ],
        val_check_interval=EVALUATE_EVERY,
        enable_checkpointing=True,
    )
    trainer.fit(digits.Classifier(), *digits.loaders())
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
    rows = []
    for run in runs:
        online, lawa, ema = (losses[-1] for losses in run.losses.values())
        rows.append((run.title, online, lawa, ema, online - lawa, run.unit))
    return report.table(["held-out loss", "online", "LAWA", "EMA", "gain", ""], rows)


def main() -> None:
    started = time.monotonic()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    shutil.rmtree(OUT, ignore_errors=True)
    transformer, equal_there = train_transformer(OUT / "transformer")
    classifier, equal_here = train_classifier(OUT / "classifier")
    print(f"\nsoup = LAWA, bit for bit: {equal_there} tensors of the transformer, {equal_here} of the classifier\n")
    print(table([transformer, classifier]))
    print()
    panels = [report.Panel(r.title, f"held-out loss ({r.unit})", r.steps, r.losses) for r in (transformer, classifier)]
    report.plot(OUT / "loss.png", *panels)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
