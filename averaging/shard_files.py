"""Files of weights that are sharded over processes: each writes its part, or all write the whole together.

A group of weights is a torch distributed checkpoint, a folder with a file from each process and one that says what lies
where. Any number of processes, sharded in any way or not at all, can read their parts from it.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import distributed
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.serialization import _get_layout

from averaging.atomic import replacing
from averaging.checkpoints.files import layout
from averaging.flat_slice import FlatSlice
from averaging.kernels import rounded
from averaging.memory import SnapshotFile
from averaging.shards import is_shard, local, process
from averaging.unpickling import InertUnpickler
from averaging.weights import every_tensor, stored_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from averaging.averager import Average
    from averaging.weights import Weights


def shard_like(part: Tensor, like: Any) -> Any:
    """The DTensor or `FlatSlice` of which this process holds ``part``, laid out over the processes as ``like`` is."""
    if isinstance(like, FlatSlice):
        return like.with_piece(part)
    # Without shape and stride they are guessed from the part, wrongly where the parts are not of equal size.
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@contextmanager
def replacing_together(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`replacing`, with a folder at the temporary path that all processes write to, until the last is done.

    Raises:
        RuntimeError: another process could not do its part; ``path`` is as before.
        OSError: from all processes, if the folder cannot be made.
    """
    with ExitStack() as stack:
        shared: list[Any] = [None]
        if process()[0] == 0:
            try:
                staging = stack.enter_context(replacing(path))
                staging.mkdir()
                shared = [staging]
            except OSError as error:
                shared = [error]
        _from_the_first(shared)
        if isinstance(shared[0], OSError):
            raise shared[0]
        problem: BaseException | None = None
        try:
            yield shared[0]
        except BaseException as error:
            problem = error
        problems = _from_all(None if problem is None else repr(problem))
        if problem is not None:
            raise problem
        for rank, message in enumerate(problems):
            if message is not None:
                raise RuntimeError(f"{os.fspath(path)} could not be written: in process {rank} {message}")
    _from_all(None)  # it is there now, whichever process looks


def _from_the_first(shared: list[Any]) -> None:
    if process()[1] > 1:
        distributed.broadcast_object_list(shared)


def _from_all(mine: Any) -> list[Any]:
    everyone = [mine] * process()[1]
    if len(everyone) > 1:
        distributed.all_gather_object(everyone, mine)
    return everyone


def agreed(decision: bool) -> bool:
    """The first process's ``decision``, in all of them."""
    shared = [decision]
    _from_the_first(shared)
    return shared[0]


def alike(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[bool]:
    """Of each pair of tensors of one shape, whether each process holds the same part of both; all call this."""
    mine = [_layout(one) == _layout(other) for one, other in pairs]
    return [all(answers) for answers in zip(*_from_all(mine), strict=True)]


def _layout(tensor: Any) -> Any:
    return tuple(getattr(tensor, kind, None) for kind in ("device_mesh", "placements", "offset")), local(tensor).shape


def relaid(part: Tensor, like: Tensor, other: Tensor) -> Tensor:
    """What this process holds of a tensor laid out as ``other``; of one laid out as ``like`` that is ``part``.

    All processes call this: the tensor is gathered.
    """
    whole = _gathered(part, like if is_shard(like) else None)
    return _cut(whole, other) if is_shard(other) else whole


def save_parts(weights: Weights, shards: Weights, folder: Path) -> None:
    """Write ``weights`` to a fresh ``folder``; all processes call this.

    Args:
        weights: what this process holds.
        shards: name → DTensor or `FlatSlice`, laid out as the weight of that name is; of others each process holds
            the whole.
        folder: which does not exist, or is empty.
    """
    parts = {name: shard_like(tensor, shards[name]) if name in shards else tensor for name, tensor in weights.items()}
    save(parts, storage_writer=FileSystemWriter(folder))


def shards_of(model: nn.Module) -> dict[str, Tensor]:
    """The DTensors and `FlatSlice` of ``model`` under all their names."""
    return {name: tensor for name, tensor in every_tensor(model) if is_shard(tensor)}


def save_model_parts(model: nn.Module, weights: Weights, folder: Path) -> None:
    """`save_parts` of ``weights`` of ``model``, under all names of tied weights."""
    first: dict[int, str] = {}
    twins = {name: first.setdefault(id(tensor), name) for name, tensor in every_tensor(model)}
    save_parts({name: weights[twin] for name, twin in twins.items() if twin in weights}, shards_of(model), folder)


def model_parts(model: nn.Module, folder: Path) -> StoredParts:
    """This process's parts of the weights in ``folder``, for a model sharded as ``model``."""
    return StoredParts(folder, shards_of(model))


class Parts(Mapping[str, "Tensor"]):
    """This process's parts of whole weights, each read when asked for.

    Args:
        weights: whole; perhaps a file.
        shards: name → DTensor or `FlatSlice`, of whose shape the tensor of that name is, laid out as the part is to be.
    """

    def __init__(self, weights: Weights, shards: Weights) -> None:
        self._weights = weights
        self._shards = shards

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the part of a tensor, which is not read."""
        return tuple(local(self._shards[name]).shape if name in self._shards else self._whole_shape(name))

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        weights = self._weights
        return weights.shape(name) if isinstance(weights, SnapshotFile) else tuple(weights[name].shape)

    def __getitem__(self, name: str) -> Tensor:
        whole, like = self._weights[name], self._shards.get(name)
        return whole if like is None else _cut(whole, like)

    def __contains__(self, name: object) -> bool:
        return name in self._weights  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class StoredParts(Parts):
    """Those of the weights in a ``folder`` that `save_parts` wrote; of each tensor only the part is read.

    Raises:
        ValueError: the folder is no distributed checkpoint.
    """

    def __init__(self, folder: Path, shards: Weights) -> None:
        self._reader = _Reader(folder)
        try:
            self._entries = self._reader.read_metadata().state_dict_metadata
        except Exception as error:  # whatever unpickling raises
            raise ValueError(f"{folder}: not a whole distributed checkpoint ({error!r})") from error
        super().__init__(self._entries, shards)

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name].size)

    def __getitem__(self, name: str) -> Tensor:
        like = self._shards.get(name)
        device = "cpu" if like is None else local(like).device
        part = torch.empty(self.shape(name), dtype=self._entries[name].properties.dtype, device=device)
        target = {name: part if like is None else shard_like(part, like)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this process reads by itself is what is wanted
            load(target, storage_reader=self._reader, no_dist=True)
        return local(target[name])


class _Reader(FileSystemReader):
    """Reads what lies where once, and without running what a pickle may name."""

    _metadata: Any = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if self._metadata is None:
            with (Path(self.path) / ".metadata").open("rb") as file:
                self._metadata = _MetadataUnpickler(file).load()
        return self._metadata


class _MetadataUnpickler(InertUnpickler):
    knows: ClassVar[dict[str, Any]] = {
        **{f"{known.__module__}.{known.__qualname__}": known for known in (
            dcp.Metadata, dcp.StorageMeta, dcp.MetadataIndex, dcp.TensorStorageMetadata,
            dcp.TensorProperties, dcp.ChunkStorageMetadata, dcp.BytesStorageMetadata,
            dcp._MEM_FORMAT_ENCODING, _StorageInfo, _get_layout, torch.Size,
        )},
        **{f"pathlib.{place}{kind}Path": Path for place in ("", "_local.") for kind in ("", "Posix", "Windows")},
        **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
    }  # fmt: skip


def _cut(whole: Tensor, like: Any) -> Tensor:
    """The part of ``whole`` that this process holds of a DTensor or `FlatSlice` ``like`` it."""
    if isinstance(like, FlatSlice):
        return like.cut(whole)
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), length)  # of an empty part the start is past the end
    return whole.clone()


def save_whole(model: nn.Module, file: str | os.PathLike[str], weights: Average | Weights = {}) -> None:  # noqa: B006
    """Write the whole model to a safetensors file, as it would be with ``weights`` in it; all processes call this.

    One tensor after the other is gathered, and written by the first process: none ever holds the whole model. What
    ``weights`` does not cover is the model's own, a tied weight is written once. In a folder beside its configuration,
    a transformers model opens with ``from_pretrained``:

        save_whole(model, "out/model.safetensors", average)
        if rank == 0:
            model.config.save_pretrained("out")

    Args:
        model: sharded by FSDP2 or tensor parallelism; or any other, wrapped or not.
        file: which appears as a whole or not at all.
        weights: an averager or one of its `views`, or name → what this process holds. An averager that has absorbed
            nothing yet stands for the model's own weights.

    Raises:
        ValueError: ``weights`` are of another model.
        RuntimeError, OSError: it could not be written; every process raises.
    """
    if not isinstance(weights, Mapping):
        weights = weights.average(rounded=True) if weights.ready else {}
    tensors = stored_tensors(model)
    for name, part in weights.items():
        if name not in tensors or local(tensors[name]).shape != part.shape:
            raise ValueError(
                f"the model has no {name!r} of shape {tuple(part.shape)}: these are the weights of another"
            )
    parts = {name: rounded(weights.get(name, local(own)), own.dtype) for name, own in tensors.items()}
    write_whole(parts, {name: own for name, own in tensors.items() if is_shard(own)}, file)


def write_whole(
    parts: Weights, shards: Weights, file: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file of the whole weights of which each process holds ``parts``; all processes call this.

    Args:
        parts: what this process holds.
        shards: name → DTensor or `FlatSlice`, laid out as the weight of that name is; of others each process holds
            the whole.
        file: which appears as a whole or not at all.
        metadata: of the file; by default its format.

    Raises:
        RuntimeError, OSError: as `save_whole`.
    """
    order = sorted(parts, key=lambda name: -parts[name].itemsize)  # so that every tensor is aligned
    shapes = {
        name: (str(parts[name].dtype).removeprefix("torch."), tuple(shards.get(name, parts[name]).shape))
        for name in order
    }
    gathered = (_gathered(parts[name], shards.get(name)) for name in order)
    problem: OSError | None = None
    if process()[0] == 0:
        try:
            if os.path.isdir(file):
                raise IsADirectoryError(errno.EISDIR, "a folder is in the place of the file", os.fspath(file))
            with replacing(file) as path, path.open("wb") as out:
                out.write(layout(shapes, metadata or {"format": "pt"})[0])
                for tensor in gathered:
                    out.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            problem = error
    for _ in gathered:  # in which all have to take part, whatever becomes of the file
        pass
    if (message := _from_all(repr(problem) if problem else None)[0]) is not None:
        raise problem or RuntimeError(f"{os.fspath(file)} could not be written: in process 0 {message}")


@torch.no_grad()
def _gathered(part: Tensor, like: Tensor | None) -> Tensor:
    """The whole of what ``part`` is of, laid out as ``like``."""
    part = part.detach()
    return part if like is None else shard_like(part.to(like.device), like).full_tensor()
