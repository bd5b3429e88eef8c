"""Averages as callbacks for `transformers.Trainer` and the trainers built on it, such as TRL's.

    from averaging.transformers import LAWA
    trainer = Trainer(..., callbacks=[LAWA(k=5)])

Trainer announces no evaluation before it begins and no save before it is over, so for the length of a run the
leading callback stands around two of the trainer's own methods: `evaluation_loop` (which `evaluate` and `predict`
go through) and `save_model` (which writes the model file of each checkpoint).
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from averaging.apply import applied, load_into
from averaging.atomic import replacing
from averaging.averager import Averager
from averaging.callbacks import (
    ONLINE,
    BEMASettings,
    CallbackCore,
    EMASettings,
    LAWASettings,
    PostHocEMASettings,
    SWASettings,
    TrajectorySettings,
    require_different_names,
)

__all__ = ["BEMA", "EMA", "LAWA", "SWA", "AveragingCallback", "PostHocEMA", "Trajectory"]


class AveragingCallback(CallbackCore, TrainerCallback):
    """Keeps averages of the weights during `transformers.Trainer.train`.

    - Every evaluation and prediction until training ends measures the average. With ``evaluate="both"`` the online
      weights' metrics are logged beside it: ``eval_loss`` is the average's and ``eval_online_loss`` theirs.
    - ``checkpoint-500/lawa`` holds the average, a folder that `from_pretrained` opens, and the state to resume from.
      With ``checkpoint="average"``, ``checkpoint-500`` itself holds the average and ``checkpoint-500/online`` the
      weights being trained.
    - When training ends the model holds the average; with ``load_best_model_at_end`` that of the best checkpoint,
      which is what was measured. The online weights are in the last checkpoint.

    Several of these callbacks in one run work together: the first one leads.
    """

    framework: ClassVar[str] = "transformers"
    _detach: Any = None
    _training = False

    def __radd__(self, callbacks: list[TrainerCallback]) -> list[TrainerCallback]:
        # Trainer adds what it is given to its list of default callbacks: one callback is a list of itself.
        return [*callbacks, self]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_detach"}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, checkpoint = _running_trainer(self, args, state)
        callbacks = [other for other in trainer.callback_handler.callbacks if isinstance(other, AveragingCallback)]
        averagers = [averager for callback in callbacks for averager in callback.averagers]
        require_different_names(averagers)
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ValueError(
                "averaging under DeepSpeed and FSDP is not supported: train with DDP, or average the saved "
                "checkpoints afterwards with `soup`"
            )
        steps_per_epoch = None
        if (length := _length(kwargs.get("train_dataloader"))) is not None:
            steps_per_epoch = max(1, math.ceil(length / args.gradient_accumulation_steps))
        for averager in self.averagers:
            averager.prepare(state.max_steps, steps_per_epoch)
            averager.reset(state.global_step, state.epoch or 0.0)
        if self is callbacks[0]:
            if checkpoint:
                self._restore_online(trainer, checkpoint, averagers)
            if args.should_save:
                for averager in averagers:
                    averager.keep_template(lambda folder: trainer.save_model(str(folder), _internal_call=True))
            self._attach(trainer, averagers)
        else:
            self.warn_ignored(averagers[0])
        if checkpoint:
            for averager in self.averagers:
                try:
                    averager.load(checkpoint / averager.name)
                except FileNotFoundError as error:
                    self.missing_state(averager, str(checkpoint), error)
        for averager in self.averagers:
            averager.bind(trainer.model)
            if not averager.absorbed:
                averager.update(trainer.model, averager.step, epoch=averager.epoch)
        self._training = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rates = self.set_learning_rate([kwargs["optimizer"]], state.global_step)
        if rates is not None:
            kwargs["lr_scheduler"]._last_lr = rates  # which Trainer logs

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            return  # fp16 found an overflow: nothing was learned in this step
        self.offer(kwargs["model"], state.global_step, state.epoch)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._training:
            self.observe(kwargs["metrics"], state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = False
        if self._detach is None:
            return
        self._detach()
        model, averager = kwargs["model"], self.averager
        if args.load_best_model_at_end and state.best_model_checkpoint:
            if self.evaluate == "online" or _is_online(args.metric_for_best_model or ""):
                return  # the online weights were measured, and those Trainer has just loaded
            averager.load(Path(state.best_model_checkpoint) / averager.name)
        if averager.ready:
            load_into(model, averager)
        else:
            self.warn_no_average()

    # ------------------------------------------------------------------ around the trainer's methods

    def _attach(self, trainer: Any, averagers: list[Averager]) -> None:
        if self._detach is not None:
            self._detach()  # the run before ended with an exception
        evaluation_loop, save_model = trainer.evaluation_loop, trainer.save_model

        @functools.wraps(evaluation_loop)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            _enter_eval(trainer.optimizer)
            with nullcontext() if self.evaluate == "online" else applied(trainer.model, self.averager):
                output = evaluation_loop(*args, **kwargs)
            if self.evaluate == "both":
                call = inspect.signature(evaluation_loop).bind(*args, **kwargs)
                call.apply_defaults()
                call.arguments["metric_key_prefix"] += f"_{ONLINE}"
                with _random_state_kept():
                    online = evaluation_loop(*call.args, **call.kwargs)
                metrics = online.metrics.items()
                output.metrics.update({k: v for k, v in metrics if not k.endswith("_model_preparation_time")})
            return output

        @functools.wraps(save_model)
        def save(output_dir: str | None = None, _internal_call: bool = False, **kwargs: Any) -> None:
            if not (_internal_call and output_dir and trainer.args.should_save):
                save_model(output_dir, _internal_call=_internal_call, **kwargs)
                return
            lead = self.averager if self.checkpoint == "average" else None
            with applied(trainer.model, lead) if lead else nullcontext():
                save_model(output_dir, _internal_call=True, **kwargs)
            if lead:
                with replacing(Path(output_dir) / ONLINE) as folder:
                    save_model(str(folder), _internal_call=True, **kwargs)
            for averager in averagers:
                with averager.saving(Path(output_dir) / averager.name) as folder:
                    if averager is not lead and averager.averages:
                        with applied(trainer.model, averager):
                            save_model(str(folder), _internal_call=True, **kwargs)

        def detach() -> None:
            trainer.evaluation_loop, trainer.save_model = evaluation_loop, save_model
            self._detach = None

        trainer.evaluation_loop, trainer.save_model = evaluate, save
        self._detach = detach

    def _restore_online(self, trainer: Any, checkpoint: Path, averagers: list[Averager]) -> None:
        """Undo what Trainer's own resuming makes of the folders that lie in a checkpoint beside the model."""
        if (checkpoint / ONLINE).is_dir():
            trainer._load_from_checkpoint(str(checkpoint / ONLINE))
        for name in (ONLINE, *(averager.name for averager in averagers)):
            # An average of a PEFT adapter is an adapter in a sub-folder, and Trainer loads all of those.
            if name in getattr(trainer.model, "peft_config", {}) and (checkpoint / name).is_dir():
                trainer.model.delete_adapter(name)


def _running_trainer(
    callback: TrainerCallback, args: TrainingArguments, state: TrainerState
) -> tuple[Any, Path | None]:
    """The trainer whose `train` is calling ``callback``, and the checkpoint it resumes from.

    Callbacks are handed neither. Both stand in the frames that the call came through.
    """
    trainer: Trainer | None = None
    checkpoint: str | os.PathLike[str] | None = None
    frame = sys._getframe(1)
    while frame is not None:
        local = frame.f_locals
        if isinstance(owner := local.get("self"), Trainer) and callback in owner.callback_handler.callbacks:
            trainer = owner
            if isinstance(path := local.get("resume_from_checkpoint"), str | os.PathLike):
                checkpoint = path
        frame = frame.f_back  # type: ignore[assignment]
    if trainer is None:
        raise RuntimeError(f"{type(callback).__name__} works only as a callback of a running transformers.Trainer")
    if checkpoint is None and state.global_step > 0:
        checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.global_step}")
    return trainer, Path(checkpoint) if checkpoint else None


def _length(dataloader: Any) -> int | None:
    try:
        return len(dataloader)
    except TypeError:
        return None


def _is_online(metric: str) -> bool:
    return ONLINE in metric.split("_")


def _enter_eval(optimizer: Any) -> None:
    """Let a schedule-free optimizer put its weights into the model before they are set aside, not after."""
    if callable(enter := getattr(optimizer, "eval", None)):
        enter()


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """A second evaluation must not change the training that follows."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


class BEMA(BEMASettings, AveragingCallback):
    """`averaging.BEMA` for `transformers.Trainer`."""


class LAWA(LAWASettings, AveragingCallback):
    """`averaging.LAWA` for `transformers.Trainer`."""


class EMA(EMASettings, AveragingCallback):
    """`averaging.EMA` for `transformers.Trainer`."""


class SWA(SWASettings, AveragingCallback):
    """`averaging.SWA` for `transformers.Trainer`."""


class PostHocEMA(PostHocEMASettings, AveragingCallback):
    """`averaging.PostHocEMA` for `transformers.Trainer`."""


class Trajectory(TrajectorySettings, AveragingCallback):
    """`averaging.Trajectory` for `transformers.Trainer`."""
