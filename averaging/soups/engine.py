"""Linear combinations of checkpoints, streamed piece by piece on all cores.

Every soup is Σ cᵢ·xᵢ with some choice of coefficients, the same for all tensors or each tensor's own, which may follow
from what the `Gram` matrices tell of the ingredients. Each worker thread reads one small piece of a tensor from each
ingredient, adds it to a float64 sum that stays in the cache, rounds once and hands the result on: memory depends
neither on the number nor on the size of the checkpoints.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from averaging.checkpoints.files import BITS, opening
from averaging.soups.arithmetic import SUMS, Arithmetic, arithmetic, as_tensor

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from averaging.checkpoints import Checkpoint, Entry
    from averaging.soups.lora import Adapters

Sink = Callable[[str, int, memoryview], None]
"""Takes a tensor's name, an offset in its bytes, and the bytes that belong there; called from several threads."""
Progress = Callable[[int, int], None]
"""Takes the bytes read so far and the bytes to read in all."""

PIECE = 256 * 1024  # bytes of one ingredient handled at a time, at most
TASK = 32  # pieces that a worker takes at a time; also the unit of the checksum
AVERAGED = ("bfloat16", "float16", "float32", "float64", "complex64")


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the soup: where it lies in every ingredient."""

    name: str
    descriptors: Mapping[Path, int]
    sources: list[Entry]

    @property
    def nbytes(self) -> int:
        return self.sources[0].stop - self.sources[0].start

    @property
    def averaged(self) -> bool:
        return self.sources[0].dtype in AVERAGED


class _Pass:
    """Reads every tensor of all ingredients once, task by task on all cores.

    What is done with a task, from its first byte to its last, is `_task`'s business.
    """

    advice = "leave this checkpoint out"

    def __init__(self, ingredients: Sequence[Checkpoint], progress: Progress | None = None) -> None:
        self.ingredients = ingredients
        self.progress = progress
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._done = self._total = 0

    def run(self, groups: Sequence[Sequence[str]]) -> Iterator[int]:
        """Take the tensors named, group by group; yields the number of each group when it is finished.

        Only one group's files are open at a time.

        Raises:
            ValueError: NaN, infinity, an overflow of the result's dtype, or integers that differ.
            OSError: reading or the sink failed.
        """
        threads = _threads()
        self._stop.clear()
        taken = [i.entries[name] for i in self.ingredients for names in groups for name in names]
        self._done, self._total = 0, sum(entry.stop - entry.start for entry in taken)
        try:
            with ThreadPoolExecutor(threads, thread_name_prefix="soup") as pool:
                try:
                    for number, names in enumerate(groups):
                        self._run_group(pool, threads, names)
                        yield number
                finally:
                    self._stop.set()
        finally:
            _set_torch_threads(threads)  # the workers' setting is also that of threads to come

    def _begin(self, tensor: _Tensor, tasks: int) -> None:
        raise NotImplementedError

    def _task(self, tensor: _Tensor, start: int, stop: int, buffers: _Buffers) -> None:
        raise NotImplementedError

    def _end(self, tensor: _Tensor) -> None:
        raise NotImplementedError

    def _run_group(self, pool: ThreadPoolExecutor, workers: int, names: Sequence[str]) -> None:
        sources = {name: [ingredient.entries[name] for ingredient in self.ingredients] for name in names}
        with opening(itertools.chain.from_iterable(sources.values())) as opened:
            tensors = []
            for name in names:
                tensors.append(_Tensor(name, opened, sources[name]))
                self._begin(tensors[-1], -(-tensors[-1].nbytes // (PIECE * TASK)))
            tasks = ((t, start) for t in tensors for start in range(0, t.nbytes, PIECE * TASK))
            running = [pool.submit(self._work, tasks) for _ in range(workers)]
            try:
                while True:
                    finished, unfinished = wait(running, timeout=0.1, return_when=FIRST_EXCEPTION)
                    for future in finished:
                        future.result()
                    if self.progress is not None:
                        self.progress(self._done, self._total)
                    if not unfinished:
                        break
            finally:
                self._stop.set()
                wait(running)  # before their files are closed
            self._stop.clear()
            for tensor in tensors:
                self._end(tensor)

    def _work(self, tasks: Iterator[tuple[_Tensor, int]]) -> None:
        _set_torch_threads(1)
        buffers = _Buffers(len(self.ingredients))
        while not self._stop.is_set():
            with self._lock:
                task = next(tasks, None)
            if task is None:
                return
            tensor, start = task
            stop = min(start + PIECE * TASK, tensor.nbytes)
            self._task(tensor, start, stop, buffers)
            with self._lock:
                self._done += (stop - start) * len(self.ingredients)

    def _read(self, tensor: _Tensor, start: int, size: int, buffers: _Buffers) -> list[memoryview]:
        """One piece of each ingredient, in memory that the next call may overwrite."""
        rows = buffers.rows(size)
        for row, source in zip(rows, tensor.sources, strict=True):
            source.read(tensor.descriptors, row, start)
        return rows

    def _rows(self, tensor: _Tensor, start: int, size: int, buffers: _Buffers) -> list[Tensor]:
        """`_read`, as tensors."""
        return [as_tensor(row, tensor.sources[0].dtype) for row in self._read(tensor, start, size, buffers)]

    def _find_nonfinite(self, tensor: _Tensor, start: int, stop: int, buffers: _Buffers) -> None:
        """Raise for the ingredient that holds NaN or infinity between these bytes, if one does."""
        for position in range(start, stop, PIECE):
            rows = self._rows(tensor, position, min(PIECE, stop - position), buffers)
            for ingredient, values in zip(self.ingredients, rows, strict=True):
                bad = values.isfinite().logical_not_()
                if bad.any():
                    index = int(bad.nonzero()[0])
                    raise ValueError(
                        f"{ingredient.path}: tensor {tensor.name!r} holds {values[index].item()} at element "
                        f"{position // values.itemsize + index}; {self.advice}"
                    )


@dataclass(frozen=True, slots=True)
class Mix:
    """One linear combination of the ingredients, Σ cᵢ·xᵢ / divisor, and where it goes.

    The coefficients are one per ingredient, or name → one per ingredient; ``None`` stands for ones.
    """

    coefficients: Sequence[float] | Mapping[str, Sequence[float]] | None
    divisor: float
    sink: Sink

    def of(self, name: str) -> Sequence[float] | None:
        """The coefficients in the tensor ``name``."""
        return self.coefficients[name] if isinstance(self.coefficients, Mapping) else self.coefficients


class Mixer(_Pass):
    """Computes one or more `Mix`es of ``ingredients`` for every tensor, in float64, rounded once.

    Args:
        ingredients: checkpoints with the same names, shapes and dtypes.
        mixes: what is computed of each piece while it is in memory.
        dtypes: name → dtype of the results.
        allow_nonfinite: accept NaN and infinity in the ingredients.
        progress: called from time to time.

    Tensors that are not floating-point must be the same in all ingredients, except that ``num_batches_tracked``
    (BatchNorm's count of training batches, which grows from step to step) is the last ingredient's.
    """

    advice = "leave this checkpoint out, or pass --allow-nonfinite (allow_nonfinite=True) to average it all the same"

    def __init__(
        self,
        ingredients: Sequence[Checkpoint],
        mixes: Sequence[Mix],
        dtypes: Mapping[str, str],
        *,
        allow_nonfinite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(ingredients, progress)
        self.mixes = mixes
        self.dtypes = dtypes
        self.allow_nonfinite = allow_nonfinite
        self._parts: dict[str, list[bytearray]] = {}
        self.digests: list[dict[str, bytes]] = [{} for _ in ingredients]
        """Of each ingredient the digests of the tensors mixed so far, by name."""

    def _begin(self, tensor: _Tensor, tasks: int) -> None:
        self._parts[tensor.name] = [bytearray(32 * tasks) for _ in tensor.sources]

    def _task(self, tensor: _Tensor, start: int, stop: int, buffers: _Buffers) -> None:
        digests = [hashlib.sha256() for _ in tensor.sources]
        dtype_out = self.dtypes[tensor.name] if tensor.averaged else tensor.sources[0].dtype
        own = arithmetic(tensor.sources[0].dtype, dtype_out) if tensor.averaged else arithmetic()
        block = own.block(len(tensor.sources), PIECE)
        for position in range(start, stop, PIECE):
            end = min(position + PIECE, stop)
            for at in range(position, end, block):
                if self._stop.is_set():
                    return
                size = min(block, end - at)
                rows = self._read(tensor, at, size, buffers)
                for row, sums in zip(rows, buffers.sums, strict=True):
                    own.sums(row, at - position, sums)
                if tensor.averaged:
                    self._mix(own, tensor, at, rows, buffers)
                else:
                    agreed = self._agree(tensor, rows)
                    for mix in self.mixes:
                        mix.sink(tensor.name, at, agreed)
            for digest, sums in zip(digests, buffers.sums, strict=True):
                digest.update(sums)
        place = slice(start // (PIECE * TASK) * 32, (start // (PIECE * TASK) + 1) * 32)
        for part, digest in zip(self._parts[tensor.name], digests, strict=True):
            part[place] = digest.digest()

    def _end(self, tensor: _Tensor) -> None:
        for known, part in zip(self.digests, self._parts.pop(tensor.name), strict=True):
            known[tensor.name] = hashlib.sha256(part).digest()

    def _mix(self, own: Arithmetic, tensor: _Tensor, start: int, rows: Sequence[memoryview], buffers: _Buffers) -> None:
        dtype, dtype_out, size = tensor.sources[0].dtype, self.dtypes[tensor.name], len(rows[0])
        out = buffers.result(size * BITS[dtype_out] // BITS[dtype])
        for mix in self.mixes:
            finite = self._combine(own, tensor, start, rows, mix.of(tensor.name), mix.divisor, out)
            # One bad number among the ingredients makes this sum bad; it may also just overflow.
            if not finite and not self.allow_nonfinite and not as_tensor(out, dtype_out).isfinite().all():
                self._find_nonfinite(tensor, start, start + size, buffers)
                raise ValueError(
                    f"tensor {tensor.name!r}: the average is too large for {dtype_out}; choose a wider dtype"
                )
            mix.sink(tensor.name, start * BITS[dtype_out] // BITS[dtype], out)

    def _combine(
        self,
        own: Arithmetic,
        tensor: _Tensor,
        start: int,
        rows: Sequence[memoryview],
        coefficients: Sequence[float] | None,
        divisor: float,
        out: memoryview,
    ) -> bool:
        """Compute a piece of a result; returns whether it is known to be finite."""
        return own.combine(rows, tensor.sources[0].dtype, coefficients, divisor, out, self.dtypes[tensor.name])

    def _agree(self, tensor: _Tensor, rows: Sequence[memoryview]) -> memoryview:
        """A piece that is not averaged: the same in all ingredients, or the last one's."""
        if tensor.name.rpartition(".")[2] != "num_batches_tracked":
            kept = bytes(rows[0])
            for number, row in enumerate(rows):
                if bytes(row) != kept:
                    first, other = self.ingredients[0].path, self.ingredients[number].path
                    raise ValueError(
                        f"tensor {tensor.name!r} is {tensor.sources[0].dtype}, which cannot be averaged, and differs "
                        f"between {first} and {other}; integer, boolean and quantised tensors must be the same in all "
                        "(dequantise the models first)"
                    )
        return rows[-1]


class FisherMixer(Mixer):
    """Computes Σ λᵢFᵢxᵢ / Σ λᵢFᵢ element by element, with the coefficients λᵢ, as `kernels.weighted_mean` does.

    Args:
        fishers: for each ingredient, a checkpoint with the Fᵢ of some tensors under the same names; all of the same
            ones. The other tensors are Σ λᵢxᵢ / Σ λᵢ.
        floor: the least F of the first ingredient.

    The other arguments are as in `Mixer`.
    """

    def __init__(self, *arguments: Any, fishers: Sequence[Checkpoint], floor: float, **options: Any) -> None:
        from averaging import kernels

        super().__init__(*arguments, **options)
        self.fishers, self.floor = fishers, floor
        self._weighted_mean = kernels.weighted_mean
        self._descriptors: Mapping[Path, int] = {}

    def run(self, groups: Sequence[Sequence[str]]) -> Iterator[int]:
        """As `_Pass.run`; the files of all Fishers are open meanwhile."""
        with opening(entry for fisher in self.fishers for entry in fisher.entries.values()) as self._descriptors:
            yield from super().run(groups)

    def _combine(
        self,
        own: Arithmetic,
        tensor: _Tensor,
        start: int,
        rows: Sequence[memoryview],
        coefficients: Sequence[float] | None,
        divisor: float,
        out: memoryview,
    ) -> bool:
        weights = coefficients or [1.0] * len(rows)
        if tensor.name not in self.fishers[0].entries:
            return super()._combine(own, tensor, start, rows, weights, math.fsum(weights), out)
        dtype, dtype_out = tensor.sources[0].dtype, self.dtypes[tensor.name]
        first, count = start * 8 // BITS[dtype], len(rows[0]) * 8 // BITS[dtype]
        fishers = [self._fisher(fisher, tensor.name, first, count) for fisher in self.fishers]
        models = [as_tensor(row, dtype) for row in rows]
        self._weighted_mean(models, fishers, weights, self.floor, as_tensor(out, dtype_out))
        return False

    def _fisher(self, fisher: Checkpoint, name: str, first: int, count: int) -> Tensor:
        """``count`` elements of a Fisher from the ``first`` one on."""
        entry = fisher.entries[name]
        width = BITS[entry.dtype] // 8
        data = memoryview(bytearray(count * width))
        entry.read(self._descriptors, data, first * width)
        values = as_tensor(data, entry.dtype)
        if not (values >= 0).all() or not values.isfinite().all():
            raise ValueError(
                f"{fisher.path}: the Fisher information of {name!r} must not be negative, infinite or NaN; compute it "
                "again"
            )
        return values


class ProductMixer(Mixer):
    """Computes combinations of LoRA adapters' products and what is beside them, module by module, by one thread.

    Args:
        adapters: the ingredients.

    The other arguments are as in `Mixer`.
    """

    def __init__(self, *arguments: Any, adapters: Adapters, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.adapters = adapters

    def run(self, groups: Sequence[Sequence[str]]) -> Iterator[int]:
        """As `_Pass.run`."""
        for number, names in enumerate(groups):
            for adapter, digests in zip(self.ingredients, self.digests, strict=True):
                reading = Mixer([adapter], [], self.dtypes)
                for _ in reading.run([[name for name in names if name in adapter.entries]]):
                    digests |= reading.digests[0]
            for mix in self.mixes:
                ones = [1.0] * len(self.ingredients)
                shares = {name: [c / mix.divisor for c in mix.of(name) or ones] for name in names}
                for name, data in self.adapters.combined(shares, self.dtypes):
                    mix.sink(name, 0, data)
            yield number


def checksum(ingredient: Checkpoint, digests: Mapping[str, bytes]) -> str:
    """What identifies the content of an ingredient, whatever files and order its tensors are stored in.

    Not of cryptographic strength against someone who wants a collision, but it comes at no cost. The bytes of a
    tensor, padded with zeros to whole pieces of 256 KiB, are taken piece by piece as a 256 × 128 matrix of
    little-endian 64-bit integers. Of every 32 pieces the SHA-256 of their row sums and column sums (modulo 2⁶⁴)
    is taken, a tensor's digest is the SHA-256 of these, and the checksum is the SHA-256 over all tensors in the
    order of their names: name, dtype and shape as a JSON-like line, and digest.

    Args:
        ingredient: the checkpoint.
        digests: those of its tensors, from `Mixer`.
    """
    total = hashlib.sha256()
    for name in sorted(digests):
        entry = ingredient.entries[name]
        total.update(f"{name!r} {entry.dtype} {list(entry.shape)}\n".encode() + digests[name])
    return f"piecesums-sha256:{total.hexdigest()}"


class Gram(_Pass):
    """Measures x₀ and the differences xᵢ − x₀ of every floating-point tensor: all their inner products, in float64.

    ``products[name][i][j]`` is ⟨dᵢ, dⱼ⟩ with d₀ = x₀ and dᵢ = xᵢ − x₀, whatever the number of threads.

    Args:
        ingredients: checkpoints with the same names, shapes and dtypes.
        progress: called from time to time.
    """

    def __init__(self, ingredients: Sequence[Checkpoint], progress: Progress | None = None) -> None:
        super().__init__(ingredients, progress)
        self.products: dict[str, list[list[float]]] = {}
        self._parts: dict[str, list[memoryview]] = {}
        # All ingredients' blocks together, in float64, are to stay in the cache.
        self._block = max(PIECE // len(ingredients) // 16 * 16, 16)

    def measure(self, names: Iterable[str] | None = None) -> dict[str, list[list[float]]]:
        """The products of all floating-point tensors, or of those among ``names``; raises as `run` does."""
        entries = self.ingredients[0].entries
        for _ in self.run([[name for name in names or entries if entries[name].dtype in AVERAGED]]):
            pass
        return self.products

    def _begin(self, tensor: _Tensor, tasks: int) -> None:
        count = len(tensor.sources)
        self._parts[tensor.name] = [memoryview(bytearray(8 * count * count)) for _ in range(tasks)]

    def _task(self, tensor: _Tensor, start: int, stop: int, buffers: _Buffers) -> None:
        dtype, part = tensor.sources[0].dtype, self._parts[tensor.name][start // (PIECE * TASK)]
        own = arithmetic(dtype)
        for position in range(start, stop, self._block):
            if self._stop.is_set():
                return
            size = min(self._block, stop - position)
            own.products(self._read(tensor, position, size, buffers), dtype, part)
        if not all(map(math.isfinite, part.cast("d"))):
            self._find_nonfinite(tensor, start, stop, buffers)
            raise ValueError(f"tensor {tensor.name!r}: its numbers are too large to be squared and summed")

    def _end(self, tensor: _Tensor) -> None:
        count = len(tensor.sources)
        total = [0.0] * count**2
        for part in self._parts.pop(tensor.name):
            total = [a + b for a, b in zip(total, part.cast("d"), strict=True)]
        self.products[tensor.name] = [
            [total[min(i, j) * count + max(i, j)] for j in range(count)] for i in range(count)
        ]


class _Buffers:
    """The memory of one worker."""

    def __init__(self, count: int) -> None:
        self.sums = [memoryview(bytearray(SUMS)) for _ in range(count)]
        self._pieces: list[memoryview] = [memoryview(b"")] * count
        self._out = memoryview(bytearray(PIECE * 4))  # a bfloat16 may become a float64

    def rows(self, size: int) -> list[memoryview]:
        """Where a piece of ``size`` bytes of each ingredient goes."""
        if len(self._pieces[0]) < size:
            self._pieces = [memoryview(bytearray(size)) for _ in self._pieces]
        return [piece[:size] for piece in self._pieces]

    def result(self, size: int) -> memoryview:
        """Where ``size`` bytes of a result go."""
        return self._out[:size]


def _threads() -> int:
    """How many cores to use: as many as torch would."""
    if torch := sys.modules.get("torch"):
        return int(torch.get_num_threads())
    wished = os.environ.get("OMP_NUM_THREADS", "")
    return int(wished) if wished.isdecimal() and int(wished) else len(os.sched_getaffinity(0))


def _set_torch_threads(threads: int) -> None:
    """How many threads torch uses for an operation, if it is used at all."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
