"""A soup cooked again from its record, ``soup.json``: of the same bytes, or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from averaging.checkpoints import Checkpoint
from averaging.checkpoints.files import read_json
from averaging.soups.soup import Soup

# What a record holds besides the facts of its method.
_COMMON = ("method", "ingredients", "divisor", "coefficients", "like", "dtype", "versions")
_OPTIONS = ("only", "skip", "allow_nonfinite")


def is_record(content: Mapping[str, Any]) -> bool:
    """Whether this is what `averaging.soups.soup.Soup.record` gives."""
    return content.keys() >= {"method", "ingredients", "like", "dtype", "versions"}


class Recorded(Soup):
    """The soup of which ``path`` is the record: whatever method or search made it, the same sum of the same tensors.

    The versions in its own record are those of today; all else is as it was.

    Raises:
        ValueError: the record is damaged, or an ingredient has changed since.
        FileNotFoundError: an ingredient is not where it was.
    """

    def __init__(
        self, path: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, *, force: bool = False
    ) -> None:
        self.path, record = Path(path), read_json(Path(path))
        try:
            ingredients = record["ingredients"]
            self.checksums = [ingredient["checksum"] for ingredient in ingredients]
            by_tensor = record.get("coefficients")
            models = [Checkpoint(ingredient["path"]) for ingredient in ingredients]
            super().__init__(
                models,
                output,
                weights=by_tensor or [ingredient["weight"] for ingredient in ingredients],
                divisor=record["divisor"] if by_tensor is None else 1.0,
                method=record["method"],
                facts={key: value for key, value in record.items() if key not in _COMMON},
                like=record["like"],
                dtype=None if record["dtype"] == "as the ingredients" else record["dtype"],
                force=force,
                **{option: record[option] for option in _OPTIONS if option in record},
            )
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} is not the record of a soup: {type(error).__name__}: {error}") from error

    def _judge(self, checksums: Sequence[str]) -> None:
        for ingredient, now, then in zip(self.ingredients, checksums, self.checksums, strict=True):
            if now != then:
                raise ValueError(f"{ingredient.path} has changed since {self.path} was written: its checksum differs")
