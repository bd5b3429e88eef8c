"""LoRA adapters combined by their products, not by their factors: B A ≈ Σ cᵢ sᵢ Bᵢ Aᵢ, the nearest of a given rank.

An adapter (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685,
section 4.1) adds s B A to a weight. A combination of the factors is not that of the products: it also pairs one
adapter's B with another's A. A sum of products has up to the sum of the ranks as its rank, and an adapter of that rank
does what the combination of the merged models does, up to rounding. The nearest matrix of a lower rank is the truncated
singular value decomposition (Eckart and Young 1936), computed here in float64 from the factors alone.

Adapters may differ in rank, scaling (``lora_alpha``, ``use_rslora``, patterns) and target modules: a module that an
adapter leaves alone counts as zero. Other tensors (biases, ``modules_to_save``) are combined as they are.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from averaging.checkpoints import Checkpoint, Entry
from averaging.checkpoints.checkpoint import ADAPTER_CONFIG, ADAPTER_FILE
from averaging.checkpoints.files import FLOATS, nbytes

if TYPE_CHECKING:
    from torch import Tensor

MAX_MATCHING = 10**8  # steps that a pattern in an adapter's configuration may take
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


class Adapters:
    """LoRA adapters that belong together, and the adapter that a combination of their products is.

    Args:
        adapters: at least one.
        rank: of all modules. ``None``: for each module the largest rank that it has in an adapter.
        plain: they must hold nothing but factors, as the base model, which is combined with them, does not.

    Attributes:
        model: the result, of which there is no file yet: what it holds, and its configuration.
        modules: module → the names of its factors A and B.
        ranks: module → its rank in the result.

    Raises:
        ValueError: what is not plain LoRA, or of another base model; a rank less than 1.
    """

    def __init__(self, adapters: Sequence[Checkpoint], rank: int | None, *, plain: bool = False) -> None:
        if rank is not None and not (type(rank) is int and rank >= 1):
            raise ValueError(f"lora_rank={rank}: an adapter's rank (--lora-rank) must be a whole number, at least 1")
        self.adapters = adapters
        for adapter in adapters:
            self._check(adapter)
        entries: dict[str, Entry] = {}
        for adapter in adapters:
            for name, entry in adapter.entries.items():
                entries.setdefault(name, entry)
        self.modules: dict[str, tuple[str, str]] = {}
        for name in entries:
            for first, second in FACTORS:
                if name.endswith((first, second)):
                    path = name.removesuffix(first).removesuffix(second)
                    self.modules[path] = (path + first, path + second)
        factors = {name for names in self.modules.values() for name in names}
        self.ranks: dict[str, int] = {}
        shapes = {}
        for module, names in self.modules.items():
            holding = [adapter for adapter in adapters if self._has(adapter, names)]
            held = [self._pair(adapter, module, names) for adapter in holding]
            for adapter, (a, b) in zip(holding, held, strict=True):
                if (a[1:], b[:1], b[2:]) != (held[0][0][1:], held[0][1][:1], held[0][1][2:]):
                    raise ValueError(
                        f"the factors of {module!r} in {holding[0].path} and {adapter.path} are of different shapes: "
                        "the base models differ"
                    )
            self.ranks[module] = rank or max(a[0] for a, _ in held)
            (a, b), r = held[0], self.ranks[module]
            shapes[names[0]], shapes[names[1]] = (r, *a[1:]), (b[0], r, *b[2:])
        for name in sorted(entries.keys() - factors):
            if plain and not name.endswith(BIAS):
                raise ValueError(
                    f"the adapters hold {name!r} besides LoRA factors, which is not combined with the base model: name "
                    "the adapter that they started from as the initial one (--init)"
                )
            for adapter in adapters:
                if not name.endswith(BIAS) and (
                    name not in adapter.entries or adapter.entries[name].shape != entries[name].shape
                ):
                    raise ValueError(
                        f"{adapter.path} does not hold {name!r} as the others do, and it is no LoRA factor: what the "
                        "base model has in its place is not known"
                    )
                if name in adapter.entries and name.endswith(BIAS):
                    pair = self.modules.get(name.removesuffix(BIAS))
                    if pair is None or not self._has(adapter, pair):
                        raise ValueError(f"{adapter.path} holds {name!r}, but not the factor that it belongs to")
        self.model = copy.copy(adapters[-1])
        self.model.entries = {}
        for name, entry in entries.items():
            kind, shape = adapters[-1].entries.get(name, entry).dtype, shapes.get(name, entry.shape)
            self.model.entries[name] = Entry(kind, shape, entry.file, 0, nbytes(kind, shape))
        self.model.shards = {ADAPTER_FILE: list(entries)}
        self.model.config = self._config()

    def _check(self, adapter: Checkpoint) -> None:
        config = adapter.config or {}
        if adapter.kind != "peft" or config.get("peft_type") != "LORA":
            raise ValueError(f"{adapter.path} is no LoRA adapter folder, as --lora product (lora='product') needs")
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
            if entry.dtype not in FLOATS:
                raise ValueError(f"{adapter.path}: tensor {name!r} is {entry.dtype}, which cannot be averaged")

    @staticmethod
    def _has(adapter: Checkpoint, names: tuple[str, str]) -> bool:
        held = [name in adapter.entries for name in names]
        if any(held) and not all(held):
            raise ValueError(f"{adapter.path} holds only one of {names[0]!r} and {names[1]!r}; save it again")
        return all(held)

    @staticmethod
    def _pair(adapter: Checkpoint, module: str, names: tuple[str, str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        a, b = (adapter.entries[name].shape for name in names)
        if len(a) < 2 or len(b) < 2 or a[0] != b[1] or not a[0] or math.prod(b[2:]) != 1:
            raise ValueError(f"{adapter.path}: {names[0]!r} {list(a)} and {names[1]!r} {list(b)} are no factors")
        if (said := _setting(adapter, module, "r", "rank_pattern")) != a[0]:
            raise ValueError(
                f"{adapter.path / ADAPTER_CONFIG} says that the rank is {said:g}, but {names[0]!r} is {list(a)}"
            )
        return a, b

    def combined(
        self, shares: Mapping[str, Sequence[float]], dtypes: Mapping[str, str]
    ) -> Iterator[tuple[str, memoryview]]:
        """The bytes of the result's tensors, in their ``dtypes``.

        Args:
            shares: name → the coefficients of the adapters. Only these tensors are computed.
            dtypes: name → dtype.
        """
        import torch

        from averaging import kernels

        for name, tensor in self._results(shares):
            rounded = kernels.rounded(tensor.contiguous(), getattr(torch, dtypes[name]))
            if not rounded.isfinite().all():
                raise ValueError(f"tensor {name!r}: the average is too large for {dtypes[name]}; choose a wider dtype")
            yield name, rounded.reshape(-1).view(torch.uint8).numpy().data

    def lost(self, shares: Mapping[str, Sequence[float]], names: Collection[str]) -> dict[str, tuple[float, float]]:
        """Module → the squared Frobenius norms of what the rank costs, and of the whole product.

        Args:
            shares: name → the coefficients of the adapters.
            names: only of the modules whose factor A is among these.
        """
        return {module: self._product(module, shares[a])[2:] for module, (a, _) in self.modules.items() if a in names}

    def losses(self, lost: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
        """For the record: the ranks, and the relative errors ‖Σ − B A‖ / ‖Σ‖ that they cost, besides rounding."""
        whole = [math.fsum(norms) for norms in zip(*lost.values(), strict=True)] or [0.0, 0.0]
        errors = {module: _ratio(*pair) for module, pair in lost.items()}
        return {"ranks": self.ranks, "error": _ratio(*whole), "errors": errors}

    def _results(self, shares: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, Tensor]]:
        factors = set()
        for module, pair in self.modules.items():
            factors |= {*pair}
            if wanted := [name for name in pair if name in shares]:
                b, a, _, _ = self._product(module, shares[wanted[0]])
                yield from ((name, a if name == pair[0] else b) for name in wanted)
        for name in shares.keys() - factors:
            yield name, self._sum(name, shares[name])

    def _product(self, module: str, shares: Sequence[float]) -> tuple[Tensor, Tensor, float, float]:
        """Σ cᵢ sᵢ Bᵢ Aᵢ as `averaging.kernels.refactored` gives it."""
        import torch

        from averaging import kernels

        names = self.modules[module]
        factors = []
        for adapter, share in zip(self.adapters, shares, strict=True):
            if self._has(adapter, names):
                a, b = (self._read(adapter, name).flatten(1) for name in names)
                factors.append((b * (share * _scaling(adapter, module, len(a))), a))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the bits may depend on how many there are
        try:
            return kernels.refactored(factors, self.ranks[module])
        finally:
            torch.set_num_threads(threads)

    def _sum(self, name: str, shares: Sequence[float]) -> Tensor:
        """The combination of a tensor that is no factor."""
        total: Any = 0
        for adapter, share in zip(self.adapters, shares, strict=True):
            if name in adapter.entries:
                if name.endswith(BIAS):  # is scaled as the product is
                    module = name.removesuffix(BIAS)
                    share *= _scaling(adapter, module, adapter.entries[self.modules[module][0]].shape[0])
                total = total + self._read(adapter, name) * share
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


def _ratio(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else 0.0


def _inner(module: str) -> str:
    """What a module is called in the base model."""
    return module.removeprefix("base_model.model.")


def _comparable(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value


def _scaling(adapter: Checkpoint, module: str, rank: int) -> float:
    """What multiplies B A: alpha / r, or alpha / √r of rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""
    alpha = _setting(adapter, module, "lora_alpha", "alpha_pattern")
    return alpha / (math.sqrt(rank) if (adapter.config or {}).get("use_rslora") else rank)


def _setting(adapter: Checkpoint, module: str, key: str, patterns: str) -> float:
    """The number that an adapter's configuration gives for a module under ``key``, or by its name in ``patterns``."""
    config, name = adapter.config or {}, _inner(module)
    try:
        found: Iterable[Any] = (
            value for pattern, value in (config.get(patterns) or {}).items() if _fits(pattern, name)
        )
        value = float(next(iter(found), config[key]))
    except (re.error, KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ValueError(f"{adapter.path / ADAPTER_CONFIG} does not say what {key} is ({error!r})") from error
    if not math.isfinite(value):
        raise ValueError(f"{adapter.path / ADAPTER_CONFIG} says that {key} is {value}")
    return value


def _fits(pattern: str, name: str) -> bool:
    """Whether PEFT would take the pattern for that of this module.

    Raises:
        ValueError: that might take time without end.
    """
    repetitions, choices = (len(re.findall(each, pattern)) for each in (r"[*+{]", r"[|?]"))
    repeated = re.search(r"\)[*+{]", pattern) or repetitions + choices > 30
    if repeated or (len(name) + 1) ** (repetitions + 1) * 2**choices > MAX_MATCHING:
        raise ValueError(f"the pattern {pattern!r} may take forever")
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
