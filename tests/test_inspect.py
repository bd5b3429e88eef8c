"""`soup inspect` against float64."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from averaging import cli
from averaging.soups import engine, inspect

GROUPS = {"layers.0": ["layers.0.a", "layers.0.b"], "layers.10": ["layers.10.a"], "head": ["head.weight"]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_init", [True, False])
def test_figures(tmp_path, monkeypatch, dtype, with_init):
    monkeypatch.setattr(engine, "PIECE", 1024)
    g = torch.Generator().manual_seed(2)
    names = [name for group in GROUPS.values() for name in group]
    init = {name: torch.randn(700, generator=g).to(dtype) for name in names}
    models = [{n: (init[n] + 0.1 * torch.randn(700, generator=g)).to(dtype) for n in names} for _ in range(3)]
    for name, model in zip(("init", "x1", "x2", "x3"), [init, *models], strict=True):
        save_file(model | {"ids": torch.arange(3)}, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"x{i}.safetensors" for i in (1, 2, 3)]
    found = inspect(paths, tmp_path / "init.safetensors" if with_init else None)
    assert found.groups.keys() == {"all", *GROUPS}
    for group, figures in found.groups.items():
        own = GROUPS.get(group, names)
        base, *thetas = (np.concatenate([model[n].double().numpy() for n in own]) for model in (init, *models))
        norm = np.linalg.norm
        np.testing.assert_allclose(figures.norms, [norm(theta) for theta in thetas], rtol=1e-12)
        np.testing.assert_allclose(figures.distances, [norm(t - sum(thetas) / 3) for t in thetas], rtol=1e-9)
        tasks = [theta - base for theta in thetas] if with_init else []
        np.testing.assert_allclose(figures.tasks, [norm(task) for task in tasks], rtol=1e-12)
        cosines = [[(a * b).sum() / norm(a) / norm(b) for b in tasks] for a in tasks]
        np.testing.assert_allclose(figures.cosines, cosines, rtol=1e-9, atol=1e-12)
    assert found.identical == []


def test_the_command_tells_of_twins(tmp_path, capsys):
    one, two = {"a": torch.ones(3)}, {"a": torch.tensor([1.0, 2.0, 3.0])}
    for name, model in (("init", one), ("x", one), ("y", two)):
        save_file(model, tmp_path / f"{name}.safetensors")
    x, y, init = (str(tmp_path / f"{name}.safetensors") for name in ("x", "y", "init"))
    assert cli.main(["inspect", x, y, "--init", init]) == 0
    printed = capsys.readouterr().out
    assert f"byte-identical: {init}, {x}" in printed
    assert "task vector 0," in printed
    found = inspect([x, y], init)
    assert math.isnan(found.groups["all"].cosines[0][1])
    assert found.groups["all"].cosines[1][1] == pytest.approx(1)


def test_bad_input(tmp_path, capsys):
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(4)}, tmp_path / "y.safetensors")
    save_file({"a": torch.tensor([1.0, math.nan, 1.0])}, tmp_path / "z.safetensors")
    x, y, z = (str(tmp_path / f"{name}.safetensors") for name in "xyz")
    for words, says in (
        ([x, y], "shape"),
        ([x, z], "holds nan at element 1"),
        ([x, "--init", x], "both the initial model and"),
        ([x, "--only", "q"], "leave none"),
    ):
        assert cli.main(["inspect", *words]) == 2
        assert says in capsys.readouterr().err
