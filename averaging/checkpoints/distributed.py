"""Torch distributed checkpoints: each process wrote its pieces of the tensors, and ``.metadata`` says what lies where.

The pieces are read where they lie, nothing is gathered first. No pickle runs any code, nor is torch needed: in place of
the classes that a pickle names, stand-ins take note of what it says about them.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from reprlib import repr  # of limited length and depth: what a pickle holds may be shown without end
from typing import Any, ClassVar

from averaging.checkpoints.files import BITS, MAX_DIMENSIONS, Pieces, Slice, Strip, is_unicode, open_regular
from averaging.unpickling import InertUnpickler

METADATA_FILE = ".metadata"
# What a model's weights are kept under, and what says that it is an optimizer's state.
CONTAINERS = ("model", "state_dict", "model_state_dict", "module")
_OPTIMIZER = re.compile(r"optim")
MAX_STRIPS = 1_000_000  # of one piece
# What no checkpoint needs, but takes memory or time without end: bytes of metadata, of what describes a record, values
# in a tuple and in those in it, of so many levels, and pieces side by side.
MAX_METADATA, MAX_DESCRIPTION, MAX_TUPLE, MAX_LEVELS, MAX_ABREAST = 1 << 30, 1 << 17, 1000, 4, 1000


class Noted:
    """Stands in for an object of a class that a pickle names: what it was made from, and what it was told."""

    def __new__(cls, *args: Any) -> Noted:
        noted = super().__new__(cls)
        noted.args, noted.state = args, {}
        return noted

    args: tuple[Any, ...]
    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Metadata(Noted):
    pass


class _Index(Noted):
    pass


class _Place(Noted):
    pass


class _Tensor(Noted):
    pass


class _Bytes(Noted):
    pass


class _Chunk(Noted):
    pass


class _Properties(Noted):
    pass


def _bounded(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Makes a tuple as ``load`` does, but none of which the hash would take time without end."""

    def bounded(unpickler: Any) -> None:
        load(unpickler)
        level, total = [unpickler.stack[-1]], 0
        for _ in range(MAX_LEVELS):
            total += sum(map(len, level))
            if total > MAX_TUPLE:
                break
            level = [value for one in level for value in one if isinstance(value, tuple)]
        if level:
            raise pickle.UnpicklingError("it holds tuples in tuples without end")

    return bounded


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise pickle.UnpicklingError("it holds another value where text belongs")
    return value


def as_size(values: Any = ()) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or not counts(values):
        raise pickle.UnpicklingError("it holds an impossible shape")
    return tuple(values)


class _Unpickler(InertUnpickler):
    dispatch: ClassVar[dict[int, Any]] = {
        code: _bounded(load) if code in b"t\x85\x86\x87" else load
        for code, load in InertUnpickler.dispatch.items()
        if code not in pickle.LONG4  # numbers that take time without end to be shown
    }

    def unknown(self, name: str) -> Any:
        dtype = re.fullmatch(r"torch\.((bool|u?int|float|bfloat|complex|bits|q)\w*)", name)
        return dtype[1] if dtype else super().unknown(name)


class _MetadataUnpickler(_Unpickler):
    knows: ClassVar[dict[str, Any]] = {
        "torch.distributed.checkpoint.metadata.Metadata": _Metadata,
        "torch.distributed.checkpoint.metadata.MetadataIndex": _Index,
        "torch.distributed.checkpoint.metadata.TensorStorageMetadata": _Tensor,
        "torch.distributed.checkpoint.metadata.BytesStorageMetadata": _Bytes,
        "torch.distributed.checkpoint.metadata.ChunkStorageMetadata": _Chunk,
        "torch.distributed.checkpoint.metadata.TensorProperties": _Properties,
        "torch.distributed.checkpoint.metadata.StorageMeta": Noted,
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING": int,
        "torch.distributed.checkpoint.filesystem._StorageInfo": _Place,
        "torch.serialization._get_layout": _text,
        "torch.Size": as_size,
        "collections.OrderedDict": dict,
        **{f"{module}.{kind}": Noted for module in ("pathlib", "pathlib._local") for kind in ("Path", "PosixPath")},
    }


class RecordUnpickler(_Unpickler):
    """Reads the pickle in what ``torch.save`` made of a tensor."""

    knows: ClassVar[dict[str, Any]] = {
        "torch._utils._rebuild_tensor_v2": Noted,
        "torch._utils._rebuild_tensor_v3": Noted,
        "collections.OrderedDict": dict,
        "torch.DoubleStorage": "float64",
        "torch.FloatStorage": "float32",
        "torch.HalfStorage": "float16",
        "torch.BFloat16Storage": "bfloat16",
        "torch.LongStorage": "int64",
        "torch.IntStorage": "int32",
        "torch.ShortStorage": "int16",
        "torch.CharStorage": "int8",
        "torch.ByteStorage": "uint8",
        "torch.BoolStorage": "bool",
        "torch.ComplexFloatStorage": "complex64",
        "torch.storage.UntypedStorage": "",  # of no dtype
    }


def read_distributed(folder: Path) -> dict[str, Pieces]:
    """The model's tensors in a torch distributed checkpoint; the optimizer's are left out.

    Raises:
        ValueError: it is corrupt, or names what does not belong there, or has no model, or several.
        FileNotFoundError: a file is missing.
        OSError: it may not be read.
    """
    path = folder / METADATA_FILE
    with open(open_regular(path), "rb") as file:
        try:
            if (size := os.fstat(file.fileno()).st_size) > MAX_METADATA:
                raise ValueError(f"it has {size} bytes")
            metadata = _MetadataUnpickler(file).load()
        except Exception as error:  # a damaged pickle raises about everything
            raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from error
    try:
        described, places = metadata.state["state_dict_metadata"], metadata.state["storage_data"]
        names = _names(path, described, metadata.state.get("planner_data"))
        where = {
            (index.state["fqn"], tuple(index.state["offset"])): place.state
            for index, place in places.items()
            if index.state.get("offset") is not None
        }
        found = {name: _Described(path, name, fqn, described[fqn], where) for name, fqn in names.items()}
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} does not say what lies where ({error!r}); copy or save it again") from error
    strips: dict[str, list[Strip]] = {name: [] for name in found}
    by_file: dict[str, list[tuple[_Described, _Piece]]] = {}
    for tensor in found.values():
        for piece in tensor.pieces:
            by_file.setdefault(piece.file, []).append((tensor, piece))
    for name, pieces in by_file.items():
        file_ = folder / name
        if not file_.exists():
            raise FileNotFoundError(f"{path} names {name}, which is missing; copy the folder again")
        with ExitStack() as stack:
            descriptor = open_regular(file_)
            stack.callback(os.close, descriptor)
            for tensor, piece in pieces:
                strips[tensor.name] += tensor.strips(piece, file_, descriptor)
    return {
        name: Pieces(tensor.dtype, tensor.shape, path, 0, tensor.nbytes, tuple(sorted(strips[name], key=_start)))
        for name, tensor in found.items()
    }


def _start(strip: Strip) -> int:
    return strip.at


def _names(path: Path, described: dict[str, Any], paths: Any) -> dict[str, str]:
    """Each of the model's tensors: its name → what it is called in the checkpoint."""
    tensors = [fqn for fqn, one in described.items() if isinstance(one, _Tensor)]
    if isinstance(paths, dict) and all(isinstance(paths.get(fqn), tuple) and paths[fqn] for fqn in tensors):
        if not all(isinstance(part, str | int) for fqn in tensors for part in paths[fqn]):
            raise TypeError("a name that is no text")
        inside = {fqn: tuple(map(str, paths[fqn])) for fqn in tensors}
    else:  # no more than the joined names is known
        containers = sorted({f"{outer}{name}" for outer in ("", "app.") for name in CONTAINERS}, key=len)
        prefix = next((c for c in containers if any(fqn.startswith(f"{c}.") for fqn in tensors)), "")
        kept = [fqn for fqn in tensors if not _OPTIMIZER.match(fqn.removeprefix("app."))]
        if not prefix or not all(fqn.startswith(f"{prefix}.") for fqn in kept):
            prefix = ""
        inside = {fqn: (*prefix.split("."), fqn[len(prefix) + 1 :]) if prefix else (fqn,) for fqn in kept}
    models: dict[tuple[str, ...], dict[str, str]] = {}
    for fqn, (*outer, name) in inside.items():
        if not any(_OPTIMIZER.match(part) for part in outer) and (not outer or outer[-1] in CONTAINERS):
            models.setdefault(tuple(outer), {})[name] = fqn
    chosen = [outer for outer in models if outer] or list(models)
    if len(chosen) > 1:
        listed = ", ".join(".".join(outer) for outer in chosen)
        raise ValueError(f"{path} holds several models ({listed}); save the one that is meant by itself")
    if not chosen:
        first = ", ".join(dict.fromkeys(outer[0] for outer in inside.values()))
        raise ValueError(
            f"{path} holds no model's weights, neither directly nor under {', '.join(CONTAINERS)}; it holds "
            f"{first or 'no tensors'}"
        )
    return models[chosen[0]]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A box of a tensor, and where its record lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class _Described:
    """What the metadata say about one tensor, checked."""

    def __init__(self, path: Path, name: str, fqn: str, said: Any, where: dict[Any, Any]) -> None:
        self.path, self.name = path, name
        self._demand(is_unicode(name), "has a name that is not Unicode")
        properties = said.state["properties"].state
        self.dtype, layout = properties[0], properties[1]
        plain = layout == "torch.strided" and self.dtype in BITS
        self._demand(plain, f"({repr(self.dtype)}, {repr(layout)}) cannot be averaged")
        self.shape = tuple(said.state["size"])
        possible = counts(self.shape) and len(self.shape) <= MAX_DIMENSIONS
        possible = possible and prod(filter(None, self.shape)) < 1 << 63
        self._demand(possible, f"has the impossible shape {repr(list(self.shape))}")
        self.nbytes = prod(self.shape) * BITS[self.dtype] // 8
        self.pieces: list[_Piece] = []
        for chunk in said.state["chunks"]:
            offsets, sizes = tuple(chunk.state["offsets"]), tuple(chunk.state["sizes"])
            inside = (counts(offsets) and counts(sizes) and len(offsets) == len(sizes) == len(self.shape)) and all(
                o + s <= n or s == 0 for o, s, n in zip(offsets, sizes, self.shape, strict=True)
            )
            self._demand(
                inside,
                f"has a piece of {repr(list(sizes))} at {repr(list(offsets))}, which is outside {list(self.shape)}",
            )
            if prod(sizes) == 0:
                continue
            self._demand((fqn, offsets) in where, f"has a piece at {list(offsets)} that lies nowhere")
            place = where[fqn, offsets]
            file, start, length = place["relative_path"], place["offset"], place["length"]
            # By the name alone, as for the shards of an index.
            plain = isinstance(file, str) and file not in ("", ".", "..") and not set(file) & {"/", "\\", "\0"}
            self._demand(plain, f"has a piece in {repr(file)}: pieces must lie in the metadata's own folder")
            possible = counts((start, length)) and max(start, length) < 1 << 63
            self._demand(possible, f"has a piece at the impossible bytes {repr(start)}, {repr(length)}")
            self._demand(not place.get("transform_descriptors"), "is compressed; save it without transformations")
            self.pieces.append(_Piece(offsets, sizes, file, start, length))
        self._demand(
            _tile(self.shape, self.pieces), "has pieces that overlap, or some are missing, or they are too many"
        )

    def _demand(self, condition: bool, problem: str) -> None:
        if not condition:
            raise ValueError(f"{self.path}: tensor {self.name!r} {problem}")

    def strips(self, piece: _Piece, file: Path, descriptor: int) -> list[Strip]:
        """Where the bytes of a piece lie in its file."""
        whole = piece.start + piece.length <= os.fstat(descriptor).st_size
        try:
            dtype, offset, sizes, strides, start, length = _record(
                Slice(descriptor, piece.start, piece.length, MAX_DESCRIPTION)
            )
        except Exception as error:  # a damaged archive or pickle raises about everything
            problem = str(error) or type(error).__name__ if whole else "the file was cut off"
            raise ValueError(
                f"{file}: the piece of tensor {self.name!r} at byte {piece.start} cannot be read ({problem}); copy or "
                "save the folder again"
            ) from error
        item = BITS[self.dtype] // 8
        fits = dtype == self.dtype and sizes == piece.sizes and counts((offset, *strides))
        fits = fits and len(strides) == len(sizes) and (offset + prod(sizes)) * item <= length
        fits = fits and start + length <= piece.length and whole
        self._demand(fits, f"has a piece in {file.name} of another dtype, shape or size than the metadata say")
        steps = [prod(self.shape[d + 1 :]) * item for d in range(len(sizes))]
        at = sum(o * step for o, step in zip(piece.offsets, steps, strict=True))
        dims = sorted((d for d in range(len(sizes)) if sizes[d] > 1), key=lambda d: strides[d])
        dense = all(strides[d] == prod(sizes[e] for e in dims[:i]) for i, d in enumerate(dims))
        self._demand(dense, "is stored with gaps or repetitions; save it after contiguous()")
        run = item
        while dims and steps[dims[0]] == run:
            run *= sizes[dims.pop(0)]
        count, spacing = (sizes[dims[0]], steps[dims[0]]) if dims else (1, run)
        outer = dims[:0:-1]
        self._demand(prod(sizes[d] for d in outer) <= MAX_STRIPS, "is stored in too many pieces; save it contiguous")
        first = piece.start + start + offset * item
        return [
            Strip(
                file=file,
                start=first + i * count * run,
                at=at + sum(k * steps[d] for k, d in zip(index, outer, strict=True)),
                run=run,
                count=count,
                spacing=spacing,
            )
            for i, index in enumerate(product(*(range(sizes[d]) for d in outer)))
        ]


def _record(file: Slice) -> tuple[str, int, tuple[int, ...], tuple[int, ...], int, int]:
    """A tensor that ``torch.save`` wrote: dtype, offset, sizes and strides in its storage; the storage's place."""
    data, storages = archived(file)
    tensor = RecordUnpickler(io.BytesIO(data)).load()
    if not isinstance(tensor, Noted):
        raise ValueError("it holds no tensor")
    (_, dtype, key, _, _), offset, sizes, strides = tensor.args[:4]
    start, length = storages[_text(key)]
    return dtype or tensor.args[6], offset, tuple(sizes), tuple(strides), start, length


def archived(file: Slice) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """What ``torch.save`` wrote: the pickle, and by the keys that it names where the data start, and how long they are.

    Raises:
        Exception: of about every kind, if the archive is damaged.
    """
    storages = {}
    with zipfile.ZipFile(file) as archive:
        records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
        if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
            raise ValueError("it is compressed, which torch never does")
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise ValueError("it was written on a big-endian machine")
        data = archive.read(records["data.pkl"])
    for name, record in records.items():
        if name.startswith("data/"):
            file.seek(record.header_offset + 26)
            lengths = file.read(4)
            start = record.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
            storages[name[5:]] = start, record.file_size
    return data, storages


def counts(values: Sequence[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _tile(shape: Sequence[int], pieces: Sequence[_Piece]) -> bool:
    """Whether the pieces make up the whole, without holes and overlaps."""
    if sum(prod(piece.sizes) for piece in pieces) != prod(shape):
        return False
    if len(pieces) < 2:
        return True
    # Only pieces that meet in the dimension in which there are most of them can overlap.
    dim = max(range(len(shape)), key=lambda d: len({piece.offsets[d] for piece in pieces}))
    near: list[_Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.offsets[dim]):
        near = [other for other in near if other.offsets[dim] + other.sizes[dim] > piece.offsets[dim]]
        if len(near) > MAX_ABREAST or any(_overlap(piece, other) for other in near):
            return False
        near.append(piece)
    return True


def _overlap(one: _Piece, other: _Piece) -> bool:
    return all(
        a < b + n and b < a + m for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )
