"""Pictures: what they show, and what is found out before any work starts."""

import sys

import pytest
import torch
from safetensors.torch import save_file

from averaging import cli, soups
from averaging.soups import plots


@pytest.fixture
def paths(tmp_path):
    g = torch.Generator().manual_seed(5)
    found = [tmp_path / f"step-{10 * i}.safetensors" for i in range(1, 6)]
    for path in found:
        save_file({"a": torch.randn(4, generator=g)}, path)
    return found


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn, besides being written."""
    drawn, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    return drawn


def loss(weights):
    return float(weights["a"].double().square().sum())


def points(axes, label):
    (line,) = [line for line in axes.lines if line.get_label().startswith(label)]
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_the_greedy_path(paths, tmp_path, figures):
    result = soups.greedy(paths, loss, tmp_path / "o.safetensors", plot=tmp_path / "path.png")
    assert is_png(tmp_path / "path.png")
    (axes,) = figures[0].axes
    tried = list(enumerate(result.tried, start=1))
    assert points(axes, "kept") == [(n, one.soup) for n, one in tried if one.kept]
    assert points(axes, "tried and") == [(n, one.soup) for n, one in tried if not one.kept]
    assert points(axes, "each alone") == [(n, one.metric) for n, one in tried]
    assert points(axes, "greedy soup")[-1] == (5, result.metric)
    assert points(axes, "uniform")[0][1] == loss(soups.uniform(paths))
    assert points(axes, "best single")[0][1] == min(one.metric for one in result.tried)
    assert axes.get_ylabel() == "loss (lower is better)"


def test_the_heat_map_of_a_sweep(paths, tmp_path, figures):
    result = soups.sweep(paths, loss, window=(1, 3), plot=tmp_path / "map.svg")
    assert (tmp_path / "map.svg").read_text().startswith("<?xml")
    axes, _ = figures[0].axes
    shown = axes.images[0].get_array()
    assert shown.shape == (2, 5)
    assert shown[0].tolist() == [cell.metric for cell in result.cells[:5]]
    assert shown.mask[1].tolist() == [True, True, False, False, False]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["window 1", "window 3"]


@pytest.mark.parametrize("per", ["model", "layer"])
def test_coefficients(tmp_path, figures, per):
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path in paths:
        layer = {"layers.0.weight": torch.randn(2, 3), "layers.0.bias": torch.zeros(2)}
        save_file({**layer, "layers.1.weight": torch.randn(2, 2), "layers.1.bias": torch.zeros(2)}, path)
    model = torch.nn.Module()
    model.layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    result = soups.learned(
        paths,
        model=model,
        loss=lambda model, x: model.layers(x).square().mean(),
        batches=[torch.randn(9, 3)],
        per=per,
        plot=tmp_path / "c.png",
    )
    assert is_png(tmp_path / "c.png")
    axes = figures[0].axes[0]
    if per == "model":
        assert [bar.get_width() for bar in axes.patches] == result.coefficients["all"]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == [path.name for path in paths]
    else:
        assert axes.images[0].get_array().tolist() == [result.coefficients[f"layers.{i}"] for i in (0, 1)]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["layers.0", "layers.1"]
        assert [tick.get_text() for tick in axes.get_xticklabels()] == [path.name for path in paths]


SEARCHES = [["--method", "greedy"], ["--sweep", "window=1,2"]]


@pytest.mark.parametrize("search", SEARCHES, ids=" ".join)
def test_the_command_draws_beside_the_output(paths, tmp_path, monkeypatch, search):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "drawn.py").write_text("def loss(weights): return float(weights['a'].sum())")
    out = ["-o", str(tmp_path / "o.safetensors"), "-q"]
    command = [*map(str, paths), *search, "--evaluate", "drawn:loss", *out]
    assert cli.main([*command, "--plot"]) == 0
    assert is_png(tmp_path / f"o.safetensors.{search[1].partition('=')[0].replace('window', 'sweep')}.png")
    assert cli.main([*command, "--plot", str(tmp_path / "o.pdf"), "--force"]) == 0
    assert (tmp_path / "o.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("search", SEARCHES, ids=" ".join)
@pytest.mark.parametrize(
    ("plot", "says"),
    [
        ("x.txt", "x.txt is no name for a picture"),
        ("there.png", "there.png exists already; pass --force"),
        ("o/x.png", "lies in the output"),
        ("x.png", "pip install 'averaging[plot]'"),
    ],
)
def test_bad_pictures_cost_no_evaluation(paths, tmp_path, monkeypatch, capsys, search, plot, says):
    (tmp_path / "there.png").touch()
    if "install" in says:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    before = sorted(tmp_path.iterdir())
    command = [*map(str, paths), *search, "--evaluate-command", "false {checkpoint}", "-o", str(tmp_path / "o")]
    assert cli.main([*command, "--plot", str(tmp_path / plot)]) == 2
    assert says in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("method", [["ranked", "--top", "1"], ["uniform"]])
def test_where_nothing_is_explored_there_is_no_picture(paths, tmp_path, capsys, method):
    evaluate = ["--evaluate-command", "false {checkpoint}"] if method[0] == "ranked" else []
    out = ["-o", str(tmp_path / "o.safetensors")]
    assert cli.main([*map(str, paths), "--method", *method, *evaluate, *out, "--plot"]) == 2
    assert "--plot has no meaning" in capsys.readouterr().err
