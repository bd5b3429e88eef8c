"""Where snapshots live: on the weights' device, in CPU memory, page-locked or not, or in a folder on disk.

A memory holds sets of weights under string keys. What is stored is a verbatim copy.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from averaging.text import place, size

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.weights import Weights


def memory(where: str | os.PathLike[str]) -> Memory:
    """The memory that ``where`` names: ``"cpu"``, ``"pinned"``, ``"device"``, or a folder on disk."""
    if where == "cpu":
        return TensorMemory("cpu")
    if where == "pinned":
        return PinnedMemory()
    if where == "device":
        return TensorMemory(None)
    return DiskMemory(Path(where))


class Memory(ABC):
    """Sets of weights under keys."""

    @abstractmethod
    def store(self, key: str, weights: Weights, recycle: str | None = None) -> None:
        """Keep a copy of ``weights`` under ``key``, in place of those under ``recycle`` if given."""

    @abstractmethod
    def __getitem__(self, key: str) -> Weights:
        """The weights stored under ``key``."""

    @abstractmethod
    def restore(self, snapshots: Mapping[str, Weights]) -> None:
        """Forget everything held and keep copies of ``snapshots``."""

    @abstractmethod
    def cost(self, weights: Weights) -> str:
        """What one set of ``weights`` costs, and where."""

    def room(self, weights: Weights) -> tuple[int, str] | None:
        """The bytes free where ``weights`` would be stored, and where that is; None where it cannot be told."""
        return None

    def shortage(self, weights: Weights, copies: int) -> str | None:
        """Why there is no room for so many sets of ``weights``, or None."""
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine, as torchrun tells them
        needed, room = copies * sum(tensor.nbytes for tensor in weights.values()) * processes, self.room(weights)
        if room is None or needed <= room[0]:
            return None
        of_all = f" in {processes} processes" if processes > 1 else ""
        return (
            f"{copies} snapshots are {size(needed)}{of_all}, but {size(room[0])} are free {room[1]}: make room, keep "
            "fewer, or give another memory="
        )

    def save(self, key: str, file: Path) -> None:
        """Write the weights under ``key`` to ``file``, a safetensors file."""
        save_weights(self[key], file)


class TensorMemory(Memory):
    """Snapshots as tensors: on ``device``, or where the weights are when it is None."""

    def __init__(self, device: str | None) -> None:
        self._device = device
        self._snapshots: dict[str, dict[str, Tensor]] = {}

    def store(self, key: str, weights: Weights, recycle: str | None = None) -> None:
        # An evicted snapshot's tensors are written over: absorbing allocates nothing once the ring is full.
        kept = self._snapshots[recycle] if recycle else None
        if kept is None or any(kept[name].device != self._home(tensor) for name, tensor in weights.items()):
            kept = {name: torch.empty_like(tensor, device=self._home(tensor)) for name, tensor in weights.items()}
        torch._foreach_copy_([kept[name] for name in weights], list(weights.values()))
        if recycle:
            del self._snapshots[recycle]
        self._snapshots[key] = kept

    def cost(self, weights: Weights) -> str:
        return f"{_bytes(weights)} {place(self._home(tensor) for tensor in weights.values())}"

    def room(self, weights: Weights) -> tuple[int, str] | None:
        if any(self._home(tensor).type != "cpu" for tensor in weights.values()):
            return None
        free = free_memory()
        return None if free is None else (free, "in CPU memory")

    def _home(self, tensor: Tensor) -> torch.device:
        return tensor.device if self._device is None else torch.device(self._device)

    def __getitem__(self, key: str) -> Weights:
        return self._snapshots[key]

    def restore(self, snapshots: Mapping[str, Weights]) -> None:
        self._snapshots = {
            key: {
                name: tensor.detach().to(self._device or tensor.device, copy=True) for name, tensor in weights.items()
            }
            for key, weights in snapshots.items()
        }


class PinnedMemory(TensorMemory):
    """Snapshots in page-locked CPU memory, which weights on a CUDA device reach while training goes on.

    The transfer outlasts the next optimizer step, which writes over the weights. So they are first copied on their
    device, in the order of the training's own work, at the speed of its memory; a stream beside it takes that copy over
    the bus, and the copy's memory is free again when it has arrived. Neither the CPU nor the training's stream waits.
    Without weights on a CUDA device it is `TensorMemory` on the CPU.
    """

    def __init__(self) -> None:
        super().__init__("cpu")
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._arrivals: dict[str, list[torch.cuda.Event]] = {}  # of the snapshots that came over a stream

    def store(self, key: str, weights: Weights, recycle: str | None = None) -> None:
        devices: dict[torch.device, list[str]] = {}
        for name, tensor in weights.items():
            devices.setdefault(tensor.device, []).append(name)
        if not any(device.type == "cuda" for device in devices):
            super().store(key, weights, recycle)
            return
        kept = self._snapshots[recycle] if recycle in self._arrivals else None
        if kept is None:
            kept = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for name, tensor in weights.items()
            }
        arrivals = []
        for device, names in devices.items():
            sources, targets = [weights[name] for name in names], [kept[name] for name in names]
            if device.type != "cuda":
                torch._foreach_copy_(targets, sources)
                continue
            staged = [torch.empty(source.shape, dtype=source.dtype, device=device) for source in sources]
            torch._foreach_copy_(staged, sources)
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream = self._streams[device]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for target, copy in zip(targets, staged, strict=True):
                    target.copy_(copy, non_blocking=True)
                    copy.record_stream(stream)  # its memory is not given to anything else before
            arrivals.append(stream.record_event())
        if recycle:
            del self._snapshots[recycle]
            self._arrivals.pop(recycle, None)
        self._snapshots[key], self._arrivals[key] = kept, arrivals

    def cost(self, weights: Weights) -> str:
        return f"{_bytes(weights)} in page-locked CPU memory"

    def __getitem__(self, key: str) -> Weights:
        for arrival in self._arrivals.get(key, ()):
            arrival.synchronize()
        return super().__getitem__(key)

    def restore(self, snapshots: Mapping[str, Weights]) -> None:
        super().restore(snapshots)
        self._arrivals = {}

    def __getstate__(self) -> dict[str, object]:
        # A copy's tensors are not page-locked, and neither streams nor events can be pickled.
        return {
            **self.__dict__,
            "_snapshots": {key: self[key] for key in self._snapshots},
            "_streams": {},
            "_arrivals": {},
        }


class DiskMemory(Memory):
    """Snapshots as safetensors files, in a folder of its own below ``folder`` for every run.

    The files of an earlier run are in another sub-folder and never read. The sub-folder is removed when
    the snapshots are dropped, the averager is garbage-collected or the process ends; a kill leaves it behind.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._run: Path | None = None
        self._cleanup: Any = None

    def _file(self, key: str) -> Path:
        if self._run is None:
            self._run = self._folder / f"run-{uuid.uuid4().hex[:12]}"
            self._run.mkdir(parents=True)
            self._cleanup = weakref.finalize(self, partial(shutil.rmtree, self._run, ignore_errors=True))
        return self._run / f"{key}.safetensors"

    def store(self, key: str, weights: Weights, recycle: str | None = None) -> None:
        file = self._file(key)
        unfinished = file.with_suffix(".partial")
        try:
            # Never rewrite a file in place: a mean may be reading it, or a checkpoint be linked to it.
            save_weights(weights, unfinished)
            os.replace(unfinished, file)
        except (OSError, SafetensorError) as error:
            unfinished.unlink(missing_ok=True)
            raise OSError(
                getattr(error, "errno", None) or errno.ENOSPC,
                f"cannot store a snapshot of {_bytes(weights)} ({error}). The snapshots stored before are intact: "
                'make room and go on, or resume from the last checkpoint with memory="cpu"',
                str(file),
            ) from error
        if recycle:
            self._file(recycle).unlink(missing_ok=True)

    def __getitem__(self, key: str) -> Weights:
        return SnapshotFile(self._file(key))

    def restore(self, snapshots: Mapping[str, Weights]) -> None:
        self.clear()
        for key, weights in snapshots.items():
            if isinstance(weights, SnapshotFile):
                _link(weights.file, self._file(key))
            else:
                self.store(key, weights)

    def save(self, key: str, file: Path) -> None:
        _link(self._file(key), file)

    def cost(self, weights: Weights) -> str:
        return f"{_bytes(weights)} in {self._folder}"

    def room(self, weights: Weights) -> tuple[int, str] | None:
        there = next(folder for folder in (self._folder, *self._folder.absolute().parents) if folder.exists())
        return shutil.disk_usage(there).free, f"in {self._folder}"

    def clear(self) -> None:
        if self._cleanup is not None:
            self._cleanup()
        self._run = self._cleanup = None

    def __getstate__(self) -> dict[str, object]:
        # A copy made by pickling must not delete the files of the original.
        return {"_folder": self._folder, "_run": None, "_cleanup": None}


def free_memory() -> int | None:
    """Bytes of CPU memory that can be had without swapping, within the limit of a container; None if unknown."""
    try:
        [line] = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:")]
        free = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None  # not Linux
    try:
        return min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return free


def _link(source: Path, target: Path) -> None:
    """A hard link where the file system has them, else a copy: snapshots are never written to again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@dataclass(frozen=True)
class WrittenFile:
    """A file that is never written to again, and by which it is known to be still the same one."""

    path: Path
    size: int
    identity: tuple[int, int, int]

    @classmethod
    def of(cls, file: Path, kept_at: Path | None = None) -> WrittenFile:
        """The file as it is now; ``kept_at`` is where it is about to be moved."""
        return cls(kept_at or file.absolute(), *_identity(file))

    def link(self, target: Path) -> bool:
        """Make ``target`` a hard link to the file; False where it is gone or changed, or cannot be linked."""
        try:
            os.link(self.path, target)
        except OSError:
            return False
        # Asked of the link, which nobody can exchange, not of the path, at which another run may be writing.
        if _identity(target) == (self.size, self.identity):
            return True
        target.unlink()
        return False


def _identity(file: Path) -> tuple[int, tuple[int, int, int]]:
    """Size, and what a copy, a rewritten and a replaced file do not share: device, inode, time of the last change."""
    stat = file.stat()
    return stat.st_size, (stat.st_dev, stat.st_ino, stat.st_mtime_ns)


# Complex numbers that safetensors has no name for are written as pairs of real ones, and listed in the metadata.
_PAIRS = (torch.complex32, torch.complex128)


def _bytes(weights: Weights) -> str:
    return size(sum(tensor.nbytes for tensor in weights.values()))


def save_weights(weights: Weights, file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write ``weights`` to a safetensors file that `SnapshotFile` reads."""
    tensors, pairs = {}, {}
    for name, tensor in weights.items():
        if tensor.dtype in _PAIRS:
            tensor = torch.view_as_real(tensor)
            pairs[name] = "complex"
        tensors[name] = tensor.detach().contiguous()
    save_file(tensors, file, metadata={**pairs, **(metadata or {})})


class SnapshotFile(Mapping[str, "Tensor"]):
    """The weights in a safetensors file, read tensor by tensor when asked for.

    Raises:
        FileNotFoundError, ValueError: when the file is missing or is not a whole safetensors file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._open: Any = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{file}: not a complete safetensors file ({error})") from error
        self._names: list[str] = [*self._open.keys()]  # type: ignore[no-untyped-call]
        self._pairs: dict[str, str] = self._open.metadata() or {}  # type: ignore[no-untyped-call]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._open.get_tensor(name)
        return torch.view_as_complex(tensor) if self._pairs.get(name) == "complex" else tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        if name not in self._names:
            raise KeyError(name)
        shape = tuple(self._open.get_slice(name).get_shape())
        return shape[:-1] if self._pairs.get(name) == "complex" else shape

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
