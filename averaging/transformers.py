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
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_NAME

import averaging
from averaging.anchors import Reference
from averaging.apply import applied, load_into
from averaging.atomic import replacing
from averaging.averager import Averager
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
    announce,
    by_name,
    home,
    leading,
)
from averaging.completeness import Checksums, begin, require_whole, say_skipped, seal, search
from averaging.randomness import random_state
from averaging.schedule import Span
from averaging.schedule_free import enter_eval
from averaging.shard_files import replacing_together, save_whole
from averaging.shards import if_sharded, is_sharded
from averaging.weights import named_weights, unwrap

__all__ = [
    "BEMA",
    "EMA",
    "LAWA",
    "SWA",
    "SWAD",
    "AnchorCallback",
    "AveragingCallback",
    "EMAAnchor",
    "ElasticReset",
    "PostHocEMA",
    "Trajectory",
]


class AveragingCallback(CallbackCore, TrainerCallback):
    """Keeps averages of the weights during `transformers.Trainer.train`.

    - Every evaluation and prediction until training ends measures the average. With ``evaluate="both"`` the online
      weights' metrics are logged beside it: ``eval_loss`` is the average's and ``eval_online_loss`` theirs. With
      ``evaluate="all"`` those of each further average are, too: ``eval_ema_loss``.
    - ``checkpoint-500/lawa`` holds the average, a folder that `from_pretrained` opens, and the state to resume from.
      With ``checkpoint="average"``, ``checkpoint-500`` itself holds the average and ``checkpoint-500/online`` the
      weights being trained.
    - Of a model that accelerate's FSDP2 (``fsdp=True``), DeepSpeed ZeRO or ``from_pretrained(distributed_config=...)``
      (FSDP2, tensor parallelism) has sharded, the averages are those of each process's shards, of ZeRO's in float32.
      With ``distributed_config`` Trainer saves no optimizer, so such a run cannot be resumed.
    - When training ends the model holds the average; with ``load_best_model_at_end`` that of the best checkpoint, or
      whatever else ``metric_for_best_model`` measured. The online weights are in the last checkpoint.

    Several of these callbacks in one run work together: the first one leads.
    """

    framework: ClassVar[str] = "transformers"
    _detach: Any = None
    _training = False

    def __radd__(self, callbacks: list[TrainerCallback]) -> list[TrainerCallback]:
        # Trainer adds what it is given to its list of default callbacks: one callback is a list of itself.
        return [*callbacks, self]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_detach", "recalibration")}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _Resuming.guard(_running_trainer(self, args, state)[0])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, checkpoint = _running_trainer(self, args, state)
        _Resuming.guard(trainer, checkpoint)
        callbacks = [other for other in trainer.callback_handler.callbacks if isinstance(other, AveragingCallback)]
        averagers = [averager for callback in callbacks for averager in callback.averagers]
        names = [*by_name(averagers)]
        _refuse_engines(trainer)
        steps_per_epoch = _steps_per_epoch(args, kwargs.get("train_dataloader"))
        for averager in self.averagers:
            averager.reset(state.global_step, state.epoch or 0.0)
            averager.prepare(state.max_steps, steps_per_epoch)
        if self is callbacks[0] and checkpoint:
            _restore_online(trainer, checkpoint, names)
        if self is (leader := leading(callbacks)):
            sharded = is_sharded(trainer.model)
            if args.should_save or sharded:
                for averager in averagers:
                    if sharded:
                        averager.bind(trainer.model)
                    averager.keep_template(functools.partial(_write_model, trainer, trainer.save_model))
            forward = functools.partial(_training_forward, trainer)
            self.use_recalibration(trainer.model, averagers, _training_data(trainer), forward)
            self._attach(trainer, averagers)
        else:
            self.warn_ignored(leader)
        if checkpoint:
            for averager in self.averagers:
                try:
                    averager.load(checkpoint / home(averager), if_sharded(trainer.model))
                except FileNotFoundError as error:
                    self.missing_state(averager, str(checkpoint), error)
        for averager in self.averagers:
            averager.bind(trainer.model)
            if not averager.absorbed:
                averager.update(trainer.model, averager.step, epoch=averager.epoch)
        if state.is_world_process_zero:
            self.announce(trainer.model)
        self._training = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rates = self.set_learning_rate([kwargs["optimizer"]], state.global_step)
        if rates is not None:
            kwargs["lr_scheduler"]._last_lr = rates  # which Trainer logs

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if _skipped(kwargs):
            return
        self.offer(kwargs["model"], [kwargs["optimizer"]], state.global_step, state.epoch)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._training:
            self.observe(kwargs["metrics"], state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = False
        if self._detach is None:
            return
        averagers = self._detach()
        enter_eval(kwargs["optimizer"])  # before an evaluation after training does, on what is put into the model here
        if args.load_best_model_at_end and state.best_model_checkpoint:
            trainer, _ = _running_trainer(self, args, state)
            best, names = Path(state.best_model_checkpoint), [*by_name(averagers)]
            _restore_online(trainer, best, names)
            if (chosen := self._chosen_by(trainer, names)) != ONLINE:
                averager = next(averager for averager in averagers if chosen in averager.views())
                averager.load(best / home(averager), if_sharded(trainer.model))
                load_into(trainer.model, self.averages([averager])[chosen])
        elif self.average is not None:
            load_into(kwargs["model"], self.average)
            if not self.average.ready:
                self.warn_no_average()

    def _chosen_by(self, trainer: Trainer, names: list[str]) -> str:
        """The weights that ``metric_for_best_model`` measured: the name of an average, or ``"online"``."""
        metric = (trainer.args.metric_for_best_model or "").removeprefix("eval_")
        sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else ()
        for data in sorted(sets, key=len, reverse=True):
            if metric.startswith(f"{data}_"):
                metric = metric.removeprefix(f"{data}_")
                break
        for name in sorted(self.beside(names), key=len, reverse=True):
            if metric.startswith(f"{name}_"):
                return name
        return ONLINE if self.evaluate == "online" else self.leader

    # ------------------------------------------------------------------ around the trainer's methods

    def _attach(self, trainer: Any, averagers: list[Averager]) -> None:
        if self._detach is not None:
            self._detach()  # the run before ended with an exception
        evaluation_loop, save_model, sealing = trainer.evaluation_loop, trainer.save_model, _Sealing.of(trainer)
        signature, averages = inspect.signature(evaluation_loop), self.averages(averagers)

        def holding(name: str) -> AbstractContextManager[Any]:
            return applied(trainer.model, {} if name == ONLINE else averages[name])

        @contextmanager
        def evaluated(name: str) -> Iterator[None]:
            _sync_rollouts(trainer)
            try:
                with holding(name):
                    yield
            finally:
                _sync_rollouts(trainer)

        @functools.wraps(evaluation_loop)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            enter_eval(trainer.optimizer)
            rewind = random_state()
            metrics: dict[str, float] = {}
            for name in self.beside(averages):
                call = signature.bind(*args, **kwargs)
                call.apply_defaults()
                call.arguments["metric_key_prefix"] += f"_{name}"
                with evaluated(name):
                    metrics.update(_measure(trainer, evaluation_loop, call))
                rewind()
            with evaluated(ONLINE if self.evaluate == "online" else self.leader):
                output = evaluation_loop(*args, **kwargs)
            output.metrics.update(metrics)
            return output

        @functools.wraps(save_model)
        def save(output_dir: str | None = None, _internal_call: bool = False, **kwargs: Any) -> None:
            if _internal_call and self.recalibration is not None:
                for average in averages.values():  # in which all processes take part, though one saves
                    if average.ready:
                        average.average(rounded=True)
            sharded = is_sharded(trainer.model)  # of which all processes write their parts
            if not (_internal_call and output_dir and (trainer.args.should_save or sharded)):
                save_model(output_dir, _internal_call=_internal_call, **kwargs)
                return
            if trainer.args.should_save:
                sealing.begin(Path(output_dir))
            lead = self.leader if self.checkpoint == "average" else ONLINE
            write = functools.partial(_write_model, trainer, functools.partial(save_model, **kwargs))
            replace = replacing_together if sharded else replacing
            if lead == ONLINE:
                save_model(output_dir, _internal_call=True, **kwargs)
            else:
                with holding(lead):
                    write(Path(output_dir))
                with replace(Path(output_dir) / ONLINE) as folder:
                    write(folder)
            for averager in averagers:
                for name in averager.views() or [averager.name]:
                    # The state lies with the first one.
                    saving = averager.saving if name == home(averager) else replace
                    with saving(Path(output_dir) / name) as folder:
                        if name in averages and name != lead:
                            with holding(name):
                                write(folder)

        def detach() -> list[Averager]:
            trainer.evaluation_loop, trainer.save_model = evaluation_loop, save_model
            sealing.close()
            self._detach = None
            return averagers

        trainer.evaluation_loop, trainer.save_model = evaluate, save
        self._detach = detach


class AnchorCallback(TrainerCallback):
    """Keeps the reference of a TRL trainer at an average of the policy: GRPO, RLOO, DPO, KTO and their kin.

        trainer = GRPOTrainer(..., callbacks=[EMAAnchor(mu=0.01)])                 # WARP, stage 1
        trainer = DPOTrainer(..., callbacks=[EMAAnchor(mu=0.6, every=512)])        # TR-DPO
        trainer = DPOTrainer(..., callbacks=[AnchorCallback(averaging.BEMA())])    # BEMA for the reference

    The trainer's ``ref_model`` is written in place. Where the policy is a PEFT model and there is none, the adapter
    ``"ref"`` is the reference, frozen and without dropout; TRL's trainers look for it. ``checkpoint-500/anchor`` holds
    the state from which a run resumes exactly.

    Args:
        averager: which average, such as `averaging.EMAAnchor` or `averaging.BEMA`.

    Raises:
        TypeError: something that is not an averager.
        ValueError: when training begins, where an anchor could not work: no reference (no such trainer, or β = 0),
            reference log-probabilities computed beforehand, another callback that moves the reference, FSDP, and what
            `averaging.Reference` refuses.
    """

    reference: Reference | None = None

    def __init__(self, averager: Averager) -> None:
        if not isinstance(averager, Averager):
            raise TypeError(f"{averager!r} is not an averager: give an instance such as averaging.BEMA(every=400)")
        self.averager = averager

    def __radd__(self, callbacks: list[TrainerCallback]) -> list[TrainerCallback]:
        return [*callbacks, self]  # as in `AveragingCallback`

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "reference"}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _Resuming.guard(_running_trainer(self, args, state)[0])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, checkpoint = _running_trainer(self, args, state)
        _Resuming.guard(trainer, checkpoint)
        if (problem := self._problem(trainer)) is not None:
            raise ValueError(f"{type(self).__name__} cannot work here: {problem}")
        averager, policy = self.averager, trainer.deepspeed or trainer.model
        averager.reset(state.global_step, state.epoch or 0.0)
        averager.prepare(state.max_steps, _steps_per_epoch(args, kwargs.get("train_dataloader")))
        if checkpoint:
            try:
                averager.load(checkpoint / averager.name, if_sharded(policy))
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{checkpoint} holds no state of {averager.name!r} ({error}), so training cannot resume exactly: "
                    "resume from a checkpoint that has it, or begin a new run with the checkpoint's model"
                ) from error
        if state.is_world_process_zero:
            announce([averager], trainer.model)
        self.reference = Reference(averager, policy, trainer.ref_model)
        self.reference.write()
        sealing = _Sealing.of(trainer)
        writers = sealing.writers_of_parts if is_sharded(policy) else sealing.writers
        writers.append(lambda folder: averager.save(folder / averager.name))

    def _problem(self, trainer: Any) -> str | None:
        """Why the trainer's reference cannot follow the policy, if it cannot."""
        args, kind = trainer.args, type(trainer).__name__
        averagers: list[Averager] = []
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, AveragingCallback):
                averagers += callback.averagers
            elif isinstance(callback, AnchorCallback) and callback is not self:
                return "there are two of them: one reference follows one average"
        if self.averager.name in (home(averager) for averager in averagers):
            return f"an average of this run is named {self.averager.name!r}, too: give it another name="
        if trainer.is_fsdp_enabled or (is_sharded(trainer.model) and not trainer.is_deepspeed_enabled):
            return "FSDP is not supported, as its parameters are not whole weights: train with DDP or DeepSpeed"
        if not hasattr(trainer, "ref_model"):
            return f"{kind} has no reference model. TRL's GRPO, RLOO, DPO and KTO trainers have one"
        if getattr(trainer, "beta", None) == 0:
            return f"with beta=0 {kind} uses no reference model: give beta a positive value"
        if getattr(args, "precompute_ref_log_probs", False):
            return "precompute_ref_log_probs=True computes the reference's output once, before it moves: leave it out"
        if getattr(args, "sync_ref_model", False):
            return "sync_ref_model=True moves the reference, too: leave it out"
        return None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.reference is not None and not _skipped(kwargs):
            self.reference.update(state.global_step, epoch=state.epoch)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, _ = _running_trainer(self, args, state)
        _Sealing.of(trainer).close()


class _Sealing:
    """Makes the checkpoints of a run known as complete once they are, before older ones are deleted.

    The last file that Trainer writes into a checkpoint is `trainer_state.json`; then it deletes others. So for the
    length of a run this stands around the method that writes it.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.state = trainer, trainer.state
        self.writers: list[Callable[[Path], None]] = []
        self.writers_of_parts: list[Callable[[Path], None]] = []  # which all processes call
        self._save_to_json, self._save_rng_state = trainer.state.save_to_json, trainer._save_rng_state
        self._checksums: Checksums = {}
        self._mark: str | None = None
        trainer.state.save_to_json, trainer._save_rng_state = self.save_to_json, self.save_rng_state

    @classmethod
    def of(cls, trainer: Any) -> _Sealing:
        """The one of this run, which several callbacks share."""
        sealing = getattr(trainer._save_rng_state, "__self__", None)
        if not isinstance(sealing, cls):
            return cls(trainer)
        if sealing.state is trainer.state:
            return sealing
        sealing.close()  # the run before ended with an exception
        return cls(trainer)

    def close(self) -> None:
        self.state.save_to_json, self.trainer._save_rng_state = self._save_to_json, self._save_rng_state

    def begin(self, folder: Path) -> None:
        if self._is_checkpoint(folder):
            self._mark = begin(folder)

    def save_rng_state(self, output_dir: str) -> None:
        self._save_rng_state(output_dir)
        for write in self.writers_of_parts:
            write(Path(output_dir))
        self.trainer.accelerator.wait_for_everyone()  # each process has written its own file

    def save_to_json(self, json_path: str) -> None:
        folder = Path(json_path).parent
        if not self._is_checkpoint(folder):
            self._save_to_json(json_path)
            return
        for write in self.writers:
            write(folder)
        self._save_to_json(json_path)
        self._checksums = seal(folder, self._mark, self._checksums)
        # Trainer deletes what was changed longest ago, and a clock may go backwards: this is the newest.
        with suppress(FileNotFoundError):
            newest = max(other.stat().st_mtime for other in folder.parent.glob("checkpoint-*"))
            if newest > folder.stat().st_mtime:
                os.utime(folder, (newest + 1, newest + 1))

    def _is_checkpoint(self, folder: Path) -> bool:
        return folder.name == f"checkpoint-{self.state.global_step}"


class _Resuming:
    """Stands in a trainer's `train` for the choice of the checkpoint that a run resumes from.

    ``resume_from_checkpoint=True`` takes the newest one that is whole, not merely that with the highest number; one
    that was named has to be whole.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._train = trainer, trainer.train
        functools.update_wrapper(self, trainer.train)

    @classmethod
    def guard(cls, trainer: Any, checkpoint: Path | None = None) -> None:
        """Stand there, if not yet; where ``checkpoint`` was loaded before, see that it is whole."""
        if not isinstance(trainer.train, cls):
            trainer.train = cls(trainer)
            if checkpoint is not None:
                require_whole(checkpoint)

    def __call__(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        checkpoint: Any = resume_from_checkpoint
        if checkpoint and is_sharded(self._trainer.model) and not _saves_shards(self._trainer):
            raise ValueError(
                "a model sharded by DistributedConfig cannot resume, as Trainer saves no state of its optimizer: begin "
                "a new run with from_pretrained of the checkpoint"
            )
        if checkpoint is True and os.path.isdir(folder := self._trainer.args.output_dir):
            found, skipped = search(Path(folder))
            if found is not None:
                say_skipped(folder, found, skipped)
                return self._train(str(found), *args, **kwargs)
            # Trainer's own choice: older versions have written no manifests.
            checkpoint = get_last_checkpoint(folder) or True  # type: ignore[no-untyped-call]
        if isinstance(checkpoint, str | os.PathLike) and os.path.isdir(checkpoint):
            require_whole(Path(checkpoint))
            checkpoint = str(checkpoint)
        return self._train(checkpoint, *args, **kwargs)


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


def _refuse_engines(trainer: Any) -> None:
    """Raise where averages could not be kept, saved or resumed."""
    if trainer.is_fsdp_enabled and not getattr(trainer.accelerator, "is_fsdp2", False):
        raise ValueError(
            "averages under version 1 of accelerate's FSDP, which transformers is giving up, are not supported in "
            'Trainer: set fsdp_config={"version": 2} (with `accelerate launch`: fsdp_version: 2), train with DDP, or '
            "average the saved checkpoints afterwards with `soup`"
        )
    if trainer.is_deepspeed_enabled:
        engine = trainer.deepspeed
        named_weights(engine)  # raises what cannot be averaged
        if engine.zero_optimization_stage() == 3 and not engine.zero_gather_16bit_weights_on_model_save():
            raise ValueError(
                "averages under DeepSpeed ZeRO-3 are saved as models, which DeepSpeed has to gather: set "
                "zero_optimization.stage3_gather_16bit_weights_on_model_save to true"
            )
    elif is_sharded(trainer.model) and not trainer.is_fsdp_enabled and trainer.args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end does not reach a model sharded by DistributedConfig: leave it out, and open the "
            "average in the best checkpoint with from_pretrained"
        )


def _saves_shards(trainer: Any) -> bool:
    """Whether an engine saves what it trains, and its optimizer, in files of its own beside Trainer's model file."""
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def _write_model(trainer: Any, save_model: Callable[..., None], folder: Path) -> None:
    """Write the model, as it is now, as a folder that `from_pretrained` opens; all processes of a sharded one call it.

    Under accelerate's FSDP, Trainer's own ``save_model`` writes nothing, or gathers the whole model on one process.
    There the tensors keep the names that they have in memory, as with ``save_original_format=False``.
    """
    if not trainer.is_fsdp_enabled:
        save_model(str(folder), _internal_call=True)
    elif hasattr(unwrap(trainer.model), "peft_config"):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        trainer._save(str(folder), state_dict=get_model_state_dict(trainer.model, options=options))
    else:
        save_whole(trainer.model, folder / f"whole-{SAFE_WEIGHTS_NAME}")
        trainer._save(str(folder), state_dict={})  # all that lies beside the weights
        if trainer.args.process_index == 0:
            os.replace(folder / f"whole-{SAFE_WEIGHTS_NAME}", folder / SAFE_WEIGHTS_NAME)


def _restore_online(trainer: Any, checkpoint: Path, names: Iterable[str]) -> None:
    """Load what was trained, where Trainer has loaded what it takes the checkpoint and the folders in it for."""
    if (checkpoint / ONLINE).is_dir() and not _saves_shards(trainer):  # of which the files of its own are loaded
        trainer._load_from_checkpoint(str(checkpoint / ONLINE))
    for name in (ONLINE, *names):
        # An average of a PEFT adapter is an adapter in a sub-folder, and Trainer loads all of those.
        if name in getattr(trainer.model, "peft_config", {}) and (checkpoint / name).is_dir():
            trainer.model.delete_adapter(name)


def _measure(trainer: Any, evaluation_loop: Any, call: inspect.BoundArguments) -> dict[str, float]:
    """The metrics of one more evaluation, of which the trainer keeps no trace."""
    # TRL's trainers collect further metrics in these until they log, and would mix those of several evaluations.
    kept = {name: getattr(trainer, name) for name in ("_metrics", "_stored_metrics") if hasattr(trainer, name)}
    own: dict[str, Any] = {name: defaultdict(lambda: defaultdict(list)) for name in kept}
    vars(trainer).update(own)
    try:
        output = evaluation_loop(*call.args, **call.kwargs)
    finally:
        vars(trainer).update(kept)
    prefix = call.arguments["metric_key_prefix"]
    metrics = {f"{prefix}_{k}": sum(v) / len(v) for metrics in own.values() for k, v in metrics["eval"].items()}
    return {
        name: value
        for name, value in {**metrics, **output.metrics}.items()
        if not name.endswith("_model_preparation_time")
    }


def _training_data(trainer: Any) -> Callable[[], AbstractContextManager[Any]]:
    @functools.cache
    def loader() -> Any:
        bring_back = random_state()
        # As it is before accelerate prepares it: the loaders that accelerate has prepared know of each other.
        vars(trainer.accelerator)["prepare"] = lambda loader, **_: loader
        try:
            return trainer.get_train_dataloader()
        finally:
            del vars(trainer.accelerator)["prepare"]
            bring_back()

    @contextmanager
    def batches() -> Iterator[Any]:
        with unnoticed([loader()]) as [own]:
            yield own

    return batches


def _training_forward(trainer: Any, model: nn.Module, batch: Any) -> None:
    inputs = trainer._prepare_inputs(batch)
    with trainer.compute_loss_context_manager():
        trainer.compute_loss(model, inputs)


def _steps_per_epoch(args: TrainingArguments, dataloader: Any) -> int | None:
    try:
        return max(1, math.ceil(len(dataloader) / args.gradient_accumulation_steps))
    except TypeError:
        return None


def _sync_rollouts(trainer: Any) -> None:
    """Let a TRL trainer give vLLM the model's weights before the next rollout, not only once in a global step."""
    if hasattr(trainer, "_last_loaded_step"):
        trainer._last_loaded_step = -1


def _skipped(kwargs: dict[str, Any]) -> bool:
    """Whether fp16 found an overflow, so that nothing was learned in this step."""
    return bool(getattr(kwargs.get("optimizer"), "step_was_skipped", False))


class BEMA(BEMASettings, AveragingCallback):
    """`averaging.BEMA` for `transformers.Trainer`."""


class SWAD(SWADSettings, AveragingCallback):
    """`averaging.SWAD` for `transformers.Trainer`."""


class LAWA(LAWASettings, AveragingCallback):
    """`averaging.LAWA` for `transformers.Trainer`."""


class ElasticReset(ElasticResetSettings, AveragingCallback):
    """`averaging.ElasticReset` for `transformers.Trainer`."""


class EMAAnchor(AnchorCallback):
    """`averaging.EMAAnchor` for TRL's trainers, with its arguments."""

    def __init__(
        self, mu: float = 0.01, *, every: Span | None = None, start: Span = 0, name: str | None = None
    ) -> None:
        super().__init__(averaging.EMAAnchor(mu, every=every, start=start, name=name))


class EMA(EMASettings, AveragingCallback):
    """`averaging.EMA` for `transformers.Trainer`."""


class SWA(SWASettings, AveragingCallback):
    """`averaging.SWA` for `transformers.Trainer`."""


class PostHocEMA(PostHocEMASettings, AveragingCallback):
    """`averaging.PostHocEMA` for `transformers.Trainer`."""


class Trajectory(TrajectorySettings, AveragingCallback):
    """`averaging.Trajectory` for `transformers.Trainer`."""
