"""Small runs under DistributedDataParallel, in every kind of loop; each records what it trained and averaged."""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from averaging import (
    EMA,
    LAWA,
    SWAD,
    ElasticReset,
    EMAAnchor,
    Reference,
    applied,
    load_into,
    named_weights,
    recalibrate,
)
from averaging.averager import Averager

STEPS, ACCUMULATE, BATCH, CUT = 10, 2, 4, 3
"""Optimizer steps, batches to each, rows to a batch, and the step (within LAWA's spacing) to resume from."""


def averagers(folder: Path) -> tuple[LAWA, EMA]:
    return LAWA(k=3, every=2, memory=folder / "ring"), EMA(0.8)


def data(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    return x, x.sum(1, keepdim=True).sin()


class Net(nn.Module):
    """Records which weights it was evaluated with, and the batches from which BatchNorm statistics were recomputed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm, self.outer = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)
        self.evaluated: list[torch.Tensor] = []
        self.collected: dict[float, list[torch.Tensor]] = {}

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        weight = self.inner.weight.detach()
        if self.norm.momentum is None:
            self.collected.setdefault(weight.double().sum().item(), []).append(x.detach().clone())
        elif not self.training and not (self.evaluated and torch.equal(self.evaluated[-1], weight)):
            self.evaluated.append(weight.clone())
        return {"loss": (self.outer(self.norm(self.inner(x)).tanh()) - y).square().mean()}


def clone(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in named_weights(model).items()}


def result(net: Net, seen: dict[int, Any], *kept: Averager) -> dict[str, Any]:
    """What a run did, in what `torch.load` reads."""
    averages = {a.name: {n: t.clone() for n, t in a.average().items()} for a in kept}
    rows = net.collected.get(net.inner.weight.detach().double().sum().item(), [])
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return {"seen": seen, "averages": averages, "final": state, "evaluated": net.evaluated, "collected": rows}


# ---------------------------------------------------------------------- what must not happen


class Collectives(TorchDispatchMode):
    """Counts the collective operations called in this thread."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Collectives.count += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


def count_collectives() -> None:
    """Let `Averager.update` count those it calls."""
    update = Averager.update

    def counting(*args: Any, **kwargs: Any) -> Any:
        with Collectives():
            return update(*args, **kwargs)

    Averager.update = counting  # type: ignore[method-assign]


def collectives() -> tuple[int, int]:
    """How many the updates called; and one more, to see that they are counted."""
    counted = Collectives.count
    with Collectives():
        distributed.all_reduce(torch.zeros(1))
    return counted, Collectives.count - counted


def record_writes(below: Path) -> list[str]:
    """The folders made and moved from now on in the averages of checkpoints in ``below``."""
    written: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("os.mkdir", "os.rename") and str(below) in str(args[0]) and "averag" in str(args[0]):
            written.append(f"{event} {args[0]}")

    sys.addaudithook(hook)
    return written


# ---------------------------------------------------------------------- transformers


def with_transformers(folder: Path) -> dict[str, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from averaging.transformers import AveragingCallback

    logging.disable(logging.INFO)

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.weights: dict[int, Any] = {}

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.weights[state.global_step] = clone(model)

    def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
        return [{"x": x, "y": y} for x, y in zip(*data(count, seed), strict=True)]

    def run(
        output: Path, *callbacks: Any, resume: str | None = None, **options: Any
    ) -> tuple[Net, dict[str, Any], Trainer]:
        net, before, after = Net(), Recorder(), Recorder()
        arguments = TrainingArguments(
            output_dir=str(output), max_steps=STEPS, per_device_train_batch_size=BATCH, eval_steps=4,
            gradient_accumulation_steps=ACCUMULATE, learning_rate=0.05, lr_scheduler_type="constant", seed=1,
            report_to="none", use_cpu=True, ddp_backend="gloo", disable_tqdm=True, logging_steps=100,
            eval_strategy="steps", label_names=["y"], remove_unused_columns=False, **{"save_steps": CUT, **options},
        )  # fmt: skip
        trainer = Trainer(
            model=net, args=arguments, train_dataset=rows(64, 1), eval_dataset=rows(16, 2),
            callbacks=[before, *callbacks, after],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return net, {"before": before.weights, "after": after.weights}, trainer

    def averaged(output: Path, resume: str | None = None) -> dict[str, Any]:
        kept = averagers(folder)
        net, seen, trainer = run(output, AveragingCallback(*kept, evaluate="all", batchnorm=3), resume=resume)
        history = [
            {k: v for k, v in e.items() if k[-5:] == "_loss"} for e in trainer.state.log_history if "eval_loss" in e
        ]
        return {**result(net, seen["before"], *kept), "history": history}

    count_collectives()
    written = record_writes(folder)
    straight = averaged(folder / "straight")
    resumed = averaged(folder / "resumed", resume=str(folder / "straight" / f"checkpoint-{CUT}"))
    best = {"metric_for_best_model": "eval_ema_loss", "load_best_model_at_end": True, "save_steps": 4}
    net, _, trainer = run(folder / "best", AveragingCallback(*averagers(folder), evaluate="all"), **best)
    chosen = str(trainer.state.best_model_checkpoint)
    reset = ElasticReset(4, 0.8)
    _, seen, _ = run(folder / "reset", AveragingCallback(reset))
    return {
        "straight": straight, "resumed": resumed,
        "reset": {"before": seen["before"], "after": seen["after"], "average": dict(reset.average())},
        "best": clone(net), "chosen": chosen, "written": written, "collectives": collectives(),
    }  # fmt: skip


# ---------------------------------------------------------------------- Lightning


def with_lightning(folder: Path) -> dict[str, Any]:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from averaging.lightning import AveragingCallback

    logging.disable(logging.INFO)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch, batch_idx):
            if self.net.norm.momentum is not None:  # Lightning begins an epoch that it resumes with the first batch
                batch = data(BATCH, 10 + 2 * batch_idx + self.global_rank)
            return self.net(*batch)["loss"]

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.net(*batch)["loss"], sync_dist=True)
            self.log("own_loss", 1.0 + self.global_rank * (self.global_step > 4))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.05)

        def train_dataloader(self):
            return DataLoader(TensorDataset(*data(64, 1)), batch_size=BATCH, shuffle=True)

        def val_dataloader(self):
            return DataLoader(TensorDataset(*data(16, 2)), batch_size=BATCH)

    class Recorder(pl.Callback):
        def __init__(self) -> None:
            self.weights: dict[int, Any] = {}
            self.history: list[dict[str, float]] = []

        def on_train_batch_start(self, trainer, *_):
            self.done = trainer.global_step

        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step > self.done:  # not while gradients are accumulated
                self.weights[trainer.global_step] = clone(module.net)

        def on_train_epoch_end(self, trainer, module):
            metrics = trainer.callback_metrics
            self.history.append({name: float(metrics[name]) for name in metrics if name.endswith("val_loss")})

    def run(output: Path, *callbacks: Any, resume: Path | None = None) -> tuple[Net, Recorder, Recorder]:
        pl.seed_everything(3)
        module, before, after = Module(), Recorder(), Recorder()
        trainer = pl.Trainer(
            accelerator="cpu", strategy="ddp", devices=2, max_steps=STEPS, accumulate_grad_batches=ACCUMULATE,
            default_root_dir=output, logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[before, *callbacks, after,
                ModelCheckpoint(output, filename="{step}", every_n_train_steps=CUT, save_top_k=-1)],
        )  # fmt: skip
        trainer.fit(module, ckpt_path=resume)
        return module.net, before, after

    def averaged(output: Path, resume: Path | None = None) -> dict[str, Any]:
        kept = averagers(folder)
        net, before, after = run(output, AveragingCallback(*kept, evaluate="all", batchnorm=3), resume=resume)
        bare = [{name.removeprefix("net."): t for name, t in a.average().items()} for a in kept]
        recorded = result(net, before.weights)
        averages = {a.name: {n: t.clone() for n, t in average.items()} for a, average in zip(kept, bare, strict=True)}
        return {**recorded, "averages": averages, "history": after.history}

    count_collectives()
    written = record_writes(folder)
    straight = averaged(folder / "straight")
    resumed = averaged(folder / "resumed", resume=folder / "straight" / f"step={CUT}.ckpt")
    reset, swad = ElasticReset(4, 0.8), SWAD(1, metric="own_loss")
    _, before, after = run(folder / "reset", AveragingCallback(reset, swad, evaluate="online"))
    return {
        "straight": straight, "resumed": resumed,
        "reset": {"before": before.weights, "after": after.weights, "average": dict(reset.average())},
        "swad": {name.removeprefix("net."): tensor for name, tensor in swad.average().items()},
        "written": written, "collectives": collectives(),
    }  # fmt: skip


# ---------------------------------------------------------------------- loops of one's own


def with_accelerate(folder: Path) -> dict[str, Any]:
    import accelerate

    def run(output: Path, resume: Path | None = None) -> dict[str, Any]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
        net, kept, seen = Net(), averagers(folder), {}
        model, optimizer, loader = accelerator.prepare(
            net, torch.optim.Adam(net.parameters(), lr=0.05), DataLoader(TensorDataset(*data(160, 1)), batch_size=BATCH)
        )
        accelerator.register_for_checkpointing(*kept)
        if resume is not None:
            accelerator.load_state(str(resume))
        for batch in accelerator.skip_first_batches(loader, ACCUMULATE * kept[0].step):
            with accelerator.accumulate(model):
                accelerator.backward(model(*batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                seen[kept[0].step + 1] = clone(model)
                for average in kept:
                    average.update(model)
                if resume is None and kept[0].step == CUT:
                    accelerator.save_state(str(output))
        recalibrated = [(batch[0], batch[1]) for batch in loader][:3]
        load_into(model, kept[0])
        recalibrate(model, recalibrated, forward=lambda model, batch: model(*batch))
        return result(net, seen, *kept)

    count_collectives()
    straight = run(folder / "state")
    return {"straight": straight, "resumed": run(folder / "again", folder / "state"), "collectives": collectives()}


def with_a_loop(folder: Path) -> dict[str, Any]:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    x, y = data(2 * STEPS * ACCUMULATE * BATCH, 1)
    batches = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(x), BATCH)][rank::2]

    def run(cut: int | None = None) -> dict[str, Any]:
        """Train; having saved after batch ``cut``, go on with everything anew."""
        net, policy, seen = Net(), Net(), {}
        kept = (*averagers(folder), EMA(0.8, switch=4, name="switching"))
        anchor = EMAAnchor(0.3, every=2)
        model = nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        reference = Reference(anchor, model, policy)
        for i, batch in enumerate(batches, 1):
            stepping = i % ACCUMULATE == 0
            with contextlib.nullcontext() if stepping else model.no_sync():
                model(*batch)["loss"].backward()
            if stepping:
                optimizer.step()
                optimizer.zero_grad()
                seen[i // ACCUMULATE] = clone(net)
            for average in kept:
                if (restart := average.update(model, i // ACCUMULATE, epoch=i / len(batches))) is not None:
                    load_into(model, restart)
            reference.update(i // ACCUMULATE)
            if i == cut:
                state = copy.deepcopy([net.state_dict(), optimizer.state_dict(), [p.grad for p in net.parameters()]])
                if rank == 0:
                    for average in (*kept, anchor):
                        average.save(folder / f"cut-{cut}" / average.name)
                distributed.barrier()
                net, policy = Net(), Net()
                model = nn.parallel.DistributedDataParallel(net)
                net.load_state_dict(state[0])
                optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
                optimizer.load_state_dict(state[1])
                for parameter, gradient in zip(net.parameters(), state[2], strict=True):
                    parameter.grad = gradient
                kept = (*averagers(folder), EMA(0.8, switch=4, name="switching"))
                anchor = EMAAnchor(0.3, every=2)
                for average in (*kept, anchor):
                    average.load(folder / f"cut-{cut}" / average.name)
                reference = Reference(anchor, model, policy)
                reference.write()
        with applied(model, kept[0]), torch.no_grad():
            model.eval()(*batches[0])
            model.train()
        trained = clone(net)
        load_into(model, kept[0])
        recalibrate(model, batches[: 2 + rank], forward=lambda model, batch: model(*batch))
        distributed.barrier()
        rings = len([*(folder / "ring").iterdir()])
        distributed.barrier()
        return {**result(net, seen, *kept, anchor), "trained": trained, "policy": clone(policy), "rings": rings}

    count_collectives()
    straight = run()
    cuts = {cut: run(cut) for cut in (2 * CUT, 2 * CUT + 1)}  # on a step, and while gradients are accumulated
    return {"straight": straight, "cuts": cuts, "collectives": collectives()}
