"""The uniform soup: θ = Σ wᵢθᵢ / Σ wᵢ, with wᵢ = 1 unless weights are given.

Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time", https://arxiv.org/abs/2203.05482. Of the latest checkpoints of one run it is LAWA, computed
after the fact (Kaddour 2022, https://arxiv.org/abs/2209.14981).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from averaging.checkpoints import Checkpoint, gather
from averaging.decay import Decay, decay_weights
from averaging.soups.output import Output, check_alike
from averaging.soups.template import find_template, named_like

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.soups.engine import Progress

# What --dtype accepts, with the usual short names.
DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32", "float64": "float64"}
DTYPES |= {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def uniform(
    paths: Iterable[str | os.PathLike[str] | Checkpoint] | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    weights: Sequence[float] | Decay | None = None,
    like: str | os.PathLike[str] | Checkpoint | None = None,
    dtype: str | None = None,
    allow_nonfinite: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Mapping[str, Tensor]:
    """Average saved checkpoints: Σ wᵢθᵢ / Σ wᵢ, summed in float64 and rounded once.

    Every entry of the result is the number of the output's dtype that is nearest to the mean, ties to even.
    Everything that is not a floating-point tensor must be the same in all checkpoints; BatchNorm's
    ``num_batches_tracked`` is the last one's. With an output, memory does not grow with the number or size of the
    checkpoints.

    Args:
        paths: checkpoints (see `averaging.checkpoints.Checkpoint`), or folders of checkpoints, which are taken in
            the order of their steps (see `averaging.checkpoints.gather`).
        output: the folder or ``.safetensors`` file to write. A Hugging Face model or PEFT adapter is written as a
            folder of the same kind. ``None``: nothing is written.
        weights: one number per checkpoint, in their order; they need not sum to one. Or how the learning rate would
            fall over checkpoints at even distances, ``"linear"``, ``"cosine"`` or ``"inverse_sqrt"``
            (see `averaging.decay`). ``None``: all alike.
        like: a whole checkpoint of the model, where the ingredients hold only some of its weights: the result is the
            same kind of thing, with its files and dtypes, and what the ingredients do not hold is copied from it.
            ``None``: the last ingredient, or for snapshots of a `Trajectory` the folder ``template`` beside them.
        dtype: "bfloat16", "float16", "float32" or "float64" for the floating-point tensors of the result.
            ``None``: as in the checkpoints, or in ``like``.
        allow_nonfinite: go on when a checkpoint holds NaN or infinity.
        force: replace an existing output.
        progress: called from time to time with the bytes read and the bytes to read.

    Returns:
        The averaged weights: in memory without ``output``, else as a `Checkpoint` that reads them from there.

    Raises:
        ValueError: checkpoints that are corrupt, do not belong together, or hold NaN or infinity; weights or dtype
            that make no sense; an output that is an ingredient. The message names file and tensor.
        FileNotFoundError: a path does not exist or holds no checkpoints.
        FileExistsError: the output exists and ``force`` is off.
        OSError: no permission, no room. Whatever stops it, an earlier output stays as it was.

    Warns:
        UserWarning: two checkpoints have the same content.

    Averaging LoRA adapters averages their A and B factors, not the products.
    """
    return Uniform(
        paths,
        output,
        weights=weights,
        like=like,
        dtype=dtype,
        allow_nonfinite=allow_nonfinite,
        force=force,
    ).cook(progress)


class Uniform:
    """A uniform soup, checked and ready to be cooked; the arguments are those of `uniform`. No torch up to there.

    ``method`` and what else is in ``facts`` go into the record of the soup.
    """

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str] | Checkpoint] | str | os.PathLike[str],
        output: str | os.PathLike[str] | None = None,
        *,
        weights: Sequence[float] | Decay | None = None,
        like: str | os.PathLike[str] | Checkpoint | None = None,
        dtype: str | None = None,
        allow_nonfinite: bool = False,
        force: bool = False,
        method: str = "uniform",
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.ingredients = gather([paths] if isinstance(paths, str | os.PathLike) else paths)
        if method == "uniform" and len(self.ingredients) < 2:
            found = f"only {self.ingredients[0].path}" if self.ingredients else "none"
            raise ValueError(f"a soup needs at least two checkpoints, found {found}")
        check_alike(self.ingredients)
        self.model = self.ingredients[-1]
        if template := find_template(self.ingredients, like):
            self.model, self.ingredients = template, named_like(template, self.ingredients)
        self.method, self.facts = method, facts or {}
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; one of {', '.join(DTYPES)}")
        self.dtype = None if dtype is None else DTYPES[dtype]
        self.weights = None if weights is None else _checked(weights, self.ingredients)
        self.divisor = float(len(self.ingredients)) if self.weights is None else math.fsum(self.weights)
        self.allow_nonfinite = allow_nonfinite
        self.dtypes = {
            name: self.dtype if self.dtype and entry.dtype in DTYPES else entry.dtype
            for name, entry in self.model.entries.items()
        }
        self.output = None
        if output is not None:
            self.output = Output(output, self.model, self.ingredients, self.dtypes, converted=self.dtype, force=force)

    @property
    def coefficients(self) -> list[float]:
        """What each ingredient is multiplied by; they sum to one."""
        return [weight / self.divisor for weight in self.weights or [1.0] * len(self.ingredients)]

    def record(self, checksums: Sequence[str] | None = None) -> dict[str, Any]:
        """The provenance of the soup. Without checksums it has the length that it will have with them."""
        checksums = checksums or ["piecesums-sha256:" + "0" * 64] * len(self.ingredients)
        return {
            "method": self.method,
            **self.facts,
            "ingredients": [
                {"path": str(ingredient.path), "step": ingredient.step, "coefficient": share, "checksum": checksum}
                for ingredient, share, checksum in zip(self.ingredients, self.coefficients, checksums, strict=True)
            ],
            "like": None if self.model is self.ingredients[-1] else str(self.model.path),
            "dtype": self.dtype or "as the ingredients",
            "versions": {package: _version(package) for package in ("averaging", "torch", "safetensors")},
        }

    def cook(self, progress: Progress | None = None) -> Mapping[str, Tensor]:
        """Compute the soup and write it, if it has an output."""
        import torch

        from averaging.soups.engine import Mixer

        held = self.ingredients[-1].entries.keys()
        checksums: list[str] = []

        def mix(sink: Any, groups: Sequence[Sequence[str]]) -> Iterator[int]:
            mixer = Mixer(
                self.ingredients,
                self.weights,
                self.divisor,
                self.dtypes,
                sink,
                allow_nonfinite=self.allow_nonfinite,
                progress=progress,
            )
            # What the ingredients do not hold is the mean of the model alone.
            copier = Mixer([self.model], None, 1.0, self.dtypes, sink, allow_nonfinite=True)
            others = [[name for name in group if name not in held] for group in groups]
            copied = copier.run(others) if any(others) else groups
            mixed = mixer.run([[name for name in group if name in held] for group in groups])
            for number, _ in zip(mixed, copied, strict=True):
                yield number
            checksums.extend(mixer.checksums())

        if self.output is None:
            shapes = {name: entry.shape for name, entry in self.model.entries.items()}
            soup = {name: torch.empty(shapes[name], dtype=getattr(torch, self.dtypes[name])) for name in shapes}
            views = {name: tensor.reshape(-1).view(torch.uint8).numpy().data for name, tensor in soup.items()}

            def keep(name: str, offset: int, data: memoryview) -> None:
                views[name][offset : offset + len(data)] = data

            for _ in mix(keep, [list(soup)]):
                pass
            self._warn_of_twins(checksums)
            return soup
        with self.output.writing(self.record()) as writing, ThreadPoolExecutor(1) as flusher:
            groups = [list(file.tensors) for file in self.output.files]
            # A finished shard goes to the disk while the next one is mixed.
            flushed = [flusher.submit(writing.sync, number) for number in mix(writing.sink, groups)]
            for future in flushed:
                future.result()
            self._warn_of_twins(checksums)
            writing.finish(self.record(checksums))
        return Checkpoint(self.output.path)

    def _warn_of_twins(self, checksums: Sequence[str]) -> None:
        if self.method != "uniform":
            return  # two EMAs are the same until the second absorption
        seen: dict[str, Checkpoint] = {}
        for ingredient, checksum in zip(self.ingredients, checksums, strict=True):
            twin = seen.setdefault(checksum, ingredient)
            if twin is not ingredient:
                warnings.warn(f"{twin.path} and {ingredient.path} have the same content", stacklevel=4)


def _checked(weights: Sequence[float] | Decay, ingredients: Sequence[Checkpoint]) -> list[float] | None:
    if isinstance(weights, str):
        if weights == "linear":
            return None
        steps = [ingredient.step for ingredient in ingredients if ingredient.step is not None]
        if steps != sorted(steps):
            raise ValueError(f"weights={weights!r} are for checkpoints in the order of their steps, not {steps}")
        return decay_weights(weights, len(ingredients))
    weights = [float(weight) for weight in weights]
    if len(weights) != len(ingredients):
        raise ValueError(
            f"{len(weights)} weights for {len(ingredients)} checkpoints; give one for each, in their order"
        )
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite numbers, not {weights}")
    if not math.fsum(weights) > 0:
        raise ValueError(f"the weights {weights} must have a positive sum")
    return weights


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        import averaging

        return averaging.__version__ if package == "averaging" else "unknown"
