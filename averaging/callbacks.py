"""The half of the trainers' callbacks that knows no trainer: which averages, and what is done with them.

`averaging.lightning` and `averaging.transformers` add the hooks. Each averager has here the one class that spells
out its arguments, and one line in either adapter.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import nn

import averaging
from averaging.apply import load_into
from averaging.averager import Averager
from averaging.averagers.ema import Warmup
from averaging.decay import Decay
from averaging.schedule import Span

Evaluate = Literal["average", "online", "both"]
Checkpoint = Literal["online", "average"]

ONLINE = "online"
"""What the weights being trained are called in checkpoints and metrics."""


class CallbackCore:
    """Averages to keep during a trainer's run.

    Args:
        averagers: one or more averagers, with different names. The first one leads: it is what is evaluated, and
            what the model holds when training ends.
        evaluate: what evaluations during training measure: the ``"average"``, the ``"online"`` weights, or
            ``"both"``: the average under the usual names and the online weights beside them.
        checkpoint: which weights a checkpoint's model file holds. ``"online"``: those being trained, with each
            average beside them. ``"average"``: the first average, with the online weights beside it. A run resumes
            exactly from either.
        missing: what to do when training resumes from a checkpoint without the average's state: ``"error"``,
            or ``"start"`` a new average there.

    Raises:
        TypeError: something that is not an averager.
        ValueError: no averager, two of one name, or an unknown option.
    """

    framework: ClassVar[str]

    def __init__(
        self,
        *averagers: Averager,
        evaluate: Evaluate = "average",
        checkpoint: Checkpoint = "online",
        missing: Literal["error", "start"] = "error",
    ) -> None:
        if not averagers:
            raise ValueError("give at least one averager: AveragingCallback(EMA(0.999))")
        for averager in averagers:
            if not isinstance(averager, Averager):
                raise TypeError(f"{averager!r} is not an averager: give instances such as averaging.EMA(0.999)")
        for option, value, known in (
            ("evaluate", evaluate, ("average", "online", "both")),
            ("checkpoint", checkpoint, ("online", "average")),
            ("missing", missing, ("error", "start")),
        ):
            if value not in known:
                raise ValueError(f"{option}={value!r}: give one of {', '.join(map(repr, known))}")
        self.averagers = list(averagers)
        self.evaluate = evaluate
        self.checkpoint = checkpoint
        self.missing = missing
        require_different_names(self.averagers)

    @property
    def averager(self) -> Averager:
        """The leading averager."""
        return self.averagers[0]

    def offer(self, model: nn.Module, step: int, epoch: float | None) -> None:
        """Offer the weights after an optimizer step, and write back what an averager wants training to go on from."""
        for averager in self.averagers:
            restart = averager.update(model, step, epoch=epoch)
            if restart is not None:
                load_into(model, restart)

    def warn_ignored(self, leader: Averager) -> None:
        """Say so if this callback, which does not lead, was given options that only the leading one obeys."""
        if (self.evaluate, self.checkpoint) != ("average", "online"):
            warnings.warn(
                f"evaluate= and checkpoint= of the callback for {self.averager.name!r} are ignored: "
                f"the first averaging callback, for {leader.name!r}, leads",
                stacklevel=3,
            )

    def warn_no_average(self) -> None:
        """Say that the leading average, which the model should hold when training ends, never began."""
        warnings.warn(
            f"training ended before there was an average {self.averager.name!r}: the model keeps its trained weights",
            stacklevel=3,
        )

    def observe(self, metrics: Mapping[str, Any], step: int) -> None:
        """Tell the averagers what an evaluation measured."""
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, Real | torch.Tensor)}
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
            f"{where} holds no state of the average {averager.name!r}"
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


def require_different_names(averagers: list[Averager]) -> None:
    """Raise ValueError if two averages would share metrics and files."""
    names = [averager.name for averager in averagers]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} averages are named {name!r}: tell them apart with name=")


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
        super().__init__(averager, evaluate=evaluate, checkpoint=checkpoint, missing=missing)


class LAWASettings(CallbackCore):
    """The arguments of `averaging.LAWA` and of `CallbackCore`."""

    def __init__(
        self,
        k: int = 5,
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
        super().__init__(averager, evaluate=evaluate, checkpoint=checkpoint, missing=missing)


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
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
        evaluate: Evaluate = "average",
        checkpoint: Checkpoint = "online",
        missing: Literal["error", "start"] = "error",
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
            name=name,
            frozen=frozen,
            buffers=buffers,
        )
        super().__init__(averager, evaluate=evaluate, checkpoint=checkpoint, missing=missing)


class SWASettings(CallbackCore):
    """The arguments of `averaging.SWA` and of `CallbackCore`."""

    def __init__(
        self,
        start: Span = 0.75,
        *,
        every: Span | None = None,
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
        evaluate: Evaluate = "average",
        checkpoint: Checkpoint = "online",
        missing: Literal["error", "start"] = "error",
    ) -> None:
        averager = averaging.SWA(start, every=every, name=name, frozen=frozen, buffers=buffers)
        super().__init__(averager, evaluate=evaluate, checkpoint=checkpoint, missing=missing)


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
    ) -> None:
        averager = averaging.PostHocEMA(
            folder, widths, snapshots=snapshots, every=every, start=start, name=name, frozen=frozen, buffers=buffers
        )
        super().__init__(averager, evaluate=evaluate, checkpoint=checkpoint, missing=missing)


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
