"""Mutated files: an error that is clear, or the right result; never anything outside the folder is read.

`HYPOTHESIS_EXAMPLES=100000 pytest tests/test_fuzz.py` is the long form, of other inputs each time.
"""

import contextlib
import json
import os
import re
import tempfile
import zipfile
from pathlib import Path
from unittest import mock

import dcp_files
import hostile
import hostile_formats
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from averaging import cli

EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES") or 0)
CHOSEN = settings(
    max_examples=EXAMPLES or 30,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
words = st.text(max_size=6) | st.sampled_from(["a", "b", "dtype", "../x", "/etc/passwd", "\0", "F32", "__metadata__"])
numbers = st.integers(-2, 50) | st.sampled_from([2**31, 2**63, 2**64, -(2**63)]) | st.floats()
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(words, inside, max_size=4),
    max_leaves=8,
)


def mutated(content):
    """The same, but somewhere in it another value, another key, or one less."""

    @st.composite
    def mutate(draw, one):
        change = draw(st.integers(0, 9))
        if isinstance(one, dict | list) and one and change < 8:
            key = draw(st.sampled_from(sorted(one) if isinstance(one, dict) else range(len(one))))
            copy = one.copy()
            if change == 0:
                del copy[key]
            elif change == 1 and isinstance(copy, dict):
                copy[draw(words)] = copy.pop(key)
            else:
                copy[key] = draw(mutate(one[key]))
            return copy
        return draw(values)

    return mutate(content)


@st.composite
def damaged(draw, content: bytes):
    """The same bytes, but some of them are others, missing, or there twice."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(made) - 1, 0)))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            made[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
        elif kind == 1:
            del made[at : at + draw(st.integers(1, 20))]
        elif kind == 2:
            made[at:at] = made[at : at + draw(st.integers(1, 20))]
        elif made:
            made[at % len(made)] ^= 1 << draw(st.integers(0, 7))
    return bytes(made)


def named(content: bytes, folder: Path) -> list[str]:
    """The paths that a text may mean: each of its words, from this folder on."""
    words = re.split(r"[\[\]{}'\",:\s]+", content.decode(errors="replace"))
    return [os.path.abspath(folder / word) for word in words if "\0" not in word]


def attempt(build, capsys, readable=True, may_name=()) -> None:
    """Cook what ``build`` returns in a fresh folder; check what came of it.

    What is in the files of ``may_name``, recipes and the like, may be read wherever it is.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name), mock.patch.object(tempfile, "tempdir", name):
        root = Path(name)
        hostile.write(root / "a.safetensors")
        arguments = [str(argument) for argument in build(root)]
        before = hostile.snapshot(root)
        with hostile.watching(root) as outside:
            status = cli.main([*arguments, "-o", "out", "-q"])
        said = capsys.readouterr().err
        meant = [path for file in may_name for path in named((root / file).read_bytes(), root)]
        assert not [path for path in outside if not any(hostile.inside(path, one) for one in meant)]
        if status:
            assert status == 2
            assert len([line for line in said.splitlines() if "warning" not in line]) == 1, said
            assert hostile.snapshot(root) == before
        else:
            left = {path: what for path, what in hostile.snapshot(root).items() if path.split("/")[0] != "out"}
            assert left == before
            if readable:
                ingredients = [
                    Path(one["path"]) for one in json.loads(Path("out/soup.json").read_text())["ingredients"]
                ]
                assert hostile.difference(root / "out", ingredients) is None


@CHOSEN
@given(header=mutated({"__metadata__": {"format": "pt"}, "a": hostile.A, "b": hostile.B}))
def test_headers(capsys, header):
    attempt(lambda root: ["a.safetensors", hostile.write(root / "b.safetensors", hostile.raw(header))], capsys)


@CHOSEN
@given(content=damaged(hostile.GOOD))
def test_safetensors(capsys, content):
    attempt(lambda root: ["a.safetensors", hostile.write(root / "b.safetensors", content)], capsys)


@CHOSEN
@given(index=mutated({"metadata": {"total_size": 44}, "weight_map": hostile.SHARDS}))
def test_indices(capsys, index):
    attempt(lambda root: [hostile.sharded(root / "c"), hostile.sharded(root / "d", json.dumps(index).encode())], capsys)


@CHOSEN
@given(data=st.data())
def test_torch_files(capsys, data, tmp_path_factory):
    path = hostile.zipped(
        tmp_path_factory.getbasetemp() / "good.pt", hostile.weights(w=hostile.PLAIN), {"0": hostile.FOUR}
    )
    content = data.draw(damaged(path.read_bytes()))

    def build(root):
        for name in "cd":
            (root / f"{name}.pt").write_bytes(content)
        return ["c.pt", "d.pt"]

    # What torch cannot read there is no second reader for.
    try:
        path.write_bytes(content)
        read = torch.load(path, weights_only=True)
        readable = all(isinstance(tensor, torch.Tensor) for tensor in read.values())
    except Exception:
        readable = False
    attempt(build, capsys, readable)


@CHOSEN
@given(
    content=damaged(b"ingredients: [a.safetensors, b.safetensors]\nmethod: uniform\nweights: [1, 1]\ndtype: float32\n")
)
def test_recipes(capsys, content):
    def build(root):
        hostile.two(root)
        return ["--recipe", hostile.write(root / "soup.yaml", content)]

    attempt(build, capsys, readable=False, may_name=["soup.yaml"])


@CHOSEN
@given(data=st.data())
def test_records(capsys, data):
    def build(root):
        cli.main([*hostile.two(root), "-o", "first", "-q"])
        record = json.loads((root / "first" / "soup.json").read_text())
        return ["--recipe", hostile.write(root / "soup.json", json.dumps(data.draw(mutated(record))).encode())]

    attempt(build, capsys, readable=False, may_name=["soup.json"])


@CHOSEN
@given(data=st.data())
def test_distributed_checkpoints(capsys, data):
    def build(root):
        for name in ("step-1", "step-2"):
            dcp_files.write(root / name, {"w": torch.ones(4, 4)}, {"w": [[2], []]})
        bad = root / "step-2" / data.draw(st.sampled_from([".metadata", "__0_0.distcp", "__2_0.distcp"]))
        bad.write_bytes(data.draw(damaged(bad.read_bytes())))
        return ["step-1", "step-2"]

    attempt(build, capsys, readable=False)


@CHOSEN
@given(data=st.data())
def test_deepspeed_folders(capsys, data):
    def build(root):
        stage = data.draw(st.sampled_from([2, 3]))
        paths = hostile.CASES["ZeRO"][f"as it should be, stage {stage}"].build(root, None)
        bad = root / "bad" / data.draw(st.sampled_from(sorted(path.name for path in (root / "bad").iterdir())))
        with zipfile.ZipFile(bad) as archive:
            pickle = archive.read("x/data.pkl")
        hostile.zipped(bad, data.draw(damaged(pickle)), {"0": hostile.FOUR})
        return paths

    attempt(build, capsys, readable=False)


@CHOSEN
@given(config=mutated(hostile_formats.LORA | {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"q_proj": 2}}))
def test_adapters(capsys, config):
    def build(root):
        for name, said in (("one", hostile_formats.LORA), ("two", config)):
            hostile.write(root / name / "adapter_model.safetensors", hostile_formats.factors())
            hostile.write(root / name / "adapter_config.json", json.dumps(said).encode())
        return ["one", "two", "--lora", "product"]

    attempt(build, capsys, readable=False)
