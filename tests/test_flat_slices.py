"""Slices of flattened tensors: the boxes they consist of, in torch distributed checkpoints and out of them."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from averaging.flat_slice import FlatSlice, boxes
from averaging.shard_files import Parts, StoredParts, save_parts

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

SHAPES = [(), (7,), (3, 5), (1, 6), (4, 1), (2, 3, 4), (3, 1, 2, 2), (0, 4)]


def test_boxes_are_the_elements_in_their_order():
    for shape in SHAPES:
        whole = torch.arange(prod(shape)).view(shape)
        for start in range(prod(shape) + 1):
            for stop in range(start, prod(shape) + 1):
                found = [
                    whole[tuple(slice(begin, begin + length) for begin, length in zip(offset, size, strict=True))]
                    for offset, size in boxes(shape, start, stop)
                ]
                assert all(box.numel() for box in found)
                assert torch.cat([torch.empty(0, dtype=torch.long), *(box.flatten() for box in found)]).tolist() == [
                    *range(start, stop)
                ]
                assert len(found) <= max(1, 2 * len(shape) - 1)


def test_slices_are_written_and_read_as_parts_of_whole_tensors(tmp_path):
    tensors = {f"{shape}": torch.randn(shape, dtype=torch.bfloat16) for shape in SHAPES if 0 not in shape}

    def cut(name: str, start: int, stop: int) -> FlatSlice:
        piece = tensors[name].flatten()[start:stop].clone()
        return FlatSlice(lambda: piece, start, tensors[name])

    def slices(ends: dict[str, tuple[int, int]]) -> dict[str, FlatSlice]:
        return {name: cut(name, *place) for name, place in ends.items()}

    every = slices({name: (0, tensor.numel()) for name, tensor in tensors.items()})
    save_parts({name: flat.to_local() for name, flat in every.items()}, every, tmp_path / "flat")
    save(tensors, storage_writer=FileSystemWriter(tmp_path / "plain"))
    for folder in (tmp_path / "flat", tmp_path / "plain"):
        stored = StoredParts(folder, {})
        assert {name: tensor.shape for name, tensor in tensors.items()} == {n: stored.shape(n) for n in stored}
        assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
        for share in range(3):
            like = slices({n: (t.numel() * share // 3, -(-t.numel() * (share + 1) // 3)) for n, t in tensors.items()})
            for parts in (StoredParts(folder, like), Parts(tensors, like)):
                assert all(torch.equal(parts[name], flat.to_local()) for name, flat in like.items())
                assert all(parts.shape(name) == flat.to_local().shape for name, flat in like.items())
