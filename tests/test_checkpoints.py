"""Finding checkpoints, reading headers strictly, reading tensors lazily."""

import json
import os
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from averaging.checkpoints import Checkpoint, find, gather, select
from averaging.checkpoints.files import CODE

DTYPES = [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float16, torch.float32, torch.float64]
DTYPES += [torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16]


def weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = {f"t.{i}": torch.randint(0, 2, (3, i + 1), generator=g).to(dtype) for i, dtype in enumerate(DTYPES)}
    return tensors | {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4)}


def same(one, other):
    assert dict(one).keys() == dict(other).keys()
    for name, tensor in other.items():
        assert one[name].dtype == tensor.dtype
        assert one[name].shape == tensor.shape
        assert one[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def model_folder(path, step=None, shards=1, seed=0):
    path.mkdir(parents=True)
    tensors = weights(seed)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    else:
        names = sorted(tensors)
        places = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
        for file in set(places.values()):
            save_file({name: tensors[name] for name in names if places[name] == file}, path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (path / "config.json").write_text('{"model_type": "x"}')
    if step is not None:
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return tensors


def raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_reads_what_safetensors_reads(tmp_path):
    save_file(weights(), tmp_path / "w.safetensors", metadata={"a": "b"})
    checkpoint = Checkpoint(tmp_path / "w.safetensors")
    same(checkpoint, load_file(tmp_path / "w.safetensors"))
    assert checkpoint.kind == "safetensors"
    assert checkpoint.metadata == {"w.safetensors": {"a": "b"}}
    assert checkpoint.nbytes == sum(t.nbytes for t in weights().values())


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_model_folders(tmp_path, shards):
    tensors = model_folder(tmp_path / "checkpoint-7", step=12, shards=shards)
    checkpoint = Checkpoint(tmp_path / "checkpoint-7")
    same(checkpoint, tensors)
    assert (checkpoint.kind, checkpoint.step, len(checkpoint.shards)) == ("huggingface", 12, shards)
    assert checkpoint.config == {"model_type": "x"}


@pytest.mark.parametrize("name", [name for name in CODE if hasattr(torch, name) and not name.startswith("float4")])
def test_dtypes_are_torchs(tmp_path, name):
    save_file({"a": torch.empty(8, dtype=getattr(torch, name))}, tmp_path / "a.safetensors")
    checkpoint = Checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.entries["a"].dtype == name
    assert checkpoint.nbytes == 8 * getattr(torch, name).itemsize


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{ ", b"", "not valid JSON"),
        (b"[]", b"", "not a JSON object"),
        (b'{"a":' * 100_000, b"", "not valid JSON"),
        (b'{"a": {}, "a": {}}', b"", "twice"),
        (b'{"\xff": 1}', b"", "not valid JSON"),
        ({"a": 1}, b"", "must have dtype"),
        ({"a": F32 | {"extra": 1}}, b"\0" * 8, "must have dtype"),
        ({"a": F32 | {"dtype": "F31"}}, b"\0" * 8, "unknown dtype"),
        ({"a": F32 | {"dtype": ["F32"]}}, b"\0" * 8, "unknown dtype"),
        ({"a": F32 | {"shape": [-2]}}, b"\0" * 8, "impossible shape"),
        ({"a": F32 | {"shape": [2.0]}}, b"\0" * 8, "impossible shape"),
        ({"a": F32 | {"shape": [True, 2]}}, b"\0" * 8, "impossible shape"),
        ({"a": F32 | {"shape": [3]}}, b"\0" * 8, "cannot lie"),
        ({"a": F32 | {"shape": [2**40, 2**40]}}, b"\0" * 8, "cannot lie"),
        ({"a": F32 | {"data_offsets": [8, 0]}}, b"\0" * 8, "cannot lie"),
        ({"a": F32 | {"data_offsets": [0, 8, 9]}}, b"\0" * 8, "impossible offsets"),
        ({"a": F32}, b"\0" * 7, "cut off"),
        ({"a": F32}, b"\0" * 9, "belong to no tensor"),
        ({"a": F32, "b": F32}, b"\0" * 8, "overlaps"),
        ({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, b"\0" * 12, "overlaps"),
        ({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, b"\0" * 20, "hole"),
        ({"__metadata__": {"a": 1}, "a": F32}, b"\0" * 8, "metadata"),
    ],
)
def test_corrupt_headers_are_refused(tmp_path, header, data, message):
    path = raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoint(path)
    assert str(path) in str(caught.value)


def test_truncated_files_are_refused_at_every_length(tmp_path):
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "w.safetensors").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a valid safetensors file"):
            Checkpoint(tmp_path / "w.safetensors")


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path):
    with pytest.raises(ValueError, match="claims"):
        Checkpoint(raw(tmp_path / "x.safetensors", b"{}", length=2**62))


def test_pipes_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not a regular file"):
        Checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "..", "", "a\\b"])
def test_an_index_must_stay_in_its_folder(tmp_path, name):
    index = {"weight_map": {"a": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="own folder"):
        Checkpoint(tmp_path)


def test_an_index_must_tell_the_truth(tmp_path):
    model_folder(tmp_path / "m", shards=2)
    index_path = tmp_path / "m" / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    for change, error, message in [
        ({"ghost": "model-00001-of-00002.safetensors"}, ValueError, "'ghost', but it does not"),
        (
            {"ghost": "model-00009-of-00002.safetensors"},
            FileNotFoundError,
            "model-00009-of-00002.safetensors, which is",
        ),
    ]:
        index_path.write_text(json.dumps({"weight_map": index["weight_map"] | change}))
        with pytest.raises(error, match=message):
            Checkpoint(tmp_path / "m")
    places = {name: file for name, file in index["weight_map"].items() if name != "scalar"}
    index_path.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match="'scalar', which"):
        Checkpoint(tmp_path / "m")
    for text in ("[]", "{", '{"weight_map": 3}'):
        index_path.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json"):
            Checkpoint(tmp_path / "m")


def test_shards_may_be_symbolic_links(tmp_path):
    tensors = model_folder(tmp_path / "m", shards=2)
    (tmp_path / "blobs").mkdir()
    for shard in (tmp_path / "m").glob("*.safetensors"):
        shard.symlink_to(shard.rename(tmp_path / "blobs" / shard.name))
    same(Checkpoint(tmp_path / "m"), tensors)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
def test_reads_torch_files(tmp_path, zipped, key):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "view": base[1:], "turned": base.t(), "tied": base, "b": torch.ones(2).bfloat16()}
    tensors |= {"scalar": torch.tensor(3), "empty": torch.empty(0), "p": nn.Parameter(torch.ones(1))}
    content = tensors if key is None else {key: tensors, "global_step": 9, "optimizer": [{"lr": 0.1}]}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    checkpoint = Checkpoint(tmp_path / "w.pt")
    same(checkpoint, {name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    assert checkpoint.kind == "torch"
    assert checkpoint.step == (None if key is None else 9)
    if zipped:
        assert checkpoint.ties == {"tied": "a"}
        assert checkpoint.entries["a"].file == tmp_path / "w.pt"  # read in place


class Unpicklable:
    pass


def test_torch_files_that_need_code_are_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "x": Unpicklable()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"needs the code of \S*Unpicklable"):
        Checkpoint(tmp_path / "w.pt")


def test_damaged_torch_files_are_refused(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    for length in (0, 3, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "w.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"w\.pt"):
            Checkpoint(tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        (tmp_path / "w.pt").write_bytes(whole)
        with zipfile.ZipFile(tmp_path / "w.pt") as archive:
            for record in archive.infolist():
                packed.writestr(record.filename, archive.read(record), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        Checkpoint(tmp_path / "z.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "holds a list"),
        ({"a": 1}, "no named weights"),
        ({"a": torch.ones(1), "b": 2}, "'b' is a int"),
        ({"a": torch.ones(1).expand(2**40)}, "larger than the data"),
        ({"a": torch.ones(2).to_sparse()}, "cannot be averaged"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "cannot be averaged"),
    ],
)
def test_torch_files_without_plain_weights_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path / "w.pt")


def test_find_orders_by_step_and_ignores_the_rest(tmp_path):
    run = tmp_path / "run"
    for step in (1000, 500, 90):
        folder = run / f"checkpoint-{step}"
        model_folder(folder, step=step)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            (folder / name).write_bytes(b"x")
        model_folder(folder / "lawa")
        (folder / "lawa" / "averaging.json").write_text("{}")
    model_folder(run / "soup")
    model_folder(run / "other")
    (run / ".hidden").mkdir()
    assert [c.step for c in find(run)] == [90, 500, 1000]
    assert [c.path.name for c in gather([run])] == ["checkpoint-90", "checkpoint-500", "checkpoint-1000"]
    named = [run / "checkpoint-1000" / "lawa", run / "checkpoint-500" / "lawa"]
    assert [c.path for c in gather(named)] == named
    # a run's folder with the final model in it
    save_file(weights(), run / "model.safetensors")
    assert len(gather([run])) == 3
    assert [c.path for c in gather([run, run / "other"])] == [run, run / "other"]
    # the averages inside one checkpoint are not that checkpoint's ingredients
    assert [c.path.name for c in gather([run / "checkpoint-500"])] == ["checkpoint-500"]


def test_find_in_folders_of_other_models_and_of_files(tmp_path):
    model_folder(tmp_path / "a" / "part-10")
    model_folder(tmp_path / "a" / "part-9")
    model_folder(tmp_path / "a" / "earlier")
    (tmp_path / "a" / "earlier" / "soup.json").write_text("{}")
    assert [c.path.name for c in find(tmp_path / "a")] == ["part-9", "part-10"]
    (tmp_path / "b").mkdir()
    for name in ("w_2", "w_10", "w_1"):
        save_file(weights(), tmp_path / "b" / f"{name}.safetensors")
    save_file(weights(), tmp_path / "b" / "mix.safetensors", metadata={"soup": "{}"})
    (tmp_path / "b" / "optimizer.pt").write_bytes(b"x")
    (tmp_path / "b" / "w_3.safetensors.tmp").write_bytes(b"x")
    assert [c.step for c in find(tmp_path / "b")] == [1, 2, 10]
    (tmp_path / "c").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoints"):
        find(tmp_path / "c")


def test_lightning_files_come_by_their_own_step(tmp_path):
    for name, step in [("z", 10), ("a", 30), ("m", 20), ("last", 30)]:
        content = {"state_dict": {"a": torch.ones(1)}, "global_step": step, "pytorch-lightning_version": "2.6.6"}
        torch.save(content, tmp_path / f"{name}.ckpt")
    assert [c.path.stem for c in find(tmp_path)] == ["z", "m", "a"]
    assert find(tmp_path)[0].kind == "lightning"


def test_select(tmp_path):
    for step in range(1, 8):
        save_file({"a": torch.ones(1)}, tmp_path / f"step_{step}.safetensors")
    found = find(tmp_path)

    def steps(**choice):
        return [c.step for c in select(found[::-1], **choice)]

    assert steps() == [7, 6, 5, 4, 3, 2, 1]
    assert steps(last=2) == [6, 7]
    assert steps(every=3) == [1, 4, 7]
    assert steps(every=2, last=3) == [3, 5, 7]
    for choice in ({"last": 0}, {"every": 0}, {"last": 8}):
        with pytest.raises(ValueError, match="--"):
            steps(**choice)


def test_the_same_thing_twice_is_refused(tmp_path):
    save_file(weights(), tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="named twice"):
        gather([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_headers_need_no_torch(tmp_path):
    model_folder(tmp_path / "checkpoint-1", shards=2)
    code = (
        "import sys; from averaging.checkpoints import find; "
        f"print(len(find({str(tmp_path)!r})[0])); assert not {{'torch', 'numpy'}} & sys.modules.keys()"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"13\n"
