"""Metrics of soups: a function of one's own or a command, asked once for each content. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from averaging.atomic import replacing, staging_folder
from averaging.checkpoints import Checkpoint
from averaging.checkpoints.files import opening, read_json
from averaging.soups.measures import Measure

if TYPE_CHECKING:
    from averaging.soups.soup import Soup

T = TypeVar("T")
Best = Literal["min", "max"]
Evaluate = Callable[[Checkpoint], float | Mapping[str, float]]
Progress = Callable[[int, int, str], None]
"""Takes the soups evaluated so far, how many there are in all, and what is next."""


def check_best(best: str) -> None:
    """Raise ValueError unless ``best`` is one of those known."""
    if best not in ("min", "max"):
        raise ValueError(f"best={best!r}: give 'min' or 'max'")


class Command:
    """Evaluates by running a command; its last line of output is a number, or JSON: a number or an object of numbers.

    Args:
        text: the command, run without a shell; ``{checkpoint}`` in it stands for the path of what is evaluated.

    Raises:
        ValueError: the text is no command, or does not say where the checkpoint goes.
    """

    def __init__(self, text: str) -> None:
        self.words = shlex.split(text)
        self.__name__ = text
        if not any("{checkpoint}" in word for word in self.words):
            raise ValueError(f"the command {text!r} must hold {{checkpoint}}, which stands for what is evaluated")

    def __call__(self, soup: Checkpoint) -> float | Mapping[str, float]:
        """Run it.

        Raises:
            ValueError: it failed, or printed something else.
            OSError: it cannot be run.
        """
        words = [word.replace("{checkpoint}", str(soup.path)) for word in self.words]
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
            raise ValueError(f"exit status {done.returncode}: {said}")
        lines = done.stdout.strip().splitlines()
        try:
            value: float | Mapping[str, float] = json.loads(lines[-1])
        except (IndexError, ValueError):
            raise ValueError(f"it printed no number but {lines[-1] if lines else 'nothing'!r}") from None
        return value


class Evaluation:
    """The metric of soups, each written to ``target`` for as long as it is evaluated.

    Args:
        evaluate: takes the soup as a `Checkpoint`; returns a number, or a mapping from names to numbers.
        target: where soups are written in the meantime.
        metric: which of the numbers is meant, where there are several.
        cache: a JSON file of results by content: what is in it is not evaluated again. It is for this ``evaluate`` by
            its name; remove the file when its data have changed.
    """

    def __init__(
        self, evaluate: Evaluate, target: Path, metric: str | None = None, cache: str | os.PathLike[str] | None = None
    ) -> None:
        self.evaluate, self.target, self.metric = evaluate, target, metric
        self.cache = None if cache is None else Path(cache)
        self.known = read_json(self.cache) if self.cache is not None and self.cache.exists() else {}

    def __call__(self, make: Callable[..., Soup], what: str) -> float:
        """The metric of the soup that ``make(output=, force=)`` prepares; ``what`` names it in errors.

        Raises:
            ValueError: the evaluation raised, or returned something that is not a finite number.
        """
        return self._value(make, what, self._number)

    def several(self, make: Callable[..., Soup], what: str) -> dict[str, float]:
        """All metrics of that soup by their names; a single number goes by that of the evaluation.

        Raises:
            ValueError: as above, for any of them.
        """
        return self._value(make, what, self._numbers)

    def _value(self, make: Callable[..., Soup], what: str, check: Callable[[float | Mapping[str, float], str], T]) -> T:
        """What ``check`` makes of the evaluation's value, which is known or asked for."""
        soup = make(output=self.target, force=True).cook()
        assert isinstance(soup, Checkpoint)
        if self.cache is None:
            return check(self._ask(soup, what), what)
        key = f"{name_of(self.evaluate)} {fingerprint(soup)}"
        if key not in self.known:
            value = self._ask(soup, what)
            check(value, what)
            self.known[key] = (
                {name: float(v) for name, v in value.items()} if isinstance(value, Mapping) else float(value)
            )
            with replacing(self.cache) as temporary:
                temporary.write_text(json.dumps(self.known, indent=1) + "\n", encoding="utf-8")
        return check(self.known[key], what)

    def _ask(self, soup: Checkpoint, what: str) -> float | Mapping[str, float]:
        try:
            return self.evaluate(soup)
        except Exception as error:
            raise ValueError(f"the evaluation raised {type(error).__name__} for {what}: {error}") from error

    def _number(self, value: float | Mapping[str, float], what: str) -> float:
        if isinstance(value, Mapping):
            names = list(value)
            if self.metric is None and len(names) != 1:
                raise ValueError(f"the evaluation returned {', '.join(names)} for {what}: choose one with metric=")
            name = names[0] if self.metric is None else self.metric
            if name not in value:
                raise ValueError(f"the evaluation returned no {name!r} for {what}, only {', '.join(names)}")
            value = value[name]
        return _finite(value, what)

    def _numbers(self, value: float | Mapping[str, float], what: str) -> dict[str, float]:
        if self.metric is not None or not isinstance(value, Mapping):
            self._number(value, what)
        named = value if isinstance(value, Mapping) else {title(self.evaluate, self.metric): value}
        if not named:
            raise ValueError(f"the evaluation returned no metric for {what}")
        return {name: _finite(number, f"{what} ({name})" if len(named) > 1 else what) for name, number in named.items()}


def _finite(value: float, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the evaluation must return a number, not {value!r} for {what}") from error
    if not math.isfinite(number):
        raise ValueError(
            f"the evaluation returned {number} for {what}; leave these checkpoints out, or return a number"
        )
    return number


@contextmanager
def evaluating(
    evaluate: Evaluate,
    output: str | os.PathLike[str] | None,
    metric: str | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Iterator[Evaluation]:
    """An `Evaluation` whose soups are written beside the output, where there is room, and are of its kind."""
    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Evaluation(evaluate, Path(folder) / "soup", metric, cache)
        return
    target = Path(os.path.realpath(output))
    with staging_folder(next(parent for parent in target.parents if parent.exists())) as folder:
        suffix = target.suffix if target.suffix == ".safetensors" else ""
        yield Evaluation(evaluate, folder / f"soup{suffix}", metric, cache)


def fingerprint(checkpoint: Checkpoint) -> str:
    """The SHA-256 of all tensors by name: dtype, shape and bytes, whatever files they are in."""
    total = hashlib.sha256()
    for name, entry in sorted(checkpoint.entries.items()):
        total.update(f"{name!r} {entry.dtype} {list(entry.shape)}\n".encode())
        with opening([entry]) as descriptors:
            size = entry.stop - entry.start
            for start in range(0, size, 1 << 20):
                data = memoryview(bytearray(min(1 << 20, size - start)))
                entry.read(descriptors, data, start)
                total.update(data)
    return total.hexdigest()


def title(evaluate: Evaluate, metric: str | None) -> str:
    """What the metric is called in a table or picture."""
    name = "" if isinstance(evaluate, Command) else str(getattr(evaluate, "__name__", ""))
    return metric or (name if name.isidentifier() else "metric")


def name_of(function: Callable[..., Any]) -> str:
    """What results of an evaluation or a loss are kept by."""
    if isinstance(function, Command):
        return function.__name__
    if isinstance(function, Measure):
        return function.key
    module = getattr(function, "__module__", "")
    return f"{module}:{getattr(function, '__qualname__', type(function).__qualname__)}"
