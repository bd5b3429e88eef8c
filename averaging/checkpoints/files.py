"""Where tensors lie in files: the safetensors header, read strictly, and exact reads. No torch, no numpy."""

from __future__ import annotations

import io
import json
import os
import stat
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zipfile import BadZipFile

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

# safetensors' names, torch's names and the bits of an element
_DTYPES = (
    ("BOOL", "bool", 8),
    ("U8", "uint8", 8),
    ("I8", "int8", 8),
    ("F4", "float4_e2m1fn_x2", 4),
    ("F6_E2M3", "float6_e2m3fn", 6),
    ("F6_E3M2", "float6_e3m2fn", 6),
    ("F8_E4M3", "float8_e4m3fn", 8),
    ("F8_E5M2", "float8_e5m2", 8),
    ("F8_E4M3FNUZ", "float8_e4m3fnuz", 8),
    ("F8_E5M2FNUZ", "float8_e5m2fnuz", 8),
    ("F8_E8M0", "float8_e8m0fnu", 8),
    ("U16", "uint16", 16),
    ("I16", "int16", 16),
    ("F16", "float16", 16),
    ("BF16", "bfloat16", 16),
    ("U32", "uint32", 32),
    ("I32", "int32", 32),
    ("F32", "float32", 32),
    ("U64", "uint64", 64),
    ("I64", "int64", 64),
    ("F64", "float64", 64),
    ("C64", "complex64", 64),
)
TORCH_NAME = {code: name for code, name, _ in _DTYPES}
CODE = {name: code for code, name, _ in _DTYPES}
FLOATS = ("bfloat16", "float16", "float32", "float64")
BITS = {name: bits for _, name, bits in _DTYPES}

_WORDS: tuple[tuple[int, Literal["Q", "I", "H", "B"]], ...] = ((8, "Q"), (4, "I"), (2, "H"), (1, "B"))

SPARE_FILES = 64  # that the process may have open besides
GATHERED = 256 * 1024  # bytes that are read together to be put into different places

MAX_DIMENSIONS = 64
MAX_HEADER = 100_000_000  # safetensors' own limit
MAX_VALUES, MAX_LEVELS = 5_000_000, 100  # in JSON; a short text of "[[[[" or "[],[],[]," takes much memory or stack


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a file: its dtype (torch's name), shape, and the bytes ``start`` to ``stop`` that hold it."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def files(self) -> Sequence[Path]:
        """The files that are to be open for `read`."""
        return (self.file,)

    def read(self, descriptors: Mapping[Path, int], buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset`` on; raises as `read_into`."""
        read_into(descriptors[self.file], buffer, self.start + offset, self.file)


@dataclass(frozen=True, slots=True)
class Strip:
    """Bytes of a tensor: ``count`` runs, one after the other in a file, ``spacing`` apart in the tensor."""

    file: Path
    start: int  # in the file
    at: int  # in the tensor
    run: int  # bytes
    count: int
    spacing: int

    def read(self, descriptor: int, buffer: memoryview, offset: int) -> None:
        """Fill in those of the tensor's bytes from ``offset`` on that lie here."""
        end = offset + len(buffer)
        first = max((offset - self.at) // self.spacing, 0)
        last = min((end - self.at - 1) // self.spacing, self.count - 1)
        row = first
        while row <= last:
            begin = self.at + row * self.spacing - offset  # in the buffer
            rows = min((len(buffer) - self.run - begin) // self.spacing + 1, last + 1 - row, GATHERED // self.run)
            if begin < 0 or rows < 2:  # a run that is cut, or long
                part = slice(max(begin, 0), min(begin + self.run, len(buffer)))
                if part.start < part.stop:
                    read_into(descriptor, buffer[part], self.start + row * self.run + part.start - begin, self.file)
                row += 1
                continue
            data = memoryview(bytearray(rows * self.run))
            read_into(descriptor, data, self.start + row * self.run, self.file)
            self._scatter(data, buffer[begin : begin + (rows - 1) * self.spacing + self.run], rows)
            row += rows

    def _scatter(self, data: memoryview, target: memoryview, rows: int) -> None:
        size, word = next((size, word) for size, word in _WORDS if self.run % size == self.spacing % size == 0)
        if rows <= self.run // size:
            for row in range(rows):
                target[row * self.spacing : row * self.spacing + self.run] = data[row * self.run :][: self.run]
        else:  # column by column is quicker
            source, target = data.cast(word), target.cast(word)
            for column in range(self.run // size):
                target[column :: self.spacing // size] = source[column :: self.run // size]


@dataclass(frozen=True, slots=True)
class Pieces(Entry):
    """A tensor that lies in several places; ``start`` is 0."""

    strips: tuple[Strip, ...]

    @property
    def files(self) -> Sequence[Path]:
        return tuple(dict.fromkeys(strip.file for strip in self.strips))

    def read(self, descriptors: Mapping[Path, int], buffer: memoryview, offset: int) -> None:
        for strip in self.strips:
            if strip.at >= offset + len(buffer):  # as all others: they come in order
                break
            if strip.at + (strip.count - 1) * strip.spacing + strip.run > offset:
                strip.read(descriptors[strip.file], buffer, offset)


@dataclass(frozen=True, slots=True)
class Header:
    """A safetensors file's header: its tensors in the order of their bytes, and the metadata."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def open_regular(path: Path) -> int:
    """A descriptor for reading ``path``, which must be a regular file: a pipe or a device would hang.

    Raises:
        ValueError: it is something else.
        OSError: it does not exist or may not be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file")
    return descriptor


class Slice(io.RawIOBase):
    """``length`` bytes of a file from ``start`` on, an archive; asked for more than ``limit`` at once it is none."""

    def __init__(self, descriptor: int, start: int, length: int, limit: int) -> None:
        self._descriptor, self._start, self._length, self._limit, self._at = descriptor, start, length, limit, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        if self._at < 0:
            raise OSError("before the start")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        size = left if size < 0 else min(size, left)
        if size > self._limit:
            raise BadZipFile(f"it takes {size:,} bytes to say where the numbers are")
        if size == 0:  # wherever that is
            return b""
        data = os.pread(self._descriptor, size, self._start + self._at)
        self._at += len(data)
        return data


def read_into(descriptor: int, buffer: memoryview, offset: int, file: Path) -> None:
    """Fill ``buffer`` with the bytes at ``offset``.

    Raises:
        ValueError: the file ends before.
        OSError: it cannot be read.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from error
        if count == 0:
            raise ValueError(f"{file} became shorter while it was read")
        done += count


@contextmanager
def opening(entries: Iterable[Entry]) -> Iterator[Mapping[Path, int]]:
    """Descriptors of the files that these tensors lie in; raises as `open_regular`."""
    opened: dict[Path, int] = {}
    files = dict.fromkeys(file for entry in entries for file in entry.files)
    if resource:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard and len(files) > soft - SPARE_FILES:  # checkpoints of many processes
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(len(files) + SPARE_FILES, hard), hard))
    try:
        for file in files:
            opened[file] = open_regular(file)
        yield opened
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        ValueError: it is no JSON object.
        OSError: it cannot be read.
    """
    with open(open_regular(path), "rb") as file:
        text = file.read(MAX_HEADER + 1)
    try:
        if len(text) > MAX_HEADER:
            raise ValueError(f"it has more than {MAX_HEADER:,} bytes")
        value = _parsed(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy or save it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _parsed(text: bytes) -> Any:
    """The JSON value in UTF-8 text, without any name twice, in bounded memory and of bounded depth."""
    if sum(map(text.count, (b"[", b"{", b","))) > MAX_VALUES:
        raise ValueError("it holds too many values")
    value = json.loads(text.decode(), object_pairs_hook=_unique)
    level = [value]
    for _ in range(MAX_LEVELS):
        inside = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = list(chain.from_iterable(inside))
    if level:
        raise ValueError("it is nested too deeply")
    return value


def read_header(path: Path) -> Header:
    """The header of a safetensors file, every number in it checked against the file.

    The tensors must cover the data exactly, without holes and overlaps, as the format demands.

    Raises:
        ValueError: the file is truncated or corrupt; the message says where.
        OSError: it does not exist or may not be read.
    """

    def demand(condition: bool, problem: str) -> None:
        if not condition:
            raise ValueError(f"{path} is not a valid safetensors file: {problem}; copy or save it again")

    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        demand(size > 0, "it is empty")
        demand(size >= 10, f"it has only {size} bytes")
        length = int.from_bytes(file.read(8), "little")
        demand(length <= MAX_HEADER, f"its header claims {length} bytes")
        demand(8 + length <= size, f"its header claims {length} bytes but the file has {size}; it was cut off")
        text = file.read(length)
    try:
        fields = _parsed(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a valid safetensors file: its header is not valid JSON ({error}); copy or save it again"
        ) from error
    demand(isinstance(fields, dict), "its header is not a JSON object")
    metadata = fields.pop("__metadata__", {})
    demand(
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()),
        "its metadata must map text to text",
    )
    for told in (fields, metadata, metadata.values()):
        demand(all(map(is_unicode, told)), "it holds text that is not Unicode")

    entries = []
    for name, field in fields.items():
        demand(
            isinstance(field, dict) and field.keys() == {"dtype", "shape", "data_offsets"},
            f"tensor {name!r} must have dtype, shape and data_offsets",
        )
        code, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
        demand(isinstance(code, str) and code in TORCH_NAME, f"tensor {name!r} has the unknown dtype {code!r}")
        demand(_counts(shape), f"tensor {name!r} has the impossible shape {shape}")
        demand(_counts(offsets) and len(offsets) == 2, f"tensor {name!r} has the impossible offsets {offsets}")
        start, stop = offsets
        demand(len(shape) <= MAX_DIMENSIONS, f"tensor {name!r} has an impossible shape of {len(shape)} dimensions")
        bits = prod(shape) * BITS[TORCH_NAME[code]]
        demand(
            bits == (stop - start) * 8,
            f"tensor {name!r}, {code} of shape {shape}, cannot lie at the bytes {start} to {stop}",
        )
        demand(prod(filter(None, shape)) < 1 << 63, f"tensor {name!r} has the impossible shape {shape}")
        base = 8 + length
        demand(
            base + stop <= size,
            f"tensor {name!r} ends at byte {base + stop} but the file has {size}; it was cut off",
        )
        entries.append((name, Entry(TORCH_NAME[code], tuple(shape), path, base + start, base + stop)))
    entries.sort(key=lambda item: (item[1].start, item[1].stop))
    end = 8 + length
    for name, entry in entries:
        demand(entry.start >= end, f"tensor {name!r} overlaps another")
        demand(entry.start == end, f"there is a hole of {entry.start - end} bytes before tensor {name!r}")
        end = entry.stop
    demand(end == size, f"{size - end} bytes at its end belong to no tensor")
    return Header(dict(entries), metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r} appears twice")
    return fields


def is_unicode(text: str) -> bool:
    """Whether the text can be written: half a surrogate pair cannot."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    """The bytes that a tensor takes."""
    return prod(shape) * BITS[dtype] // 8


def layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """The first bytes of a safetensors file with these tensors (dtype and shape), and where each one's data starts."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, position = [], 0
    for name, (dtype, shape) in tensors.items():
        stop = position + nbytes(dtype, shape)
        fields[name] = {"dtype": CODE[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        starts.append(position)
        position = stop
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + start for start in starts]
