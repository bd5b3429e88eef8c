"""LM-Cocktail: shares from losses, with and without a target, against float64."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from averaging import cli, soups

SHAPES = {"matrix": (30, 7), "vector": (5,)}


def loss(weights):
    return float(weights["vector"].double().square().sum())


@pytest.fixture
def family(tmp_path):
    """Paths and float64 copies of four models."""
    paths, models = [], []
    for i in range(4):
        g = torch.Generator().manual_seed(i)
        model = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
        paths.append(tmp_path / f"m{i}.safetensors")
        save_file({**model, "n": torch.tensor(1)}, paths[-1])
        models.append({name: tensor.double().numpy() for name, tensor in model.items()})
    return paths, models


def shares(models, temperature, sign=1):
    powers = [math.exp(-sign * (model["vector"] ** 2).sum() / temperature) for model in models]
    return [power / sum(powers) for power in powers]


def close(mixed, models, expected):
    for name in SHAPES:
        wide = sum(share * model[name] for share, model in zip(expected, models, strict=True))
        np.testing.assert_allclose(mixed[name].double().numpy(), wide, rtol=1e-6, atol=1e-7)


def soup(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("temperature", [0.01, 1.0, 5.0])
def test_the_formula(family, tmp_path, temperature):
    paths, models = family
    result = soups.lm_cocktail(paths, loss, temperature=temperature)
    close(result.weights, models, shares(models, temperature))
    assert result.shares == pytest.approx(shares(models, temperature))
    assert result.metrics == pytest.approx([(model["vector"] ** 2).sum() for model in models])
    more = soups.lm_cocktail(paths, loss, temperature=temperature, best="max")
    close(more.weights, models, shares(models, temperature, sign=-1))


def test_a_target_has_the_share_alpha_and_is_not_evaluated(family, tmp_path):
    paths, models = family
    seen = []

    def evaluate(weights):
        seen.append(loss(weights))
        return seen[-1]

    for alpha in (0.0, 0.3, 1.0):
        result = soups.lm_cocktail(paths[:3], evaluate, target=paths[3], alpha=alpha)
        expected = [*((1 - alpha) * share for share in shares(models[:3], 5.0)), alpha]
        close(result.weights, models, expected)
    assert len(seen) == 9
    assert "target" in result.table()
    only = soups.lm_cocktail(paths[:1], evaluate, target=paths[3])
    close(only.weights, [models[0], models[3]], [0.5, 0.5])


def test_losses_far_apart_do_not_overflow(family):
    paths, _ = family
    assert soups.lm_cocktail(paths[:2], lambda weights: 1e300 * loss(weights)).shares in ([0.0, 1.0], [1.0, 0.0])


def test_the_command_caches_and_its_record_cooks_the_same(family, tmp_path, monkeypatch, capsys):
    paths, models = family
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", __import__("sys").path.copy())
    (tmp_path / "cocktail_measure.py").write_text(
        "def both(weights):\n"
        "    with open('log', 'a') as log: print('x', file=log)\n"
        "    loss = float(weights['vector'].double().square().sum())\n"
        "    return {'loss': loss, 'other': 0.0}\n"
    )
    command = [*paths[:3], "--method", "lm-cocktail", "--evaluate", "cocktail_measure:both", "--metric", "loss"]
    command += ["--temperature", 2, "-o", "out.safetensors"]
    assert soup(*command, "--dry-run") == 0
    assert "3 checkpoints to evaluate" in capsys.readouterr().out
    assert soup(*command) == 0
    assert "lm-cocktail soup of 3" in capsys.readouterr().out
    close(load_file("out.safetensors"), models[:3], shares(models[:3], 2.0))
    assert soup(*command, "--force", "--target", paths[3], "--alpha", 0.25) == 0
    expected = [*(0.75 * share for share in shares(models[:3], 2.0)), 0.25]
    close(load_file("out.safetensors"), models, expected)
    assert (tmp_path / "log").read_text() == "x\n" * 3  # the second time everything was known
    record = json.loads((tmp_path / "out.soup.json").read_text())
    assert (record["method"], record["temperature"], record["alpha"]) == ("lm-cocktail", 2.0, 0.25)
    assert soup("--recipe", "out.soup.json", "-o", "again.safetensors") == 0
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "needs --evaluate"),
        (["--temperature", "0"], "temperature=0.0: must be a positive number"),
        (["--temperature", "nan"], "temperature=nan"),
        (["--alpha", "0.5"], "--alpha is the share of a --target"),
        (["--target", "m3.safetensors", "--alpha", "2"], "alpha=2.0"),
        (["--target", "m3.safetensors", "--alpha", "0,1"], "not a range"),
        (["--target", "m1.safetensors"], "both the target and one of the models"),
        (["--target", "missing.safetensors"], "no such file"),
        (["--last", "1"], "at least two models"),
        (["--weights", "1,2"], "--weights has no meaning for --method lm-cocktail"),
        (["--plot"], "--plot has no meaning for --method lm-cocktail"),
        (["--at", "3"], "--at has no meaning"),
    ],
)
def test_arguments_that_make_no_sense(family, tmp_path, monkeypatch, capsys, arguments, says):
    paths, _ = family
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    evaluate = ["--evaluate-command", "echo 1 {checkpoint}"] if arguments else []
    assert soup(*paths[:2], "--method", "lm-cocktail", *evaluate, *arguments, "-o", "o.safetensors") == 2
    assert says in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_an_evaluation_that_fails_names_the_model(family, tmp_path):
    paths, _ = family
    for bad, says in ((lambda weights: math.nan, "returned nan"), (lambda weights: weights["b"], "raised KeyError")):
        with pytest.raises(ValueError, match=f"{says} for {paths[0]}"):
            soups.lm_cocktail(paths, bad, tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()
