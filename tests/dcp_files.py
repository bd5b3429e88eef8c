"""Torch distributed checkpoints made by hand: any pieces, in any files, and metadata that lie."""

from __future__ import annotations

import io
import pickle

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo


def boxes(shape, cuts):
    """Offsets and sizes of the boxes that cuts in each dimension make."""
    spans = [list(zip([0, *cut], [*cut, n], strict=True)) for n, cut in zip(shape, cuts, strict=True)]
    grid = torch.cartesian_prod(*(torch.arange(len(span)) for span in spans)).view(-1, len(spans)).tolist()
    chosen = [[span[i] for span, i in zip(spans, index, strict=True)] for index in grid]
    return [([a for a, _ in box], [b - a for a, b in box]) for box in chosen]


def write(folder, tensors, cuts=None, change=None, files=3, layout=lambda part: part.contiguous()):
    """A checkpoint of tensors in pieces: name → where each dimension is cut; ``change`` edits the metadata."""
    folder.mkdir(parents=True)
    described, places, contents = {}, {}, [bytearray() for _ in range(files)]
    for tensor_name, tensor in tensors.items():
        chunks = []
        cut = (cuts or {}).get(tensor_name, [[]] * tensor.dim())
        for number, (offsets, sizes) in enumerate(boxes(tensor.shape, cut) if tensor.dim() else [([], [])]):
            part = tensor
            for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                part = part.narrow(dim, offset, size)
            record = io.BytesIO()
            torch.save(layout(part.clone()), record)
            file = (number + len(places)) % files
            chunks.append(dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            index = dcp.MetadataIndex(tensor_name, torch.Size(offsets), number)
            places[index] = _StorageInfo(f"__{file}_0.distcp", len(contents[file]), record.tell())
            contents[file] += record.getvalue()
        properties = dcp.TensorProperties(dtype=tensor.dtype)
        described[tensor_name] = dcp.TensorStorageMetadata(properties, tensor.shape, chunks)
    said = dcp.Metadata(described, {name: (name,) for name in described}, places, dcp.StorageMeta(folder))
    if change is not None:
        change(said)
    for number, content in enumerate(contents):
        (folder / f"__{number}_0.distcp").write_bytes(content)
    (folder / ".metadata").write_bytes(pickle.dumps(said))
    return folder


def put(path, value):
    """A change of the metadata: sets what a path of attributes and keys leads to."""

    def first(said):
        return next(iter(said.values())) if isinstance(said, dict) else said

    def change(said):
        for step in path[:-1]:
            said = first(vars(said)[step])
        if isinstance(said, list):
            said[path[-1]] = value
        else:
            object.__setattr__(said, path[-1], value)

    return change
