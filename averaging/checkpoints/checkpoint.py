"""One saved model as a lazy mapping from names to tensors."""

from __future__ import annotations

import os
import re
import shlex
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from averaging.checkpoints.distributed import METADATA_FILE, read_distributed
from averaging.checkpoints.files import Entry, Header, open_regular, opening, read_header, read_json
from averaging.checkpoints.pickled import Pickled, read_pickled, read_step
from averaging.checkpoints.zero import WHOLE, read_zero

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["huggingface", "peft", "safetensors", "lightning", "torch", "distributed"]

MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# What these were before safetensors, in the order in which they are looked for.
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_ADAPTER = "adapter_model.bin"
# Where a torch distributed checkpoint lies in a folder: directly, or as accelerate and transformers put it there.
DISTRIBUTED = (METADATA_FILE, f"pytorch_model_fsdp_0/{METADATA_FILE}")
LIGHTNING_FILE = "meta.pt"  # beside Lightning's
# DeepSpeed's folders: what is in the folder that the file ``latest`` names, or that is given itself.
DEEPSPEED_LATEST = "latest"
DEEPSPEED_FILES = "*_model_states.pt"
_ZERO_FILE = re.compile(r"((bf16_)?zero_pp_rank_\d+_)?mp_rank_00_(model|optim)_states\.pt")
UNIVERSAL = "zero"  # beside the states in a folder that DeepSpeed has converted for other numbers of processes
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
# What the Hub's cache calls a version of a model; and the bytes of a file that names one, or DeepSpeed's folder.
_COMMIT = "[0-9a-f]{40}"
LONGEST_REF = 1000

TITLES: dict[Kind, str] = {
    "huggingface": "Hugging Face model folder",
    "peft": "PEFT adapter folder",
    "safetensors": "safetensors file",
    "lightning": "Lightning checkpoint",
    "torch": "torch file",
    "distributed": "torch distributed checkpoint",
}


class Checkpoint(Mapping[str, "Tensor"]):
    """The weights of a saved model, read one tensor at a time.

    Opening one reads and checks headers only; ``checkpoint[name]`` then reads that tensor from the disk, afresh each
    time. For safetensors everything but reading a tensor works without torch.

    Args:
        path: a Hugging Face model folder (``model.safetensors`` or ``pytorch_model.bin``, or an index and its shards),
            a PEFT adapter folder, a ``.safetensors`` file, a Lightning ``.ckpt`` or a torch ``.pt``, ``.pth`` or
            ``.bin`` file that holds named tensors, directly or under ``state_dict``, ``model_state_dict``, ``model`` or
            ``module``;
            or a torch distributed checkpoint, a folder with ``.metadata``, of a model and perhaps its optimizer; or
            DeepSpeed's folder of ZeRO-1, ZeRO-2 or ZeRO-3, of which it is the float32 weights. Where nothing lies,
            ``organisation/model`` or ``organisation/model@revision`` is looked up in the Hub's local cache.
            Torch files are read with ``weights_only=True``: no code in them is run.

    Attributes:
        path: as given, or where the Hub's cache has it.
        kind: ``"huggingface"``, ``"peft"``, ``"safetensors"``, ``"lightning"``, ``"torch"`` or ``"distributed"``.
        entries: name → `Entry` (dtype, shape, file, byte range), in the order of the files.
        shards: file name → the names in it; a single item unless the model is sharded; empty for torch files. Of
            ``.bin`` files in folders, the name that such a safetensors file has.
        metadata: file name → the metadata in its header, of safetensors files.
        index: the index of a sharded model, else ``None``; file names as in ``shards``.
        config: ``config.json`` or ``adapter_config.json``, else ``None``.
        step: the optimizer step it was saved at, from what the trainer wrote or from the name, else ``None``.
        ties: names that share another tensor's bytes → that tensor's name.

    Raises:
        ValueError: a file is truncated, corrupt or not supported; the message names it.
        FileNotFoundError: there is nothing there, or a shard is missing.
        OSError: it may not be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _in_the_hubs_cache(Path(path))
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
        with opening([entry]) as descriptors:
            entry.read(descriptors, raw.numpy().data, 0)
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
        models = [name for name in (MODEL_FILE, INDEX_FILE, TORCH_FILE, TORCH_INDEX) if name in files]
        adapters = [name for name in (ADAPTER_FILE, TORCH_ADAPTER) if name in files]
        if models:
            self.kind = "huggingface"
            if models[0] in (INDEX_FILE, TORCH_INDEX):
                self._open_index(self.path / models[0])
            else:  # what from_pretrained prefers
                self._add_file(self.path / models[0], models[0] == TORCH_FILE)
            if (self.path / "config.json").exists():
                self.config = read_json(self.path / "config.json")
        elif adapters:
            self.kind = "peft"
            self._add_file(self.path / adapters[0], adapters[0] == TORCH_ADAPTER)
            self.config = read_json(self.path / ADAPTER_CONFIG)
        elif distributed := [name for name in DISTRIBUTED if name in files]:
            self.kind = "distributed"
            folder = (self.path / distributed[0]).parent
            self.entries.update(read_distributed(folder))
            if (folder / LIGHTNING_FILE).exists():
                self.step = read_step(folder / LIGHTNING_FILE)
            elif self.path.name.startswith("pytorch_model_fsdp_"):
                self.step = step_in_name(self.path.absolute().parent)
        elif tag := deepspeed_folder(self.path):
            self._open_deepspeed(tag)
        else:
            raise FileNotFoundError(
                f"{self.path} is no model folder: it holds neither {MODEL_FILE} nor {INDEX_FILE} nor {TORCH_FILE} nor "
                f"{TORCH_INDEX} nor {ADAPTER_FILE} nor {METADATA_FILE}"
            )
        if (self.path / "trainer_state.json").exists():
            step = read_json(self.path / "trainer_state.json").get("global_step")
            self.step = step if type(step) is int and 0 <= step < 1 << 63 else None  # a float holds it, too

    def _open_deepspeed(self, folder: Path) -> None:
        names = {path.name for pattern in ("*_states.pt", "*layer_*", UNIVERSAL) for path in folder.glob(pattern)}
        models = {path.name for path in folder.glob(DEEPSPEED_FILES)}
        if not all(map(_ZERO_FILE.fullmatch, names)) or (WHOLE in models and len(models) > 1):
            script = folder.parent / "zero_to_fp32.py"
            given, out = folder.parent, self.path.with_name(f"{self.path.name}-fp32")
            command = [str(script)] if script.exists() else ["-m", "deepspeed.utils.zero_to_fp32"]
            raise ValueError(
                f"{self.path} holds the weights in DeepSpeed's partitions, not of ZeRO alone; put them together first, "
                f"and average the result: {shlex.join(['python', *command, str(given), str(out), '-t', folder.name])}"
            )
        if folder != self.path:
            latest = self.path / DEEPSPEED_LATEST
            with open(open_regular(latest), "rb") as file:
                tag = file.read(LONGEST_REF).decode(errors="replace").strip()
            if tag != folder.name:
                raise ValueError(f"{latest} names {tag!r}, but only {folder.name} is there; copy the folder again")
        self.kind = "torch"
        if partitioned := read_zero(folder):
            self.entries, self.ties, self.step = partitioned.entries, partitioned.ties, partitioned.step
        else:
            self.step = self._add_pickled(folder / WHOLE).step

    def _open_index(self, path: Path) -> None:
        self.index = read_json(path)
        places = self.index.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(f"{path} must map tensor names to file names under 'weight_map'")
        if not isinstance(self.index.get("metadata", {}), dict):
            raise ValueError(f"{path}: its 'metadata' must be an object")
        for file in dict.fromkeys(places.values()):
            # By the name alone: symbolic links are legitimate (the Hub's cache is made of them).
            if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
                raise ValueError(f"{path} names the shard {file!r}: shards must lie in the index's own folder")
            shard = self.path / file
            if not shard.exists():
                raise FileNotFoundError(f"{path} names the shard {file}, which is missing; copy the folder again")
            held = set(self._add_file(shard, path.name == TORCH_INDEX))
            listed = {name for name, place in places.items() if place == file}
            if wrong := sorted(listed - held):
                raise ValueError(f"{path} says that {shard.name} holds {wrong[0]!r}, but it does not")
            if wrong := sorted(held - listed):
                raise ValueError(f"{shard} holds {wrong[0]!r}, which {path.name} does not say")
        if path.name == TORCH_INDEX:
            self.index |= {"weight_map": {name: _as_safetensors(file) for name, file in places.items()}}

    def _add_file(self, path: Path, pickled: bool) -> Iterable[str]:
        """Add the tensors of a file in a folder; returns their names."""
        if pickled:
            entries = self._add_pickled(path).entries
            if (name := _as_safetensors(path.name)) in self.shards:
                raise ValueError(f"{path}: another shard's name differs in nothing but the suffix")
            self.shards[name] = list(entries)
            return entries
        header = read_header(path)
        self._add(path, header)
        return header.entries

    def _open_torch(self) -> None:
        pickled = self._add_pickled(self.path)
        self.kind = "lightning" if pickled.lightning else "torch"
        self.step = pickled.step

    def _add_pickled(self, path: Path) -> Pickled:
        pickled = read_pickled(path)
        self.entries.update(pickled.entries)
        if pickled.spill is not None:
            weakref.finalize(self, pickled.spill.close)
        first: dict[tuple[Path, int, int], str] = {}
        for name, entry in pickled.entries.items():
            kept = first.setdefault((entry.file, entry.start, entry.stop), name)
            if kept != name and entry.stop > entry.start:
                self.ties[name] = kept
        return pickled


def _in_the_hubs_cache(path: Path) -> Path:
    """Where the Hub's model of that name was downloaded to; ``path`` itself if that is the name of no model."""
    # No part of a revision begins with a dot, nor is any empty: it does not climb.
    found = re.fullmatch(r"(?P<model>[\w.-]+/[\w.-]+)(@(?P<revision>\w[\w.-]*(/\w[\w.-]*)*))?", str(path))
    if found is None or os.path.lexists(path) or path.suffix in (".safetensors", *TORCH_SUFFIXES):
        return path
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return path
    model, revision = found["model"], found["revision"]
    folder = Path(HF_HUB_CACHE, f"models--{model.replace('/', '--')}")
    ref = folder / "refs" / (revision or "main")
    commit = revision or ""
    # Looked up here, as huggingface_hub would wait for a pipe, and follow a ref that climbs out of its cache.
    if ref.exists():
        with open(open_regular(ref), "rb") as file:
            commit = file.read(LONGEST_REF).decode(errors="replace").strip()
        if not re.fullmatch(_COMMIT, commit):
            raise ValueError(f"{ref} holds {commit!r}, which is no commit; download the model again")
    if re.fullmatch(_COMMIT, commit) and (folder / "snapshots" / commit).is_dir():
        return folder / "snapshots" / commit
    command = ["hf", "download", model, *(["--revision", revision] if revision else [])]
    raise FileNotFoundError(
        f"no such file or directory: {path}; if it is a model of the Hugging Face Hub, it has not been downloaded "
        f"yet: {shlex.join(command)}"
    )


def weight_files(folder: Path) -> set[str]:
    """Which of the files that make a folder a checkpoint are there."""
    names = (MODEL_FILE, INDEX_FILE, TORCH_FILE, TORCH_INDEX, ADAPTER_FILE, TORCH_ADAPTER, *DISTRIBUTED)
    found = {name for name in names if (folder / name).exists()}
    return found or ({DEEPSPEED_FILES} if deepspeed_folder(folder) else set())


def deepspeed_folder(folder: Path) -> Path | None:
    """Where DeepSpeed's files lie, if they make a folder a single checkpoint."""
    if any(folder.glob(DEEPSPEED_FILES)):
        return folder
    tags = {path.parent for path in folder.glob(f"*/{DEEPSPEED_FILES}")}
    return tags.pop() if len(tags) == 1 and (folder / DEEPSPEED_LATEST).exists() else None


def _as_safetensors(file: str) -> str:
    """What a torch file of a model folder is called as a safetensors file."""
    return file.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"


def step_in_name(path: Path) -> int | None:
    """The step in a name such as ``checkpoint-500``, ``epoch=3-step=1000.ckpt`` or ``weights_200.safetensors``."""
    name = path.name if path.is_dir() else path.stem
    found = re.search(r"step[=_-]?(\d+)", name) or re.search(r"(\d+)(?!.*\d)", name)
    return int(found[1]) if found else None


def in_adapter_file(name: str) -> str:
    """What PEFT calls a tensor in an adapter's file: in the model, it names the adapter and wraps what it trains."""
    return ".".join(part for part in name.split(".") if part not in ("default", "modules_to_save"))
