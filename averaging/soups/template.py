"""The whole model for a soup of ingredients that hold only some of its weights, such as a trajectory's. No torch."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Sequence

from averaging.checkpoints import Checkpoint
from averaging.checkpoints.checkpoint import in_adapter_file
from averaging.checkpoints.files import FLOATS, opening
from averaging.checkpoints.finding import TEMPLATE


def find_template(
    ingredients: Sequence[Checkpoint], like: str | os.PathLike[str] | Checkpoint | None
) -> Checkpoint | None:
    """The model that a soup of ``ingredients`` is to be like, if it is not just like them.

    Raises:
        ValueError: ``like`` does not hold what the ingredients hold.
    """
    if like is not None:
        template = like if isinstance(like, Checkpoint) else Checkpoint(like)
        _names(template, ingredients[-1])
        return template
    beside = ingredients[-1].path.parent / TEMPLATE
    if ingredients[-1].kind != "safetensors" or not beside.is_dir():
        return None
    template = Checkpoint(beside)
    try:
        names = _names(template, ingredients[-1])
    except ValueError as error:
        warnings.warn(f"the soup holds only the averaged weights: {error}", stacklevel=2)
        return None
    if any(name.endswith(".running_var") for name in template.entries.keys() - names.values()):
        warnings.warn(
            f"the soup has the BatchNorm statistics of {template.path}, from the start of training: recompute them "
            "with averaging.recalibrate, take them from a later checkpoint with --like (like=), or store them with "
            "buffers=True",
            stacklevel=2,
        )
    return template


def named_like(template: Checkpoint, ingredients: Iterable[Checkpoint]) -> list[Checkpoint]:
    """The ingredients, with their tensors under the names that they have in ``template``."""
    renamed = []
    for ingredient in ingredients:
        names = _names(template, ingredient)
        if [*names.items()] != [(name, name) for name in ingredient.entries]:
            ingredient = copy.copy(ingredient)
            ingredient.entries = {known: ingredient.entries[name] for name, known in names.items()}
        renamed.append(ingredient)
    return renamed


def _names(template: Checkpoint, ingredient: Checkpoint) -> dict[str, str]:
    """The name of each of the ingredient's tensors in ``template``, which need not hold the copies that ties make."""
    names = {}
    for name, entry in ingredient.entries.items():
        known = name
        if template.kind == "peft" and name not in template.entries:
            known = in_adapter_file(name)
        elif name not in template.entries and (inner := name.partition(".")[2]) in template.entries:
            known = inner  # of a LightningModule, whose attribute the model is
        if known not in template.entries:
            if any(_same(ingredient, name, other) for other in ingredient.entries if other != name):
                continue
            raise ValueError(
                f"{template.path} does not hold {name!r}, which {ingredient.path} does: it is another model's, or its "
                "file uses other names than the model; averaging.load_into puts a soup of the snapshots into the model"
            )
        if template.entries[known].shape != entry.shape:
            raise ValueError(
                f"tensor {name!r} has shape {list(entry.shape)} in {ingredient.path} but "
                f"{list(template.entries[known].shape)} in {template.path}: it is another model's"
            )
        one, other = entry.dtype, template.entries[known].dtype
        if one != other and not {one, other} <= {*FLOATS}:
            raise ValueError(
                f"tensor {name!r} has dtype {one} in {ingredient.path} but {other} in {template.path}: it is another "
                "model's"
            )
        names[name] = known
    return names


def _same(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two tensors of a checkpoint are bit for bit the same."""
    one, two = checkpoint.entries[name], checkpoint.entries[other]
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    with opening([one, two]) as descriptors:
        size = one.stop - one.start
        for start in range(0, size, 1 << 20):
            pieces = [memoryview(bytearray(min(1 << 20, size - start))) for _ in (one, two)]
            one.read(descriptors, pieces[0], start)
            two.read(descriptors, pieces[1], start)
            if pieces[0] != pieces[1]:
                return False
    return True
