"""What a soup is written to: the same kind of thing as its ingredients, whole or not at all. No torch."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from averaging.atomic import replacing
from averaging.checkpoints.checkpoint import (
    ADAPTER_CONFIG,
    INDEX_FILE,
    MODEL_FILE,
    TITLES,
    TORCH_INDEX,
    Checkpoint,
    weight_files,
)
from averaging.checkpoints.files import BITS, layout, nbytes
from averaging.checkpoints.finding import RECORD_FILE, RECORD_KEY, WIDTH_KEY
from averaging.completeness import MANIFEST

# Configuration, tokenizers, chat templates, custom code: what belongs to a model besides its weights.
_COPIED = {".json", ".jinja", ".txt", ".model", ".py", ".tiktoken", ".spm", ".vocab", ".bpe"}
_NOT_COPIED = {"trainer_state.json", "averaging.json", MANIFEST, "soup.json", "all_results.json"}
_NOT_COPIED |= {"train_results.json", "eval_results.json", "training_args.json", INDEX_FILE, TORCH_INDEX}
SHARD = 5 * 10**9  # bytes of a file, where the ingredients do not say how many files there are to be
_COPIED_FOLDERS = {"additional_chat_templates"}
# Facts of a configuration that decide what the weights mean.
_ARCHITECTURE = ("model_type", "architectures", "num_attention_heads", "num_key_value_heads", "rope_theta")
_ADAPTER = ("base_model_name_or_path", "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def check_place(
    output: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]], what: str = "ingredient"
) -> None:
    """Refuse an output that would take the place of what is read, which ``what`` names.

    Raises:
        ValueError: one is the other, or lies in it.
    """
    here = Path(os.path.realpath(output))
    for path in inputs:
        there = Path(os.path.realpath(path))
        if here == there:
            which = "one of the ingredients" if what == "ingredient" else f"the {what}"
            raise ValueError(f"the output {output} is {which}; choose another place")
        if there in here.parents:
            raise ValueError(f"the output {output} lies inside the {what} {path}")
        if here in there.parents:
            raise ValueError(f"the {what} {path} lies inside the output {output}")


def check_alike(ingredients: Sequence[Checkpoint], chosen: bool = False) -> None:
    """Refuse to average what does not belong together.

    Args:
        ingredients: what is to be averaged.
        chosen: these are some of their tensors, picked by name. The models may then have different heads.

    Raises:
        ValueError: they differ in kind, architecture, base model, or in the name,
            shape or dtype of a tensor.
    """
    first = ingredients[0]
    for other in ingredients[1:]:
        if other.kind != first.kind:
            raise ValueError(f"{first.path} is a {TITLES[first.kind]}, but {other.path} is a {TITLES[other.kind]}")
        for key in _ADAPTER if first.kind == "peft" else _ARCHITECTURE:
            if chosen and key == "architectures":
                continue
            one, two = (first.config or {}).get(key), (other.config or {}).get(key)
            if one != two and first.config is not None and other.config is not None:
                raise ValueError(
                    f"{first.path} and {other.path} are different models: {key} is {one!r} in one and {two!r} in the "
                    "other; average checkpoints of one architecture and base model, or of models that differ in their "
                    "heads the tensors that --only or --skip (only=, skip=) choose"
                    + ("; or the products of LoRA adapters, --lora product" if first.kind == "peft" else "")
                )
        if first.entries.keys() != other.entries.keys():
            here, there = first.entries.keys() - other.entries.keys(), other.entries.keys() - first.entries.keys()
            only = [(first, here), (other, there)]
            told = "; ".join(f"only in {one.path}: {_some(names)}" for one, names in only if names)
            raise ValueError(
                f"{first.path} and {other.path} do not hold the same tensors: {told}; --only or --skip (only=, skip=) "
                "choose those that are combined"
            )
        for name, entry in first.entries.items():
            same = other.entries[name]
            for what, one, two in (("shape", entry.shape, same.shape), ("dtype", entry.dtype, same.dtype)):
                if one != two:
                    one, two = (list(x) if isinstance(x, tuple) else x for x in (one, two))
                    raise ValueError(f"tensor {name!r} has {what} {one} in {first.path} but {two} in {other.path}")


def _some(names: set[str]) -> str:
    shown = ", ".join(map(repr, sorted(names)[:3]))
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True, slots=True)
class File:
    """A safetensors file to be written: its tensors as name → (dtype, shape), and its metadata."""

    name: str
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        """The size of its data in bytes."""
        return sum(nbytes(*tensor) for tensor in self.tensors.values())


class Output:
    """Where and how a soup of ``ingredients`` that is like ``model`` is written.

    A Hugging Face model or a PEFT adapter becomes a folder with the same files, tensors, order and sharding, and
    the configuration, tokenizer and code beside them. Anything else becomes a ``.safetensors`` file if ``path`` has
    that suffix, else a folder with ``model.safetensors``; a large torch distributed checkpoint, shards and an index.

    Args:
        path: the folder or the file.
        model: what the result is like, and where all that is not averaged comes from.
        ingredients: what is averaged.
        dtypes: name → dtype of every tensor of the result.
        converted: the dtype asked for, if any.
        force: an existing output may be replaced.

    Raises:
        ValueError: ``path`` is an ingredient, lies in one or holds one, or is not fit for what is written.
        FileExistsError: ``path`` exists and may not be replaced.
        OSError: there is no room or no permission.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: Checkpoint,
        ingredients: Sequence[Checkpoint],
        dtypes: Mapping[str, str],
        *,
        converted: str | None = None,
        force: bool = False,
    ) -> None:
        self.path = Path(path)
        self.model = model
        self.converted = converted
        self.folder = self.path.suffix != ".safetensors"
        self.files = self._files(dtypes)
        check_place(self.path, [ingredient.path for ingredient in (*ingredients, model)])
        self._check_existing(force)
        self.check_room()

    @property
    def nbytes(self) -> int:
        """The size of the weights in bytes."""
        return sum(file.nbytes for file in self.files)

    @property
    def record_path(self) -> Path:
        """Where the provenance record lies: in the folder, or beside the file as ``NAME.soup.json``."""
        return self.path / RECORD_FILE if self.folder else self.path.with_suffix(".soup.json")

    @contextlib.contextmanager
    def writing(self, record: Mapping[str, Any]) -> Iterator[Writing]:
        """Create everything under a temporary name; it takes its place when the block ends without an exception.

        Args:
            record: the provenance, with checksums of their final length; `Writing.finish` takes the final one.
        """
        with contextlib.ExitStack() as stack:
            if self.folder:
                folder = stack.enter_context(replacing(self.path))
                folder.mkdir()
                self._copy_into(folder)
                paths = [folder / file.name for file in self.files]
                record_path = folder / RECORD_FILE
            else:
                # Entered first, so renamed last: a record without its file would mislead.
                record_path = stack.enter_context(replacing(self.record_path))
                paths = [stack.enter_context(replacing(self.path))]
            writing = Writing(self.files, paths, record_path, record)
            stack.callback(writing.close)
            try:
                yield writing
            except OSError as error:
                if error.filename is None:  # what failed knew a descriptor only
                    raise OSError(error.errno, error.strerror, str(self.path)) from error
                raise

    @contextlib.contextmanager
    def joining(self, paths: Sequence[Path], record: Mapping[str, Any]) -> Iterator[Writing]:
        """Write into what another process is `writing`, whose temporary ``paths`` and ``record`` these are."""
        writing = Writing(self.files, paths, self.record_path, record, create=False)
        try:
            yield writing
        finally:
            writing.close()

    def copied(self) -> list[Path]:
        """The files that are copied from the model."""
        if self.model.kind not in ("huggingface", "peft"):
            return []
        entries = sorted(self.model.path.iterdir())
        for entry in list(entries):
            if entry.name in _COPIED_FOLDERS and entry.is_dir():
                entries += sorted(entry.iterdir())
        return [
            entry
            for entry in entries
            if entry.suffix in _COPIED
            and entry.name not in _NOT_COPIED
            and not entry.name.startswith(".")
            and entry.is_file()
        ]

    def check_room(self, copies: int = 1) -> None:
        """Raise OSError if so many outputs like this one cannot be written here."""
        parent = next(p for p in Path(os.path.realpath(self.path)).parents if p.exists())
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(parent))
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission to write into", str(parent))
        free = shutil.disk_usage(parent).free
        needed = copies * self.nbytes
        if free < needed:
            raise OSError(errno.ENOSPC, f"not enough room: {needed:,} bytes needed, {free:,} free in", str(parent))

    def _files(self, dtypes: Mapping[str, str]) -> list[File]:
        model = self.model
        if model.kind in ("huggingface", "peft"):
            if not self.folder:
                raise ValueError(f"{self.path}: a soup of {TITLES[model.kind]}s is a folder; leave out the suffix")
            names: Mapping[str, Sequence[str]] = model.shards
        elif self.path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
            raise ValueError(f"{self.path}: soups are written as safetensors; end the name with .safetensors")
        else:
            names = {MODEL_FILE if self.folder else self.path.name: list(model.entries)}
            if model.kind == "distributed" and self.folder:
                names = _shards({name: nbytes(dtypes[name], entry.shape) for name, entry in model.entries.items()})
        files = []
        for file, tensors in names.items():
            order = list(tensors)
            if self.converted or not model.metadata:  # of torch files
                # As safetensors does: the widest first, so that every tensor is aligned.
                order.sort(key=lambda name: -BITS[dtypes[name]])
            metadata = {"format": "pt"} | next(iter(model.metadata.values()), {})
            metadata |= model.metadata.get(file, {})
            metadata.pop(WIDTH_KEY, None)  # the result's is another
            files.append(File(file, {name: (dtypes[name], model.entries[name].shape) for name in order}, metadata))
        return files

    def _check_existing(self, force: bool) -> None:
        if not os.path.lexists(self.path):
            return
        if not force:
            raise FileExistsError(f"{self.path} exists already; pass --force (force=True) to replace it")
        # A mistyped output must not cost a folder full of other things.
        if self.path.is_dir() and any(self.path.iterdir()):
            if not (self.path / RECORD_FILE).exists() and not weight_files(self.path):
                raise FileExistsError(
                    f"{self.path} is a folder but no model; remove it yourself or choose another place"
                )
        elif self.path.exists() and not self.path.is_dir() and not self.path.is_file():
            raise FileExistsError(f"{self.path} is neither a file nor a folder; choose another place")

    def _copy_into(self, folder: Path) -> None:
        for source in self.copied():
            target = folder / source.relative_to(self.model.path)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
        if self.model.index is not None or len(self.files) > 1:
            known = self.model.index or {}
            places = {name: file.name for file in self.files for name in file.tensors}
            index = (
                {"weight_map": places} | known | {"metadata": known.get("metadata", {}) | {"total_size": self.nbytes}}
            )
            write_json(folder / INDEX_FILE, index)
        if self.model.kind == "peft":  # of which LoRA's products change the rank
            write_json(folder / ADAPTER_CONFIG, self.model.config)
        if self.converted and self.model.kind == "huggingface" and self.model.config is not None:
            write_json(folder / "config.json", _with_dtype(self.model.config, self.converted))


class Writing:
    """An output being written; `sink` and `sync` may be called from any thread."""

    def __init__(
        self,
        files: Sequence[File],
        paths: Sequence[Path],
        record_path: Path,
        record: Mapping[str, Any],
        *,
        create: bool = True,
    ) -> None:
        self.paths, self._files, self._record_path = paths, files, record_path
        self._descriptors: list[int] = []
        self._places: dict[str, tuple[int, int]] = {}
        for file, path in zip(files, paths, strict=True):
            flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
            descriptor = os.open(path, flags, 0o666)
            self._descriptors.append(descriptor)
            header, starts = self._header(file, record)
            for name, start in zip(file.tensors, starts, strict=True):
                self._places[name] = (descriptor, start)
            if create:
                os.ftruncate(descriptor, len(header) + file.nbytes)

    def sink(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor to their place."""
        descriptor, start = self._places[name]
        _write(descriptor, data, start + offset)

    def sync(self, number: int) -> None:
        """Flush a finished file to the disk."""
        os.fsync(self._descriptors[number])

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write the headers, whose metadata hold the record, and the record's own file."""
        for file, descriptor in zip(self._files, self._descriptors, strict=True):
            _write(descriptor, memoryview(self._header(file, record)[0]), 0)
        write_json(self._record_path, record)

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    @staticmethod
    def _header(file: File, record: Mapping[str, Any]) -> tuple[bytes, list[int]]:
        noted = json.dumps(record, separators=(",", ":"))
        return layout(file.tensors, file.metadata | {RECORD_KEY: noted})


def _shards(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """The files of a model: one, or as many as it takes for each to hold `SHARD` bytes at most, or a single tensor."""
    shards: list[list[str]] = [[]]
    room = SHARD
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {MODEL_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, start=1)}


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def write_json(path: Path, value: Any) -> None:
    """Write a value as people read it; paths in it that are not Unicode as JSON escapes them."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A model configuration that names ``dtype`` wherever it named one."""
    return {
        key: dtype
        if key in ("dtype", "torch_dtype") and isinstance(value, str)
        else _with_dtype(value, dtype)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }
