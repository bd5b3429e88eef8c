"""Torch and Lightning files, read as data only.

``torch.load(weights_only=True)`` runs no code, and with ``map_location="meta"`` it reads no weights either: it tells
where in the (never compressed) zip archive each storage lies, so tensors are then read straight from the file.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import tempfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from averaging.checkpoints.files import CODE, MAX_HEADER, Entry, Slice, is_unicode, open_regular, read_into

if TYPE_CHECKING:
    from torch import Tensor

# What a plain torch file may keep its weights under, besides being the weights itself.
WEIGHTS_KEYS = ("state_dict", "model_state_dict", "model", "module")
STEP_KEYS = ("global_step", "step", "global_steps")
OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of files written without a zip archive
MOST_VIEWED = 8
"""How many times the size of the file its tensors may take that are views of other data."""
MOST_LEVELS, MOST_VALUES = 100, 10_000
"""The tuples in tuples that a pickle may hold, and the values in one."""


@dataclass(frozen=True, slots=True)
class Pickled:
    """A torch file's weights: where they lie, the step it names, and whether Lightning wrote it.

    ``spill`` keeps open the unnamed file with the tensors that could not be read from the original in place.
    """

    entries: dict[str, Entry]
    step: int | None
    lightning: bool
    spill: IO[bytes] | None


def read_pickled(path: Path) -> Pickled:
    """Find the weights in a ``.ckpt``, ``.pt``, ``.pth`` or ``.bin`` file without running code from it.

    Raises:
        ValueError: the file is corrupt, needs code to be read, or holds no weights.
        OSError: it does not exist or may not be read.
    """
    records, size = _records(path), path.stat().st_size
    zipped = records is not None
    content = _load(path, "meta" if zipped else "cpu")
    weights = _weights(path, content)
    for name, tensor in weights.items():
        _check(path, name, tensor)
    spill: IO[bytes] | None = None
    if any(_offset(tensor) is None for tensor in weights.values()):
        if records is not None:  # a torch that does not tell the offsets
            weights = _weights(path, _load(path, "cpu"))
            for name, tensor in weights.items():
                _check(path, name, tensor)
                if tensor.is_meta:
                    raise ValueError(f"{path}: tensor {name!r} was saved without its data")
        records = None
    entries = {}
    spilled: dict[Any, int] = {}
    for name, tensor in weights.items():
        start = _offset(tensor)
        if records is not None and start is not None:
            _check_record(path, name, tensor, start, records)
        if records is not None and start is not None and tensor.is_contiguous():
            start += int(tensor.storage_offset()) * tensor.element_size()
            file_ = path
        else:
            spill = spill or tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the checkpoint)
            storage = tensor.untyped_storage().data_ptr() if start is None else start
            view = (storage, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
            if view not in spilled:  # tied weights are written once
                spilled[view] = spill.seek(0, os.SEEK_END)
                if spilled[view] + tensor.numel() * tensor.element_size() > MOST_VIEWED * size:
                    raise ValueError(f"{path}: its tensors are views of the same data, more than {MOST_VIEWED} times")
                spill.write(_bytes(tensor, path, start_of_storage=_offset(tensor)))
            start, file_ = spilled[view], Path(f"/dev/fd/{spill.fileno()}")
        stop = start + tensor.numel() * tensor.element_size()
        entries[name] = Entry(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), file_, start, stop)
    if spill is not None:
        spill.flush()
    return Pickled(entries, named_step(content), "pytorch-lightning_version" in content, spill)


def read_step(path: Path) -> int | None:
    """The optimizer step that a torch file names; raises as `read_pickled`."""
    _records(path)
    return named_step(_load(path, "cpu"))


def named_step(content: dict[str, Any]) -> int | None:
    """The optimizer step that a trainer wrote down."""
    steps = (content[key] for key in STEP_KEYS if type(content.get(key)) is int)
    return next((step for step in steps if 0 <= step < 1 << 63), None)  # a float holds it, too


def _load(path: Path, device: str) -> dict[str, Any]:
    import pickle

    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is an error below
            content = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise ValueError(f"{path} is corrupt or not a torch file; copy or save it again") from error
        raise ValueError(
            f"{path} needs the code of {found[1]} to be read, which could do anything; if you trust the file, "
            "load it yourself and save its weights alone with safetensors.torch.save_file"
        ) from error
    except MemoryError as error:
        raise ValueError(f"{path} takes more memory to be read than there is") from error
    except Exception as error:  # torch raises about everything for a damaged file
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ValueError(f"{path} cannot be read by torch ({reason or type(error).__name__})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not named weights")
    return content


def _weights(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    import torch

    weights = next((content[key] for key in WEIGHTS_KEYS if isinstance(content.get(key), dict)), content)
    tensors = [isinstance(value, torch.Tensor) for value in weights.values()]
    if not any(tensors):
        raise ValueError(
            f"{path} holds no named weights, neither directly nor under {', '.join(WEIGHTS_KEYS)}; "
            f"its keys: {', '.join(map(repr, list(content)[:8])) or 'none'}"
        )
    for name, value in weights.items():
        if isinstance(name, str) and not is_unicode(name):
            raise ValueError(f"{path}: the name {name!r} is not Unicode")
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{path}: {name!r} is a {type(value).__name__}, not a named tensor; save the weights alone"
            )
    return weights


def _check(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse what is no plain array of numbers, or a view that claims more than there is."""
    import torch

    plain = (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and str(tensor.dtype).removeprefix("torch.") in CODE
    )
    if not plain:
        kind = f"{type(tensor).__name__} of {tensor.dtype}, {'nested' if tensor.is_nested else tensor.layout}"
        raise ValueError(f"{path}: tensor {name!r} ({kind}) cannot be averaged; save it as a plain dense tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{path}: tensor {name!r} of shape {list(tensor.shape)} is larger than the data behind it")


def _offset(tensor: Tensor) -> int | None:
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _records(path: Path) -> dict[int, int] | None:
    """Where the records of the archive start in the file, and their sizes; ``None`` for a file of the old format.

    Raises:
        ValueError: there are some that are not stored as they are, or the pickle is nothing that torch should read.
    """
    with open(open_regular(path), "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            if file.read(len(OLD_MAGIC)) != OLD_MAGIC:
                raise ValueError(f"{path} is corrupt or not a torch file; copy or save it again")
            for _ in range(4):  # version, system, content, names of storages
                _check_tuples(path, file)
            return None
    records, pickles = {}, 0
    try:
        with open(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            archive = zipfile.ZipFile(Slice(file.fileno(), 0, size, MAX_HEADER))
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
                    raise ValueError(
                        f"{path} is a compressed archive, which torch never writes; save it with torch.save"
                    )
                if not 0 <= record.header_offset < size:
                    raise zipfile.BadZipFile("a record lies outside")
                file.seek(record.header_offset + 26)
                lengths = file.read(4)
                start = record.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
                records[start] = record.file_size
                name = Path(record.filename).name
                if name == "byteorder" and archive.open(record).read(10) != b"little":
                    raise ValueError(f"{path} was written on a big-endian machine; save it again on this one")
                if name == "data.pkl":
                    if pickles:
                        raise zipfile.BadZipFile("it holds two pickles")
                    pickles += 1
                    _check_tuples(path, io.BytesIO(archive.read(record)))
    except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a whole torch file ({error}); copy or save it again") from error
    if any(start + length > size for start, length in records.items()):
        raise ValueError(f"{path} was cut off; copy or save it again")
    return records


def _check_tuples(path: Path, file: IO[bytes]) -> None:
    """Refuse a pickle of tuples in tuples beyond any use: as keys, they would take all stack, or time without end.

    It follows what `torch.load` would do to its stack, which hashes such a key recursively, without any bound.
    """
    stack: list[tuple[int, int]] = []  # of each value, how many there are in it and the levels, if it is a tuple
    marks: list[list[tuple[int, int]]] = []
    memo: dict[int, tuple[int, int]] = {}

    def tuple_of(values: list[tuple[int, int]]) -> tuple[int, int]:
        total, levels = 1 + sum(count for count, _ in values), 1 + max((level for _, level in values), default=0)
        if levels > MOST_LEVELS or total > max(MOST_VALUES, file.tell()):
            raise ValueError(f"{path} holds tuples in tuples without end; save its weights alone")
        return total, levels

    def skip(count: int) -> bytes:
        found = file.read(count)
        if len(found) < count:
            raise EOFError
        return found

    with contextlib.suppress(EOFError, IndexError, KeyError):  # torch will say so
        while (code := skip(1)) != b".":
            if code in _TUPLES:
                count = _TUPLES[code]
                stack[len(stack) - count :] = [tuple_of(stack[len(stack) - count :])]
            elif code == b"(":
                marks.append(stack)
                stack = []
            elif code in b"tue":
                values, stack = stack, marks.pop()
                stack += [tuple_of(values)] if code == b"t" else []
            elif code in b"hj":
                stack.append(memo[int.from_bytes(skip(1 if code == b"h" else 4), "little")])
            elif code in b"qr":
                memo[int.from_bytes(skip(1 if code == b"q" else 4), "little")] = stack[-1]
            elif code in b"R\x81":
                stack[-2:] = [(1, 0)]
            elif code in b"bas":
                del stack[-2 if code == b"s" else -1 :]
            elif code == b"Q":
                stack[-1] = (1, 0)
            elif code == b"c":
                file.readline()
                file.readline()
                stack.append((1, 0))
            elif code in _SIZES:
                skip(_SIZES[code])
                stack.append((1, 0))
            elif code in _LENGTHS:
                skip(int.from_bytes(skip(_LENGTHS[code]), "little"))
                stack.append((1, 0))
            elif code == b"\x80":
                skip(1)
            else:
                return


# Operations of a pickle by the values that they make a tuple of, and those of simple values by the bytes that follow.
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_SIZES = {b"N": 0, b"\x88": 0, b"\x89": 0, b")": 0, b"]": 0, b"}": 0, b"\x8f": 0, b"K": 1, b"M": 2, b"J": 4, b"G": 8}
_LENGTHS = {b"X": 4, b"U": 1, b"\x8a": 1}


def _check_record(path: Path, name: str, tensor: Tensor, start: int, records: dict[int, int]) -> None:
    if tensor.numel() and tensor.untyped_storage().nbytes() > records.get(start, -1):
        raise ValueError(f"{path}: the data of tensor {name!r} is missing or cut off; copy or save the file again")


def _bytes(tensor: Tensor, path: Path, start_of_storage: int | None) -> bytes:
    """The elements of a tensor in order, gathered when it is a strided view."""
    import torch

    if tensor.is_meta:
        assert start_of_storage is not None
        raw = bytearray(tensor.untyped_storage().nbytes())
        descriptor = open_regular(path)
        try:
            read_into(descriptor, memoryview(raw), start_of_storage, path)
        finally:
            os.close(descriptor)
        flat = torch.frombuffer(raw, dtype=tensor.dtype)
        tensor = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
