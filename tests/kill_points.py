"""Kill a training run before each operation that changes its files, and resume it.

    python scripts/kill_points.py --every 10

One process imports a trainer once and forks all runs, of one or of two ranks. `file_operations.c` lets a run wait
before each system call that changes files below the checkpoints' folder, and logs it: what lies there at that moment is
what a kill of all ranks leaves. Of several ranks it also kills a single one, before its n-th such call; the other goes
on until it notices. From what is left, and from what a loss of power leaves of it, a run resumes and trains to the end.
(What was written and not synced since is gone then, names that were made and whose folder was not synced since are not
there, and what was removed is gone for good.) It must end with the bits of a run that nothing stopped; and, since
starting anew would give the same bits, the checkpoint it used must not be older than the newest one whose saving had
ended. Where points leave the same files, one run answers for all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

SAVE_EVERY = 2
KILLED, STEPS = 6, 7  # the steps of the run that is killed, and of those that are compared

PATIENCE = 10
"""Seconds in which a rank ends when another was killed; then it is killed, too."""

Announce = Callable[[int], None]
Run = Callable[[Path, bool, Announce], tuple[int, str]]
"""Of a folder that need not exist, whether the run is the first (else it resumes from what is there), and whom to tell
of the steps whose saving has ended: the step it began with, and a digest of its end."""


def start(*arguments: str) -> dict[str, Any]:
    """The counts that this file, run as a program, prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    counts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return counts


def summary(trainer: str, rotation: bool, counts: dict[str, Any]) -> list[str]:
    lines = []
    for who, seen in counts["killed"].items():
        if not seen["points"]:
            continue
        used = {
            state: ", ".join(f"{count} from {step}" for step, count in sorted(steps.items()))
            for state, steps in seen["used"].items()
        }
        lines.append(
            f"{trainer}{', older checkpoints deleted' if rotation else ''}: {who} killed at {seen['points']} of "
            f"{seen['operations']} file operations, {seen['problems']} wrong; checkpoints resumed from: "
            f"{used['killed']}; with unsynced data lost: {used['without power']}"
        )
    return lines


def free_port() -> int:
    """A port to listen on soon: none of those that the system gives to connections."""
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", 10_000 + secrets.randbelow(20_000)))
            return int(free.getsockname()[1])


def compiled(folder: Path) -> Any:
    library, source = folder / "file_operations.so", Path(__file__).with_name("file_operations.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


# ---------------------------------------------------------------------- the runs


def digest(*weights: Any) -> str:
    result = hashlib.sha256()
    for one in weights:
        for name, tensor in sorted(one.items()):
            part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            result.update(name.encode() + part.detach().contiguous().numpy().tobytes())
    return result.hexdigest()


def newest_whole(folder: Path) -> Path | None:
    from averaging import latest_complete

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return latest_complete(folder)


def step_of(checkpoint: Path | None) -> int:
    from averaging.completeness import content_of

    if checkpoint is None:
        return 0
    if checkpoint.suffix == ".ckpt":
        return int(content_of(checkpoint)["global_step"])
    return int(checkpoint.name.rpartition("-")[2])


def announcing_seals(module: Any, announce: Announce) -> None:
    """Let ``announce`` hear of each checkpoint that ``module`` has sealed."""
    seal = module.seal

    def announcing(sealed: Path, *args: Any, **kwargs: Any) -> Any:
        known = seal(sealed, *args, **kwargs)
        announce(step_of(sealed))
        return known

    module.seal = announcing


def transformers_run(rotation: bool) -> Run:
    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401  which accelerate would import in every fork
    from test_transformers import Recorder, trainer

    import averaging.transformers
    from averaging import EMA, LAWA
    from averaging.transformers import AveragingCallback

    def run(folder: Path, first: bool, announce: Announce) -> tuple[int, str]:
        announcing_seals(averaging.transformers, announce)
        checkpoint, steps = None if first else newest_whole(folder), KILLED if first else STEPS
        callback, recorder = AveragingCallback(LAWA(k=3, every=1), EMA(0.8)), Recorder()
        limit = {"save_total_limit": 1} if rotation else {}
        options: dict[str, Any] = {"steps": steps, "save_steps": SAVE_EVERY, "eval_strategy": "no", **limit}
        if "RANK" in os.environ:
            options["ddp_backend"] = "gloo"
        trainer(folder, [callback, recorder], **options).train(resume_from_checkpoint=checkpoint)
        averages = [averager.average() for averager in callback.averagers]
        return step_of(checkpoint), digest(recorder.weights[steps], *averages)

    return run


def lightning_run(rotation: bool, strategy: str = "auto") -> Run:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy
    from test_lightning import Regression, batch, fit
    from torch.distributed.fsdp import FSDPModule, fully_shard

    import averaging.lightning
    from averaging import EMA, LAWA
    from averaging.lightning import AveragingCallback, _CheckpointIO

    class OfRanks(Regression):
        def configure_model(self) -> None:
            if strategy == "fsdp2" and not isinstance(self.net, FSDPModule):
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, _: Any, batch_idx: int) -> Any:
            return self.loss(*batch(1000 * self.current_epoch + 2 * batch_idx + self.global_rank))

    def run(folder: Path, first: bool, announce: Announce) -> tuple[int, str]:
        save = _CheckpointIO.save_checkpoint

        def announcing(self: Any, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            save(self, checkpoint, *args, **kwargs)
            announce(checkpoint["global_step"])

        if strategy == "fsdp2":
            announcing_seals(averaging.lightning, announce)
        else:
            _CheckpointIO.save_checkpoint = announcing
        checkpoint, steps = None if first else newest_whole(folder), KILLED if first else STEPS
        callback = AveragingCallback(LAWA(k=3, every=1), EMA(0.8))
        kept = {"save_top_k": 1, "save_last": True} if rotation else {"save_top_k": -1}
        saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=SAVE_EVERY, **kept)
        options: dict[str, Any] = {"ckpt_path": checkpoint, "epochs": -1, "max_steps": steps}
        if strategy != "auto":
            sharding = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            options |= {"strategy": sharding if strategy == "fsdp2" else strategy, "devices": 2, "module": OfRanks()}
        began = step_of(checkpoint)
        _, _, recorder = fit(folder, callback, saving, **options)
        return began, digest(recorder.online[steps], *(averager.average() for averager in callback.averagers))

    return run


def loop_run(rotation: bool) -> Run:
    """A loop of one's own under FSDP2, with torch's distributed checkpoints; the averages lie in another folder."""
    import torch
    import torch._dynamo  # which takes long, and every fork would do
    from torch import distributed, nn
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    from averaging import EMA, LAWA, named_weights
    from averaging.atomic import fsync_way

    class Trained:
        def __init__(self) -> None:
            torch.manual_seed(0)
            self.model = fully_shard(nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1)))
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
            self.averagers = [LAWA(k=3, every=1), EMA(0.8)]
            self.step = 0

        def state(self) -> dict[str, Any]:
            model, optimizer = get_state_dict(self.model, self.optimizer)
            return {"model": model, "optimizer": optimizer}

    def save(run: Trained, folder: Path, announce: Announce) -> None:
        checkpoint, averages = folder / f"checkpoint-{run.step}", folder / "averages" / str(run.step)
        dcp.save(run.state(), checkpoint_id=checkpoint)
        for averager in run.averagers:
            averager.save(averages / averager.name)
        rank = distributed.get_rank()
        if rank == 0:  # torch brings its files to the disk, but not their names
            fsync_way(checkpoint / "any of them")
        distributed.barrier()
        announce(run.step)
        if rotation and rank == 0:
            for old in (folder, folder / "averages"):
                for path in old.iterdir():
                    if path.name.rpartition("-")[2] not in ("averages", str(run.step)):
                        shutil.rmtree(path)

    def restored(folder: Path) -> Trained:
        """The newest that can be read; whatever cannot must say so by itself."""
        for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
            run, step = Trained(), step_of(checkpoint)
            try:
                for averager in run.averagers:
                    averager.load(folder / "averages" / str(step) / averager.name, run.model)
            except (FileNotFoundError, ValueError):
                continue
            state = run.state()
            try:
                dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
            except Exception:
                continue
            set_state_dict(
                run.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
            run.step = step
            return run
        return Trained()

    def run(folder: Path, first: bool, announce: Announce) -> tuple[int, str]:
        warnings.simplefilter("ignore")
        distributed.init_process_group("gloo")
        trained = Trained() if first else restored(folder)
        began = trained.step
        for step in range(began + 1, (KILLED if first else STEPS) + 1):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(2 * step + distributed.get_rank()))
            (trained.model(x) - x.sum(1, keepdim=True).sin()).square().mean().backward()
            trained.optimizer.step()
            trained.optimizer.zero_grad()
            trained.step = step
            for averager in trained.averagers:
                averager.update(trained.model, step)
            if step % SAVE_EVERY == 0:
                save(trained, folder, announce)
        averages = [averager.average() for averager in trained.averagers]
        return began, digest(named_weights(trained.model), *averages)

    return run


def sharded_transformers_run(rotation: bool) -> Run:
    """A run that cannot be resumed, as Trainer saves no optimizer of it; what it has left is looked through."""
    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401  as above
    import torch
    from safetensors.torch import load_file
    from test_transformers import tiny_model, trainer
    from torch import distributed
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    import averaging.transformers
    from averaging import EMA, LAWA
    from averaging.completeness import flaw
    from averaging.transformers import AveragingCallback

    def averagers() -> list[Any]:
        return [LAWA(k=3, every=1), EMA(0.8)]

    def reference(folder: Path) -> Path:
        """Outside of what is watched."""
        return folder.parents[2] / "reference"

    def averages(checkpoint: Path) -> dict[str, str]:
        """All that is averaged in a checkpoint: its state, and the model that opens."""
        found = {}
        for averager in averagers():
            averager.load(checkpoint / averager.name)
            file = load_file(checkpoint / averager.name / "model.safetensors")
            found[averager.name] = digest(averager.average(), file)
        return found

    def look(folder: Path) -> tuple[int, str]:
        newest = 0
        for checkpoint in folder.glob("checkpoint-*"):
            expected = averages(reference(folder) / checkpoint.name)
            whole = flaw(checkpoint) is None
            try:
                right = averages(checkpoint) == expected
            except (FileNotFoundError, ValueError) as error:
                if whole:
                    return newest, f"{checkpoint.name} counts as whole: {error}"
            else:
                if not right:
                    return newest, f"{checkpoint.name} holds other averages"
            if whole:
                newest = max(newest, step_of(checkpoint))
        return newest, "right"

    def run(folder: Path, first: bool, announce: Announce) -> tuple[int, str]:
        if not first:
            return look(folder)
        announcing_seals(averaging.transformers, announce)
        distributed.init_process_group("gloo")
        place = reference(folder).with_name("model")
        if distributed.get_rank() == 0:
            tiny_model().save_pretrained(place)
        distributed.barrier()
        config = DistributedConfig(fsdp_size=2)
        model = LlamaForCausalLM.from_pretrained(place, distributed_config=config, dtype=torch.float32)
        options = {"steps": KILLED, "save_steps": SAVE_EVERY, "eval_strategy": "no", "save_only_model": True}
        limit = {"save_total_limit": 1} if rotation else {}
        trainer(folder, [AveragingCallback(*averagers())], model, **options, **limit).train()
        return 0, "trained"

    return run


class Scenario(NamedTuple):
    """Runs that are killed."""

    build: Callable[[bool], Run]
    """Given whether older checkpoints are deleted."""

    ranks: int = 1
    resuming: int = 1
    """The ranks of the run that resumes; one of them, where two ran, looks at what they have left."""


RUNS = {
    "transformers": Scenario(transformers_run),
    "lightning": Scenario(lightning_run),
    "transformers-ddp": Scenario(transformers_run, ranks=2, resuming=2),
    "lightning-ddp": Scenario(partial(lightning_run, strategy="ddp"), ranks=2, resuming=2),
    "lightning-fsdp2": Scenario(partial(lightning_run, strategy="fsdp2"), ranks=2, resuming=2),
    "loop-fsdp2": Scenario(loop_run, ranks=2, resuming=2),
    "transformers-fsdp2": Scenario(sharded_transformers_run, ranks=2),
}


# ---------------------------------------------------------------------- what lies in a folder

State = tuple[tuple[str, "str | bytes | None"], ...]
"""All below a folder: relative paths, with bytes for a file, the target of a link, or None for a folder; in each folder
in the order in which they were changed."""

_KNOWN: dict[bytes, bytes] = {}


def read(folder: Path) -> State:
    def below(path: Path, name: str) -> Iterator[tuple[str, str | bytes | None]]:
        if path.is_symlink():
            yield name, os.readlink(path)
        elif path.is_dir():
            yield name, None
            for child in in_order(path):
                yield from below(child, f"{name}/{child.name}")
        else:
            yield name, known(path.read_bytes())

    def in_order(path: Path) -> list[Path]:
        return sorted(path.iterdir(), key=lambda child: (child.lstat().st_mtime_ns, child.name))

    return tuple(entry for path in in_order(folder) for entry in below(path, path.name))


def names(state: State) -> list[str]:
    """Those of the files, but for the random ones that safetensors gives for a moment."""
    return sorted(name for name, _ in state if "/.tmp" not in name)


def known(content: bytes) -> bytes:
    """``content``, once in memory."""
    return _KNOWN.setdefault(content, content)


def write(state: State, folder: Path) -> None:
    for name, content in state:
        path = folder / name
        if content is None:
            path.mkdir()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.symlink_to(content)
    for order, (name, _) in enumerate(state):
        os.utime(folder / name, (order, order), follow_symlinks=False)


# ---------------------------------------------------------------------- a loss of power


@dataclass(eq=False)
class Node:
    """A file or a folder: what is in memory, and what is on the disk."""

    is_folder: bool = False
    content: Path | None = None
    unsynced: bool = False
    names: dict[str, Node] = field(default_factory=dict)
    durable: dict[str, Node] = field(default_factory=dict)


def without_power(folder: Path, operations: list[list[str]], zeros: bool) -> State:
    """What is left of ``folder``, which was empty before ``operations`` were done in it, when the power fails."""
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
        if kind in ("create", "folder") and at is not None:
            if name not in at.names:  # else another rank was quicker
                at.names[name] = Node(is_folder=kind == "folder")
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

    def left(found: Node, name: str) -> Iterator[tuple[str, str | bytes | None]]:
        if found.is_folder:
            yield name, None
            for inner_name, inner in sorted(found.durable.items()):
                yield from left(inner, f"{name}/{inner_name}")
        elif found.content is None:
            return
        elif found.content.is_symlink():
            yield name, os.readlink(found.content)
        elif found.content.exists():
            size = found.content.stat().st_size
            lost = bytes(size if zeros else size // 2)
            yield name, known(lost if found.unsynced else found.content.read_bytes())

    locate(root, folder)
    return tuple(entry for name, found in sorted(root.durable.items()) for entry in left(found, name))


# ---------------------------------------------------------------------- all points


class Ended(NamedTuple):
    """How a rank of a run ended: its result, None where it was killed or failed; the wait status; what it said."""

    result: tuple[int, str] | None
    status: int
    output: str

    @property
    def killed(self) -> bool:
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL


class Point(NamedTuple):
    """A moment, and what a kill or a loss of power leaves then."""

    number: int
    saved: int
    """The newest step whose saving had ended."""
    left: dict[str, State]


class Harness:
    """Runs of a scenario in a folder."""

    def __init__(self, scenario: Scenario, rotation: bool, base: Path) -> None:
        self.scenario, self.run = scenario, scenario.build(rotation)
        self.library = compiled(base)
        self.base = Path(os.path.realpath(base))
        self.folder, self.log, self.announced = (self.base / name for name in ("out", "operations", "announced"))
        self.asked, self.ask = os.pipe()
        self.go, self.gone = os.pipe()
        self.pids: list[int] = []
        self.late = 0
        self.results: dict[State, tuple[int, str]] = {}
        if scenario.resuming < scenario.ranks:
            self.begin()
            self.fork(scenario.ranks, first=True, run=scenario.build(False))
            (self.folder / "runs" / "new").rename(self.base / "reference")
        self.expected = self.resumed(())[1]

    def begin(self) -> None:
        for path in (self.folder, Path(f"{self.folder}.removed")):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        for path in (self.log, self.announced):
            path.write_text("")

    # ------------------------------------------------------------------ processes

    def fork(
        self,
        ranks: int,
        first: bool,
        *,
        run: Run | None = None,
        fatal: dict[int, int] | None = None,
        pause: Callable[[], None] | None = None,
    ) -> list[Ended]:
        """Let ``ranks`` processes run; each ends in time.

        Args:
            fatal: rank → the number of the file operation before which it is killed. If it is given, the operations
                are logged.
            pause: called before each operation.
        """
        port = free_port()
        self.pids = []
        for rank in range(ranks):
            if (pid := os.fork()) == 0:
                self.be(rank, ranks, port, first, run or self.run, fatal, pause is not None)
            self.pids.append(pid)
        statuses: dict[int, int] = {}
        began, deadline = time.monotonic(), None
        while len(statuses) < ranks:
            if select.select([self.asked], [], [], 0.002)[0]:
                os.read(self.asked, 1)
                if pause is not None:
                    pause()
                os.write(self.gone, b"!")
            for rank, pid in enumerate(self.pids):
                if rank not in statuses and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    statuses[rank] = ended[1]
                    deadline = deadline or time.monotonic() + PATIENCE
            if len(statuses) < ranks and time.monotonic() > min(deadline or began + 120, began + 120):
                self.late += 1
                for rank in {*range(ranks)} - {*statuses}:
                    os.kill(self.pids[rank], signal.SIGKILL)
                deadline = began + 120
        return [self.ended(rank, statuses[rank]) for rank in range(ranks)]

    def be(
        self, rank: int, ranks: int, port: int, first: bool, run: Run, fatal: dict[int, int] | None, pausing: bool
    ) -> None:
        """Be a rank, and end."""
        status = 1
        try:
            output = os.open(self.base / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            (self.base / f"result-{rank}").unlink(missing_ok=True)
            if ranks > 1:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "NODE_RANK": "0",
                    "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
            if fatal is not None:
                # The same names in each run, so that they leave the same files.
                number = count()
                secrets.token_hex = lambda size=4: f"{rank}{next(number):0{2 * size - 1}x}"
                pipes = (self.ask, self.go) if pausing else (-1, -1)
                paths = os.fsencode(self.folder), ctypes.c_long(fatal.get(rank, 0)), os.fsencode(self.log)
                error = self.library.arm(*paths, *pipes)
                assert error == 0, os.strerror(error)

            def announce(step: int) -> None:
                with open(self.announced, "a") as file:
                    file.write(f"{step}\n")

            result = run(self.folder / "runs" / "new", first, announce)
            (self.base / f"result-{rank}").write_text(json.dumps(result))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def ended(self, rank: int, status: int) -> Ended:
        output = (self.base / f"output-{rank}").read_text(errors="replace")[-3000:]
        result = None
        if status == 0:
            step, text = json.loads((self.base / f"result-{rank}").read_text())
            result = (step, text)
        return Ended(result, status, output)

    # ------------------------------------------------------------------ points

    def points(self, every: int, every_of_one: int, offset: int) -> Iterator[tuple[str, int, int, Iterable[Point]]]:
        """Who is killed, how many operations there are, how many points of them come, and these."""
        all_at_once: list[Point] = []
        number = count(1)

        def pause() -> None:
            if (n := next(number)) > offset and (n - offset - 1) % every == 0:
                all_at_once.append(self.point(n))

        self.begin()
        for ended in self.fork(self.scenario.ranks, first=True, fatal={}, pause=pause):
            assert ended.status == 0, ended.output
        pids = [number.partition("-")[0] for *_, number in self.operations()]
        counts = [pids.count(str(pid)) for pid in self.pids]
        if self.scenario.ranks == 1:
            middle = all_at_once[len(all_at_once) // 2]
            [really] = self.kills(0, [middle.number])
            assert names(really.left["killed"]) == names(middle.left["killed"])
            yield "the run", len(pids), len(all_at_once), all_at_once
            return
        yield "all ranks", len(pids), len(all_at_once), all_at_once
        for rank, operations in enumerate(counts):
            numbers = range(1 + offset, operations + 1, every_of_one)
            yield f"rank {rank} alone", operations, len(numbers), self.kills(rank, numbers)

    def kills(self, rank: int, numbers: Iterable[int]) -> Iterator[Point]:
        for number in numbers:
            self.begin()
            ended = self.fork(self.scenario.ranks, first=True, fatal={rank: number})[rank]
            if ended.killed:
                yield self.point(number)
            else:  # which of two ranks makes a folder depends on which is first, so the last points need not be there
                assert ended.status == 0, ended.output

    def operations(self) -> list[list[str]]:
        return [line.split("\t") for line in self.log.read_text().splitlines()]

    def point(self, number: int) -> Point:
        lost = without_power(self.folder, self.operations(), zeros=number % 2 == 0)
        saved = max(map(int, self.announced.read_text().split()), default=0)
        return Point(number, saved, {"killed": read(self.folder), "without power": lost})

    def resumed(self, state: State) -> tuple[int, str]:
        """The step from which a run resumes where ``state`` is left, and what came of it."""
        if state not in self.results:
            self.begin()
            write(state, self.folder)
            ended = self.fork(self.scenario.resuming, first=False)
            results = [one.result or (-1, f"failed: {one.output}") for one in ended]
            self.results[state] = results[0][0], " ".join(text for _, text in results)
        return self.results[state]

    def problem(self, point: Point, state: str) -> str | None:
        step, text = self.resumed(point.left[state])
        if step < point.saved and step != -1:
            return f"resumed from {step}, though the saving of {point.saved} had ended"
        return None if text == self.expected else text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trainer", choices=RUNS)
    parser.add_argument("--rotation", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--every-of-one", type=int, default=1)
    parser.add_argument("--offset", type=int, default=0)
    options = parser.parse_args()
    counts: dict[str, Any] = {"killed": {}, "problems": []}
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(RUNS[options.trainer], options.rotation, Path(folder))
        for who, operations, number, points in harness.points(options.every, options.every_of_one, options.offset):
            used: dict[str, Counter[int]] = {"killed": Counter(), "without power": Counter()}
            seen = wrong = 0
            for point in tqdm(points, f"{options.trainer}, {who}", number, leave=False, disable=None):
                seen += 1
                for state in used:
                    used[state][harness.resumed(point.left[state])[0]] += 1
                    if (problem := harness.problem(point, state)) is not None:
                        wrong += 1
                        counts["problems"].append({"who": who, "point": point.number, "state": state, "is": problem})
            counts["killed"][who] = {"operations": operations, "points": seen, "problems": wrong, "used": used}
        counts |= {"resumed": len(harness.results), "late": harness.late}
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
