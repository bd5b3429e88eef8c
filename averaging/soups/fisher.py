"""Fisher-weighted averaging, element by element: θ = Σ λᵢFᵢθᵢ / Σ λᵢFᵢ, with the diagonal Fisher information

    F = mean over inputs x of  E_{y ~ p(y|x, θ)} [ (∂/∂θ log p(y|x, θ))² ]

of each model: how much its predictions depend on a parameter, and so how sure it is of it. Where no model depends on a
parameter, the first model's value counts. Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging",
https://arxiv.org/abs/2111.09832, section 3.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, get_args

from averaging.atomic import replacing
from averaging.checkpoints import Checkpoint, Entry
from averaging.checkpoints.finding import FISHER_KEY
from averaging.soups.evaluation import fingerprint
from averaging.soups.output import check_place
from averaging.soups.soup import Options, PathLike, Paths, Products, Soup, check_numbers, opened
from averaging.soups.template import named_like

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from averaging.soups.engine import Mixer, Progress
    from averaging.soups.team import Team

FISHER_FILE = "fisher.safetensors"
Labels = Literal["expected", "sampled", "given"]


def fisher_information(
    model: nn.Module,
    batches: Iterable[Any],
    output: str | os.PathLike[str] | None = None,
    *,
    labels: Labels = "expected",
    logits: Callable[[nn.Module, Any], Tensor] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The diagonal Fisher information of a model that gives probabilities of classes or of tokens.

        fisher_information(model, batches, "ft-a/")  # ft-a/fisher.safetensors, which the soup finds there

    A few hundred examples do. Each is passed through the model by itself, in evaluation mode; the model, its gradients
    and its mode are as before afterwards. Only parameters that require grad have a Fisher, a tied one under its first
    name. Memory: one float32 copy of them, and one of their gradients.

    Args:
        model: the model.
        batches: mappings of tensors, for ``model(**batch).logits``, or tensors, or tuples whose first item is the
            input, for ``model(input)``; the first dimension counts examples.
        output: a ``.safetensors`` file to write, or a checkpoint's folder, in which it is ``fisher.safetensors``.
        labels: ``"expected"``, the expectation over all classes, one backward pass for each; ``"sampled"``, one label
            drawn from the model's own distribution for each example, or for each token not masked by the batch's
            ``attention_mask``; ``"given"``, the labels in the data, which gives the so-called empirical Fisher, not the
            paper's.
        logits: takes the model and one example, a batch of one; returns the logits, [1, classes] or [1, tokens,
            vocabulary]. ``None``: as above.
        loss: for given labels: takes the model and one example, returns −log p(labels). ``None``:
            ``model(**batch).loss``.
        seed: of the sampled labels.

    Returns:
        name → float32 (float64 for float64 parameters) tensor of the parameter's shape, in CPU memory.

    Raises:
        ValueError: no examples, labels of another name, outputs that do not fit, a Fisher that is not finite.
    """
    import torch

    from averaging import kernels
    from averaging.weights import Binding, first_names, unwrap

    if labels not in get_args(Labels):
        raise ValueError(f"labels={labels!r}: one of {', '.join(get_args(Labels))}")
    parameters = Binding(model).weights
    squares = {name: kernels.squares_of(parameter) for name, parameter in parameters.items()}
    modes = {module: module.training for module in model.modules()}
    generator, count = torch.Generator().manual_seed(seed), 0
    model.eval()
    try:
        with torch.enable_grad():
            for example in _examples(batches, next(iter(parameters.values())).device):
                count += 1
                terms = _terms(model, example, labels, logits, loss, generator)
                for number, (weight, likelihood) in enumerate(terms, start=1):
                    gradients = torch.autograd.grad(
                        likelihood,
                        list(parameters.values()),
                        retain_graph=number < len(terms),
                        allow_unused=True,
                    )
                    for total, gradient in zip(squares.values(), gradients, strict=True):
                        if gradient is not None:
                            kernels.add_square_(total, gradient, weight)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise ValueError("there are no examples to compute a Fisher information from")
    fisher = {name: (total / count).cpu() for name, total in squares.items()}
    for name, tensor in fisher.items():
        if not tensor.isfinite().all():
            raise ValueError(f"the Fisher information of {name!r} is not finite: are the model and its inputs?")
    if output is not None:
        from safetensors.torch import save_file

        path = Path(output)
        path = path if path.suffix == ".safetensors" else path / FISHER_FILE
        # As safetensors notes them: a tied weight's other names.
        ties = {name: first for name, first in first_names(unwrap(model)).items() if name not in fisher}
        ties = {name: first for name, first in ties.items() if first in fisher}
        with replacing(path) as temporary:
            save_file(fisher, temporary, {"format": "pt", FISHER_KEY: labels, "examples": str(count), **ties})
    return fisher


def _examples(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The examples of all batches, each as a batch of one."""
    import torch

    for batch in batches:
        inputs: Mapping[Any, Any] = batch if isinstance(batch, Mapping) else dict(enumerate(_tuple(batch)))
        tensors = {key: value.to(device) for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        if not tensors:
            raise ValueError(f"a batch is a mapping of tensors, a tensor or a tuple, not {type(batch).__name__}")
        for i in range(len(next(iter(tensors.values())))):
            one = {key: tensors[key][i : i + 1] if key in tensors else value for key, value in inputs.items()}
            yield one if isinstance(batch, Mapping) else tuple(one.values())


def _tuple(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def _terms(
    model: nn.Module,
    example: Any,
    labels: Labels,
    logits: Callable[[nn.Module, Any], Tensor] | None,
    loss: Callable[[nn.Module, Any], Tensor] | None,
    generator: Any,
) -> list[tuple[float, Tensor]]:
    """Probabilities of labels, and the logarithms of likelihoods whose squared gradients they weigh."""
    import torch

    if labels == "given":
        if loss is None and not (isinstance(example, Mapping) and "labels" in example):
            raise ValueError("given labels are in a mapping under 'labels', or come with loss=")
        value = model(**example).loss if loss is None else loss(model, example)
        return [(1.0, -value)]
    if logits is not None:
        scores = logits(model, example)
    elif isinstance(example, Mapping):
        scores = model(**example).logits
    else:
        scores = model(example[0])
    if not isinstance(scores, torch.Tensor) or scores.dim() not in (2, 3) or len(scores) != 1:
        shape = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ValueError(f"the logits of one example are [1, classes] or [1, tokens, vocabulary], not {shape}")
    logs = torch.log_softmax(scores[0].float() if scores.dtype.itemsize < 4 else scores[0], -1)
    chances = logs.detach().exp()
    if labels == "expected":
        if logs.dim() == 2:
            raise ValueError(
                "the expectation over all labels of all tokens would take a pass for each: give labels='sampled'"
            )
        return [(float(chance), log) for chance, log in zip(chances, logs, strict=True)]
    logs = logs.view(-1, logs.shape[-1])
    drawn = torch.multinomial(chances.view_as(logs).cpu(), 1, generator=generator).to(logs.device)
    chosen = logs.gather(1, drawn)[:, 0]
    if scores.dim() == 3 and isinstance(example, Mapping) and "attention_mask" in example:
        chosen = chosen[example["attention_mask"][0].bool()]
    return [(1.0, chosen.sum())]


def fisher(
    paths: Paths,
    output: str | os.PathLike[str] | None = None,
    *,
    fisher: Sequence[PathLike] | None = None,
    weights: Sequence[float] | None = None,
    floor: float = 1e-6,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Mapping[str, Tensor]:
    """Average models, each element of a tensor weighted by how much each model's predictions depend on it.

    Tensors for which no Fisher information was computed (frozen parameters, buffers) are averaged with the weights
    alone. The Fishers are read piece by piece, as the models are.

    Args:
        paths: the models, as in `averaging.soups.uniform`; the first one's values count where no Fisher speaks.
        fisher: a file of `fisher_information` for each model. ``None``: ``fisher.safetensors`` in each folder, or
            ``NAME.fisher.safetensors`` beside each file.
        weights: λᵢ, one number per model, not negative; all alike if ``None``. For Fishers of different scales, the
            paper's code divides each λᵢ by the norm of Fᵢ.
        floor: the least value of the first model's Fisher, as a multiple of its root mean square over all parameters.

    ``output``, ``progress``, the other arguments, what is returned and raised are as in `averaging.soups.uniform`.

    Raises:
        ValueError: a Fisher is missing, negative, not finite, or another model's; and what `uniform` raises.
    """
    return Fisher(paths, output, fisher=fisher, weights=weights, floor=floor, **options).cook(progress)


class Fisher(Soup):
    """What `fisher` cooks."""

    def __init__(
        self,
        paths: Paths,
        output: str | os.PathLike[str] | None = None,
        *,
        fisher: Sequence[PathLike] | None = None,
        weights: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
        floor: float = 1e-6,
        facts: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> None:
        models = opened(paths)
        if len(models) < 2:
            raise ValueError(f"Fisher-weighted averaging needs at least two models, found {len(models)}")
        if not (math.isfinite(floor) and floor >= 0):
            raise ValueError(f"floor={floor!r}: must be a finite number, not negative")
        if not isinstance(weights, Mapping):
            weights = check_numbers("weights", [1.0] * len(models) if weights is None else weights, models)
            if min(weights) < 0 or not sum(weights) > 0:
                raise ValueError(f"the weights {weights} must not be negative, and not all zero")
        self.fishers = [_opened(path, model) for path, model in zip(_named(fisher, models), models, strict=True)]
        places = [{"path": os.path.abspath(one.path), "checksum": "sha256:" + "0" * 64} for one in self.fishers]
        super().__init__(
            models,
            output,
            weights=weights,
            method="fisher",
            facts={"floor": float(floor), "fisher": places, **(facts or {})},
            **options,
        )
        if output is not None:
            check_place(output, [one.path for one in self.fishers], "Fisher information")
        self.fishers = [self._fitting(one) for one in self.fishers]
        first = self.fishers[0]
        for other in self.fishers[1:]:
            for name in sorted(first.entries.keys() ^ other.entries.keys()):
                raise ValueError(f"only one of {first.path} and {other.path} holds the Fisher information of {name!r}")

    @property
    def coefficients(self) -> None:
        """Each element has its own."""
        return

    def _fitting(self, fisher: Checkpoint) -> Checkpoint:
        """``fisher`` under the names of the model's file."""
        names: dict[str, Entry] = {}
        aliases: dict[str, list[str]] = {}
        for alias, kept in fisher.ties.items():
            aliases.setdefault(kept, []).append(alias)
        for name, entry in fisher.entries.items():
            held = [one for one in (name, *aliases.get(name, ())) if one in self.model.entries]
            names |= dict.fromkeys(held or [name], entry)
        fisher = copy.copy(fisher)
        fisher.entries = names
        return named_like(self.model, [fisher])[0]

    def measure(
        self, progress: Progress | None = None, team: Team | None = None, mine: Collection[str] | None = None
    ) -> Products | None:
        """The checksums of the Fishers, and what their floor is, which every process needs; no products."""
        from averaging.soups.engine import Gram

        for place, one in zip(self.facts["fisher"], self.fishers, strict=True):
            checksum = f"sha256:{fingerprint(Checkpoint(one.path))}"
            if self.known is not None and place["checksum"] != checksum:
                raise ValueError(f"{one.path} has changed since {self.known[0]} was written: its checksum differs")
            place["checksum"] = checksum
        gram = Gram(self.fishers[:1])
        gram.advice = "compute the Fisher information again"
        squares = math.fsum(products[0][0] for products in gram.measure().values())
        count = sum(math.prod(entry.shape) for entry in self.fishers[0].entries.values())
        self.least = self.facts["floor"] * math.sqrt(squares / count)
        return None

    def mixer(self, *arguments: Any, **options: Any) -> Mixer:
        """As `Soup.mixer`."""
        from averaging.soups.engine import FisherMixer

        return FisherMixer(*arguments, **options, fishers=self.fishers, floor=self.least)


def _named(fisher: Sequence[PathLike] | None, models: Sequence[Checkpoint]) -> Sequence[PathLike]:
    if fisher is None:
        return [
            model.path / FISHER_FILE if model.path.is_dir() else model.path.with_suffix(f".{FISHER_FILE}")
            for model in models
        ]
    if len(fisher) != len(models):
        raise ValueError(f"{len(fisher)} Fisher files for {len(models)} checkpoints; give one for each, in their order")
    return fisher


def _opened(path: PathLike, model: Checkpoint) -> Checkpoint:
    if isinstance(path, Checkpoint):
        return path
    try:
        return Checkpoint(path)
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no Fisher information of {model.path} at {path}: compute it with "
            "averaging.soups.fisher_information(model, batches, PATH), or say where it is with --fisher (fisher=)"
        ) from error
