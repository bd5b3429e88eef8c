"""DeepSpeed's folders of ZeRO-1, ZeRO-2 and ZeRO-3: the float32 weights, in the files of every process's optimizer.

Under ZeRO-1 and ZeRO-2 each group of parameters is one vector, of which each process holds the next part; under ZeRO-3
each process holds an equal part of every parameter, one after the other. They are read where they lie. As for torch
distributed checkpoints, no pickle runs any code, nor is torch needed.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from reprlib import repr  # of limited length and depth, as in `distributed`
from struct import unpack
from typing import Any, ClassVar

from averaging.checkpoints.distributed import Noted, RecordUnpickler, archived, as_size, counts
from averaging.checkpoints.files import BITS, MAX_DIMENSIONS, Entry, Pieces, Slice, Strip, is_unicode, open_regular
from averaging.checkpoints.pickled import named_step

WHOLE = "mp_rank_00_model_states.pt"
OPTIMIZER_FILES = "*_optim_states.pt"
MAX_STATES = 1 << 26  # bytes that say where the numbers are
_WIDENED = ("bfloat16", "float16", "float64")


class _Saved(Noted):
    """A tensor."""


class _Other(Noted):
    """What else a pickle names: settings, the optimizer's state, what the training script added."""

    def extend(self, *_: Any) -> None: ...

    append = add = __setitem__ = extend


class _Dict(dict[Any, Any]):
    """An ordered one, which may have attributes."""

    def __setstate__(self, state: Any) -> None: ...


class _Unpickler(RecordUnpickler):
    knows: ClassVar[dict[str, Any]] = {
        **RecordUnpickler.knows,
        "torch._utils._rebuild_tensor_v2": _Saved,
        "torch._utils._rebuild_tensor_v3": _Saved,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._tensor._rebuild_from_type_v2": lambda rebuild, kind, values, state: rebuild(*values),
        "torch.Size": as_size,
        "collections.OrderedDict": _Dict,
        "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    }

    def unknown(self, name: str) -> Any:
        dtype = name.removeprefix("torch.")
        return dtype if dtype in BITS else _Other


@dataclass(frozen=True, slots=True)
class Widened(Entry):
    """A tensor in float32 that is ``held`` in another precision."""

    held: Entry

    @property
    def files(self) -> Sequence[Path]:
        return self.held.files

    def read(self, descriptors: Mapping[Path, int], buffer: memoryview, offset: int) -> None:
        count, item = len(buffer) // 4, BITS[self.held.dtype] // 8
        data = memoryview(bytearray(count * item))
        self.held.read(descriptors, data, offset // 4 * item)
        if self.held.dtype == "bfloat16":  # the upper half of a float32
            buffer[0::4] = buffer[1::4] = bytes(count)
            buffer[2::4], buffer[3::4] = data[0::2], data[1::2]
        else:
            buffer[:] = memoryview(array("f", unpack(f"<{count}{'e' if item == 2 else 'd'}", data))).cast("B")


class _File:
    """What one file holds, and where its tensors lie."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        if not self.path.exists():
            raise FileNotFoundError(f"{folder} lacks {name}, a part of the weights under ZeRO; copy the folder again")
        descriptor = open_regular(self.path)
        try:
            data, self._storages = archived(Slice(descriptor, 0, size := os.fstat(descriptor).st_size, MAX_STATES))
            if any(start + length > size for start, length in self._storages.values()):
                raise ValueError("it was cut off")
            self.content = _Unpickler(io.BytesIO(data)).load()
            if not isinstance(self.content, dict):
                raise ValueError("it holds no named values")
        except Exception as error:  # a damaged archive or pickle raises about everything
            problem = str(error) or type(error).__name__
            raise ValueError(f"{self.path} cannot be read ({problem}); copy or save the folder again") from error
        finally:
            os.close(descriptor)

    def entry(self, saved: Any, name: str) -> Entry:
        try:
            (_, dtype, key, _, _), offset, sizes, strides = saved.args[:4]
            dtype, sizes = dtype or saved.args[6], as_size(sizes)
            start, length = self._storages[key]
            possible = len(sizes) <= MAX_DIMENSIONS and counts([offset])
            dense = [prod(sizes[d + 1 :]) for d in range(len(sizes))] if possible else []
            gaps = any(s != t and n > 1 for s, t, n in zip(strides, dense, sizes, strict=True)) and prod(sizes) > 0
            item = BITS[dtype] // 8
        except Exception as error:  # as above
            raise ValueError(f"{self.path}: {name} is no tensor, or has no data ({error!r})") from error
        if gaps:
            raise ValueError(f"{self.path}: {name} is stored with gaps; save it after contiguous()")
        if (offset + prod(sizes)) * item > length:
            raise ValueError(f"{self.path}: {name} of shape {list(sizes)} is larger than the data behind it")
        start += offset * item
        return Entry(dtype, sizes, self.path, start, start + prod(sizes) * item)


class _Vector:
    """Tensors, one after the other."""

    def __init__(self, parts: Sequence[Entry]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(prod(part.shape) for part in parts)]
        self.dtypes = {part.dtype for part in parts}
        self.length = self._starts[-1]

    def strips(self, offset: int, count: int, at: int) -> Iterator[Strip]:
        """Where ``count`` elements from ``offset`` on lie, which are a tensor's from its byte ``at`` on."""
        i = bisect_right(self._starts, offset) - 1
        while count > 0:
            part, skipped = self._parts[i], offset - self._starts[i]
            taken, item = min(count, self._starts[i + 1] - offset), BITS[part.dtype] // 8
            if taken:
                run = taken * item
                yield Strip(part.file, part.start + skipped * item, at, run, count=1, spacing=run)
                at += run
            i, offset, count = i + 1, offset + taken, count - taken


# A tensor's name, shape and parts: of which vector, from where on, how many elements.
_Place = tuple[str, tuple[int, ...], list[tuple[_Vector, int, int]]]


@dataclass(frozen=True, slots=True)
class Partitioned:
    """The weights: where they lie, which names stand for another's, and the optimizer step."""

    entries: dict[str, Entry]
    ties: dict[str, str]
    step: int | None


def read_zero(folder: Path) -> Partitioned | None:
    """The weights that ZeRO trains, as DeepSpeed's own ``zero_to_fp32`` puts them together.

    Trained weights and buffers are in float32, frozen weights as they are.

    Returns:
        ``None`` if there are no partitions, but at most a whole model in `WHOLE`.

    Raises:
        ValueError: a file is corrupt, or they do not belong together.
        FileNotFoundError: a file is missing.
        OSError: it may not be read.
    """
    whole = (folder / WHOLE).exists()
    model = _File(folder, WHOLE if whole else f"zero_pp_rank_0_{WHOLE}")
    if whole and model.content.get("param_shapes") is None:
        return None
    if whole and not any(folder.glob(OPTIMIZER_FILES)):
        warnings.warn(
            f"{folder} lacks the optimizer's files, where the float32 weights are: those that the model computes with "
            "are averaged",
            stacklevel=2,
        )
        return None
    try:
        optimizers = _optimizers(folder, (1, 2) if whole else (3,))
        places = _in_groups(model, optimizers) if whole else _in_shares(folder, model, optimizers)
        entries: dict[str, Entry] = {name: _assembled(model.path, name, shape, parts) for name, shape, parts in places}
        # What the optimizer does not have; of frozen weights under ZeRO-1 `zero_to_fp32` knows nothing.
        buffers = set(model.content["buffer_names"])
        for name, saved in model.content["module"].items():
            if name in buffers:
                entries[name] = _widened(model.entry(saved, repr(name)))
            elif whole and name not in entries and isinstance(saved, _Saved):
                entries[name] = model.entry(saved, repr(name))
        ties = {name: kept for name, kept in model.content["shared_params"].items() if kept in entries}
    except (AttributeError, KeyError, TypeError, IndexError, pickle.UnpicklingError) as error:
        raise ValueError(f"{model.path} does not say what lies where ({error!r}); copy or save it again") from error
    entries |= {name: entries[kept] for name, kept in ties.items()}
    for name in entries:
        if not isinstance(name, str) or not is_unicode(name):
            raise ValueError(f"{model.path}: {repr(name)} is no name of a tensor")
    return Partitioned(entries, ties, named_step(model.content))


def _optimizers(folder: Path, stages: tuple[int, ...]) -> list[dict[str, Any]]:
    """The state of each process's optimizer, with the weights under ``"groups"``."""
    files = {path.name for path in folder.glob(OPTIMIZER_FILES)}
    prefix = "bf16_" if any(name.startswith("bf16_") for name in files) else ""
    key = "fp32_flat_groups" if stages == (3,) else "single_partition_of_fp32_groups"
    states: list[dict[str, Any]] = []
    world = 1
    while len(states) < world:
        file = _File(folder, f"{prefix}zero_pp_rank_{len(states)}_mp_rank_00_optim_states.pt")
        state = file.content.get("optimizer_state_dict")
        # That of BF16_Optimizer names no stage.
        if not isinstance(state, dict) or key not in state or state.get("zero_stage", 1) not in stages:
            raise ValueError(f"{file.path} is not of ZeRO-{' or '.join(map(str, stages))}, as the model's states are")
        parts = state["partition_count"]
        counted = list(parts) if isinstance(parts, list) else [parts]
        if not counts(counted) or len(set(counted)) != 1:
            raise ValueError(f"{file.path}: partitions for {repr(parts)} processes are not supported")
        if states and any(state.get(name) != states[0].get(name) for name in ("zero_stage", "partition_count")):
            raise ValueError(f"{file.path} is of another run than the file of the first process; copy the folder again")
        world = counted[0]
        states.append({**state, "groups": [file.entry(group, f"{key}[{i}]") for i, group in enumerate(state[key])]})
    if len(files) != world:
        raise ValueError(f"{folder} holds the states of {len(files)} optimizers, but {world} processes made them")
    return states


def _in_groups(model: _File, optimizers: list[dict[str, Any]]) -> Iterator[_Place]:
    """ZeRO-1 and ZeRO-2: in one vector for each group of parameters."""
    groups = model.content["param_shapes"]
    paddings = optimizers[0].get("param_alignment_paddings") or [[0] * len(shapes) for shapes in groups]
    numbers = {len(paddings), len(groups), *(len(state["groups"]) for state in optimizers)}
    for number, shapes in enumerate(groups):
        vector = _Vector([state["groups"][number] for state in optimizers])
        places: list[_Place] = []
        end = offset = 0
        after = paddings[number]
        if len(numbers) != 1 or len(after) != len(shapes) or not counts(after):
            raise ValueError(f"{model.path} has other parameters than the optimizer's file of the first process")
        for (name, shape), padding in zip(shapes.items(), after, strict=True):
            places.append((name, as_size(shape), [(vector, offset, prod(shape))]))
            end = offset + prod(shape)
            offset = end + padding
        aligned = [-(-length // (2 * len(optimizers))) for length in (offset, vector.length)]  # as it may be padded
        _demand(aligned[0] == aligned[1] and end <= vector.length, model, offset, vector.length)
        yield from places


def _in_shares(folder: Path, model: _File, optimizers: list[dict[str, Any]]) -> Iterator[_Place]:
    """ZeRO-3: in equal shares, of which the last are padded."""
    world = len(optimizers)
    vectors = [_Vector(state["groups"]) for state in optimizers]
    shapes = {name: as_size(shape) for group in model.content["param_shapes"] for name, shape in group.items()}
    needed = sum(-(-prod(shape) // world) for shape in shapes.values())
    for vector in vectors:
        _demand(vector.length == needed, model, needed, vector.length)
    offset = 0
    for name, shape in shapes.items():
        yield name, shape, _shares(vectors, offset, prod(shape))
        offset += -(-prod(shape) // world)
    if frozen := model.content.get("frozen_param_shapes"):
        files = [model, *(_File(folder, f"zero_pp_rank_{rank}_{WHOLE}") for rank in range(1, world))]
        for name, shape in frozen.items():
            held = [file.entry(file.content["frozen_param_fragments"][name], repr(name)) for file in files]
            shares, share = [_Vector([one]) for one in held], -(-prod(as_size(shape)) // world)
            for one in shares:
                _demand(one.length == share, model, share, one.length)
            yield name, as_size(shape), _shares(shares, 0, prod(shape))


def _shares(vectors: Sequence[_Vector], offset: int, length: int) -> list[tuple[_Vector, int, int]]:
    share = -(-length // len(vectors))
    return [(vector, offset, max(min(share, length - i * share), 0)) for i, vector in enumerate(vectors)]


def _demand(condition: bool, model: _File, shapes: int, length: int) -> None:
    if not condition:
        raise ValueError(
            f"{model.path} has parameters of {shapes} elements, but the partitions have {length}; copy the folder again"
        )


def _assembled(path: Path, name: str, shape: tuple[int, ...], parts: Iterable[tuple[_Vector, int, int]]) -> Pieces:
    dtypes = set().union(*(vector.dtypes for vector, _, _ in parts))
    if len(dtypes) != 1 or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{path}: tensor {name!r} of shape {repr(list(shape))} lies in parts of different dtypes")
    (dtype,) = dtypes
    item, at = BITS[dtype] // 8, 0
    strips: list[Strip] = []
    for vector, offset, count in parts:
        strips += vector.strips(offset, count, at)
        at += count * item
    return Pieces(dtype, shape, path, 0, at, tuple(strips))


def _widened(entry: Entry) -> Entry:
    if entry.dtype not in _WIDENED:
        return entry
    return Widened("float32", entry.shape, entry.file, 0, prod(entry.shape) * 4, entry)
