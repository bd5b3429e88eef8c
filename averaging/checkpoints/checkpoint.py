"""One saved model as a lazy mapping from names to tensors."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from averaging.checkpoints.files import Entry, Header, open_regular, read_header, read_into, read_json
from averaging.checkpoints.pickled import read_pickled

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["huggingface", "peft", "safetensors", "lightning", "torch"]

MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")

TITLES: dict[Kind, str] = {
    "huggingface": "Hugging Face model folder",
    "peft": "PEFT adapter folder",
    "safetensors": "safetensors file",
    "lightning": "Lightning checkpoint",
    "torch": "torch file",
}


class Checkpoint(Mapping[str, "Tensor"]):
    """The weights of a saved model, read one tensor at a time.

    Opening one reads and checks headers only; ``checkpoint[name]`` then reads that tensor from the disk, afresh each
    time. For safetensors everything but reading a tensor works without torch.

    Args:
        path: a Hugging Face model folder (``model.safetensors``, or an index and its shards), a PEFT adapter folder,
            a ``.safetensors`` file, a Lightning ``.ckpt`` or a torch ``.pt``, ``.pth`` or ``.bin`` file that holds
            named tensors, directly or under ``state_dict``, ``model_state_dict`` or ``model``. Torch files are read
            with ``weights_only=True``: no code in them is run.

    Attributes:
        path: as given.
        kind: ``"huggingface"``, ``"peft"``, ``"safetensors"``, ``"lightning"`` or ``"torch"``.
        entries: name → `Entry` (dtype, shape, file, byte range), in the order of the files.
        shards: file name → the names in it; a single item unless the model is sharded; empty for torch files.
        metadata: file name → the metadata in its header.
        index: the index of a sharded model, else ``None``.
        config: ``config.json`` or ``adapter_config.json``, else ``None``.
        step: the optimizer step it was saved at, from what the trainer wrote or from the name, else ``None``.
        ties: names that share another tensor's bytes → that tensor's name.

    Raises:
        ValueError: a file is truncated, corrupt or not supported; the message names it.
        FileNotFoundError: there is nothing there, or a shard is missing.
        OSError: it may not be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.entries: dict[str, Entry] = {}
        self.shards: dict[str, list[str]] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self.index: dict[str, Any] | None = None
        self.config: dict[str, Any] | None = None
        self.step: int | None = None
        self.ties: dict[str, str] = {}
        self.kind: Kind
        if self.path.is_dir():
            self._open_folder()
        elif self.path.suffix == ".safetensors":
            self.kind = "safetensors"
            self._add(self.path, read_header(self.path))
        elif self.path.suffix in TORCH_SUFFIXES:
            self._open_torch()
        else:
            os.stat(self.path)  # "no such file" before "what is this?"
            raise ValueError(
                f"{self.path} is no checkpoint: expected a folder, .safetensors, {', '.join(TORCH_SUFFIXES)}"
            )
        if not self.entries:
            raise ValueError(f"{self.path} holds no tensors")
        if self.step is None:
            self.step = step_in_name(self.path)

    def __getitem__(self, name: str) -> Tensor:
        import torch

        entry = self.entries[name]
        dtype = getattr(torch, entry.dtype, None)
        if dtype is None or entry.dtype.startswith("float4"):
            raise ValueError(f"{self.path}: torch has no tensors of {entry.dtype} like {name!r}")
        raw = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
        descriptor = open_regular(entry.file)
        try:
            read_into(descriptor, raw.numpy().data, entry.start, entry.file)
        finally:
            os.close(descriptor)
        tensor: Tensor = raw.view(dtype).reshape(entry.shape)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {self.kind}, {len(self)} tensors, step {self.step})"

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(entry.stop - entry.start for entry in self.entries.values())

    def _add(self, path: Path, header: Header) -> None:
        self.entries.update(header.entries)
        self.shards[path.name] = list(header.entries)
        self.metadata[path.name] = header.metadata
        # `safetensors.torch.save_model` notes the names it left out as "left out": "kept".
        for name, kept in header.metadata.items():
            if name not in header.entries and kept in header.entries:
                self.ties[name] = kept

    def _open_folder(self) -> None:
        files = weight_files(self.path)
        if MODEL_FILE in files or INDEX_FILE in files:
            self.kind = "huggingface"
            if MODEL_FILE in files:  # what from_pretrained prefers
                self._add(self.path / MODEL_FILE, read_header(self.path / MODEL_FILE))
            else:
                self._open_index(self.path / INDEX_FILE)
            if (self.path / "config.json").exists():
                self.config = read_json(self.path / "config.json")
        elif ADAPTER_FILE in files:
            self.kind = "peft"
            self._add(self.path / ADAPTER_FILE, read_header(self.path / ADAPTER_FILE))
            self.config = read_json(self.path / ADAPTER_CONFIG)
        else:
            raise FileNotFoundError(
                f"{self.path} is no model folder: it holds neither {MODEL_FILE} nor {INDEX_FILE} nor {ADAPTER_FILE}"
            )
        if (self.path / "trainer_state.json").exists():
            step = read_json(self.path / "trainer_state.json").get("global_step")
            self.step = step if type(step) is int else None

    def _open_index(self, path: Path) -> None:
        self.index = read_json(path)
        places = self.index.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(f"{path} must map tensor names to file names under 'weight_map'")
        for file in dict.fromkeys(places.values()):
            # By the name alone: symbolic links are legitimate (the Hub's cache is made of them).
            if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
                raise ValueError(f"{path} names the shard {file!r}: shards must lie in the index's own folder")
            shard = self.path / file
            if not shard.exists():
                raise FileNotFoundError(f"{path} names the shard {file}, which is missing; copy the folder again")
            header = read_header(shard)
            listed = {name for name, place in places.items() if place == file}
            if wrong := sorted(listed - header.entries.keys()):
                raise ValueError(f"{path} says that {shard.name} holds {wrong[0]!r}, but it does not")
            if wrong := sorted(header.entries.keys() - listed):
                raise ValueError(f"{shard} holds {wrong[0]!r}, which {path.name} does not say")
            self._add(shard, header)

    def _open_torch(self) -> None:
        pickled = read_pickled(self.path)
        self.kind = "lightning" if pickled.lightning else "torch"
        self.entries, self.step = pickled.entries, pickled.step
        if pickled.spill is not None:
            weakref.finalize(self, pickled.spill.close)
        first: dict[tuple[Path, int, int], str] = {}
        for name, entry in self.entries.items():
            kept = first.setdefault((entry.file, entry.start, entry.stop), name)
            if kept != name and entry.stop > entry.start:
                self.ties[name] = kept


def weight_files(folder: Path) -> set[str]:
    """Which of the files that make a folder a checkpoint are there."""
    return {name for name in (MODEL_FILE, INDEX_FILE, ADAPTER_FILE) if (folder / name).exists()}


def step_in_name(path: Path) -> int | None:
    """The step in a name such as ``checkpoint-500``, ``epoch=3-step=1000.ckpt`` or ``weights_200.safetensors``."""
    name = path.name if path.is_dir() else path.stem
    found = re.search(r"step[=_-]?(\d+)", name) or re.search(r"(\d+)(?!.*\d)", name)
    return int(found[1]) if found else None
