"""Run a function on several processes under torchrun, and bring back what it returned on each.

first, second = on_ranks(2, "ddp_runs:with_lightning", tmp_path)
"""

from __future__ import annotations

import fcntl
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed


def on_ranks(count: int, target: str, folder: Path) -> list[Any]:
    """What ``module:function`` returns for ``folder`` on rank 0, 1 and so on: tensors, and what holds them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (
        (folder / "output.txt").open("w") as output,
        subprocess.Popen(
            [*command, __file__, target, str(folder)], stdout=output, stderr=output, env=environment
        ) as torchrun,
    ):
        try:
            torchrun.wait(timeout=240)
        finally:
            torchrun.terminate()  # and it the ranks, should they wait for each other
    results = [folder / f"rank-{rank}.pt" for rank in range(count)]
    # Judged by what the ranks wrote: gloo sometimes aborts at exit.
    assert all(result.exists() for result in results), (folder / "output.txt").read_text()[-9000:]
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


def main(target: str, folder: str) -> None:
    module, function = target.split(":")
    result = getattr(importlib.import_module(module), function)(Path(folder))
    torch.save(result, Path(folder) / f"rank-{os.environ['RANK']}.pt")
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
