"""Run functions on several processes under torchrun, and bring back what they returned on each.

first, second = on_ranks(2, "ddp_runs:with_lightning", tmp_path)

As importing the trainers takes longer than most of these functions, torchrun starts processes that import them once and
then fork for each function.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import importlib
import os
import subprocess
import sys
import tempfile
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
from kill_points import free_port
from torch import distributed

PATIENCE = 240
"""Seconds that a function may take."""


def on_ranks(count: int, target: str, folder: Path) -> list[Any]:
    """What ``module:function`` returns for ``folder`` on rank 0, 1 and so on: tensors, and what holds them."""
    ranks = _started(count)
    port = free_port()
    for rank in ranks:
        rank.send((target, str(folder), port))
    for rank in ranks:
        if not rank.poll(PATIENCE):  # they wait for each other
            _started.cache_clear()
            break
        rank.recv()
    results = [folder / f"rank-{rank}.pt" for rank in range(count)]
    # Judged by what the ranks wrote: gloo sometimes aborts at exit.
    outputs = [folder / f"output-{rank}.txt" for rank in range(count)]
    assert all(result.exists() for result in results), "".join(path.read_text()[-9000:] for path in outputs)
    return [torch.load(result) for result in results]


def once_on_ranks(count: int, target: str, base: Path) -> tuple[Path, list[Any]]:
    """The folder and the results of `on_ranks`, run by the first worker of pytest-xdist that asks.

    Args:
        base: pytest's folder for temporary files; that of a worker lies in the one of all.
    """
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{target.replace(':', '-')}-{count}"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = [folder / f"rank-{rank}.pt" for rank in range(count)]
        if folder.exists():
            return folder, [torch.load(result) for result in results]
        folder.mkdir()
        return folder, on_ranks(count, target, folder)


@functools.cache
def _started(count: int) -> list[Connection]:
    """To each of so many ranks that torchrun has started, in their order."""
    folder = tempfile.TemporaryDirectory()
    address = f"{folder.name}/socket"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with Listener(address, backlog=count) as listener, open(f"{folder.name}/output.txt", "w") as output:
        torchrun = subprocess.Popen([*command, __file__, address], stdout=output, stderr=output, env=environment)
        listener._listener._socket.settimeout(PATIENCE)  # type: ignore[attr-defined]
        ranks = {}
        for _ in range(count):
            connection = listener.accept()
            ranks[connection.recv()] = connection

    @atexit.register
    def stop() -> None:
        torchrun.terminate()
        torchrun.wait()
        folder.cleanup()

    return [ranks[rank] for rank in range(count)]


def serve(address: str) -> None:
    """Be a rank that forks for each function it is told."""
    with contextlib.suppress(ImportError):
        import lightning.pytorch  # noqa: F401
    with contextlib.suppress(ImportError):
        from transformers import Trainer  # noqa: F401
    with Client(address) as connection:
        connection.send(int(os.environ["RANK"]))
        while True:
            try:
                target, folder, port = connection.recv()
            except EOFError:
                return
            if (pid := os.fork()) == 0:
                connection.close()
                be(target, Path(folder), port)
            connection.send(os.waitpid(pid, 0))


def be(target: str, folder: Path, port: int) -> None:
    """Call the function, write its result, and end as any process does."""
    rank = os.environ["RANK"]
    output = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # which is one for all functions
    os.environ["MASTER_PORT"] = str(port)
    module, function = target.split(":")
    torch.save(getattr(importlib.import_module(module), function)(folder), folder / f"rank-{rank}.pt")
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
    sys.exit()


if __name__ == "__main__":
    serve(sys.argv[1])
