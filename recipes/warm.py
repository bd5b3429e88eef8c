"""WARM: the mean of reward models in weight space, beside each of them and the ensemble of what they predict.

    python recipes/warm.py

Reward models learn which of two pieces of source is the real one and which has bytes changed, where a quarter of the
labels are wrong. They start from one model of the next byte in Python's standard library, whose new head was trained
alone first, and differ in learning rate and random numbers. Their mean needs the memory and time of one model, the
ensemble those of all. Tested on other files of the library, on prose (its manual) with another kind of error, and on
the wrong labels: agreeing with those is memorising. Ramé et al. 2024, arXiv:2401.12187. Two minutes on two cores.
"""

import sysconfig
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, pad

from averaging.soups import uniform
from common import report, text

LENGTH, PAIRS, TESTS, BATCH, WRONG, ERRORS = 32, 4096, 2048, 32, 0.25, 2
RATES = (1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3)


class Reader(nn.Module):
    """What four bytes say about the next one, and whether that makes a piece of source a good one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.body = nn.Sequential(nn.Conv1d(32, 192, 4), nn.ReLU(), nn.Conv1d(192, 96, 1), nn.ReLU())
        self.next_byte = nn.Linear(96, 256)
        self.score = nn.Linear(96, 1)

    def features(self, rows: Tensor) -> Tensor:
        return self.body(pad(self.embedding(rows).mT, (3, 0))).mT

    def forward(self, rows: Tensor) -> Tensor:
        return self.score(self.features(rows).mean(1)).squeeze(1)


def pieces(rows: Tensor, count: int) -> Tensor:
    """So many pieces of LENGTH bytes, at least half of them small letters."""
    rows = rows.reshape(-1, LENGTH)
    rows = rows[(rows >= ord("a")).sum(1) > LENGTH // 2]
    return rows[torch.randperm(len(rows))[:count]]


def swapped(rows: Tensor) -> Tensor:
    """The rows, in each of which neighbours have changed places at some places."""
    for _ in range(ERRORS):
        places = (rows[:, :-1] != rows[:, 1:]).float().multinomial(1)
        first, second = rows.gather(1, places), rows.gather(1, places + 1)
        rows = rows.scatter(1, places, second).scatter(1, places + 1, first)
    return rows


def mistyped(rows: Tensor) -> Tensor:
    """The rows, in each of which some letters have become others."""
    places = (rows >= ord("a")).float().multinomial(ERRORS)
    return rows.scatter(1, places, torch.randint(ord("a"), ord("z") + 1, places.shape))


def fit(model: nn.Module, loss, parameters, steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(steps):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def reading(model: Reader) -> Tensor:
    """The loss of guessing each next byte of the library."""
    rows = library[torch.randint(len(library), (BATCH,))]
    return cross_entropy(model.next_byte(model.features(rows[:, :-1])).flatten(0, 1), rows[:, 1:].flatten())


def preferring(model: Reader) -> Tensor:
    """The loss of the labels by Bradley and Terry's model."""
    batch = torch.randint(PAIRS, (BATCH,))
    return -logsigmoid(model(train[0][batch]) - model(train[1][batch])).mean()


def loaded(path: Path) -> Reader:
    model = Reader()
    model.load_state_dict(load_file(path))
    return model


@torch.no_grad()
def accuracy(*paths: Path) -> list[float]:
    """The share of the pairs in each test that the mean of the models' rewards ranks as labelled."""
    models = [loaded(path) for path in paths]
    return [
        (sum(model(better) - model(worse) for model in models) > 0).float().mean().item()
        for better, worse in tests.values()
    ]


steps, models, pretraining, seeds, out = report.arguments(__doc__, steps=500, models=5, pretraining=800, seeds=3)
library, held_out = text.library_source()
stdlib = Path(sysconfig.get_paths()["stdlib"])
manual = (stdlib / "pydoc_data" / "topics.py").read_bytes().replace(b"\\n", b"\n")
prose = torch.frombuffer(bytearray(manual[: len(manual) // LENGTH * LENGTH]), dtype=torch.uint8).long()

results: dict[str, list[list[float]]] = {}
for seed in range(seeds):
    torch.manual_seed(seed)
    real, known, shifted = pieces(library, PAIRS), pieces(held_out, TESTS), pieces(prose, TESTS)
    wrong, clean = torch.rand(PAIRS) < WRONG, (real, swapped(real))
    train = [torch.where(wrong[:, None], other, side) for side, other in (clean, clean[::-1])]
    tests = {
        "other files": (known, swapped(known)),
        "prose, other errors": (shifted, mistyped(shifted)),
        "wrong labels": (train[0][wrong], train[1][wrong]),
    }
    start = Reader()
    fit(start, reading, start.parameters(), pretraining, 2e-3)
    fit(start, preferring, start.score.parameters(), steps, 1e-2)
    save_file(start.state_dict(), out / "start.safetensors")
    paths = [out / f"model-{number}.safetensors" for number in range(1, models + 1)]
    for path, rate in zip(paths, RATES, strict=False):
        model = loaded(out / "start.safetensors")
        fit(model, preferring, model.parameters(), steps, rate)
        save_file(model.state_dict(), path)
    uniform(paths, out / "warm.safetensors", force=True)
    each = [accuracy(path) for path in paths]
    for name, values in (
        ("the common start", accuracy(out / "start.safetensors")),
        ("one model, on average", [sum(column) / len(each) for column in zip(*each, strict=True)]),
        ("the ensemble of all", accuracy(*paths)),
        ("WARM, the mean of all", accuracy(out / "warm.safetensors")),
    ):
        results.setdefault(name, []).append(values)

print(f"share of the pairs ranked as labelled, mean of {seeds} seeds; chance is 0.5")
rows = [(name, *(sum(column) / seeds for column in zip(*values, strict=True))) for name, values in results.items()]
print(report.table(["", *tests], rows))
