"""Which checkpoints are whole: what a run may resume from, whatever stopped the one before.

    trainer.train(resume_from_checkpoint=averaging.latest_complete("out"))  # transformers; None begins anew
    trainer.fit(module, ckpt_path=averaging.latest_complete("checkpoints"))  # Lightning

A folder is whole when its manifest says so, which is written after all else is on the disk, and when every file is as
the manifest has it. A Lightning checkpoint is one file, which appears at once and carries its own checksums; the folder
of snapshots beside it has a manifest. No torch is needed to tell.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

from averaging.atomic import PREFIX, flush, fsync_way, replacing
from averaging.unpickling import InertUnpickler

MANIFEST = "averaging-manifest.json"
VERSION = 1

_UNSEALED = f"it has no {MANIFEST}, so nothing tells whether it was written to the end"
_TRAINER_FOLDER = re.compile(r"checkpoint-(\d+)")

Checksums = dict[tuple[int, int, int, int], int]
"""Files by device, inode, size and time of the last change → crc32."""


def begin(folder: Path) -> str:
    """Mark a checkpoint that is about to be written, or written once more, as unfinished until `seal`.

    Returns:
        What `seal` recognises this mark by.
    """
    mark = secrets.token_hex(8)
    _write(folder, {"version": VERSION, "complete": False, "mark": mark, "files": {}})
    return mark


def seal(folder: Path, mark: str | None = None, known: Checksums | None = None) -> Checksums:
    """Bring every file of a checkpoint to the disk and write the manifest that tells it from an incomplete one.

    Args:
        folder: the checkpoint, to which nothing more will be written.
        mark: what `begin` returned, if it was called.
        known: checksums that the last `seal` returned: files that checkpoints share are not read again.

    Returns:
        The checksums of the files.

    Raises:
        RuntimeError: another run has marked the folder meanwhile; it stays unfinished for both.
        OSError: it could not be done, and no manifest calls the folder complete.
    """
    if mark is not None and _mark(folder) != mark:
        begin(folder)
        raise RuntimeError(
            f"{folder}: another run has written into it at the same time, so it is marked as unfinished. Give each run "
            "a folder of its own, and a run of several processes their ranks (torchrun)"
        )
    checksums: Checksums = {}
    files: dict[str, tuple[int, int]] = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_dir() or name == Path(MANIFEST) or any(part.startswith(PREFIX) for part in name.parts):
            continue
        stat = file.stat()
        identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        checksums[identity] = (known or {}).get(identity) or _crc32(file)
        files[name.as_posix()] = (stat.st_size, checksums[identity])
    flush(folder)
    fsync_way(folder)
    _write(folder, {"version": VERSION, "complete": True, "mark": mark, "files": files})
    return checksums


def _write(folder: Path, manifest: dict[str, Any]) -> None:
    with replacing(folder / MANIFEST) as file:
        file.write_text(json.dumps(manifest, indent=1) + "\n")


def _mark(folder: Path) -> Any:
    try:
        return json.loads((folder / MANIFEST).read_text())["mark"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def flaw(checkpoint: str | os.PathLike[str]) -> str | None:
    """Why a checkpoint is not whole, in a few words; None if it is.

    Args:
        checkpoint: what was written with a callback of this library: a folder, or a Lightning ``.ckpt`` file.
    """
    checkpoint = Path(checkpoint)
    try:
        if checkpoint.is_dir():
            return _flaw_of_folder(checkpoint)
        return _flaw_of_file(checkpoint)
    except FileNotFoundError as error:
        return f"{Path(error.filename or checkpoint).name} is missing"
    except OSError as error:
        return f"it cannot be read ({error})"


def latest_complete(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in ``folder`` from which a run can resume: model, optimizer and averages are whole.

    A warning says which newer ones were passed over, and why. Newer is what has done more optimizer steps: times and
    clocks do not matter. Every file of the checkpoint is read once, and compared with its checksum.

    Args:
        folder: the ``output_dir`` of transformers' Trainer, or the folder of Lightning's ``.ckpt`` files.

    Returns:
        Its path; None if there is none, or no folder.
    """
    checkpoint, skipped = search(Path(folder))
    say_skipped(folder, checkpoint, skipped)
    return checkpoint


def require_whole(checkpoint: Path) -> None:
    """Refuse to resume from what is known to be incomplete.

    One without a manifest, which an older version or another program wrote, gives a warning.

    Raises:
        ValueError: it is incomplete; the message says what is wrong, and names the newest one that is whole.
    """
    if (problem := flaw(checkpoint)) is None:
        return
    if problem.endswith(_UNSEALED):
        warnings.warn(f"{checkpoint}: {problem}. Resuming from it nevertheless", stacklevel=3)
        return
    found, _ = search(checkpoint.parent)
    remedy = f"resume from {found}, the newest that is whole" if found else "no checkpoint beside it is whole"
    raise ValueError(f"{checkpoint}: {problem}, so training cannot resume exactly: {remedy}")


def say_skipped(folder: str | os.PathLike[str], checkpoint: Path | None, skipped: list[str]) -> None:
    """Warn of what `search` has passed over."""
    if skipped:
        found = f"the newest whole checkpoint is {checkpoint.name}" if checkpoint else "no checkpoint is whole"
        warnings.warn(f"{folder}: {found}; passed over: {'; '.join(skipped)}", stacklevel=3)


def search(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with the newer ones."""
    skipped: list[str] = []
    for checkpoint in _newest_first(folder):
        if (problem := flaw(checkpoint) or _lacks_optimizer(checkpoint)) is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name}: {problem}")
    return None, skipped


def _newest_first(folder: Path) -> list[Path]:
    checkpoints: list[tuple[float, str, Path]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _TRAINER_FOLDER.fullmatch(path.name):
            checkpoints.append((int(match[1]), path.name, path))
        elif path.suffix == ".ckpt":
            try:
                step = content_of(path).get("global_step")
            except (OSError, ValueError):
                step = None
            # What cannot be read comes first, so that it is spoken of.
            checkpoints.append((step if isinstance(step, int) else float("inf"), path.name, path))
    return [path for _, _, path in sorted(checkpoints, reverse=True)]


def _lacks_optimizer(checkpoint: Path) -> str | None:
    if checkpoint.is_dir() and checkpoint.suffix != ".ckpt":
        names = {path.name for path in checkpoint.iterdir()}
        there = "trainer_state.json" in names and any(name.startswith(("optimizer", "global_step")) for name in names)
    else:
        there = "lr_schedulers" in content_of(checkpoint)
    return None if there else "it holds no optimizer's state to resume from"


def _flaw_of_folder(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, complete = int(manifest["version"]), bool(manifest["complete"])
        files = {name: (int(size), int(checksum)) for name, (size, checksum) in manifest["files"].items()}
    except FileNotFoundError:
        return _UNSEALED
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} is damaged ({error!r})"
    if version > VERSION:
        return (
            f"its {MANIFEST} was written by a later version of averaging (format {version}, this one reads up to "
            f"{VERSION}): upgrade averaging"
        )
    if not complete:
        return "it was not written to the end"
    for name, (size, checksum) in files.items():
        if (actual := (folder / name).stat().st_size) != size:
            return f"{name} has {actual} bytes instead of {size}"
        if _crc32(folder / name) != checksum:
            return f"{name} is not as it was written"
    return None


def _flaw_of_file(file: Path) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                return f"its part {damaged} is damaged"
        content = content_of(file)
        averages = content["averaging"]["averages"].values() if "averaging" in content else ()
        folders = {Path(entry["state"]["folder"]).parts[0] for entry in averages if "folder" in entry.get("state", {})}
        folders |= {Path(content["averaging"]["folder"]).name} if "folder" in content.get("averaging", {}) else set()
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        return f"it is cut off, damaged or no Lightning checkpoint ({error})"
    for folder in folders:
        if (problem := flaw(Path(os.path.realpath(file)).parent / folder)) is not None:
            return f"{folder}: {problem}"
    return None


class _Stub:
    """Stands for anything of a pickle that is not plain data."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> _Stub:
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


class _PlainData(InertUnpickler):
    knows: ClassVar[dict[str, Any]] = {"collections.OrderedDict": OrderedDict}

    def unknown(self, name: str) -> Any:
        return _Stub


def content_of(file: Path) -> dict[str, Any]:
    """What a Lightning checkpoint, a file or what several processes have written, holds besides tensors and objects.

    Raises:
        ValueError: the file is damaged, or no such checkpoint.
        OSError: it cannot be read.
    """
    if file.is_dir():
        names = ("meta.pt", *(f"checkpoint/{prefix}mp_rank_00_model_states.pt" for prefix in ("", "zero_pp_rank_0_")))
        file = next((file / name for name in names if (file / name).exists()), file / names[0])
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as data:
                content = _PlainData(data).load()
    except OSError:
        raise
    except Exception as error:  # pickle raises about everything for damaged data
        raise ValueError(f"{file}: damaged, or no checkpoint of Lightning ({error!r})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: no checkpoint of Lightning")
    return content


def _crc32(file: Path) -> int:
    checksum, buffer = 0, bytearray(1 << 20)
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            checksum = zlib.crc32(memoryview(buffer)[:count], checksum)
    return checksum
