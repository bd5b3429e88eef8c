"""The same bad inputs for every method of `soup`, whichever of its files they are; see `hostile`."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from unittest import mock

from hostile import CHANGED, NAN, Harm, add, raw, refuse, write
from hostile_formats import FIRST, LORA, PLACES, SECOND, nested

A, B = {"shape": [2, 3]}, {"shape": [4, 2]}
WIDTHS = {"F32": 4, "F16": 2, "I64": 8, "BOOL": 1}


def model(first: str, second: str, value: float = 1.0, **changes: dict | None) -> bytes:
    """A model of two tensors; ``changes`` are in ``a`` and ``b``, or further ones."""
    tensors, data = {}, b""
    for name, tensor in ({"a": A, "b": B} | changes).items():
        if tensor is not None:
            kind, shape = tensor.get("dtype", "F32"), tensor["shape"]
            count = prod(shape)
            numbers = [value * (1 + i % 3) for i in range(count)]
            numbers[-1:] = [tensor.get("last", numbers[-1])]
            part = struct.pack(f"<{count}f", *numbers) if kind == "F32" else bytes(WIDTHS[kind] * count)
            place = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(part)]}
            tensors[{"a": first, "b": second}.get(name, name)] = place
            data += part
    return raw(tensors, data)


def edited(first: str, second: str, edit: Callable[[dict], object]) -> bytes:
    """The same with another header."""
    content = model(first, second)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    made = edit(header)
    return raw(header if made is None else made, content[8 + length :])


def measure(weights: object) -> float:
    """What searches evaluate."""
    return sum(float(weights[name].double().sum()) for name in weights)


def task() -> tuple:
    """What is learned."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (torch.nn.Parameter(torch.ones(one["shape"])) for one in (A, B))

    return Model(), lambda model, batch: (model.a.sum() - batch) ** 2 + model.b.square().sum(), [1.0]


@dataclass(frozen=True)
class Row:
    """A method: the arguments, which of its files is bad, and the inputs that are none of its concern."""

    arguments: list
    bad: str = "step-2.safetensors"
    fine: tuple[str, ...] = ()
    kind: str = "ingredient"
    prepare: Callable[[Path], object] = field(default=lambda root: None)


FILES = ["step-1.safetensors", "step-2.safetensors"]
INIT = ["--init", "base.safetensors"]
EVALUATE = ["--evaluate", "hostile_methods:measure"]
NUMBERS = ("NaN", "infinity", "minus infinity")


def recipe(text: str) -> Callable[[Path], object]:
    return lambda root: write(root / "soup.yaml", text.encode())


ADAPTERS = ["step-1", "step-2"]
COMMANDS: dict[str, list] = {
    "uniform": FILES,
    "weighted": [*FILES, "--weights", "1,3"],
    "weights that stand for a decay": [*FILES, "--weights", "cosine"],
    "ema": [*FILES, "--method", "ema", "--decay", "0.9"],
    "wise-ft": ["step-2.safetensors", "--method", "wise-ft", *INIT],
    "task": [*FILES, "--method", "task", *INIT],
    "slerp": [*FILES, "--method", "slerp", *INIT],
    "warp": [*FILES, "--method", "warp", *INIT],
    "model-stock": [*FILES, "--method", "model-stock", *INIT],
    "rewarded": [*FILES, "--method", "rewarded"],
    "fisher": [*FILES, "--method", "fisher"],
    "greedy": [*FILES, "--method", "greedy", *EVALUATE],
    "ranked": [*FILES, "--method", "ranked", "--top", "2", *EVALUATE],
    "learned": [*FILES, "--method", "learned", "--loss", "hostile_methods:task", "--epochs", "1"],
    "learned by layer": [
        *FILES,
        *("--method", "learned", "--loss", "hostile_methods:task", "--epochs", "1", "--per", "layer"),
    ],
    "search": [*FILES, "--method", "search", "--evaluations", "4", *EVALUATE],
    "lm-cocktail": [*FILES, "--method", "lm-cocktail", *EVALUATE],
    "lm-cocktail with a target": [*FILES, "--method", "lm-cocktail", "--target", "base.safetensors", *EVALUATE],
    "sweep": [*FILES, "--sweep", "window=1,2", *EVALUATE],
    "a range": [*FILES, "--method", "warp", *INIT, "--eta", "0,1"],
    "a range that is evaluated": ["step-2.safetensors", "--method", "wise-ft", *INIT, "--alpha", "0,1", *EVALUATE],
    "inspect": ["inspect", *FILES],
    "inspect with an initial model": ["inspect", *FILES, *INIT],
    "inspect with lines between": ["inspect", *FILES, *EVALUATE, "--points", "3"],
}
ROWS: dict[str, Row] = {name: Row(arguments) for name, arguments in COMMANDS.items()}
ROWS |= {
    "--recipe": Row(["--recipe", "soup.yaml"], prepare=recipe("ingredients: [step-1.safetensors, step-2.safetensors]")),
    "--recipe with layers": Row(
        ["--recipe", "soup.yaml"],
        prepare=recipe("ingredients: [step-1.safetensors, step-2.safetensors]\nlayers: {a: {weights: [1, 2]}}"),
    ),
    "--lora factors": Row([*ADAPTERS, "--lora", "factors"], "step-2/adapter_model.safetensors"),
    "--lora product": Row([*ADAPTERS, "--lora", "product"], "step-2/adapter_model.safetensors", ("another dtype",)),
    "the initial model of wise-ft": Row(COMMANDS["wise-ft"], "base.safetensors", kind="other"),
    "the initial model of task": Row(COMMANDS["task"], "base.safetensors", kind="other"),
    "the initial model of slerp": Row(COMMANDS["slerp"], "base.safetensors", kind="other"),
    "the initial model of warp": Row(COMMANDS["warp"], "base.safetensors", kind="other"),
    "the initial model of model-stock": Row(COMMANDS["model-stock"], "base.safetensors", kind="other"),
    "the initial model of inspect": Row(COMMANDS["inspect with an initial model"], "base.safetensors", kind="other"),
    "the target of lm-cocktail": Row(COMMANDS["lm-cocktail with a target"], "base.safetensors", kind="other"),
    "a Fisher information": Row(
        COMMANDS["fisher"], "step-2.fisher.safetensors", ("another dtype", "integers", "booleans"), "other"
    ),
    "--like": Row(
        [*FILES, "--like", "base.safetensors"],
        "base.safetensors",
        ("another dtype", "a tensor more", *NUMBERS, "a broken disk", "cut off while it is read"),
        "other",
    ),
}

# --- what is wrong with the file -------------------------------------------------------------------------------------

NO_FILE = "not a valid safetensors file"
CONTENTS: dict[str, tuple[Callable[[str, str], bytes], str]] = {
    "empty": (lambda a, b: b"", NO_FILE),
    "cut off in its header": (lambda a, b: model(a, b)[:20], NO_FILE),
    "cut off in its numbers": (lambda a, b: model(a, b)[:-1], NO_FILE),
    "with a byte more": (lambda a, b: model(a, b) + b"\0", NO_FILE),
    "of nonsense": (lambda a, b: b"\xff" * 100, NO_FILE),
    "with a header beyond its end": (lambda a, b: b"\xff\xff\0\0\0\0\0\0" + model(a, b)[8:], NO_FILE),
    "with a nested header": (lambda a, b: raw(json.dumps(nested(900)).encode()), NO_FILE),
    "with tensors that overlap": (
        lambda a, b: edited(a, b, lambda header: header[b].update(data_offsets=[20, 52])),
        NO_FILE,
    ),
    "with a hole": (lambda a, b: edited(a, b, lambda header: header[b].update(data_offsets=[28, 60])), NO_FILE),
    "with an unknown dtype": (lambda a, b: edited(a, b, lambda header: header[b].update(dtype="F33")), NO_FILE),
    "with a shape beyond 64 bits": (
        lambda a, b: edited(a, b, lambda header: header[b].update(shape=[2**64, 0])),
        NO_FILE,
    ),
    "without tensors": (lambda a, b: raw({}, b""), "no tensors"),
    "a pickle": (lambda a, b: __import__("pickle").dumps(Harm("harmed")), NO_FILE),
    "another shape": (lambda a, b: model(a, b, b={"shape": [2, 4]}), "B"),
    "a shape that would broadcast": (lambda a, b: model(a, b, b={"shape": [1, 2]}), "B"),
    "a flat shape": (lambda a, b: model(a, b, b={"shape": [8]}), "B"),
    "another dtype": (lambda a, b: model(a, b, b=B | {"dtype": "F16"}), "B"),
    "integers": (lambda a, b: model(a, b, b=B | {"dtype": "I64"}), "B"),
    "booleans": (lambda a, b: model(a, b, b=B | {"dtype": "BOOL"}), "B"),
    "a tensor missing": (lambda a, b: model(a, b, b=None), "B"),
    "a tensor more": (lambda a, b: model(a, b, extra={"shape": [2]}), "'extra'"),
    "NaN": (lambda a, b: model(a, b, b=B | {"last": NAN}), "B"),
    "infinity": (lambda a, b: model(a, b, b=B | {"last": float("inf")}), "B"),
    "minus infinity": (lambda a, b: model(a, b, b=B | {"last": float("-inf")}), "B"),
}
# What is done to it: takes its path, and patches that are in force while the command runs.
DEEDS: dict[str, tuple[Callable[[Path, list], object], str]] = {
    name: (lambda path, stack, make=make: make(path), "") for name, make in PLACES.items()
}


def unreadable(path: Path, stack: list) -> None:
    path.touch()
    refuse(stack, path)


def enormous(path: Path, stack: list) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def broken(path: Path, stack: list) -> None:
    path.write_bytes(CONTENTS["a good one"][0](*names_of(path)))
    real, inode = os.preadv, os.stat(path).st_ino

    def fail(descriptor: int, *arguments: object) -> int:
        if os.fstat(descriptor).st_ino == inode:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, *arguments)

    stack.append(mock.patch("os.preadv", fail))


def shrinking(path: Path, stack: list) -> None:
    from averaging.checkpoints import files

    path.write_bytes(CONTENTS["a good one"][0](*names_of(path)))
    real, calls = files.read_into, itertools.count()

    def read_into(*arguments: object) -> None:
        if next(calls) == 0:
            os.truncate(path, 20)
        real(*arguments)

    CHANGED.add(str(path.relative_to(Path.cwd())))
    stack.append(mock.patch.object(files, "read_into", read_into))


DEEDS |= {
    "missing": (lambda path, stack: None, ""),
    "unreadable": (unreadable, "permission denied"),
    "a terabyte of nothing": (enormous, NO_FILE),
    "a broken disk": (broken, "input/output error"),
    "cut off while it is read": (shrinking, ""),
}


def names_of(path: Path) -> tuple[str, str]:
    return (FIRST, SECOND) if path.name.startswith("adapter") else ("a", "b")


GOOD = {name: model("a", "b", i + 1.0) for i, name in enumerate(("base", "step-1", "step-2"))}
GOOD_ADAPTERS = {name: model(FIRST, SECOND, i + 1.0) for i, name in enumerate(ADAPTERS)}


def good(root: Path, row: Row) -> None:
    """Good files of the kind that the method takes."""
    if "--lora" in row.arguments:
        for name, content in GOOD_ADAPTERS.items():
            write(root / name / "adapter_model.safetensors", content)
            write(root / name / "adapter_config.json", json.dumps(LORA).encode())
    else:
        for name, content in GOOD.items():
            write(root / f"{name}.safetensors", content)
            write(root / f"{name}.fisher.safetensors", GOOD["base"]) if "fisher" in row.arguments else None
    row.prepare(root)


def bad(label: str, row: Row, name: str, make: Callable[[Path, list], object], says: str) -> None:
    def build(root: Path, stack: list) -> list:
        good(root, row)
        (root / row.bad).unlink()
        make(root / row.bad, stack)
        return list(row.arguments)

    if name not in row.fine:
        adapters = row.bad.startswith("step-2/")
        where = row.bad.partition("/")[0] if name != "a tensor more" else ""
        says = ("q_proj" if adapters else "'b'") if says == "B" else says
        add("every method", f"{label}: {name}", build, where, says)


CONTENTS["a good one"] = (lambda a, b: model(a, b, 3.0), "")
for label, row in ROWS.items():
    for name, (make, says) in CONTENTS.items():
        if name != "a good one":
            content = make(*names_of(Path(row.bad)))
            bad(label, row, name, lambda path, stack, content=content: path.write_bytes(content), says)
    for name, (deed, says) in DEEDS.items():
        bad(label, row, name, deed, says)


# --- where the result goes -------------------------------------------------------------------------------------------


def full(stack: list) -> None:
    stack.append(mock.patch("os.pwrite", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))


def no_room(stack: list) -> None:
    usage = shutil.disk_usage("/")
    stack.append(mock.patch("shutil.disk_usage", return_value=usage._replace(free=10)))


def no_permission(stack: list) -> None:
    stack.append(mock.patch("os.access", return_value=False))  # root may do everything


def output(label: str, row: Row, name: str, where: list, says: str, patch: Callable = lambda stack: None) -> None:
    def build(root: Path, stack: list) -> list:
        good(root, row)
        (root / "loop").symlink_to("loop")
        os.mkfifo(root / "pipe")
        patch(stack)
        return [*row.arguments, *where]

    add("every method's output", f"{label}: {name}", build, says)


for label, row in ROWS.items():
    if row.arguments[0] == "inspect":
        continue
    input_ = row.bad.partition("/")[0]
    several = label == "a range"
    adapters = "--lora" in row.arguments
    where = ["-o", f"{input_}/x" if several else input_, "--force"]
    output(label, row, "over an input", where, input_)
    if "--recipe" in row.arguments:
        output(label, row, "over the recipe", ["-o", "soup.yaml", "--force"], "soup.yaml")
        output(label, row, "around the recipe", ["-o", ".", "--force"], "")
    if row.kind != "ingredient":
        continue
    output(label, row, "there already", ["-o", "old"], "exists already") if not several else None
    output(label, row, "in a pipe", ["-o", "pipe", "--force"], "pipe")
    output(label, row, "in a device", ["-o", "/dev/full", "--force"], "/dev/full")
    output(label, row, "below a device", ["-o", "/dev/null/out"], "/dev/null")
    output(label, row, "through a loop", ["-o", "loop/out"], "loop")
    output(label, row, "with a name too long", ["-o", "x" * 300], "name too long")
    output(label, row, "with NUL", ["-o", "x\0y"], "null")
    if not several:
        output(label, row, "of another kind", ["-o", "out.safetensors" if adapters else "out.ckpt"], "out.")
    output(label, row, "of an unknown dtype", ["--dtype", "int8"], "unknown dtype")
    output(label, row, "on a full disk", [], "no space left", full)
    output(label, row, "without room", [], "room", no_room)
    output(label, row, "without permission", [], "permission", no_permission)
    output(label, row, "with an input twice", [input_], "")


# --- options, of the command and in a recipe -------------------------------------------------------------------------

NUMBER = ("nan", "inf", "-inf", "1e400", "x", "", "9" * 5000, "0x10", "1_0_", "１２ x")
WEIGHTS = ("nan,1", "inf,1", "0,0", "-1,-1", "1", "1,2,3", "1,", "1e400,1", "x,1", "1;2", "")
RANGE = (
    "0:1:0",
    "0:1:nan",
    "0:1:-1",
    "1:0:0.1",
    "0:1:1e-9",
    "0:1e999999999:1",
    "0:1:1e-999999999",
    ":::",
    "0:1",
    "0,,1",
)
COUNT = ("0", "-1", "1.5", "nan", "x", "", "9" * 5000)
WRONG: dict[str, dict[str, tuple[str, ...]]] = {
    "uniform": {
        "--weights": (*WEIGHTS, "1e308,1e308", "decreasing"),
        "--last": (*COUNT, "3", "9" * 30),
        "--every": (*COUNT, "2", "9" * 30),
        "--only": ("(", "[", "*", "nothing"),
        "--skip": ("(", ".", "(?P<x>"),
        "--dtype": ("int8", "", "float", "bfloat16\n"),
        "--like": ("", "gone", "/dev/zero", "x\0y", "soup.json"),
        "--method": ("", "UNIFORM", "x\ny"),
        "--alpha": ("0.5",),
        "--at": ("1", "x", ""),
        "--top": ("1",),
    },
    "ema": {"--decay": (*NUMBER, "-0.1", "1", "2")},
    "wise-ft": {"--alpha": (*NUMBER, *RANGE, "-0.1", "1.1"), "--init": ("", "gone", "step-2.safetensors", "/dev/zero")},
    "task": {"--scale": (*NUMBER, *RANGE, "1e308"), "--weights": (*WEIGHTS[:2], *WEIGHTS[4:], "1e308,1e308")},
    "slerp": {"--eta": (*NUMBER, *RANGE, "-1", "2"), "--weights": (*WEIGHTS, "1e308,1e308", "cosine")},
    "warp": {"--eta": (*NUMBER, *RANGE, "-1", "2"), "--slerp-weights": (*WEIGHTS, "1e308,1e308")},
    "rewarded": {"--lambda": (*NUMBER, *RANGE, "-1", "2")},
    "fisher": {
        "--floor": (*NUMBER, "-1", "1e308"),
        "--weights": (*WEIGHTS, "1e308,1e308", "cosine"),
        "--fisher": ("gone", "step-1.safetensors", ""),
    },
    "greedy": {"--plot": ("x.txt", "/dev/null/x.png"), "--evaluate-command": ("true",)},
    "ranked": {"--top": (*COUNT, "3")},
    "learned": {
        "--lr": (*NUMBER, "0", "-1"),
        "--epochs": COUNT,
        "--seed": ("x", "1.5", "9" * 30, "-" + "9" * 30),
        "--loss": (
            "",
            "x",
            ":",
            "hostile_methods:",
            "hostile_methods:gone",
            "gone:task",
            "../x:task",
            "os:_exit.x",
            "x\0y:z",
        ),
        "--per": ("tensor", ""),
        "--normalize": ("sum",),
    },
    "search": {
        "--evaluations": COUNT,
        "--seed": ("x", "-1"),
        "--evaluate": (
            "",
            "hostile_methods:gone",
            "perplexity:",
            "perplexity:gone.txt",
            "accuracy:old",
        ),
    },
    "lm-cocktail": {"--temperature": (*NUMBER, "0", "-1", "1e-320"), "--alpha": ("0.5",)},
    "lm-cocktail with a target": {"--alpha": (*NUMBER, "-1", "2", "0,1"), "--target": ("gone", "step-1.safetensors")},
    "sweep": {
        "--sweep": (
            *(
                "window",
                "window=",
                "window=x",
                "window=0",
                "window=-1",
                "window=nan",
                "window=" + "9" * 30,
                "window=1,,2",
            ),
            *("decay=nan", "decay=2", "decay=-1", "spacing=0", "weights=x", "weights=", "post-hoc=0.1", "size=1", "=1"),
        ),
        "--at": ("0", "-1", "99", "x", "", "9" * 30, "1,"),
    },
    "inspect": {"--only": ("(", "nothing"), "--init": ("gone", "step-1.safetensors"), "--points": ("5",)},
    "inspect with lines between": {"--points": COUNT, "--cache": ("/dev/null/x", "x\0y")},
    "--lora product": {"--lora-rank": COUNT, "--weights": (*WEIGHTS, "1e308,1e308")},
}
for label, options in WRONG.items():
    row = ROWS[label]
    for option, values in options.items():
        for value in values:
            kept = list(row.arguments)
            if option in kept:  # said once
                at = kept.index(option)
                del kept[at : at + 2]

            def wrong(
                root: Path, stack: list, row: Row = row, kept: list = kept, told: str = f"{option}={value}"
            ) -> list:
                good(root, row)
                return [*kept, told]

            shown = value if len(value) < 30 else f"{value[:9]}... of {len(value)}"
            add("options", f"{label}: {option}={shown}", wrong, "")
            if kept[0] == "inspect" or option in ("--method", "--sweep") or not value.isascii():
                continue

            def written(
                root: Path, stack: list, row: Row = row, kept: list = kept, option: str = option, v: str = value
            ) -> list:
                good(root, row)
                names = list(itertools.takewhile(lambda word: not word.startswith("--"), kept))
                given = dict(zip(kept[len(names) :: 2], kept[len(names) + 1 :: 2], strict=True)) | {option: v}
                lines = [f"ingredients: {json.dumps(names)}"]
                for name, text in given.items():
                    if name == "--sweep":
                        text = "{" + text.replace("=", ": [") + "]}"
                    lines.append(f"{name[2:]}: {text if name != option else plain(text)}")
                write(root / "soup.yaml", "\n".join(lines).encode())
                return ["--recipe", "soup.yaml"]

            add("options in recipes", f"{label}: {option}={shown}", written, "soup.yaml")


def plain(text: str) -> str:
    """As a value that YAML takes for a number, where it is one, and for a text elsewhere."""
    return text if text.replace(".", "").replace("-", "").isdigit() else json.dumps(text)


for kind in ("perplexity", "accuracy"):
    for name, make in PLACES.items():

        def evaluated(root: Path, stack: list, kind: str = kind, make: Callable = make) -> list:
            good(root, ROWS["greedy"])
            make(root / "text.jsonl")
            return [*FILES, "--method", "greedy", "--evaluate", f"{kind}:text.jsonl"]

        add("options", f"{kind} of a text: {name}", evaluated, "")


# --- recipes that are no files, or no plain values -------------------------------------------------------------------

for suffix in ("yaml", "json"):
    for name, make in PLACES.items():

        def placed(root: Path, stack: list, suffix: str = suffix, make: Callable = make) -> list:
            make(root / f"soup.{suffix}")
            return ["--recipe", f"soup.{suffix}"]

        add("recipes", f"soup.{suffix}: {name}", placed, f"soup.{suffix}")
TWO = "ingredients: [step-1.safetensors, step-2.safetensors]\n"
for name, text in {
    "a tag for a number": "decay: !!float x",
    "a tag for a text": "last: !!str 2",
    "a tag for a name": "method: !!python/name:os.mkdir",
    "a tag for a module": "method: !!python/module:os",
    "a tag for an object": "method: !!python/object/new:os.mkdir [harmed]",
    "a tag for a map": "method: !!omap [a: b]",
    "a tag of its own": "%TAG ! tag:x.org,2000:\n---\nmethod: !y z",
    "a version of YAML": "%YAML 9.9\n---\nmethod: uniform",
    "a key twice in a layer": "layers: {a: {weights: [1, 2], weights: [2, 1]}}",
    "a layer twice": "layers: {a: {weights: [1, 2]}, a: {weights: [2, 1]}}",
    "a layer of NaN": "layers: {a: {weights: [.nan, 1]}}",
    "a layer of infinity": "layers: {a: {weights: [.inf, 1]}}",
    "a layer that adds up to nothing": "layers: {a: {weights: [1, -1]}}",
    "a layer of numbers too large": "layers: {a: {weights: [1e308, 1e308]}}",
    "a layer in a layer": "layers: {a: {layers: {b: {weights: [1, 2]}}}}",
    "10,000 layers": "layers: {" + ", ".join(f"a{i}: {{weights: [1, 2]}}" for i in range(10_000)) + "}",
    "a merge of a list": "<<: [{method: task}]",
    "an alias of nothing": "method: *x",
    "a date": "method: 2001-01-01",
    "a time": "last: 12:30:45",
    "a number with a comma": "decay: 0,9",
    "yes": "allow-nonfinite: 1",
    "a text of two lines": "only: |\n  (\n  x",
    "a text with surrogates": 'only: "\\ud800("',
    "a recipe in a recipe": "recipe: soup.yaml",
    "an option of the run": "force: true",
    "debug": "debug: true",
    "paths": "paths: [a]",
    "layers of a search": "method: greedy\nlayers: {a: {weights: [1, 2]}}",
    "an output over an ingredient": "output: step-2.safetensors",
    "an output over itself": "output: soup.yaml",
    "an output above": "output: .",
    "an output with NUL": 'output: "x\\0y"',
    "an output that is a list": "output: [a, b]",
    "an initial model with NUL": 'method: task\ninit: "x\\0y"',
    "an initial model that is a device": "method: task\ninit: /dev/zero",
    "a sweep that is a list": "sweep: [1, 2]",
    "a sweep of levels": "sweep: {window: {a: 1}}",
    "a sweep of NaN": "sweep: {window: [.nan]}",
    "a sweep of nothing": "sweep: {window: []}",
}.items():

    def said(root: Path, stack: list, text: str = text) -> list:
        good(root, ROWS["uniform"])
        directives, dashes, rest = text.rpartition("---\n")
        write(root / "soup.yaml", (directives + dashes + TWO + rest).encode())
        return ["--recipe", "soup.yaml", *(() if "output" in text else ("-o", "old")), "--force"]

    add("recipes", f"values: {name}", said, "soup.yaml")
