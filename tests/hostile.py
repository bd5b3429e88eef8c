"""Inputs that are malformed or mean harm, each with what it must get; `tests/test_hostile.py` runs them.

A case builds its files in an empty folder, where ``a.safetensors`` is a good ingredient and ``old`` an earlier output,
and returns the arguments of the command. It runs in a process of its own kind, whose memory is limited and which is
killed when it hangs (`Worker`); what the command printed, read, left and changed is looked at there.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import io
import itertools
import json
import os
import pickle
import resource
import select
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

SECONDS = 5  # of the processor, for each case
PATIENCE = 60  # seconds on the clock, after which the process is killed
MEMORY = 400 << 20  # bytes that the command may take beside what the process has
ADDRESSES = 6 << 30


@dataclass(frozen=True)
class Case:
    build: Callable[[Path, list], list]
    says: tuple[str, ...]
    works: bool = False
    """Whether the command shall succeed."""
    compared: bool = True
    """Whether what it makes is then a uniform soup, which an independent reader computes, too."""


CASES: dict[str, dict[str, Case]] = {}


def add(group: str, name: str, build: Callable, *says: str, works: bool = False, compared: bool = True) -> None:
    assert name not in CASES.setdefault(group, {}), name
    CASES[group][name] = Case(build, says, works, compared)


def case(group: str, *says: str, works: bool = False):
    def decorate(build):
        add(group, build.__name__, build, *says, works=works)
        return build

    return decorate


# --- safetensors, written by hand ------------------------------------------------------------------------------------

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "F32", "shape": [5], "data_offsets": [24, 44]}
DATA = struct.pack("<11f", *range(11))


def raw(header: object, data: bytes = DATA, length: int | None = None) -> bytes:
    """A safetensors file with this header: text, or what is turned into JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def write(path: Path, content: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw({"a": A, "b": B}) if content is None else content)
    return path


def folder(path: Path, content: bytes | None = None, **files: object) -> Path:
    """A model folder; ``files`` are JSON by name, without the suffix."""
    write(path / "model.safetensors", content)
    for name, value in ({"config": {"model_type": "x"}} | files).items():
        (path / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def header(name: str, content: object, *says: str, works: bool = False) -> None:
    """A case of a good file and one with this content, or with this header."""

    def build(root: Path, stack: object) -> list:
        made = content() if callable(content) else content
        return ["a.safetensors", write(root / "b.safetensors", made if isinstance(made, bytes) else raw(made)).name]

    add("headers", name, build, *(says if works else ("b.safetensors", *says)), works=works)


def tensor(name: str, *says: str, **fields: object) -> None:
    header(name, {"a": {k: v for k, v in (A | fields).items() if v is not ...}, "b": B}, "'a'", *says)


GOOD = raw({"a": A, "b": B})
TEXT = len(GOOD) - 8 - len(DATA)
for cut in (0, 1, 7, 8, 9, 10, 8 + TEXT // 2, 8 + TEXT - 1, 8 + TEXT, 8 + TEXT + 1, 8 + TEXT + 24, len(GOOD) - 1):
    header(f"cut off after {cut} of {len(GOOD)} bytes", GOOD[:cut], "not a valid safetensors file")
for name, length in {
    "zero": 0,
    "one": 1,
    "short by one": TEXT - 1,
    "long by one": TEXT + 1,
    "beyond the file": 10**6,
    "beyond the limit": 10**9,
    "as a negative number": 2**64 - 1,
    "at the sign bit": 2**63,
}.items():
    header(f"length {name}", raw({"a": A, "b": B}, length=length), "not a valid safetensors file")
header("trailing byte", GOOD + b"\0", "1 bytes at its end")
header("trailing copy", GOOD + GOOD, "at its end")
for name, text in {
    "invalid UTF-8": b'{"a\xff":' + json.dumps(A).encode() + b"}",
    "overlong UTF-8": b'{"a\xc0\xaf":' + json.dumps(A).encode() + b"}",
    "UTF-16": json.dumps({"a": A, "b": B}).encode("utf-16-le"),
    "UTF-32": json.dumps({"a": A, "b": B}).encode("utf-32-be"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps({"a": A, "b": B}).encode(),
    "surrogate in a name": b'{"\\ud800":' + json.dumps(A).encode() + b',"b":' + json.dumps(B).encode() + b"}",
    "surrogate in the metadata": json.dumps({"__metadata__": {"x": "\ud800"}, "a": A, "b": B}).encode(),
    "no JSON": b"hello, world!",
    "only spaces": b" " * 100,
    "unfinished": b'{"a":',
    "two objects": b"{}{}      ",
    "comment": b'{"a": 1} // why',
    "single quotes": b"{'a': 1}",
    "trailing comma": b'{"a": {"dtype": "F32",}}',
    "array": b"[1, 2, 3]",
    "number": b"1234567890",
    "null": b"null      ",
    "nothing in it": b"{}        ",
    "NaN as offset": b'{"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [NaN, 24]}}',
    "infinity as shape": b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 24]}}',
    "number of 10,000 digits": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b'], "data_offsets": [0, 24]}}',
    "control character in a name": b'{"a\n": 1}',
}.items():
    header(name, raw(text))
header("nested lists", lambda: raw(b"[" * 200_000))
header("nested objects", lambda: raw(b'{"a":' * 200_000))
header("nested, and closed", lambda: raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"))
header("10 million lists", lambda: raw(b"[" + b"[]," * 10_000_000 + b"[]]"), "too many")
header("10 million numbers", lambda: raw(b'{"a":[' + b"12345," * 10_000_000 + b"1]}"), "too many")
header("a million empty tensors", lambda: raw(_empty(1_000_000), b""), "too many")
header("20,000 empty tensors", lambda: raw(_empty(20_000), b""), "do not hold the same tensors")
header("one name twice among 50,000", lambda: raw(_empty(50_000)[:-1] + b',"t0":{}}', b""), "'t0' appears twice")
header(
    "duplicate names", raw(b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(A).encode() + b"}"), "'a' appears"
)
header("duplicate fields", raw(b'{"a":{"dtype":"F32","dtype":"F64","shape":[2,3],"data_offsets":[0,24]}}'), "twice")
header("metadata that is text", {"__metadata__": "x", "a": A, "b": B}, "metadata must map text to text")
header("metadata of numbers", {"__metadata__": {"x": 1}, "a": A, "b": B}, "metadata must map text to text")
header("metadata in levels", {"__metadata__": {"x": {}}, "a": A, "b": B}, "metadata must map text to text")
header("metadata of null", {"__metadata__": None, "a": A, "b": B}, "metadata must map text to text")
header("metadata only", lambda: raw({"__metadata__": {"x": "y"}}, b""), "holds no tensors")
header("20 MB of metadata", lambda: raw({"__metadata__": {"x": "y" * 20_000_000}, "a": A, "b": B}), works=True)
header(
    "metadata of 100,000 keys",
    lambda: raw({"__metadata__": dict.fromkeys(map(str, range(100_000)), "")} | {"a": A, "b": B}),
    works=True,
)
header("spaces after the header", raw(json.dumps({"a": A, "b": B}).encode() + b" " * 5000), works=True)
header("tensors in another order", {"b": B, "a": A}, works=True)
header("unknown top-level value", {"a": A, "b": B, "c": 3}, "'c'")
header("tensor that is null", {"a": None, "b": B}, "'a'")
header("tensor that is a list", {"a": [A], "b": B}, "'a'")
header("unknown field", {"a": A | {"x": 1}, "b": B}, "'a'")
for field in A:
    tensor(f"without {field}", **{field: ...})
    for name, value in {
        "null": None,
        "text": "F 32",
        "number": 7,
        "true": True,
        "object": {},
        "nested": [[0], [24]],
    }.items():
        tensor(f"{field} is {name}", **{field: value})
tensor("unknown dtype", "unknown dtype 'F33'", dtype="F33")
tensor("lower-case dtype", "unknown dtype", dtype="f32")
tensor("dtype of 10 MB", "unknown dtype", dtype="F" * 10_000_000)
tensor("dtype too narrow", "cannot lie", dtype="F16")
tensor("dtype too wide", "cannot lie", dtype="F64")
tensor("half a byte", "cannot lie", dtype="F4", shape=[7], data_offsets=[0, 3])
tensor("six bits", "cannot lie", dtype="F6_E2M3", shape=[5], data_offsets=[0, 4])
tensor("negative shape", "impossible shape", shape=[-2, -3])
tensor("fractional shape", "impossible shape", shape=[2.0, 3])
tensor("true shape", "impossible shape", shape=[True, 6])
tensor("text shape", "impossible shape", shape=["2", "3"])
tensor("shape that overflows to right", "shape", shape=[2**62, 4, 6], data_offsets=[0, 24])
tensor("shape that overflows to nothing", "shape", shape=[2**32, 2**32], data_offsets=[0, 0])
tensor("shape beyond 64 bits", "impossible shape", shape=[2**64, 0], data_offsets=[0, 0])
tensor("shape that overflows before its zero", "impossible shape", shape=[2**62, 2**62, 0], data_offsets=[0, 0])
tensor("shape of 100,000 dimensions", "impossible shape", shape=[1] * 100_000)
tensor("shape of a million huge numbers", "impossible shape", shape=[2**63 - 1] * 1_000_000)
tensor("one offset", "impossible offsets", data_offsets=[0])
tensor("three offsets", "impossible offsets", data_offsets=[0, 24, 24])
tensor("negative offsets", "impossible offsets", data_offsets=[-24, 0])
tensor("reversed offsets", "cannot lie", data_offsets=[24, 0])
tensor("huge offsets", "the file has", data_offsets=[2**62, 2**62 + 24])
tensor("offsets beyond 64 bits", data_offsets=[2**70, 2**70 + 24])
tensor("offsets past the end", data_offsets=[1000, 1024])
header("offsets that overlap", {"a": A, "b": B | {"data_offsets": [20, 40]}}, "'b' overlaps")
tensor("the other's offsets exactly", shape=[5], data_offsets=[24, 44])
header("hole at the start", {"a": A | {"data_offsets": [4, 28]}, "b": B | {"data_offsets": [28, 48]}}, "'b'")
header("hole between", {"a": A, "b": B | {"data_offsets": [28, 48]}}, "'b'")
header(
    "hole that hides data", raw({"a": A, "b": B | {"data_offsets": [28, 48]}}, DATA + b"\0\0\0\0"), "hole of 4 bytes"
)


def _empty(count: int) -> bytes:
    one = '"t{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    return ("{" + ",".join(map(one.format, range(count))) + "}").encode()


# --- names of tensors ------------------------------------------------------------------------------------------------


def renamed(name: str, names: tuple[str, str], *says: str, works: bool = False) -> None:
    """A case of two ingredients that call their only tensor so."""

    def build(root: Path, stack: object) -> list:
        for file, own in zip(("c", "d"), names, strict=True):
            write(root / f"{file}.safetensors", raw({own: A}, DATA[:24]))
        return ["c.safetensors", "d.safetensors"]

    add("names", name, build, *(says if works else ("c.safetensors", "d.safetensors", *says)), works=works)


for name, text in {
    "empty": "",
    "with slashes": "a/b/c",
    "that climbs": "../../../../tmp/x",
    "absolute": "/etc/passwd",
    "with NUL": "a\0b",
    "with control characters": "\x1b[31mred\r\n",
    "from right to left": "\u202egnp.exe",
    "of 100,000 characters": "n" * 100_000,
    "like a field": "dtype",
    "like a template": "{checkpoint} %s {0}",
    "beyond the basic plane": "\U0001f600",
}.items():
    renamed(f"a name {name}", (text, text), works=True)
    renamed(f"a name {name}, in one only", (text, "w"), "do not hold the same tensors")
renamed("names that differ in case", ("Weight", "weight"), "do not hold the same tensors")
renamed(
    "names that differ in normalisation", tuple(unicodedata.normalize(f, "é") for f in ("NFC", "NFD")), "same tensors"
)
renamed("names that differ in a space", ("w", "w "), "do not hold the same tensors")
renamed("names that look alike", ("a", "а"), "do not hold the same tensors")


# --- tensors that do not go together ---------------------------------------------------------------------------------


def pair(name: str, one: dict, two: dict, *says: str, works: bool = False, arguments: tuple = ()) -> None:
    """A case of two ingredients whose only tensor is so."""

    def build(root: Path, stack: object) -> list:
        for file, field in (("c", one), ("d", two)):
            data = field["data"]
            made = {"dtype": field.get("dtype", "F32"), "shape": field["shape"], "data_offsets": [0, len(data)]}
            write(root / f"{file}.safetensors", raw({"w": made}, data))
        return ["c.safetensors", "d.safetensors", *arguments]

    add("tensors", name, build, *(says if works else ("'w'", *says)), works=works)


def floats(*values: float, shape: list[int] | None = None) -> dict:
    return {"shape": [len(values)] if shape is None else shape, "data": struct.pack(f"<{len(values)}f", *values)}


NAN, INF = float("nan"), float("inf")
for name, value in {"NaN": NAN, "infinity": INF, "minus infinity": -INF}.items():
    for place in (0, 999):
        values = [0.0] * 1000
        values[place] = value
        pair(f"{name} at {place}", floats(*[0.0] * 1000), floats(*values), "d.safetensors", f"element {place}")
pair("opposite infinities", floats(INF), floats(-INF), "c.safetensors", "inf")
pair("NaN in both", floats(NAN), floats(NAN), "c.safetensors", "nan")
pair("signalling NaN", floats(1), {"shape": [1], "data": b"\x01\0\x80\x7f"}, "d.safetensors", "nan")
pair(
    "NaN in BF16",
    {"dtype": "BF16", "shape": [1], "data": b"\0\0"},
    {"dtype": "BF16", "shape": [1], "data": b"\xc0\x7f"},
    "nan",
)
pair(
    "NaN in F16",
    {"dtype": "F16", "shape": [1], "data": b"\0\0"},
    {"dtype": "F16", "shape": [1], "data": b"\0\x7e"},
    "nan",
)
pair(
    "NaN in F64",
    {"dtype": "F64", "shape": [1], "data": bytes(8)},
    {"dtype": "F64", "shape": [1], "data": b"\0" * 6 + b"\xf8\x7f"},
    "nan",
)
pair(
    "NaN in C64",
    {"dtype": "C64", "shape": [1], "data": bytes(8)},
    {"dtype": "C64", "shape": [1], "data": b"\0\0\0\0\0\0\xc0\x7f"},
    "nan",
)
pair("NaN and --allow-nonfinite", floats(1, 2), floats(NAN, 4), works=True, arguments=("--allow-nonfinite",))
pair("the largest numbers", floats(3e38, -3e38), floats(3e38, -3e38), works=True)
pair("the smallest numbers", floats(1e-45, -1e-45), floats(1e-45, 0), works=True)
pair("too large for the result", floats(1e38), floats(1e38), "too large for float16", arguments=("--dtype", "float16"))
pair("broadcastable rows", floats(*range(3), shape=[1, 3]), floats(*range(9), shape=[3, 3]), "shape [1, 3]", "[3, 3]")
pair("broadcastable columns", floats(*range(9), shape=[3, 3]), floats(*range(3), shape=[3, 1]), "shape")
pair("a number for all", floats(1, shape=[]), floats(1, shape=[1]), "shape [] in", "[1] in")
pair("transposed", floats(*range(6), shape=[2, 3]), floats(*range(6), shape=[3, 2]), "shape [2, 3]", "[3, 2]")
pair("flattened", floats(*range(6), shape=[2, 3]), floats(*range(6)), "shape")
pair("empty in one", floats(), floats(1), "shape [0]")
pair("empty in both", floats(shape=[0, 2**40]), floats(shape=[0, 2**40]), works=True)
pair("a single number in both", floats(1, shape=[]), floats(2, shape=[]), works=True)
for one, two, width in (
    ("F32", "I32", 4),
    ("F32", "U32", 4),
    ("F16", "BF16", 2),
    ("F16", "I16", 2),
    ("F64", "C64", 8),
    ("I8", "U8", 1),
    ("BOOL", "U8", 1),
    ("F8_E4M3", "F8_E5M2", 1),
):
    of = {"shape": [1], "data": bytes(width)}
    pair(f"{one} and {two}", of | {"dtype": one}, of | {"dtype": two}, "dtype", "c.safetensors", "d.safetensors")
for kind, width in {
    "I64": 8,
    "U64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
}.items():
    of = {"dtype": kind, "shape": [3]}
    pair(
        f"{kind} that differ",
        of | {"data": bytes(3 * width)},
        of | {"data": bytes(3 * width - 1) + b"\1"},
        "c.safetensors",
        "d.safetensors",
    )
    pair(f"{kind} that are the same", of | {"data": b"\1" * 3 * width}, of | {"data": b"\1" * 3 * width}, works=True)
pair(
    "BOOL that is neither",
    {"dtype": "BOOL", "shape": [1], "data": b"\1"},
    {"dtype": "BOOL", "shape": [1], "data": b"\2"},
    "d.safetensors",
)
pair(
    "F4 that are the same",
    {"dtype": "F4", "shape": [4], "data": b"ab"},
    {"dtype": "F4", "shape": [4], "data": b"ab"},
    works=True,
)


# --- indices ---------------------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"
SHARDS = {"a": "1.safetensors", "b": "2.safetensors"}


def sharded(path: Path, index: object = None) -> Path:
    write(path / "1.safetensors", raw({"a": A}, DATA[:24]))
    write(path / "2.safetensors", raw({"b": B | {"data_offsets": [0, 20]}}, DATA[24:]))
    index = {"weight_map": SHARDS} if index is None else index
    (path / INDEX).write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
    (path / "config.json").write_text("{}")
    return path


def index(name: str, content: object, *says: str, works: bool = False, also: Callable = lambda path: None) -> None:
    def build(root: Path, stack: object) -> list:
        write(root / "outside.safetensors", raw({"b": B | {"data_offsets": [0, 20]}}, DATA[24:]))
        good, bad = sharded(root / "good"), sharded(root / "bad", content() if callable(content) else content)
        also(bad)
        return [good, bad]

    add("indices", name, build, *(says if works else ("bad", *says)), works=works)


def place(name: str, file: object, *says: str, also: Callable = lambda path: None, works: bool = False) -> None:
    index(f"a shard {name}", {"weight_map": SHARDS | {"b": file}}, *says, also=also, works=works)


index("as it should be", None, works=True)
index("empty", b"", "not valid JSON")
index("no JSON", b"\x80\x04K\x01.", "not valid JSON")
index("UTF-16", json.dumps({"weight_map": SHARDS}).encode("utf-16"), "not valid JSON")
index("a list", [], "must hold a JSON object")
index("nested", lambda: b"[" * 100_000, "not valid JSON")
index("nested in what is copied", lambda: json.dumps({"weight_map": SHARDS, "metadata": nested(900)}).encode(), INDEX)
index("10 million lists", lambda: b'{"weight_map": [' + b"[]," * 10_000_000 + b"[]]}", INDEX)
index("too large", None, INDEX, also=lambda path: os.truncate(path / INDEX, 10 << 30))
index(
    "one name twice",
    b'{"weight_map": {"a": "1.safetensors", "a": "2.safetensors", "b": "2.safetensors"}}',
    "'a' appears twice",
)
index("without a map", {"metadata": {}}, "weight_map")
index("map that is null", {"weight_map": None}, "weight_map")
index("map that is a list", {"weight_map": ["1.safetensors"]}, "weight_map")
index("map that is empty", {"weight_map": {}}, "holds no tensors")
index("metadata that is a list", {"weight_map": SHARDS, "metadata": [1]}, "metadata")
index("metadata that is null", {"weight_map": SHARDS, "metadata": None}, "metadata")
index("wrong total", {"weight_map": SHARDS, "metadata": {"total_size": "many"}}, works=True)
index("tensor in the other shard", {"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}, "does not")
index("tensor in no shard", {"weight_map": SHARDS | {"c": "1.safetensors"}}, "'c'")
index("tensor left out", {"weight_map": {"a": "1.safetensors"}}, "hold the same tensors")
index("all in one shard", {"weight_map": dict.fromkeys("ab", "1.safetensors")}, "'b'")
for name, value in {"null": None, "number": 1, "list": ["2.safetensors"], "object": {}, "true": True}.items():
    place(f"that is {name}", value, "file names")
for name, value in {
    "above": "../outside.safetensors",
    "above and back": "../bad/2.safetensors",
    "below": "./2.safetensors",
    "at the root": "/etc/passwd",
    "in a device": "/dev/zero",
    "with NUL": "2.safetensors\0",
    "on Windows": "..\\outside.safetensors",
    "that is empty": "",
    "that is the folder": ".",
    "that is the folder above": "..",
}.items():
    place(name, value, "own folder")
place("that is missing", "3.safetensors", "missing")
place("with a name too long", "x" * 300, "x" * 20)
place("that is the index", INDEX, "not a valid safetensors file")
place("that is the configuration", "config.json", "config.json")
place("that is a folder", "sub", "not a regular file", also=lambda path: (path / "sub").mkdir())
place("that is a pipe", "pipe", "not a regular file", also=lambda path: os.mkfifo(path / "pipe"))
place("that is a socket", "socket", "socket", also=lambda path: listening(path / "socket"))
place("that links to a device", "zero", "not a regular file", also=lambda path: (path / "zero").symlink_to("/dev/zero"))
place("that links to itself", "loop", "loop", also=lambda path: (path / "loop").symlink_to("loop"))
place("that links to nothing", "gone", "missing", also=lambda path: (path / "gone").symlink_to("nothing"))
place(
    "that links elsewhere, as in the Hub's cache",
    "blob",
    also=lambda path: (path / "blob").symlink_to(path.parent / "outside.safetensors"),
    works=True,
)


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def listening(path: Path) -> None:
    import socket

    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)


# --- folders and what lies beside the weights ------------------------------------------------------------------------


def beside(name: str, file: str, content: object, *says: str, works: bool = False, arguments: tuple = ()) -> None:
    """A case of two model folders, the second with this file: bytes, or what makes it."""

    def build(root: Path, stack: object) -> list:
        folder(root / "good")
        bad = folder(root / "bad") / file
        bad.unlink(missing_ok=True)
        if callable(content):
            content(bad)
        else:
            write(bad, content if isinstance(content, bytes) else json.dumps(content).encode())
        if file == "trainer_state.json":
            write(root / "good" / file, b'{"global_step": 1}')
        return ["good", "bad", *arguments]

    add("folders", name, build, *(says if works else ("bad", *says)), works=works)


for name, content in {
    "empty": b"",
    "no JSON": b"model_type: x",
    "a list": [],
    "text": "x",
    "cut off": b'{"model_type": "x"',
    "not UTF-8": b'{"model_type": "\xff"}',
    "nested": b'{"a":' * 100_000,
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a device that is full": lambda path: path.symlink_to("/dev/full"),
    "huge": lambda path: path.touch() or os.truncate(path, 10 << 30),
}.items():
    beside(f"config.json {name}", "config.json", content)
beside("config.json of another model", "config.json", {"model_type": "y"}, "bad", "'x'", "'y'")
beside("config.json of strange types", "config.json", {"model_type": {"a": [1]}}, "bad")
beside("config.json deep", "config.json", {"x": nested(900)}, "config.json")
beside("config.json that links to nothing", "config.json", lambda path: path.symlink_to("nothing"), works=True)
beside("tokenizer.json odd", "tokenizer.json", b"\0\xff", works=True)
beside("tokenizer.json a pipe", "tokenizer.json", os.mkfifo, works=True)
beside("tokenizer.json a device", "tokenizer.json", lambda path: path.symlink_to("/dev/zero"), works=True)
beside("vocab.txt that links in a loop", "vocab.txt", lambda path: path.symlink_to("vocab.txt"), works=True)
for name, step in {
    "text": "5",
    "null": None,
    "negative": -1,
    "fractional": 1.5,
    "of 4,000 digits": 10**4000,
    "true": True,
    "list": [1],
}.items():
    beside(f"a step that is {name}", "trainer_state.json", {"global_step": step}, works=True)
    if name != "text":
        beside(
            f"a step that is {name}, for an EMA",
            "trainer_state.json",
            {"global_step": step},
            "step",
            arguments=("--method", "ema", "--decay", "0.9"),
        )
beside("trainer_state.json no JSON", "trainer_state.json", b"{", "not valid JSON")
beside("trainer_state.json a list", "trainer_state.json", [], "must hold a JSON object")


def adapter(name: str, config: object, *says: str, works: bool = False) -> None:
    def build(root: Path, stack: object) -> list:
        for one, content in (("good", {"peft_type": "LORA", "r": 2}), ("bad", config)):
            write(root / one / "adapter_model.safetensors")
            if content is not ...:
                write(
                    root / one / "adapter_config.json",
                    content if isinstance(content, bytes) else json.dumps(content).encode(),
                )
        return ["good", "bad"]

    add("folders", f"adapter_config.json {name}", build, *(says if works else ("bad", *says)), works=works)


adapter("as it should be", {"peft_type": "LORA", "r": 2}, works=True)
adapter("missing", ..., "adapter_config.json")
adapter("no JSON", b"[", "adapter_config.json")
adapter("a list", [], "adapter_config.json")
adapter("of another rank", {"peft_type": "LORA", "r": 4}, "r is 2", "4")
adapter("of another type", {"peft_type": "IA3", "r": 2}, "peft_type")
adapter("with strange ranks", {"peft_type": "LORA", "r": {"x": [NAN]}}, "r is 2")


@case("folders", "x.safetensors", "a.safetensors")
def a_folder_called_safetensors(root, stack):
    folder(root / "x.safetensors")
    return ["a.safetensors", "x.safetensors"]


@case("folders", "x.safetensors", "no checkpoints")
def an_empty_folder_called_safetensors(root, stack):
    (root / "x.safetensors").mkdir()
    return ["a.safetensors", "x.safetensors"]


@case("folders", "checkpoint-100 is no checkpoint")
def a_file_called_checkpoint_100(root, stack):
    return ["a.safetensors", write(root / "checkpoint-100").name]


@case("folders", "no checkpoints in run")
def a_run_of_files_called_checkpoints(root, stack):
    for step in (100, 200):
        write(root / "run" / f"checkpoint-{step}")
    return ["run"]


@case("folders", "checkpoint-200", "neither")
def a_run_with_an_empty_checkpoint(root, stack):
    folder(root / "run" / "checkpoint-100")
    (root / "run" / "checkpoint-200").mkdir()
    return ["run"]


@case("folders", works=True)
def a_run_with_odd_names(root, stack):
    for step in ("1", "02", "٣"):
        folder(root / "run" / f"checkpoint-{step}")
    (root / "run" / "checkpoint-x").mkdir()
    return ["run"]


@case("folders", works=True)
def a_step_of_200_digits(root, stack):
    return [write(root / f"step-{digit * 200}.safetensors").name for digit in "12"]


@case("folders", "no checkpoints in run")
def a_run_that_links_to_itself(root, stack):
    (root / "run").mkdir()
    (root / "run" / "checkpoint-1").symlink_to("checkpoint-1")
    (root / "run" / "up").symlink_to("..")
    return ["run"]


# --- torch files -----------------------------------------------------------------------------------------------------


def zipped(path: Path, pickled: bytes, storages: dict[str, bytes], **also: bytes) -> Path:
    """An archive such as torch writes, around a pickle of one's own making."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"x/data/{key}", data)
        archive.writestr("x/version", "3\n")
        for name, data in also.items():
            archive.writestr(name, data)
    return path


def pickled(*ops: bytes) -> bytes:
    return b"\x80\x02" + b"".join(ops) + b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str, count: int, kind: str = "FloatStorage") -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"


def rebuilt(stored: bytes, offset: int, shape: tuple, stride: tuple) -> bytes:
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + stored
        + number(offset)
        + numbers(*shape)
        + numbers(*stride)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def weights(**tensors: bytes) -> bytes:
    return pickled(b"}(", *(text(name) + op for name, op in tensors.items()), b"u")


def torch_file(
    name: str, make: Callable[[Path], object] | bytes, *says: str, works: bool = False, suffix: str = ".pt"
) -> None:
    """A case of two files that are made alike, so that they are refused for what they are."""

    def build(root: Path, stack: list) -> list:
        for one in "cd":
            path = root / f"{one}{suffix}"
            path.write_bytes(make) if isinstance(make, bytes) else make(path)
        return [f"c{suffix}", f"d{suffix}"]

    add("torch files", name, build, *(says if works else (f"c{suffix}", *says)), works=works)


def saved(name: str, make: Callable[[], object], *says: str, works: bool = False, **options: object) -> None:
    def save(path: Path) -> None:
        import torch

        torch.save(make(), path, **options)

    torch_file(name, save, *says, works=works)


def torch_() -> object:
    import torch

    return torch


class Harm:
    """Unpickled, this creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


FOUR = struct.pack("<4f", 1, 2, 3, 4)
PLAIN = rebuilt(storage("0", 4), 0, (2, 2), (2, 1))
torch_file("as it should be", lambda path: zipped(path, weights(w=PLAIN), {"0": FOUR}), works=True)
torch_file(
    "in another order",
    lambda path: zipped(path, weights(w=rebuilt(storage("0", 4), 0, (2, 2), (1, 2))), {"0": FOUR}),
    works=True,
)
torch_file(
    "a view of 2^40 elements",
    lambda path: zipped(path, weights(w=rebuilt(storage("0", 4), 0, (2**40,), (0,))), {"0": FOUR}),
    "'w'",
)
torch_file(
    "a view of 2^20 × 2^20",
    lambda path: zipped(path, weights(w=rebuilt(storage("0", 4), 0, (2**20, 2**20), (0, 0))), {"0": FOUR}),
    "'w'",
)
torch_file(
    "a view past the end", lambda path: zipped(path, weights(w=rebuilt(storage("0", 4), 3, (2,), (1,))), {"0": FOUR})
)
torch_file(
    "a view before the start",
    lambda path: zipped(path, weights(w=rebuilt(storage("0", 4), -1, (2,), (1,))), {"0": FOUR}),
)
torch_file(
    "negative strides", lambda path: zipped(path, weights(w=rebuilt(storage("0", 4), 3, (2,), (-1,))), {"0": FOUR})
)
torch_file(
    "negative shape", lambda path: zipped(path, weights(w=rebuilt(storage("0", 4), 0, (-2,), (1,))), {"0": FOUR})
)
torch_file(
    "a shape that overflows",
    lambda path: zipped(path, weights(w=rebuilt(storage("0", 4), 0, (2**62, 4), (0, 0))), {"0": FOUR}),
)
torch_file(
    "a storage of 2^50", lambda path: zipped(path, weights(w=rebuilt(storage("0", 2**50), 0, (4,), (1,))), {"0": FOUR})
)
torch_file(
    "a storage of 2^70", lambda path: zipped(path, weights(w=rebuilt(storage("0", 2**70), 0, (4,), (1,))), {"0": FOUR})
)
torch_file("a storage that is missing", lambda path: zipped(path, weights(w=PLAIN), {}))
torch_file(
    "a storage elsewhere",
    lambda path: zipped(path, weights(w=rebuilt(storage("../../etc/passwd", 4), 0, (4,), (1,))), {"0": FOUR}),
)
torch_file("a storage too short", lambda path: zipped(path, weights(w=PLAIN), {"0": FOUR[:-1]}))
torch_file(
    "the same megabyte 30 times",
    lambda path: zipped(
        path,
        weights(**{f"w{i}": rebuilt(storage("0", 2**18), 0, (2**9, 2**9), (1, 2**9)) for i in range(30)}),
        {"0": bytes(2**20)},
    ),
    works=True,
)
torch_file(
    "many views of a megabyte",
    lambda path: zipped(
        path,
        weights(**{f"w{i}": rebuilt(storage("0", 2**18), i, (2**8, 2**9), (1, 2**8)) for i in range(300)}),
        {"0": bytes(2**20)},
    ),
    "more than",
)
torch_file(
    "nested lists", lambda path: zipped(path, pickled(b"}", text("w"), b"]" * 200_000, b"a" * 199_999, b"s"), {})
)
torch_file(
    "nested lists beside weights",
    lambda path: zipped(
        path, pickled(b"}(", text("w"), PLAIN, text("x"), b"]" * 200_000, b"a" * 199_999, b"u"), {"0": FOUR}
    ),
    "'x'",
)
torch_file(
    "nested tuples",
    lambda path: zipped(path, pickled(b"}(", text("w"), PLAIN, text("x"), b")", b"\x85" * 200_000, b"u"), {"0": FOUR}),
)
torch_file(
    "nested tuples as a key", lambda path: zipped(path, pickled(b"}", b")", b"\x85" * 200_000, b"Ns"), {"0": FOUR})
)
torch_file(
    "a key of 2^60 tuples",
    lambda path: zipped(path, pickled(b"})", b"".join(b"q\0h\0\x86" for _ in range(60)), b"Ns"), {"0": FOUR}),
)
torch_file(
    "lists of 2^60",
    lambda path: zipped(
        path, pickled(b"}", text("state_dict"), b"]", b"".join(b"q\0](h\0h\0e" for _ in range(60)), b"s"), {"0": FOUR}
    ),
)
torch_file("a list in itself", lambda path: zipped(path, pickled(b"}q\0", text("model"), b"h\0s"), {"0": FOUR}))
torch_file(
    "memory for a zettabyte",
    lambda path: zipped(path, pickled(b"}", text("w"), b"c__builtin__\nbytearray\n", number(2**62), b"\x85Rs"), {}),
)
torch_file(
    "memory for 64 gigabytes",
    lambda path: zipped(path, pickled(b"}", text("w"), b"c__builtin__\nbytearray\n", number(2**36), b"\x85Rs"), {}),
)
torch_file("text longer than the file", lambda path: zipped(path, b"\x80\x02}X\xff\xff\xff\xff.", {}))
torch_file("nothing on the stack", lambda path: zipped(path, b"\x80\x02.", {}))
torch_file("another protocol", lambda path: zipped(path, b"\x80\x05}.", {}), "no named weights")
torch_file("an unknown operation", lambda path: zipped(path, b"\x80\x02\xff.", {}))
torch_file("a number as a name", lambda path: zipped(path, pickled(b"}(", number(7), PLAIN, b"u"), {"0": FOUR}), "7")
torch_file(
    "a huge number as a name",
    lambda path: zipped(path, pickled(b"}(", b"\x8a\xff" + b"\x7f" * 255, PLAIN, b"u"), {"0": FOUR}),
)
torch_file(
    "a huge step",
    lambda path: zipped(
        path, pickled(b"}(", text("step"), number(2**900), text("model"), b"}", text("w"), PLAIN, b"su"), {"0": FOUR}
    ),
    works=True,
)
torch_file(
    "a surrogate as a name", lambda path: zipped(path, pickled(b"}X\x03\0\0\0\xed\xa0\x80", PLAIN, b"s"), {"0": FOUR})
)
torch_file(
    "meta tensors",
    lambda path: zipped(
        path,
        weights(
            w=b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n"
            + numbers(2, 2)
            + numbers(2, 1)
            + b"\x89tR"
        ),
        {},
    ),
    "'w'",
)
torch_file(
    "a meta tensor of 2^40 beside a good one",
    lambda path: zipped(
        path,
        weights(
            w=PLAIN,
            x=b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n"
            + numbers(2**40)
            + numbers(1)
            + b"\x89tR",
        ),
        {"0": FOUR},
    ),
    "'x'",
)
torch_file("no archive", b"hello", "c.pt")
torch_file("empty", b"")
torch_file("an old pickle, cut off", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.")
torch_file("the end of an archive only", b"PK\x03\x04" + b"PK\x05\x06" + bytes(18))
torch_file("a GIF", b"GIF89a" + bytes(100), suffix=".bin")
torch_file("safetensors by another name", GOOD, suffix=".bin")
saved("numbers", lambda: {"a": 1}, "no named weights")
saved("a tensor alone", lambda: torch_().ones(2), "holds a Tensor")
saved("a list of tensors", lambda: [torch_().ones(2)], "holds a list")
saved("optimizer state", lambda: {"state": {0: {"step": torch_().ones(1)}}, "param_groups": []}, "no named weights")
saved("sparse tensors", lambda: {"w": torch_().eye(3).to_sparse()}, "'w'", "sparse")
saved("compressed sparse tensors", lambda: {"w": torch_().eye(4).to_sparse_coo()}, "'w'")
saved("nested tensors", lambda: {"w": torch_().nested.nested_tensor([torch_().ones(2), torch_().ones(3)])}, "w")
saved(
    "quantised tensors", lambda: {"w": torch_().quantize_per_tensor(torch_().ones(3), 0.1, 0, torch_().qint8)}, "c.pt"
)
saved("a conjugate view", lambda: {"w": torch_().ones(2, dtype=torch_().complex64).conj()}, "'w'")
saved("half-precision complex numbers", lambda: {"w": torch_().ones(2, dtype=torch_().complex32)}, "'w'", "complex32")
saved("complex128", lambda: {"w": torch_().ones(2, dtype=torch_().complex128)}, "'w'", "complex128")
saved("NaN", lambda: {"w": torch_().full((2,), NAN)}, "'w' holds nan")
saved("a layer in it", lambda: {"model": {"w": torch_().ones(2), "n": {"x": 1}}}, "'n' is a dict")
saved("the old format", lambda: {"w": torch_().ones(2, 3).t()}, works=True, _use_new_zipfile_serialization=False)
saved(
    "a view of 2^40 in the old format",
    lambda: {"w": torch_().ones(1).expand(2**20, 2**20)},
    "'w'",
    _use_new_zipfile_serialization=False,
)
saved("a view of 2^40 as torch saves it", lambda: {"w": torch_().ones(1).expand(2**20, 2**20)}, "'w'")


def damaged(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        content = bytearray(zipped(path, weights(w=PLAIN), {"0": FOUR}).read_bytes())
        made = change(content)
        path.write_bytes(content if made is None else made)

    return make


for share in (0.1, 0.5, 0.9, 0.99):
    torch_file(f"cut off after {share:.0%}", damaged(lambda content, share=share: content[: int(len(content) * share)]))
torch_file(
    "an archive that says it is encrypted",
    damaged(lambda content: content.__setitem__(slice(6, 8), b"\1\0")),
    works=True,
)
torch_file("an archive elsewhere", damaged(lambda content: content.__setitem__(slice(-6, -2), b"\xff\xff\xff\x7f")))
torch_file(
    "an archive of 65,535 records", damaged(lambda content: content.__setitem__(slice(-14, -10), b"\xff\xff\xff\xff"))
)
torch_file(
    "an archive before its start", damaged(lambda content: content.__setitem__(slice(-10, -6), b"\xff\xff\xff\x7f"))
)


@case("torch files", "c.pt", "compressed archive")
def a_bomb(root, stack):
    for one in "cd":
        with zipfile.ZipFile(root / f"{one}.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data.pkl", weights(w=rebuilt(storage("0", 2**26), 0, (2**26,), (1,))))
            with archive.open("x/data/0", "w") as record:
                for _ in range(64):
                    record.write(bytes(1 << 20))
    return ["c.pt", "d.pt"]


def harmful(name: str, suffix: str, *says: str, **options: object) -> None:
    def build(root: Path, stack: list) -> list:
        import torch

        for one in "cd":
            made = {"state_dict": {"w": torch.ones(2)}, "x": Harm(str(root / "harmed"))}
            if options.get("pickle"):
                (root / f"{one}{suffix}").write_bytes(pickle.dumps(made | {"state_dict": {}}, 2))
            else:
                torch.save(made, root / f"{one}{suffix}", **options)
        return [f"c{suffix}", f"d{suffix}"]

    add("torch files", name, build, f"c{suffix}", *says)


harmful("a pickle that creates a folder", ".ckpt", "needs the code of posix.mkdir")
harmful(
    "an old pickle that creates a folder", ".pt", "needs the code of posix.mkdir", _use_new_zipfile_serialization=False
)
harmful("a bare pickle that creates a folder", ".bin", pickle=True)


# --- paths: what is read, and what is written ------------------------------------------------------------------------


def paths(name: str, build: Callable[[Path], list], *says: str, works: bool = False) -> None:
    add("paths", name, lambda root, stack: build(root), *says, works=works)


def two(root: Path) -> list[str]:
    return ["a.safetensors", write(root / "b.safetensors", raw({"a": A, "b": B}, bytes(44))).name]


def folders(root: Path) -> list[str]:
    return [str(folder(root / "run" / name).relative_to(root)) for name in "ab"]


def made(path: Path, how: Callable[[Path], object]) -> str:
    how(path)
    return path.name


for suffix in (".safetensors", ".pt", ".ckpt"):
    paths(
        f"a pipe{suffix}",
        lambda root, s=suffix: ["a.safetensors", made(root / f"p{s}", os.mkfifo)],
        "not a regular file",
    )
    paths(
        f"a link to /dev/zero{suffix}",
        lambda root, s=suffix: ["a.safetensors", made(root / f"z{s}", lambda path: path.symlink_to("/dev/zero"))],
        "not a regular file",
    )
    paths(
        f"a link to nothing{suffix}",
        lambda root, s=suffix: ["a.safetensors", made(root / f"n{s}", lambda path: path.symlink_to("nothing"))],
        "no such file",
    )
    paths(
        f"a link to itself{suffix}",
        lambda root, s=suffix: ["a.safetensors", made(root / f"l{s}", lambda path: path.symlink_to(path.name))],
        "symbolic links",
    )
    paths(f"a socket{suffix}", lambda root, s=suffix: ["a.safetensors", made(root / f"s{s}", listening)], f"s{suffix}")
    paths(f"a folder{suffix}", lambda root, s=suffix: ["a.safetensors", made(root / f"d{s}", Path.mkdir)], f"d{suffix}")
    paths(
        f"a sparse terabyte{suffix}",
        lambda root, s=suffix: [
            "a.safetensors",
            made(root / f"t{s}", lambda path: path.touch() or os.truncate(path, 1 << 40)),
        ],
        f"t{suffix}",
    )
paths("/dev/zero", lambda root: ["a.safetensors", "/dev/zero"], "/dev/zero is no checkpoint")
paths("/dev/stdin", lambda root: ["a.safetensors", "/dev/stdin"], "no checkpoint")
paths("/proc/self/mem", lambda root: ["a.safetensors", "/proc/self/mem"], "no checkpoint")
paths("NUL in a path", lambda root: ["a.safetensors", "b\0.safetensors"], "null")
paths("an empty path", lambda root: ["a.safetensors", ""], "named twice")
paths("a path too long", lambda root: ["a.safetensors", "x" * 5000 + ".safetensors"], "name too long")
paths(
    "a path through a file",
    lambda root: ["a.safetensors", "a.safetensors/b.safetensors"],
    "not a directory",
    "a.safetensors/b.safetensors",
)
paths(
    "a path with line breaks",
    lambda root: ["a.safetensors", write(root / "x\n\x1b[2Jy.safetensors", b"").name],
    "x\\n\\x1b[2Jy.safetensors",
)
paths(
    "a path that is not UTF-8",
    lambda root: ["a.safetensors", write(root / os.fsdecode(b"\xff.safetensors"), b"").name],
    "\\udcff.safetensors",
)
paths(
    "paths that are not UTF-8",
    lambda root: [write(root / os.fsdecode(name + b".safetensors")).name for name in (b"\xff", b"\xfe")],
    works=True,
)
paths("an output with line breaks", lambda root: [*two(root), "-o", "o\nut\x1b[2J"], works=True)
paths("the same path twice", lambda root: ["a.safetensors", "a.safetensors"], "a.safetensors is named twice")
paths("the same path, spelt otherwise", lambda root: ["a.safetensors", "./old/../a.safetensors"], "named twice")
paths(
    "the same file by a symbolic link",
    lambda root: ["a.safetensors", made(root / "s.safetensors", lambda path: path.symlink_to("a.safetensors"))],
    "s.safetensors is named twice",
)
paths(
    "the same file by a hard link",
    lambda root: ["a.safetensors", made(root / "h.safetensors", lambda path: path.hardlink_to(root / "a.safetensors"))],
    "same content",
    works=True,
)
paths(
    "the same folder by a symbolic link",
    lambda root: [*folders(root), made(root / "s", lambda path: path.symlink_to("run/a"))],
    "named twice",
)
paths(
    "the same weights in two folders",
    lambda root: [
        made(root / one, lambda path: (path.mkdir(), (path / "model.safetensors").symlink_to("../a.safetensors")))
        for one in "cd"
    ],
    "same content",
    works=True,
)
paths("output over an input", lambda root: [*two(root), "-o", "b.safetensors", "--force"], "one of the ingredients")
paths(
    "output over an input by a link",
    lambda root: [
        *two(root),
        "-o",
        made(root / "s.safetensors", lambda path: path.symlink_to("b.safetensors")),
        "--force",
    ],
    "one of the ingredients",
)
paths(
    "output over an input by a hard link",
    lambda root: [
        *two(root),
        "-o",
        made(root / "h.safetensors", lambda path: path.hardlink_to(root / "b.safetensors")),
        "--force",
    ],
    works=True,
)
paths(
    "output over an input's folder", lambda root: [*folders(root), "-o", "run/a", "--force"], "one of the ingredients"
)
paths("output inside an input", lambda root: [*folders(root), "-o", "run/a/new"], "inside the ingredient")
paths(
    "output over an input's weights",
    lambda root: [*folders(root), "-o", "run/a/model.safetensors", "--force"],
    "leave out the suffix",
)
paths("inputs inside the output", lambda root: [*folders(root), "-o", "run", "--force"], "inside the output")
paths("output is this folder", lambda root: [*two(root), "-o", ".", "--force"], "inside the output")
paths("output is the root", lambda root: [*two(root), "-o", "/", "--force"], "inside the output")
paths("output is empty", lambda root: [*two(root), "-o", ""], "output")
paths("output with NUL", lambda root: [*two(root), "-o", "x\0y"], "null")
paths("output with a name too long", lambda root: [*two(root), "-o", "x" * 300], "name too long")
paths(
    "output in a device", lambda root: [*two(root), "-o", "/dev/full", "--force"], "/dev/full", "choose another place"
)
paths(
    "output in a link to a device",
    lambda root: [*two(root), "-o", made(root / "f.safetensors", lambda path: path.symlink_to("/dev/full")), "--force"],
    "f.safetensors",
    "choose another place",
)
paths("output below a device", lambda root: [*two(root), "-o", "/dev/null/out"], "/dev/null")
paths(
    "output in a pipe", lambda root: [*two(root), "-o", made(root / "p", os.mkfifo), "--force"], "choose another place"
)
paths("output below a file", lambda root: [*two(root), "-o", "a.safetensors/out"], "ingredient")
paths("output below another file", lambda root: [*two(root), "-o", "old/soup.json/out"], "not a folder")
paths(
    "output through a loop",
    lambda root: [*two(root), "-o", made(root / "l", lambda path: path.symlink_to("l")) + "/out"],
    "l",
)
paths(
    "output is a loop",
    lambda root: [*two(root), "-o", made(root / "l", lambda path: path.symlink_to("l")), "--force"],
    "l",
)
paths("output there already", lambda root: [*two(root), "-o", "old"], "exists already")
paths(
    "output over other things",
    lambda root: [*two(root), "-o", str(write(root / "thesis" / "1.txt", b"x").parent), "--force"],
    "no model",
)
paths("output in /proc", lambda root: [*two(root), "-o", "/proc/out"], "/proc")


@case("paths", "permission denied", "b.safetensors")
def an_unreadable_input(root, stack):
    refuse(stack, root / "b.safetensors")
    return two(root)


@case("paths", "permission denied", "run")
def an_unreadable_folder(root, stack):
    folders(root)
    refuse(stack, root / "run")
    return ["run"]


@case("paths", "permission denied", "config.json")
def an_unreadable_configuration(root, stack):
    refuse(stack, root / "run" / "b" / "config.json")
    return folders(root)


@case("paths", "permission denied", "tokenizer.json")
def an_unreadable_tokenizer(root, stack):
    folders(root)
    refuse(stack, write(root / "run" / "b" / "tokenizer.json", b"{}"))
    return folders(root)


@case("paths", "permission denied")
def an_unwritable_place(root, stack):
    stack.append(mock.patch("pathlib.Path.mkdir", side_effect=PermissionError(13, "Permission denied", str(root))))
    return two(root)


@case("paths", "input/output error", "b.safetensors")
def a_broken_disk(root, stack):
    real = os.preadv

    def fail(descriptor: int, *arguments: object) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("b.safetensors"):
            raise OSError(5, "Input/output error")
        return real(descriptor, *arguments)

    stack.append(mock.patch("os.preadv", fail))
    return two(root)


@case("paths", "no space left on device", "old")
def a_full_disk(root, stack):
    stack.append(mock.patch("os.pwrite", side_effect=OSError(28, "No space left on device")))
    return two(root)


def refuse(stack: list, path: Path) -> None:
    """As root reads everything, the system's own refusal is put in its place."""
    for module, name in ((os, "open"), (os, "scandir"), (os, "listdir"), (io, "open")):
        real = getattr(module, name)

        def refusing(given: object = ".", *arguments: object, real: Callable = real, **options: object) -> object:
            if isinstance(given, str | Path) and os.path.abspath(given) == str(path):
                raise PermissionError(13, "Permission denied", str(given))
            return real(given, *arguments, **options)

        stack.append(mock.patch.object(module, name, refusing))
        if name == "open" and module is io:
            stack.append(mock.patch("builtins.open", refusing))


def changing(name: str, change: Callable[[Path], object], *says: str, works: bool = False) -> None:
    """A case of an input that changes once its header was read, when the first numbers are."""

    def build(root: Path, stack: list) -> list:
        from averaging.checkpoints import files

        real, calls = files.read_into, itertools.count()

        def read_into(*arguments: object) -> None:
            if next(calls) == 0:  # once, though several threads come here
                change(root / "b.safetensors")
            real(*arguments)

        write(root / "b.safetensors")
        CHANGED.add("b.safetensors")
        stack.append(mock.patch.object(files, "read_into", read_into))
        return ["a.safetensors", "b.safetensors"]

    add("paths", f"an input that {name} while it is read", build, *says, works=works)


changing("is cut off", lambda path: os.truncate(path, 20), "b.safetensors became shorter")
changing("is emptied", lambda path: os.truncate(path, 0), "b.safetensors became shorter")
changing("grows", lambda path: os.truncate(path, 10_000), works=True)
changing("is replaced", lambda path: os.replace(shutil.copy(path, path.with_suffix(".new")), path), works=True)
changing("is removed", lambda path: path.unlink(), works=True)


@case("paths", "no such file", "b.safetensors")
def an_input_that_is_removed_after_its_header_was_read(root, stack):
    from averaging.soups import soup

    real = soup.check_alike
    CHANGED.add("b.safetensors")
    stack.append(
        mock.patch.object(
            soup, "check_alike", lambda *given, **options: (real(*given, **options), os.unlink(root / "b.safetensors"))
        )
    )
    return two(root)


# --- recipes ---------------------------------------------------------------------------------------------------------


def recipe(name: str, content: object, *says: str, works: bool = False) -> None:
    def build(root: Path, stack: object) -> list:
        two(root)
        made = content() if callable(content) else content
        write(root / "soup.yaml", made.encode() if isinstance(made, str) else made)
        return ["--recipe", "soup.yaml"]

    add("recipes", name, build, *(says if works else ("soup.yaml", *says)), works=works)


INGREDIENTS = "ingredients: [a.safetensors, b.safetensors]\n"
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
recipe("as it should be", INGREDIENTS, works=True)
recipe("a billion laughs", LAUGHS, "anchors")
recipe("an anchor in itself", "&a [*a]", "anchors")
recipe("a merge", INGREDIENTS + "<<: {method: task}", "key")
recipe("a tag that runs code", INGREDIENTS + "method: !!python/object/apply:os.mkdir [harmed]")
recipe("a tag that is unknown", INGREDIENTS + "method: !x y")
recipe("binary text", INGREDIENTS + "method: !!binary aGVsbG8=", "method")
recipe("a set", INGREDIENTS + "method: !!set {uniform}", "method")
recipe("no YAML", "method: [", "not valid YAML")
recipe("tabs", "method:\tx\n\ty: z")
recipe("control characters", "method: \x07")
recipe("not UTF-8", b"method: \xff\xfe")
recipe("UTF-16 with a half", b"\xff\xfem\0e")
recipe("empty", "")
recipe("only a comment", "# nothing")
recipe("text", "uniform")
recipe("a list", "[a, b]")
recipe("two documents", INGREDIENTS + "---\n" + INGREDIENTS)
recipe("nested", lambda: "ingredients: " + "[" * 100_000, "nested too deeply")
recipe("nested blocks", lambda: "\n".join(" " * i + "a:" for i in range(500)), "nested too deeply")
recipe("2 MB", lambda: "#" * (2 << 20), "bytes")
recipe("a million brackets", lambda: "ingredients: [" + "[]," * 300_000 + "]")
recipe("a number of 100,000 digits", lambda: INGREDIENTS + "last: " + "9" * 100_000, "too long")
recipe("a number of 100,000 binary digits", lambda: INGREDIENTS + "last: 0b" + "1" * 100_000, "too long")
recipe("a number to the base of 60", lambda: INGREDIENTS + "last: 1" + ":1" * 100_000, "too long")
recipe("a fraction to the base of 60", lambda: INGREDIENTS + "decay: 1" + ":1" * 400 + ".5", "decay")
recipe("a date that is none", INGREDIENTS + "last: 2001-99-99", "last")
recipe("an unknown key", INGREDIENTS + "pickle: x", "unknown key")
recipe("an unknown key of 100,000 characters", lambda: INGREDIENTS + '? "' + "x" * 100_000 + '"\n: y', "x")
recipe("a key twice", INGREDIENTS + INGREDIENTS, "twice")
recipe("a number as a key", INGREDIENTS + "1: 2", "must be text")
recipe("a list as a key", INGREDIENTS + "? [a]\n: 2", "must be text")
recipe("ingredients that are numbers", "ingredients: [1, 2]", "ingredients")
recipe("ingredients that are null", "ingredients:", "ingredients")
recipe("ingredients with NUL", 'ingredients: ["a\\0.safetensors", b.safetensors]', "null")
recipe("weights that are text", INGREDIENTS + "weights: heavy", "weights")
recipe("weights that are NaN", INGREDIENTS + "weights: [.nan, 1]", "weights")
recipe("weights that are infinite", INGREDIENTS + "weights: [.inf, 1]", "weights")
recipe("weights in levels", INGREDIENTS + "weights: {a: 1}", "weights")
recipe("too many weights", INGREDIENTS + "weights: [1, 2, 3]", "weights")
recipe("a flag that is text", INGREDIENTS + "allow-nonfinite: perhaps", "allow-nonfinite")
recipe("a pattern that is none", INGREDIENTS + "only: '('", "only")
recipe("a layer's pattern that is none", INGREDIENTS + "layers: {'(': {weights: [1, 2]}}", "'('")
recipe("layers that are a list", INGREDIENTS + "layers: [1]", "layers")
recipe("a layer that is null", INGREDIENTS + "layers: {a: }", "a")
recipe("a layer of paths", INGREDIENTS + "layers: {a: {ingredients: [x]}}", "paths")


@case("recipes", "not a regular file", "soup.yaml")
def a_recipe_that_is_a_pipe(root, stack):
    return ["--recipe", made(root / "soup.yaml", os.mkfifo)]


@case("recipes", "not a regular file", "soup.json")
def a_record_that_is_a_device(root, stack):
    return ["--recipe", made(root / "soup.json", lambda path: path.symlink_to("/dev/zero"))]


# --- records ---------------------------------------------------------------------------------------------------------


@functools.cache
def right_record() -> str:
    """That of a soup of a.safetensors and b.safetensors in the folder ROOT."""
    from averaging import cli

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write(Path("a.safetensors"))
        cli.main([*two(Path()), "-o", "out", "-q"])
        return Path("out/soup.json").read_text().replace(os.path.realpath(folder), "ROOT")


def record(name: str, change: Callable[[dict], object], *says: str, works: bool = False) -> None:
    """A case of a record that was right before it was changed."""

    def build(root: Path, stack: object) -> list:
        two(root)
        content = json.loads(right_record().replace("ROOT", str(root)))
        new = change(content)
        if new is not None or works:
            content = content if new is None else new
        write(root / "soup.json", content if isinstance(content, bytes) else json.dumps(content).encode())
        return ["--recipe", "soup.json"]

    add("records", name, build, *says, works=works)


def put(*where: str | int, value: object) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        for key in where[:-1]:
            content = content[key]
        content[where[-1]] = value

    return change


record("as it was", lambda content: None, works=True)
record("empty", lambda content: b"", "soup.json")
record("a list", lambda content: b"[]", "soup.json")
record("nested", lambda content: b'{"method":' * 100_000, "soup.json")
for key in ("ingredients", "weight", "checksum", "path"):
    record(
        f"without {key}",
        lambda content, key=key: [one.pop(key, None) for one in (content, *content["ingredients"])] and None,
        "soup.json",
    )
for name, value in {"null": None, "number": 7, "text": "x", "list": [], "object": {}}.items():
    record(f"ingredients: {name}", put("ingredients", value=value), "soup.json")
    record(f"ingredient: {name}", put("ingredients", 0, value=value), "soup.json")
    if name != "text":
        record(f"path: {name}", put("ingredients", 0, "path", value=value), "soup.json")
    if name != "number":
        record(f"weight: {name}", put("ingredients", 0, "weight", value=value), "soup.json")
        record(f"divisor: {name}", put("divisor", value=value), "soup.json")
    record(f"coefficients: {name}", put("coefficients", value=value), "soup.json") if value else None
    if name != "null":
        record(f"dtype: {name}", put("dtype", value=value), "dtype" if name == "text" else "soup.json")
        record(f"like: {name}", put("like", value=value), "x" if name == "text" else "soup.json")
    record(f"checksum: {name}", put("ingredients", 0, "checksum", value=value), "soup.json", "a.safetensors")
for name, value in {"NaN": NAN, "infinity": INF, "of 400 digits": 10**400, "true": True}.items():
    record(f"weight {name}", put("ingredients", 0, "weight", value=value), "soup.json")
    record(f"divisor {name}", put("divisor", value=value), "soup.json")
record("divisor zero", put("divisor", value=0), "soup.json")
record("divisor zero with a fraction", put("divisor", value=-0.0), "soup.json")
record("coefficients for one tensor", put("coefficients", value={"a": [0.5, 0.5]}), "soup.json", "'b'")
record(
    "coefficients for another",
    put("coefficients", value={"a": [0.5, 0.5], "b": [0.5, 0.5], "c": [1, 1]}),
    "soup.json",
    "'c'",
)
record("too few coefficients", put("coefficients", value={"a": [0.5], "b": [0.5, 0.5]}), "soup.json", "'a'")
record("coefficients that are text", put("coefficients", value={"a": ["x", "y"], "b": [0.5, 0.5]}), "soup.json", "'a'")
record("coefficients that are NaN", put("coefficients", value={"a": [NAN, 0.5], "b": [0.5, 0.5]}), "soup.json", "'a'")
record("a path that is a device", put("ingredients", 0, "path", value="/dev/zero"), "/dev/zero")
record("a path with NUL", put("ingredients", 0, "path", value="a\0.safetensors"), "soup.json")
record("a path that is gone", put("ingredients", 0, "path", value="gone.safetensors"), "gone.safetensors")
record(
    "one path twice",
    lambda content: content["ingredients"][0].update(path=content["ingredients"][1]["path"]),
    "soup.json",
)
record("only: a number", put("only", value=7), "soup.json")
record("only: no pattern", put("only", value="("), "'('")
record("method: null", put("method", value=None), "soup.json")
record("method: fisher", put("method", value="fisher"), "soup.json")
record(
    "200,000 ingredients",
    lambda content: content.update(ingredients=[{"path": "a.safetensors"}] * 200_000),
    "soup.json",
)
record("a fact that is deep", put("x", value=nested(900)), "soup.json")


# --- evaluations -----------------------------------------------------------------------------------------------------


def evaluation(name: str, printed: str, *says: str, works: bool = False, options: tuple = ()) -> None:
    """A case of a search whose evaluation prints what a Python expression gives."""

    def build(root: Path, stack: object) -> list:
        write(root / "e.py", f"import sys; sys.stdout.buffer.write({printed})".encode())
        command = f"{sys.executable} -I -S e.py {{checkpoint}}"
        return [*two(root), "--method", "greedy", "--evaluate-command", command, *options]

    add("evaluations", name, build, *says, works=works)


evaluation("a number", "b'1.5'", works=True)
evaluation("text around a number", "b'loading\\n1.5\\n'", works=True)
for name, printed in {
    "nothing": "b''",
    "spaces": "b' \\n \\n'",
    "text": "b'good'",
    "NaN": "b'NaN'",
    "infinity": "b'-Infinity'",
    "null": "b'null'",
    "a list": "b'[1]'",
    "text in quotes": "b'\"good\"'",
    "an empty object": "b'{}'",
    "an object of null": "b'{\"x\": null}'",
    "an object of lists": "b'{\"x\": [1]}'",
    "an object of NaN": "b'{\"x\": NaN}'",
    "two numbers": 'b\'{"x": 1, "y": 2}\'',
    "a number of 400 digits": "b'9' * 400",
    "a number of 10,000 digits": "b'9' * 10000",
    "an object of a number of 400 digits": "b'{\"x\": ' + b'9' * 400 + b'}'",
    "nested lists": "b'[' * 100000",
    "5 MB of text": "b'x' * 5_000_000",
    "5 MB of numbers": "b'[' + b'1,' * 2_500_000 + b'1]'",
    "no UTF-8": "b'\\xff\\xfe'",
    "NUL": "b'\\0'",
    "a failure": "b''); sys.exit('no data\\nat all'",
    "a failure that says 5 MB": "b''); sys.exit('x' * 5_000_000",
    "its own death": "b'1'); import os; os.kill(os.getpid(), 9",
}.items():
    evaluation(name, printed, "the evaluation")
for name, text_ in {
    "no such program": "./gone {checkpoint}",
    "a folder": "./old {checkpoint}",
    "no program": "{checkpoint}",
    "no checkpoint": "true",
    "an open quote": "'{checkpoint}",
    "NUL": "true \0 {checkpoint}",
}.items():
    add(
        "evaluations",
        f"a command: {name}",
        lambda root, stack, text=text_: [*two(root), "--method", "greedy", "--evaluate-command", text],
        "",
    )
for name, content in {"no JSON": b"[", "a list": b"[]", "nested": b'{"x":' * 100_000}.items():

    def cached(root: Path, stack: object, content: bytes = content) -> list:
        write(root / "old.evaluations.json", content)
        return [*two(root), "--method", "greedy", "--evaluate-command", "stat -c %i {checkpoint}"]

    add("evaluations", f"a cache: {name}", cached, "old.evaluations.json")


# --- what is read ----------------------------------------------------------------------------------------------------

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ALLOWED = (sys.prefix, sys.base_prefix, HERE, os.path.expanduser("~/.cache"), "/proc", "/dev/fd", "/dev/null")
_folder: str | None = None
_outside: list[str] = []


def _audit(event: str, arguments: tuple) -> None:
    if _folder is not None and event in ("open", "os.listdir", "os.scandir"):
        path = arguments[0]
        if isinstance(path, str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(path))
            if not any(inside(path, folder) for folder in (_folder, *ALLOWED)):
                _outside.append(path)


def inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


@contextlib.contextmanager
def watching(folder: Path) -> Iterator[list[str]]:
    """What Python opens or lists meanwhile, but neither in the folder nor among its own files."""
    global _folder
    if _audit not in _hooked:
        _hooked.append(_audit)
        sys.addaudithook(_audit)
    _outside.clear()
    _folder = str(folder)
    try:
        yield _outside
    finally:
        _folder = None


_hooked: list[Callable] = []  # once and for all: a hook cannot be removed


# --- running them ----------------------------------------------------------------------------------------------------

MORE = ("hostile_formats", "hostile_methods")  # the modules with further cases
SERVE = "import sys; sys.path[0] = {folder!r}; import hostile, {more}; hostile.serve()"
CHANGED: set[str] = set()  # what the running case itself changes meanwhile
CACHES = (".evaluations.json", ".learned.json")


def snapshot(root: Path) -> dict[str, object]:
    """What lies in a folder: kinds, targets of links, contents; of huge files only the size."""
    found: dict[str, object] = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            if name.endswith(CACHES):
                continue
            status = os.lstat(path)
            content: object = status.st_size
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISDIR(status.st_mode):
                content = None
            elif stat.S_ISREG(status.st_mode) and status.st_size < 1 << 28:
                content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            found[os.path.relpath(path, root)] = stat.S_IFMT(status.st_mode), content
    return found


def tensors(path: Path) -> dict:
    """What a checkpoint holds, read by the libraries that define the formats."""
    import torch
    from safetensors.torch import load, load_file

    if path.suffix in (".pt", ".ckpt", ".bin"):
        content = torch.load(path, weights_only=True)
        return next((content[key] for key in ("state_dict", "model", "module") if key in content), content)
    if (path / ".metadata").exists():
        return in_pieces(path)
    if path.is_dir() and not any(path.rglob("*.safetensors")):
        named = path / "pytorch_model.bin.index.json"
        files = json.loads(named.read_text())["weight_map"].values() if named.exists() else []
        files = {path / file for file in files} or path.rglob("mp_rank_00_model_states.pt")
        files = [path / "pytorch_model.bin"] if (path / "pytorch_model.bin").exists() else files
        return {name: tensor for file in files for name, tensor in tensors(file).items()}
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*/*.safetensors"))
        if (path / INDEX).exists():
            files = [path / file for file in sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))]
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    return load_file(path) if str(path).isascii() else load(path.read_bytes())  # it opens no path that is not Unicode


def in_pieces(path: Path) -> dict:
    """What torch reads of a distributed checkpoint."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load

    described = FileSystemReader(path).read_metadata().state_dict_metadata
    held = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in described.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(held, checkpoint_id=path, no_dist=True)
    return held


def mean(ingredients: list[dict]) -> dict:
    """The uniform soup in float64, rounded once; what is not floating-point is the last ingredient's."""
    import torch

    soup = {}
    for name, last in ingredients[-1].items():
        if last.is_complex():
            soup[name] = (sum(one[name].to(torch.complex128) for one in ingredients) / len(ingredients)).to(last.dtype)
        elif last.is_floating_point() and last.itemsize > 1:
            soup[name] = (sum(one[name].double() for one in ingredients) / len(ingredients)).to(last.dtype)
        else:
            soup[name] = last
    return soup


def difference(output: Path, ingredients: list[Path]) -> str | None:
    """What is wrong with a uniform soup of these ingredients, if anything."""
    import torch

    read = [tensors(path) for path in ingredients]
    soup, wanted = tensors(output), mean(read)
    if soup.keys() != wanted.keys():
        return f"it holds {sorted(soup)[:3]}, not {sorted(wanted)[:3]}"
    for name, tensor in wanted.items():
        one, two = (x.contiguous().reshape(-1).view(torch.uint8) for x in (soup[name], tensor))
        same = (soup[name].shape, soup[name].dtype) == (tensor.shape, tensor.dtype) and torch.equal(one, two)
        if not same and not torch.allclose(soup[name], tensor, rtol=0, atol=0, equal_nan=True):
            return f"{name!r} is {soup[name]}, not {tensor}"
    return None


def attempt(case: Case, root: Path) -> list[str]:
    """Run a case in this folder; returns what was wrong."""
    from averaging import cli

    os.chdir(root)
    write(root / "a.safetensors")
    write(root / "old" / "model.safetensors", b"old")
    write(root / "old" / "soup.json", b"{}")
    (root / "tmp").mkdir()
    tempfile.tempdir = str(root / "tmp")
    out, err = io.StringIO(), io.StringIO()
    wrong: list[str] = []
    CHANGED.clear()
    patches: list = []
    given = [str(argument) for argument in case.build(root, patches)]
    own = given[0] == "inspect" or {"-o", "--force"} & {*given}
    arguments = given if own else [*given, "-o", "old", "--force"]
    with contextlib.ExitStack() as stack:
        before, files = snapshot(root), sorted(os.listdir("/proc/self/fd"))
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        peak, began = _memory("VmRSS"), time.process_time()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            for patch in patches:
                stack.enter_context(patch)
            outside = stack.enter_context(watching(root))
            try:
                status: object = cli.main([*arguments, "-q"])
            except SystemExit as exit:
                status = exit.code
            except BaseException as error:
                traceback.print_exc(limit=-4)
                status = f"a traceback: {error!r:.300}"
    seconds, taken = time.process_time() - began, _memory("VmHWM") - peak
    gc.collect()
    gc.freeze()  # modules that were loaded now: no later case need look through them
    after = snapshot(root)
    said = err.getvalue()
    if status != (0 if case.works else 2):
        wrong.append(f"it ended with {status}: {said[-2000:]}")
    lines = [line for line in said.splitlines() if not (case.works and line.startswith("soup: warning: "))]
    if len(lines) != (not case.works) or len(said) > 4000 or not said.replace("\n", "").isprintable():
        wrong.append(f"it should be one line: {said!r:.1000}")
    wrong += [f"it does not say {words!r}: {said!r:.1000}" for words in case.says if words not in said]
    if out.getvalue():
        wrong.append(f"it printed {out.getvalue()!r:.200}")
    if seconds > SECONDS:
        wrong.append(f"it took {seconds:.1f} s")
    if taken > MEMORY:
        wrong.append(f"it took {taken >> 20} MB")
    if outside:
        wrong.append(f"it read {outside}")
    if left := set(os.listdir("/proc/self/fd")) - set(files):
        wrong.append(f"files are left open: {left}")
    if case.works:
        output = root / arguments[arguments.index("-o") + 1]
        inside = os.path.relpath(output, root)
        before, after = (
            {n: c for n, c in x.items() if not (n + "/").startswith(inside + "/")} for x in (before, after)
        )
        record = output / "soup.json" if output.is_dir() else output.with_suffix(".soup.json")
        after.pop(os.path.relpath(record, root), None)
        if status == 0 and case.compared and not CHANGED:
            ingredients = [Path(one["path"]) for one in json.loads(record.read_text())["ingredients"]]
            found = difference(output, ingredients) if all(path.exists() for path in ingredients) else None
            if found:
                wrong.append(found)
    for name in CHANGED:
        before.pop(name, None), after.pop(name, None)
    if before != after:
        wrong.append(f"the disk changed: {sorted(set(before.items()) ^ set(after.items()))[:4]}")
    return wrong


def _memory(which: str) -> int:
    found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(found.split()[1]) << 10


class Worker:
    """A process that runs cases, one after the other; another takes its place when it dies or hangs."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def run(self, group: str, name: str) -> list[str]:
        """What was wrong with a case."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE.format(folder=os.path.dirname(__file__), more=", ".join(MORE))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
            assert self.process.stdout.readline() == b"ready\n"
        self.process.stdin.write(json.dumps([group, name]).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
                self.close()
                return [f"it hung {answer[-2000:]}"]
            part = self.process.stdout.read(1 << 16)
            if not part:
                status = self.process.wait()
                self.close()
                return [f"the process died with {status}: {answer[-2000:]}"]
            answer += part
        try:
            return json.loads(answer)
        except ValueError:
            return [f"it printed {answer[:2000]!r}"]

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def serve() -> None:
    import torch  # noqa: F401  (what it takes is no case's)

    from averaging import soups  # noqa: F401

    os.fsync = lambda descriptor: None  # nothing here outlives a loss of power
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), "torchinductor"))
    memory = "/dev/shm"  # where folders come and go the quickest
    place = memory if os.path.isdir(memory) and shutil.disk_usage(memory).free > 1 << 30 else "/tmp"
    places = sys.path.copy()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        group, name = json.loads(line)
        with tempfile.TemporaryDirectory(dir=place, prefix="hostile-") as root:
            try:
                wrong = attempt(CASES[group][name], Path(root))
            except BaseException:
                wrong = [f"the case itself failed: {traceback.format_exc(limit=-6)}"]
            os.chdir("/")
            sys.path[:] = places  # evaluations are also looked for in the folder
        print(json.dumps(wrong), flush=True)
