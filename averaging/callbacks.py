"""The half of the trainers' callbacks that knows no trainer: which averages, and what is done with them.

`averaging.lightning` and `averaging.transformers` add the hooks. Each averager has here the one class that spells
out its arguments, and one line in either adapter.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from numbers import Real
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import distributed, nn

import averaging
from averaging.apply import load_into
from averaging.averager import Average, Averager, Moments
from averaging.averagers.ema import Warmup
from averaging.batchnorm import LIMIT, Recalibration, batchnorm_layers
from averaging.decay import Decay
from averaging.learning_rate import AnnealStrategy, Rates, SWALearningRate
from averaging.schedule import Span

Evaluate = Literal["average", "online", "both", "all"]
Checkpoint = Literal["online", "average"]

LOG = logging.getLogger("averaging")

ONLINE = "online"
"""What the weights being trained are called in checkpoints and metrics."""


C = TypeVar("C", bound="CallbackCore")


class CallbackCore:
    """Averages to keep during a trainer's run.

    Args:
        averagers: one or more averagers, with different names. The first one leads: it is what is evaluated, and
            what the model holds when training ends.
        evaluate: what evaluations during training measure: the ``"average"``, the ``"online"`` weights, or
            ``"both"``: the average under the usual names and the online weights beside them. ``"all"`` measures
            every other average beside them, too. Each evaluation draws the same random numbers.
        checkpoint: which weights a checkpoint's model file holds. ``"online"``: those being trained, with each
            average beside them. ``"average"``: the first average, with the online weights beside it. A run resumes
            exactly from either.
        missing: what to do when training resumes from a checkpoint without the average's state: ``"error"``,
            or ``"start"`` a new average there.
        batchnorm: where the model has BatchNorm layers, their running statistics are recomputed for each average from
            this many batches of the training data when the average is evaluated, saved or left in the model; once for
            each average and absorption, at the cost of a forward pass per batch. Training begins with one such batch,
            to warn if it cannot be done. 0 leaves the average with the statistics of the online weights;
            ``buffers=True`` averages these.

    Raises:
        TypeError: something that is not an averager.
        ValueError: no averager, two of one name, or an unknown option.
    """

    framework: ClassVar[str]
    learning_rate: SWALearningRate | None = None
    recalibration: Recalibration | None = None

    def __init__(
        self,
        *averagers: Averager,
        evaluate: Evaluate = "average",
        checkpoint: Checkpoint = "online",
        missing: Literal["error", "start"] = "error",
        batchnorm: int = LIMIT,
    ) -> None:
        if not averagers:
            raise ValueError("give at least one averager: AveragingCallback(EMA(0.999))")
        for averager in averagers:
            if not isinstance(averager, Averager):
                raise TypeError(f"{averager!r} is not an averager: give instances such as averaging.EMA(0.999)")
        for option, value, known in (
            ("evaluate", evaluate, ("average", "online", "both", "all")),
            ("checkpoint", checkpoint, ("online", "average")),
            ("missing", missing, ("error", "start")),
        ):
            if value not in known:
                raise ValueError(f"{option}={value!r}: give one of {', '.join(map(repr, known))}")
        if evaluate == "average" and any(isinstance(averager, averaging.SWAD) for averager in averagers):
            raise ValueError(
                'SWAD begins and ends by the loss of the weights being trained: give evaluate="both" to measure it '
                'beside the average\'s, or "online"'
            )
        if isinstance(batchnorm, bool) or batchnorm < 0:
            raise ValueError(f"batchnorm={batchnorm!r}: give a number of batches, 0 for none")
        self.averagers = list(averagers)
        self.evaluate = evaluate
        self.checkpoint = checkpoint
        self.missing = missing
        self.batchnorm = batchnorm
        by_name(self.averagers)

    @property
    def averager(self) -> Averager:
        """The leading averager."""
        return self.averagers[0]

    @property
    def leader(self) -> str:
        """The name of the leading average; ``"online"`` where nothing is averaged."""
        return next(iter(by_name(self.averagers)), ONLINE)

    @property
    def average(self) -> Average | None:
        """The leading average; None where nothing is averaged."""
        return self.averages(self.averagers).get(self.leader)

    def averages(self, averagers: Iterable[Averager]) -> dict[str, Average]:
        """All averages of ``averagers`` by name as models are to hold them: with BatchNorm statistics of their own."""
        return {
            name: self.recalibration(name, average) if self.recalibration and not averager.buffers else average
            for averager in averagers
            for name, average in averager.views().items()
        }

    def use_recalibration(
        self,
        model: nn.Module,
        averagers: Iterable[Averager],
        batches: Callable[[], AbstractContextManager[Iterable[Any]]],
        forward: Callable[[nn.Module, Any], Any],
    ) -> None:
        """If ``model`` has BatchNorm layers, let `averages` have statistics of their own; see `Recalibration`."""
        self.recalibration = None
        wanting = any(averager.views() and not averager.buffers for averager in averagers)
        if not (self.batchnorm and wanting and batchnorm_layers(model)):
            return
        recalibration = Recalibration(model, batches, forward, self.batchnorm)
        try:
            recalibration.check()
        except Exception as error:
            warnings.warn(
                "the averages will have the BatchNorm statistics of the online weights, as they cannot be recomputed "
                f"({error}). Pass batchnorm=0 if that is intended, or buffers=True to average the statistics",
                stacklevel=3,
            )
        else:
            self.recalibration = recalibration

    def beside(self, names: Iterable[str]) -> list[str]:
        """What evaluations measure beside what has the usual names: of all averages' ``names``, and ``"online"``."""
        match self.evaluate:
            case "both":
                return [ONLINE]
            case "all":
                return [ONLINE, *list(names)[1:]]
        return []

    def announce(self, model: nn.Module) -> None:
        """`announce` the averagers of this callback."""
        announce(self.averagers, model)

    def offer(self, model: nn.Module, optimizers: Iterable[Any], step: int, epoch: float | None) -> None:
        """Offer the weights after an optimizer step, and write back what an averager wants training to go on from."""
        if self.recalibration is not None:
            self.recalibration.notice_frozen_layers()
        for averager in self.averagers:
            restart = averager.update(model, step, epoch=epoch)
            if restart is not None:
                load_into(model, restart)
                if averager.moments == "reset":
                    for optimizer in optimizers:
                        optimizer.state.clear()

    def set_learning_rate(self, optimizers: Sequence[Any], step: int) -> list[float] | None:
        """Set the learning rate for the next optimizer step, if that is asked for and its time has come."""
        if self.learning_rate is None:
            return None
        return self.learning_rate.apply(optimizers, step, self.averager)

    def warn_ignored(self, leader: CallbackCore) -> None:
        """Say so if this callback, which does not lead, was given options that only the leading one obeys."""
        if (self.evaluate, self.checkpoint, self.batchnorm) != ("average", "online", LIMIT):
            warnings.warn(
                f"evaluate=, checkpoint= and batchnorm= of the callback for {self.averager.name!r} are ignored: "
                f"the first averaging callback, for {leader.leader!r}, leads",
                stacklevel=3,
            )

    def warn_no_average(self) -> None:
        """Say that the leading average, which the model should hold when training ends, never began."""
        warnings.warn(
            f"training ended before there was an average {self.leader!r}: the model keeps its trained weights",
            stacklevel=3,
        )

    def observe(self, metrics: Mapping[str, Any], step: int) -> None:
        """Tell the averagers what an evaluation measured, in all processes what it measured in the first."""
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, Real | torch.Tensor)}
        if distributed.is_available() and distributed.is_initialized():
            # What is decided by them must be the same everywhere, and Lightning's are each process's own without
            # sync_dist: those that are logged count.
            everywhere = [numbers]
            distributed.broadcast_object_list(everywhere)
            [numbers] = everywhere
        # Tensors made while Lightning validates could otherwise not be written to afterwards.
        with torch.inference_mode(False), torch.no_grad():
            for averager in self.averagers:
                averager.observe(numbers, step)

    def missing_state(self, averager: Averager, where: str, error: Exception | None = None) -> None:
        """Start ``averager`` anew if that was asked for.

        Raises:
            FileNotFoundError: it was not.
        """
        if self.missing == "start":
            return
        raise FileNotFoundError(
            f"{where} holds no state of the average {home(averager)!r}"
            + (f" ({error})" if error else "")
            + ", so training cannot resume exactly. Resume from a checkpoint that has it, give the averager the name= "
            'it had, or pass missing="start" to begin a new average here'
        ) from error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_") or name in ("setup", "state_key"):
            raise AttributeError(self._other_trainers())
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __iter__(self) -> Iterator[Any]:
        # Lightning takes what is not its own callback for a list of callbacks.
        raise TypeError(self._other_trainers())

    def _other_trainers(self) -> str:
        other = {"lightning": "transformers", "transformers": "lightning"}[self.framework]
        return f"this {type(self).__name__} is a callback for {self.framework}: import it from averaging.{other}"


def announce(averagers: Iterable[Averager], model: nn.Module) -> None:
    """Log one line for each averager: what it keeps, where, how many bytes, and when there is an average."""
    # Seen by default, as Lightning's own lines are; logging.getLogger("averaging").setLevel("WARNING") hides them.
    if not LOG.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        LOG.addHandler(handler)
    if LOG.level == logging.NOTSET:
        LOG.setLevel(logging.INFO)
    for averager in averagers:
        LOG.info(averager.announcement(averager.bind(model)))


def by_name(averagers: Iterable[Averager]) -> dict[str, Average]:
    """All averages of ``averagers`` by name; the first one leads.

    Raises:
        ValueError: two of them would share metrics and files.
    """
    averages: dict[str, Average] = {}
    names: list[str] = []
    for averager in averagers:
        averages.update(averager.views())
        names += averager.views() or [averager.name]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} averages are named {name!r}: tell them apart with name=")
    return averages


def home(averager: Averager) -> str:
    """The name under which a checkpoint holds the state of ``averager``: that of its first average."""
    return next(iter(averager.views()), averager.name)


def leading(callbacks: Sequence[C]) -> C:
    """The first callback that keeps an average, or the first one.

    Raises:
        ValueError: two of them would set the learning rate.
    """
    setting = [callback.averager.name for callback in callbacks if callback.learning_rate is not None]
    if len(setting) > 1:
        raise ValueError(f"{setting[0]!r} and {setting[1]!r} both set the learning rate: give swa_lr= to one of them")
    return next((callback for callback in callbacks if callback.average is not None), callbacks[0])


class BEMASettings(CallbackCore):
    """The arguments of `averaging.BEMA` and of `CallbackCore`."""

    def __init__(
        self,
        kappa: float = 0.5,
        eta: float = 0.2,
        *,
        rho: float = 10.0,
        gamma: float = 1.0,
        every: Span | None = None,
        start: Span = 0,
        memory: str | os.PathLike[str] = "cpu",
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
        evaluate: Evaluate = "average",
        checkpoint: Checkpoint = "online",
        missing: Literal["error", "start"] = "error",
        batchnorm: int = LIMIT,
    ) -> None:
        averager = averaging.BEMA(
            kappa,
            eta,
            rho=rho,
            gamma=gamma,
            every=every,
            start=start,
            memory=memory,
            name=name,
            frozen=frozen,
            buffers=buffers,
        )
        super().__init__(averager, evaluate=evaluate, checkpoint=checkpoint, missing=missing, batchnorm=batchnorm)


class SWADSettings(CallbackCore):
    """The arguments of `averaging.SWAD` and of `CallbackCore`; ``evaluate`` is ``"both"`` by default."""

    def __init__(
        self,
        optimum_patience: int = 3,
        overfit_patience: int = 6,
        *,
        tolerance: float = 1.3,
        metric: str | None = None,
        every: Span | None = None,
        start: Span = 0,
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
        evaluate: Evaluate = "both",
        checkpoint: Checkpoint = "online",
        missing: Literal["error", "start"] = "error",
        batchnorm: int = LIMIT,
    ) -> None:
        averager = averaging.SWAD(
            optimum_patience,
            overfit_patience,
            tolerance=tolerance,
            metric=metric,
            every=every,
            start=start,
            name=name,
            frozen=frozen,
            buffers=buffers,
        )
        super().__init__(averager, evaluate=evaluate, checkpoint=checkpoint, missing=missing, batchnorm=batchnorm)


class LAWASettings(CallbackCore):
    """The arguments of `averaging.LAWA` and of `CallbackCore`."""

    def __init__(
        self,
        k: int | Sequence[int] = 5,
        *,
        every: Span | None = None,
        window: Span | None = None,
        weights: Decay = "linear",
        start: Span = 0,
        memory: str | os.PathLike[str] = "cpu",
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
        evaluate: Evaluate = "average",
        checkpoint: Checkpoint = "online",
        missing: Literal["error", "start"] = "error",
        batchnorm: int = LIMIT,
    ) -> None:
        averager = averaging.LAWA(
            k,
            every=every,
            window=window,
            weights=weights,
            start=start,
            memory=memory,
            name=name,
            frozen=frozen,
            buffers=buffers,
        )
        super().__init__(averager, evaluate=evaluate, checkpoint=checkpoint, missing=missing, batchnorm=batchnorm)


class ElasticResetSettings(CallbackCore):
    """The arguments of `averaging.ElasticReset` and of `CallbackCore`."""

    def __init__(
        self,
        every: Span,
        decay: float = 0.995,
        *,
        moments: Moments = "kept",
        memory: str | os.PathLike[str] = "cpu",
        start: Span = 0,
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
        missing: Literal["error", "start"] = "error",
    ) -> None:
        averager = averaging.ElasticReset(
            every,
            decay,
            moments=moments,
            memory=memory,
            start=start,
            name=name,
            frozen=frozen,
            buffers=buffers,
        )
        super().__init__(averager, missing=missing)


class EMASettings(CallbackCore):
    """The arguments of `averaging.EMA` and of `CallbackCore`."""

    def __init__(
        self,
        decay: float | None = None,
        *,
        half_life: Span | None = None,
        window: Span | None = None,
        every: Span | None = None,
        start: Span = 0,
        warmup: Warmup | None = None,
        power: float = 2 / 3,
        compensated: bool = False,
        switch: Span | None = None,
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
        evaluate: Evaluate = "average",
        checkpoint: Checkpoint = "online",
        missing: Literal["error", "start"] = "error",
        batchnorm: int = LIMIT,
    ) -> None:
        averager = averaging.EMA(
            decay,
            half_life=half_life,
            window=window,
            every=every,
            start=start,
            warmup=warmup,
            power=power,
            compensated=compensated,
            switch=switch,
            name=name,
            frozen=frozen,
            buffers=buffers,
        )
        super().__init__(averager, evaluate=evaluate, checkpoint=checkpoint, missing=missing, batchnorm=batchnorm)


class SWASettings(CallbackCore):
    """The arguments of `averaging.SWA`, its learning rate, and the arguments of `CallbackCore`.

    Args:
        swa_lr: the learning rate from SWA's start on, for all parameter groups or a list with one for each. It takes
            over from the run's own scheduler, which by default goes on. (In your own loop use PyTorch's `SWALR`.)
        anneal: length of the annealing from the learning rate at SWA's start to ``swa_lr``.
        anneal_strategy: its form, ``"cos"`` or ``"linear"``.
        cycle: instead of annealing, let the learning rate fall linearly from ``max_lr`` to ``swa_lr`` in every cycle of
            this length, such as ``"epoch"``, and take a snapshot at its end.
        max_lr: the learning rate that a cycle begins with; by default the one at SWA's start.
    """

    def __init__(
        self,
        start: Span = 0.75,
        *,
        every: Span | None = None,
        swa_lr: Rates | None = None,
        anneal: Span = 0.05,
        anneal_strategy: AnnealStrategy = "cos",
        cycle: Span | None = None,
        max_lr: Rates | None = None,
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
        evaluate: Evaluate = "average",
        checkpoint: Checkpoint = "online",
        missing: Literal["error", "start"] = "error",
        batchnorm: int = LIMIT,
    ) -> None:
        if swa_lr is not None:
            self.learning_rate = SWALearningRate(
                swa_lr, anneal=anneal, anneal_strategy=anneal_strategy, cycle=cycle, max_lr=max_lr
            )
        elif cycle is not None or max_lr is not None:
            raise ValueError("cycle and max_lr are about the learning rate during SWA: give swa_lr=, too")
        every = cycle if every is None else every
        averager = averaging.SWA(start, every=every, name=name, frozen=frozen, buffers=buffers)
        super().__init__(averager, evaluate=evaluate, checkpoint=checkpoint, missing=missing, batchnorm=batchnorm)


class PostHocEMASettings(CallbackCore):
    """The arguments of `averaging.PostHocEMA` and of `CallbackCore`."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        widths: Sequence[float] = (0.05, 0.10),
        *,
        snapshots: Span = "1%",
        every: Span | None = None,
        start: Span = 0,
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
        evaluate: Evaluate = "average",
        checkpoint: Checkpoint = "online",
        missing: Literal["error", "start"] = "error",
        batchnorm: int = LIMIT,
    ) -> None:
        averager = averaging.PostHocEMA(
            folder, widths, snapshots=snapshots, every=every, start=start, name=name, frozen=frozen, buffers=buffers
        )
        super().__init__(averager, evaluate=evaluate, checkpoint=checkpoint, missing=missing, batchnorm=batchnorm)


class TrajectorySettings(CallbackCore):
    """The arguments of `averaging.Trajectory` and of `CallbackCore`."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: Span | None = None,
        dtype: str | None = None,
        start: Span = 0,
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
        missing: Literal["error", "start"] = "error",
    ) -> None:
        averager = averaging.Trajectory(
            folder, every=every, dtype=dtype, start=start, name=name, frozen=frozen, buffers=buffers
        )
        super().__init__(averager, missing=missing)
