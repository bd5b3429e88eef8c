"""Linear mode connectivity against its formula, and what `soup inspect` says of it."""

import itertools
import json
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from averaging import cli, soups
from averaging.soups import plots

ALPHAS = [i / 10 for i in range(11)]


def two_valleys(weights):
    """Low at -1 and 1 of the first coordinate, with a hill of height one between."""
    x, y = weights["a"].double().tolist()
    return 1 + (1 - x * x) ** 2 + 0.1 * y * y


@pytest.fixture
def paths(tmp_path):
    """Two in one valley, one in the other."""
    found = []
    for name, place in (("p", [1.0, 0.3]), ("q", [1.1, -0.2]), ("r", [-1.0, 0.1])):
        found.append(tmp_path / f"{name}.safetensors")
        save_file({"a": torch.tensor(place, dtype=torch.float64)}, found[-1])
    return found


def expected(paths, one, other, evaluate=two_valleys):
    """The metrics along a line, and the barrier, in float64; an end may be the mean of all."""
    places = [load_file(path)["a"] for path in paths]
    ends = {**{str(i + 1): place for i, place in enumerate(places)}, "soup": sum(places) / len(places)}
    values = [evaluate({"a": (1 - a) * ends[one] + a * ends[other]}) for a in ALPHAS]
    return values, max(v - ((1 - a) * values[0] + a * values[-1]) for a, v in zip(ALPHAS, values, strict=True))


def test_lines_and_barriers(paths):
    calls = []
    result = soups.connectivity(paths, two_valleys, progress=lambda *call: calls.append(call))
    pairs = [("1", "2"), ("1", "3"), ("2", "3"), ("1", "soup"), ("2", "soup"), ("3", "soup")]
    assert [line.ends for line in result.lines] == pairs
    for line in result.lines:
        values, barrier = expected(paths, *line.ends)
        assert line.metrics == pytest.approx(values, rel=1e-12)
        assert line.barrier == pytest.approx(barrier, abs=1e-12)
        assert line.alphas == ALPHAS
    verdicts = {line.ends: line.connected for line in result.lines}
    assert verdicts[pairs[0]]
    assert not verdicts[pairs[1]]
    assert not verdicts[pairs[2]]
    assert result.lines[1].at == pytest.approx(0.5)
    assert len(calls) == 4 + 6 * 9
    assert [done for done, _, _ in calls] == list(range(len(calls)))
    assert {total for _, total, _ in calls} == {len(calls)}
    assert str(result).count("NOT mode-connected") == sum(not connected for connected in verdicts.values())


def test_of_two_there_is_one_line_and_the_highest_may_be_best(paths):
    for pair in (paths[:2], paths[1:]):
        lower = soups.connectivity(pair, two_valleys)
        higher = soups.connectivity(pair, lambda weights: -two_valleys(weights), best="max")
        assert [line.ends for line in lower.lines] == [("1", "2")]
        assert higher.lines[0].barrier == pytest.approx(lower.lines[0].barrier)
        assert higher.lines[0].connected is lower.lines[0].connected


@pytest.mark.parametrize(
    ("ends", "middle", "connected"),
    [
        ((1.0, 1.0), 1.019, True),  # what noise may be: 2 % of the ends
        ((1.0, 1.0), 1.021, False),
        ((1.0, 2.0), 2.49, True),  # lower than the difference between the ends
        ((1.0, 2.0), 2.51, False),
        ((1.0, 1.0), 0.5, True),  # a valley
    ],
)
def test_what_counts_as_connected(tmp_path, ends, middle, connected):
    for name, value in zip("ab", (0.0, 2.0), strict=True):
        save_file({"a": torch.tensor([value])}, tmp_path / f"{name}.safetensors")
    table = {0.0: ends[0], 1.0: middle, 2.0: ends[1]}
    (line,) = soups.connectivity(tmp_path, lambda weights: table[weights["a"].item()], points=3).lines
    assert line.connected is connected
    assert line.barrier == pytest.approx(max(0, middle - sum(ends) / 2))


def test_a_network_and_its_permuted_twin_compute_the_same_and_are_not_connected(tmp_path):
    """Entezari et al. 2022: permuting hidden units changes nothing, but the line to the result has a barrier."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(64, 4)
    with torch.no_grad():
        net[0].weight.mul_(3)
        y = net(x)
    order = torch.randperm(16)
    state = net.state_dict()
    moved = {"0.weight": state["0.weight"][order], "0.bias": state["0.bias"][order]}
    moved |= {"2.weight": state["2.weight"][:, order].contiguous(), "2.bias": state["2.bias"]}
    for name, weights in (("net", state), ("permuted", moved)):
        save_file(weights, tmp_path / f"{name}.safetensors")

    def loss(weights):
        net.load_state_dict(dict(weights))
        with torch.no_grad():
            return (net(x) - y).square().mean().item()

    (line,) = soups.connectivity(tmp_path, loss).lines
    assert max(line.metrics[0], line.metrics[-1]) < 1e-10
    assert line.barrier > 0.01
    assert not line.connected


def test_only_some_tensors_and_the_rest_from_the_last(tmp_path):
    for name, head, size in (("a", 1.0, 2), ("b", 5.0, 3)):
        save_file({"body": torch.full((2,), head), "head": torch.full((size,), head)}, tmp_path / f"{name}.safetensors")
    seen = []

    def evaluate(weights):
        seen.append((weights["body"].tolist(), weights["head"].tolist()))
        return 1.0

    soups.connectivity(tmp_path, evaluate, points=3, skip="head")
    assert seen == [([value] * 2, [5.0] * 3) for value in (1.0, 5.0, 3.0)]


def test_results_are_kept(paths, tmp_path):
    seen = []

    def evaluate(weights):
        seen.append(1)
        if len(seen) == 20:
            raise KeyboardInterrupt
        return two_valleys(weights)

    with pytest.raises(KeyboardInterrupt):
        soups.connectivity(paths, evaluate, cache=tmp_path / "cache.json")
    result = soups.connectivity(paths, evaluate, cache=tmp_path / "cache.json")
    assert len(seen) == 4 + 6 * 9 + 1
    assert [line.barrier for line in result.lines] == [
        line.barrier for line in soups.connectivity(paths, two_valleys).lines
    ]


def test_the_picture(paths, tmp_path, monkeypatch):
    drawn, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    result = soups.connectivity(paths, two_valleys, plot=tmp_path / "lines.png")
    assert (tmp_path / "lines.png").read_bytes().startswith(b"\x89PNG")
    left, right = drawn[0].axes
    shown = {line.get_label(): line.get_ydata() for axes in (left, right) for line in axes.lines}
    for line in result.lines:
        label = f"{line.ends[0]} to {line.ends[1]}: barrier {line.barrier:.3g}"
        np.testing.assert_array_equal(shown[label + ("" if line.connected else ", not connected")], line.metrics)
    worst = max(line.barrier for line in result.lines)
    assert f"{worst:.3g}" in [text.get_text() for text in left.texts]


# ---------------------------------------------------------------------- the command


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    name = f"valleys_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(
        "def loss(weights):\n    x, y = weights['a'].double().tolist()\n"
        "    return {'loss': 1 + (1 - x * x) ** 2 + 0.1 * y * y, 'x': x}\n"
        "def nan(weights): return float('nan') if 0.5 < weights['a'][0] < 0.9 else 1.0\n"
    )
    return name


def test_inspect_says_what_is_not_connected(paths, here, capsys, tmp_path):
    command = ["inspect", *map(str, paths), "--evaluate", f"{here}:loss", "--metric", "loss", "--points", "5"]
    assert cli.main([*command, "--plot", "--cache", "kept.json"]) == 0
    printed = capsys.readouterr().out
    result = soups.connectivity(paths, two_valleys, points=5)
    lines = [line.split() for line in printed.splitlines() if " to " in line and "mean" not in line]
    for words, line in zip(lines, result.lines, strict=True):
        assert (words[0], words[2]) == line.ends
        assert words[6] == f"{line.barrier:.5g}"
        assert (" ".join(words[7:]) == "connected") is line.connected
    assert (tmp_path / "inspect.png").exists()
    assert len(json.loads((tmp_path / "kept.json").read_text())) == 4 + 6 * 3
    assert cli.main([*command, "--plot"]) == 2
    assert "inspect.png exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--plot", "--plot has no meaning for soup inspect without --evaluate"),
        ("--points 5", "--points has no meaning"),
        ("--evaluate HERE:loss", "returned loss, x for PATHS0: choose one"),
        ("--evaluate HERE:loss --metric loss --points 2", "points=2: must be at least 3"),
        ("--evaluate HERE:loss --metric loss --plot x.txt", "no name for a picture"),
        ("--evaluate HERE:nan", "returned nan for the line from PATHS0 to PATHS2 at 0.1"),
        ("--evaluate HERE:gone", "no attribute 'gone'"),
        ("--evaluate HERE:loss --evaluate-command 'x {checkpoint}'", "one of them"),
    ],
)
def test_bad_input(paths, here, capsys, tmp_path, arguments, says):
    before = sorted(tmp_path.iterdir())
    words = shlex.split(arguments.replace("HERE", here))
    assert cli.main(["inspect", *map(str, paths), *words]) == 2
    printed = capsys.readouterr()
    assert re.sub(r"PATHS(\d)", lambda found: str(paths[int(found[1])]), says) in printed.err
    assert printed.out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_inspect_has_a_bar_and_reads_only_likely_twins_again(paths, capsys, monkeypatch):
    from averaging.soups import inspection

    seen = []
    real = inspection.fingerprint
    monkeypatch.setattr(inspection, "fingerprint", lambda checkpoint: seen.append(checkpoint.path) or real(checkpoint))
    assert cli.main(["inspect", *map(str, paths)]) == 0
    assert capsys.readouterr().err == ""
    assert seen == []
    save_file(load_file(paths[0]), twin := paths[0].with_name("twin.safetensors"))
    for init, other in itertools.product([[], ["--init", str(paths[2])]], [paths[1]]):
        seen.clear()
        assert cli.main(["inspect", str(paths[0]), str(other), str(twin), *init]) == 0
        assert seen == [paths[0], twin]
        assert f"byte-identical: {paths[0]}, {twin}" in capsys.readouterr().out
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["inspect", *map(str, paths)]) == 0
    assert "100%" in capsys.readouterr().err
