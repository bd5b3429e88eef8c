"""Averages as callbacks for Lightning's Trainer.

    from averaging.lightning import LAWA
    trainer = Trainer(callbacks=LAWA(k=5))

Lightning tells its callbacks when a validation begins and hands them each checkpoint before it is written, so its hooks
are all that is needed; only what is validated beside the average runs in a loop of its own.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from glob import escape, glob
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torchmetrics import Metric

from averaging.apply import applied, load_into
from averaging.atomic import fsync_way, locked, replacing
from averaging.averager import Average, Averager
from averaging.batchnorm import unnoticed
from averaging.callbacks import (
    ONLINE,
    BEMASettings,
    CallbackCore,
    ElasticResetSettings,
    EMASettings,
    LAWASettings,
    PostHocEMASettings,
    SWADSettings,
    SWASettings,
    TrajectorySettings,
    by_name,
    home,
    leading,
)
from averaging.checkpoints.checkpoint import Checkpoint
from averaging.completeness import Checksums, begin, content_of, require_whole, seal
from averaging.randomness import random_state
from averaging.schedule_free import enter_eval, evaluating
from averaging.shard_files import Parts, StoredParts, model_parts, replacing_together, save_model_parts, shards_of
from averaging.shards import if_sharded, is_sharded
from averaging.weights import Weights, every_name, first_names

__all__ = [
    "BEMA",
    "EMA",
    "LAWA",
    "SWA",
    "SWAD",
    "AveragingCallback",
    "ElasticReset",
    "PostHocEMA",
    "Trajectory",
    "load_average",
]

KEY = "averaging"
"""The key of a Lightning checkpoint under which the averages lie."""

AVERAGE = "average"
"""The folder beside an average's state in a distributed checkpoint that holds the average itself."""

_WRAPPING = (FSDPStrategy, DeepSpeedStrategy)


class AveragingCallback(CallbackCore, Callback):
    """Keeps averages of the weights during Lightning's ``Trainer.fit``.

    - Validation during ``fit`` measures the average. With ``evaluate="both"`` the online weights' metrics are logged
      beside it: ``val_loss`` is the average's and ``online_val_loss`` theirs. With ``evaluate="all"`` those of each
      further average are, too: ``ema_val_loss``.
    - A checkpoint's ``state_dict`` holds the weights being trained, and under the key ``averaging`` every average
      and its state: ``module.load_state_dict(load_average("last.ckpt"))``. With ``checkpoint="average"`` the
      ``state_dict`` itself is the average, and the weights being trained lie under the key. The snapshots of LAWA
      and the like, which only resuming needs, lie in the folder ``last.ckpt.averaging-…`` beside it, as files that
      checkpoints share.
    - ``ModelCheckpoint(monitor=...)`` picks by any of these, and `load_average`, ``validate``, ``test`` and ``predict``
      with ``ckpt_path=`` take from its checkpoints what was measured: the online weights for ``online_val_loss``, that
      average for ``ema_val_loss``. From other checkpoints they take the average. With ``save_weights_only=True`` a
      checkpoint holds only these weights if a metric of an average other than the first, or of the online weights,
      chose it, and otherwise those that ``checkpoint=`` names.
    - Under ``ModelParallelStrategy`` (FSDP2, tensor parallelism), ``FSDPStrategy`` (FSDP1) and ``DeepSpeedStrategy``
      (ZeRO) the averages are those of each process's shards, and lie in a folder inside the checkpoint, to which every
      process writes its part; beside the single file of ``FSDPStrategy(state_dict_type="full")``.
    - When training ends (at ``on_fit_end``) the model holds the average. The online weights are in the last
      checkpoint, and calling ``fit`` again with the same trainer continues from them (with new optimizers, as
      Lightning makes them; resume from the checkpoint to keep their state).

    Several of these callbacks in one run work together: the first one leads.
    """

    framework: ClassVar[str] = "lightning"
    _evaluation: ExitStack | None = None
    _rewind: Callable[[], None] | None = None
    _detach: Callable[[], None] | None = None
    _online: Weights | None = None  # the weights being trained, while the model holds the average
    _checksums: Checksums | None = None
    _parts: str | None = None  # the folder to which all processes wrote the averages of the checkpoint being saved

    def __getstate__(self) -> dict[str, Any]:
        passing = ("_evaluation", "_rewind", "_detach", "recalibration")
        return {key: value for key, value in self.__dict__.items() if key not in passing}

    # ------------------------------------------------------------------ fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = _CheckpointIO()
        if stage != "fit":
            return
        by_name(self._all_averagers(trainer))  # two of one name are an error
        if self._leads(trainer):
            self._attach(trainer)
        else:
            self.warn_ignored(leading(self._callbacks(trainer)))
        if trainer.global_step != self.averager.step:  # not a second fit() of the same trainer: a new run
            self._online = self.recalibration = None
            for averager in self.averagers:
                averager.reset(trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The average of shards cannot be saved by a hook alone, and a run may be saved when it has ended.
        if self._detach is not None and not _saves_together(trainer):
            self._detach()

    def _attach(self, trainer: Any) -> None:
        """Stand around `trainer.save_checkpoint`: callbacks are left out of a checkpoint of weights only."""
        if self._detach is not None:
            self._detach()  # the run before ended with an exception
        others = tuple(f"{name}_" for name in self.beside(by_name(self._all_averagers(trainer))))
        for callback in trainer.checkpoint_callbacks:
            monitor = callback.monitor if isinstance(callback, ModelCheckpoint) and callback.save_weights_only else None
            by_the_average = monitor and not monitor.startswith(others) and self.evaluate != "online"
            if by_the_average and self.checkpoint == "online":
                warnings.warn(
                    f"ModelCheckpoint(monitor={monitor!r}, save_weights_only=True) picks by the average but would save "
                    'the weights being trained: pass checkpoint="average" to save the average',
                    stacklevel=2,
                )
        save = trainer.save_checkpoint

        @functools.wraps(save)
        def save_checkpoint(filepath: Any, weights_only: bool | None = None, *args: Any, **kwargs: Any) -> None:
            weights: Average | Weights = {}
            if _saves_together(trainer) and not weights_only:
                with self._saving_together(trainer, Path(trainer.strategy.broadcast(os.fspath(filepath)))):
                    save(filepath, weights_only, *args, **kwargs)
                return
            if weights_only and not trainer.state.finished:  # else the model holds what is to be saved
                wanted = self._chosen_by(_saving_monitor(), trainer)
                if wanted is None:
                    wanted = self.leader if self.checkpoint == "average" else ONLINE
                averages = self.averages(self._all_averagers(trainer))
                weights = averages[wanted] if wanted != ONLINE else self._online or {}
            with applied(_model(trainer), weights):
                save(filepath, weights_only, *args, **kwargs)

        def detach() -> None:
            trainer.save_checkpoint = save
            self._detach = None

        trainer.save_checkpoint, self._detach = save_checkpoint, detach

    @contextmanager
    def _saving_together(self, trainer: Any, checkpoint: Path) -> Iterator[None]:
        """Write the averages, of which every process has a part, with the checkpoint that the ``with`` block saves."""
        in_file, model = _saves_file(trainer.strategy), _model(trainer)
        name = trainer.strategy.broadcast(f"{KEY}-{secrets.token_hex(4)}")
        self._parts = f"{checkpoint.name}.{name}" if in_file else name
        folder = checkpoint.with_name(self._parts) if in_file else checkpoint / self._parts
        with ExitStack() as stack:
            if trainer.is_global_zero:
                stack.enter_context(_fresh(folder) if in_file else self._sealing(checkpoint))
            self._save_parts(folder, model, self._all_averagers(trainer))
            stack.enter_context(applied(model, self._online or {}))
            yield

    @contextmanager
    def _sealing(self, checkpoint: Path) -> Iterator[None]:
        """Call a checkpoint that is a folder complete when the ``with`` block has written it."""
        replaced = [path for path in checkpoint.glob(f"{KEY}-*") if path.is_dir()]
        mark = begin(checkpoint)
        yield
        for old in replaced:
            shutil.rmtree(old, ignore_errors=True)
        self._checksums = seal(checkpoint, mark, self._checksums)

    def _save_parts(self, folder: Path, model: nn.Module, averagers: list[Averager]) -> None:
        """Write the averages of shards and their state, by all processes together, as folders of their names."""
        averages = self.averages(averagers)
        for averager in averagers:
            for name in averager.views() or [averager.name]:
                saving = averager.saving if name == home(averager) else replacing_together
                with saving(folder / name) as staging:
                    if name in averages and averages[name].ready:
                        save_model_parts(model, averages[name].average(rounded=True), staging / AVERAGE)

    def _refuse_engines(self, trainer: Any) -> None:
        """Raise where the averages could not be kept, evaluated, saved or resumed."""
        if not _saves_together(trainer):
            return
        strategy = trainer.strategy
        engine = type(strategy).__name__
        if not is_sharded(_model(trainer)) and trainer.world_size > 1:
            raise ValueError(
                f"averages under {engine} are saved by all processes together, each its part, but here each holds the "
                'whole model: let them share it, or use strategy="ddp"'
            )
        if not getattr(strategy, "_save_distributed_checkpoint", True):
            raise ValueError(
                "averages under ModelParallelStrategy are saved by all processes, as they are of each one's shards: "
                "leave out save_distributed_checkpoint=False"
            )
        if _saves_file(strategy) and not isinstance(strategy.checkpoint_io, _CheckpointIO):
            raise ValueError(
                f"averages under {engine} are saved by all processes, beside the file that a CheckpointIO of yours "
                'writes and removes: leave it out, or give the strategy state_dict_type="sharded"'
            )
        if self.checkpoint == "average" and self._leads(trainer):
            raise ValueError(
                f'checkpoint="average" is not supported under {engine}, which loads a checkpoint before '
                "callbacks hear of it: leave it out, and load_average() gives the average of a checkpoint"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = _model(trainer)
        if self._online is not None and _holds(model, self.average):
            load_into(model, self._online)
        self._online = None
        self._refuse_engines(trainer)
        batches = trainer.num_training_batches
        steps_per_epoch = total = None
        if isinstance(batches, int):
            optimizers = 1 if pl_module.automatic_optimization else len(trainer.optimizers)
            steps_per_epoch = -(-batches // trainer.accumulate_grad_batches) * optimizers
            if trainer.max_epochs not in (None, -1):
                total = steps_per_epoch * trainer.max_epochs
        if trainer.max_steps != -1:
            total = min(total or trainer.max_steps, trainer.max_steps)
        for averager in self.averagers:
            averager.prepare(total, steps_per_epoch)
            if not averager.absorbed:
                averager.reset(trainer.global_step, float(trainer.current_epoch))
            averager.bind(model)
            if not averager.absorbed:
                averager.update(model, averager.step, epoch=averager.epoch)
        if self._leads(trainer):
            data, step = partial(_training_batches, trainer, pl_module), partial(_training_step, trainer)
            self.use_recalibration(model, self._all_averagers(trainer), data, step)
        if trainer.is_global_zero:
            self.announce(model)
        if self.learning_rate is not None and len(trainer.optimizers) > 1:
            warnings.warn(f"swa_lr sets the learning rate of all {len(trainer.optimizers)} optimizers", stacklevel=2)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.set_learning_rate(trainer.optimizers, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        batches = trainer.num_training_batches
        done = (batch_idx + 1) / batches if isinstance(batches, int) else float(trainer.is_last_batch)
        self.offer(_model(trainer), trainer.optimizers, trainer.global_step, trainer.current_epoch + done)
        # Once more before the next batch: schedulers have their turn before this, or after it.
        self.set_learning_rate(trainer.optimizers, trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not at on_train_end, where ModelCheckpoint may still write the weights being trained.
        if not self._leads(trainer) or self.average is None:
            return
        if not self.average.ready:
            self.warn_no_average()
            return
        for optimizer in trainer.optimizers:
            enter_eval(optimizer)  # before a validation after training does, on what is put into the model here
        model = _model(trainer)
        own = dict(every_name(model))
        online = {name: own[name].detach().to("cpu", copy=True) for name in self.average.average(rounded=True)}
        load_into(model, self.average)
        self._online = online

    # ------------------------------------------------------------------ evaluation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or not self._leads(trainer):
            return
        self._rewind = random_state()
        if self.evaluate != "online" and self.average is not None:
            self._evaluation = ExitStack()
            self._evaluation.enter_context(evaluating(_model(trainer), trainer.optimizers))
            self._online = self._evaluation.enter_context(applied(_model(trainer), self.average))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_evaluation()
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self._rewind is not None:  # this callback leads
            averages, model = self.averages(self._all_averagers(trainer)), _model(trainer)
            for name in self.beside(averages):
                with (
                    evaluating(model, trainer.optimizers),
                    nullcontext() if name == ONLINE else applied(model, averages[name]),
                ):
                    _validate_again(trainer, f"{name}_", self._rewind)
        self.observe(trainer.callback_metrics, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave_evaluation(exception)

    def _leave_evaluation(self, exception: BaseException | None = None) -> None:
        if self._evaluation is None:
            return
        if exception is None:
            self._evaluation.close()
        else:  # which may have cut off a forward pass that FSDP would hold to be under way
            self._evaluation.__exit__(type(exception), exception, exception.__traceback__)
        self._evaluation = self._online = None

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._leads(trainer):
            return
        chosen = self._chosen_by(_saving_monitor(), trainer)
        if self._parts is not None:
            names = [*self.averages(self._all_averagers(trainer))]
            checkpoint[KEY] = {"held": ONLINE, "folder": self._parts, "averages": {name: {} for name in names}}
            self._parts = None
            if chosen is not None:
                checkpoint[KEY]["chosen"] = chosen
            return
        state_dict = checkpoint["state_dict"]
        beside = isinstance(trainer.strategy.checkpoint_io, _CheckpointIO)
        averages: dict[str, dict[str, Any]] = {}
        for name, average in self.averages(averagers := self._all_averagers(trainer)).items():
            weights = average.average(rounded=True) if average.ready else {}
            averages[name] = {"average": _entries(pl_module, state_dict, weights)}
        for averager in averagers:
            shares = beside and any(map(averager.immutable, averager.tensors()))
            state = averager if shares else averager.state_dict()
            averages.setdefault(home(averager), {})["state"] = state
        online = {key: state_dict[key] for key in averages.get(self.leader, {}).get("average", {})}
        if self._online is not None:
            online = _entries(pl_module, state_dict, self._online)
        # After training the model holds the average, and so does a checkpoint of it.
        ended = self._online is not None and self._evaluation is None
        held = self.leader if self.checkpoint == "average" or ended else ONLINE
        payload: dict[str, Any] = {"held": held, "averages": averages}
        if chosen is not None:
            payload["chosen"] = chosen
        if held == ONLINE:
            checkpoint["state_dict"] = {**state_dict, **online}
        else:
            checkpoint["state_dict"] = {**state_dict, **averages[held]["average"]}
            averages[held]["average"] = {}
            payload[ONLINE] = online
        checkpoint[KEY] = payload

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        payload, path, model = checkpoint.get(KEY), str(trainer.ckpt_path), _model(trainer)
        parts = None
        if payload is not None and "folder" in payload:
            parts = _parts_of(Path(path), payload)
        if trainer.state.fn != TrainerFn.FITTING:
            if self._leads(trainer):
                payload = payload or {"held": ONLINE, "averages": {}}
                wanted = payload.get("chosen", ONLINE if self.evaluate == "online" else self.leader)
                if wanted != ONLINE and wanted not in payload["averages"]:
                    warnings.warn(
                        f"the checkpoint holds no average {wanted!r}: its weights are used as they are", stacklevel=2
                    )
                elif parts is not None and (parts / wanted / AVERAGE).is_dir():
                    load_into(model, model_parts(model, parts / wanted / AVERAGE))
                else:
                    _load_differences(model, _stored(payload, wanted))
            return
        self._online = self.recalibration = None
        if _is_local_file_protocol(path):
            _locate_folders(checkpoint, path)  # ModelParallelStrategy loads files, too, and by itself
        if payload is not None and self._leads(trainer) and _is_local_file_protocol(path):
            states = [entry.get("state", {}) for entry in _averages(checkpoint)]
            folders = [state["folder"] for state in states if "folder" in state] if parts is None else [parts]
            if all(map(os.path.isdir, folders)):  # else `missing` decides
                require_whole(Path(path))
        for averager in self.averagers:
            averager.reset()
            if parts is not None:
                try:
                    averager.load(parts / home(averager), model)
                except FileNotFoundError as error:
                    self.missing_state(averager, "the checkpoint", error)
                continue
            state = None if payload is None else payload["averages"].get(home(averager), {}).get("state")
            if state is None:
                self.missing_state(averager, "the checkpoint")
                continue
            if "folder" not in state:
                averager.load_state_dict(state, if_sharded(model))
                continue
            try:
                averager.load(state["folder"], if_sharded(model))
            except FileNotFoundError as error:
                self.missing_state(averager, "the folder beside the checkpoint, which is to move along with it,", error)
        if payload is not None and self._leads(trainer):
            _load_differences(model, _stored(payload, ONLINE))

    def _chosen_by(self, monitor: str | None, trainer: Trainer) -> str | None:
        """The weights that a metric measured if it is not one of the usual names: an average's name, or "online"."""
        names = self.beside(by_name(self._all_averagers(trainer)))
        for name in sorted(names, key=len, reverse=True):
            if monitor and monitor.startswith(f"{name}_") and monitor[len(name) + 1 :] in trainer.callback_metrics:
                return name
        return None

    # ------------------------------------------------------------------ who leads

    @staticmethod
    def _callbacks(trainer: Any) -> list[AveragingCallback]:
        return [callback for callback in trainer.callbacks if isinstance(callback, AveragingCallback)]

    def _leads(self, trainer: Trainer) -> bool:
        return leading(self._callbacks(trainer)) is self

    def _all_averagers(self, trainer: Trainer) -> list[Averager]:
        return [averager for callback in self._callbacks(trainer) for averager in callback.averagers]


class _CheckpointIO(TorchCheckpointIO):
    """Lightning's own, with the averages that keep what never changes in a folder beside each checkpoint.

    Checkpoints share the files of that in these folders as hard links. A checkpoint names its folder, which
    is never written to again: a new one is made before a checkpoint is replaced, and the old one removed afterwards.
    All is on the disk before an older checkpoint is removed.
    """

    _checksums: Checksums | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        entries = [entry for entry in _averages(checkpoint) if isinstance(entry.get("state"), Averager)]
        if not _is_local_file_protocol(path):
            for entry in entries:
                entry["state"] = entry["state"].state_dict()
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        together = checkpoint.get(KEY, {}).get("folder")  # all processes have written it
        replaced = [folder for folder in _folders(path) if os.path.basename(folder) != together]
        folder = Path(path).with_name(together or f"{Path(path).name}.{KEY}-{secrets.token_hex(4)}")
        with ExitStack() as stack:
            if entries:
                stack.enter_context(_fresh(folder))
            for entry in entries:
                averager = entry["state"]
                averager.save(folder / averager.name)
                entry["state"] = {"folder": f"{folder.name}/{averager.name}"}
            if entries or together:
                self._checksums = seal(folder, known=self._checksums)
            if os.path.islink(path):  # to another checkpoint, which is to stay
                os.unlink(path)
            with replacing(path) as file:
                torch.save(checkpoint, file)
        fsync_way(Path(path))
        for old in replaced:
            _remove(old)

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        if os.path.isdir(path):
            raise ValueError(
                f"{path}: its processes wrote this checkpoint together under ModelParallelStrategy, FSDPStrategy or "
                "DeepSpeedStrategy, and Lightning loads it under no other: resume with that strategy, or begin a new "
                "run with its weights, "
                f'module.load_state_dict(load_average("{path}", "{ONLINE}")). Without "{ONLINE}" they are the average'
            )
        try:
            checkpoint = super().load_checkpoint(path, *args, **options)
        except Exception:
            if _is_local_file_protocol(path) and os.path.isfile(path):
                require_whole(Path(path))  # which says more, and what to do
            raise
        _locate_folders(checkpoint, path)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        super().remove_checkpoint(path)
        for folder in _folders(path):
            _remove(folder)


@contextmanager
def _fresh(folder: Path) -> Iterator[None]:
    """Make ``folder``, and hold it against other runs that tidy up; an exception removes it."""
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        with suppress(OSError):  # a file system without locks
            stack.enter_context(locked(folder))
        try:
            yield
        except Exception:  # not Ctrl-C, which may come when the checkpoint is already there
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _model(trainer: Any) -> nn.Module:
    """What is averaged: FSDP1 and DeepSpeed know more than the module that they have wrapped."""
    model: nn.Module = trainer.model if isinstance(trainer.strategy, _WRAPPING) else trainer.lightning_module
    return model


def _saves_together(trainer: Any) -> bool:
    """Whether all processes write the averages of a checkpoint together, as each has a part of them."""
    return isinstance(trainer.strategy, _WRAPPING) or is_sharded(trainer.lightning_module)


def _saves_file(strategy: Any) -> bool:
    """Whether what all processes hold in parts is gathered to a single file; else checkpoints are folders."""
    return isinstance(strategy, FSDPStrategy) and strategy._state_dict_type == "full"


def _parts_of(checkpoint: Path, payload: dict[str, Any]) -> Path:
    """The folder to which all processes wrote the averages: in the checkpoint or, if that is a file, beside it."""
    # last.ckpt may be a symbolic link
    place = checkpoint if checkpoint.is_dir() else Path(os.path.realpath(checkpoint)).parent
    return place / Path(payload.get("folder", KEY)).name


def _averages(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    return [*checkpoint.get(KEY, {"averages": {}})["averages"].values()]


def _locate_folders(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Let a checkpoint that was loaded from ``path`` say where the folders beside it are."""
    place = os.path.dirname(os.path.realpath(path))  # last.ckpt may be a symbolic link
    for entry in _averages(checkpoint):
        if "folder" in entry.get("state", {}):
            entry["state"]["folder"] = os.path.join(place, entry["state"]["folder"])  # nothing new the second time


def _folders(checkpoint: str | Path) -> list[str]:
    """The folders beside ``checkpoint`` that hold its snapshots: one, and what interrupted writes have left."""
    return glob(f"{escape(str(checkpoint))}.{KEY}-*")


def _remove(folder: str) -> None:
    """Remove a folder of snapshots, unless another run is just about to write the checkpoint that names it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(Path(folder)))
        except BlockingIOError:
            return
        except OSError:
            pass  # a file system without locks
        shutil.rmtree(folder, ignore_errors=True)


def load_average(checkpoint: str | os.PathLike[str], name: str | None = None) -> dict[str, torch.Tensor]:
    """The state dict of the average in a Lightning checkpoint.

        module = MyModule.load_from_checkpoint("last.ckpt")
        module.load_state_dict(load_average("last.ckpt"))

    Args:
        checkpoint: a ``.ckpt`` file written during a run with an averaging callback.
        name: which average, or ``"online"``. By default that which was measured by the metric that
            ``ModelCheckpoint(monitor=...)`` chose the checkpoint by, and else the leading one.

    Returns:
        What ``module.state_dict()`` would be with the average in the module: its own BatchNorm statistics where it has
        them, and else what is not averaged (buffers, frozen parameters) as in the checkpoint. On the CPU.

    Raises:
        ValueError: the checkpoint holds no average, or none of that name.
    """
    if os.path.isdir(checkpoint):
        return _load_together(Path(checkpoint), name, content_of(Path(checkpoint)).get(KEY, {}), Checkpoint(checkpoint))
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    payload: dict[str, Any] = content.get(KEY, {"averages": {}})
    if "folder" in payload:
        return _load_together(Path(checkpoint), name, payload, content["state_dict"])
    averages = [n for n, entry in payload["averages"].items() if "average" in entry]
    if not averages:
        raise ValueError(f"{os.fspath(checkpoint)}: holds no average; it was not written with an averaging callback")
    name = payload.get("chosen", averages[0]) if name is None else name
    if name not in averages and name != ONLINE:
        raise ValueError(f"{os.fspath(checkpoint)}: holds no average {name!r}, only {', '.join(averages)}")
    return {**content["state_dict"], **_stored(payload, name)}


def _load_together(
    checkpoint: Path, name: str | None, payload: dict[str, Any], online: Weights
) -> dict[str, torch.Tensor]:
    """`load_average` of what all processes have written together."""
    parts = _parts_of(checkpoint, payload)
    averages = [path.parent.name for path in sorted(parts.glob(f"*/{AVERAGE}"))]
    if not averages:
        raise ValueError(f"{checkpoint}: holds no average; it was not written with an averaging callback, or too early")
    name = payload.get("chosen", next(iter(payload["averages"]))) if name is None else name
    if name not in averages and name != ONLINE:
        raise ValueError(f"{checkpoint}: holds no average {name!r}, only {', '.join(averages)}")
    return dict(online) if name == ONLINE else {**online, **StoredParts(parts / name / AVERAGE, {})}


def _stored(payload: dict[str, Any], name: str) -> dict[str, Any]:
    """What the weights called ``name`` differ in from the ``state_dict`` of the checkpoint they lie in."""
    if name == payload["held"]:
        return {}
    return {**payload.get(ONLINE, {}), **payload["averages"].get(name, {}).get("average", {})}


def _load_differences(module: nn.Module, weights: dict[str, Any]) -> None:
    if isinstance(module, LightningModule) and not is_sharded(module):
        module.load_state_dict(weights, strict=False)
    elif weights:
        load_into(module, Parts(weights, shards_of(module)))


def _saving_monitor() -> str | None:
    """The metric by which the `ModelCheckpoint` that is saving has chosen the checkpoint, if it has.

    Callbacks are not told who saves, nor where. Both stand in the frames that the call came through.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        saver, file = frame.f_locals.get("self"), frame.f_locals.get("filepath")
        if isinstance(saver, ModelCheckpoint) and file in saver.best_k_models:
            return saver.monitor
        frame = frame.f_back
    return None


def _entries(module: LightningModule, state_dict: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """The entries of ``state_dict`` that ``weights`` covers, under all names of tied weights, with its values."""
    first = first_names(module)
    return {key: weights[first[key]] for key in state_dict if first.get(key) in weights}


def _holds(module: nn.Module, average: Average | None) -> bool:
    """Whether ``module`` holds the average, bit for bit."""
    if average is None or not average.ready:
        return False
    own = dict(every_name(module))
    return all(torch.equal(own[name].cpu(), t.cpu()) for name, t in average.average(rounded=True).items())


@contextmanager
def _training_batches(trainer: Any, module: LightningModule) -> Iterator[Iterator[Any]]:
    """A pass over the training data, in which training steps leave no trace in logs and metrics."""
    if not module.automatic_optimization:
        raise ValueError("with manual optimization the training step steps the optimizers")
    running = trainer.fit_loop._combined_loader
    parts = [part for part in module.modules() if isinstance(part, LightningModule)]
    kept = [(vars(m), {**vars(m), **m._copy_state_dict()}) for m in module.modules() if isinstance(m, Metric)]
    lists = [(value, value.copy()) for value in vars(module).values() if isinstance(value, list)]
    stage, loggers = trainer.state.stage, trainer.loggers
    with unnoticed(running.flattened) as loaders:
        combined = CombinedLoader(running.iterables, running._mode)
        combined.flattened = loaders
        try:
            trainer.state.stage, trainer.loggers = RunningStage.TRAINING, [DummyLogger()]
            for part in parts:
                vars(part)["log"] = vars(part)["log_dict"] = lambda *_, **__: None
            yield (batch for batch, _, _ in combined)
        finally:
            trainer.state.stage, trainer.loggers = stage, loggers
            for part in parts:
                del vars(part)["log"], vars(part)["log_dict"]
            for attributes, values in kept:
                attributes.update(values)
            for value, copy in lists:
                value[:] = copy


def _training_step(trainer: Any, model: nn.Module, batch: Any) -> None:
    module = trainer.lightning_module
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
    arguments = trainer.fit_loop.epoch_loop._build_kwargs({}, batch, 0)
    if isinstance(trainer.strategy, _WRAPPING):
        trainer.strategy.training_step(*arguments.values())
        return
    with trainer.precision_plugin.train_step_context():
        module.training_step(*arguments.values())


class _SameNumbers(Callback):
    """Lets a validation draw the random numbers that the one before drew: what is compared differs in nothing else."""

    def __init__(self, rewind: Callable[[], None]) -> None:
        self.on_validation_start = lambda *_: rewind()  # type: ignore[method-assign]


def _validate_again(trainer: Any, prefix: str, rewind: Callable[[], None]) -> None:
    """Run the validation of ``fit`` once more on the model as it is, and log its metrics under ``prefix``.

    A loop of its own beside the trainer's, so that progress, results and the random state of the run stay what they
    are; the other callbacks have seen this validation once and do not see it again.
    """
    bring_back = random_state()
    trainer._logger_connector.reset_results()  # torchmetrics lie in the module and would go on counting
    epoch_loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    own = epoch_loop.val_loop
    again = _EvaluationLoop(
        trainer, TrainerFn.FITTING, RunningStage.VALIDATING, verbose=False, inference_mode=own.inference_mode
    )
    again._data_source, again._combined_loader, again._max_batches = (
        own._data_source,
        own._combined_loader,
        own._max_batches,
    )
    again._last_val_dl_reload_epoch = own._last_val_dl_reload_epoch
    kept = {
        attribute: getattr(connector, attribute)
        for attribute in (
            "_progress_bar_metrics",
            "_callback_metrics",
            "_logged_metrics",
            "_first_loop_iter",
            "_current_fx",
        )
    }
    callbacks, loggers = trainer.callbacks, trainer.loggers
    try:
        epoch_loop.val_loop, trainer.callbacks, trainer.loggers = again, [_SameNumbers(rewind)], [DummyLogger()]
        connector.reset_metrics()
        again.run()
        metrics, logged = connector._callback_metrics, connector._logged_metrics
    finally:
        bring_back()
        epoch_loop.val_loop, trainer.callbacks, trainer.loggers = own, callbacks, loggers
        for attribute, value in kept.items():
            setattr(connector, attribute, value)
    connector._callback_metrics.update({prefix + name: value for name, value in metrics.items()})
    connector.log_metrics({prefix + name: value for name, value in logged.items()})


class BEMA(BEMASettings, AveragingCallback):
    """`averaging.BEMA` for Lightning's Trainer."""


class SWAD(SWADSettings, AveragingCallback):
    """`averaging.SWAD` for Lightning's Trainer."""


class LAWA(LAWASettings, AveragingCallback):
    """`averaging.LAWA` for Lightning's Trainer."""


class ElasticReset(ElasticResetSettings, AveragingCallback):
    """`averaging.ElasticReset` for Lightning's Trainer."""


class EMA(EMASettings, AveragingCallback):
    """`averaging.EMA` for Lightning's Trainer."""


class SWA(SWASettings, AveragingCallback):
    """`averaging.SWA` for Lightning's Trainer."""


class PostHocEMA(PostHocEMASettings, AveragingCallback):
    """`averaging.PostHocEMA` for Lightning's Trainer."""


class Trajectory(TrajectorySettings, AveragingCallback):
    """`averaging.Trajectory` for Lightning's Trainer."""
