"""A soup cooked again from its record, ``soup.json``: of the same bytes, or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from averaging.checkpoints import Checkpoint
from averaging.checkpoints.files import read_json
from averaging.soups.engine import AVERAGED
from averaging.soups.fisher import Fisher
from averaging.soups.soup import Soup

# What a record holds besides the facts of its method.
_COMMON = ("method", "ingredients", "divisor", "coefficients", "like", "dtype", "versions")
_OPTIONS = ("only", "skip", "allow_nonfinite", "lora", "lora_rank")


def is_record(content: Mapping[str, Any]) -> bool:
    """Whether this is what `averaging.soups.soup.Soup.record` gives."""
    return content.keys() >= {"method", "ingredients", "like", "dtype", "versions"}


def recorded(
    path: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, *, force: bool = False
) -> Soup:
    """The soup of which ``path`` is the record: whatever method or search made it, the same sum of the same tensors.

    The versions in its own record are those of today; all else is as it was.

    Raises:
        ValueError: the record is damaged; when it is cooked, also that an ingredient has changed since.
        FileNotFoundError: an ingredient is not where it was.
    """
    record = read_json(Path(path))
    try:
        ingredients = record["ingredients"]
        if len({ingredient["path"] for ingredient in ingredients}) < len(ingredients):
            raise TypeError("it names an ingredient twice")
        if not isinstance(record["method"], str):
            raise TypeError(f"the method is {record['method']!r}")
        models = [Checkpoint(ingredient["path"]) for ingredient in ingredients]
        weights = record.get("coefficients") or [ingredient["weight"] for ingredient in ingredients]
        by_tensor = weights if isinstance(weights, dict) else {"": weights}
        for name, own in by_tensor.items():
            if len(own) != len(models) or not all(map(_is_finite, own)):
                raise TypeError(f"{name!r}: expected a number for each of {len(models)} ingredients")
        options: dict[str, Any] = {
            "facts": {key: value for key, value in record.items() if key not in _COMMON},
            "like": record["like"],
            "dtype": None if record["dtype"] == "as the ingredients" else record["dtype"],
            "force": force,
            **{option: record[option] for option in _OPTIONS if option in record},
        }
        soup: Soup
        if record["method"] == "fisher":
            fishers = [one["path"] for one in record["fisher"]]
            soup = Fisher(models, output, fisher=fishers, weights=weights, floor=record["floor"], **options)
        else:
            divisor = record["divisor"] if "coefficients" not in record else 1.0
            if not _is_finite(divisor) or divisor == 0:
                raise TypeError(f"the divisor is {divisor!r}")
            soup = Soup(models, output, weights=weights, divisor=divisor, method=record["method"], **options)
        averaged = {name for name, entry in soup.combined.items() if entry.dtype in AVERAGED}
        if isinstance(weights, dict) and (wrong := averaged ^ weights.keys()):
            raise TypeError(f"coefficients: {min(wrong)!r} is missing, or no tensor to be averaged")
        soup.known = Path(path), [ingredient["checksum"] for ingredient in ingredients]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is not the record of a soup: {type(error).__name__}: {error}") from error
    return soup


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # NaN is not, either
