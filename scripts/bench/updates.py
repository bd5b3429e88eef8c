"""Time and memory of averaging while training, as ratios to the physical limit taken in the same run.

    pip install -e '.[bench]'
    python scripts/bench/updates.py [--repeats 21] [--threads 2]

Every row is the median over repeats in which the contenders of a table take turns, so that a noisy machine
disturbs them alike. "kept" is the memory that a contender holds between updates, "transient" the most that one call
holds besides what it keeps, both counted at PyTorch's CPU allocator, in multiples of the model's weights. Peers that
are not installed are left out:

    torch       AveragedModel(multi_avg_fn=get_ema_multi_avg_fn(...))
    Lightning   EMAWeightAveraging's AveragedModel (avg_fn, use_buffers=True)
    timm        ModelEmaV3 (foreach; only its own file is loaded, so `pip install --no-deps timm` does)
    ema-pytorch (use_foreach=True; KarrasEMA is what its PostHocEMA runs per width), torch-ema, diffusers EMAModel
    trl         BEMACallback

mergekit belongs to the same extra but averages files only: scripts/bench has it beside `soup`.

The bf16 limit is a torch.compile'd kernel that reads the weights and updates the average in one pass, called for
each tensor; it needs a C++ compiler. Without one, the limit is casting and interpolating blocks of 1 MiB.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads must not take a core from the next

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from averaging import BEMA, EMA, LAWA, SWA, SWAD, Averager, PostHocEMA, applied

DECAY = 0.999
Call = Callable[[], object]


class Stack(nn.Module):
    """As many weights of one shape as wanted, each in a module of its own, as in a real model."""

    def __init__(self, count: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        rows, columns = shape
        self.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False, dtype=dtype) for _ in range(count))

    def tensors(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.parameters()]


# ---------------------------------------------------------------------- measuring


def times(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Median seconds of each call; the calls take turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def memory(call: Call) -> tuple[int, int]:
    """The bytes that ``call`` leaves allocated, and the most it holds at any moment besides them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    held = peak = 0
    for event in sorted(
        (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    ):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return held, peak - max(held, 0)


class Built:
    """A contender, and what it took to build it."""

    def __init__(self, build: Callable[[], Call]) -> None:
        built: list[Call] = []

        def build_and_start() -> None:
            built.append(build())
            built[0]()

        self.kept, _ = memory(build_and_start)
        self.call = built[0]

    def __call__(self) -> object:
        return self.call()


def table(title: str, limit: str, calls: dict[str, Call], size: int, repeats: int) -> None:
    """Print the calls' times as ratios to that of ``limit``, and their memory over ``size`` bytes."""
    medians = times(calls, repeats)
    print(f"\n### {title}\n\n| | times the limit | ms | kept | transient |\n|---|---:|---:|---:|---:|")
    for name, seconds in medians.items():
        call = calls[name]
        kept = f"{call.kept / size:.2f}" if isinstance(call, Built) else ""
        transient = memory(call)[1] / size
        ratio = seconds / medians[limit]
        print(f"| {name} | {ratio:.2f} | {seconds * 1e3:.2f} | {kept} | {transient:.2f} |", flush=True)


# ---------------------------------------------------------------------- the contenders


def averager(averager: Averager, model: nn.Module) -> Built:
    """One of the library's, absorbing at every call."""

    def build() -> Call:
        averager.update(model)
        return lambda: averager.update(model)

    return Built(build)


def torch_ema_model(model: nn.Module) -> Call:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return lambda: averaged.update_parameters(model)


def lightning(model: nn.Module) -> Call:
    importlib.import_module("lightning")
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

    averaged = AveragedModel(model, use_buffers=True, avg_fn=get_ema_avg_fn(DECAY))
    return lambda: averaged.update_parameters(model)


def timm(model: nn.Module) -> Call:
    # Its file by itself: timm as a whole needs a torchvision that fits torch.
    package = importlib.util.find_spec("timm")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'timm'")
    file = Path(package.origin).parent / "utils" / "model_ema.py"
    spec = importlib.util.spec_from_file_location("model_ema", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ema = module.ModelEmaV3(model, decay=DECAY)
    return lambda: ema.update(model)


def ema_pytorch(model: nn.Module) -> Call:
    ema = importlib.import_module("ema_pytorch").EMA(
        model, beta=DECAY, update_after_step=-1, update_every=1, use_foreach=True, include_online_model=False
    )
    ema.online_model = [model]
    return lambda: ema.update()


def torch_ema(model: nn.Module) -> Call:
    ema = importlib.import_module("torch_ema").ExponentialMovingAverage(model.parameters(), decay=DECAY)
    return lambda: ema.update()


def diffusers(model: nn.Module) -> Call:
    ema = importlib.import_module("diffusers.training_utils").EMAModel(model.parameters(), decay=DECAY)
    return lambda: ema.step(model.parameters())


PEERS: dict[str, Callable[[nn.Module], Call]] = {
    "torch AveragedModel (multi_avg_fn)": torch_ema_model,
    "Lightning EMAWeightAveraging": lightning,
    "timm ModelEmaV3": timm,
    "ema-pytorch (foreach)": ema_pytorch,
    "torch-ema": torch_ema,
    "diffusers EMAModel": diffusers,
}


def swa_torch(model: nn.Module) -> Call:
    from torch.optim.swa_utils import AveragedModel

    averaged = AveragedModel(model)
    return lambda: averaged.update_parameters(model)


def swa_lightning(model: nn.Module) -> Call:
    from copy import deepcopy

    from lightning.pytorch.callbacks import StochasticWeightAveraging

    callback = StochasticWeightAveraging(swa_lrs=1e-3)
    averaged, count = deepcopy(model), torch.tensor(0)
    return lambda: callback.update_parameters(averaged, model, count, callback._avg_fn)  # type: ignore[arg-type]


def karras(model: nn.Module) -> Call:
    tracked = importlib.import_module("ema_pytorch.post_hoc_ema").KarrasEMA
    tracks = [tracked(model, sigma_rel=width, update_every=1) for width in (0.05, 0.10)]

    def update() -> None:
        for track in tracks:
            track.update()

    return update


def bema_trl(model: nn.Module) -> Call:
    from copy import deepcopy

    callback = importlib.import_module("trl").BEMACallback(update_freq=1)
    # What its on_train_begin does for a model that transformers knows.
    callback.running_model = deepcopy(model)
    callback.thetat_params = [*model.parameters()]
    callback.theta0_params = [p.detach().clone() for p in model.parameters()]
    callback.ema_params = [p.clone() for p in callback.theta0_params]
    steps = count(1)

    @torch.no_grad()
    def update() -> None:
        callback._update_bema_weights(next(steps))

    return update


def installed(model: nn.Module, peers: dict[str, Callable[[nn.Module], Call]]) -> dict[str, Call]:
    """Those of ``peers`` that are installed and run on ``model``."""
    found: dict[str, Call] = {}
    for name, build in peers.items():
        try:
            call = Built(partial(build, model))
        except Exception as error:  # an optional package may fail to import in any way
            print(f"({name} left out: {type(error).__name__}: {str(error).strip().splitlines()[0][:90]})")
        else:
            found[name] = call
    return found


# ---------------------------------------------------------------------- the tables


def float32_update(title: str, model: Stack, repeats: int) -> None:
    weights = model.tensors()
    update = averager(ema := EMA(DECAY), model)
    # On the averager's own tensors: where in memory a tensor lies is worth some per cent.
    average = list(ema.average().values())
    calls: dict[str, Call] = {
        "limit: torch._foreach_lerp_": lambda: torch._foreach_lerp_(average, weights, 1 - DECAY),
        "averaging.EMA": update,
        **installed(model, PEERS),
    }
    table(title, "limit: torch._foreach_lerp_", calls, sum(w.nbytes for w in weights), repeats)


def one_pass(averages: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[str, Call]:
    """The best that can be done for half-precision weights and a float32 average."""
    compiled = torch.compile(lambda average, weight: average.lerp_(weight.float(), 1 - DECAY), dynamic=False)

    def each() -> None:
        for average, weight in zip(averages, weights, strict=True):
            compiled(average, weight)

    try:
        each()
        return "limit: torch.compile, one pass", each
    except Exception as error:  # whatever torch.compile raises without a compiler
        print(f"(no compiled kernel: {type(error).__name__}; the limit is blocks of 1 MiB)")
    block = 256 * 1024
    scratch = torch.empty(block)

    def blocks() -> None:
        for average, weight in zip(averages, weights, strict=True):
            for a, w in zip(average.view(-1).split(block), weight.view(-1).split(block), strict=True):
                a.lerp_(scratch[: w.numel()].copy_(w), 1 - DECAY)

    return "limit: blocks of 1 MiB", blocks


def half_update(title: str, model: Stack, repeats: int) -> None:
    weights = model.tensors()
    update = averager(ema := EMA(DECAY), model)
    average = list(ema.average().values())

    def loop() -> None:  # what a peer does at best: timm's loop, with its average in float32
        for a, w in zip(average, weights, strict=True):
            a.lerp_(w.to(torch.float32), 1 - DECAY)

    def foreach() -> None:
        torch._foreach_mul_(average, DECAY)
        torch._foreach_add_(average, weights, alpha=1 - DECAY)

    def cast_all() -> None:
        torch._foreach_lerp_(average, [w.float() for w in weights], 1 - DECAY)

    name, limit = one_pass(average, weights)
    calls: dict[str, Call] = {
        name: limit,
        "averaging.EMA": update,
        "cast and lerp, tensor by tensor (timm's loop)": loop,
        "foreach mul, add (timm's foreach)": foreach,
        "cast all, then foreach lerp": cast_all,
    }
    table(title, name, calls, sum(w.nbytes for w in weights), repeats)


def others(title: str, model: Stack, repeats: int) -> None:
    weights = model.tensors()
    average = [w.clone() for w in weights]
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Call] = {
            "one torch._foreach_lerp_": lambda: torch._foreach_lerp_(average, weights, 1 - DECAY),
            "averaging.EMA(compensated=True)": averager(EMA(DECAY, compensated=True), model),
            "averaging.SWA": averager(SWA(start=0, every=1), model),
            **installed(
                model, {"torch AveragedModel (SWA)": swa_torch, "Lightning StochasticWeightAveraging": swa_lightning}
            ),
            "averaging.SWAD": averager(SWAD(), model),
            "averaging.PostHocEMA, 2 widths": averager(PostHocEMA(folder, snapshots=10**9, every=1), model),
            **installed(model, {"ema-pytorch KarrasEMA, 2 widths": karras}),
            "averaging.BEMA": averager(BEMA(every=1), model),
            **installed(model, {"trl BEMACallback": bema_trl}),
        }
        table(title, "one torch._foreach_lerp_", calls, sum(w.nbytes for w in weights), repeats)


def absorption(title: str, model: Stack, repeats: int) -> None:
    weights = model.tensors()
    size = sum(w.nbytes for w in weights)

    def full(where: str) -> Call:
        ring = LAWA(k=5, every=1, memory=where)
        for _ in range(5):
            ring.update(model)
        return lambda: ring.update(model)

    snapshot = [torch.empty_like(w) for w in weights]
    total = [torch.zeros_like(w) for w in weights]
    history = [[w.clone() for w in weights] for _ in range(5)]

    def copy() -> None:
        for s, w in zip(snapshot, weights, strict=True):
            s.copy_(w)

    def naive() -> None:  # a list of clones, summed again at each absorption
        history.append([w.clone() for w in weights])
        history.pop(0)
        for s, *values in zip(total, *history, strict=True):
            s.copy_(sum(values[1:], values[0]) / len(values))

    calls: dict[str, Call] = {
        "limit: one copy": copy,
        **{f'averaging.LAWA(k=5, memory="{where}")': Built(partial(full, where)) for where in ("cpu", "device")},
        "clone, and average the list of 5": naive,
    }
    table(title, "limit: one copy", calls, size, repeats)


def reading(title: str, model: Stack, repeats: int) -> None:
    ring = LAWA(k=5, every=1)
    for _ in range(5):
        ring.update(model)
    snapshots = [[*snapshot.values()] for snapshot in ring.tensors().values()]

    def read() -> None:
        for snapshot in snapshots:
            for tensor in snapshot:
                tensor.sum()

    def average() -> object:
        ring._cache.clear()  # as an absorption does
        return ring.average()

    def stacked() -> object:
        return [torch.stack(tensors).mean(0) for tensors in zip(*snapshots, strict=True)]

    calls: dict[str, Call] = {
        "limit: 5 reads": read,
        "averaging.LAWA(k=5).average() (float64 sums)": average,
        "torch.stack(...).mean(0) (float32 sums)": stacked,
    }
    table(title, "limit: 5 reads", calls, sum(w.nbytes for w in model.tensors()), repeats)


def swap(title: str, model: Stack, repeats: int) -> None:
    weights = model.tensors()
    ema = EMA(DECAY)
    ema.update(model)
    average = list(ema.average().values())
    backup = [torch.empty_like(w) for w in weights]

    def copies() -> None:
        for b, w, a in zip(backup, weights, average, strict=True):
            b.copy_(w)
            w.copy_(a)
        for b, w in zip(backup, weights, strict=True):
            w.copy_(b)

    def fresh() -> None:
        kept = [w.clone() for w in weights]
        for w, a in zip(weights, average, strict=True):
            w.copy_(a)
        for b, w in zip(kept, weights, strict=True):
            w.copy_(b)

    def ours_() -> None:
        with applied(model, ema):
            pass

    calls: dict[str, Call] = {
        "limit: 3 copies": copies,
        "3 copies, the backup freshly allocated": fresh,
        "averaging.applied(model, EMA)": ours_,
    }
    try:
        other = importlib.import_module("torch_ema").ExponentialMovingAverage(model.parameters(), decay=DECAY)

        def peer() -> None:
            with other.average_parameters():
                pass

        peer()
        calls["torch-ema average_parameters()"] = peer
    except ImportError:
        pass
    table(title, "limit: 3 copies", calls, sum(w.nbytes for w in weights), repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21, help="repeats of which the median is taken")
    parser.add_argument("--threads", type=int, default=2, help="threads that PyTorch uses")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, median of {args.repeats} interleaved repeats")

    big = Stack(148, (576, 576))  # 49.1 M parameters
    float32_update("float32 EMA update, 49.1 M parameters in 148 tensors", big, args.repeats)
    half_update(
        "bf16 weights into a float32 EMA, 49.1 M parameters in 148 tensors",
        Stack(148, (576, 576), torch.bfloat16),
        args.repeats,
    )
    float32_update("float32 EMA update, 768 tensors of 8 by 768", Stack(768, (8, 768)), 5 * args.repeats)
    others("the other averages, one absorption, 49.1 M float32 parameters in 148 tensors", big, args.repeats)
    absorption("LAWA absorption, 49.1 M float32 parameters in 148 tensors", big, args.repeats)
    reading("LAWA read, k=5, 49.1 M float32 parameters in 148 tensors", big, args.repeats)
    swap("evaluation swap, 49.1 M float32 parameters in 148 tensors", big, args.repeats)


if __name__ == "__main__":
    main()
