"""Snapshots that a run leaves in a folder, for choosing afterwards what to make of them.

    runs/trajectory/step-000000100.safetensors     one file per snapshot, its step in the name and the metadata
    runs/trajectory/template/                      the model as it opens: configuration, tokenizer, frozen weights
    runs/trajectory/superseded-1/                  snapshots of a history that was given up

Files appear whole or not at all, and stay when the process ends. Whatever a run that was started again or resumed
from an earlier step left behind is moved aside, so that the snapshots in the folder are always those of one history.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from torch import distributed

from averaging.atomic import replacing
from averaging.checkpoints.finding import TEMPLATE
from averaging.memory import save_weights

if TYPE_CHECKING:
    from averaging.weights import Weights


class Trail:
    """The snapshots of one run in ``folder``; in a distributed run, only rank 0 writes them, whole.

    Args:
        folder: where they lie.
        labels: a regular expression for what follows the step in the names of this run's snapshots.
    """

    def __init__(self, folder: Path, labels: str = "") -> None:
        self.folder = folder
        self._name = re.compile(rf"step-(\d+){labels}\.safetensors")

    def store(
        self,
        step: int,
        weights: Weights,
        label: str = "",
        metadata: Mapping[str, str] | None = None,
        shards: Weights | None = None,
    ) -> None:
        """Write a snapshot; ``label`` tells several of one step apart.

        Args:
            step: optimizer steps done.
            weights: what is stored.
            label: what follows the step in the name.
            metadata: of the file.
            shards: name → DTensor; what ``weights`` holds under that name is this process's part of one like it.

        Raises:
            OSError: no room, no permission. What was stored before is intact.
        """
        if not (shards or _writes()):
            return
        metadata = {"format": "pt", "step": str(step), **(metadata or {})}
        file = self.folder / f"step-{step:09d}{label}.safetensors"
        try:
            if shards:
                from averaging.shard_files import write_whole

                write_whole(weights, shards, file, metadata)
            else:
                with replacing(file) as temporary:
                    save_weights(weights, temporary, metadata)
        except (OSError, SafetensorError) as error:
            size = sum(tensor.nbytes for tensor in weights.values())
            raise OSError(
                getattr(error, "errno", None) or errno.ENOSPC,
                f"cannot store a snapshot of {size / 1e6:.1f} MB ({error}). The snapshots stored before are intact: "
                "make room and go on, or resume from the last checkpoint",
                str(file),
            ) from error

    def set_aside(self, after: int) -> None:
        """Move the snapshots of later steps than ``after`` to ``superseded-<n>/``: they are of another history."""
        others = [file for step, file in self._snapshots() if step > after] if _writes() else []
        if others:
            aside = next(folder for n in count(1) if not (folder := self.folder / f"superseded-{n}").exists())
            aside.mkdir()
            for file in others:
                file.rename(aside / file.name)

    def keep_template(self, save: Callable[[Path], None], *, together: bool = False) -> None:
        """Let ``save`` write the model to ``template/``: what a soup of the snapshots will look like.

        Args:
            save: writes it into the folder given.
            together: all processes take part in that, as the model is sharded.
        """
        if together:
            from averaging.shard_files import replacing_together

            with replacing_together(self.folder / TEMPLATE) as staging:
                save(staging)
        elif _writes():
            with replacing(self.folder / TEMPLATE) as staging:
                staging.mkdir()
                save(staging)

    def _snapshots(self) -> Iterator[tuple[int, Path]]:
        for file in self.folder.glob("step-*.safetensors"):
            if match := self._name.fullmatch(file.name):
                yield int(match[1]), file


def _writes() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
