"""How far each average is from the same formula in float64, after many absorptions in half and single precision.

    python scripts/bench/exactness.py [--steps 10000]

The weights are a seeded random walk around a slow drift, cast to the dtype before anything sees them, so that only
the averaging can err. Two loss spikes multiply them by 100 for one step each, after a fifth and two fifths of the run;
in the last columns one step's weights are all infinite, after three fifths. Printed is the largest error of any entry
relative to the root mean square of the reference: of the average kept (float32 or better), so rounding it to the
weights' dtype is not counted. "recovers" says whether the average is right again at the end of the run.

Beside the averagers stand what is written by hand and what peers do: an average in the weights' own dtype, a running
sum for the window, PyTorch's AveragedModel.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from averaging import BEMA, EMA, LAWA, SWA, SWAD, Averager, PostHocEMA

SIZE = 2048
K, EVERY = 20, 10


class Contender(Protocol):
    """Takes weights step by step, and has an average."""

    def update(self, weights: Tensor, step: int) -> object: ...
    def average(self) -> Tensor: ...


class Library:
    """An averager of the library."""

    def __init__(self, averager: Averager) -> None:
        self.averager = averager

    def update(self, weights: Tensor, step: int) -> None:
        self.averager.update({"w": weights}, step)
        if isinstance(self.averager, SWAD) and step % 50 == 0:
            self.averager.observe({"val_loss": 1.0}, step)  # a valley as long as the run

    def average(self) -> Tensor:
        return self.averager.average()["w"]


class Recursion:
    """``a ← a + weight(t) (θ − a)`` in some dtype, written out; in float64 it is the reference."""

    def __init__(self, weight: Callable[[int], float], dtype: torch.dtype) -> None:
        self.weight, self.dtype, self.t = weight, dtype, 0
        self.value = torch.zeros(SIZE, dtype=dtype)

    def update(self, weights: Tensor, step: int) -> None:
        self.t += 1
        theta = weights.to(self.dtype)
        self.value = theta.clone() if self.t == 1 else self.value + self.weight(self.t) * (theta - self.value)

    def average(self) -> Tensor:
        return self.value


class Window:
    """The mean of the latest K snapshots: of a list, or as a running sum."""

    def __init__(self, dtype: torch.dtype, running: bool) -> None:
        self.dtype, self.running = dtype, running
        self.snapshots: deque[Tensor] = deque(maxlen=K)
        self.sum = torch.zeros(SIZE, dtype=dtype)

    def update(self, weights: Tensor, step: int) -> None:
        if step % EVERY:
            return
        if len(self.snapshots) == K:
            self.sum = self.sum - self.snapshots[0]
        self.snapshots.append(weights.to(self.dtype))
        self.sum = self.sum + self.snapshots[-1]

    def average(self) -> Tensor:
        return (self.sum if self.running else torch.stack(tuple(self.snapshots)).sum(0)) / len(self.snapshots)


class LagCorrected(Recursion):
    """BEMA in float64: the EMA and α (θ − θ₀) on top."""

    def __init__(self) -> None:
        super().__init__(lambda t: 0.0, torch.float64)

    def update(self, weights: Tensor, step: int) -> None:
        self.latest = weights.double()
        if not self.t:
            self.start = self.latest
            super().update(weights, step)
        elif step % EVERY == 0:
            self.weight = lambda t: (10.0 + step) ** -0.5
            self.step = step
            super().update(weights, step)

    def average(self) -> Tensor:
        return self.value + (10.0 + self.step) ** -0.2 * (self.latest - self.start)


class Peer:
    """PyTorch's AveragedModel."""

    def __init__(self, dtype: torch.dtype, **options: object) -> None:
        self.model = nn.ParameterList([torch.zeros(SIZE, dtype=dtype)])
        self.averaged = AveragedModel(self.model, **options)  # type: ignore[arg-type]

    def update(self, weights: Tensor, step: int) -> None:
        self.model[0].data = weights
        self.averaged.update_parameters(self.model)

    def average(self) -> Tensor:
        return next(self.averaged.parameters()).detach()


def walk(steps: int, dtype: torch.dtype, spikes: bool, infinite: bool) -> Iterator[Tensor]:
    """The weights after each step."""
    generator = torch.Generator().manual_seed(0)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(SIZE, generator=generator, dtype=torch.float64)

    theta, drift = noise(0.02), noise(0.01)
    for step in range(1, steps + 1):
        theta = theta + drift / steps + noise(2e-5)
        weights = (theta + noise(2e-4)).to(dtype)
        if spikes and step in (steps // 5, 2 * steps // 5):
            weights = weights * 100
        if infinite and step == 3 * steps // 5:
            weights = torch.full_like(weights, math.inf)
        yield weights


def rows(dtype: torch.dtype, steps: int, folder: str) -> dict[str, tuple[Contender, Contender]]:
    """Contender and reference by title."""
    f64 = torch.float64
    slow = 0.9999
    references = {
        "lawa": lambda: Window(f64, running=False),
        "ema": lambda: Recursion(lambda t: 1 - 0.999, f64),
        "slow": lambda: Recursion(lambda t: 1 - slow, f64),
        "swa": lambda: Recursion(lambda t: 1 / t, f64),
        "post-hoc": lambda: Recursion(lambda t: 1 - (1 - 1 / t) ** (6.937914371 + 1), f64),
    }
    library = {
        f"LAWA(k={K})": (LAWA(K, every=EVERY), references["lawa"]()),
        "EMA(0.999)": (EMA(0.999), references["ema"]()),
        "EMA(0.9999)": (EMA(slow), references["slow"]()),
        "EMA(0.9999, compensated=True)": (EMA(slow, compensated=True), references["slow"]()),
        "SWA": (SWA(start=0, every=1), references["swa"]()),
        "SWAD": (SWAD(), references["swa"]()),
        "BEMA": (BEMA(every=EVERY), LagCorrected()),
        "PostHocEMA, width 0.10": (PostHocEMA(folder, [0.10], every=1, snapshots=steps), references["post-hoc"]()),
    }
    found: dict[str, tuple[Contender, Contender]] = {k: (Library(a.prepare(steps)), r) for k, (a, r) in library.items()}
    found |= {
        f"window of {K}, running sum in float32": (Window(torch.float32, running=True), references["lawa"]()),
        "EMA 0.9999 in the weights' dtype": (Recursion(lambda t: 1 - slow, dtype), references["slow"]()),
        "torch AveragedModel, EMA 0.9999": (Peer(dtype, multi_avg_fn=get_ema_multi_avg_fn(slow)), references["slow"]()),
        "torch AveragedModel, SWA": (Peer(dtype), references["swa"]()),
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    steps = parser.parse_args().steps
    warnings.filterwarnings("ignore", message=".*give compensated=True")  # what it does without is a row here
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    cells: dict[str, list[str]] = {}
    with torch.no_grad(), tqdm(total=9 * steps, desc="exactness", unit="step") as bar:
        for spikes, infinite in ((False, False), (True, False), (False, True)):
            for dtype in dtypes:
                with tempfile.TemporaryDirectory() as folder:
                    contenders = rows(dtype, steps, folder)
                    for step, weights in enumerate(walk(steps, dtype, spikes, infinite), start=1):
                        for contender, reference in contenders.values():
                            contender.update(weights, step)
                            reference.update(weights, step)
                        bar.update()
                    for name, (contender, reference) in contenders.items():
                        exact = reference.average()
                        error = (contender.average().double() - exact).abs().max() / exact.square().mean().sqrt()
                        cell = ("yes" if error < 1e-5 else "no") if infinite else f"{error.item():.0e}"
                        cells.setdefault(name, []).append(cell)
    titles = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    header = [*titles, *(f"{t}, 2 spikes" for t in titles), *(f"{t}, recovers from Inf" for t in titles)]
    print(f"\n{steps} steps\n\n| | {' | '.join(header)} |\n|---|{'---:|' * len(header)}")
    for name, values in cells.items():
        print(f"| {name} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()
