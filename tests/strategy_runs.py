"""Runs of Lightning with a model that is sharded over the processes, beside what the weights gathered from it give.

Lightning runs FSDPStrategy and DeepSpeedStrategy on CUDA's devices only: here it takes CPUs for these. What else has to
be otherwise is said where it is done; all the rest is Lightning's own code.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from ddp_runs import Collectives, collectives, count_collectives, data
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from shard_runs import Interrupted, gathered, replayed, same, whole
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from averaging import EMA, LAWA, ElasticReset, Trajectory
from averaging.averager import Averager
from averaging.lightning import AveragingCallback

DDP: dict[str, Any] = {"strategy": "ddp", "accelerator": "cpu", "devices": 2, "limit_val_batches": 0}


class Module(pl.LightningModule):
    """With a layer of BatchNorm, whose statistics are recomputed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 31), nn.Tanh(), nn.Linear(31, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))

    def loss(self, batch):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(data(4, 10 + 2 * (batch_idx + 20 * (self.global_step // 8)) + self.global_rank))

    def validation_step(self, batch, batch_idx):
        value = self.loss(batch)
        self.log("val_loss", value, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)

    def train_dataloader(self):
        return DataLoader(TensorDataset(*data(64, 1)), batch_size=4)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*data(16, 2)), batch_size=4)


class Breaks:
    """Breaks off in the middle of the second validation."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self.global_step == 8 and batch_idx == 1:
            raise Interrupted


def trained(trainer: pl.Trainer) -> Any:
    """The model as the strategy has it."""
    return trainer.lightning_module if isinstance(trainer.model, DistributedDataParallel) else trainer.model


class Recorder(pl.Callback):
    def __init__(self, gathered: Callable[[Any], dict[str, torch.Tensor]]) -> None:
        self.gathered = gathered
        self.weights: dict[int, Any] = {}
        self.history: list[dict[str, float]] = []
        self.losses: dict[int, float] = {}

    def on_train_start(self, trainer, module):
        self.weights[trainer.global_step] = self.gathered(trained(trainer))

    def on_train_batch_end(self, trainer, module, *_):
        self.on_train_start(trainer, module)

    def on_validation_end(self, trainer, module):
        self.history.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        if not trainer.sanity_checking:
            self.losses[trainer.global_step] = self.history[-1]["val_loss"]


class Runs:
    """Runs of ten steps, with checkpoints at steps 3, 6 and 9, and what the averages of the first should be.

    Args:
        folder: of their files.
        options: gives the arguments of their trainers.
        gathered: gives the whole trained weights of a model as the strategy has it, copied.
        whole: gives whole what each process holds of some of them.
    """

    def __init__(
        self, folder: Path, options: Callable[[], dict[str, Any]], gathered: Any = gathered, whole: Any = whole,
        module: type[pl.LightningModule] = Module,
    ) -> None:  # fmt: skip
        self.folder, self.options, self.gathered, self.whole, self.module = folder, options, gathered, whole, module

    def trainer(self, *callbacks: Any, **options: Any) -> pl.Trainer:
        return pl.Trainer(
            **{
                "devices": 2, "max_steps": 10, "val_check_interval": 4, "default_root_dir": self.folder,
                "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
                **self.options(), **options,
            },
            callbacks=[*callbacks],
        )  # fmt: skip

    def run(
        self, name: str, *callbacks: Any, kind: Any = None, resume: Path | None = None, **options: Any
    ) -> tuple[Any, Recorder, pl.Trainer]:
        pl.seed_everything(3)
        module, recorder = (kind or self.module)(), Recorder(self.gathered)
        saving = ModelCheckpoint(self.folder / name, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = self.trainer(
            recorder, *callbacks, *([saving] if callbacks else []), enable_checkpointing=bool(callbacks), **options
        )
        trainer.fit(module, ckpt_path=resume)
        return trained(trainer), recorder, trainer

    def kept(self) -> list[Averager]:
        return [LAWA(k=3, every=2, memory=self.folder / "ring"), EMA(0.8)]

    def all(self, measures: bool = True) -> dict[str, Any]:
        """Whether averages are right, are evaluated without a trace, and come back from a checkpoint.

        Args:
            measures: whether the engine can validate a checkpoint outside of training.
        """
        Collectives.count = 0
        gathered, whole, kept, run = self.gathered, self.whole, self.kept, self.run
        undisturbed = run("plain")[1].weights
        straight = kept()
        model, recorder, trainer = run("straight", AveragingCallback(*straight, evaluate="all", batchnorm=3))
        self.straight = recorder, trainer
        references = kept()
        expected = replayed(references, recorder.weights)
        last = {average.name: whole(model, average.average()) for average in straight}
        results: dict[str, Any] = {
            "averages": all(same(last[reference.name], reference.average()) for reference in references),
            "collectives": collectives(),
            "holds": same(gathered(model), last["lawa"]),
            "statistics": {name: tensor.clone() for name, tensor in model.named_buffers()},
            "history": recorder.history,
            **{f"at {step}": {name: expected[step, name] for name in ("lawa", "ema")} for step in (6, 10)},
            **{f"online at {step}": recorder.weights[step] for step in (6, 10)},
            "online": all(same(weights, recorder.weights[step]) for step, weights in undisturbed.items()),
        }

        trainer.save_checkpoint(self.folder / "ended.ckpt")
        trainer.save_checkpoint(self.folder / "weights.ckpt", weights_only=True)
        results["holds it still"] = same(gathered(model), last["lawa"])

        again = kept()
        checkpoint = self.folder / "straight" / "step=6.ckpt"
        resumed, recorded, _ = run("resumed", AveragingCallback(*again, evaluate="all", batchnorm=3), resume=checkpoint)
        results["resumed"] = [
            [*recorded.weights] == [6, 7, 8, 9, 10],
            all(same(weights, recorder.weights[step]) for step, weights in recorded.weights.items()),
            all(same(one.average(), two.average()) for one, two in zip(straight, again, strict=True)),
            same(gathered(resumed), gathered(model)),
        ]

        breaking = self.trainer(AveragingCallback(EMA(0.8)), enable_checkpointing=False)
        try:
            breaking.fit(type("Breaking", (Breaks, self.module), {})())
        except Interrupted:
            results["interrupted"] = same(gathered(trained(breaking)), undisturbed[8])

        if measures:
            measuring = self.trainer(AveragingCallback(*kept()), enable_checkpointing=False)
            results["validated"] = measuring.validate(self.module(), ckpt_path=checkpoint, verbose=False)
            results["holds what was measured"] = same(gathered(trained(measuring)), results["at 6"]["lawa"])

        reset, reference = ElasticReset(4, 0.8), ElasticReset(4, 0.8)
        trail = Trajectory(self.folder / "trail", every=4)
        # The recorder sees the weights before others are written in their place, and so does the trail.
        model, recorder, _ = run("reset", AveragingCallback(trail, reset))
        reference.update(recorder.weights[0], 0)
        results["at 8"] = recorder.weights[8]
        resets = {step: reference.update(weights, step) for step, weights in recorder.weights.items() if step}
        results["reset"] = [step for step, weights in resets.items() if weights is not None]
        results["reset right"] = same(whole(model, reset.average()), reference.average())
        return results

    def goes_on(self, checkpoint: Path, before: Recorder, **options: Any) -> list[bool]:
        """Whether a run goes on from ``checkpoint`` at step 6 of a run of another strategy."""
        again, references = self.kept(), self.kept()
        model, after, _ = self.run("goes on", AveragingCallback(*again), resume=checkpoint, **options)
        for reference in references:
            for step in range(7):
                reference.update(before.weights[step], step)
            for step in range(7, 11):
                reference.update(after.weights[step], step)
        return [
            [*after.weights] == [6, 7, 8, 9, 10],
            same(after.weights[6], before.weights[6]),
            *(same(self.whole(model, a.average()), r.average()) for a, r in zip(again, references, strict=True)),
            same(after.weights[10], before.weights[10]),
        ]

    def from_ddp(self, held: Any) -> list[bool]:
        """Whether a run under DDP goes on under this strategy, whatever its checkpoints hold."""
        first = AveragingCallback(*self.kept(), checkpoint=held)
        _, before, _ = self.run(f"ddp-{held}", first, **DDP)
        return self.goes_on(self.folder / f"ddp-{held}" / "step=6.ckpt", before, limit_val_batches=0)

    def refused(self, callback: Any, resume: Path | None = None, **options: Any) -> str:
        """The message with which a run is refused."""
        try:
            self.trainer(callback, enable_checkpointing=False, **options).fit(self.module(), ckpt_path=resume)
        except ValueError as error:
            return str(error)
        return "not at all"


class CPUs(CUDAAccelerator):
    """CPUs, for strategies that ask for CUDA's accelerator."""

    def setup_device(self, device): ...

    def setup(self, trainer): ...

    def teardown(self): ...

    @staticmethod
    def parse_devices(devices):
        return devices

    get_parallel_devices = parse_devices

    @staticmethod
    def is_available():
        return True


def fsdp1_on_cpus() -> None:
    """FSDP1 has to be given a device that is no GPU, and takes what it has moved to the CPU for a copy."""
    init, state_dict_type = FullyShardedDataParallel.__init__, FullyShardedDataParallel.state_dict_type

    def on_the_cpu(self: Any, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        init(self, *args, device_id=torch.device("cpu"), **kwargs)

    def without_moving(**kwargs: Any) -> Any:
        for config in (kwargs["state_dict_config"], kwargs["optim_state_dict_config"]):
            config.offload_to_cpu = False
        return state_dict_type(**kwargs)

    FullyShardedDataParallel.__init__ = on_the_cpu  # type: ignore[method-assign]
    FullyShardedDataParallel.state_dict_type = staticmethod(without_moving)  # type: ignore[method-assign]


def fsdp(folder: Path) -> dict[str, Any]:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # torch's own, of what Lightning calls
    fsdp1_on_cpus()
    count_collectives()
    kinds: dict[str, dict[str, Any]] = {
        "full": {},
        "sharded": {
            "state_dict_type": "sharded", "auto_wrap_policy": {nn.Linear}, "sharding_strategy": "SHARD_GRAD_OP",
        },
    }  # fmt: skip
    results: dict[str, Any] = {}
    for name, kind in kinds.items():
        runs = Runs(folder / name, lambda kind=kind: {
            "accelerator": CPUs(), "devices": [torch.device("cpu")] * 2, "strategy": FSDPStrategy(**kind),
        })  # fmt: skip
        results[name] = result = runs.all()
        recorder, trainer = runs.straight
        result["from ddp"], checkpoint = runs.from_ddp("average"), folder / name / "straight" / "step=6.ckpt"
        if name == "full":
            result["to ddp"] = runs.goes_on(checkpoint, recorder, **DDP)
        else:
            result["to ddp"] = runs.refused(AveragingCallback(*runs.kept()), checkpoint, **DDP)
        # Saved twice, and removed.
        for _ in range(2):
            trainer.save_checkpoint(folder / name / "again.ckpt")
        result["again"] = [path.is_dir() for path in sorted((folder / name).glob("again.ckpt*"))]
        distributed.barrier()
        trainer.strategy.remove_checkpoint(folder / name / "again.ckpt")
        distributed.barrier()
        result["removed"] = [*(folder / name).glob("again.ckpt*")]
        for key, options in {
            "the average": {"callback": AveragingCallback(EMA(0.8), checkpoint="average")},
            "not sharded": {"strategy": FSDPStrategy(**kind | {"sharding_strategy": "NO_SHARD"})},
            "another IO": {"strategy": FSDPStrategy(**kind, checkpoint_io=type("IO", (TorchCheckpointIO,), {})())},
        }.items():
            result[key] = runs.refused(**{"callback": AveragingCallback(EMA(0.8)), **options})
    return results


def deepspeed(folder: Path) -> dict[str, Any]:
    import zero_runs

    zero_runs.prepare()
    warnings.simplefilter("ignore")
    count_collectives()

    def gathered(engine: Any) -> dict[str, torch.Tensor]:
        if engine.optimizer is not None:
            return zero_runs.gathered(engine)
        return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}

    kinds: dict[str, dict[str, Any]] = {"ZeRO-2": {"stage": 2}, "ZeRO-3": {"stage": 3}}
    results: dict[str, Any] = {}
    for name, kind in kinds.items():
        small = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}  # buffers
        runs = Runs(folder / name, lambda kind=kind | small: {
            "accelerator": CPUs(), "devices": [torch.device("cpu", i) for i in range(2)],
            "strategy": DeepSpeedStrategy(**kind),
        }, gathered, zero_runs.whole)  # fmt: skip
        # In ZeRO-3's engine of DeepSpeed 0.19 something is missing that Lightning then calls.
        results[name] = runs.all(measures=name != "ZeRO-3")
        results[name]["the average"] = runs.refused(AveragingCallback(EMA(0.8), checkpoint="average"))
    return results
