"""What bad input gets: one clear message, exit status 2, and everything on the disk as it was."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from averaging import cli
from averaging.soups import engine, output, uniform


def write(path, **tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors or {"a": torch.ones(2, 3)}, path)
    return path


def folder(path, config=None, **tensors):
    write(path / "model.safetensors", **tensors)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "x"}))
    return path


CACHES = (".evaluations.json", ".learned.json")


def snapshot(root):
    return {
        str(p.relative_to(root)): p.is_file() and p.stat().st_size < 10**7 and p.read_bytes() for p in root.rglob("*")
    }


@pytest.fixture
def refused(tmp_path, capsys):
    """Run the command, expect an error with these words, and nothing on the disk changed."""

    def run(*arguments, says=(), caching=False):
        (tmp_path / "old").mkdir(exist_ok=True)
        (tmp_path / "old" / "soup.json").write_text("{}")
        (tmp_path / "old" / "model.safetensors").write_bytes(b"old")
        out = [] if "-o" in arguments else ["-o", tmp_path / "old", "--force"]
        before = snapshot(tmp_path)
        assert cli.main([str(argument) for argument in [*arguments, *out]]) == 2
        after = snapshot(tmp_path)
        if caching:
            after = {name: content for name, content in after.items() if not name.endswith(CACHES)}
        assert after == before
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("soup: error: ")
        assert "Traceback" not in printed.err
        assert len(printed.err.splitlines()) <= 3
        for words in says:
            assert str(words) in printed.err
        return printed.err

    return run


def test_nothing_there(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", says=["no checkpoints in", tmp_path / "empty"])
    refused(tmp_path / "missing", says=["no such file", tmp_path / "missing"])
    refused(tmp_path / "missing.safetensors", says=["no such file"])
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", says=["notes.txt is no checkpoint"])


def test_one_ingredient(tmp_path, refused):
    refused(write(tmp_path / "run" / "a.safetensors"), says=["at least two", "a.safetensors"])
    refused(tmp_path / "run", says=["at least two"])


def test_no_output_named(tmp_path, capsys):
    paths = [str(write(tmp_path / f"{name}.safetensors")) for name in "ab"]
    assert cli.main(paths) == 2
    assert "-o OUT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"a": torch.ones(2, 3), "b": torch.ones(1)}, ["only in", "'b'"]),
        ({"a": torch.ones(3, 2)}, ["'a'", "shape", "[2, 3]", "[3, 2]"]),
        ({"a": torch.ones(1, 3)}, ["'a'", "shape", "[2, 3]", "[1, 3]"]),  # would broadcast
        ({"a": torch.ones(2, 3).half()}, ["'a'", "dtype", "float32", "float16"]),
    ],
)
def test_different_tensors(tmp_path, refused, other, says):
    one, two = write(tmp_path / "1.safetensors"), write(tmp_path / "2.safetensors", **other)
    refused(one, two, says=[one, two, *says])


def test_different_models_and_kinds(tmp_path, refused):
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", {"model_type": "y"})
    refused(a, b, says=["model_type", "'x'", "'y'"])
    refused(a, write(tmp_path / "c.safetensors"), says=["Hugging Face model folder", "safetensors file"])


@pytest.mark.parametrize("content", [b"", b"\0" * 5, b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}trailing"])
def test_corrupt_files(tmp_path, refused, content):
    good, bad = write(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    bad.write_bytes(content)
    refused(good, bad, says=[bad, "not a valid safetensors file"])


def test_missing_shards_and_shards_elsewhere(tmp_path, refused):
    for name in "ab":
        (tmp_path / name).mkdir()
    index = tmp_path / "b" / "model.safetensors.index.json"
    write(tmp_path / "x.safetensors")
    folder(tmp_path / "a")
    for place, words in [("x.safetensors", "missing"), ("../x.safetensors", "own folder")]:
        index.write_text(json.dumps({"weight_map": {"a": place}}))
        refused(tmp_path / "a", tmp_path / "b", says=[index, place, words])


def test_folders_with_torch_files(tmp_path, refused):
    for name in "ab":
        (tmp_path / name).mkdir()
        torch.save({"a": torch.ones(2)}, tmp_path / name / "pytorch_model.bin")
    bad = tmp_path / "b" / "pytorch_model.bin"
    for content in (b"", b"x" * 100, bad.read_bytes()[:-50]):
        bad.write_bytes(content)
        refused(tmp_path / "a", tmp_path / "b", says=[bad])
    torch.save({"a": torch.ones(2), "b": Code()}, bad)
    refused(tmp_path / "a", tmp_path / "b", says=[bad, "needs the code of", "Code"])
    bad.rename(tmp_path / "b" / "shard.bin")
    index = tmp_path / "b" / "pytorch_model.bin.index.json"
    for place, words in [("gone.bin", "missing"), ("../a/pytorch_model.bin", "own folder"), ("shard.bin", "Code")]:
        index.write_text(json.dumps({"weight_map": {"a": place}}))
        refused(tmp_path / "a", tmp_path / "b", says=[place, words])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity(tmp_path, refused, monkeypatch, dtype, bad):
    monkeypatch.setattr(engine, "PIECE", 1024)
    paths = []
    for i in range(3):
        tensor = torch.ones(5000, dtype=dtype)
        if i == 1:
            tensor[4321] = bad
        paths.append(write(tmp_path / f"{i}.safetensors", good=torch.full((3,), float(i)), bad=tensor))
    refused(*paths, says=[paths[1], "'bad'", str(bad), "element 4321", "--allow-nonfinite"])
    mixed = uniform(paths, allow_nonfinite=True)["bad"]
    assert str(mixed[4321].item()) == str(bad)
    assert (mixed.isfinite().sum(), mixed[0]) == (4999, 1)


def test_opposite_infinities_and_zero_weights_do_not_hide(tmp_path, refused):
    for i, value in enumerate([float("inf"), float("-inf"), 1.0]):
        write(tmp_path / f"{i}.safetensors", a=torch.full((3,), value))
    refused(tmp_path / "0.safetensors", tmp_path / "1.safetensors", says=["0.safetensors", "inf"])
    refused(tmp_path / "0.safetensors", tmp_path / "2.safetensors", "--weights", "0,1", says=["0.safetensors", "inf"])


def test_large_numbers_are_no_infinity_but_an_overflow_is_an_error(tmp_path, refused):
    paths = [
        write(tmp_path / f"{i}.safetensors", a=torch.full((2000,), 3e38), b=torch.tensor(float(i))) for i in range(2)
    ]
    assert torch.equal(uniform(paths)["a"], torch.full((2000,), 3e38))
    refused(*paths, "--dtype", "float16", says=["'a'", "too large for float16"])


def test_integers_that_differ(tmp_path, refused):
    for dtype in (torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn):
        paths = [write(tmp_path / f"{i}.safetensors", q=torch.tensor([i, 1]).to(dtype)) for i in range(2)]
        refused(*paths, says=["'q'", str(dtype).removeprefix("torch."), *paths])


class Code:
    pass


def test_a_pickle_that_needs_code(tmp_path, refused):
    for name in "ab":
        torch.save({"state_dict": {"w": torch.ones(1)}, "hparams": Code()}, tmp_path / f"{name}.ckpt")
    refused(tmp_path / "a.ckpt", tmp_path / "b.ckpt", says=["a.ckpt", "needs the code of", "Code", "save_file"])


def test_output_among_the_ingredients(tmp_path, refused):
    a, b = folder(tmp_path / "run" / "a"), folder(tmp_path / "run" / "b")
    refused(a, b, "-o", a, "--force", says=["one of the ingredients"])
    (tmp_path / "link").symlink_to(a)
    refused(a, b, "-o", tmp_path / "link", "--force", says=["one of the ingredients"])
    refused(a, b, "-o", a / "sub", says=["inside the ingredient"])
    refused(a, b, "-o", tmp_path / "run", "--force", says=["inside the output"])
    refused(a, a, says=["named twice"])


def test_outputs_that_are_not_fit(tmp_path, refused):
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b")
    refused(a, b, "-o", tmp_path / "x.safetensors", says=["is a folder"])
    c, d = write(tmp_path / "c.safetensors"), write(tmp_path / "d.safetensors")
    refused(c, d, "-o", tmp_path / "x.ckpt", says=["end the name with .safetensors"])
    refused(c, d, "-o", tmp_path / "old", says=["exists already", "--force"])
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    refused(a, b, "-o", tmp_path / "precious", "--force", says=["no model"])
    refused(a, b, "-o", tmp_path / "c.safetensors" / "x", says=["not a folder"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--last", "3"], "--last 3"),
        (["--last", "0"], "--last must be at least 1"),
        (["--every", "0"], "--every must be at least 1"),
        (["--every", "2"], "at least two"),
        (["--weights", "1"], "1 weights for 2"),
        (["--weights", "nan,1"], "finite"),
        (["--weights=-1,1"], "positive sum"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
    ],
)
def test_options_that_make_no_sense(tmp_path, refused, options, says):
    paths = [write(tmp_path / f"{i}.safetensors") for i in range(2)]
    refused(*paths, *options, says=[says])


LEARNING = """
import torch
def task(): return torch.nn.Linear(3, 2), loss, [torch.ones(1, 3)]
def loss(model, x): return model(x).sum()
def nothing(): return None
def missing(): raise OSError("no held-out data")
def empty(): return *task()[:2], []
def nan(): return task()[0], lambda model, x: model(x).sum() * nan_if(model.weight[0, 0] == 2), task()[2]
def later(): return task()[0], lambda model, x: model(x).sum() * nan_if(torch.is_grad_enabled()), task()[2]
def nan_if(condition): return float("nan") if condition else 1
def flat(): return task()[0], lambda model, x: model(x).sum().detach(), task()[2]
def number(): return task()[0], lambda model, x: 1.0, task()[2]
def broken(): return task()[0], lambda model, x: x @ x, task()[2]
def other(): return torch.nn.Linear(4, 2), loss, []
def metric(weights): return float("nan") if weights["weight"][0, 0] == 2 else 1.0
"""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("learned", ["--method learned needs --loss"]),
        ("learned --loss here", ["--loss here: give MODULE:FUNCTION"]),
        ("learned --loss HERE:gone", ["--loss", "no attribute 'gone'"]),
        ("learned --loss HERE:nothing", ["must return (model, loss, batches)"]),
        ("learned --loss HERE:missing", ["OSError", "no held-out data"]),
        ("learned --loss HERE:empty", ["there are no batches"]),
        ("learned --loss HERE:nan", ["the loss is nan for", "2.safetensors", "leave"]),
        ("learned --loss HERE:later", ["the loss is nan for epoch 1, batch 1"]),
        ("learned --loss HERE:flat", ["has no gradient"]),
        ("learned --loss HERE:number", ["a tensor with a single number, not 1.0, for the uniform soup"]),
        ("learned --loss HERE:broken", ["the loss raised RuntimeError for the uniform soup"]),
        ("learned --loss HERE:other", ["'weight'", "shape", "another model"]),
        ("learned --loss HERE:task --lr 0", ["lr=0.0"]),
        ("learned --loss HERE:task --lr nan", ["lr=nan"]),
        ("learned --loss HERE:task --epochs 0", ["epochs=0"]),
        ("learned --loss HERE:task --last 1", ["at least two"]),
        ("learned --loss HERE:task --evaluate HERE:metric", ["--evaluate has no meaning"]),
        ("learned --loss HERE:task --evaluations 3", ["--evaluations has no meaning"]),
        ("learned --loss HERE:task --plot x.txt", ["no name for a picture"]),
        ("search", ["--method search needs --evaluate"]),
        ("search --evaluate HERE:metric --loss HERE:task", ["--loss has no meaning"]),
        ("search --evaluate HERE:metric --evaluations 3", ["evaluations=3", "4"]),
        ("search --evaluate HERE:metric", ["returned nan for", "2.safetensors"]),
        ("greedy --evaluate HERE:metric --per layer", ["--per has no meaning"]),
    ],
)
def test_learning(tmp_path, refused, monkeypatch, options, says):
    if options.startswith("search"):
        pytest.importorskip("cma")
    here = f"learning_{abs(hash(str(tmp_path)))}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / f"{here}.py").write_text(LEARNING)
    paths = [
        write(tmp_path / f"{i}.safetensors", weight=torch.full((2, 3), float(i)), bias=torch.ones(2)) for i in range(3)
    ]
    refused(*paths, "--method", *options.replace("HERE", here).split(), says=says, caching=True)


def test_no_room(tmp_path, refused, monkeypatch):
    paths = [write(tmp_path / f"{i}.safetensors", a=torch.ones(1000)) for i in range(2)]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage._replace(free=100))
    refused(*paths, says=["not enough room", "4,000 bytes", tmp_path])
    monkeypatch.undo()
    calls = []

    def full(*arguments):
        calls.append(arguments)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(output.os, "pwrite", full)
    refused(*paths, says=["no space left on device", tmp_path / "old"])
    assert calls


def test_no_permission(tmp_path, refused, monkeypatch):
    paths = [write(tmp_path / f"{i}.safetensors") for i in range(2)]
    monkeypatch.setattr(output.os, "access", lambda path, mode: False)  # root may do everything
    refused(*paths, says=["no permission", tmp_path])


def test_debug_shows_where(tmp_path):
    with pytest.raises(ValueError, match="at least two"):
        cli.main([str(write(tmp_path / "a.safetensors")), "-o", str(tmp_path / "out"), "--debug"])


def test_from_a_shell(tmp_path):
    command = [sys.executable, "-m", "averaging.cli", tmp_path / "missing", "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"soup: error: no such file or directory: {tmp_path / 'missing'}\n"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c(tmp_path, monkeypatch, capsys):
    paths = [write(tmp_path / f"{i}.safetensors", a=torch.ones(100)) for i in range(2)]
    before = snapshot(tmp_path)

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "wait", interrupt)
    monkeypatch.setattr(engine.Mixer, "_work", lambda self, tasks: None)
    assert cli.main([*map(str, paths), "-o", str(tmp_path / "out")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


LOOP = """
import os, signal, sys, torch
from averaging import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
for folder in sys.stdin:
    child = os.fork()  # as loading torch takes longer than many soups
    while child == 0:
        for names in ("01", "12"):
            paths = [f"{folder.strip()}/{name}" for name in names]
            if outcome := cli.main([*paths, "-o", f"{folder.strip()}/out", "--force", "-q"]):
                os._exit(outcome)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def cooking():
    """A process that, told a folder, starts another one that cooks soups there until it is stopped; prints its id."""
    with subprocess.Popen(
        [sys.executable, "-c", LOOP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGINT])
def test_stopped_at_random_moments(tmp_path, cooking, signal_):
    for i in range(3):
        folder(tmp_path / str(i), a=torch.full((1 << 20,), float(i)), b=torch.full((1000, 1000), float(i)))
    for wait in (0.05, 0.2, 0.33):
        print(tmp_path, file=cooking.stdin, flush=True)
        child = int(cooking.stdout.readline())
        time.sleep(wait)
        os.kill(child, signal_)
        status = int(cooking.stdout.readline())
        assert (os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)) in (signal_, 130)
        litter = {path.name for path in tmp_path.iterdir()} - {"0", "1", "2", "out"}
        if signal_ == signal.SIGINT:
            assert litter == set()
        if (tmp_path / "out").exists():
            assert {path.name for path in (tmp_path / "out").iterdir()} == {
                "config.json",
                "model.safetensors",
                "soup.json",
            }
            values = torch.cat(
                [tensor.flatten() for tensor in load_file(tmp_path / "out" / "model.safetensors").values()]
            )
            assert values.unique().tolist() in ([0.5], [1.5])
    assert cli.main([f"{tmp_path}/0", f"{tmp_path}/1", "-o", f"{tmp_path}/out", "--force", "-q"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2", "out"}


# --- every method ----------------------------------------------------------------------------------------------------

METHODS = {
    "uniform": [],
    "wise-ft": ["--init", "base.safetensors", "--last", "1"],
    "task": ["--init", "base.safetensors"],
    "slerp": ["--init", "base.safetensors"],
    "warp": ["--init", "base.safetensors"],
    "rewarded": [],
    "model-stock": ["--init", "base.safetensors"],
    "ema": ["--decay", "0.9"],
    "fisher": [],
    "greedy": ["--evaluate-command", "stat -c %i {checkpoint}"],
    "ranked": ["--top", "2", "--evaluate-command", "stat -c %i {checkpoint}"],
    "lm-cocktail": ["--evaluate-command", "stat -c %i {checkpoint}"],
    "lm-cocktail with a target": ["--target", "base.safetensors", "--evaluate-command", "stat -c %i {checkpoint}"],
}


@pytest.fixture(params=METHODS)
def method(request, tmp_path, monkeypatch):
    """The options of a method, and two good ingredients, a base and Fishers in the current folder."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("base", "step-1", "step-2")):
        write(tmp_path / f"{name}.safetensors", a=torch.full((2, 3), float(i)), b=torch.arange(5.0) ** i)
        write(tmp_path / f"{name}.fisher.safetensors", a=torch.ones(2, 3), b=torch.ones(5))
    return ["step-1.safetensors", "step-2.safetensors", "--method", request.param.split()[0], *METHODS[request.param]]


def test_each_method_works(method, tmp_path):
    assert cli.main([*method, "-o", "out.safetensors", "-q"]) == 0
    assert load_file(tmp_path / "out.safetensors").keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a": torch.ones(2, 3)}, "'b'"),
        ({"a": torch.ones(3, 2), "b": torch.ones(5)}, "'a' has shape"),
        ({"a": torch.ones(2, 3).half(), "b": torch.ones(5)}, "'a' has dtype"),
    ],
)
def test_each_method_refuses_what_does_not_fit(method, tmp_path, refused, tensors, says):
    write(tmp_path / "step-2.safetensors", **tensors)
    refused(*method, "-o", "out.safetensors", says=["step-2.safetensors", says])


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_each_method_refuses_nan_and_infinity(method, tmp_path, refused, bad):
    for i in (1, 2):  # a search that has evaluated one would keep its result
        write(tmp_path / f"step-{i}.safetensors", a=torch.full((2, 3), float(i)), b=torch.full((5,), bad))
    refused(*method, "-o", "out.safetensors", says=[".safetensors: tensor 'b' holds", bad, "leave this checkpoint out"])


@pytest.mark.parametrize("content", [b"", b"\0" * 5, b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}trailing"])
def test_each_method_refuses_corrupt_files(method, tmp_path, refused, content):
    (tmp_path / "step-2.safetensors").write_bytes(content)
    refused(*method, "-o", "out.safetensors", says=["step-2.safetensors", "not a valid safetensors file"])


def test_each_method_refuses_unfit_places(method, tmp_path, refused, monkeypatch):
    refused(*method, "-o", "step-2.safetensors", "--force", says=["one of the ingredients"])
    refused(*method, "-o", "base.safetensors", says=["exists already" if "base.safetensors" not in method else "base"])
    refused(*method, "-o", "out.ckpt", says=["end the name with .safetensors"])
    refused(*method, "-o", "out.safetensors", "--dtype", "int8", says=["unknown dtype"])
    refused(*method, "-o", "out.safetensors", "--only", "nothing", says=["leave none"])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage._replace(free=10))
    refused(*method, "-o", "out.safetensors", says=["not enough room"])
