"""Write a file or a folder so that it appears whole or not at all.

    with replacing("out/model.safetensors") as temporary:
        save_file(weights, temporary)

Whatever stops the program, ``out/model.safetensors`` is afterwards either the old file or the complete new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import fcntl
except ImportError:  # Windows: nothing is swept there, everything else holds
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX, SUFFIX = ".averaging-", ".tmp"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path at which to create a file or a folder; on success it becomes ``path`` as a whole.

    The temporary path has ``path``'s own name and lies in a hidden folder beside it, on the same file system.
    On success every file is flushed to the disk, given the mode that the umask asks for (libraries that write
    through temporary files leave 0600), and renamed onto ``path``: a file replaces a file, a folder changes places
    with a folder in one step where the system can (Linux), in two renames elsewhere. On any exception, Ctrl-C
    included, the temporary is removed and what was at ``path`` is untouched. What a killed process left behind
    is removed by the next call for the same parent folder. A symbolic link at ``path`` is followed, missing parent
    folders are created.

    Raises:
        FileNotFoundError: nothing was created at the temporary path.
        OSError: no space, no permission and the like; ``path`` is as before.
    """
    target = Path(os.path.realpath(path))
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        with staging_folder(target.parent) as staging:
            temporary = staging / target.name
            yield temporary
            _allow(temporary, staging.stat().st_mode & 0o666)
            flush(temporary)
            _move(temporary, target, aside=staging / "old" / target.name)
            for folder in (target.parent, *(parent.parent for parent in made)):
                fsync(folder)
    except BaseException:
        sweep(target.parent)  # an interrupt may have fallen into the removal of the temporary itself
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def sweep(folder: Path) -> None:
    """Remove the temporaries that killed processes left in ``folder``; those of living ones are locked and stay."""
    if fcntl is None:
        return
    for staging in folder.glob(f"{PREFIX}*{SUFFIX}"):
        with contextlib.suppress(OSError), locked(staging):
            for old in (staging / "old").glob("*"):  # killed between the two renames of `_move`
                if not os.path.lexists(folder / old.name):
                    old.rename(folder / old.name)
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """A fresh hidden folder in ``parent``, locked for as long as this process lives, removed at the end."""
    while True:
        staging = parent / f"{PREFIX}{secrets.token_hex(4)}{SUFFIX}"
        staging.mkdir()
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, staging, ignore_errors=True)
            try:
                stack.enter_context(locked(staging))
            except (BlockingIOError, FileNotFoundError):
                continue  # another process's sweep came between the two lines: it is gone, take another name
            except OSError:
                pass  # a file system without locks; there a sweep cannot lock either, so it leaves this alone
            yield staging
            return


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the exclusive lock of ``folder``, which the system lets go when the process ends, however it ends.

    Raises:
        BlockingIOError: another process holds it.
        FileNotFoundError: the folder was removed meanwhile.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder)
        yield
    finally:
        os.close(descriptor)


def _allow(path: Path, mode: int) -> None:
    """Give every file under ``path`` at least ``mode``."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if not (file.is_symlink() or file.is_dir()):
            file.chmod(file.stat().st_mode & 0o777 | mode)


def flush(path: Path) -> None:
    """Bring a file, or every file and folder under ``path``, to the disk, leaves first."""
    if path.is_dir():
        for entry in path.iterdir():
            if not entry.is_symlink():
                flush(entry)
    fsync(path)


def fsync(path: Path) -> None:
    """Bring to the disk what one file holds, or which names one folder holds."""
    if path.is_dir() and sys.platform == "win32":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if sys.platform != "win32" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_way(path: Path) -> None:
    """Bring to the disk the names of all folders on the way to ``path``: whoever made them may not have done it."""
    for folder in Path(os.path.realpath(path)).parents:
        with contextlib.suppress(PermissionError):  # to read it; so it was not made by this run
            fsync(folder)


def _move(new: Path, target: Path, aside: Path) -> None:
    """Put ``new`` at ``target``; what was there ends below the staging folder and is removed with it."""
    if not target.is_dir() and not (new.is_dir() and target.exists()):
        os.replace(new, target)
    elif not _exchange(new, target):
        aside.parent.mkdir()
        target.rename(aside)
        try:
            new.rename(target)
        except BaseException:
            aside.rename(target)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one atomic step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    if renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))
