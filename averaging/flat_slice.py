"""Parts of tensors that are no shards along a dimension: elements in a row, of engines that flatten parameters.

A `FlatSlice` is to them what a DTensor is to shards. In a torch distributed checkpoint it is a few boxes of the whole
tensor, so that whatever reads such a checkpoint reads them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class FlatSlice(torch.Tensor):
    """A tensor of which this process holds ``piece()``: its elements from the one numbered ``offset`` on, in a row.

    Args:
        piece: gives the 1-D tensor, perhaps empty, that training writes to; asked each time, as an engine may move it.
        offset: the number of its first element in the whole, flattened.
        like: has the shape, dtype, device and ``requires_grad`` of the whole; only these are looked at.
        shape: of the whole, where ``like`` does not have it now.

    Attributes:
        shown: what the model computes with, where that is another tensor than the piece; see `publish`.
    """

    _piece: Callable[[], Tensor]
    offset: int
    shown: Tensor | None = None

    def __new__(
        cls, piece: Callable[[], Tensor], offset: int, like: Tensor, shape: torch.Size | None = None
    ) -> FlatSlice:
        whole: FlatSlice = torch.Tensor._make_wrapper_subclass(
            cls,
            like.shape if shape is None else shape,
            dtype=like.dtype,
            device=like.device,
            requires_grad=like.requires_grad,
        )
        whole._piece, whole.offset = piece, offset
        return whole

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} of a tensor of which this process holds only a slice")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FlatSlice({self.offset} to {self.offset + self.to_local().numel()} of {tuple(self.shape)})"

    def to_local(self) -> Tensor:
        """What this process holds."""
        return self._piece()

    def with_piece(self, piece: Tensor) -> FlatSlice:
        """The tensor like this one, in ``piece``'s dtype, of which this process holds ``piece``."""
        return FlatSlice(lambda: piece, self.offset, piece.new_empty(0), self.shape)

    def cut(self, whole: Tensor) -> Tensor:
        """A copy of the part of ``whole`` that this process holds of a tensor like this one."""
        return whole.reshape(-1).narrow(0, self.offset, self.to_local().numel()).clone()

    def publish(self) -> None:
        """Let the model compute with what was written to the piece. All processes call this."""

    @torch.no_grad()
    def full_tensor(self) -> Tensor:
        """The whole tensor. All processes call this, and any number of them may hold an element."""
        piece = self.to_local()
        whole = torch.zeros(self.numel(), dtype=piece.dtype, device=piece.device)
        whole.narrow(0, self.offset, piece.numel()).copy_(piece)
        # Of the bytes, which are zero in those that do not hold them, the largest: the very bits, whatever the dtype.
        distributed.all_reduce(whole.view(torch.uint8), distributed.ReduceOp.MAX)
        return whole.view(self.shape)

    # ------------------------------------------------------------------ in a torch distributed checkpoint

    def _boxes(self) -> Iterator[tuple[torch.Size, torch.Size, Tensor]]:
        """Where in the whole the boxes begin of which the piece consists, their sizes, and what lies there."""
        piece, done = self.to_local(), 0
        for offset, size in boxes(tuple(self.shape), self.offset, self.offset + piece.numel()):
            yield torch.Size(offset), torch.Size(size), piece.narrow(0, done, prod(size)).view(size)
            done += prod(size)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, size) for offset, size, _ in self._boxes()]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.to_local())
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(box for offset, _, box in self._boxes() if offset == index.offset)


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offset and size of the boxes that the elements ``start`` to ``stop`` of a tensor make up, in their order."""
    sides = shape or (1,)
    rows = [prod(sides[dim + 1 :]) for dim in range(len(sides))]  # elements of a row along each dimension
    while start < stop:
        dim = next(dim for dim, row in enumerate(rows) if start % row == 0 and start + row <= stop)
        offset = tuple(start // row % side for row, side in zip(rows, sides, strict=True))
        count = min(sides[dim] - offset[dim], (stop - start) // rows[dim])
        size = (*(1 for _ in sides[:dim]), count, *sides[dim + 1 :])
        yield offset[: len(shape)], size[: len(shape)]
        start += count * rows[dim]
