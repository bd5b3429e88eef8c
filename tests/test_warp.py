"""WARP, rewarded soups and what lies along a coefficient: against float64, from the disk, and what goes wrong."""

from __future__ import annotations

import csv
import json
import os
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from averaging import cli, soups
from averaging.checkpoints import Checkpoint
from averaging.soups import engine, output

SHAPES = {"matrix": (70, 33), "vector": (1025,), "scalar": ()}
RANGE = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(engine, "PIECE", 1024)


@pytest.fixture
def family(tmp_path):
    """An initial model and some fine-tuned from it, as files and in memory."""

    def make(count, dtype=torch.float32):
        def random(seed, scale):
            g = torch.Generator().manual_seed(seed)
            return {n: torch.randn(s, generator=g, dtype=torch.float64) * scale for n, s in SHAPES.items()}

        init = {n: t.to(dtype) for n, t in random(0, 1).items()}
        tunings = [random(i + 1, 0.05 * (i + 1)) for i in range(count)]
        models = [{n: (init[n].double() + tuning[n]).to(dtype) for n in init} for tuning in tunings]
        paths = [tmp_path / f"ft{i}.safetensors" for i in range(count)]
        for path, model in zip(paths, models, strict=True):
            save_file(model, path)
        save_file(init, tmp_path / "init.safetensors")
        return tmp_path / "init.safetensors", paths, init, models

    return make


def soup(*arguments):
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stopped:  # by the parser
        return stopped.code


def wide(tensor):
    return tensor.double().numpy()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def two(a, b, share):
    angle = np.arccos(np.clip((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))
    if np.sin(angle) < 1e-6:
        return (1 - share) * a + share * b
    return (np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)


def warped(init, models, eta, weights=None):
    """The paper's appendix B.3: one after the other, the m-th with its share among the first m; then LITI. float64."""
    weights = weights or [1] * len(models)
    result = {}
    for name in init:
        tasks = [wide(model[name]) - wide(init[name]) for model in models]
        so_far = tasks[0]
        for m in range(1, len(tasks)):
            so_far = two(so_far, tasks[m], weights[m] / sum(weights[: m + 1]))
        result[name] = (1 - eta) * wide(init[name]) + eta * (wide(init[name]) + so_far)
    return result


def close(mixed, expected, dtype=torch.float32):
    ulp = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-46}[dtype]
    for name, tensor in mixed.items():
        np.testing.assert_allclose(wide(tensor), expected[name], rtol=1.0001 * ulp, atol=1e-12)


# --- WARP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "weights"), [(1, None), (2, None), (2, [0.75, 0.25]), (3, None), (3, [1, 2, 4])])
def test_warp_is_slerp_and_liti(family, tmp_path, dtype, count, weights):
    init, paths, first, models = family(count, dtype)
    close(soups.warp(paths, init=init, weights=weights), warped(first, models, 0.3, weights), dtype)
    shares = [] if weights is None else ["--slerp-weights", *weights]
    command = [*paths, "--method", "warp", "--init", init, *shares]
    assert soup(*command, "-o", tmp_path / "o.safetensors") == 0
    close(load_file(tmp_path / "o.safetensors"), warped(first, models, 0.3, weights), dtype)
    assert json.loads((tmp_path / "o.soup.json").read_text())["eta"] == 0.3
    assert soup(*command, "--eta", 1, "-o", tmp_path / "o.safetensors", "--force") == 0
    close(load_file(tmp_path / "o.safetensors"), warped(first, models, 1, weights), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_range_of_eta_from_one_reading_is_each_alone_and_ends_at_init_and_slerp(family, tmp_path, dtype, monkeypatch):
    init, paths, first, models = family(3, dtype)
    passes = []
    run = engine.Mixer.run
    monkeypatch.setattr(engine.Mixer, "run", lambda self, groups: passes.append(1) or run(self, groups))
    out = tmp_path / "out"
    command = [*paths, "--method", "warp", "--init", init, "--eta", "0:1:0.1", "-o", out]
    assert soup(*command, "-q") == 0
    assert len(passes) == 1
    assert sorted(os.listdir(out)) == sorted(f"eta-{eta:g}" for eta in RANGE)
    for eta in RANGE:
        written = load_file(out / f"eta-{eta:g}" / "model.safetensors")
        assert same(written, soups.warp(paths, init=init, eta=eta))
        close(written, warped(first, models, eta), dtype)
        record = json.loads((out / f"eta-{eta:g}" / "soup.json").read_text())
        assert (record["method"], record["eta"], len(record["ingredients"])) == ("warp", eta, 4)
        assert len({part["checksum"] for part in record["ingredients"]}) == 4
    assert same(load_file(out / "eta-0" / "model.safetensors"), first)
    assert same(load_file(out / "eta-1" / "model.safetensors"), soups.slerp(init, paths))
    together = soups.series("warp", paths, RANGE, init=init)
    assert all(
        same(load_file(out / f"eta-{e:g}" / "model.safetensors"), t) for e, t in zip(RANGE, together, strict=True)
    )
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert soup(*command) == 2  # exists
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert soup(*command, "--force") == 0


def test_a_range_keeps_the_kind_of_the_models_which_open(tmp_path):
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    for seed, name in enumerate(("sft", "a", "b")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / name, max_shard_size="1KB")
    command = ["--method", "warp", "--init", tmp_path / "sft", "--eta", "0.25,1", "-o", tmp_path / "out"]
    assert soup(tmp_path / "a", tmp_path / "b", *command) == 0
    mixed = soups.warp([tmp_path / "a", tmp_path / "b"], init=tmp_path / "sft", eta=0.25)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "eta-0.25").state_dict()
    assert all(torch.equal(opened[name], mixed[name]) for name in mixed)
    assert len(list((tmp_path / "out" / "eta-1").glob("*.safetensors"))) > 1


def test_what_slerp_promises_holds_for_whole_models(family, tmp_path):
    init, (a, b), first, models = family(2, torch.float64)
    for share, end in ((0, models[0]), (1, models[1])):  # the ends
        assert same(soups.warp([a, b], init=init, weights=[1 - share, share], eta=1), end)
    turned = soups.warp([b, a], init=init, weights=[0.7, 0.3], eta=1)  # λ and 1 − λ
    close(turned, {n: wide(t) for n, t in soups.warp([a, b], init=init, weights=[0.3, 0.7], eta=1).items()})
    tasks = {n: wide(t) - wide(first[n]) for n, t in models[0].items()}
    twice = {n: torch.tensor(wide(first[n]) + 2 * task) for n, task in tasks.items()}  # collinear
    rotated = {}
    for name, task in tasks.items():  # as long as a's, in another direction
        other = wide(models[1][name]) - wide(first[name])
        rotated[name] = torch.tensor(wide(first[name]) + other * (np.linalg.norm(task) / np.linalg.norm(other)))
    save_file(twice, tmp_path / "twice.safetensors")
    save_file(rotated, tmp_path / "rotated.safetensors")
    line = soups.warp([a, tmp_path / "twice.safetensors"], init=init, eta=1)
    close(line, {n: wide(first[n]) + 1.5 * task for n, task in tasks.items()}, torch.float32)
    kept = soups.warp([a, tmp_path / "rotated.safetensors"], init=init, eta=1)
    for name in ("matrix", "vector"):
        length = np.linalg.norm(wide(kept[name]) - wide(first[name]))
        assert length == pytest.approx(np.linalg.norm(tasks[name]), rel=1e-12)


def test_a_zero_task_vector_in_a_tensor_counts_as_linear_but_a_whole_one_is_refused(family, tmp_path, capsys):
    init, (a, b), first, models = family(2)
    models[1]["vector"] = first["vector"]
    save_file(models[1], b)
    expected = wide(first["vector"]) + 0.5 * (wide(models[0]["vector"]) - wide(first["vector"]))
    close({"vector": soups.warp([a, b], init=init, eta=1)["vector"]}, {"vector": expected})
    save_file(first, tmp_path / "twin.safetensors")
    before = sorted(tmp_path.rglob("*"))
    for eta in ("0.3", "0:1:0.5"):
        command = ["--method", "warp", "--init", init, "--eta", eta, "-o", tmp_path / "out"]
        assert soup(a, tmp_path / "twin.safetensors", *command) == 2
        error = capsys.readouterr().err
        assert "twin.safetensors equals the initial model" in error
        assert len(error.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "warp"], "--method warp needs --init"),
        (["--method", "warp", "--init", "missing"], "no such file or directory: missing"),
        (["--method", "warp", "--init", "other.safetensors"], "'vector' has shape"),
        (["--method", "warp", "--init", "ft0.safetensors"], "both the initial model and an ingredient"),
        (["--method", "warp", "--init", "init.safetensors", "--eta", "1.5"], "eta=1.5: must be between 0 and 1"),
        (["--method", "warp", "--init", "init.safetensors", "--eta", "0:1.5:0.5"], "eta=1.5: must be between 0 and 1"),
        (["--method", "warp", "--init", "init.safetensors", "--eta", "0:1:0"], "argument --eta: expected a number"),
        (["--method", "warp", "--init", "init.safetensors", "--eta", "1:0:0.1"], "argument --eta: expected a number"),
        (["--method", "warp", "--init", "init.safetensors", "--eta", "0:1"], "argument --eta: expected a number"),
        (["--method", "warp", "--init", "init.safetensors", "--eta", "a:b:c"], "argument --eta: expected a number"),
        (["--method", "warp", "--init", "init.safetensors", "--eta", "nan:1:1"], "argument --eta: expected a number"),
        (["--method", "warp", "--init", "init.safetensors", "--eta", "much"], "argument --eta: expected a number"),
        (["--method", "warp", "--init", "init.safetensors", "--eta", ","], "argument --eta: expected a number"),
        (["--method", "warp", "--init", "init.safetensors", "--eta", "0,0"], "each once"),
        (["--method", "warp", "--init", "init.safetensors", "--eta", "0:1:1e-9"], "1000 at most"),
        (["--method", "warp", "--init", "init.safetensors", "--slerp-weights", "1"], "1 weights for 2"),
        (["--method", "warp", "--init", "init.safetensors", "--slerp-weights=-1,2"], "must not be negative"),
        (
            ["--method", "warp", "--init", "init.safetensors", "--slerp-weights", "a", "b"],
            "argument --slerp-weights: expected numbers",
        ),
        (["--method", "warp", "--init", "init.safetensors", "--weights", "1,2"], "--weights has no meaning"),
        (["--method", "warp", "--init", "init.safetensors", "--lambda", "1"], "--lambda has no meaning"),
        (["--method", "warp", "--init", "init.safetensors", "--metric", "x"], "--metric has no meaning"),
        (["--method", "slerp", "--init", "init.safetensors", "--slerp-weights", "1"], "--slerp-weights has no meaning"),
        (["--method", "rewarded", "--lambda", "-0.1"], "lambda=-0.1: must be between 0 and 1"),
        (["--method", "rewarded", "--init", "init.safetensors"], "--init has no meaning"),
        (["third.safetensors", "--method", "rewarded"], "lies between two models, not 3"),
        (["--method", "uniform", "--eta", "0:1:0.5"], "--eta has no meaning for --method uniform"),
        (["--method", "greedy", "--alpha", "0:1:0.5"], "--alpha has no meaning"),
    ],
)
def test_arguments_that_make_no_sense(family, tmp_path, capsys, monkeypatch, arguments, says):
    _, _, first, models = family(2)
    save_file(first | {"vector": torch.ones(3)}, tmp_path / "other.safetensors")
    save_file(models[0], tmp_path / "third.safetensors")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert soup("ft0.safetensors", "ft1.safetensors", *arguments, "-o", "out") == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("soup: error: ")
    assert len(error.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_range_needs_a_folder_room_and_says_what_it_would_write(family, tmp_path, capsys, monkeypatch):
    init, paths, _, _ = family(2)
    command = [*paths, "--method", "warp", "--init", init, "--eta", "0:1:0.5"]
    assert soup(*command) == 2
    assert "-o OUT" in capsys.readouterr().err
    assert soup(*command, "-o", tmp_path / "out.safetensors") == 2
    assert "leave out the suffix" in capsys.readouterr().err
    assert soup(*command, "-o", tmp_path / "out", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert all(f"eta-{eta}," in printed for eta in ("0", "0.5", "1"))
    size = Checkpoint(init).nbytes
    usage = output.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage._replace(free=2 * size))
    assert soup(*command, "-o", tmp_path / "out") == 2
    assert f"not enough room: {3 * size:,} bytes needed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_range_is_written_whole_or_not_at_all(family, tmp_path, monkeypatch):
    init, paths, _, _ = family(2)
    before, write, calls = sorted(tmp_path.rglob("*")), output._write, []

    def full(*arguments):
        calls.append(1)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(output, "_write", full)
    assert soup(*paths, "--method", "warp", "--init", init, "--eta", "0:1:0.1", "-o", tmp_path / "out") == 2
    assert sorted(tmp_path.rglob("*")) == before


# --- rewarded soups, and curves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rewarded(family, tmp_path, share):
    _, paths, _, (a, b) = family(2)
    expected = {n: (1 - share) * wide(a[n]) + share * wide(b[n]) for n in a}
    close(soups.rewarded(paths, share=share), expected)
    assert soup(*paths, "--method", "rewarded", "--lambda", share, "-o", tmp_path / "o.safetensors") == 0
    close(load_file(tmp_path / "o.safetensors"), expected)
    assert json.loads((tmp_path / "o.soup.json").read_text())["lambda"] == share
    if share in (0, 1):
        assert same(load_file(tmp_path / "o.safetensors"), [a, b][int(share)])


def rewards(weights):
    """Two metrics that pull apart: how far from 1 and from −1."""
    v = weights["vector"].double()
    return {"up": -float((v - 1).square().mean()), "down": -float((v + 1).square().mean())}


METHODS = {
    "wise-ft": (
        "alpha",
        1,
        lambda init, models, x: {n: wide(init[n]) * (1 - x) + wide(models[0][n]) * x for n in init},
    ),
    "task": ("scale", 2, lambda i, m, x: {n: wide(i[n]) + x * sum(wide(k[n]) - wide(i[n]) for k in m) for n in i}),
    "slerp": ("eta", 2, warped),
    "warp": ("eta", 3, warped),
    "rewarded": ("lambda", 2, lambda i, m, x: {n: wide(m[0][n]) * (1 - x) + wide(m[1][n]) * x for n in i}),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_curve_is_every_soup_of_its_range_and_the_best_is_written(family, tmp_path, method):
    coefficient, count, combine = METHODS[method]
    init, paths, first, models = family(count)
    base = {} if method == "rewarded" else {"init": init}
    values = [0, 0.25, 0.5, 1]
    result = soups.curve(method, paths, values, rewards, tmp_path / "best", metric="up", best="max", **base)
    assert (result.method, result.coefficient) == (method, coefficient)
    assert [point.value for point in result.points] == values
    for point in result.points:
        expected = rewards({"vector": torch.from_numpy(combine(first, models, point.value)["vector"])})
        assert point.metrics == pytest.approx(expected, rel=1e-6)
    assert result.best is max(result.points, key=lambda point: point.metrics["up"])
    written = load_file(tmp_path / "best" / "model.safetensors")
    close(written, combine(first, models, result.best.value))
    assert rewards(written) == result.best.metrics
    record = json.loads((tmp_path / "best" / "soup.json").read_text())
    assert record["curve"] == {"best": "max", "metrics": result.best.metrics}
    with (tmp_path / "best.curve.csv").open() as file:
        rows = [[float(number) for number in row.values()] for row in csv.DictReader(file)]
    assert rows == [[point.value, *point.metrics.values()] for point in result.points]
    assert sum("*" in line for line in result.table().splitlines()) == 1


def test_the_ingredients_are_measured_once_for_a_curve(family, monkeypatch):
    init, paths, _, _ = family(2)
    calls, measure = [], engine.Gram.measure
    monkeypatch.setattr(engine.Gram, "measure", lambda self, names: calls.append(1) or measure(self, names))
    result = soups.curve("warp", paths, RANGE, rewards, init=init)
    assert (len(calls), result.metric, result.best, result.weights) == (1, None, None, None)


def test_python_arguments_that_make_no_sense(family):
    init, paths, _, _ = family(2)
    for says, method, values, own in (
        ("no coefficient", "uniform", [0], {}),
        ("needs init", "warp", [0], {}),
        ("init has no meaning", "rewarded", [0], {"init": init}),
        ("weights has no meaning", "wise-ft", [0], {"init": init, "weights": [1]}),
        ("give some values", "rewarded", [], {}),
        ("each once", "rewarded", [0.5, 0.5], {}),
    ):
        with pytest.raises(ValueError, match=says):
            soups.series(method, paths, values, **own)


@pytest.fixture
def here(family, tmp_path, monkeypatch):
    """The folder in which the command runs, with evaluations to import."""
    family(2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    name = f"rewards_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(
        "ran = []\n"
        "def both(weights):\n"
        "    ran.append(weights.path)\n"
        "    v = weights['vector'].double()\n"
        "    return {'up': float((v - 1).square().mean()), 'down': float((v + 1).square().mean())}\n"
        "def one(weights): return both(weights)['up']\n"
        "def turning(weights): return {'a' if len(ran) % 2 else 'b': both(weights)['up']}\n"
        "def broken(weights): return {'up': float('nan'), 'down': 1}\n"
    )
    return name


def test_the_command_prints_the_front_and_writes_nothing_unless_asked(here, tmp_path, capsys):
    before = sorted(os.listdir())
    command = ["ft0.safetensors", "ft1.safetensors", "--method", "rewarded", "--lambda", "0:1:0.25"]
    assert soup(*command, "--evaluate", f"{here}:both") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["lambda", "up", "down"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "0.25", "0.5", "0.75", "1"]
    assert sorted(os.listdir()) == before
    assert soup(*command, "--evaluate", f"{here}:both", "-o", "out") == 2
    assert "choose with --metric" in capsys.readouterr().err
    assert sorted(os.listdir()) == sorted([*before, "out.evaluations.json"])
    assert soup(*command, "--evaluate", f"{here}:both", "-o", "out", "--metric", "down", "--maximize") == 0
    lines = capsys.readouterr().out.splitlines()
    ran = len(sys.modules[here].ran)
    assert lines[-1].startswith("out: lambda ")
    assert sum(line.endswith("*") for line in lines) == 1
    assert {"out", "out.curve.csv"} <= set(os.listdir())
    assert soup(*command, "--evaluate", f"{here}:both", "-o", "out", "--metric", "down", "--force", "-q") == 0
    assert len(sys.modules[here].ran) == ran  # every result was known
    assert soup(*command, "--evaluate", f"{here}:both", "--dry-run", "-o", "out") == 0
    assert capsys.readouterr().out.splitlines() == [
        "lambda 0, 0.25, 0.5, 0.75, 1",
        "5 soups to evaluate; the best to out",
    ]


def texts(svg):
    """What is written in a picture: matplotlib leaves it beside the outlines of the letters."""
    return re.findall("<!-- (.*) -->", svg.read_text())


def test_the_front_is_drawn_with_its_values_ends_and_best(here, tmp_path):
    command = ["ft0.safetensors", "ft1.safetensors", "--method", "rewarded", "--lambda", "0:1:0.25"]
    assert soup(*command, "--evaluate", f"{here}:both", "--plot", "front.svg", "-q") == 0
    shown = texts(tmp_path / "front.svg")
    assert {"up", "down", "0", "0.25", "0.5", "0.75", "1", "rewarded, by lambda"} <= {*shown}
    assert {"straight between the ends"} <= {*shown}
    assert any(text.startswith("lambda 0: ") for text in shown)
    assert any(text.startswith("lambda 1: ") for text in shown)
    out = ["-o", tmp_path / "out", "--maximize", "--metric", "down"]
    assert soup(*command, "--evaluate", f"{here}:both", *out, "--plot") == 0
    assert (tmp_path / "out.curve.png").read_bytes().startswith(b"\x89PNG")
    assert soup(*command, "--evaluate", f"{here}:one", "--plot", "line.svg", "-q") == 0
    assert {"lambda", "one (lower is better)"} <= {*texts(tmp_path / "line.svg")}
    assert any(text.startswith("best, lambda ") for text in texts(tmp_path / "line.svg"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--evaluate", "HERE:one", "--plot"], "name a file: --plot front.png"),
        (["--evaluate", "HERE:one", "--plot", "front.txt"], "must end in .png"),
        (["--evaluate", "HERE:one", "--plot", "init.safetensors.png", "-o", "init.safetensors"], "exists already"),
        (["--plot", "front.png", "-o", "out"], "--plot has no meaning for --lambda without --evaluate"),
        (["--evaluate", "HERE:broken"], "returned nan for lambda 0 (up)"),
        (["--evaluate", "HERE:turning"], "but b before"),
        (["--evaluate", "HERE:both", "--metric", "sideways"], "no 'sideways'"),
        (["--evaluate", "HERE:both", "--at", "3"], "--at has no meaning"),
        (["--evaluate-command", "echo {checkpoint}"], "printed no number"),
        (["--evaluate", "HERE:one", "--evaluate-command", "echo {checkpoint}"], "one of them"),
    ],
)
def test_evaluations_that_make_no_sense(here, tmp_path, capsys, arguments, says):
    before = sorted(tmp_path.rglob("*"))
    command = ["ft0.safetensors", "ft1.safetensors", "--method", "rewarded", "--lambda", "0:1:0.5"]
    assert soup(*command, *(argument.replace("HERE", here) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
