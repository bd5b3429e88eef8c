"""A soup of any kind, checked and ready to be cooked: what all methods share. No torch until it is cooked.

A method is a file that says what is combined with which coefficients, or which formula gives a tensor's coefficients
from the inner products of its ingredients.
"""

from __future__ import annotations

import copy
import math
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from averaging.checkpoints import Checkpoint, gather
from averaging.soups.lora import Adapters
from averaging.soups.output import Output, Writing, check_alike
from averaging.soups.team import Team
from averaging.soups.template import find_template, named_like

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from averaging.recipe import Layer
    from averaging.soups.engine import Mixer, Progress, Sink

PathLike = str | os.PathLike[str] | Checkpoint
Paths = Iterable[PathLike] | str | os.PathLike[str]
Formula = Callable[[Sequence[Sequence[float]]], Sequence[float]]
"""From the inner products of a tensor's task vectors τᵢ = θᵢ − θ_init to what the task vectors are multiplied by."""
Products = Mapping[str, Sequence[Sequence[float]]]
"""Name → all inner products of θ_init and the task vectors, in each floating-point tensor."""
Lora = Literal["factors", "product"]

# What --dtype accepts, with the usual short names.
DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32", "float64": "float64"}
DTYPES |= {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


class Options(TypedDict, total=False):
    """What every method takes, as in `averaging.soups.uniform`."""

    like: PathLike | None
    dtype: str | None
    allow_nonfinite: bool
    force: bool
    only: str | None
    skip: str | None
    lora: Lora | None
    lora_rank: int | None


class Soup:
    """Σ cᵢθᵢ, checked and ready to be cooked.

    Args:
        models: the ingredients.
        output: where it is written, if anywhere.
        init: the model that the others were fine-tuned from. The soup is then θ_init + Σ cᵢ (θᵢ − θ_init). For the
            products of adapters it may also be their base model.
        weights: one number per model, or name → one per model for each floating-point tensor; ``None`` stands for ones.
        divisor: what the weights are divided by to give the coefficients.
        formula: gives the coefficients of each tensor instead of the weights.
        method: the method's name, and ``facts``, what else is to be known of it: for the record.
        twins: warn when two ingredients have the same content.

    The others are as in `averaging.soups.uniform`.
    """

    def __init__(
        self,
        models: Sequence[Checkpoint],
        output: str | os.PathLike[str] | None = None,
        *,
        init: PathLike | None = None,
        weights: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
        divisor: float = 1.0,
        formula: Formula | None = None,
        method: str,
        facts: Mapping[str, Any] | None = None,
        twins: bool = True,
        like: PathLike | None = None,
        dtype: str | None = None,
        allow_nonfinite: bool = False,
        force: bool = False,
        only: str | None = None,
        skip: str | None = None,
        lora: Lora | None = None,
        lora_rank: int | None = None,
    ) -> None:
        unfit = {"allow_nonfinite": allow_nonfinite, "like": like, "only": only, "skip": skip}
        _check_lora(lora, lora_rank, method, formula is not None, [name for name, given in unfit.items() if given])
        self.init = None if init is None else initial(init, models)
        based = lora == "product" and self.init is not None and self.init.kind != "peft"
        self.method, self.facts, self.twins = method, dict(facts or {}), twins
        self.formula, self.allow_nonfinite = formula, allow_nonfinite
        self.products: Products | None = None
        self.layers: list[tuple[re.Pattern[str], Soup]] = []
        self.known: tuple[Path, list[str]] | None = None
        if formula is not None and allow_nonfinite:
            raise ValueError(
                f"{method} measures the weights, which NaN and infinity would spoil; leave out "
                "--allow-nonfinite (allow_nonfinite=True)"
            )
        self.by_tensor = dict(weights) if isinstance(weights, Mapping) else None
        self.weights = None if weights is None or isinstance(weights, Mapping) else list(weights)
        if self.init is not None and formula is None:
            self.weights = with_init([weight / divisor for weight in self.weights or [1.0] * len(models)])
            divisor = 1.0
        self.divisor = divisor
        self.ingredients = [*([] if self.init is None else [self.init]), *models]
        if based:  # on a model in which all products of adapters are zero: it adds nothing
            self.init, self.ingredients, self.weights = None, self.ingredients[1:], (self.weights or [])[1:]
        if only is not None or skip is not None:
            like = self.ingredients[-1] if like is None else like
            self.ingredients = [narrowed(ingredient, only, skip) for ingredient in self.ingredients]
            self.facts |= {"only": only, "skip": skip}
        if allow_nonfinite:
            self.facts["allow_nonfinite"] = True
        self.adapters: Adapters | None = None
        self.template: Checkpoint | None = None
        if lora == "product":
            self.adapters = Adapters(self.ingredients, lora_rank, plain=based)
            self.model = self.adapters.model
            self.facts |= {"lora": lora, "lora_rank": lora_rank}
        else:
            check_alike(self.ingredients, chosen=only is not None or skip is not None)
            self.template = find_template(self.ingredients, like)
            if self.template is not None:
                self.ingredients = named_like(self.template, self.ingredients)
            self.model = self.ingredients[-1] if self.template is None else self.template
        self.combined = (self.ingredients[-1] if self.adapters is None else self.model).entries
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; one of {', '.join(DTYPES)}")
        self.dtype = None if dtype is None else DTYPES[dtype]
        self.dtypes = {
            name: self.dtype if self.dtype and entry.dtype in DTYPES else entry.dtype
            for name, entry in self.model.entries.items()
        }
        self.output = None
        if output is not None:
            self.output = Output(output, self.model, self.ingredients, self.dtypes, converted=self.dtype, force=force)

    def vary(self, pattern: str, other: Soup) -> None:
        """Combine the tensors in whose names ``pattern`` is found as ``other`` would, a soup of the same ingredients.

        Raises:
            ValueError: it is no regular expression, or is found in no name that no earlier pattern is found in.
        """
        found = compiled("the pattern ", pattern)
        if not any(found.search(name) and self._of(name) is self for name in self.combined):
            earlier = " that no earlier pattern is found in" if self.layers else ""
            raise ValueError(f"the pattern {pattern!r} is found in the name of no tensor{earlier}")
        self.layers.append((found, other))
        for a, b in () if self.adapters is None else self.adapters.modules.values():
            if self._of(a) is not self._of(b):
                raise ValueError(
                    f"the pattern {pattern!r} is found in one of {a!r} and {b!r} only: what counts is their product"
                )

    @property
    def coefficients(self) -> list[float] | None:
        """What each ingredient is multiplied by, if that is the same in all tensors."""
        if self.formula is not None or self.by_tensor is not None or self.layers:
            return None
        return self._shares

    def record(
        self, measured: Mapping[str, Sequence[float]] | None = None, checksums: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """The provenance of the soup, from which `averaging.soups.recorded` cooks it again.

        Without checksums it has the length that it will have with them.
        """
        checksums = checksums or ["piecesums-sha256:" + "0" * 64] * len(self.ingredients)
        weights = self.weights or [1.0] * len(self.ingredients)
        shares: Sequence[float | None] = self.coefficients or [None] * len(self.ingredients)
        return {
            "method": self.method,
            **self.facts,
            "ingredients": [
                {
                    "path": os.path.abspath(ingredient.path),
                    "step": ingredient.step,
                    "coefficient": share,
                    # Multiplied by the weight and divided by the divisor, the last bit may differ.
                    **({"weight": weight} if measured is None else {}),
                    "checksum": checksum,
                }
                for ingredient, share, weight, checksum in zip(
                    self.ingredients, shares, weights, checksums, strict=True
                )
            ],
            **({"divisor": self.divisor} if measured is None else {"coefficients": measured}),
            "like": None if self.template is None else os.path.abspath(self.template.path),
            "dtype": self.dtype or "as the ingredients",
            "versions": versions(),
        }

    def cook(self, progress: Progress | None = None) -> Mapping[str, Tensor]:
        """Compute the soup and write it, if it has an output."""
        return cook_all([self], progress)[0]

    def measure(
        self, progress: Progress | None = None, team: Team | None = None, mine: Collection[str] | None = None
    ) -> Products | None:
        """What the formula asks of the ingredients, if there is one: a pass over all of them, the first time."""
        from averaging.soups.engine import Gram

        if self.formula is not None and self.products is None:
            entries, gram = self.ingredients[0].entries, Gram(self.ingredients, progress)
            # Backwards: what is still in the system's cache is then what is mixed first.
            names = [name for name in reversed(entries) if mine is None or name in mine]
            parts = (team or Team()).gather(lambda: gram.measure(names))
            found = {name: products for part in parts for name, products in part.items()}
            self.products = {name: found[name] for name in entries if name in found}
        return self.products

    def measured(self, products: Products | None) -> Mapping[str, Sequence[float]] | None:
        """The coefficients of all ingredients in each floating-point tensor, if they are not the same in all."""
        from averaging.soups.engine import AVERAGED

        if products is not None:
            by_tensor = {}
            for name, gram in products.items():
                formula = self._of(name).formula
                assert formula is not None  # all are of one method
                by_tensor[name] = with_init(formula([row[1:] for row in gram[1:]]))
            return by_tensor
        if self.layers:
            return {name: self._of(name)._shares for name, entry in self.combined.items() if entry.dtype in AVERAGED}
        return self.by_tensor

    def note_losses(self, measured: Mapping[str, Sequence[float]] | None, team: Team, mine: Collection[str]) -> None:
        """Compute for the record what the rank of adapters' products costs, if these are combined."""
        if self.adapters is not None:
            adapters, shares = self.adapters, measured or dict.fromkeys(self.combined, self._shares)
            parts = team.gather(lambda: adapters.lost(shares, mine))
            found = {module: lost for part in parts for module, lost in part.items()}
            self.facts |= adapters.losses({module: found[module] for module in adapters.modules})

    def mixer(self, *arguments: Any, **options: Any) -> Mixer:
        """The pass that computes the soup; the arguments are those of `averaging.soups.engine.Mixer`."""
        from averaging.soups.engine import Mixer, ProductMixer

        if self.adapters is not None:
            return ProductMixer(*arguments, **options, adapters=self.adapters)
        return Mixer(*arguments, **options)

    @property
    def _shares(self) -> list[float]:
        return [weight / self.divisor for weight in self.weights or [1.0] * len(self.ingredients)]

    def _of(self, name: str) -> Soup:
        """The soup as which the tensor ``name`` is combined."""
        return next((other for pattern, other in self.layers if pattern.search(name)), self)

    def _judge(self, checksums: Sequence[str]) -> None:
        """Warn of ingredients that are the same; refuse those that are not what the record says, if there is one."""
        if self.known is not None:
            record, known = self.known
            for ingredient, now, then in zip(self.ingredients, checksums, known, strict=True):
                if now != then:
                    raise ValueError(f"{ingredient.path} has changed since {record} was written: its checksum differs")
            return
        seen: dict[str, Checkpoint] = {}
        for ingredient, checksum in zip(self.ingredients, checksums if self.twins else (), strict=self.twins):
            twin = seen.setdefault(checksum, ingredient)
            if twin is not ingredient:
                effect = "; its task vector is zero" if self.init is not None and twin is self.ingredients[0] else ""
                warnings.warn(f"{twin.path} and {ingredient.path} have the same content{effect}", stacklevel=5)


def cook_all(
    soups: Sequence[Soup], progress: Progress | None = None, team: Team | None = None
) -> list[Mapping[str, Tensor]]:
    """Cook soups that differ in nothing but their coefficients and outputs, reading the ingredients once for all.

    Args:
        soups: at least one; all with an output, or none.
        progress: called from time to time with the bytes read and the bytes to read.
        team: the processes that share the work, if they have an output; each calls this. Only the first one warns.

    Returns:
        Of each soup what its ``cook`` returns. Either all of them are written or none.
    """
    from averaging.soups.engine import Mix, Mixer, checksum

    first, team = soups[0], team or Team()
    sizes = {name: entry.stop - entry.start for name, entry in first.model.entries.items()}
    mine = {*team.share(sizes)}
    held = first.combined.keys()
    if progress is not None and first.formula is not None and first.products is None:
        products, progress = first.measure(_half(progress, 0), team, mine), _half(progress, 1)
    else:
        products = first.measure(None, team, mine)
    measured = [soup.measured(products) for soup in soups]
    for soup, own in zip(soups, measured, strict=True):
        soup.note_losses(own, team, mine)

    def mix(
        sinks: Sequence[Sink], groups: Sequence[Sequence[str]], done: Callable[[int], object] = lambda number: None
    ) -> list[dict[str, bytes]]:
        """Mix group by group and tell of each one when it is finished; returns the digests of the ingredients."""
        mixes = [
            Mix(soup.weights, soup.divisor, sink) if own is None else Mix(own, 1.0, sink)
            for soup, own, sink in zip(soups, measured, sinks, strict=True)
        ]
        mixer = first.mixer(
            first.ingredients, mixes, first.dtypes, allow_nonfinite=first.allow_nonfinite, progress=progress
        )
        # What the ingredients do not hold is the mean of the model alone.
        copies = [Mix(None, 1.0, sink) for sink in sinks]
        copier = Mixer([first.model], copies, first.dtypes, allow_nonfinite=True)
        others = [[name for name in group if name not in held] for group in groups]
        copied = copier.run(others) if any(others) else range(len(groups))
        mixed = mixer.run([[name for name in group if name in held] for group in groups])
        for number, _ in zip(mixed, copied, strict=True):
            done(number)
        return mixer.digests

    def judged(parts: Sequence[Sequence[Mapping[str, bytes]]]) -> list[str]:
        """The ingredients' checksums, from the digests of all their tensors; warns of those that are the same."""
        of_each = [{name: digest for part in own for name, digest in part.items()} for own in zip(*parts, strict=True)]
        checksums = [checksum(ingredient, own) for ingredient, own in zip(first.ingredients, of_each, strict=True)]
        first._judge(checksums)
        return checksums

    if first.output is None:
        import torch

        shapes = {name: entry.shape for name, entry in first.model.entries.items()}
        kept = [{n: torch.empty(shapes[n], dtype=getattr(torch, first.dtypes[n])) for n in shapes} for _ in soups]

        def keeper(weights: dict[str, Tensor]) -> Sink:
            views = {name: tensor.reshape(-1).view(torch.uint8).numpy().data for name, tensor in weights.items()}

            def keep(name: str, offset: int, data: memoryview) -> None:
                views[name][offset : offset + len(data)] = data

            return keep

        judged([mix([keeper(weights) for weights in kept], [list(shapes)])])
        return [*kept]
    outputs = [soup.output for soup in soups if soup.output is not None]
    first.output.check_room(len(outputs))
    records = [soup.record(own) for soup, own in zip(soups, measured, strict=True)]
    groups = [[name for name in file.tensors if name in mine] for file in first.output.files]
    with ExitStack() as stack:
        writings: list[Writing] = []

        def begin() -> list[Sequence[Path]]:
            if team.rank == 0:
                writings.extend(map(stack.enter_context, map(Output.writing, outputs, records)))
            return [writing.paths for writing in writings]

        def work() -> list[dict[str, bytes]]:
            if team.rank:
                writings.extend(map(stack.enter_context, map(Output.joining, outputs, paths, records)))
            with ThreadPoolExecutor(1) as flusher:
                flushed: list[Future[None]] = []

                def flush(number: int) -> None:
                    # A finished shard goes to the disk while the next one is mixed.
                    flushed.extend(flusher.submit(writing.sync, number) for writing in writings)

                digests = mix([writing.sink for writing in writings], groups, flush)
                for future in flushed:
                    future.result()
            return digests

        paths = team.gather(begin)[0]
        parts = team.gather(work)
        if team.rank == 0:
            checksums = judged(parts)
            for soup, own, writing in zip(soups, measured, writings, strict=True):
                writing.finish(soup.record(own, checksums))
    team.gather(lambda: None)  # nobody is done before all is in its place
    return [Checkpoint(output.path) for output in outputs]


def layered(make: Callable[..., Soup], layers: Sequence[Layer], **place: Any) -> Soup:
    """The soup that ``make`` gives, with the layers' own options where their patterns are found in tensors' names.

    Args:
        make: takes a method's arguments and gives the soup.
        layers: a recipe's, with the method's arguments as options.
        place: the output and ``force``.
    """
    soup = make(**place)
    for layer in layers:
        try:
            soup.vary(layer.pattern, make(**layer.options))
        except ValueError as error:
            raise ValueError(f"{layer.place}: {error}") from error
    if layers:
        soup.facts["layers"] = {layer.pattern: layer.options for layer in layers}
    return soup


def opened(paths: Paths) -> list[Checkpoint]:
    """The checkpoints that ``paths`` stand for; see `averaging.checkpoints.gather`."""
    return gather([paths] if isinstance(paths, str | os.PathLike) else paths)


def with_init(coefficients: Sequence[float]) -> list[float]:
    """What the initial model and the others are multiplied by, from what the task vectors are multiplied by."""
    return [math.fsum([1.0, *(-c for c in coefficients)]), *coefficients]


def check_numbers(what: str, numbers: Sequence[float], models: Sequence[Checkpoint]) -> list[float]:
    """``numbers`` as floats: one finite number for each model.

    Raises:
        ValueError: they are not.
    """
    if isinstance(numbers, str):
        raise ValueError(f"{what}={numbers!r} is for the uniform soup; give numbers")
    numbers = [float(number) for number in numbers]
    if len(numbers) != len(models):
        raise ValueError(f"{len(numbers)} {what} for {len(models)} checkpoints; give one for each, in their order")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{what} must be finite numbers, not {numbers}")
    if not math.isfinite(sum(map(abs, numbers))):
        raise ValueError(f"{what} of {numbers} are too large to be added up")
    return numbers


def check_fraction(what: str, value: float) -> float:
    """``value``, a number from 0 to 1.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{what}={value!r}: must be between 0 and 1")
    return float(value)


def initial(init: PathLike, models: Sequence[Checkpoint]) -> Checkpoint:
    """The model that ``models`` were fine-tuned from, which is none of them.

    Raises:
        ValueError: it is one of them.
    """
    opened = init if isinstance(init, Checkpoint) else Checkpoint(init)
    real = os.path.realpath(opened.path)
    for model in models:
        if os.path.realpath(model.path) == real:
            raise ValueError(
                f"{model.path} is both the initial model and an ingredient; name what was fine-tuned from it only"
            )
    return opened


def narrowed(ingredient: Checkpoint, only: str | None, skip: str | None) -> Checkpoint:
    """``ingredient`` with the tensors whose names match ``only`` and do not match ``skip``."""
    wanted, unwanted = compiled("only=", only or ""), compiled("skip=", skip or "")
    narrowed = copy.copy(ingredient)
    narrowed.entries = {
        name: entry
        for name, entry in ingredient.entries.items()
        if wanted.search(name) and not (skip is not None and unwanted.search(name))
    }
    if not narrowed.entries:
        raise ValueError(f"only={only!r} and skip={skip!r} leave none of the tensors in {ingredient.path}")
    return narrowed


def compiled(what: str, pattern: str) -> re.Pattern[str]:
    """``pattern``; ``what`` names it in the ValueError raised if it is no regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what}{pattern!r} is not a regular expression: {error}") from error


def _check_lora(lora: str | None, rank: int | None, method: str, measured: bool, unfit: Sequence[str]) -> None:
    """Refuse what does not go together: ``measured`` are methods with a formula, ``unfit`` options that were given."""
    if lora not in (None, *get_args(Lora)):
        raise ValueError(f"lora={lora!r}: one of {', '.join(get_args(Lora))}")
    if lora != "product" and rank is not None:
        raise ValueError("--lora-rank (lora_rank) has no meaning without --lora product (lora='product')")
    if lora == "product" and (measured or method in ("fisher", "learned")):
        raise ValueError(
            f"--lora product (lora='product') is for methods that give each adapter a number, not {method}"
        )
    if lora == "product" and unfit:
        raise ValueError(f"{unfit[0]} has no meaning for --lora product (lora='product'); leave it out")


def _half(progress: Progress, half: int) -> Progress:
    """The progress of the first or the second of two passes."""
    return lambda done, total: progress(half * total + done, 2 * total)


def versions() -> dict[str, str]:
    """The versions of what makes a soup."""
    return {package: _version(package) for package in ("averaging", "torch", "safetensors")}


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        import averaging

        return averaging.__version__ if package == "averaging" else "unknown"
