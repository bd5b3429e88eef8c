"""Learned soups, by gradient and by search, against float64: the optimum of a convex problem, finite differences."""

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from averaging import cli, soups
from averaging.soups import engine
from averaging.soups.learned import Space, _prepared, _Slopes
from averaging.soups.soup import opened

needs_cma = pytest.mark.skipif(find_spec("cma") is None, reason="the extra search is not installed")
IN, OUT, ROWS = 100, 2, 40


class Two(nn.Module):
    """Linear in all its weights together: the loss is convex in the coefficients, by layer too."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(IN, OUT, dtype=dtype) for _ in range(2))

    def forward(self, x):
        x = x.to(self.blocks[0].weight.dtype)
        return self.blocks[0](x) + self.blocks[1](x.square())


def square(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(engine, "PIECE", 1024)


@pytest.fixture
def problem(tmp_path):
    """Ingredients around the truth, held-out batches, and the model."""

    def make(dtype=torch.float64, count=3, noise=0.6):
        g = torch.Generator().manual_seed(3)
        truth = {name: torch.randn(t.shape, generator=g, dtype=torch.float64) for name, t in Two().state_dict().items()}
        paths = []
        for i in range(count):
            paths.append(tmp_path / f"m{i}.safetensors")
            moved = {
                n: t + noise * (1 + i) * torch.randn(t.shape, generator=g, dtype=t.dtype) for n, t in truth.items()
            }
            save_file({n: t.to(dtype) for n, t in moved.items()}, paths[-1])
        net = Two()
        net.load_state_dict(truth)
        batches = []
        for _ in range(4):
            x = torch.randn(ROWS, IN, generator=g, dtype=torch.float64)
            batches.append((x, net(x).detach() + 0.1 * torch.randn(ROWS, OUT, generator=g, dtype=torch.float64)))
        return paths, batches

    return make


def outputs(path, batches, part=None):
    """What an ingredient, or only one block of it, answers to all batches; in float64."""
    weights = {n: t.double() for n, t in load_file(path).items()}
    if part is not None:
        weights = {n: t if n.startswith(part) else torch.zeros_like(t) for n, t in weights.items()}
    net = Two()
    net.load_state_dict(weights)
    with torch.no_grad():
        return torch.cat([net(x) for x, _ in batches]).flatten()


def least_squares(paths, batches, parts=(None,)):
    """The best free coefficients, those of the first part first, and their loss."""
    answers = torch.stack([outputs(path, batches, part) for part in parts for path in paths], dim=1)
    target = torch.cat([y for _, y in batches]).flatten()
    best = torch.linalg.lstsq(answers, target[:, None], driver="gelsd").solution[:, 0]
    return best.reshape(len(parts), -1).tolist(), (answers @ best - target).square().mean().item()


def loss_of(weights, batches):
    net = Two()
    net.load_state_dict({n: weights[n].double() for n in weights})
    return sum(square(net, batch).item() for batch in batches) / len(batches)


# ---------------------------------------------------------------------- by gradient


@pytest.mark.parametrize("per", ["model", "layer"])
def test_free_coefficients_are_those_of_least_squares(problem, tmp_path, per):
    paths, batches = problem()
    parts = (None,) if per == "model" else ("blocks.0", "blocks.1")
    expected, lowest = least_squares(paths, batches, parts)
    everything = [tuple(torch.cat(column) for column in zip(*batches, strict=True))]
    out = tmp_path / "o.safetensors"
    result = soups.learned(
        paths, out, model=Two(), loss=square, batches=everything, per=per, normalize=None, lr=0.03, epochs=400
    )
    assert result.best.metric == pytest.approx(lowest, rel=1e-3)
    for row, own in zip(result.coefficients.values(), expected, strict=True):
        assert row == pytest.approx(own, abs=0.02)
    assert list(result.coefficients) == (["all"] if per == "model" else ["blocks.0", "blocks.1"])
    # What is recorded makes what was written.
    record = json.loads((tmp_path / "o.soup.json").read_text())
    written, models = load_file(out), [load_file(path) for path in paths]
    for name, tensor in written.items():
        shares = (
            [part["coefficient"] for part in record["ingredients"]] if per == "model" else record["coefficients"][name]
        )
        assert shares == (result.coefficients["all"] if per == "model" else result.coefficients[name[:8]])
        mixed = sum(c * model[name] for c, model in zip(shares, models, strict=True))
        torch.testing.assert_close(tensor, mixed, rtol=1e-12, atol=1e-12)
    assert loss_of(written, everything) == pytest.approx(result.best.metric, rel=1e-12)
    assert (record["method"], record["metric"], record["per"]) == ("learned", result.best.metric, per)


@pytest.mark.parametrize("per", ["model", "layer"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_slopes_are_finite_differences(problem, per, dtype):
    paths, batches = problem(dtype)
    space, model = Space(opened(paths), None, per, "learned", {"dtype": "float64"}), Two()
    rows = [[0.5, 0.2, 0.4], [-0.3, 0.9, 0.1]][: len(space.groups)]
    with _prepared(model, space.soup.ingredients[-1]) as parameters:
        slopes = _Slopes(model, square, space, parameters)
        slopes.mix(rows)
        found = slopes.measure(batches[0], "the test")
    for group in range(len(rows)):
        for i in range(len(paths)):
            sides = []
            for move in (1e-5, -1e-5):
                moved = [list(row) for row in rows]
                moved[group][i] += move
                weights = space.make(moved).cook()
                sides.append(loss_of(weights, batches[:1]))
            assert found[group][i] == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("per", ["model", "layer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_softmax_coefficients_are_a_mean_and_never_worse_than_uniform_and_single(problem, per, dtype):
    paths, batches = problem(dtype)
    model, before = Two(torch.float32), torch.get_rng_state()
    result = soups.learned(paths, model=model, loss=square, batches=batches, per=per, lr=0.1)
    assert torch.equal(before, torch.get_rng_state())
    for row in result.coefficients.values():
        assert sum(row) == pytest.approx(1)
        assert min(row) >= 0
    names = ["the uniform soup", *map(str, paths), *(f"epoch {n}" for n in range(1, 6))]
    assert [one.name for one in result.tried] == names
    assert result.best.metric == min(one.metric for one in result.tried)
    alone = [loss_of(load_file(path), batches) for path in paths]
    assert result.best.metric < min(loss_of(soups.uniform(paths), batches), *alone)
    assert [one.metric for one in result.tried[1:4]] == pytest.approx(alone, rel=1e-4)
    assert all(tensor.dtype is dtype for tensor in result.weights.values())


def test_the_best_single_ingredient_is_kept_when_nothing_beats_it(problem, tmp_path):
    paths, batches = problem(noise=0.0)
    save_file({n: t + 5 for n, t in load_file(paths[1]).items()}, paths[1])
    save_file({n: t + 3 for n, t in load_file(paths[2]).items()}, paths[2])
    result = soups.learned(paths, model=Two(), loss=square, batches=batches, epochs=1)
    assert result.best.name == str(paths[0])
    assert result.coefficients == {"all": [1.0, 0.0, 0.0]}
    assert all(torch.equal(result.weights[n], t) for n, t in load_file(paths[0]).items())
    assert f"{paths[0]} *" in result.table()


def test_an_interrupted_run_goes_on_bit_for_bit_and_may_have_more_epochs(problem, tmp_path):
    paths, batches = problem()
    state = tmp_path / "state.json"
    seen = []

    def noisy(model, batch):
        if len(seen) == limit:
            raise KeyboardInterrupt
        seen.append(1)
        return square(model, batch) * (1 + 0.1 * torch.rand(()))

    settings = {"model": Two(), "loss": noisy, "batches": batches, "per": "layer", "lr": 0.1}
    limit = math.inf
    whole = soups.learned(paths, **settings, epochs=4)
    count = len(seen)
    for limit in (6, 25, 6):  # noqa: B007 (noisy reads it): in those of the single ingredients, and in epochs
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            soups.learned(paths, **settings, epochs=4, cache=state)
    limit = math.inf
    seen.clear()
    resumed = soups.learned(paths, **settings, epochs=4, cache=state)
    assert 0 < len(seen) < count - 16
    assert resumed.tried == whole.tried
    seen.clear()
    assert soups.learned(paths, **settings, epochs=4, cache=state).tried == whole.tried
    assert not seen
    longer = soups.learned(paths, **settings, epochs=6, cache=state)
    assert len(seen) == 2 * 2 * len(batches)
    assert longer.tried == soups.learned(paths, **settings, epochs=6).tried
    seen.clear()
    soups.learned(paths, **{**settings, "lr": 0.2}, epochs=4, cache=state)  # other settings start anew
    assert len(seen) == count


def test_threads_do_not_matter(problem):
    paths, batches = problem(torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(soups.learned(paths, model=Two(), loss=square, batches=batches, epochs=2).tried)
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_tied_weights_count_once_and_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    g = torch.Generator().manual_seed(0)
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        weight = torch.randn(3, 3, generator=g)
        save_file({"embed.weight": weight, "head.weight": weight.clone()}, path)
    x = torch.randn(5, 3, generator=g)
    model = Tied()
    space = Space(
        opened(paths), None, "layer", "learned", {}, {"embed.weight": "embed.weight", "head.weight": "embed.weight"}
    )
    assert list(space.groups) == ["embed"]
    result = soups.learned(
        paths, model=model, loss=lambda model, x: model(x).square().mean(), batches=[x], per="layer", epochs=2
    )
    assert torch.equal(result.weights["embed.weight"], result.weights["head.weight"])


def test_sparse_gradients_count(tmp_path):
    g, found = torch.Generator().manual_seed(1), []
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        save_file({"weight": torch.randn(5, 3, generator=g)}, path)
    for sparse in (False, True):
        model = nn.Embedding(5, 3, sparse=sparse)
        batches, loss = [torch.tensor([1, 1, 4])], lambda model, x: model(x).square().mean()
        found.append(soups.learned(paths, model=model, loss=loss, batches=batches).tried)
    assert found[0] == found[1]


def test_memory_is_a_few_models_however_many_there_are(tmp_path, monkeypatch):
    """The allocations of torch at any time, beside what was there before."""
    monkeypatch.setattr(engine, "PIECE", 4096)
    size = 600
    model = nn.Linear(size, size, bias=False)
    bytes_of_model = size * size * 4
    peaks = {}
    for count in (2, 12):
        paths = []
        for i in range(count):
            paths.append(tmp_path / f"{i}.safetensors")
            save_file({"weight": torch.full((size, size), float(i))}, paths[-1])
        settings = {"model": model, "loss": lambda m, x: m(x).square().mean(), "batches": [torch.ones(1, size)]}
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            soups.learned(paths, **settings, epochs=1)
        now = highest = 0
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            highest = max(highest, now)
        peaks[count] = highest / bytes_of_model
    assert peaks[12] < 4
    assert peaks[12] < peaks[2] + 0.5


def test_modes_flags_and_frozen_parameters_come_back(problem):
    paths, batches = problem()
    model = Two().train()
    model.blocks[1].eval()
    model.blocks[0].weight.requires_grad_(False)
    soups.learned(paths, model=model, loss=square, batches=batches, epochs=1)
    assert [model.training, model.blocks[0].training, model.blocks[1].training] == [True, True, False]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------- the command

TASK = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_learned import Two, square
batches = torch.load({batches!r})
def task(): return Two(), square, batches
def loss(weights):
    model = Two()
    model.load_state_dict(dict(weights))
    return sum(square(model, batch).item() for batch in batches) / len(batches)
"""


@pytest.fixture
def here(problem, tmp_path, monkeypatch):
    paths, batches = problem()
    torch.save(batches, tmp_path / "batches.pt")
    name = f"task_{abs(hash(str(tmp_path)))}"
    text = TASK.format(tests=str(Path(__file__).parent), batches=str(tmp_path / "batches.pt"))
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return name, paths, batches


@pytest.mark.parametrize("per", ["model", "layer"])
def test_the_command_learns_and_its_record_makes_the_same_soup(here, tmp_path, capsys, per):
    name, paths, batches = here
    out = tmp_path / "o.safetensors"
    command = [*map(str, paths), "--method", "learned", "--loss", f"{name}:task", "--per", per, "--lr", "0.1"]
    assert cli.main([*command, "--epochs", "3", "-o", str(out), "--plot"]) == 0
    printed = capsys.readouterr().out
    result = soups.learned(paths, model=Two(), loss=square, batches=batches, per=per, lr=0.1, epochs=3)
    assert f"learned soup of 3, best of 7, {result.best.metric:.6g}" in printed
    assert result.table() in printed
    assert all(torch.equal(load_file(out)[n], result.weights[n]) for n in result.weights)
    assert (tmp_path / "o.safetensors.learned.png").exists()
    again = tmp_path / "again.safetensors"
    assert cli.main(["--recipe", str(tmp_path / "o.soup.json"), "-o", str(again)]) == 0
    assert all(torch.equal(load_file(again)[n], result.weights[n]) for n in result.weights)
    assert cli.main([*command, "--normalize", "none", "--epochs", "1", "-o", str(out), "--force", "-q"]) == 0
    assert json.loads((tmp_path / "o.soup.json").read_text())["normalize"] is None


@needs_cma
def test_the_command_searches(here, tmp_path, capsys):
    name, paths, batches = here
    command = [*map(str, paths), "--method", "search", "--evaluate", f"{name}:loss", "--evaluations", "20"]
    assert cli.main([*command, "-o", str(tmp_path / "o.safetensors"), "--seed", "3"]) == 0
    result = soups.search(paths, evaluator(batches), evaluations=20, seed=3)
    assert f"search soup of 3, best of 20, {result.best.metric:.6g}" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "o.safetensors.evaluations.json").read_text())) == 20


# ---------------------------------------------------------------------- by search


def evaluator(batches):
    return lambda weights: loss_of(weights, batches)


@needs_cma
@pytest.mark.parametrize("per", ["model", "layer"])
def test_a_search_comes_as_near_as_the_gradient(problem, tmp_path, per):
    paths, batches = problem()
    gradient = soups.learned(paths, model=Two(), loss=square, batches=batches, per=per, lr=0.1, epochs=40)
    found = soups.search(paths, evaluator(batches), tmp_path / "o.safetensors", per=per, evaluations=70)
    assert found.best.metric == pytest.approx(gradient.best.metric, rel=0.05)
    assert found.best.metric == min(one.metric for one in found.tried)
    assert loss_of(load_file(tmp_path / "o.safetensors"), batches) == found.best.metric
    assert found.best.metric < found.tried[0].metric
    mirrored = soups.search(paths, lambda weights: -loss_of(weights, batches), per=per, evaluations=20, best="max")
    assert [one.metric for one in mirrored.tried] == [-one.metric for one in found.tried[:20]]
    record = json.loads((tmp_path / "o.soup.json").read_text())
    assert (record["method"], record["metric"]) == ("search", found.best.metric)


@needs_cma
def test_a_search_resumes_and_leaves_the_random_numbers_alone(problem, tmp_path):
    import numpy

    paths, batches = problem()
    seen = []

    def evaluate(weights):
        if len(seen) == limit:
            raise KeyboardInterrupt
        seen.append(1)
        return loss_of(weights, batches)

    cache, before = tmp_path / "cache.json", numpy.random.get_state()[1].tolist()
    limit = math.inf
    whole = soups.search(paths, evaluate, evaluations=30)
    assert len(whole.tried) == len(seen) == 30
    for limit in (2, 9):  # noqa: B007
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            soups.search(paths, evaluate, evaluations=30, cache=cache)
    limit = math.inf
    seen.clear()
    assert soups.search(paths, evaluate, evaluations=30, cache=cache).tried == whole.tried
    assert len(seen) == 30 - 11
    assert numpy.random.get_state()[1].tolist() == before
    assert soups.search(paths, evaluate, evaluations=30, seed=1).tried != whole.tried


@needs_cma
def test_the_budget_is_kept(problem):
    paths, batches = problem()
    for evaluations in (4, 5, 12):
        assert len(soups.search(paths, evaluator(batches), evaluations=evaluations).tried) == evaluations
