"""Several processes that cook one soup: what ``torchrun`` starts, on one machine or on several that share files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")


class Team:
    """One process alone."""

    rank = 0
    size = 1

    def share(self, sizes: Mapping[str, int]) -> list[str]:
        """This process's part of the tensors, of name → bytes: about as many bytes as every other's, side by side."""
        total, before, names = sum(sizes.values()), 0, []
        for name, size in sizes.items():
            if (before + size / 2) * self.size // max(total, 1) == self.rank:
                names.append(name)
            before += size
        return names

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Do ``work`` and wait for the others; every process's result, in the order of their ranks.

        Raises:
            Exception: what ``work`` raised.
            ValueError: the work of another process failed.
        """
        return [work()]


class Torchrun(Team):
    """The processes that ``torchrun`` started, connected by gloo."""

    def __init__(self) -> None:
        import torch.distributed

        self._distributed = torch.distributed
        self.rank, self.size = self._distributed.get_rank(), self._distributed.get_world_size()

    def gather(self, work: Callable[[], T]) -> list[T]:
        result: Any = None
        error: BaseException | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        outcomes: list[Any] = [None] * self.size
        try:
            self._distributed.all_gather_object(outcomes, (result, None if error is None else str(error)))
        except RuntimeError as lost:
            raise error or ValueError(f"lost the connection to another process of this soup ({lost})") from lost
        if error is not None:
            raise error
        for rank, (_, problem) in enumerate(outcomes):
            if problem is not None:
                raise ValueError(f"process {rank} failed: {problem}")
        return [outcome for outcome, _ in outcomes]


@contextmanager
def torchrun() -> Iterator[Team]:
    """The processes that ``torchrun`` started, if it did, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team()
        return
    import torch.distributed

    # The others may have a long way to go when this process has done its part; one that died is noticed at once.
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        yield Torchrun()
    finally:
        torch.distributed.destroy_process_group()
