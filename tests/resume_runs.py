"""Every averager in every kind of loop, cut in every way and resumed: is it what the straight run gives, bit for bit?

    equal_cells("Lightning", folder)  # {("LAWA on disk", "on a boundary"): True, ...}

All averagers that leave training alone run side by side, those that write into the model in a run of their own. One
straight run is cut in several places; each cut goes on from a checkpoint with everything anew. A cell is equal if the
weights after every step are, what is averaged, and the whole state that the averager would save.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from averaging import BEMA, EMA, LAWA, SWA, ElasticReset, EMAAnchor, PostHocEMA, Reference, load_into, named_weights
from averaging.averager import Averager

STEPS, EPOCH, BATCH = 12, 4, 4
"""Optimizer steps of a run and to an epoch, and the rows of a batch."""

CUTS = {"inside a window": 4, "on a boundary": 6, "in an epoch's middle": 10}
ENDED, ACCUMULATED = 8, 6
"""Where a run ended that goes on, and the cut where two batches make a step."""

WAYS = (*CUTS, "after the run ended", "under gradient accumulation")

Weights = dict[str, torch.Tensor]
Build = Callable[[Path], dict[str, Averager]]


def averages(folder: Path) -> dict[str, Averager]:
    """What leaves the training alone; snapshots are three steps apart, where not after each epoch."""
    return {
        "LAWA on CPU": LAWA(k=2, every=3, name="lawa-cpu"),
        "LAWA on disk": LAWA(k=2, every=3, name="lawa-disk", memory=folder / "ring"),
        "EMA": EMA(0.8),
        "SWA": SWA(0, every="epoch"),
        "PostHocEMA": PostHocEMA(folder / "tracks", snapshots=3),
        "BEMA": BEMA(every=3),
        "EMAAnchor": EMAAnchor(0.3, every=3),
    }


def write_backs(folder: Path) -> dict[str, Averager]:
    return {"ElasticReset": ElasticReset(3, 0.8), "EMA(switch)": EMA(0.8, switch="epoch")}


NOT_POSSIBLE = {
    ("Lightning", "EMAAnchor"): "TRL's trainers have a reference model, Lightning's has none",
    ("Lightning DDP", "EMAAnchor"): "TRL's trainers have a reference model, Lightning's has none",
    ("Lightning FSDP2", "EMAAnchor"): "TRL's trainers have a reference model, Lightning's has none",
}
"""(engine, averager) → why there is no such run."""


class Cut(NamedTuple):
    """A run that is to be: until step ``until``, from a checkpoint if there is one."""

    folder: Path
    kept: dict[str, Averager]
    until: int = STEPS
    accumulate: int = 1
    resume: Path | None = None

    @property
    def anchor(self) -> EMAAnchor | None:
        return self.kept.get("EMAAnchor")  # type: ignore[return-value]

    @property
    def averagers(self) -> list[Averager]:
        return [averager for averager in self.kept.values() if averager is not self.anchor]

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"


class Seen(NamedTuple):
    """The weights after each step, those of the reference model, and per averager all it holds."""

    weights: dict[int, Weights]
    reference: Weights
    states: dict[str, Any]


class Net(nn.Module):
    """Drawn to where a reference model is, if there is one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(4, 7), nn.Linear(7, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor, drawn_to: torch.Tensor | None = None) -> dict[str, Any]:
        out = self.outer(self.inner(x).tanh())
        loss = (out - y).square().mean()
        if drawn_to is not None:
            loss = loss + 0.3 * (out - drawn_to).square().mean()
        return {"loss": loss, "out": out}


def rows(count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return x, x.sum(1, keepdim=True).sin()


def clone(model: nn.Module) -> Weights:
    return {name: weight.clone() for name, weight in named_weights(model).items()}


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def held(averager: Averager) -> Any:
    """All that ``averager`` holds, and has left in files."""
    state = copy.deepcopy(averager.state_dict())
    views = {name: copy.deepcopy(dict(view.average())) for name, view in averager.views().items() if view.ready}
    files = {}
    if isinstance(averager, PostHocEMA):
        files = {file.name: load_file(file) for file in averager.trail.folder.glob("*.safetensors")}
        assert len(files) == 8
    return state, views, files


def together() -> None:
    if distributed.is_initialized():
        distributed.barrier()


def equal_cells(engine: str, folder: Path) -> dict[tuple[str, str], bool]:
    """(averager, way of cutting) → whether the resumed run equals the straight one."""
    logging.disable(logging.INFO)
    train, builds = ENGINES[engine], (averages, write_backs)
    cells: dict[tuple[str, str], bool] = {}
    for build in builds:
        place = folder / build.__name__

        def run(name: str, place: Path = place, build: Build = build, **how: Any) -> tuple[Cut, Seen]:
            kept = {k: a for k, a in build(place).items() if (engine, k) not in NOT_POSSIBLE}
            cut = Cut(place / name.replace(" ", "-"), kept, **how)
            weights, reference = train(cut)
            together()
            states = {k: held(a) for k, a in kept.items()} if cut.until == STEPS else {}
            together()  # the next run moves files
            return cut, Seen(weights, reference, states)

        def compare(way: str, seen: Seen, straight: Seen, after: int) -> None:
            assert [*straight.weights] == [*range(1, STEPS + 1)], [*straight.weights]
            trained = equal(seen.weights, {t: w for t, w in straight.weights.items() if t > after})
            trained = trained and equal(seen.reference, straight.reference)
            for name, state in seen.states.items():
                cells[name, way] = trained and equal(state, straight.states[name])

        at, straight = run("straight")
        for way, step in CUTS.items():
            compare(way, run(way, resume=at.checkpoint(step))[1], straight, step)
        at, _ = run("ended", until=ENDED)
        compare(WAYS[-2], run(WAYS[-2], resume=at.checkpoint(ENDED))[1], straight, ENDED)
        at, straight = run("accumulated", accumulate=2)
        compare(WAYS[-1], run(WAYS[-1], accumulate=2, resume=at.checkpoint(ACCUMULATED))[1], straight, ACCUMULATED)
    return cells


def on_two(folder: Path) -> dict[str, dict[tuple[str, str], bool]]:
    """The engines that take two processes, on each of them."""
    return {engine: equal_cells(engine, folder / engine.replace(" ", "-")) for engine in ON_TWO}


# ---------------------------------------------------------------------- transformers


def with_transformers(cut: Cut) -> tuple[dict[int, Weights], Weights]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from averaging.transformers import AnchorCallback, AveragingCallback

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.weights: dict[int, Weights] = {}

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.weights[state.global_step] = clone(model)
            control.should_save = cut.resume is None and state.global_step in (*CUTS.values(), ENDED)

    class Drawn(Trainer):
        """As TRL's trainers it has a reference model."""

        ref_model = Net().requires_grad_(False)

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            drawn_to = self.ref_model(**inputs)["out"]
            return model(**inputs, drawn_to=drawn_to)["loss"]

    net, recorder = Net(), Recorder()
    anchors = [AnchorCallback(cut.anchor)] if cut.anchor else []
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    x, y = rows(BATCH * EPOCH * cut.accumulate * ranks)
    trainer = Drawn(
        model=net,
        args=TrainingArguments(
            output_dir=str(cut.folder), max_steps=cut.until, per_device_train_batch_size=BATCH, seed=1,
            gradient_accumulation_steps=cut.accumulate, learning_rate=0.05, lr_scheduler_type="constant",
            report_to="none", use_cpu=True, ddp_backend="gloo" if "RANK" in os.environ else None, disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no", label_names=["y"], remove_unused_columns=False,
        ),
        train_dataset=[{"x": one, "y": other} for one, other in zip(x, y, strict=True)],
        callbacks=[AveragingCallback(*cut.averagers), *anchors, recorder],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=cut.resume and str(cut.resume))
    return recorder.weights, clone(trainer.ref_model.requires_grad_())


# ---------------------------------------------------------------------- Lightning


def with_lightning(cut: Cut, strategy: Callable[[], Any] = lambda: "auto") -> tuple[dict[int, Weights], Weights]:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.distributed.fsdp import fully_shard

    from averaging.lightning import AveragingCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def configure_model(self):
            if self.device_mesh is not None:
                for part in (self.net.inner, self.net):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

        def training_step(self, _, batch_idx):
            # Lightning begins an epoch that it resumes with the first batch of the loader.
            seed = 1000 * self.current_epoch + 10 * batch_idx + self.global_rank
            return self.net(*rows(BATCH, seed))["loss"]

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.05)

        def train_dataloader(self):
            return DataLoader(range(EPOCH * cut.accumulate * self.trainer.world_size))

    class Recorder(pl.Callback):
        def __init__(self) -> None:
            self.weights: dict[int, Weights] = {}

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if (batch_idx + 1) % cut.accumulate == 0:
                self.weights[trainer.global_step] = clone(module.net)

    recorder, chosen, saving = Recorder(), strategy(), []
    if not cut.resume:
        saving = [ModelCheckpoint(cut.folder, filename="checkpoint-{step}", auto_insert_metric_name=False,
            every_n_train_steps=2, save_top_k=-1)]  # fmt: skip
        saving[0].FILE_EXTENSION = ""
    trainer = pl.Trainer(
        accelerator="cpu", strategy=chosen, devices=1 if chosen == "auto" else 2, max_epochs=cut.until // EPOCH,
        accumulate_grad_batches=cut.accumulate, default_root_dir=cut.folder, logger=False,
        enable_checkpointing=bool(saving), enable_progress_bar=False, enable_model_summary=False,
        callbacks=[AveragingCallback(*cut.averagers), recorder, *saving],
    )  # fmt: skip
    trainer.fit(Module(), ckpt_path=cut.resume)
    if cut.until == ENDED:
        trainer.save_checkpoint(cut.checkpoint(ENDED))  # when the model holds the average
    return recorder.weights, {}


def fsdp2() -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


# ---------------------------------------------------------------------- loops of one's own


def with_accelerate(cut: Cut) -> tuple[dict[int, Weights], Weights]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=cut.accumulate)
    net, other, weights = Net(), Net().requires_grad_(False), {}
    loader = DataLoader(TensorDataset(*rows(BATCH * EPOCH * cut.accumulate)), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(net, torch.optim.Adam(net.parameters(), lr=0.05), loader)
    kept = [*cut.kept.values()]
    accelerator.register_for_checkpointing(*kept)
    if cut.resume:
        accelerator.load_state(str(cut.resume))
    reference = Reference(cut.anchor, model, other) if cut.anchor else None
    if reference:
        reference.write()
    step = kept[0].step
    if not step:
        offer(cut, model, 0, 0.0)
    while step < cut.until:
        for batch in accelerator.skip_first_batches(loader, step % EPOCH * cut.accumulate):
            with accelerator.accumulate(model):
                accelerator.backward(model(*batch, drawn_to=other(*batch)["out"])["loss"])
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                offer(cut, model, step, step / EPOCH)
                if reference:
                    reference.update(step, epoch=step / EPOCH)
                weights[step] = clone(model)
                if not cut.resume and step in (*CUTS.values(), ENDED):
                    accelerator.save_state(str(cut.checkpoint(step)))
            if step == cut.until:
                break
    return weights, clone(other.requires_grad_())


def offer(cut: Cut, model: nn.Module, step: int, epoch: float) -> None:
    for averager in cut.averagers:
        restart = averager.update(model, step, epoch=epoch)
        if restart is not None:
            load_into(model, restart)


def with_a_loop(cut: Cut) -> tuple[dict[int, Weights], Weights]:
    """Every batch is offered; under gradient accumulation the cut is between two batches of a step."""
    model, other, weights = Net(), Net().requires_grad_(False), {}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    done = 0
    if cut.resume:
        state = torch.load(cut.resume / "training.pt")
        done = state["batches"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for parameter, gradient in zip(model.parameters(), state["gradients"], strict=True):
            parameter.grad = gradient
        for averager in cut.kept.values():
            averager.load(cut.resume / averager.name)
    reference = Reference(cut.anchor, model, other) if cut.anchor else None
    if reference:
        reference.write()
    if not done:
        offer(cut, model, 0, 0.0)
    for i in range(done + 1, cut.until * cut.accumulate + 1):
        batch = rows(BATCH, seed=i)
        model(*batch, drawn_to=other(*batch)["out"])["loss"].backward()
        step, epoch = i // cut.accumulate, i / (EPOCH * cut.accumulate)
        if i % cut.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        offer(cut, model, step, epoch)
        if reference:
            reference.update(step, epoch=epoch)
        if i % cut.accumulate == 0:
            weights[step] = clone(model)
        if not cut.resume and i in {t * cut.accumulate + cut.accumulate - 1 for t in (*CUTS.values(), ENDED)}:
            place = cut.checkpoint(step)
            for averager in cut.kept.values():
                averager.save(place / averager.name)
            gradients = [parameter.grad for parameter in model.parameters()]
            state = {"batches": i, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "gradients": gradients}, place / "training.pt")
    return weights, clone(other.requires_grad_())


Engine = Callable[[Cut], tuple[dict[int, Weights], Weights]]
ON_ONE: dict[str, Engine] = {
    "transformers": with_transformers,
    "Lightning": with_lightning,
    "accelerate": with_accelerate,
    "plain loop": with_a_loop,
}
ON_TWO: dict[str, Engine] = {
    "Lightning DDP": lambda cut: with_lightning(cut, lambda: "ddp"),
    "Lightning FSDP2": lambda cut: with_lightning(cut, fsdp2),
    "transformers DDP": with_transformers,
}
ENGINES = {**ON_ONE, **ON_TWO}
