"""WiSE-FT, task arithmetic, SLERP with LITI, Model Stock and EMA over checkpoints, against float64."""

import itertools
import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from averaging import EMA, cli, soups
from averaging.soups import engine

SHAPES = {"matrix": (70, 33), "vector": (1025,), "scalar": (), "empty": (0, 3)}
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(engine, "PIECE", 1024)


def write(path, tensors):
    save_file(tensors, path)
    return path


def random(seed, dtype=torch.float32, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return {n: (torch.randn(s, generator=g, dtype=torch.float64) * scale).to(dtype) for n, s in SHAPES.items()}


@pytest.fixture
def family(tmp_path):
    """An initial model and some fine-tuned from it, as files and in memory."""

    def make(count, dtype=torch.float32):
        init = random(0, dtype)
        shared = random(99, torch.float64, 0.1)
        models = []
        for i in range(count):
            own = random(i + 1, torch.float64, 0.05)
            models.append({n: (init[n].double() + shared[n] + own[n]).to(dtype) for n in init})
        paths = [write(tmp_path / f"ft{i}.safetensors", model) for i, model in enumerate(models)]
        return write(tmp_path / "init.safetensors", init), paths, init, models

    return make


def soup(*arguments):
    return cli.main([str(argument) for argument in arguments])


def wide(tensor):
    return tensor.double().numpy()


def close(mixed, expected):
    """Equal to within the rounding to the dtype, and that of float64."""
    assert mixed.keys() == expected.keys()
    for name, tensor in mixed.items():
        ulp = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-44}[tensor.dtype]
        np.testing.assert_allclose(wide(tensor), expected[name], rtol=ulp * 1.0001, atol=1e-12)


def reference(init, models, combine):
    """θ_init + combine(task vectors), in float64."""
    return {n: wide(init[n]) + combine([wide(m[n]) - wide(init[n]) for m in models]) for n in init}


def two(a, b, share):
    one, other = np.linalg.norm(a), np.linalg.norm(b)
    if not one or not other:
        return (1 - share) * a + share * b
    angle = np.arccos(np.clip((a * b).sum() / one / other, -1, 1))
    if np.sin(angle) < 1e-6:
        return (1 - share) * a + share * b
    return (np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)


# --- linear ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_wise_ft(family, tmp_path, dtype, alpha):
    init, (path,), first, (model,) = family(1, dtype)
    expected = {n: (1 - alpha) * wide(first[n]) + alpha * wide(model[n]) for n in first}
    close(soups.wise_ft(init, path, alpha=alpha), expected)
    assert soup(path, "--method", "wise-ft", "--init", init, "--alpha", alpha, "-o", tmp_path / "o.safetensors") == 0
    close(load_file(tmp_path / "o.safetensors"), expected)
    record = json.loads((tmp_path / "o.soup.json").read_text())
    assert (record["method"], record["alpha"]) == ("wise-ft", alpha)
    assert [i["coefficient"] for i in record["ingredients"]] == [1 - alpha, alpha]
    if alpha in (0, 1):
        end = [first, model][int(alpha)]
        assert all(torch.equal(soups.wise_ft(init, path, alpha=alpha)[n], end[n]) for n in end)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("weights", "scale"),
    [(None, 1.0), (None, 0.4), ([-1, 0, 0], 1.0), ([-1, 1, 1], 0.7)],  # add, scaled, negate, analogy
)
def test_task_arithmetic(family, tmp_path, dtype, weights, scale):
    init, paths, first, models = family(3, dtype)
    signs = weights or [1, 1, 1]
    expected = reference(first, models, lambda t: scale * sum(s * x for s, x in zip(signs, t, strict=True)))
    close(soups.task(init, paths, weights=weights, scale=scale), expected)
    given = [] if weights is None else ["--weights=" + ",".join(map(str, weights))]
    command = ["--method", "task", "--init", init, "--scale", scale, *given]
    assert soup(*paths, *command, "-o", tmp_path / "o.safetensors") == 0
    close(load_file(tmp_path / "o.safetensors"), expected)


def test_a_single_task_is_added_whole_and_taken_away(family):
    init, (path,), first, (model,) = family(1)
    assert all(torch.equal(soups.task(init, path)[n], model[n]) for n in model)
    close(soups.task(init, [path], weights=[-1]), {n: 2 * wide(first[n]) - wide(model[n]) for n in first})


def test_ema_is_what_the_averager_would_be(tmp_path):
    steps, models = (100, 110, 150), [random(i, torch.float64) for i in range(3)]
    for step, model in zip(steps, models, strict=True):
        write(tmp_path / f"step-{step}.safetensors", model)
    live = EMA(0.97, every=1)
    for step, model in zip(steps, models, strict=True):
        live.update(model, step)
    expected = {name: wide(tensor) for name, tensor in live.average().items()}
    close(soups.ema(tmp_path, decay=0.97), expected)
    assert soup(tmp_path, "--method", "ema", "--decay", 0.97, "-o", tmp_path / "out" / "o.safetensors") == 0
    close(load_file(tmp_path / "out" / "o.safetensors"), expected)


# --- on the sphere ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eta", [1.0, 0.3])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_slerp_of_two(family, tmp_path, dtype, eta, share):
    init, paths, first, models = family(2, dtype)
    expected = reference(first, models, lambda t: eta * two(*t, share))
    close(soups.slerp(init, paths, weights=[1 - share, share], eta=eta), expected)
    weights = f"--weights={1 - share},{share}"
    assert soup(*paths, "--method=slerp", "--init", init, weights, "--eta", eta, "-o", tmp_path / "o.safetensors") == 0
    close(load_file(tmp_path / "o.safetensors"), expected)
    record = json.loads((tmp_path / "o.soup.json").read_text())
    rebuilt = {
        n: sum(c * wide(m[n]) for c, m in zip(record["coefficients"][n], [first, *models], strict=True)) for n in first
    }
    close(load_file(tmp_path / "o.safetensors"), rebuilt)


@pytest.mark.parametrize("count", [3, 6])
def test_slerp_of_many_is_one_after_the_other(family, count):
    init, paths, first, models = family(count)

    def combine(tasks):
        so_far = tasks[0]
        for m, one in enumerate(tasks[1:], start=2):
            so_far = two(so_far, one, 1 / m)
        return so_far

    close(soups.slerp(init, paths), reference(first, models, combine))


def test_slerp_ends_symmetry_and_length(family):
    init, paths, first, models = family(2)
    for share, end in ((0, models[0]), (1, models[1])):
        mixed = soups.slerp(init, paths, weights=[1 - share, share])
        assert all(torch.equal(mixed[n], end[n]) for n in end)
    mixed = soups.slerp(init, paths, weights=[0.2, 0.8])
    turned = soups.slerp(init, paths[::-1], weights=[0.8, 0.2])
    close(mixed, {n: wide(turned[n]) for n in turned})
    nothing = soups.slerp(init, paths, eta=0)
    assert all(torch.equal(nothing[n], first[n]) for n in first)


def test_slerp_keeps_the_length_of_equally_long_vectors_where_a_mean_does_not(tmp_path):
    g = torch.Generator().manual_seed(3)
    first = torch.randn(400, generator=g, dtype=torch.float64)
    tasks = [t / t.norm() for t in torch.randn(3, 400, generator=g, dtype=torch.float64)]
    init = write(tmp_path / "init.safetensors", {"a": first})
    paths = [write(tmp_path / f"{i}.safetensors", {"a": first + t}) for i, t in enumerate(tasks)]
    for count in (2, 3):
        assert (soups.slerp(init, paths[:count])["a"] - first).norm().item() == pytest.approx(1, abs=1e-9)
        assert (soups.uniform(paths[:count])["a"] - first).norm().item() < 0.8


@pytest.mark.parametrize("factor", [0.0, 2.0, -2.0, -1.0])
def test_slerp_is_linear_where_there_is_no_angle(tmp_path, factor):
    first, one = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    init = write(tmp_path / "init.safetensors", {"a": first})
    a = write(tmp_path / "a.safetensors", {"a": first + one})
    b = write(tmp_path / "b.safetensors", {"a": first + factor * one})
    with pytest.warns(UserWarning, match="task vector is zero") if factor == 0 else nullcontext():
        mixed = soups.slerp(init, [a, b], weights=[0.7, 0.3])["a"]
    torch.testing.assert_close(mixed, first + (0.7 + 0.3 * factor) * one, rtol=1e-12, atol=1e-12)


# --- Model Stock -----------------------------------------------------------------------------------------------------


def stock(tasks):
    unit = [t / np.linalg.norm(t) if np.linalg.norm(t) else 0 * t for t in tasks]
    cosine = max(np.mean([(a * b).sum() for a, b in itertools.combinations(unit, 2)]), 0)
    t = len(tasks) * cosine / (1 + (len(tasks) - 1) * cosine)
    return t * np.mean(tasks, axis=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock(family, tmp_path, dtype, count):
    init, paths, first, models = family(count, dtype)
    expected = reference(first, models, stock)
    close(soups.model_stock(init, paths), expected)
    assert soup(*paths, "--method", "model-stock", "--init", init, "-o", tmp_path / "o.safetensors") == 0
    close(load_file(tmp_path / "o.safetensors"), expected)


def test_model_stock_between_the_mean_and_the_initial_model(tmp_path):
    first = {"same": torch.zeros(2), "right": torch.zeros(2), "away": torch.zeros(2), "frozen": torch.ones(2)}
    init = write(tmp_path / "init.safetensors", first)
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    a = write(tmp_path / "a.safetensors", first | {"same": x, "right": x.clone(), "away": x.clone()})
    b = write(tmp_path / "b.safetensors", first | {"same": x.clone(), "right": y, "away": -x})
    mixed = soups.model_stock(init, [a, b])
    assert torch.equal(mixed["same"], x)
    assert all(torch.equal(mixed[n], first[n]) for n in ("right", "away", "frozen"))


# --- all of them -----------------------------------------------------------------------------------------------------

METHODS = {
    "wise-ft": lambda init, paths, **o: soups.wise_ft(init, paths[0], **o),
    "task": soups.task,
    "slerp": soups.slerp,
    "model-stock": soups.model_stock,
}


@pytest.mark.parametrize("method", METHODS)
def test_threads_do_not_matter_and_complex_numbers_count(tmp_path, method):
    def tensors(seed):
        g = torch.Generator().manual_seed(seed)
        return {
            "z": torch.randn(3000, generator=g, dtype=torch.complex64),
            "bn.num_batches_tracked": torch.tensor(seed),
            "ids": torch.arange(3),
        }

    init = write(tmp_path / "init.safetensors", tensors(0))
    paths = [write(tmp_path / f"{i}.safetensors", tensors(i)) for i in (1, 2)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(METHODS[method](init, paths))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])
    assert results[0]["bn.num_batches_tracked"] == (1 if method == "wise-ft" else 2)
    if method == "slerp":
        first, *models = (torch.view_as_real(tensors(i)["z"]).double().numpy() for i in range(3))
        expected = first + two(models[0] - first, models[1] - first, 0.5)
        np.testing.assert_allclose(torch.view_as_real(results[0]["z"]).numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_equal_to_the_initial_one_is_pointed_out(family, tmp_path, method):
    init, paths, first, _ = family(2)
    twin = write(tmp_path / "twin.safetensors", first)
    with pytest.warns(UserWarning, match=r"twin.safetensors have the same content; its task vector is zero"):
        mixed = METHODS[method](init, [twin, *paths[1:]])
    assert all(tensor.isfinite().all() for tensor in mixed.values())
    if method == "wise-ft":
        assert all(torch.equal(mixed[n], first[n]) for n in first)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_errors_that_name_the_place(family, tmp_path, capsys, method, bad):
    init, paths, first, models = family(2)
    models[0]["matrix"].view(-1)[2000] = bad
    write(paths[0], models[0])
    out = tmp_path / "out.safetensors"
    used = paths[:1] if method == "wise-ft" else paths
    assert soup(*used, "--method", method, "--init", init, "-o", out) == 2
    error = capsys.readouterr().err
    assert all(words in error for words in (str(paths[0]), "'matrix'", str(bad), "element 2000"))
    first["vector"][7] = bad
    write(init, first)
    assert soup(*used, "--method", method, "--init", init, "-o", out) == 2
    assert not out.exists()
    if method in ("slerp", "model-stock"):
        with pytest.raises(ValueError, match="measures the weights"):
            METHODS[method](init, paths, allow_nonfinite=True)


@pytest.mark.parametrize("method", METHODS)
def test_another_base(family, tmp_path, capsys, method):
    _, paths, _, _ = family(2)
    used = paths[:1] if method == "wise-ft" else paths
    out = ["-o", tmp_path / "out.safetensors"]
    write(tmp_path / "other.safetensors", random(0) | {"vector": torch.ones(3)})
    write(tmp_path / "more.safetensors", random(0) | {"more": torch.ones(3)})
    for base, says in (
        (tmp_path / "other.safetensors", ["'vector'", "shape", "[3]"]),
        (tmp_path / "more.safetensors", ["'more'", "do not hold the same tensors"]),
        (tmp_path / "missing.safetensors", ["no such file", "missing.safetensors"]),
        (used[0], ["both the initial model and an ingredient"]),
    ):
        assert soup(*used, "--method", method, "--init", base, *out) == 2
        error = capsys.readouterr().err
        assert all(words in error for words in says), error
    assert soup(*used, "--method", method, *out) == 2
    assert f"--method {method} needs --init" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "wise-ft"], "a single fine-tuned model"),
        (["--method", "wise-ft", "--last", "1", "--alpha", "1.5"], "alpha=1.5: must be between 0 and 1"),
        (["--method", "wise-ft", "--last", "1", "--alpha", "nan"], "alpha=nan"),
        (["--method", "task", "--scale", "inf"], "scale=inf"),
        (["--method", "task", "--weights", "1"], "1 weights for 2"),
        (["--method", "task", "--weights", "cosine"], "give numbers"),
        (["--method", "slerp", "--eta=-1"], "eta=-1.0"),
        (["--method", "slerp", "--weights=-1,2"], "must not be negative"),
        (["--method", "slerp", "--last", "1"], "at least two"),
        (["--method", "model-stock", "--last", "1"], "at least two"),
        (["--method", "model-stock", "--alpha", "1"], "--alpha has no meaning for --method model-stock"),
        (["--alpha", "1"], "has no meaning for --method uniform"),
    ],
)
def test_arguments_that_make_no_sense(family, tmp_path, capsys, arguments, says):
    init, paths, _, _ = family(2)
    assert soup(*paths, "--init", init, *arguments, "-o", tmp_path / "o.safetensors") == 2
    assert says in capsys.readouterr().err


def test_ema_arguments(family, tmp_path, capsys):
    paths = [write(tmp_path / f"{name}.safetensors", random(0)) for name in "ab"]
    out = ["-o", tmp_path / "o.safetensors"]
    for arguments, says in (
        (["--decay", "0.9"], "step of each checkpoint"),
        (["--decay", "1"], "decay=1.0"),
        ([], "needs --decay"),
    ):
        assert soup(*paths, "--method", "ema", *arguments, *out) == 2
        assert says in capsys.readouterr().err


def test_a_dry_run_and_a_bar(family, tmp_path, capsys):
    init, paths, _, _ = family(2)
    command = [*paths, "--method", "slerp", "--init", init, "-o", tmp_path / "o.safetensors"]
    assert soup(*command, "--dry-run") == 0
    assert str(init) in capsys.readouterr().out
    seen = []
    soups.slerp(init, paths, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


# --- which tensors ---------------------------------------------------------------------------------------------------


def test_only_and_skip(family, tmp_path):
    init, paths, first, models = family(2)
    mean = {n: (wide(models[0][n]) + wide(models[1][n])) / 2 for n in first}
    others = {n: wide(models[1][n]) for n in first}
    close(soups.uniform(paths, only="^ma"), others | {"matrix": mean["matrix"]})
    close(soups.uniform(paths, skip="ma|sc"), mean | {n: others[n] for n in ("matrix", "scalar")})
    close(soups.uniform(paths, only="a", skip="^m"), others | {"scalar": mean["scalar"]})
    base = {n: wide(first[n]) for n in first}
    half = {n: (wide(first[n]) + wide(models[0][n])) / 2 for n in first}
    close(soups.wise_ft(init, paths[0], only="vector", like=init), base | {"vector": half["vector"]})
    out = tmp_path / "o.safetensors"
    assert soup(*paths, "--method", "slerp", "--init", init, "--skip", "vector|empty", "-o", out) == 0
    turned = soups.slerp(init, paths)
    assert torch.equal(load_file(out)["matrix"], turned["matrix"])
    assert torch.equal(load_file(out)["vector"], models[1]["vector"])
    assert json.loads((tmp_path / "o.soup.json").read_text())["skip"] == "vector|empty"


def test_what_is_skipped_may_differ(tmp_path, capsys):
    a = write(tmp_path / "a.safetensors", {"body": torch.zeros(3), "head": torch.ones(2), "n": torch.tensor(1)})
    b = write(tmp_path / "b.safetensors", {"body": torch.ones(3), "head": torch.ones(7), "n": torch.tensor(2)})
    mixed = soups.uniform([a, b], skip="head|^n$")
    assert torch.equal(mixed["body"], torch.full((3,), 0.5))
    assert (mixed["head"].shape, mixed["n"]) == ((7,), 2)
    for arguments, says in ((["--only", "nothing"], "leave none"), (["--skip", "("], "is not a regular expression")):
        assert soup(a, b, *arguments, "-o", tmp_path / "o.safetensors") == 2
        error = capsys.readouterr().err
        assert says in error
