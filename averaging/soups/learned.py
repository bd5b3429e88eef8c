"""The learned soup: Σ cᵢθᵢ with coefficients that make a loss on held-out data small, for the model or for each layer.

    c = softmax(a), a from zero (the uniform soup), or c free;  a ← AdamW(a, ∂L/∂a)  with  ∂L/∂cᵢ = Σ ⟨∂L/∂θ, θᵢ⟩

where the sum is over the tensors that share cᵢ. The ingredients are streamed from the disk, for the soup and for its
derivatives, so that memory holds the model, its gradient and a copy, however many there are. Of the uniform soup,
each ingredient alone and what was learned after each epoch, the best is written: it is never worse than any of them on
the data it was chosen with. Wortsman et al. 2022, "Model soups", https://arxiv.org/abs/2203.05482, section 3.3 and
appendix I. For a metric without a gradient see `averaging.soups.search`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, get_args

from averaging.atomic import replacing
from averaging.checkpoints import Checkpoint
from averaging.checkpoints.files import read_json
from averaging.soups import plots
from averaging.soups.evaluation import Progress, fingerprint, name_of
from averaging.soups.inspection import ALL, layer_of
from averaging.soups.soup import Options, Paths, Soup, opened

if TYPE_CHECKING:
    from torch import Tensor, nn

Per = Literal["model", "layer"]
Normalize = Literal["softmax"]
Rows = list[list[float]]
"""The coefficients: for each group of tensors one per ingredient."""
Loss = Callable[["nn.Module", Any], "Tensor"]


@dataclass(frozen=True)
class Candidate:
    """A combination that was tried, by name, and its metric."""

    name: str
    coefficients: Rows
    metric: float


@dataclass(frozen=True)
class Learned:
    """The result of `learned` or `averaging.soups.search`.

    Attributes:
        tried: what was evaluated on all held-out data: the uniform soup, each ingredient, and what was learned.
        best: the best of them, the first of equals.
        paths: the ingredients.
        coefficients: group of layers, or ``"all"`` → one per ingredient: those of the best.
        weights: the best soup: a `Checkpoint` if it was written, else tensors in memory.
    """

    tried: list[Candidate]
    best: Candidate
    paths: list[str]
    coefficients: dict[str, list[float]]
    weights: Mapping[str, Tensor]

    def table(self) -> str:
        """The metric of the single ingredients, the uniform soup and the best, and the best's coefficients."""
        singles = self.tried[: len(self.paths) + 1]
        shown = singles if self.best in singles else [*singles, self.best]
        lines = [f"{one.metric:<12.6g} {one.name}{' *' if one is self.best else ''}" for one in shown]
        for group, row in self.coefficients.items():
            lines.append(f"{group}: {' '.join(f'{c:.4f}' for c in row)}")
        return "\n".join(lines)


class Space:
    """The combinations of ``models`` that are searched: which tensors share a row of coefficients.

    Args:
        models: the ingredients.
        output: where the best will be written.
        per: whether all tensors share their coefficients, or those of a layer do.
        method: for the record.
        options: those of the soup.
        ties: name → the first name of that tensor in the model; by default as the files tell.
    """

    def __init__(
        self,
        models: Sequence[Checkpoint],
        output: str | os.PathLike[str] | None,
        per: Per,
        method: str,
        options: Options,
        ties: Mapping[str, str] | None = None,
    ) -> None:
        if per not in get_args(Per):
            raise ValueError(f"per={per!r}: give 'model' or 'layer'")
        if len(models) < 2:
            raise ValueError(f"a {method} soup needs at least two checkpoints, found only {models[0].path}")
        self.models, self.output, self.method, self.options = models, output, method, options
        # Complains now about what would be found wrong at the end.
        self.soup = Soup(models, output, method=method, twins=False, **options)
        ties = self.soup.model.ties if ties is None else ties
        names = self.soup.combined
        self.groups: dict[str, list[str]] = {}
        for name in names:
            self.groups.setdefault(ALL if per == "model" else layer_of(ties.get(name, name)), []).append(name)

    def make(
        self,
        rows: Rows,
        output: str | os.PathLike[str] | None = None,
        force: bool = True,
        facts: Mapping[str, Any] | None = None,
    ) -> Soup:
        """The soup with these coefficients, ready to be cooked."""
        weights: list[float] | dict[str, list[float]] = rows[0]
        if list(self.groups) != [ALL]:
            weights = {name: row for row, names in zip(rows, self.groups.values(), strict=True) for name in names}
        options: Any = {**self.options, "force": force}
        twins = facts is not None
        return Soup(self.models, output, weights=weights, method=self.method, facts=facts, twins=twins, **options)

    def starts(self) -> list[tuple[str, Rows]]:
        """The uniform soup and the single ingredients, by name."""
        count, places = len(self.models), range(len(self.models))
        alone = [(str(model.path), [[float(i == j) for j in places]]) for i, model in enumerate(self.models)]
        both = [("the uniform soup", [[1 / count] * count]), *alone]
        return [(name, rows * len(self.groups)) for name, rows in both]

    def finish(
        self, tried: list[Candidate], sign: int, plot: str | os.PathLike[str] | None, facts: Mapping[str, Any]
    ) -> Learned:
        """Write the best of those tried, and its picture."""
        best = min(tried, key=lambda one: sign * one.metric)
        coefficients = dict(zip(self.groups, best.coefficients, strict=True))
        paths = [str(model.path) for model in self.models]
        facts = {
            "metric": best.metric,
            "chosen": best.name,
            **facts,
            "tried": [{"name": one.name, "metric": one.metric} for one in tried],
        }
        force = self.options.get("force", False)
        with ExitStack() as stack:  # the picture and the soup, or neither
            if plot is not None:
                figure = plots.coefficients(coefficients, paths, f"{best.name}: {best.metric:.6g}")
                plots.save(figure, stack.enter_context(replacing(plot)))
            soup = self.make(best.coefficients, self.output, force, facts)
            return Learned(tried, best, paths, coefficients, soup.cook())


def learned(
    paths: Paths,
    output: str | os.PathLike[str] | None = None,
    *,
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    per: Per = "model",
    normalize: Normalize | None = "softmax",
    lr: float = 0.05,
    epochs: int = 5,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    plot: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Learned:
    """Learn the coefficients of a soup on held-out data by gradient.

        learned(paths, "out", model=model, loss=lambda model, batch: model(**batch).loss, batches=DataLoader(held_out))

    Each step reads every ingredient twice: for the soup, and for the derivatives by its coefficients. The soup is
    evaluated as it would be written, in its dtype. BatchNorm's statistics are mixed with the same coefficients.

    Args:
        paths: the checkpoints, as in `averaging.soups.uniform`; at least two.
        output: where the soup is written; ``None``: nothing is written.
        model: a model whose parameters and buffers have the names in the checkpoints, on any device. Its weights are
            overwritten; it is in evaluation mode meanwhile.
        loss: takes the model and a batch, returns a scalar to minimise, by which the weights have a gradient.
        batches: held-out data, each of one step; iterated several times. What counts is the mean over the batches.
        per: one coefficient per ingredient for the ``"model"``, or for each ``"layer"``.
        normalize: ``"softmax"`` keeps the coefficients positive with the sum one; ``None`` leaves them free.
        lr: AdamW's learning rate, without weight decay; of the logits with softmax.
        epochs: how often all batches are gone through.
        seed: of the random numbers that ``batches`` and ``loss`` draw; those outside go on as if nothing had happened.
        cache: a JSON file that keeps what was learned after each epoch: what was interrupted, or is repeated with
            more epochs, goes on from there, bit for bit. It is for one ``loss``, by its name, and one set of data.
        plot: a ``.png``, ``.pdf`` or ``.svg`` file for a picture of the coefficients (needs matplotlib).
        progress: called with how much was done, how much there is, and what is next.

    The other arguments are as in `averaging.soups.uniform`.

    Raises:
        ValueError: the loss raised, is not finite, or has no gradient, for the candidate named; settings that make no
            sense; and what `averaging.soups.uniform` raises. Nothing but the cache is written then.
        FileExistsError: an output exists and ``force`` is off.
    """
    import torch

    from averaging.apply import load_into
    from averaging.weights import every_filed_name

    if normalize not in (*get_args(Normalize), None):
        raise ValueError(f"normalize={normalize!r}: give 'softmax' or None")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr={lr!r}: must be a positive number")
    if epochs < 1:
        raise ValueError(f"epochs={epochs!r}: must be at least 1")
    models = opened(paths)
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in every_filed_name(model)}
    space = Space(models, output, per, "learned", options, names)
    plots.check_plot(plot, output, options.get("force", False))
    settings = {"per": per, "normalize": normalize, "lr": lr, "seed": seed}
    state = _State(cache, {**settings, "loss": name_of(loss)}, space)
    load_into(model, space.soup.model)  # with what is not averaged
    total = 1 + len(models) + 2 * epochs
    tried = [Candidate(**one) for one in state.own.get("tried", [])[: 1 + len(models) + epochs]]

    def report(what: str, extra: int = 0) -> None:
        if progress is not None:
            progress(len(tried) + extra, total, what)

    with _prepared(model, space.soup.ingredients[-1]) as parameters:
        slopes = _Slopes(model, loss, space, parameters)

        def evaluate(name: str, rows: Rows) -> None:
            slopes.mix(rows)
            with _seeded(seed), torch.no_grad():
                values = [slopes.loss_of(batch, name).item() for batch in batches]
            if not values:
                raise ValueError("there are no batches: give a list or a DataLoader, which can be iterated repeatedly")
            tried.append(Candidate(name, rows, math.fsum(values) / len(values)))

        for name, rows in space.starts()[len(tried) :]:
            report(name)
            evaluate(name, rows)
            state.keep(tried)
        a = torch.zeros(len(space.groups), len(models), dtype=torch.float64)
        if normalize is None:
            a += 1 / len(models)
        a.requires_grad_()
        optimizer = torch.optim.AdamW([a], lr=lr, weight_decay=0.0)
        state.restore(a, optimizer)
        for epoch in range(len(tried) - len(models), epochs + 1):
            with _seeded(seed + epoch):
                for number, batch in enumerate(batches, start=1):
                    where = f"epoch {epoch}, batch {number}"
                    report(where, epoch - 1)
                    optimizer.zero_grad()
                    c = a.softmax(1) if normalize else a * 1
                    slopes.mix(c.tolist())
                    torch.autograd.backward(c, torch.tensor(slopes.measure(batch, where), dtype=torch.float64))
                    optimizer.step()
            report(f"epoch {epoch}, all batches", epoch)
            evaluate(f"epoch {epoch}", (a.softmax(1) if normalize else a).tolist())
            state.keep(tried, a, optimizer)
    return space.finish(tried, 1, plot, {**settings, "epochs": epochs})


class _Slopes:
    """The loss of soups that are put into a model, and its derivatives by their coefficients."""

    def __init__(self, model: nn.Module, loss: Loss, space: Space, parameters: Mapping[str, Tensor]) -> None:
        self.model, self.loss, self.space, self.parameters = model, loss, space, parameters

    def mix(self, rows: Rows) -> None:
        """Put the soup with these coefficients into the model."""
        from averaging.apply import load_into

        soup = self.space.make(rows).cook()
        load_into(self.model, {name: soup[name] for name in self.space.soup.combined})

    def loss_of(self, batch: Any, what: str) -> Tensor:
        """The loss of the soup in the model; ``what`` names it in errors.

        Raises:
            ValueError: it is no finite number, or the loss raised.
        """
        from torch import Tensor

        try:
            value = self.loss(self.model, batch)
        except Exception as error:
            raise ValueError(f"the loss raised {type(error).__name__} for {what}: {error}") from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"the loss must be a tensor with a single number, not {value!r}, for {what}")
        if not math.isfinite(value.item()):
            raise ValueError(f"the loss is {value.item()} for {what}; leave these checkpoints or data out")
        return value

    def measure(self, batch: Any, what: str) -> Rows:
        """∂L/∂cᵢ for each group and ingredient."""
        import torch

        from averaging.soups.slopes import Slopes

        self.model.zero_grad()
        value = self.loss_of(batch, what)
        if not value.requires_grad:
            raise ValueError("the loss has no gradient by the weights: compute it without torch.no_grad() or .item()")
        torch.autograd.backward(value)
        gradients = {
            name: p.grad.to_dense().reshape(-1).cpu() for name, p in self.parameters.items() if p.grad is not None
        }
        self.model.zero_grad()
        by_tensor = Slopes(self.space.soup.ingredients, gradients).measure()
        count = len(self.space.models)
        return [
            [math.fsum(by_tensor[name][i] for name in names if name in by_tensor) for i in range(count)]
            for names in self.space.groups.values()
        ]


class _State:
    """What was learned so far, in a file that goes on with it.

    It is for certain settings and the content of certain ingredients; the file may hold it for several.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any], space: Space) -> None:
        self.path = None if path is None else Path(path)
        self.known: dict[str, Any] = {}
        self.key = ""
        if self.path is not None:
            contents = [fingerprint(checkpoint) for checkpoint in (*space.models, space.soup.model)]
            names = [space.soup.dtypes, list(space.groups.values())]
            self.key = json.dumps(dict(settings)) + hashlib.sha256(json.dumps([contents, names]).encode()).hexdigest()
            self.known = read_json(self.path) if self.path.exists() else {}
        self.own: dict[str, Any] = self.known.get(self.key, {})

    def keep(self, tried: Sequence[Candidate], a: Tensor | None = None, optimizer: Any = None) -> None:
        if self.path is None:
            return
        self.own = {"tried": [vars(one) for one in tried]}
        if a is not None:
            moments = optimizer.state[a]
            self.own |= {"a": a.tolist(), "moments": {name: value.tolist() for name, value in moments.items()}}
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(self.known | {self.key: self.own}) + "\n", encoding="utf-8")

    def restore(self, a: Tensor, optimizer: Any) -> None:
        import torch

        if "a" in self.own:
            a.data.copy_(torch.tensor(self.own["a"], dtype=torch.float64))
            moments = self.own["moments"].items()
            optimizer.state[a] = {
                name: torch.tensor(value, dtype=torch.float64 if isinstance(value, list) else None)
                for name, value in moments
            }


@contextmanager
def _prepared(model: nn.Module, ingredient: Checkpoint) -> Iterator[dict[str, Tensor]]:
    """The parameters that the ingredients hold, each once; meanwhile they want gradients and the model evaluates."""
    import torch

    from averaging.soups.engine import AVERAGED
    from averaging.weights import every_filed_name

    modes = {module: module.training for module in model.modules()}
    parameters: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for name, tensor in every_filed_name(model):
        entry = ingredient.entries.get(name)
        held = entry is not None and entry.dtype in AVERAGED and isinstance(tensor, torch.nn.Parameter)
        if held and seen.setdefault(id(tensor), name) == name:
            parameters[name] = tensor
    wanted = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        model.eval()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(wanted[name])
        for module, training in modes.items():
            module.training = training


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers from ``seed``; afterwards the generators stand where they stood."""
    import random

    import numpy
    import torch

    from averaging.randomness import random_state

    bring_back = random_state()
    try:
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
    finally:
        bring_back()
