"""Find checkpoints in folders, order them by step, choose among them. No torch, except to open torch files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from averaging.checkpoints.checkpoint import TORCH_SUFFIXES, Checkpoint, weight_files
from averaging.checkpoints.files import read_header

RECORD_FILE = "soup.json"
RECORD_KEY = "soup"  # in the metadata of a safetensors file
DEFAULT_OUTPUT = "soup"
# What `averaging.trail` writes: a folder that is no snapshot itself, and the metadata of a post-hoc EMA's snapshots.
TEMPLATE = "template"
WIDTH_KEY = "post-hoc width"
FISHER_KEY = "fisher"  # in the metadata of a Fisher information

# Beside the weights in a trainer's folder, and never weights themselves.
_NOT_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state.*)\.(pt|pth|bin)")
_TRAINER_FOLDER = re.compile(r"checkpoint-\d+")


def find(folder: str | os.PathLike[str]) -> list[Checkpoint]:
    """The checkpoints that lie directly in ``folder``, ordered by step, then by name.

    Folders named ``checkpoint-<step>`` where there are any; else any model or adapter folders; else files. What is not
    an ingredient is left out: hidden names, trainer state (``optimizer.pt`` and the like), earlier soups, averages kept
    by this library's callbacks, and Lightning's ``last.ckpt`` where another file has the same step.

    Raises:
        FileNotFoundError: there are none.
        ValueError: one of them is corrupt.
        OSError: the folder or a file may not be read.
    """
    folder = Path(folder)
    names = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    folders = [path for path in names if path.is_dir()]
    paths = [path for path in folders if _TRAINER_FOLDER.fullmatch(path.name)]
    # In a folder that is a model itself, other folders and files belong to that model.
    if not paths and not weight_files(folder):
        paths = [path for path in folders if _is_ingredient_folder(path)] or [
            path for path in names if _is_ingredient_file(path)
        ]
    if not paths:
        raise FileNotFoundError(
            f"no checkpoints in {folder}: looked for checkpoint-<step> folders, other model or adapter folders, "
            f"and {', '.join(('.safetensors', *TORCH_SUFFIXES))} files"
        )
    checkpoints = sorted(map(Checkpoint, paths), key=_order)
    steps = [checkpoint.step for checkpoint in checkpoints if not _is_last(checkpoint)]
    return [checkpoint for checkpoint in checkpoints if not (_is_last(checkpoint) and checkpoint.step in steps)]


def gather(paths: Iterable[str | os.PathLike[str] | Checkpoint]) -> list[Checkpoint]:
    """Open what is named: a model folder or file is one checkpoint, any other folder stands for those in it.

    The only path given is also searched when it is a model folder, because a training run's folder usually holds the
    final model beside its checkpoints. Checkpoints found in a folder come by step, paths in the order given.

    Raises:
        ValueError: something is corrupt, or named twice.
        FileNotFoundError: something does not exist, or a folder holds no checkpoints.
    """
    paths = list(paths)
    checkpoints: list[Checkpoint] = []
    for path in paths:
        if isinstance(path, Checkpoint):
            checkpoints.append(path)
        elif is_searched(Path(path), alone=len(paths) == 1):
            checkpoints += find(path)
        else:
            checkpoints.append(Checkpoint(path))
    seen: set[str] = set()
    for checkpoint in checkpoints:
        real = os.path.realpath(checkpoint.path)
        if real in seen:
            raise ValueError(f"{checkpoint.path} is named twice; name it once, or use weights to count it more")
        seen.add(real)
    return checkpoints


def is_searched(path: Path, alone: bool) -> bool:
    """Whether a path stands for the checkpoints in it, not for itself."""
    if not path.is_dir():
        return False
    if not weight_files(path):
        return True
    return alone and any(child.is_dir() and _TRAINER_FOLDER.fullmatch(child.name) for child in path.iterdir())


def select(checkpoints: Sequence[Checkpoint], last: int | None = None, every: int | None = None) -> list[Checkpoint]:
    """Every ``every``-th checkpoint, counted back from the newest, and of these the ``last`` newest.

    They are put in the order of their steps first, if all of them have one.

    Raises:
        ValueError: ``last`` or ``every`` is less than 1, or there are fewer than ``last``.
    """
    chosen = list(checkpoints)
    if last is None and every is None:
        return chosen
    if all(checkpoint.step is not None for checkpoint in chosen):
        chosen.sort(key=lambda checkpoint: checkpoint.step or 0)
    if every is not None:
        if every < 1:
            raise ValueError(f"--every must be at least 1, not {every}")
        chosen = chosen[::-1][::every][::-1]
    if last is not None:
        if last < 1:
            raise ValueError(f"--last must be at least 1, not {last}")
        if last > len(chosen):
            raise ValueError(f"--last {last} asks for more checkpoints than there are ({len(chosen)})")
        chosen = chosen[-last:]
    return chosen


def _order(checkpoint: Checkpoint) -> tuple[float, list[str | int]]:
    # Numbers inside names count as numbers: part-2 comes before part-10.
    pieces = re.split(r"(\d+)", checkpoint.path.name)
    return (
        float("-inf") if checkpoint.step is None else checkpoint.step,
        [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)],
    )


def _is_last(checkpoint: Checkpoint) -> bool:
    return checkpoint.kind in ("lightning", "distributed") and checkpoint.path.name.startswith("last")


def _is_ingredient_folder(path: Path) -> bool:
    if path.name in (DEFAULT_OUTPUT, TEMPLATE):
        return False
    return bool(weight_files(path)) and not any((path / name).exists() for name in (RECORD_FILE, "averaging.json"))


def _is_ingredient_file(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return not {RECORD_KEY, WIDTH_KEY, FISHER_KEY} & read_header(path).metadata.keys()
    return path.suffix in TORCH_SUFFIXES and not _NOT_WEIGHTS.fullmatch(path.name)
