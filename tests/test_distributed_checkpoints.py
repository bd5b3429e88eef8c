"""Torch distributed checkpoints as ingredients: read where the processes left the pieces, refused where they lie."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import subprocess
import sys

import pytest
import torch
from dcp_files import put, write
from ranks import once_on_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict_loader import load

from averaging import cli
from averaging.checkpoints import Checkpoint, find
from averaging.checkpoints.files import Pieces
from averaging.soups import engine, output, uniform
from averaging.soups.evaluation import fingerprint


def same(one, other):
    assert dict(one).keys() == dict(other).keys()
    for name, tensor in other.items():
        assert one[name].dtype == tensor.dtype
        assert torch.equal(one[name], tensor), name


def mean(one, other):
    return {
        name: ((one[name].double() + other[name].double()) / 2).to(one[name].dtype)
        if one[name].is_floating_point()
        else one[name]
        for name in one
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder, results = once_on_ranks(2, "dcp_runs:write", tmp_path_factory.getbasetemp())
    return folder, results[0]


@pytest.mark.parametrize(
    ("layout", "key"),
    [("fsdp", "fsdp"), ("plain", "fsdp"), ("app", "fsdp"), ("tensor-parallel", "tensor-parallel")],
)
def test_what_two_processes_wrote(written, layout, key, tmp_path):
    folder, tensors = written
    found = find(folder / layout)
    assert [(c.kind, c.step) for c in found] == [("distributed", 0), ("distributed", 1)]
    same(found[0], tensors[f"{key}0"])
    assert cli.main([str(folder / layout), "-o", str(tmp_path / "out"), "-q"]) == 0
    same(load_file(tmp_path / "out" / "model.safetensors"), mean(tensors[f"{key}0"], tensors[f"{key}1"]))
    # as from files of the same content
    for i in range(2):
        save_file(tensors[f"{key}{i}"], tmp_path / f"{i}.safetensors")
    files = [Checkpoint(tmp_path / f"{i}.safetensors") for i in range(2)]
    assert [fingerprint(c) for c in found] == [fingerprint(c) for c in files]
    same(uniform(found), uniform(files))


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (1001,), "b": (57, 33), "c": (4, 9, 8), "d": (3, 5, 2, 7), "e": (0, 3), "s": ()}
    return {
        f"{name}.{dtype}": torch.randn(shape, generator=g).mul(50).to(dtype)
        for name, shape in shapes.items()
        for dtype in (torch.float32, torch.bfloat16, torch.uint8)
    }


EIGHT = {
    "a": [[1, 2, 400, 401, 700, 999, 1000]],  # eight pieces, uneven
    "b": [[13, 14, 50], [1]],
    "c": [[1], [2], [3]],
    "d": [[], [2], [], [1, 6]],
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("contiguous", [True, False])
def test_uneven_pieces_in_any_dimension(tmp_path, monkeypatch, contiguous):
    def turned(part):
        return part.movedim(0, -1).contiguous().movedim(-1, 0) if part.dim() > 1 else part

    cuts = {name: EIGHT[name[0]] for name in tensors() if name[0] in EIGHT}
    for i in range(2):
        write(tmp_path / f"step-{i}", tensors(i), cuts, **({} if contiguous else {"layout": turned}))
        loaded = {name: torch.empty_like(tensor) for name, tensor in tensors().items()}
        load(loaded, checkpoint_id=tmp_path / f"step-{i}", no_dist=True)  # torch agrees
        same(loaded, tensors(i))
    found = find(tmp_path)
    for i in range(2):
        same(found[i], tensors(i))
    for piece in (256 * 1024, 1024):  # whatever is read at a time
        monkeypatch.setattr(engine, "PIECE", piece)
        chosen = [name for name in tensors() if not name.endswith("uint8")]
        cooked = uniform(found, only="float")
        same({name: cooked[name] for name in chosen}, mean(*({n: tensors(i)[n] for n in chosen} for i in range(2))))


@pytest.mark.parametrize("gathered", [1, 64, 1 << 18])
def test_any_part_of_a_tensor_can_be_read(tmp_path, monkeypatch, gathered):
    monkeypatch.setattr("averaging.checkpoints.files.GATHERED", gathered)
    held = tensors()
    cuts = {name: EIGHT[name[0]] for name in held if name[0] in EIGHT}
    checkpoint = Checkpoint(write(tmp_path / "m", held, cuts))
    for name in held:
        entry, raw = checkpoint.entries[name], held[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert isinstance(entry, Pieces)
        descriptors = {file: os.open(file, os.O_RDONLY) for file in entry.files}
        for start in range(0, len(raw), 37):
            for size in (1, 2, 64, 333):
                part = memoryview(bytearray(len(raw[start : start + size])))
                entry.read(descriptors, part, start)
                assert part == raw[start : start + size]
        for descriptor in descriptors.values():
            os.close(descriptor)


def test_more_files_than_may_be_open(tmp_path):
    held = {"w": torch.randn(200, 3)}
    for i in range(2):
        write(tmp_path / f"step-{i}", {"w": held["w"] * i}, {"w": [[*range(1, 200)], []]}, files=200)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        same(uniform(find(tmp_path)), {"w": held["w"] / 2})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_large_model_becomes_shards_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "SHARD", 8000)
    held = {name: tensor for name, tensor in tensors().items() if "uint8" not in name}
    for i in range(2):
        write(tmp_path / f"step-{i}", held)
    with pytest.warns(UserWarning, match="the same content"):
        uniform([tmp_path / "step-0", tmp_path / "step-1"], tmp_path / "out")
    cooked = Checkpoint(tmp_path / "out")
    assert (cooked.kind, len(cooked.shards)) == ("huggingface", 3)
    assert cooked.index["metadata"]["total_size"] == cooked.nbytes
    same(cooked, held)


@pytest.mark.parametrize("prefix", ["", "net."])
def test_like_a_model_folder(tmp_path, prefix):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    config.tie_word_embeddings = True
    states = []
    for i in range(2):
        torch.manual_seed(i)
        model = transformers.LlamaForCausalLM(config)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        write(tmp_path / f"step-{i}", {prefix + name: tensor for name, tensor in states[i].items()})
        assert "lm_head.weight" in states[i]  # which the folder does not hold
    model.save_pretrained(tmp_path / "model")
    uniform([tmp_path / "step-0", tmp_path / "step-1"], tmp_path / "out", like=tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    same(opened.state_dict(), mean(*states))


def test_the_names_of_the_model(tmp_path):
    def nested(*paths):
        def change(said):
            said.planner_data = dict(zip(said.state_dict_metadata, paths, strict=True)) if paths else None

        return change

    one = torch.ones(1)

    def names(folder, fqns, change):
        return set(Checkpoint(write(tmp_path / folder, dict.fromkeys(fqns, one), change=change)))

    inner = "model.w", "optim.state.w.exp_avg"
    assert names("a", inner, nested(("model", "w"), ("optim", "state", "w", "exp_avg"))) == {"w"}
    assert names("b", inner, nested()) == {"w"}
    assert names("c", ("model.w", "model.v"), nested(("model.w",), ("model.v",))) == {"model.w", "model.v"}
    assert names("d", ("app.model.model.w", "app.optim.x"), nested()) == {"model.w"}
    assert names("e", ("state_dict.model.w", "optimizer_0.x"), nested()) == {"model.w"}
    assert names("f", ("model.w", "lm_head.w"), nested()) == {"model.w", "lm_head.w"}
    assert names("g", ("step", "model.w"), nested(("step",), ("model", "w"))) == {"w"}
    with pytest.raises(ValueError, match=r"several models \(student\.model, teacher\.model\)"):
        names("h", ("s", "t"), nested(("student", "model", "w"), ("teacher", "model", "w")))
    with pytest.raises(ValueError, match=r"holds no model's weights.*it holds optim"):
        names("i", ("optim.x",), nested(("optim", "x")))


def test_the_step(tmp_path):
    def step(folder):
        return Checkpoint(tmp_path / folder).step

    for folder in ("step-30", "checkpoint-40/pytorch_model_fsdp_0", "epoch=0-step=50.ckpt"):
        write(tmp_path / folder, {"w": torch.ones(1)})
    torch.save({"global_step": 60, "pytorch-lightning_version": "2"}, tmp_path / "epoch=0-step=50.ckpt" / "meta.pt")
    assert [step(f) for f in ("step-30", "checkpoint-40", "checkpoint-40/pytorch_model_fsdp_0")] == [30, 40, 40]
    assert step("epoch=0-step=50.ckpt") == 60
    assert [c.step for c in find(tmp_path)] == [40]  # of transformers, if there are any
    write(tmp_path / "l" / "last.ckpt", {"w": torch.ones(1)})
    write(tmp_path / "l" / "epoch=0-step=50.ckpt", {"w": torch.ones(1)})
    torch.save({"global_step": 50}, tmp_path / "l" / "last.ckpt" / "meta.pt")
    assert [c.path.name for c in find(tmp_path / "l")] == ["epoch=0-step=50.ckpt"]


# --- bad input --------------------------------------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


PLACE = ("storage_data",)
TENSOR = ("state_dict_metadata",)
BOX = dcp.ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 4]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put((*PLACE, "relative_path"), "../step-1/__0_0.distcp"), "own folder"),
        (put((*PLACE, "relative_path"), "/etc/passwd"), "own folder"),
        (put((*PLACE, "relative_path"), "__9_0.distcp"), "__9_0.distcp, which is missing"),
        (put((*PLACE, "relative_path"), 3), "own folder"),
        (put((*PLACE, "offset"), 5), "cannot be read"),
        (put((*PLACE, "offset"), -5), "impossible bytes"),
        (put((*PLACE, "offset"), 10**15), "cut off"),
        (put((*PLACE, "length"), 100), "cannot be read"),
        (put((*PLACE, "length"), 10**15), "cut off"),
        (put((*PLACE, "length"), "1"), "impossible bytes"),
        (put((*PLACE, "transform_descriptors"), ["zstd"]), "compressed"),
        (put((*TENSOR, "size"), torch.Size([5, 4])), "overlap, or some are missing"),
        (put((*TENSOR, "size"), torch.Size([3, 4])), "outside"),
        (put((*TENSOR, "size"), torch.Size([4])), "outside"),
        (put((*TENSOR, "size"), (-4, -4)), "impossible shape"),
        (put((*TENSOR, "size"), (2**40, 2**40)), "impossible shape"),
        (put((*TENSOR, "size"), None), "does not say"),
        (put((*TENSOR, "chunks"), []), "some are missing"),
        (put((*TENSOR, "chunks"), [BOX, BOX]), "overlap"),
        (put((*TENSOR, "chunks", 1), dcp.ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([2, 4]))), "lies nowhere"),
        (put((*TENSOR, "chunks"), ["x"]), "does not say"),
        (put((*TENSOR, "properties", "dtype"), torch.bfloat16), "another dtype"),
        (put((*TENSOR, "properties", "dtype"), torch.float64), "another dtype"),
        (put((*TENSOR, "properties", "dtype"), torch.quint8), "cannot be averaged"),
        (put(("storage_data",), {}), "lies nowhere"),
        (put(("storage_data",), None), "does not say"),
        (put(("storage_data",), 5), "does not say"),
        (put(("state_dict_metadata",), {}), "no model's weights"),
        (put(("state_dict_metadata",), {"x": dcp.BytesStorageMetadata()}), "no model's weights"),
        (put(("planner_data",), Code()), "names posix.mkdir"),
        (put(("planner_data",), Exception("x")), "names builtins.Exception"),
    ],
)
def test_metadata_that_lie(tmp_path, capsys, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    held = {"w": torch.ones(4, 4)}
    write(tmp_path / "step-1", held, {"w": [[2], []]})
    write(tmp_path / "step-2", held, {"w": [[2], []]}, change)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["step-1", "step-2", "-o", "out", "-q"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("soup: error: ")
    assert "Traceback" not in printed
    assert words in printed
    assert "step-2" in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_metadata_that_are_none(tmp_path):
    good = (write(tmp_path / "m", {"w": torch.ones(4)}) / ".metadata").read_bytes()
    bombs = [
        b"\x80\x04\x96" + (2**40).to_bytes(8, "little") + b".",  # a bytearray of 1 TiB
        b"\x80\x04]r\xff\xff\xff\x7f.",  # a memo of 2³¹ places
        b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".",
        b"(" * 100_000,
        b"cos\nsystem\n(S'mkdir executed'\ntR.",
        b"\x82\x01.",
    ]
    for content in [b"", b"\0", b"x" * 100, *(good[:n] for n in range(0, len(good), 7)), *bombs]:
        (tmp_path / "m" / ".metadata").write_bytes(content)
        with pytest.raises(ValueError, match=r"\.metadata"):
            Checkpoint(tmp_path / "m")
    assert not os.path.exists("executed")


def test_files_that_are_damaged(tmp_path):
    write(tmp_path / "m", {"w": torch.ones(300)}, files=1)
    path = tmp_path / "m" / "__0_0.distcp"
    good = path.read_bytes()
    for length in range(0, len(good), 97):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"__0_0\.distcp.*cut off"):
            Checkpoint(tmp_path / "m")
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):  # refused, or the damage is in the numbers
        damaged = bytearray(good)
        for place in torch.randint(len(good), (4,), generator=generator).tolist():
            damaged[place] ^= 255
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            assert Checkpoint(tmp_path / "m")["w"].shape == (300,)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="missing"):
        Checkpoint(tmp_path / "m")
    os.mkfifo(path)
    with pytest.raises(ValueError, match="not a regular file"):
        Checkpoint(tmp_path / "m")


def test_a_record_with_code_does_not_execute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = io.BytesIO()
    torch.save({"x": Code()}, record)

    def change(said):
        said.storage_data = {i: _StorageInfo("evil", 0, record.tell()) for i in said.storage_data}

    write(tmp_path / "m", {"w": torch.ones(4)}, change=change)
    (tmp_path / "m" / "evil").write_bytes(record.getvalue())
    with pytest.raises(ValueError, match=r"names posix\.mkdir"):
        Checkpoint(tmp_path / "m")
    assert not os.path.exists("executed")


def test_memory_is_bounded_and_torch_not_needed(tmp_path):
    for i in range(2):
        tensor = torch.full((2048, 4096), float(i))
        write(tmp_path / f"step-{i}", {"w": tensor, "v": tensor}, {"w": [[], [1000, 3000]], "v": [[1000, 2000], []]})
    code = (
        "import re, sys; from averaging import cli; "
        f"assert cli.main([{str(tmp_path)!r}, '-o', {str(tmp_path / 'out')!r}, '-q']) == 0; "
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kilobytes, torch_there = done.stdout.split()
    cooked = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(cooked[name], torch.full((2048, 4096), 0.5)) for name in "vw")
    if torch_there == "False":  # the compiled kernels are there
        assert int(kilobytes) < 64 * 1024  # of tensors of 32 MiB each
