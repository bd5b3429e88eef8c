"""A recipe for the command: its options in a YAML or JSON file, and what holds in some tensors only. No torch.

    method: slerp
    init: base/
    ingredients: [ft-a/, ft-b/]
    eta: 0.8
    layers:
      embed|lm_head: {eta: 0}
      'layers\\.[0-3]\\.': {weights: [3, 1]}
    output: merged/

A key is an option's long name, ``ingredients`` are its PATHs. Paths are relative to the recipe's folder. Nothing but
plain values is read: no tags, no anchors, no key twice, and every key and type is checked.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from averaging.checkpoints.files import open_regular
from averaging.soups.measures import MEASURES

LARGEST = 1 << 20
DEEPEST = 10
MOST, LONGEST = 20_000, 1000
"""The bytes that a recipe may have, the levels, the values, and the letters of a value outside of quotes; YAML takes
time and stack for more."""

# Options that hold paths, by their place in the parsed result; and those that are the command line's alone.
_PATHS = ("paths", "init", "like", "output", "plot", "fisher", "target")
_RUN = ("recipe", "dry_run", "force", "quiet", "debug", "help", "version")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


@dataclass(frozen=True)
class Value:
    """A value of the recipe: mappings hold further ones."""

    value: Any
    place: str
    """Where it stands: ``soup.yaml, line 3: eta``."""


@dataclass(frozen=True)
class Layer:
    """Options that hold for the tensors in whose names the pattern is found, and the place where they stand."""

    pattern: str
    options: dict[str, Any]
    place: str


def read(path: str | os.PathLike[str], parser: argparse.ArgumentParser) -> tuple[dict[str, Any], list[Layer]]:
    """The options of the recipe in the file ``path``, named as in ``parser``'s results, and its layers.

    Raises:
        ValueError: it is no recipe; the message names the line and the key.
        OSError: it cannot be read.
    """
    actions = {word.removeprefix("--"): a for a in parser._actions for word in a.option_strings if word[:2] == "--"}
    actions["ingredients"] = next(action for action in parser._actions if action.dest == "paths")
    actions = {key: action for key, action in actions.items() if action.dest not in _RUN}
    folder = os.path.dirname(os.fspath(path))
    options: dict[str, Any] = {}
    layers = []
    for key, value in _load(Path(path)).items():
        if key == "layers":
            for pattern, settings in _mapping(value).items():
                own = {}
                for name, setting in _mapping(settings).items():
                    action = _known(name, setting, actions)
                    own[action.dest] = _parsed(action, setting)
                layers.append(Layer(pattern, own, settings.place))
            continue
        action = _known(key, value, {**actions, "layers": None})
        if action.dest in options:
            raise ValueError(f"{value.place}: said already by another key")
        parsed = _parsed(action, value)
        if parsed is None:
            continue
        if action.dest in _PATHS:
            join = partial(os.path.join, folder)
            parsed = list(map(join, parsed)) if isinstance(parsed, list) else join(parsed)
        if action.dest == "evaluate" and (name := parsed.partition(":"))[0] in MEASURES:
            parsed = f"{name[0]}:{os.path.join(folder, name[2])}"
        options[action.dest] = parsed
    return options, layers


def _known(key: str, value: Value, actions: Mapping[str, Any]) -> argparse.Action:
    if key not in actions:
        raise ValueError(f"{value.place}: unknown key; known are {', '.join(sorted(actions))}")
    action: argparse.Action = actions[key]
    return action


def _parsed(action: argparse.Action, given: Value) -> Any:
    """What argparse would have made of the value; ``None`` for a flag that is false."""
    value, kind = given.value, action.type

    def demand(condition: bool, wanted: str) -> None:
        if not condition:
            got = "a mapping" if isinstance(value, dict) else repr(value)
            raise ValueError(f"{given.place}: must be {wanted}, not {got}")

    if action.nargs == 0:
        demand(isinstance(value, bool), "true or false")
        return action.const if value else None
    if isinstance(action, argparse._AppendAction):
        return [_through(kind, f"{name}={_joined(each)}", each) for name, each in _mapping(given).items()]
    if action.nargs == "+" and kind is not None:
        return [_through(kind, _joined(given), given)]
    if action.nargs in ("+", "*"):
        texts = value if isinstance(value, list) else [value]
        demand(bool(texts) and all(isinstance(text, str) for text in texts), "text or a list of texts")
        return texts
    if kind is int:
        demand(type(value) is int, "a whole number")
        return value
    if kind is float:
        demand(type(value) in (int, float, str), "a number")
        return _through(float, str(value), given)  # YAML takes 1e-3, without a point, for text
    if kind is None:
        demand(isinstance(value, str), "text")
        demand(action.choices is None or value in action.choices, f"one of {', '.join(action.choices or ())}")
        return value
    return _through(kind, _joined(given), given)


def _joined(given: Value) -> str:
    """A list of numbers or texts as it would be given to the command: separated by commas."""
    items = given.value if isinstance(given.value, list) else [given.value]
    if not items or not all(isinstance(item, int | float | str) and not isinstance(item, bool) for item in items):
        raise ValueError(f"{given.place}: must be a number, text, or a list of them, not {given.value!r}")
    return ",".join(map(str, items))


def _through(kind: Any, text: str, given: Value) -> Any:
    try:
        return kind(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{given.place}: {error}") from error


def _mapping(given: Value) -> dict[str, Value]:
    if not isinstance(given.value, dict) or not given.value:
        raise ValueError(f"{given.place}: must be a mapping with a line for each key")
    return given.value


def _load(path: Path) -> dict[str, Value]:
    import yaml  # type: ignore[import-untyped]

    with open(open_regular(path), "rb") as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise ValueError(f"{path} has more than {LARGEST} bytes: that is no recipe")
    try:
        depth = 0
        for count, event in enumerate(yaml.parse(text, yaml.SafeLoader)):
            place = f"{path}, line {event.start_mark.line + 1}"
            if getattr(event, "anchor", None) is not None:
                raise ValueError(f"{place}: anchors and aliases are not allowed")
            plain = isinstance(event, yaml.ScalarEvent) and event.style is None
            if count > MOST or (plain and len(event.value) > LONGEST):
                raise ValueError(f"{place}: this is too long for a recipe")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"{place}: this is nested too deeply for a recipe")
        loader = yaml.SafeLoader(text)
        return _mapping(_value(loader, loader.get_single_node(), f"{path}"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"{path}{line}: this is not valid YAML: {str(problem).splitlines()[0]}") from error


def _value(loader: Any, node: Any, place: str) -> Value:
    """A node of YAML with the places of what is in it."""
    if node is None or node.id != "mapping":
        if node is not None and node.id == "scalar" and node.tag in _NUMBERS and ":" in node.value:
            return Value(node.value, place)  # a range: YAML takes 0:1:0.5 for 60.5, in the base 60
        try:
            return Value(None if node is None else loader.construct_object(node, deep=True), place)
        except (ValueError, OverflowError) as error:  # a date or a number that is none
            raise ValueError(f"{place}: {error}") from error
    values: dict[str, Value] = {}
    file = place.partition(", line ")[0]
    for key, value in node.value:
        if key.tag != "tag:yaml.org,2002:str":
            raise ValueError(f"{file}, line {key.start_mark.line + 1}: the key must be text: put it in quotes")
        below = f"{file}, line {key.start_mark.line + 1}: {key.value}"
        if key.value in values:
            raise ValueError(f"{below} appears twice")
        values[key.value] = _value(loader, value, below)
    return Value(values, place)
