"""Kill a training run before each operation that changes its files, and resume it.

    python scripts/kill_points.py --every 10

One process imports a trainer once and forks a child for each point. `file_operations.c` kills the child before the
n-th system call that changes files below the checkpoints' folder, and logs those before it. Two further children
resume from `averaging.latest_complete` and train to the end: one with the files as they are, one with the files as a
loss of power leaves them: what was written and not synced since is gone, names that were made and whose folder was not
synced since are not there, and what was removed is gone for good. Both must end with the bits of a run that nothing
stopped; and, since starting anew would give the same bits, the checkpoint they used must not be older than the newest
one whose saving had ended.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

SAVE_EVERY = 2
KILLED, STEPS = 6, 8  # the steps of the run that is killed, and of those that are compared

Announce = Callable[[int], None]
Run = Callable[[Path, int, "Path | None", Announce], str]


def start(*arguments: str) -> dict[str, Any]:
    """The counts that this file, run as a program, prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    counts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return counts


def summary(trainer: str, rotation: bool, counts: dict[str, Any]) -> str:
    def text(state: str) -> str:
        return ", ".join(f"{count} from {step}" for step, count in counts["used"][state].items())

    return (
        f"{trainer}{', older checkpoints deleted' if rotation else ''}: killed at {counts['points']} of "
        f"{counts['operations']} file operations, {len(counts['problems'])} wrong; checkpoints resumed from: "
        f"{text('killed')}; with unsynced data lost: {text('without power')}"
    )


def compiled(folder: Path) -> Any:
    library, source = folder / "file_operations.so", Path(__file__).with_name("file_operations.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


# ---------------------------------------------------------------------- the runs


def digest(*weights: Any) -> str:
    result = hashlib.sha256()
    for one in weights:
        for name, tensor in sorted(one.items()):
            whole = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # the only shard
            result.update(name.encode() + whole.detach().contiguous().numpy().tobytes())
    return result.hexdigest()


def transformers_run(rotation: bool) -> Run:
    from test_transformers import Recorder, trainer

    import averaging.transformers
    from averaging import EMA, LAWA
    from averaging.transformers import AveragingCallback

    seal = averaging.transformers.seal

    def run(folder: Path, steps: int, resume: Path | None, announce: Announce) -> str:
        def announcing(sealed: Path, *args: Any) -> Any:
            known = seal(sealed, *args)
            announce(int(sealed.name.rpartition("-")[2]))
            return known

        averaging.transformers.seal = announcing
        callback, recorder = AveragingCallback(LAWA(k=3, every=1), EMA(0.8)), Recorder()
        limit = {"save_total_limit": 1} if rotation else {}
        options = {"steps": steps, "save_steps": SAVE_EVERY, "eval_strategy": "no", **limit}
        trainer(folder, [callback, recorder], **options).train(resume_from_checkpoint=resume)
        return digest(recorder.weights[steps], *(averager.average() for averager in callback.averagers))

    return run


def lightning_run(rotation: bool, sharded: bool = False) -> Run:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy
    from test_lightning import Regression, fit
    from torch.distributed.fsdp import FSDPModule, fully_shard

    import averaging.lightning
    from averaging import EMA, LAWA
    from averaging.lightning import AveragingCallback, _CheckpointIO

    save, seal = _CheckpointIO.save_checkpoint, averaging.lightning.seal

    class Sharded(Regression):
        """Under FSDP2, by one process: forks cannot meet others."""

        def configure_model(self) -> None:
            if not isinstance(self.net, FSDPModule):
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def run(folder: Path, steps: int, resume: Path | None, announce: Announce) -> str:
        def announcing(self: Any, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            save(self, checkpoint, *args, **kwargs)
            announce(checkpoint["global_step"])

        if sharded:

            def announcing_seal(sealed: Path, *args: Any) -> Any:
                known = seal(sealed, *args)
                announce(step_of(sealed))
                return known

            averaging.lightning.seal = announcing_seal
        else:
            _CheckpointIO.save_checkpoint = announcing
        callback = AveragingCallback(LAWA(k=3, every=1), EMA(0.8))
        kept = {"save_top_k": 1, "save_last": True} if rotation else {"save_top_k": -1}
        saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=SAVE_EVERY, **kept)
        options: dict[str, Any] = {"ckpt_path": resume, "epochs": -1, "max_steps": steps}
        if sharded:
            options["strategy"] = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
            options |= {"devices": 1, "module": Sharded()}
        _, _, recorder = fit(folder, callback, saving, **options)
        return digest(recorder.online[steps], *(averager.average() for averager in callback.averagers))

    return run


RUNS = {
    "transformers": transformers_run,
    "lightning": lightning_run,
    "lightning-fsdp2": partial(lightning_run, sharded=True),
}


# ---------------------------------------------------------------------- children


def child(work: Callable[[], str], log: Path) -> str | None:
    """What ``work`` returned in a process of its own; None if that was killed.

    Raises:
        RuntimeError: it failed.
    """
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        status = 1
        try:
            errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(errors, 1)
            os.dup2(errors, 2)
            os.write(writer, work().encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as answer:
        result = answer.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if status:
        raise RuntimeError(f"status {status}: {log.read_text()[-3000:]}")
    return result


# ---------------------------------------------------------------------- a loss of power


@dataclass(eq=False)
class Node:
    """A file or a folder: what is in memory, and what is on the disk."""

    is_folder: bool = False
    content: Path | None = None
    unsynced: bool = False
    names: dict[str, Node] = field(default_factory=dict)
    durable: dict[str, Node] = field(default_factory=dict)


def scan(path: Path) -> Node:
    """Everything below ``path``, on the disk."""
    if not path.is_dir() or path.is_symlink():
        return Node(content=path)
    names = {child.name: scan(child) for child in path.iterdir()}
    return Node(is_folder=True, names=names, durable=dict(names))


def without_power(folder: Path, operations: list[list[str]], zeros: bool) -> None:
    """Make of the empty ``folder``, in which ``operations`` were done, what is left of it when the power fails."""
    root = Node(is_folder=True)
    folders: list[Node] = [root]

    def node(path: str) -> Node | None:
        found: Node | None = root
        for part in Path(path).relative_to(folder).parts:
            found = found.names.get(part) if found else None
        return found

    def place(path: str) -> tuple[Node | None, str]:
        """The folder, None if it is outside, and the name in it."""
        inside = path and Path(path) != folder
        return (node(os.path.dirname(path)) if inside else None), os.path.basename(path)

    for kind, one, two, number in operations:
        if kind in ("write", "fsync"):
            found = node(one)
            if found is None:
                continue  # written to after it was removed
            if kind == "write":
                found.unsynced = True
            elif kind == "fsync":
                found.unsynced = False
                if found.is_folder:
                    for other in folders:
                        moved = {name: n for name, n in other.durable.items() if n not in other.names.values()}
                        for name, n in moved.items():
                            if n in found.names.values():
                                del other.durable[name]
                    found.durable = dict(found.names)
            continue
        at, name = place(one)
        if kind == "create" and at is not None:
            at.names[name] = Node()
        elif kind == "folder" and at is not None:
            at.names[name] = Node(is_folder=True)
            folders.append(at.names[name])
        elif kind == "remove" and at is not None:
            at.names.pop(name, None)
            at.durable.pop(name, None)
        elif kind == "link":
            to, new = place(two)
            assert to is not None
            to.names[new] = at.names[name] if at is not None else Node()
        elif kind == "rename":
            to, new = place(two)
            moving = at.names.pop(name) if at is not None else Node()
            if to is not None:
                if new in to.names:
                    to.names[new].content = Path(f"{folder}.removed") / number
                to.names[new] = moving
        elif kind == "exchange":
            to, new = place(two)
            assert at is not None
            assert to is not None
            at.names[name], to.names[new] = to.names[new], at.names[name]

    def locate(found: Node, path: Path) -> None:
        if found.is_folder:
            for name, inner in found.names.items():
                locate(inner, path / name)
        else:
            found.content = path

    def write(found: Node, path: Path) -> None:
        if found.is_folder:
            path.mkdir()
            for name, inner in found.durable.items():
                write(inner, path / name)
        elif found.content is not None and found.content.exists():
            size = found.content.stat().st_size
            if not found.unsynced:
                shutil.copy(found.content, path)
            else:
                path.write_bytes(bytes(size if zeros else size // 2))

    locate(root, folder)
    left = folder.with_name("left")
    write(root, left)
    shutil.rmtree(folder)
    left.rename(folder)


# ---------------------------------------------------------------------- all points


def points(trainer: str, rotation: bool, every: int, offset: int) -> Iterator[dict[str, Any]]:
    """The number of operations, then for each point and state of the disk the checkpoint used, and what went wrong."""
    from averaging import latest_complete

    run = RUNS[trainer](rotation)
    with tempfile.TemporaryDirectory() as temporary:
        library = compiled(Path(temporary))
        base = Path(os.path.realpath(temporary))
        folder, operations, errors, announced = (base / name for name in ("out", "operations", "errors", "announced"))

        def training(resume: bool, fatal: int | None) -> str:
            used = "nothing"
            checkpoint = None
            if fatal is not None:
                error = library.arm(os.fsencode(folder), ctypes.c_long(fatal), os.fsencode(operations))
                assert error == 0, os.strerror(error)
            elif resume:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    checkpoint = latest_complete(folder)
                used = "nothing" if checkpoint is None else str(step_of(checkpoint))

            def announce(step: int) -> None:
                with open(announced, "a") as file:
                    file.write(f"{step}\n")

            return f"{used} {run(folder, STEPS if fatal is None else KILLED, checkpoint, announce)}"

        def fresh() -> None:
            for path in (folder, Path(f"{folder}.removed")):
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
            for path in (operations, announced):
                path.write_text("")

        fresh()
        straight = str(child(lambda: training(False, None), errors))
        fresh()
        child(lambda: training(False, 0), errors)
        total = len(operations.read_text().splitlines())
        yield {"total": total}
        for fatal in range(1 + offset, total + 1, every):
            fresh()
            if child(lambda fatal=fatal: training(False, fatal), errors) is not None:
                raise RuntimeError(f"the run has fewer than {fatal} operations this time")
            done = [line.split("\t") for line in operations.read_text().splitlines()]
            newest = max(map(int, announced.read_text().split()), default=0)
            as_it_is = base / "as-it-is"
            shutil.copytree(folder, as_it_is, symlinks=True)
            for state in ("without power", "killed"):
                if state == "without power":
                    without_power(folder, done, zeros=fatal % 2 == 0)
                else:
                    shutil.rmtree(folder)
                    as_it_is.rename(folder)
                try:
                    used, result = str(child(lambda: training(True, None), errors)).split()
                    problem = None if result == straight.split()[1] else "other bits"
                    if newest > (0 if used == "nothing" else int(used)):
                        problem = f"resumed from {used}, though the saving of {newest} had ended"
                except RuntimeError as error:
                    used, problem = "failed", str(error)
                yield {"point": fatal, "state": state, "used": used, "problem": problem}


def step_of(checkpoint: Path) -> int:
    from averaging.completeness import _content

    if checkpoint.suffix == ".ckpt":
        return int(_content(checkpoint)["global_step"])
    return int(checkpoint.name.rpartition("-")[2])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trainer", choices=RUNS)
    parser.add_argument("--rotation", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--offset", type=int, default=0)
    options = parser.parse_args()
    results = points(options.trainer, options.rotation, options.every, options.offset)
    total = next(results)["total"]
    seen = list(results)
    used = {
        state: dict(sorted(Counter(one["used"] for one in seen if one["state"] == state).items()))
        for state in ("killed", "without power")
    }
    problems = [one for one in seen if one["problem"]]
    print(json.dumps({"operations": total, "points": len(seen) // 2, "used": used, "problems": problems}))


if __name__ == "__main__":
    main()
