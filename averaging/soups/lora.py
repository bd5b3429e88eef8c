"""The mean of LoRA adapters' products: B A ≈ Σ cᵢ sᵢ Bᵢ Aᵢ with cᵢ = wᵢ / Σ wᵢ, the nearest of a given rank.

An adapter (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685,
section 4.1) adds s B A to a weight. The mean of the factors, which `averaging.soups.uniform` computes, is not that of
the products: it also pairs one adapter's B with another's A. The mean of the products has up to the sum of the ranks as
its rank; the nearest matrix of a lower one is the truncated singular value decomposition (Eckart and Young 1936),
computed here from the factors alone.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from averaging.checkpoints import Checkpoint, Entry
from averaging.checkpoints.checkpoint import ADAPTER_CONFIG, ADAPTER_FILE
from averaging.checkpoints.files import nbytes
from averaging.decay import Decay
from averaging.soups.output import Output, write_json
from averaging.soups.soup import DTYPES, Paths, opened, versions
from averaging.soups.uniform import checked_weights

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "lora-product"
# How a module's factors are called: those of an embedding have names of their own.
FACTORS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
BIAS = ".lora_B.bias"
# What makes an adapter something else than s B A beside an untouched weight.
_OTHER = {
    "use_dora": "DoRA's magnitudes multiply the sum of weight and product",
    "use_qalora": "QA-LoRA pools the input",
    "use_bdlora": "the factors are block-diagonal",
    "target_parameters": "the factors of several matrices are stacked",
    "trainable_token_indices": "single embeddings are trained",
    "layer_replication": "layers are replicated",
    "arrow_config": "adapters are routed",
    "kasa_config": "the factors are scaled and the weight is cut",
    "velora_config": "the input is compressed",
    "monteclora_config": "the factors are sampled",
}
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others change the base model's weights
_SAME = ("base_model_name_or_path", "peft_type", "task_type", "fan_in_fan_out")
_CHOOSING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class LoRA:
    """An adapter that stands for the mean of the products of several.

    Attributes:
        checkpoint: the adapter.
        ranks: module → its rank.
        errors: module → ‖mean − B A‖ / ‖mean‖ (Frobenius norms): what the truncation costs, not the rounding.
        error: the same of all modules together.
    """

    checkpoint: Checkpoint
    ranks: dict[str, int]
    errors: dict[str, float]
    error: float

    def __str__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        worst = max(self.errors, key=self.errors.__getitem__)
        return f"rank {rank}, relative error {self.error:.2g}, at most {self.errors[worst]:.2g} ({worst})"


def lora(
    paths: Paths,
    output: str | os.PathLike[str],
    *,
    weights: Sequence[float] | Decay | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> LoRA:
    """Average the products of LoRA adapters: Σ wᵢ sᵢ Bᵢ Aᵢ / Σ wᵢ of each module, as an adapter of rank ``rank``.

    With the sum of the ranks as ``rank`` the result computes what the mean of the merged models computes, up to
    rounding. Everything is computed in float64 from QR decompositions of the factors; no product is ever formed.
    Adapters may differ in rank, scaling (``lora_alpha``, ``use_rslora``, patterns) and target modules: a module that an
    adapter leaves alone counts as zero. Other tensors (biases, ``modules_to_save``) are averaged as they are.

    Args:
        paths: PEFT adapter folders of one base model, or folders of them.
        output: the folder to write, which opens with ``PeftModel.from_pretrained``.
        weights: as in `averaging.soups.uniform`.
        rank: of all modules. ``None``: for each module the largest rank that it has in an adapter.
        dtype: as in `averaging.soups.uniform`.
        force: replace an existing output.

    Returns:
        The adapter, with the relative error that the rank costs.

    Raises:
        ValueError: what is not plain LoRA, of another base model, not finite or corrupt; a rank less than 1.
        FileNotFoundError, FileExistsError, OSError: as `averaging.soups.uniform`.
    """
    import torch

    from averaging import kernels

    plan = _Plan(paths, weights, rank, dtype)
    place = plan.output(output, force)
    results: dict[str, Tensor] = {}
    errors, lost, total = {}, 0.0, 0.0
    for module, names in plan.modules.items():
        factors = plan.factors(module)
        b, a, dropped, square = kernels.refactored(factors, plan.ranks[module])
        errors[module] = math.sqrt(dropped / square) if square else 0.0
        lost, total = lost + dropped, total + square
        results[names[0]], results[names[1]] = a, b
    results |= {name: plan.mean(name) for name in plan.others}
    record = plan.record(LoRA(plan.model, plan.ranks, errors, math.sqrt(lost / total) if total else 0.0))
    with place.writing(record) as writing:
        for name, entry in plan.model.entries.items():
            tensor = kernels.rounded(results.pop(name).reshape(entry.shape), getattr(torch, entry.dtype))
            if not tensor.isfinite().all():
                raise ValueError(f"tensor {name!r}: the average is too large for {entry.dtype}; choose a wider dtype")
            writing.sink(name, 0, tensor.reshape(-1).view(torch.uint8).numpy().data)
        writing.sync(0)
        writing.finish(record)
    return LoRA(Checkpoint(output), plan.ranks, errors, record["error"])


class _Plan:
    """The adapters, checked, and what the result holds."""

    def __init__(
        self, paths: Paths, weights: Sequence[float] | Decay | None, rank: int | None, dtype: str | None
    ) -> None:
        self.adapters = opened(paths)
        if len(self.adapters) < 2:
            raise ValueError(f"a soup needs at least two adapters, found {len(self.adapters)}")
        if rank is not None and rank < 1:
            raise ValueError(f"rank={rank}: an adapter's rank (--lora-rank) must be at least 1")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; one of {', '.join(DTYPES)}")
        own = (None if weights is None else checked_weights(weights, self.adapters)) or [1.0] * len(self.adapters)
        self.weights, self.divisor = own, math.fsum(own)
        self.dtype = None if dtype is None else DTYPES[dtype]
        for adapter in self.adapters:
            self._check(adapter)
        entries: dict[str, Entry] = {}
        for adapter in self.adapters:
            for name, entry in adapter.entries.items():
                entries.setdefault(name, entry)
        self.modules: dict[str, tuple[str, str]] = {}
        for name in entries:
            for first, second in FACTORS:
                if name.endswith((first, second)):
                    path = name.removesuffix(first).removesuffix(second)
                    self.modules[path] = (path + first, path + second)
        factors = {name for names in self.modules.values() for name in names}
        self.others = [name for name in entries if name not in factors]
        self.ranks: dict[str, int] = {}
        shapes = {}
        for module, names in self.modules.items():
            held = [self._pair(adapter, names) for adapter in self.adapters if self._has(adapter, names)]
            if not held:
                raise ValueError(f"{entries[names[0]].file if names[0] in entries else module}: half of the factors")
            for a, b in held:
                if (a[1:], b[:1], b[2:]) != (held[0][0][1:], held[0][1][:1], held[0][1][2:]):
                    raise ValueError(f"the factors of {module!r} are of different shapes: the base models differ")
            self.ranks[module] = rank or max(a[0] for a, _ in held)
            (a, b), r = held[0], self.ranks[module]
            shapes[names[0]], shapes[names[1]] = (r, *a[1:]), (b[0], r, *b[2:])
        for name in self.others:
            for adapter in self.adapters:
                if not name.endswith(BIAS) and (
                    name not in adapter.entries or adapter.entries[name].shape != entries[name].shape
                ):
                    raise ValueError(
                        f"{adapter.path} does not hold {name!r} as the others do, and it is no LoRA factor: what the "
                        "base model has in its place is not known"
                    )
        model = copy.copy(self.adapters[-1])
        model.entries = {}
        for name, entry in entries.items():
            last = model_entry if (model_entry := self.adapters[-1].entries.get(name)) else entry
            kind = self.dtype or last.dtype
            shape = shapes.get(name, entry.shape)
            model.entries[name] = Entry(kind, shape, entry.file, 0, nbytes(kind, shape))
        model.shards = {ADAPTER_FILE: list(model.entries)}
        model.config = self._config()
        self.model = model

    def _check(self, adapter: Checkpoint) -> None:
        config = adapter.config or {}
        if adapter.kind != "peft" or config.get("peft_type") != "LORA":
            raise ValueError(f"{adapter.path} is no LoRA adapter folder, which --lora product (lora) averages")
        first = self.adapters[0]
        for key in _SAME:
            one, two = (first.config or {}).get(key), config.get(key)
            if one != two:
                raise ValueError(
                    f"{first.path} and {adapter.path} are for different models: {key} is {one!r} in one and {two!r} "
                    "in the other"
                )
        for key, reason in _OTHER.items():
            if config.get(key) or (key == "use_dora" and any("lora_magnitude" in name for name in adapter.entries)):
                raise ValueError(
                    f"{adapter.path} is more than a product ({key}): {reason}; average the factors (--lora factors), "
                    "or merge the adapters into their models and average these"
                )
        if config.get("init_lora_weights") not in _PLAIN_STARTS:
            raise ValueError(
                f"{adapter.path} started with init_lora_weights={config['init_lora_weights']!r}, which changes the "
                "base model: convert it to plain LoRA when saving it, with path_initial_model_for_weight_conversion"
            )
        for name, entry in adapter.entries.items():
            if entry.dtype not in DTYPES:
                raise ValueError(f"{adapter.path}: tensor {name!r} is {entry.dtype}, which cannot be averaged")

    @staticmethod
    def _has(adapter: Checkpoint, names: tuple[str, str]) -> bool:
        held = [name in adapter.entries for name in names]
        if any(held) and not all(held):
            raise ValueError(f"{adapter.path} holds only one of {names[0]!r} and {names[1]!r}; save it again")
        return all(held)

    @staticmethod
    def _pair(adapter: Checkpoint, names: tuple[str, str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        a, b = (adapter.entries[name].shape for name in names)
        if len(a) < 2 or len(b) < 2 or a[0] != b[1] or not a[0] or math.prod(b[2:]) != 1:
            raise ValueError(f"{adapter.path}: {names[0]!r} {list(a)} and {names[1]!r} {list(b)} are no factors")
        return a, b

    def factors(self, module: str) -> list[tuple[Tensor, Tensor]]:
        """What is to be summed, as matrices (cᵢ sᵢ Bᵢ, Aᵢ) in float64."""
        names = self.modules[module]
        found = []
        for adapter, weight in zip(self.adapters, self.weights, strict=True):
            if self._has(adapter, names):
                a, b = (self._read(adapter, name).flatten(1) for name in names)
                found.append((b * (weight / self.divisor * _scaling(adapter, module, len(a))), a))
        return found

    def mean(self, name: str) -> Tensor:
        """The mean of a tensor that is no factor."""
        total: Any = 0
        for adapter, weight in zip(self.adapters, self.weights, strict=True):
            if name in adapter.entries:
                scale = weight / self.divisor
                if name.endswith(BIAS):  # is scaled as the product is
                    module = name.removesuffix(BIAS)
                    scale *= _scaling(adapter, module, adapter.entries[self.modules[module][0]].shape[0])
                total = total + self._read(adapter, name) * scale
        tensor: Tensor = total
        return tensor

    @staticmethod
    def _read(adapter: Checkpoint, name: str) -> Tensor:
        tensor = adapter[name].double()
        if not tensor.isfinite().all():
            raise ValueError(f"{adapter.path}: tensor {name!r} holds NaN or infinity; leave this checkpoint out")
        return tensor

    def _config(self) -> dict[str, Any]:
        """The configuration of an adapter whose scaling is 1 everywhere."""
        config = dict(self.adapters[-1].config or {})
        rank = max(self.ranks.values(), default=1)
        odd = {_inner(module): r for module, r in self.ranks.items() if r != rank}
        pattern = {re.escape(module): r for module, r in odd.items()}
        config |= {"r": rank, "lora_alpha": rank, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
        config |= {"use_rslora": False, "init_lora_weights": True}
        configs = [adapter.config or {} for adapter in self.adapters]
        if any(_comparable(other.get(key)) != _comparable(config.get(key)) for other in configs for key in _CHOOSING):
            config |= dict.fromkeys(_CHOOSING) | {"target_modules": sorted(map(_inner, self.modules))}
        if any(other.get("lora_bias") for other in configs):
            config["lora_bias"] = True
        return config

    def output(self, path: str | os.PathLike[str], force: bool) -> Output:
        """Where the result goes."""
        dtypes = {name: entry.dtype for name, entry in self.model.entries.items()}
        return _AdapterOutput(path, self.model, self.adapters, dtypes, converted=self.dtype, force=force)

    def record(self, result: LoRA) -> dict[str, Any]:
        """The provenance."""
        from averaging.soups.engine import Mixer, checksum

        ingredients = []
        for adapter, weight in zip(self.adapters, self.weights, strict=True):
            mixer = Mixer([adapter], [], {name: entry.dtype for name, entry in adapter.entries.items()})
            for _ in mixer.run([list(adapter.entries)]):
                pass
            ingredients.append(
                {
                    "path": os.path.abspath(adapter.path),
                    "step": adapter.step,
                    "coefficient": weight / self.divisor,
                    "weight": weight,
                    "checksum": checksum(adapter, mixer.digests[0]),
                }
            )
        return {
            "method": METHOD,
            "ranks": result.ranks,
            "error": result.error,
            "errors": result.errors,
            "ingredients": ingredients,
            "divisor": self.divisor,
            "like": None,
            "dtype": self.dtype or "as the ingredients",
            "versions": versions(),
        }


class _AdapterOutput(Output):
    """An adapter folder with a configuration of its own."""

    def _copy_into(self, folder: Path) -> None:
        super()._copy_into(folder)
        write_json(folder / ADAPTER_CONFIG, self.model.config)


def _inner(module: str) -> str:
    """What a module is called in the base model."""
    return module.removeprefix("base_model.model.")


def _comparable(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value


def _scaling(adapter: Checkpoint, module: str, rank: int) -> float:
    """What multiplies B A: alpha / r, or alpha / √r of rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""
    config = adapter.config or {}
    patterns: dict[str, Any] = config.get("alpha_pattern") or {}
    try:
        found: Iterable[Any] = (
            alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", _inner(module))
        )
        alpha = float(next(iter(found), config["lora_alpha"]))
    except (re.error, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{adapter.path / ADAPTER_CONFIG} does not say what alpha is ({error!r})") from error
    if not math.isfinite(alpha):
        raise ValueError(f"{adapter.path / ADAPTER_CONFIG} says that alpha is {alpha}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
