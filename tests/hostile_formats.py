"""Hostile checkpoints of many processes, of trainers' folders, of adapters and from the Hub; see `hostile`."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from hostile import (
    FOUR,
    NAN,
    PLAIN,
    Harm,
    add,
    folder,
    listening,
    nested,
    number,
    pickled,
    raw,
    rebuilt,
    storage,
    text,
    torch_,
    weights,
    write,
    zipped,
)

BOMB = b"]" + b"".join(b"q\0](h\0h\0e" for _ in range(60))  # lists of lists of lists: 2^60 in all
TUPLES = b")" + b"".join(b"q\0h\0\x86" for _ in range(60))
PLACES = {  # what stands in a folder for a file, and does harm to who opens it
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "a socket": listening,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
}


def replaced(file: str, content: object) -> Callable[[Path], None]:
    """A change of a folder: another content of this file, or what makes another kind of file of it."""

    def change(path: Path) -> None:
        (path / file).unlink(missing_ok=True)
        content(path / file) if callable(content) else (path / file).write_bytes(content)

    return change


def cut(file: str, length: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / file, length)


def stretched(file: str, start: bytes, end: bytes = b"", size: int = 10 << 30) -> Callable[[Path], None]:
    """A change of a folder: a file of so many bytes, most of them holes."""

    def change(path: Path) -> None:
        with open(path / file, "wb") as file_:
            file_.write(start)
            file_.seek(size - len(end))
            file_.write(end or b"\0")

    return change


# --- torch distributed checkpoints -----------------------------------------------------------------------------------

METADATA = ".metadata"


def distributed(name: str, *says: str, change: object = None, after: Callable = lambda path: None, **options) -> None:
    """A case of two checkpoints in pieces, the second with other metadata, a list of a path and a value; or changed."""

    def build(root: Path, stack: object) -> list:
        import dcp_files

        torch = torch_()
        held = {"w": torch.arange(16.0).view(4, 4)}
        cuts = {"w": [[2], []]}
        for one in ("good", "bad"):
            lie = dcp_files.put(*change(torch)) if change is not None and one == "bad" else None
            dcp_files.write(root / one, held, cuts, lie)
        after(root / "bad")
        return ["good", "bad"]

    add("distributed", name, build, *(says if options.get("works") else ("bad", *says)), **options)


def described(*ops: bytes) -> bytes:
    """Metadata of one tensor w, of which these operations fill in the properties, the size and the chunks."""
    module = b"ctorch.distributed.checkpoint.metadata\n"
    tensor = module + b"TensorStorageMetadata\n)\x81}(" + b"".join(ops) + b"ub"
    return pickled(
        module,
        b"Metadata\n)\x81}(",
        *(text("state_dict_metadata"), b"}", text("w"), tensor, b"s"),
        *(text("storage_data"), b"}", text("planner_data"), b"N"),
        b"ub",
    )


PROPERTIES = (
    text("properties")
    + b"ctorch.distributed.checkpoint.metadata\nTensorProperties\n)\x81(ctorch\nfloat32\n"
    + b"ctorch.serialization\n_get_layout\n"
    + text("torch.strided")
    + b"\x85R\x89tb"
)
SIZE = text("size") + b"ctorch\nSize\n(" + number(4) + number(4) + b"t\x85R"
NO_CHUNKS = text("chunks") + b"]"

distributed("as it should be", works=True)
distributed("another version", works=True, change=lambda torch: (("version",), "99.0"))
distributed("metadata missing", "no checkpoints", after=lambda path: (path / METADATA).unlink())
for name, content in {
    "empty": b"",
    "text": b"hello",
    "JSON": b'{"state_dict_metadata": {}}',
    "a list": pickled(b"]"),
    "null": pickled(b"N"),
    "a dictionary": pickled(b"}"),
    "of another class": pickled(b"ccollections\nOrderedDict\n)R"),
    "of no class": pickled(b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81"),
    "without tensors": pickled(
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}(",
        *(text("state_dict_metadata"), b"}", text("storage_data"), b"}ub"),
    ),
    "that run a command": b"cposix\nmkdir\n(" + text("harmed") + b"tR.",
    "that run a command, in protocol 4": b"\x80\x04"
    + text("posix")
    + text("mkdir")
    + b"\x93("
    + text("harmed")
    + b"tR.",
    "that run a command, the old way": b"(" + text("harmed") + b"iposix\nmkdir\n.",
    "that run a command as an object": b"(cposix\nmkdir\n" + text("harmed") + b"o.",
    "that call eval": b"cbuiltins\neval\n(" + text("__import__('os').mkdir('harmed')") + b"tR.",
    "that call getattr": b"cbuiltins\ngetattr\n(cos\nmkdir\n" + text("__call__") + b"tR.",
    "that load another pickle": b"ctorch.storage\n_load_from_bytes\n(" + text("x") + b"tR.",
    "that open a file": b"cio\nopen\n(" + text("/etc/passwd") + b"tR.",
    "from the registry of extensions": b"\x82\x01.",
    "a persistent id": pickled(text("x"), b"Q"),
    "nested lists": pickled(b"]" * 200_000, b"a" * 199_999),
    "nested tuples": pickled(b")", b"\x85" * 200_000),
    "a key of 2^60 tuples": pickled(b"}", TUPLES, b"Ns"),
    "a layout of 2^60 lists": pickled(b"ctorch.serialization\n_get_layout\n", BOMB, b"\x85R"),
    "a size of 2^60 lists": described(PROPERTIES, text("size"), BOMB, NO_CHUNKS),
    "a size of 2^60 sizes": described(
        PROPERTIES, text("size"), b")", b"".join(b"q\0ctorch\nSize\n(h\0h\0t\x85R" for _ in range(60)), NO_CHUNKS
    ),
    "a size of a million ones": described(
        PROPERTIES, text("size"), b"](", b"K\1" * 1_000_000, b"e", text("chunks"), b"]"
    ),
    "a size of a million digits": described(
        PROPERTIES, text("size"), b"](\x8b", struct.pack("<i", 400_000), b"\x7f" * 400_000, b"e", NO_CHUNKS
    ),
    "a dtype of 2^60 lists": described(
        text("properties"),
        b"ctorch.distributed.checkpoint.metadata\nTensorProperties\n)\x81(",
        BOMB,
        b"NNtb",
        SIZE,
        NO_CHUNKS,
    ),
    "chunks of text": described(PROPERTIES, SIZE, text("chunks"), text("x" * 100)),
    "chunks without end": described(PROPERTIES, SIZE, text("chunks"), BOMB),
    "a terabyte of bytes": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".",
    "a terabyte of text": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b".",
    "a frame of an exabyte": b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"N.",
    "a memo of 2^31": b"\x80\x04]r\xff\xff\xff\x7f.",
    "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a decimal of 100,000 digits": b"I" + b"9" * 100_000 + b"\n.",
    "a step back": b"\x80\x02" + b"0" * 10 + b".",
}.items():
    distributed(f"metadata {name}", METADATA, after=replaced(METADATA, content))
for share in (0.02, 0.3, 0.6, 0.9, 0.99):

    def shorten(path: Path, share: float = share) -> None:
        os.truncate(path / METADATA, int((path / METADATA).stat().st_size * share))

    distributed(f"metadata cut off after {share:.0%}", METADATA, after=shorten)
distributed("metadata of 10 GB", METADATA, after=stretched(METADATA, b"\x80\x04\x8e" + (9 << 30).to_bytes(8, "little")))
distributed("metadata of a gigabyte of nothing", METADATA, after=stretched(METADATA, b"", size=1 << 30))
for name, make in PLACES.items():
    nothing = name == "a link to nothing"
    distributed(f"metadata: {name}", *([] if name == "a link to itself" else ["bad"]), after=replaced(METADATA, make))
    distributed(f"a piece: {name}", "missing" if nothing else "__0_0", after=replaced("__0_0.distcp", make))
distributed("a piece missing", "__2_0.distcp", "missing", after=lambda path: (path / "__2_0.distcp").unlink())
distributed("a piece empty", "__0_0.distcp", "'w'", after=replaced("__0_0.distcp", b""))
distributed("a piece cut off", "__0_0.distcp", "'w'", "cut off", after=cut("__0_0.distcp", 500))
distributed("a piece of zeros", "__0_0.distcp", "'w'", after=replaced("__0_0.distcp", bytes(4000)))
distributed(
    "a piece of 10 GB that describes itself at length",
    "__0_0.distcp",
    change=lambda torch: (("storage_data", "length"), 10 << 30),
    after=stretched("__0_0.distcp", b"PK\3\4", b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 9, 9, 2**32 - 99, 0, 0)),
)


@lambda after: distributed("pieces swapped", works=True, after=after)  # of one shape: no one can tell
def swapped(path: Path) -> None:
    one, two = path / "__0_0.distcp", path / "__2_0.distcp"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def record_of(*ops: bytes, data: bytes = bytes(32)) -> Callable[[Path], None]:
    """A change of a folder: its first piece is a record with this pickle."""

    def change(path: Path) -> None:
        file = path / "__0_0.distcp"
        made = zipped(file, pickled(*ops), {"0": data}).read_bytes()
        content = pickle.loads((path / METADATA).read_bytes())
        for place in content.storage_data.values():
            if place.relative_path == file.name:
                place.length = len(made)
        (path / METADATA).write_bytes(pickle.dumps(content))

    return change


def part(offset: int = 0, shape: tuple = (2, 4), stride: tuple = (4, 1), kind: str = "FloatStorage") -> bytes:
    return rebuilt(storage("0", 8, kind), offset, shape, stride)


distributed("a record made by hand", works=True, after=record_of(part()))
distributed("a record that is turned", works=True, after=record_of(part(stride=(1, 2))))
for name, ops in {
    "of another shape": part(shape=(4, 2), stride=(2, 1)),
    "of another dtype": part(kind="IntStorage"),
    "of an unknown dtype": part(kind="QInt8Storage"),
    "past its end": part(offset=1),
    "before its start": part(offset=-1),
    "of negative strides": part(stride=(-4, 1)),
    "that repeats itself": part(stride=(0, 1)),
    "with gaps": part(stride=(1, 3)),
    "of strides that are text": rebuilt(storage("0", 8), 0, (2, 4), ()).replace(b"(t\x89", text("ab") + b"\x89"),
    "of another place": rebuilt(storage("../0", 8), 0, (2, 4), (4, 1)),
    "of a place of 2^60 lists": b"ctorch._utils\n_rebuild_tensor_v2\n(("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + BOMB
    + text("cpu")
    + number(8)
    + b"tQK\0(K\2K\4t(K\4K\1t\x89NtR",
    "of a shape of 2^60 tuples": b"ctorch._utils\n_rebuild_tensor_v2\n("
    + storage("0", 8)
    + b"K\0"
    + TUPLES * 2
    + b"tR",
    "that runs a command": b"cposix\nmkdir\n(" + text("harmed") + b"tR",
    "that is a list": b"]",
    "that is null": b"N",
    "nested": b"]" * 100_000,
    "of half a megabyte": text("x" * 500_000),
}.items():
    distributed(f"a record {name}", "'w'", after=record_of(ops))
BOX = {"a": ([0, 0], [2, 4]), "b": ([2, 0], [2, 4]), "c": ([1, 0], [2, 4]), "d": ([2, 0], [1, 4]), "e": ([0], [4])}


def chunks(torch: object, names: str) -> list:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    size = torch_().Size
    return [ChunkStorageMetadata(size(offsets), size(sizes)) for offsets, sizes in map(BOX.get, names)]


TENSOR, PLACE = ("state_dict_metadata",), ("storage_data",)
for name, boxes in {
    "overlapping": "aa",
    "missing": "a",
    "short": "ad",
    "flat": "e",
    "elsewhere": "ac",
    "none": "",
}.items():
    distributed(f"chunks {name}", "'w'", change=lambda torch, b=boxes: ((*TENSOR, "chunks"), chunks(torch, b)))
for name, value in {
    "outside": "../good/__0_0.distcp",
    "outside, and back": "../bad/__0_0.distcp",
    "at the root": "/etc/passwd",
    "on Windows": "..\\x",
    "with NUL": "__0_0.distcp\0",
    "the folder": ".",
    "the folder above": "..",
    "empty": "",
    "null": None,
    "a number": 7,
    "a list": ["__0_0.distcp"],
}.items():
    says = METADATA if value is None else "own folder"
    distributed(f"a piece in {name}", says, change=lambda torch, v=value: ((*PLACE, "relative_path"), v))
distributed("a piece in the metadata", "'w'", change=lambda torch: ((*PLACE, "relative_path"), METADATA))
distributed("a piece in a name too long", "x" * 9, change=lambda torch: ((*PLACE, "relative_path"), "x" * 300))
for field in ("offset", "length"):
    for name, value in {
        "negative": -1,
        "of 70 bits": 2**70,
        "of 62 bits": 2**62,
        "fractional": 0.5,
        "NaN": NAN,
        "true": True,
        "text": "0",
        "null": None,
        "a list": [0],
    }.items():
        says = METADATA if value is None else "'w'"
        distributed(f"{field} {name}", says, change=lambda torch, f=field, v=value: ((*PLACE, f), v))
for name, value in {
    "empty": (),
    "of one dimension": (16,),
    "transposed": (2, 8),
    "larger": (5, 4),
    "smaller": (3, 4),
    "negative": (-4, -4),
    "fractional": (4.0, 4.0),
    "absurd": (2**40, 2**40),
    "that overflows to nothing": (2**62, 2**62, 0),
    "text": "44",
    "null": None,
    "of 1,000 dimensions": [1] * 1000,
}.items():
    distributed(f"a shape {name}", METADATA, change=lambda torch, v=value: ((*TENSOR, "size"), v))
for kind in ("quint8", "qint8", "qint32", "quint4x2", "complex128", "complex32", "float64", "int32", "bfloat16"):
    distributed(
        f"a dtype {kind}", "'w'", change=lambda torch, k=kind: ((*TENSOR, "properties", "dtype"), getattr(torch, k))
    )


def another(name: str, *says: str, of: Callable, **options: object) -> None:
    """A case of two whole checkpoints, the second of which holds other tensors."""

    def build(root: Path, stack: object) -> list:
        import dcp_files

        torch = torch_()
        dcp_files.write(root / "good", {"w": torch.ones(4, 4)})
        dcp_files.write(root / "bad", of(torch))
        return ["good", "bad"]

    add("distributed", name, build, *(says if options.get("works") else ("good", "bad", *says)), **options)


another("ingredients of another shape", "'w' has shape [4, 4]", "[4, 3]", of=lambda torch: {"w": torch.ones(4, 3)})
another("ingredients that would broadcast", "'w' has shape", of=lambda torch: {"w": torch.ones(1, 4)})
another("ingredients of another dtype", "'w' has dtype float32", of=lambda torch: {"w": torch.ones(4, 4).half()})
another("ingredients of other tensors", "same tensors", of=lambda torch: {"v": torch.ones(4, 4)})
add(
    "distributed",
    "ingredients with NaN",
    lambda root, stack: another_nan(root),
    "bad",
    "'w' holds nan",
    "element 3",
)


def another_nan(root: Path) -> list:
    import dcp_files

    for one in ("good", "bad"):
        held = torch_().ones(2, 4)
        held[0, 3] = NAN if one == "bad" else 0
        dcp_files.write(root / one, {"w": held}, {"w": [[1], []]})
    return ["good", "bad"]


def many_abreast(root: Path, stack: object) -> list:
    """Pieces of which any one meets thousands in each dimension."""
    import dcp_files

    torch = torch_()
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    n, size = 1300, torch.Size

    def change(said: object) -> None:
        boxes = [(size((0, i)), size((i + 1, 1))) for i in range(n)]
        boxes += [(size((i + 1, i)), size((n - i, 1))) for i in range(n)]
        said.state_dict_metadata["w"].size = size((n + 1, n))
        said.state_dict_metadata["w"].chunks = [ChunkStorageMetadata(*box) for box in boxes]
        place = _StorageInfo("__0_0.distcp", 0, 100)
        said.storage_data = {MetadataIndex("w", offsets, 0): place for offsets, _ in boxes}

    for one in ("good", "bad"):
        dcp_files.write(root / one, {"w": torch.ones(2, 4)}, None, change if one == "bad" else None)
    return ["good", "bad"]


add("distributed", "pieces abreast", many_abreast, "bad", "'w'", "too many")


# --- DeepSpeed's folders ---------------------------------------------------------------------------------------------

STATES = "mp_rank_00_model_states.pt"


def deepspeed(name: str, *says: str, change: Callable = lambda path: None, good: bool = True, **options) -> None:
    """A case of two folders of ZeRO-2, the second changed."""

    def build(root: Path, stack: object) -> list:
        for one in ("good", "bad"):
            tag = root / one / "global_step10"
            tag.mkdir(parents=True)
            (root / one / "latest").write_text("global_step10")
            states = pickled(b"}(", text("module"), b"}", text("w"), PLAIN, b"s", text("global_steps"), b"K\nu")
            zipped(tag / STATES, states, {"0": FOUR})
            (tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"never read")
        change(root / "bad")
        return ["good", "bad"]

    add("DeepSpeed", name, build, *(says if options.get("works") else ("bad", *says)), **options)


def states(content: object, file: str = STATES) -> Callable[[Path], None]:
    return replaced(f"global_step10/{file}", content)


def pointing(to: str | bytes) -> Callable[[Path], None]:
    return replaced("latest", to if isinstance(to, bytes) else to.encode())


def second_tag(path: Path) -> None:
    (path / "global_step20").mkdir()
    (path / "global_step20" / STATES).write_bytes((path / "global_step10" / STATES).read_bytes())


deepspeed("as it should be", works=True)
deepspeed("latest with a line break", works=True, change=pointing("global_step10\n"))
deepspeed("optimizer states missing", works=True, change=lambda path: next(path.rglob("*optim_states.pt")).unlink())
for name, to in {
    "outside": "../good/global_step10",
    "at the root": "/etc",
    "elsewhere": "global_step20",
    "nowhere": "",
    "no text": b"\xff\xfe\0",
    "long": "x" * 100_000,
    "a command": "global_step10; mkdir harmed",
    "a terminal's commands": "\x1b[2J",
}.items():
    deepspeed(f"latest names {name}", "latest", change=pointing(to))
for name, make in PLACES.items():
    lost = name in ("a link to nothing", "a link to itself")
    deepspeed(f"latest: {name}", "latest", change=replaced("latest", make)) if not lost else None
    deepspeed(f"states: {name}", *([] if lost else [STATES]), change=states(make))
deepspeed("latest missing", change=lambda path: (path / "latest").unlink(), works=True)
deepspeed("latest of 10 GB", "latest", change=stretched("latest", b"global_step10"))
deepspeed("latest that is lost", works=True, change=replaced("latest", PLACES["a link to nothing"]))
deepspeed("two tags", works=True, change=second_tag)
deepspeed("states missing", "no checkpoints", change=lambda path: (path / "global_step10" / STATES).unlink())
deepspeed("states empty", STATES, change=states(b""))
deepspeed("states cut off", STATES, change=cut(f"global_step10/{STATES}", 300))
deepspeed("states of zeros", STATES, change=states(bytes(2000)))
deepspeed("states of 10 GB", STATES, change=stretched(f"global_step10/{STATES}", b"PK\3\4"))
deepspeed(
    "states without a model", STATES, "no named weights", change=states(lambda path: zipped(path, pickled(b"}"), {}))
)
deepspeed(
    "states with code",
    STATES,
    "needs the code of posix.mkdir",
    change=states(lambda path: torch_().save({"module": {"w": torch_().ones(2)}, "x": Harm("harmed")}, path)),
)
deepspeed(
    "states whose weights are code",
    STATES,
    "needs the code of",
    change=states(lambda path: torch_().save({"module": Harm("harmed")}, path)),
)
for name, files in {
    "of pipelines": [STATES, "layer_00-model_states.pt"],
    "of tensor parallelism": [STATES, "mp_rank_01_model_states.pt"],
    "of tensor parallelism with a rank missing": ["mp_rank_01_model_states.pt"],
    "of ZeRO-2 and ZeRO-3": [STATES, "zero_pp_rank_0_mp_rank_00_model_states.pt"],
    "with a rank of another name": [STATES, "$(mkdir harmed)_model_states.pt"],
}.items():

    def ranks(path: Path, files: list = files) -> None:
        content = (path / "global_step10" / STATES).read_bytes()
        (path / "global_step10" / STATES).unlink()
        for file in files:
            (path / "global_step10" / file).write_bytes(content)

    deepspeed(f"states {name}", "zero_to_fp32", change=ranks)


# --- DeepSpeed's partitions ------------------------------------------------------------------------------------------

OPTIMIZER = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
FLOATS = rebuilt(storage("0", 4), 0, (4,), (1,))


def ops(value: object) -> bytes:
    """The operations of a pickle that make a value; those of bytes are what they say."""
    if isinstance(value, dict):
        return b"}(" + b"".join(ops(key) + ops(one) for key, one in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(ops, value)) + b"e"
    return value if isinstance(value, bytes) else text(value) if isinstance(value, str) else number(value)


def shape(*sizes: int) -> bytes:
    return b"ctorch\nSize\n(" + b"".join(map(number, sizes)) + b"t\x85R"


def zero(
    name: str,
    *says: str,
    change: Callable = lambda model, ranks: None,
    after: Callable = lambda tag: None,
    stages: tuple[int, ...] = (2, 3),
    **options,
) -> None:
    """A case of two folders of ZeRO-2 and two of ZeRO-3, each of two processes; the second of either kind is changed.

    ``change`` gets the model's states and the optimizers', ``after`` the folder.
    """
    for stage in stages:
        key = "single_partition_of_fp32_groups" if stage == 2 else "fp32_flat_groups"

        def build(root: Path, stack: object, stage: int = stage, key: str = key) -> list:
            for one in ("good", "bad"):
                tag = root / one
                tag.mkdir()
                model = {"module": {"n": PLAIN}, "buffer_names": ["n"], "global_steps": 10, "shared_params": {"u": "v"}}
                model["param_shapes"] = [{"w": shape(2, 2), "v": shape(3)}]
                ranks = [{"zero_stage": stage, "partition_count": 2, "groups": [FLOATS]} for _ in range(2)]
                if one == "bad":
                    change(model, ranks)
                zipped(tag / (STATES if stage == 2 else f"zero_pp_rank_0_{STATES}"), pickled(ops(model)), {"0": FOUR})
                for rank, state in enumerate(ranks):
                    state = {key if said == "groups" else said: value for said, value in state.items()}
                    states = pickled(ops({"optimizer_state_dict": state}))
                    zipped(tag / OPTIMIZER.format(rank), states, {"0": FOUR})
            after(root / "bad")
            return ["good", "bad"]

        add("ZeRO", f"{name}, stage {stage}", build, *(says if options.get("works") else ("bad", *says)), **options)


def of_rank(rank: int, **said: object) -> Callable:
    return lambda model, ranks: ranks[rank].update(said)


def of_model(**said: object) -> Callable:
    return lambda model, ranks: model.update(said)


def tensor_of(offset: int, sizes: tuple, strides: tuple, count: int = 4, kind: str = "FloatStorage") -> Callable:
    return of_rank(1, groups=[rebuilt(storage("0", count, kind), offset, sizes, strides)])


OF_SECOND = OPTIMIZER.format(1)
zero("as it should be", works=True, compared=False)
zero("with code", works=True, compared=False, change=of_rank(1, x=b"cposix\nmkdir\n" + text("harmed") + b"\x85R"))
zero("with code for an item", works=True, compared=False, change=of_model(x=b"cos\nsystem\n)R(" + text("a") * 2 + b"u"))
zero("of other classes", works=True, compared=False, change=of_rank(0, loss_scaler=b"ca.b\nC\n)\x81}b"))
for name, value in {"null": b"N", "text": "x", "a list": [], "a number": 7, "code": b"cos\nsystem\n)R"}.items():
    for said in ("param_shapes", "module", "buffer_names", "shared_params"):
        if (said, name) not in {("buffer_names", "a list"), ("buffer_names", "text"), ("param_shapes", "null")}:
            zero(f"{said} is {name}", change=of_model(**{said: value}))
    zero(f"a shape is {name}", change=of_model(param_shapes=[{"w": value, "v": shape(3)}]))
    zero(f"the groups are {name}", change=of_rank(1, groups=value))
    zero(f"a group is {name}", OF_SECOND, change=of_rank(1, groups=[value]))
    zero(f"stage is {name}", OF_SECOND, change=of_rank(1, zero_stage=value))
    zero(f"partition_count is {name}", OF_SECOND, change=of_rank(1, partition_count=value))
    zero(f"the state is {name}", OF_SECOND, change=lambda model, ranks, value=value: ranks.__setitem__(1, {"x": value}))
zero("another stage", OF_SECOND, change=of_rank(1, zero_stage=1))
zero("unknown stage", OF_SECOND, change=of_rank(1, zero_stage=9))
zero("another world size", OF_SECOND, change=of_rank(1, partition_count=3))
for name, world in {
    "three": 3,
    "one": 1,
    "none": 0,
    "fewer than none": -1,
    "2^70": 2**70,
    "of each group": [2, 4],
}.items():
    zero(
        f"a world size of {name}",
        change=lambda model, ranks, n=world: [rank.update(partition_count=n) for rank in ranks],
    )
zero("too few elements", "elements", change=of_model(param_shapes=[{"w": shape(2, 2), "v": shape(30)}]))
zero("too many elements", "elements", change=of_model(param_shapes=[{"w": shape(2), "v": shape(1)}]))
zero("a shape beyond 64 bits", "elements", change=of_model(param_shapes=[{"w": shape(2**40, 2**40), "v": shape(3)}]))
zero("a negative shape", change=of_model(param_shapes=[{"w": shape(-2, -2), "v": shape(3)}]))
zero("a shape of 65 dimensions", change=of_model(param_shapes=[{"w": shape(*[1] * 64, 4), "v": shape(3)}]))
zero("a name that is a number", change=of_model(param_shapes=[{7: shape(2, 2), "v": shape(3)}]))
zero("a name of half a pair", change=of_model(param_shapes=[{b"X\3\0\0\0\xed\xa0\x80": shape(2, 2), "v": shape(3)}]))
zero("a group of no parameters", "elements", change=of_model(param_shapes=[{}]))
zero("no groups of parameters", change=of_model(param_shapes=[]))
zero("a missing buffer", change=of_model(module={"n": rebuilt(storage("9", 4), 0, (2, 2), (2, 1))}))
zero("a buffer that is text", change=of_model(module={"n": "x"}))
for name, value in {"negative": [[-4, 0]], "of others": [[0]], "of text": [["x", "y"]], "huge": [[2**70, 0]]}.items():
    zero(f"paddings {name}", change=of_rank(0, param_alignment_paddings=value), stages=(2,))
zero("tuples in tuples", change=of_model(x=TUPLES))
zero("a bomb of lists", works=True, compared=False, change=of_model(x=b"(" + BOMB + b"t"))
zero("a tensor beyond its data", OF_SECOND, "larger", change=tensor_of(2, (4,), (1,)))
zero("a tensor of 2^40", OF_SECOND, change=tensor_of(0, (2**40,), (0,)))
zero("a tensor with gaps", OF_SECOND, "gaps", change=tensor_of(0, (2,), (2,)))
zero("a tensor at a negative place", OF_SECOND, change=tensor_of(-1, (4,), (1,)))
zero("a tensor of negative size", OF_SECOND, change=tensor_of(0, (-4,), (1,)))
zero("a tensor in 16 bits", "dtypes", change=tensor_of(0, (4,), (1,), 8, "HalfStorage"))
zero("a storage that is missing", OF_SECOND, change=of_rank(1, groups=[rebuilt(storage("7", 4), 0, (4,), (1,))]))
zero("a storage named by a list", OF_SECOND, change=of_rank(1, groups=[FLOATS.replace(text("0"), b"]")]))
zero("a rank missing", OF_SECOND, after=lambda tag: (tag / OF_SECOND).unlink())
zero("a rank too many", "3 optimizers", after=lambda tag: (tag / OPTIMIZER.format(2)).write_bytes(b"x"))
zero("a rank cut off", OF_SECOND, after=cut(OF_SECOND, 300))
zero("a rank of zeros", OF_SECOND, after=replaced(OF_SECOND, bytes(2000)))
zero("a rank of 10 GB", OF_SECOND, after=stretched(OF_SECOND, b"PK\3\4"))
for name, make in PLACES.items():
    zero(f"a rank: {name}", OF_SECOND, after=replaced(OF_SECOND, make))


# --- adapters --------------------------------------------------------------------------------------------------------

FIRST, SECOND = (f"base_model.model.layers.0.q_proj.lora_{x}.weight" for x in "AB")
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base", "target_modules": ["q_proj"]}


def factors(a: tuple = (2, 3), b: tuple = (4, 2), kind: str = "F32", first: float = 1.0, **more: tuple) -> bytes:
    """An adapter's file, with these shapes."""
    tensors, data = {}, b""
    width = {"F32": 4, "I64": 8, "F8_E4M3": 1, "BOOL": 1}[kind]
    for name, shape in {FIRST: a, SECOND: b, **more}.items():
        if shape is not None:
            count = 1
            for size in shape:
                count *= size
            part = struct.pack("<f", first if name == FIRST else 1.0) * count if kind == "F32" else bytes(width * count)
            tensors[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [len(data), len(data) + len(part)]}
            data += part
    return raw(tensors, data)


def lora(
    name: str,
    *says: str,
    config: object = None,
    content: bytes | None = None,
    change: Callable = lambda path: None,
    how: tuple = ("factors", "product"),
    works: tuple | bool = (),
    arguments: tuple = (),
    among: str = "bad",
) -> None:
    """A case of two adapters, the second with another configuration or file; averaged in either way."""
    for kind in how:

        def build(root: Path, stack: object, kind: str = kind) -> list:
            for one in ("good", "bad"):
                bad = one == "bad"
                said = LORA | config if bad and isinstance(config, dict) else LORA
                said = {key: value for key, value in said.items() if value is not ...}
                write(root / one / "adapter_model.safetensors", content if bad and content else factors())
                told = config if bad and isinstance(config, bytes) else json.dumps(said).encode()
                write(root / one / "adapter_config.json", told)
            change(root / "bad")
            return ["good", "bad", "--lora", kind, *arguments]

        fine = works if isinstance(works, bool) else kind in works
        told = () if fine else (among, *says)
        add("adapters", f"{name}, {kind}", build, *told, works=fine, compared=kind != "product")


CONFIG = "adapter_config.json"
lora("as it should be", works=True)
for name, content in {
    "empty": b"",
    "no JSON": b"r: 2",
    "a list": b"[]",
    "nested": b'{"r":' * 100_000,
    "deep": json.dumps(LORA | {"x": nested(900)}).encode(),
    "not UTF-8": b'{"peft_type": "\xff"}',
    "one key twice": b'{"peft_type": "LORA", "peft_type": "IA3"}',
    "10 million values": b'{"x": [' + b"1," * 10_000_000 + b"1]}",
}.items():
    lora(f"a configuration {name}", CONFIG, change=replaced(CONFIG, content))
for name, make in PLACES.items():
    lora(f"a configuration: {name}", change=replaced(CONFIG, make))
    lora(f"factors: {name}", change=replaced("adapter_model.safetensors", make))
lora("a configuration of 10 GB", CONFIG, change=stretched(CONFIG, b"{"))
lora("a configuration missing", CONFIG, change=lambda path: (path / CONFIG).unlink())
for name, rank in {
    "zero": 0,
    "negative": -2,
    "huge": 10**9,
    "of 400 digits": 10**400,
    "NaN": NAN,
    "null": None,
    "text": "two",
    "a list": [2],
    "missing": ...,
    "of another": 3,
}.items():
    lora(f"a rank {name}", "r", config={"r": rank})
for name, alpha in {
    "NaN": NAN,
    "infinite": float("inf"),
    "of 400 digits": 10**400,
    "null": None,
    "text": "four",
    "a list": [4],
    "missing": ...,
}.items():
    lora(f"an alpha {name}", "alpha", config={"lora_alpha": alpha})
for name, pattern in {
    "a list": [1],
    "text": "q_proj",
    "no pattern": {"(": 1},
    "without end": {r"(([a-z_.]+)+)+x": 1},
    "of choices without end": {"(?:a|a)?" * 40: 1},
    "of 40 repetitions": {".*" * 40 + "x": 1},
    "of a million repetitions": {"a*" * 500_000: 1},
    "to nested lists": {"q_proj": nested(50)},
    "to NaN": {"q_proj": NAN},
    "to text": {"q_proj": "many"},
}.items():
    lora(f"alphas by a pattern: {name}", config={"alpha_pattern": pattern})
    lora(f"ranks by a pattern: {name}", config={"rank_pattern": pattern})
lora(
    "ranks by a pattern that is right",
    config={"rank_pattern": {r"layers\.[0-9]+\..*proj": 2}, "r": 8},
    how=("product",),
    works=True,
)
lora("another base model", "base_model_name_or_path", config={"base_model_name_or_path": "other"})
lora("a base model outside", "base_model_name_or_path", config={"base_model_name_or_path": "../../../etc"})
lora("another kind of adapter", "peft_type", config={"peft_type": "IA3"}, how=("factors",))
lora("no kind of adapter", config={"peft_type": None})
lora("a kind of adapter that is a list", config={"peft_type": ["LORA"]})
lora("DoRA", "DoRA", config={"use_dora": True}, how=("product",))
lora("a start that changes the model", "pissa", config={"init_lora_weights": "pissa"}, how=("product",))
lora("a start that is a list", config={"init_lora_weights": nested(50)}, how=("product",))
lora("B missing", SECOND, content=factors(b=None))
lora("A missing", FIRST, content=factors(a=None))
lora("A of another rank than B", content=factors(a=(3, 3)))
lora("a rank of nothing", content=factors(a=(0, 3), b=(4, 0)), config={"r": 0})
lora("another size of the input", content=factors(a=(2, 5)))
lora("another size of the output", content=factors(b=(5, 2)))
lora("factors that would broadcast", content=factors(b=(1, 2)))
lora("factors without a dimension", content=factors(a=(), b=()))
lora("factors of 3 dimensions", content=factors(a=(2, 3, 1), b=(4, 2, 1)))
lora("factors that are transposed", content=factors(a=(3, 2), b=(2, 4)))
lora("factors of integers", "int64", content=factors(kind="I64"))
lora("factors of 8 bits", "float8", content=factors(kind="F8_E4M3"))
lora("factors with NaN", FIRST, content=factors(first=NAN))
lora("factors with infinity", FIRST, content=factors(first=float("inf")))
lora("another target module", content=factors(), config={"target_modules": ["q_proj", "v_proj"]}, works=True)
OTHER = {f"base_model.model.layers.0.v_proj.lora_{x}.weight": shape for x, shape in (("A", (2, 3)), ("B", (4, 2)))}
lora("more target modules", "v_proj", content=factors(**OTHER), works=("product",))
lora("a layer that was saved whole", "head", among="good", content=factors(**{"base_model.model.head.weight": (3, 3)}))
lora("--lora-rank that is huge", "room", among="", arguments=("--lora-rank", str(10**12)), how=("product",))


# --- pytorch_model.bin -----------------------------------------------------------------------------------------------

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def bins(name: str, *says: str, change: Callable, **options: object) -> None:
    """A case of two folders with pytorch_model.bin, the second changed."""

    def build(root: Path, stack: object) -> list:
        for one in ("good", "bad"):
            (root / one).mkdir()
            zipped(root / one / BIN, weights(w=PLAIN), {"0": FOUR})
            (root / one / "config.json").write_text("{}")
        change(root / "bad")
        return ["good", "bad"]

    add("torch folders", name, build, *(says if options.get("works") else ("bad", *says)), **options)


def indexed(places: object) -> Callable[[Path], None]:
    """A change of a folder: its file is a shard of an index that says this."""

    def change(path: Path) -> None:
        (path / BIN).rename(path / "shard.bin")
        (path / BIN_INDEX).write_bytes(places if isinstance(places, bytes) else json.dumps(places).encode())

    return change


def archive(*ops: bytes, **storages: bytes) -> Callable[[Path], None]:
    return replaced(BIN, lambda path: zipped(path, pickled(*ops), storages or {"0": FOUR}))


def deflated(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path / BIN, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("x/data.pkl", weights(w=rebuilt(storage("0", 2**24), 0, (2**24,), (1,))))
        file.writestr("x/data/0", bytes(1 << 26))


bins("as it should be", change=lambda path: None, works=True)
bins("an index as it should be", change=indexed({"weight_map": {"w": "shard.bin"}}), works=True)
bins(
    "code",
    BIN,
    "needs the code of posix.mkdir",
    change=archive(b"}", text("w"), b"cposix\nmkdir\n", text("harmed"), b"\x85Rs"),
)
bins(
    "code in a shard",
    "needs the code of posix.mkdir",
    change=lambda path: (
        archive(b"}", text("w"), b"cposix\nmkdir\n", text("harmed"), b"\x85Rs")(path),
        indexed({"weight_map": {"w": "shard.bin"}})(path),
    ),
)
bins("a bare pickle", BIN, change=replaced(BIN, pickle.dumps(Harm("harmed"))))
bins("nested lists", BIN, change=archive(b"}", text("w"), b"]" * 200_000, b"a" * 199_999, b"s"))
bins("a key of 2^60 tuples", BIN, change=archive(b"}", TUPLES, b"Ns"))
bins("lists of 2^60", BIN, change=archive(b"}", text("w"), BOMB, b"s"))
bins("a bomb", BIN, "compressed", change=deflated)
bins(
    "a bomb of overlapping records",
    BIN,
    change=replaced(BIN, lambda path: overlapping(path)),
)
bins("a view of 2^40", BIN, "'w'", change=archive(b"}", text("w"), rebuilt(storage("0", 4), 0, (2**40,), (0,)), b"s"))
bins("10 GB of nothing", BIN, change=stretched(BIN, b"PK\3\4"))
bins(
    "10 GB that list themselves",
    BIN,
    change=stretched(BIN, b"PK\3\4", b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 9, 9, 2**32 - 99, 0, 0)),
)
bins("a record beyond the file", BIN, change=replaced(BIN, lambda path: far(path)))
bins("another shape", "'w' has shape", change=archive(b"}", text("w"), rebuilt(storage("0", 4), 0, (4,), (1,)), b"s"))
for name, make in PLACES.items():
    bins(f"a file: {name}", change=replaced(BIN, make))
    bins(f"an index: {name}", change=lambda path, make=make: (indexed({})(path), replaced(BIN_INDEX, make)(path)))
    bins(
        f"a shard: {name}",
        change=lambda path, make=make: (indexed({"weight_map": {"w": "x"}})(path), replaced("x", make)(path)),
    )
for name, content in {
    "empty": b"",
    "nested": b'{"weight_map":' * 100_000,
    "a list": b"[]",
    "without a map": b"{}",
    "that names nothing": {"weight_map": {}},
    "of another tensor": {"weight_map": {"v": "shard.bin"}},
    "of too many": {"weight_map": {"w": "shard.bin", "v": "shard.bin"}},
    "of numbers": {"weight_map": {"w": 1}},
    "one name twice": b'{"weight_map": {"w": "shard.bin", "w": "shard.bin"}}',
    "of 10 million lists": b'{"weight_map": [' + b"[]," * 10_000_000 + b"[]]}",
}.items():
    bins(f"an index {name}", change=indexed(content))
for name, file in {
    "above": "../good/pytorch_model.bin",
    "at the root": "/etc/passwd",
    "missing": "gone.bin",
    "empty": "",
    "the folder": ".",
    "with NUL": "shard.bin\0",
    "the index": BIN_INDEX,
}.items():
    bins(f"a shard that is {name}", BIN_INDEX, change=indexed({"weight_map": {"w": file}}))


def overlapping(path: Path) -> None:
    """An archive of which many records are the same pickle, which takes a while to look at."""
    zipped(path, pickled(b"N" * 100_000, weights(w=PLAIN)[2:-1]), {"0": FOUR})
    content = path.read_bytes()
    at = content.rindex(b"PK\5\6")
    (start,) = struct.unpack_from("<I", content, at + 16)
    listed = content[start:at]
    many = listed[: listed.index(b"PK\1\2", 4)] * 1000 + listed
    count = many.count(b"PK\1\2")
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, len(many), start, 0)
    path.write_bytes(content[:start] + many + end)


def far(path: Path) -> None:
    """An archive of which a record lies beyond 63 bits."""
    zipped(path, weights(w=PLAIN), {"0": FOUR})
    content = path.read_bytes()
    at = content.rindex(b"PK\5\6")
    (start,) = struct.unpack_from("<I", content, at + 16)
    listed = bytearray(content[start:at])
    extra = struct.pack("<HHQ", 1, 8, 2**64 - 9)  # where the first record lies
    name = struct.unpack_from("<H", listed, 28)[0]
    struct.pack_into("<H", listed, 30, len(extra))
    struct.pack_into("<I", listed, 42, 2**32 - 1)
    listed[46 + name : 46 + name] = extra
    count = 4
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, len(listed), start, 0)
    path.write_bytes(content[:start] + bytes(listed) + end)


# --- the Hub's cache -------------------------------------------------------------------------------------------------

COMMIT = "a" * 40


def hub(name: str, *says: str, change: Callable = lambda path: None, model: str = "kitchen/one", **options) -> None:
    """A case of a good folder and a model in the Hub's cache, which is changed."""

    def build(root: Path, stack: list) -> list:
        from huggingface_hub import constants

        stack.append(mock.patch.object(constants, "HF_HUB_CACHE", str(root / "hub")))
        cache = root / "hub" / "models--kitchen--one"
        write(cache / "refs" / "main", COMMIT.encode())
        folder(cache / "snapshots" / COMMIT)
        (cache / "blobs").mkdir()
        for i, file in enumerate(sorted((cache / "snapshots" / COMMIT).iterdir())):  # as the cache has them
            file.symlink_to(f"../../blobs/{i}" if file.rename(cache / "blobs" / str(i)) else "")
        folder(root / "good")
        folder(root / "outside")
        change(cache)
        return ["good", model]

    add("the Hub's cache", name, build, *says, **options)


hub("as it should be", works=True)
hub("a ref with a line break", works=True, change=replaced("refs/main", COMMIT.encode() + b"\n"))
hub("a commit", works=True, model=f"kitchen/one@{COMMIT}")
for name, to in {
    "outside": "../../../outside",
    "at the root": "/etc",
    "the folder": ".",
    "above": "..",
    "nothing": "",
    "a name": "main",
    "no text": b"\xff\0",
    "100,000 letters": "x" * 100_000,
    "a commit and more": COMMIT + "/../../outside",
    "two lines": f"{COMMIT}\n{COMMIT}",
}.items():
    hub(f"a ref to {name}", "refs/main", change=replaced("refs/main", to if isinstance(to, bytes) else to.encode()))
hub("a ref to a commit that is not there", "hf download kitchen/one", change=replaced("refs/main", b"b" * 40))
hub("a ref of 10 GB", "refs/main", change=stretched("refs/main", COMMIT.encode()))
for name, make in PLACES.items():
    missing = name in ("a link to nothing", "a link to itself")
    hub(f"a ref: {name}", *(["hf download"] if missing else ["refs/main"]), change=replaced("refs/main", make))
    hub(f"a blob: {name}", *([] if missing else ["model.safetensors"]), change=replaced("blobs/1", make))
for name, model in {
    "that climbs": "../one",
    "that climbs further": "kitchen/..",
    "with a revision that climbs": "kitchen/one@../../../outside",
    "with a revision at the root": "kitchen/one@/etc/passwd",
    "with a revision of refs": "kitchen/one@../refs/main",
    "with a revision that is not there": "kitchen/one@v9",
    "with half a commit": "kitchen/one@aaaaaaa",
    "of dots": "./.",
    "with NUL": "kitchen/one\0",
    "of 5,000 letters": "kitchen/" + "x" * 5000,
    "with a line break": "kitchen/one\n",
}.items():
    hub(f"a name {name}", model=model)
hub("a snapshot that links outside", works=True, change=lambda path: linked(path))
hub("a snapshot that is a file", "hf download", change=lambda path: replaced_folder(path))
hub("a snapshot that links to itself", "hf download", change=lambda path: replaced_folder(path, loop=True))


def linked(path: Path) -> None:
    import shutil

    shutil.rmtree(path / "snapshots" / COMMIT)
    (path / "snapshots" / COMMIT).symlink_to("../../../outside")


def replaced_folder(path: Path, loop: bool = False) -> None:
    import shutil

    shutil.rmtree(path / "snapshots" / COMMIT)
    if loop:
        (path / "snapshots" / COMMIT).symlink_to(COMMIT)
    else:
        (path / "snapshots" / COMMIT).write_bytes(b"")
