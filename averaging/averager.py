"""The contract of every averager: named weights in, named weights out."""

from __future__ import annotations

import json
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from torch import nn

from averaging import kernels
from averaging.atomic import replacing
from averaging.memory import SnapshotFile, WrittenFile, save_weights
from averaging.schedule import Length, Run, Schedule, Span
from averaging.shards import is_shard, local, process, steps
from averaging.text import place, size
from averaging.weights import Binding, Weights


class Average(Protocol):
    """What `applied` and `load_into` put into a model: an averager, or one of the averages it keeps."""

    @property
    def ready(self) -> bool:
        """Whether there is an average; until then it stands for the model's own weights."""

    def average(self, *, rounded: bool = False) -> Weights:
        """As `Averager.average`."""


Moments = Literal["kept", "reset"]

STATE_FILE = "averaging.json"
STATE_VERSION = 1


class Averager(ABC):
    """Keeps an average of a model's weights while it trains.

    Offer it the model after each optimizer step; it absorbs the weights when its schedule says so:

        average = EMA(decay=0.999)
        for step, batch in enumerate(batches, start=1):
            ...
            optimizer.step()
            average.update(model, step)
        with applied(model, average):
            evaluate(model)

    A subclass implements `absorb`, `average`, and how its tensors are saved (`tensors`, `restore`).

    Args:
        every: spacing of absorptions: optimizer steps, ``"epoch"``, or a fraction of the run. ``None`` is the
            subclass's default.
        start: first point of training at which to absorb, in the same units. Until then, the average is the
            model's own weights.
        name: what the average is called in checkpoints and metrics; the class's name in lower case by default.
        frozen: average the parameters that do not require grad, too.
        buffers: average the floating-point buffers (BatchNorm's running statistics), too.

    Raises:
        ValueError, TypeError: an argument that is out of range or of the wrong kind.
    """

    write_backs: Length | None = None
    """How often training is to go on from the weights that `write_back` gives, from ``start`` on; None for never."""

    moments: Moments = "kept"
    """What becomes of the optimizer's state when training goes on from the weights that `update` returned."""

    def __init__(
        self,
        *,
        every: Span | None = None,
        start: Span = 0,
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
    ) -> None:
        self.name = type(self).__name__.lower() if name is None else name
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", self.name) or self.name == "online":
            raise ValueError(
                f"name={name!r}: use letters, digits, '-' and '_' (it names a folder and metrics), and not 'online'"
            )
        self.every = None if every is None else Length.parse(every, "every")
        if self.every and not self.every.amount:
            raise ValueError(f"every={every!r}: must be positive")
        self.start = Length.parse(start, "start")
        self.frozen = frozen
        self.buffers = buffers
        self.run = Run()
        self._schedule: Schedule | None = None
        self._binding: Binding | None = None
        self._shards: Weights = {}  # those of the weights, as they are in the model, of which this process holds a part
        self._clear()

    def _clear(self) -> None:
        self.step = 0
        """Optimizer steps done when the weights were last offered."""
        self.epoch = 0.0
        """Epochs done when the weights were last offered."""
        self.absorbed = 0
        """How many times weights have been absorbed."""
        self.absorbed_step = 0
        """Optimizer steps done at the last absorption."""
        self._owes_write_back = False
        self._layout: dict[str, tuple[tuple[int, ...], torch.dtype]] | None = None
        self._written: dict[str, WrittenFile] = {}
        self._sharded = False  # whether the tensors of the state are this process's part

    # ------------------------------------------------------------------ what a subclass provides

    @abstractmethod
    def absorb(self, weights: Weights, step: int) -> None:
        """Take ``weights`` into the average; ``self.absorbed`` and ``self.absorbed_step`` tell of the last time.

        Args:
            weights: the model's own tensors, which the next optimizer step overwrites: copy what is kept.
            step: optimizer steps done.
        """

    @abstractmethod
    def average(self, *, rounded: bool = False) -> Weights:
        """The average: name → tensor, float32 or better.

        Args:
            rounded: in the dtype of the model's weights instead, rounded once from the widest value known.

        Raises:
            RuntimeError: nothing has been absorbed yet.
        """

    @abstractmethod
    def tensors(self) -> Mapping[str, Weights]:
        """All tensors of the state, in named groups."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Weights], numbers: Mapping[str, Any]) -> None:
        """Take copies of what `tensors` gave, and what a subclass added to `numbers`.

        Two empty mappings stand for the state before the first absorption.
        """

    @property
    def ready(self) -> bool:
        """Whether there is an average; until then it stands for the model's own weights."""
        return self.absorbed > 0

    def due(self, last: tuple[int, float], now: tuple[int, float | None]) -> bool:
        """Whether to absorb the weights offered ``now``; that and the ``last`` offer as (optimizer step, epoch)."""
        assert self._schedule is not None
        return self._schedule.due(self.run, last, now)

    def write_back(self) -> Weights:
        """The weights that training goes on from at each multiple of ``write_backs``: the average."""
        return self.average(rounded=True)

    def views(self) -> Mapping[str, Average]:
        """The averages this averager keeps: name → average. Nearly always one, itself; none if it only records.

        Each is evaluated and saved as a model under its own name; the state is saved once, with the first one.
        """
        return {self.name: self}

    def describe(self, weights: Weights) -> str:
        """What is kept, where and how many bytes, in a few words; by default one copy in float32 or better."""
        return f"an average; {self._cost(weights)}"

    def shortage(self, weights: Weights) -> str | None:
        """Why there is no room for all that is to be kept, if that can be told beforehand."""
        return None

    def first_average(self, after: int = 0) -> int | None:
        """The first optimizer step later than ``after`` at which there is an average; None if it cannot be told."""
        return next(self._due_steps(after), None)

    def problem(self) -> str | None:
        """Why the settings cannot work in a run of the length that `prepare` told, or None if they can."""
        first = self.first_average()
        if first is None or self.run.steps is None or first <= self.run.steps:
            return None
        return (
            f"the first average would be there after {first} optimizer steps but the run ends after {self.run.steps}: "
            "there will be none, and the model keeps its trained weights"
        )

    def default_every(self, run: Run) -> Length:
        """The spacing when ``every`` is not given."""
        return Length(1, "steps")

    def observe(self, metrics: Mapping[str, float], step: int) -> None:
        """Hear what an evaluation during training measured; most averagers do not care.

        The trainers' callbacks call it after each evaluation, before a checkpoint is written. In your own loop, call
        it yourself.

        Args:
            metrics: the names the trainer logs → values; with several validation sets perhaps one set's at a time.
            step: optimizer steps done.
        """
        return

    def keep_template(self, save: Callable[[Path], None]) -> None:
        """Hear how the model is saved with its configuration; for averagers whose files outlive the run.

        A trainer's callback calls it when training starts, in the process that writes checkpoints; in all of them,
        bound to the model, where it is sharded.

        Args:
            save: writes the model as a folder that opens by itself, into the existing folder given.
        """
        return

    def immutable(self, group: str) -> bool:
        """Whether a group of `tensors`, once there, never changes, so that saved states may share its file."""
        return False

    def write_group(self, group: str, file: Path) -> None:
        """Write one group of `tensors` to a safetensors file."""
        save_weights(self.tensors()[group], file)

    # ------------------------------------------------------------------ training

    def prepare(self, total_steps: int | None = None, steps_per_epoch: float | None = None) -> Self:
        """Tell how long the run is, so that fractions, epochs and default windows can be resolved.

        The callbacks for trainers do this by themselves. In your own loop it is needed only for such arguments.

        Args:
            total_steps: optimizer steps of the whole run.
            steps_per_epoch: optimizer steps in an epoch.

        Returns:
            The averager itself: ``average = LAWA(k=5).prepare(total_steps=10_000)``.

        Raises:
            ValueError: a setting is relative to a length that is not known.
        """
        self.run = Run(total_steps, steps_per_epoch)
        self._schedule = self._resolve()
        if (problem := self.problem()) is not None:
            warnings.warn(f"{self.name}: {problem}", stacklevel=2)
        return self

    def announcement(self, weights: Weights) -> str:
        """One line for the log of a run that begins: `describe`, the spacing, and when there is an average."""
        assert self._schedule is not None
        line = f"{self.name}: {self.describe(weights)}; every {self._schedule.every.text(self.run)}"
        if self.absorbed and self.ready:
            return f"{line}; resumed at step {self.step}"
        first = self.first_average(self.step)
        return line if first is None else f"{line}; first {'average ' if self.views() else ''}at step {first}"

    def _resolve(self) -> Schedule:
        return Schedule(self.every or self.default_every(self.run), self.start)

    @torch.inference_mode(False)  # what is kept would be of no use outside of that mode
    @torch.no_grad()
    def update(
        self, model: nn.Module | Weights, step: int | None = None, *, epoch: float | None = None
    ) -> Weights | None:
        """Offer the weights after an optimizer step; they are absorbed when the schedule says so.

        Args:
            model: the model, wrapped or not; or name → tensor.
            step: optimizer steps done so far; by default one more than at the last call, or what DeepSpeed's engine
                has counted, without those that it skipped. Offering a step twice is harmless.
            epoch: epochs done so far, such as 1.5; needed when ``every`` or ``start`` is in epochs.

        Returns:
            Weights that training is to go on from (`load_into` them), or None (nearly always). Only after an optimizer
            step: an offer while gradients are accumulated, of the step of the last one, returns None.

        Raises:
            ValueError: a step before the last one, a setting that cannot be resolved, or weights whose names,
                shapes or dtypes are not those absorbed before.
        """
        if step is None:
            step = self.step + 1 if (counted := steps(model)) is None else counted
        if step < self.step:
            raise ValueError(
                f"step {step} was offered after step {self.step}: reset() the averager for a new run, "
                "or load its state together with the model's checkpoint"
            )
        if self._schedule is None:
            self._schedule = self._resolve()
        last, now = (self.step, self.epoch), (step, epoch)
        began = self.absorbed > 0
        fresh = not began or step != self.absorbed_step
        if fresh and self.due(last, now):
            self.absorb(self.bind(model), step)
            self.absorbed += 1
            self.absorbed_step = step
        self.step = step
        self.epoch = self.epoch if epoch is None else epoch
        if self.write_backs and Schedule(self.write_backs, self.start).due(self.run, last, now) and began:
            self._owes_write_back = True
        # Where an epoch ends while gradients are accumulated, they belong to the weights the model has: not before the
        # optimizer has made its step.
        if not self._owes_write_back or step == last[0]:
            return None
        self._owes_write_back = False
        return self.write_back()

    def bind(self, model: nn.Module | Weights) -> Weights:
        """The weights of ``model`` that are averaged, checked against those absorbed so far.

        Of sharded weights (FSDP2, tensor parallelism) they are what this process holds.

        Raises:
            ValueError: a tensor is missing, new, or of another shape or dtype.
        """
        if isinstance(model, nn.Module):
            if self._binding is not None and self._binding.is_current(model):
                weights: Weights = self._binding.weights
                if self._layout is not None:
                    return weights
            else:
                self._binding = Binding(model, frozen=self.frozen, buffers=self.buffers)
                weights = self._binding.weights
            tensors: Weights = self._binding.tensors
        else:
            weights, tensors = {name: local(tensor) for name, tensor in model.items()}, model
        self._shards = {name: tensor for name, tensor in tensors.items() if is_shard(tensor)}
        self._sharded = bool(self._shards)
        layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
        if self._layout is None:
            self._layout = layout
            if process()[0] == 0 and (shortage := self.shortage(weights)) is not None:
                warnings.warn(f"{self.name}: {shortage}", stacklevel=2)
        elif layout != self._layout:
            self._explain(layout)
        return weights

    def _explain(self, layout: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        assert self._layout is not None
        remedy = (
            "An average belongs to one model: reset() it, or build a new one. Where parameters are frozen or "
            "unfrozen during training, frozen=True averages them all from the start"
        )
        for name, known in self._layout.items():
            if name not in layout:
                raise ValueError(
                    f"{self.name}: {name!r} was averaged so far but is not among the trainable weights. {remedy}"
                )
            if layout[name] != known:
                raise ValueError(
                    f"{self.name}: {name!r} is {layout[name][1]} {layout[name][0]} in the model but was "
                    f"{known[1]} {known[0]} in what was averaged so far. {remedy}"
                )
        new = next(name for name in layout if name not in self._layout)
        raise ValueError(f"{self.name}: {new!r} is not among the weights averaged so far. {remedy}")

    def reset(self, step: int = 0, epoch: float = 0.0) -> None:
        """Forget everything absorbed, for a new run or for one that has already come so far."""
        self._clear()
        self.step, self.epoch = step, epoch
        self._binding, self._shards = None, {}
        self.restore({}, {})

    # ------------------------------------------------------------------ state

    def numbers(self) -> dict[str, Any]:
        """The part of the state that is not tensors: what JSON can hold."""
        return {
            "version": STATE_VERSION,
            "averager": type(self).__name__,
            "step": self.step,
            "epoch": self.epoch,
            "absorbed": self.absorbed,
            "absorbed_step": self.absorbed_step,
            "owes_write_back": self._owes_write_back,
            "layout": {
                name: [list(shape), str(dtype).removeprefix("torch.")]
                for name, (shape, dtype) in (self._layout or {}).items()
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """The whole state: dicts, tensors and numbers only, so that ``torch.load(weights_only=True)`` reads it.

        The tensors are those the averager works with, not copies. Where weights are sharded they are this process's
        part, which `load_state_dict` takes only in the same process of as many.
        """
        part = {"process": process()} if self._sharded else {}
        return {
            **self.numbers(),
            **part,
            "tensors": {group: dict(weights) for group, weights in self.tensors().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module | None = None) -> None:
        """Restore what `state_dict` gave; nothing is changed when it does not fit.

        Args:
            state: the state.
            model: where it is sharded and the state is whole, each process takes its part of it.

        Raises:
            ValueError: the state of another averager, of a later version, or with parts missing.
        """
        if model is not None:
            self.bind(model)
        try:
            kind, version = state["averager"], state["version"]
            if kind != type(self).__name__:
                raise ValueError(
                    f"this is the state of {kind}, not of {type(self).__name__}: give the averager the name it had, "
                    "or its own state"
                )
            if version > STATE_VERSION:
                raise ValueError(
                    f"this state was written by a later version of averaging (format {version}, this one reads up to "
                    f"{STATE_VERSION}): upgrade averaging"
                )
            if (part := state.get("process", process())) != process():
                raise ValueError(
                    f"this is process {part[0]}'s part of the state of {part[1]} processes, but this is process "
                    f"{process()[0]} of {process()[1]}: give each its own"
                )
            if self._shards and "process" not in state:
                from averaging.shard_files import Parts

                parts = {group: Parts(weights, self._shards) for group, weights in state["tensors"].items()}
                state = {**state, "layout": self._layout_of_parts(state["layout"]), "tensors": parts}
            layout = {name: (tuple(shape), getattr(torch, dtype)) for name, (shape, dtype) in state["layout"].items()}
            for group, weights in state["tensors"].items():
                for name, (shape, _) in layout.items():
                    if name not in weights or _shape(weights, name) != shape:
                        raise ValueError(f"the state's {group!r} has no {name!r} of shape {shape}: it is damaged")
            step, epoch = int(state["step"]), float(state["epoch"])
            absorbed, absorbed_step = int(state["absorbed"]), int(state["absorbed_step"])
            owes_write_back = bool(state.get("owes_write_back"))  # older states have none
            tensors = state["tensors"]
            if bool(tensors) > bool(absorbed) or (absorbed and self.views() and not tensors):
                raise ValueError("the state's counts and tensors contradict each other: it is damaged")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is not the state of an averager, or it is damaged ({error!r})") from error
        self.restore(tensors, state)
        self.step, self.epoch, self.absorbed, self.absorbed_step = step, epoch, absorbed, absorbed_step
        self._owes_write_back = owes_write_back
        self._layout = layout or None
        self._binding = None
        self._written = {}
        self._sharded = bool(self._shards) or "process" in state

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the state to ``folder``, as a whole or not at all: numbers as JSON, tensors as safetensors.

        Of sharded weights every process writes its part, so that all have to call this: tensors as torch distributed
        checkpoints, which as many processes or others, and models sharded otherwise or not at all, can `load`.

        What never changes, such as LAWA's snapshots, is written once: the next states saved on the same file system
        hold hard links to the file in the state saved or loaded last, as long as that is there.
        """
        with self.saving(folder):
            pass

    @contextmanager
    def saving(self, folder: str | os.PathLike[str]) -> Iterator[Path]:
        """`save`, where the ``with`` block may add files of its own to the unfinished folder that it is given."""
        folder = Path(os.path.abspath(folder))
        replace: Callable[[Path], AbstractContextManager[Path]] = replacing
        if self._sharded:
            from averaging.shard_files import replacing_together as replace

            if not self._shards:
                raise ValueError(f"{self.name} holds this process's part of sharded weights: bind(model) it first")
        written: dict[str, WrittenFile] = {}
        with replace(folder) as staging:
            staging.mkdir(exist_ok=True)
            for group in self.tensors():
                self._write(group, staging)
            if self._writes_alone():
                for file in staging.rglob("*"):
                    if file.is_file():
                        name = file.relative_to(staging).as_posix()
                        written[name] = WrittenFile.of(file, kept_at=folder / name)
                numbers, sizes = self.numbers(), {name: file.size for name, file in written.items()}
                for name, like in self._shards.items():
                    numbers["layout"][name][0] = list(like.shape)
                (staging / STATE_FILE).write_text(json.dumps({**numbers, "files": sizes}, indent=1) + "\n")
            yield staging
        self._written = written

    def _writes_alone(self) -> bool:
        """Whether this process writes what of sharded weights only one does."""
        return not self._sharded or process()[0] == 0

    def _write(self, group: str, staging: Path) -> None:
        """Write a group of `tensors`, or link the files in which it was written before."""
        place = f"{group}/" if self._sharded else f"{group}.safetensors"
        earlier = {name: file for name, file in self._written.items() if name.startswith(place)}
        linked = self.immutable(group) and self._writes_alone() and _linked(earlier, staging)
        if self._sharded:
            from averaging.shard_files import agreed, save_parts

            if not agreed(linked):
                save_parts(self.tensors()[group], self._shards, staging / group)
        elif not linked:
            self.write_group(group, staging / place)

    def load(self, folder: str | os.PathLike[str], model: nn.Module | None = None) -> Self:
        """Restore what `save` wrote.

        Args:
            folder: the state.
            model: where it is sharded, by as many processes or others, each reads its part. Nothing is communicated.

        Raises:
            FileNotFoundError: a file of the state is missing.
            ValueError: a file is damaged, or the state is another averager's.
        """
        if model is not None:
            self.bind(model)
        file = Path(folder) / STATE_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file}: not found, so the state of the average {self.name!r} cannot be restored")
        try:
            state = json.loads(file.read_text())
            files = dict(state["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: damaged ({error!r})") from error
        tensors: dict[str, Weights] = {}
        written: dict[str, WrittenFile] = {}
        parted: dict[str, Path] = {}
        for name, count in files.items():
            part = file.parent / name
            if len(Path(name).parts) > 2 or ".." in Path(name).parts or Path(name).is_absolute():
                raise ValueError(f"{file}: damaged: it lists {name!r}")
            if not part.is_file():
                raise FileNotFoundError(f"{part}: not found, though {file.name} lists it")
            if part.stat().st_size != count:
                raise ValueError(f"{part}: {part.stat().st_size} bytes instead of {count}: it is damaged")
            written[name] = WrittenFile.of(part)
            if part.parent == file.parent:
                tensors[part.name.removesuffix(".safetensors")] = SnapshotFile(part)
            else:
                parted[part.parent.name] = part.parent
        try:
            if parted:
                from averaging.shard_files import StoredParts

                tensors |= {group: StoredParts(folder, self._shards) for group, folder in parted.items()}
                if self._shards:
                    state |= {"layout": self._layout_of_parts(state["layout"]), "process": process()}
            self.load_state_dict({**state, "tensors": tensors})
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        self._written = written
        return self

    def _layout_of_parts(self, layout: Mapping[str, Any]) -> dict[str, Any]:
        """The ``layout`` in the state of whole weights as it is of this process's parts."""
        parts = dict(layout)
        for name, like in self._shards.items():
            shape, dtype = layout.get(name, (None, None))
            if shape is None or tuple(shape) != like.shape:
                raise ValueError(
                    f"it has {'no' if shape is None else tuple(shape)} {name!r}, which is {tuple(like.shape)} in the "
                    "model: it is another model's state"
                )
            parts[name] = (local(like).shape, dtype)
        return parts

    # ------------------------------------------------------------------ for subclasses

    def _due_steps(self, after: int = 0) -> Iterator[int]:
        assert self._schedule is not None
        return self._schedule.steps(self.run, after)

    def _cost(self, weights: Weights, *, wide: bool = False) -> str:
        """What one copy of ``weights`` in float32 (``wide``: float64) or better costs, on their devices."""
        count = kernels.accumulated_bytes(weights, wide=wide)
        return f"{size(count)} {place(tensor.device for tensor in weights.values())}"

    def _require_average(self) -> None:
        if not self.ready:
            raise RuntimeError(
                f"{self.name} has absorbed {'too few' if self.absorbed else 'no'} weights yet, so it has no average: "
                "until then the average stands for the model's own weights"
            )

    def _average_dtype(self, name: str, rounded: bool) -> torch.dtype:
        assert self._layout is not None
        dtype = self._layout[name][1]
        return dtype if rounded else kernels.accumulator_dtype(dtype)

    def _wide_or_rounded(self, accumulators: Weights, rounded: bool) -> Weights:
        """What `average` returns where the average itself is kept, in float32 or better."""
        self._require_average()
        if not rounded:
            return accumulators
        return {name: kernels.rounded(tensor, self._average_dtype(name, True)) for name, tensor in accumulators.items()}

    # ------------------------------------------------------------------ manners

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}: {self.absorbed} absorbed, step {self.step}>"

    def __getstate__(self) -> dict[str, Any]:
        # The binding refers to the model's own tensors: a pickled averager finds them again by name.
        return {**self.__dict__, "_binding": None, "_shards": {}}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_") or name in ("setup", "state_key"):
            raise AttributeError(self._not_a_callback())
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __iter__(self) -> Iterator[Any]:
        # Lightning takes what is not its own callback for a list of callbacks.
        raise TypeError(self._not_a_callback())

    def _not_a_callback(self) -> str:
        kind = type(self).__name__
        return (
            f"averaging.{kind} is a plain averager for your own training loop, not a trainer's callback: "
            f"use `from averaging.lightning import {kind}` or `from averaging.transformers import {kind}` "
            "(or wrap it: AveragingCallback(averager))"
        )


def _linked(files: Mapping[str, WrittenFile], folder: Path) -> bool:
    """Make hard links to ``files`` under their names in ``folder``; False, and none, where that cannot be."""
    for name, file in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if not file.link(folder / name):
            for made in files:
                (folder / made).unlink(missing_ok=True)
            return False
    return bool(files)


def _shape(weights: Weights, name: str) -> tuple[int, ...]:
    """The shape of a tensor, which is not read where it lies in a file: the state may be many times the model."""
    known = getattr(weights, "shape", None)
    return tuple(weights[name].shape if known is None else known(name))
