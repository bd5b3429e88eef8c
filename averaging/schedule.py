"""When an averager absorbs: every so many optimizer steps, epochs, or a fraction of the run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Span = int | float | str
"""A length of training: an ``int`` is optimizer steps, a ``float`` between 0 and 1 a fraction of the run,
a string either of them with its unit: ``"epoch"``, ``"2 epochs"``, ``"100 steps"``, ``"1%"``."""

_TEXT = re.compile(r"\s*(?P<amount>\d+(\.\d*)?|\.\d+)?\s*(?P<unit>steps?|epochs?|%)?\s*")


@dataclass(frozen=True)
class Run:
    """What is known of a run's length: optimizer steps in all and in an epoch, ``None`` where unknown."""

    steps: int | None = None
    steps_per_epoch: float | None = None


@dataclass(frozen=True)
class Length:
    """A parsed `Span`."""

    amount: float
    unit: Literal["steps", "epochs", "run"]

    @classmethod
    def parse(cls, span: Span, what: str) -> Length:
        """Read ``span``; ``what`` names the argument in errors.

        Raises:
            TypeError: not an int, float or str.
            ValueError: negative, not finite, a fraction above 1, or text that is not a length.
        """
        help_ = (
            f"{what}={span!r}: give optimizer steps as an int (100), a fraction of the run as a float (0.01) "
            'or a text such as "epoch", "2 epochs", "1%"'
        )
        if isinstance(span, bool) or not isinstance(span, int | float | str):
            raise TypeError(help_)
        if isinstance(span, str):
            match = _TEXT.fullmatch(span)
            if not match or not (match["amount"] or match["unit"]) or (match["unit"] == "%" and not match["amount"]):
                raise ValueError(help_)
            amount = float(match["amount"] or 1)
            unit = match["unit"] or ""
            if unit == "%":
                span = amount / 100
            elif unit.startswith("epoch"):
                return cls(amount, "epochs")
            elif amount.is_integer():
                span = int(amount)
            else:
                raise ValueError(help_)
        if not math.isfinite(span) or span < 0 or (isinstance(span, float) and span > 1):
            raise ValueError(help_)
        return cls(span, "run" if isinstance(span, float) else "steps")

    def text(self, run: Run) -> str:
        """This length in words: ``step``, ``20 steps`` or ``2 epochs``."""
        amount, unit = (self.amount, "epoch") if self.unit == "epochs" else (self.in_steps(run, "every"), "step")
        amount = amount if unit == "epoch" else max(1, round(amount))
        return unit if amount == 1 else f"{amount:g} {unit}s"

    def in_steps(self, run: Run, what: str) -> float:
        """This length in optimizer steps (not rounded).

        Raises:
            ValueError: it is relative to something that is not known of ``run``.
        """
        if self.unit == "steps":
            return self.amount
        if self.unit == "run":
            if run.steps is None:
                raise ValueError(
                    f"{what} is a fraction of the run ({self.amount:g}), whose length is not known: "
                    f"call prepare(total_steps=...) before the first update, or give {what} in optimizer steps"
                )
            return self.amount * run.steps
        if run.steps_per_epoch is None:
            raise ValueError(
                f"{what} is in epochs ({self.amount:g}), whose length is not known: "
                f"call prepare(steps_per_epoch=...) before the first update, or give {what} in optimizer steps"
            )
        return self.amount * run.steps_per_epoch


@dataclass(frozen=True)
class Schedule:
    """Absorb whenever a multiple of ``every`` has been reached since the last offer, from ``start`` on.

    Crossings are counted, ``step // every > last // every``, rather than ``step % every == 0``:
    a trainer's step counter can move by more than one, and then would jump over the multiples.
    """

    every: Length
    start: Length

    def due(self, run: Run, last: tuple[int, float], now: tuple[int, float | None]) -> bool:
        """Whether to absorb at ``now``, given the ``last`` offer; both are (optimizer step, epochs done)."""
        if not self.started(run, now):
            return False
        before = self._clock(self.every, run, *last, "every")
        return math.floor(self._clock(self.every, run, *now, "every")) > math.floor(before)

    def started(self, run: Run, now: tuple[int, float | None]) -> bool:
        """Whether ``start`` has been reached at (optimizer step, epochs done)."""
        return self._clock(self.start, run, *now, "start") >= 1

    def steps(self, run: Run, after: int = 0) -> Iterator[int]:
        """The optimizer steps later than ``after`` at which to absorb; none where they cannot be told before."""
        try:
            every, start = self.every.in_steps(run, "every"), self.start.in_steps(run, "start")
        except ValueError:
            return
        if self.every.unit != "epochs":
            every = max(1, round(every))
        if self.start.unit != "epochs":
            start = round(start)
        while True:
            before = max(after, math.ceil(start - 1e-9) - 1)
            after = math.ceil((math.floor(before / every + 1e-9) + 1) * every - 1e-9)
            yield after

    @staticmethod
    def _clock(length: Length, run: Run, step: int, epoch: float | None, what: str) -> float:
        """How many times ``length`` fits into the training done so far."""
        if length.amount == 0:
            return math.inf
        if length.unit == "epochs":
            if epoch is None:
                raise ValueError(f"{what} is in epochs: pass the epochs done to update(..., epoch=...)")
            # Trainers report fractions of epochs such as 0.30000000000000004.
            return epoch / length.amount + 1e-9
        return step / max(1, round(length.in_steps(run, what)))
