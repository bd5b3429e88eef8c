"""Greedy and ranked soups, and how soups are evaluated: functions, commands, several metrics, the cache."""

import itertools
import json
import shlex
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from averaging import cli, soups

TARGET = torch.tensor([0.3, -0.7, 0.1, 0.5])


def loss(weights):
    return float((weights["a"].double() - TARGET).square().sum())


@pytest.fixture
def paths(tmp_path):
    g = torch.Generator().manual_seed(5)
    found = []
    for i in range(5):
        found.append(tmp_path / f"m{i}.safetensors")
        save_file({"a": TARGET + torch.randn(4, generator=g), "n": torch.tensor(3)}, found[-1])
    return found


def reference(paths, sign=1):
    """The paths of a greedy soup, best first, and its metric: the paper's algorithm in a few lines."""

    def score(chosen):
        mean = sum(load_file(path)["a"].double() for path in chosen) / len(chosen)
        return sign * loss({"a": mean.float()})

    order = sorted(paths, key=lambda path: score([path]))
    chosen = order[:1]
    for path in order[1:]:
        if score([*chosen, path]) <= score(chosen):
            chosen = [*chosen, path]
    return chosen, sign * score(chosen)


def test_greedy_is_the_papers_algorithm_and_never_worse_than_its_best(paths, tmp_path):
    for best, sign in (("min", 1), ("max", -1)):
        out = tmp_path / f"{best}.safetensors"
        evaluate = loss if best == "min" else lambda weights: -loss(weights)
        result = soups.greedy(paths, evaluate, out, best=best)
        chosen, metric = reference(paths)
        assert [one.checkpoint.path for one in result.tried if one.kept] == chosen
        assert sign * result.metric == pytest.approx(metric, rel=1e-6)
        assert metric <= min(loss(load_file(path)) for path in paths)
        assert 1 < len(chosen) < len(paths)
        mean = sum(load_file(path)["a"].double() for path in chosen) / len(chosen)
        assert torch.equal(load_file(out)["a"], mean.float())
        record = json.loads((tmp_path / f"{best}.soup.json").read_text())
        assert (record["method"], record["metric"]) == ("greedy", result.metric)
        assert [i["path"] for i in record["ingredients"]] == [str(path) for path in chosen]
        assert [one["kept"] for one in record["tried"]] == [one.kept for one in result.tried]


def test_what_makes_no_difference_is_kept(tmp_path):
    for name in "abc":
        save_file({"a": torch.ones(4)}, tmp_path / f"{name}.safetensors")
    result = soups.greedy(tmp_path, loss)
    assert [one.kept for one in result.tried] == [True] * 3
    assert torch.equal(result.weights["a"], torch.ones(4))


def test_ranked_is_the_mean_of_the_best(paths):
    order = sorted(paths, key=lambda path: loss(load_file(path)))
    for top in (1, 3, 5):
        result = soups.ranked(paths, loss, top=top)
        mean = sum(load_file(path)["a"].double() for path in order[:top]) / top
        assert torch.equal(result.weights["a"], mean.float())
        assert result.metric == loss(result.weights)
    for top in (0, 6):
        with pytest.raises(ValueError, match=f"top={top}: must be between 1 and"):
            soups.ranked(paths, loss, top=top)


def test_an_interrupted_search_evaluates_nothing_twice(paths, tmp_path):
    seen = []

    def evaluate(weights):
        if len(seen) == limit:
            raise KeyboardInterrupt
        seen.append(weights["a"].tolist())
        return loss(weights)

    out, cache = tmp_path / "out.safetensors", tmp_path / "cache.json"
    for limit in (2, 6):  # noqa: B007 (evaluate reads it)
        with pytest.raises(KeyboardInterrupt):
            soups.greedy(paths, evaluate, out, cache=cache)
        assert not out.exists()
    limit = 100
    first = soups.greedy(paths, evaluate, out, cache=cache)
    assert len(seen) == 9  # five alone, four soups
    assert len({tuple(values) for values in seen}) == 9
    again = soups.greedy(paths, evaluate, out, cache=cache, force=True)
    assert len(seen) == 9
    assert [one.soup for one in again.tried] == [one.soup for one in first.tried]
    save_file({"a": torch.zeros(4), "n": torch.tensor(3)}, paths[0])  # other content under the same name
    soups.greedy(paths, evaluate, out, cache=cache, force=True)
    assert len(seen) > 9


def test_one_of_several_metrics(paths):
    def several(weights):
        return {"loss": loss(weights), "accuracy": -loss(weights)}

    chosen, metric = reference(paths)
    for name, best in (("loss", "min"), ("accuracy", "max")):
        result = soups.greedy(paths, several, metric=name, best=best)
        assert abs(result.metric) == pytest.approx(metric, rel=1e-6)
        assert [one.checkpoint.path for one in result.tried if one.kept] == chosen
    with pytest.raises(ValueError, match=r"returned loss, accuracy for .*m0.safetensors: choose one"):
        soups.greedy(paths, several)
    with pytest.raises(ValueError, match=r"no 'f1' for .*m0.safetensors, only loss, accuracy"):
        soups.greedy(paths, several, metric="f1")


def test_a_failing_evaluation_names_the_candidate(paths, tmp_path):
    numbers = itertools.count()

    def poor(weights):
        return float("nan") if next(numbers) == 5 else loss(weights)

    order = sorted(paths, key=lambda path: loss(load_file(path)))
    with pytest.raises(ValueError, match=f"returned nan for {order[0]} \\+ {order[1]}"):
        soups.greedy(paths, poor, tmp_path / "o.safetensors", cache=tmp_path / "cache.json")
    assert not (tmp_path / "o.safetensors").exists()
    assert len(json.loads((tmp_path / "cache.json").read_text())) == 5
    with pytest.raises(ValueError, match=f"raised KeyError for {paths[0]}: 'b'"):
        soups.greedy(paths, lambda weights: weights["b"])


# ---------------------------------------------------------------------- the command

SCRIPT = """
import json, sys
from safetensors.torch import load_file
with open("log", "a") as log: print(sys.argv[1], file=log)
loss = float((load_file(sys.argv[1])["a"].double() - {target}).square().sum())
print("evaluating\\n" + json.dumps({{"loss": loss, "minus": -loss}}))
"""


def soup(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_a_command_evaluates(paths, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a script.py").write_text(SCRIPT.format(target=f"__import__('torch').tensor({TARGET.tolist()})"))
    command = f"{shlex.quote(sys.executable)} 'a script.py' {{checkpoint}}"
    out = ["-o", "best.safetensors"]
    search = [*paths[:3], "--method", "greedy", "--evaluate-command", command, *out]
    assert soup(*search, "--metric", "minus", "--maximize") == 0
    chosen, metric = reference(paths[:3])
    printed = capsys.readouterr().out
    assert f"greedy soup of {len(chosen)} out of 3, {-metric:.6g}" in printed
    assert all(str(path) in printed for path in paths[:3])
    assert len((tmp_path / "log").read_text().splitlines()) == 5
    # the other metric, and DiWA's choice, from what is known of the same contents
    assert soup(*search, "--metric", "loss", "--force", "-q") == 0
    assert len((tmp_path / "log").read_text().splitlines()) == 5
    assert soup(*paths[:3], "--method", "ranked", "--top", 1, "--evaluate-command", command, *out, "--force",
                "--metric", "loss") == 0  # fmt: skip
    assert torch.equal(load_file("best.safetensors")["a"], load_file(chosen[0])["a"])
    assert "ranked soup of 1 out of 3" in capsys.readouterr().out
    assert len((tmp_path / "log").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("echo 1", "must hold {checkpoint}"),
        ("no-such-command {checkpoint}", "raised FileNotFoundError for"),
        (f"{sys.executable} -c 'import sys; sys.exit(\"no data\")' {{checkpoint}}", "exit status 1: no data"),
        (f"{sys.executable} -c 'print(\"fine\")' {{checkpoint}}", "printed no number but 'fine'"),
        ("true {checkpoint}", "printed no number but 'nothing'"),
        ("echo NaN {checkpoint}", "printed no number"),
        (f"{sys.executable} -c 'print(float(\"nan\"))' {{checkpoint}}", "printed no number"),
        (f"{sys.executable} -c 'print([1])' {{checkpoint}}", "must return a number, not [1]"),
    ],
)
def test_commands_that_fail(paths, tmp_path, capsys, command, says):
    before = sorted(tmp_path.iterdir())
    assert soup(*paths, "--method", "greedy", "--evaluate-command", command, "-o", tmp_path / "o.safetensors") == 2
    error = capsys.readouterr().err
    assert says in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "greedy"], "needs --evaluate"),
        (["--method", "greedy", "--evaluate", "a:b", "--evaluate-command", "x {checkpoint}"], "one of them"),
        (["--method", "ranked", "--evaluate-command", "x {checkpoint}"], "needs --top"),
        (
            ["--method", "greedy", "--evaluate-command", "x {checkpoint}", "--weights", "1,2"],
            "--weights has no meaning",
        ),
        (["--maximize"], "no meaning"),
    ],
)
def test_arguments_that_make_no_sense(paths, tmp_path, capsys, arguments, says):
    assert soup(*paths, *arguments, "-o", tmp_path / "o.safetensors") == 2
    assert says in capsys.readouterr().err


def test_a_dry_run_evaluates_nothing(paths, tmp_path, capsys):
    command = ["--method", "greedy", "--evaluate-command", "false {checkpoint}", "-o", tmp_path / "o.safetensors"]
    assert soup(*paths, *command, "--dry-run") == 0
    assert "5 checkpoints to evaluate" in capsys.readouterr().out
