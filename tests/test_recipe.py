"""Recipes: the command's options in a file, coefficients by layer, and soups cooked again from their record."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from averaging import cli, soups

NAMES = ("embed.weight", "layers.0.w", "layers.1.w", "layers.2.w", "head.weight")


@pytest.fixture
def family(tmp_path):
    """base/, a/, b/ and c/: folders of models with five tensors each."""
    g = torch.Generator().manual_seed(3)
    first = {name: torch.randn(40, 30, generator=g) for name in NAMES}
    models = {"base": first}
    for name in "abc":
        models[name] = {key: tensor + 0.1 * torch.randn(40, 30, generator=g) for key, tensor in first.items()}
    for name, tensors in models.items():
        (tmp_path / name).mkdir()
        save_file({**tensors, "ids": torch.arange(3)}, tmp_path / name / "model.safetensors")
    return {name: {k: t.double().numpy() for k, t in tensors.items()} for name, tensors in models.items()}


@pytest.fixture
def soup(capsys):
    def run(*arguments, says=None):
        status = cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert status == (0 if says is None else 2), printed.err
        if says is not None:
            assert printed.err.startswith("soup: error: ")
            assert says in printed.err, printed.err
            assert len(printed.err.splitlines()) == 1
        return printed.out

    return run


def recipe(path, text):
    path.write_text(text)
    return path


def close(folder, expected):
    mixed = load_file(folder / "model.safetensors")
    for name, wide in expected.items():
        np.testing.assert_allclose(mixed[name].double().numpy(), wide, rtol=1e-6, atol=1e-7, err_msg=name)


def test_a_recipe_is_the_command_line(family, tmp_path, soup):
    text = """
        method: slerp
        init: base
        ingredients: [a, b]
        weights: [1, 3]
        eta: 5e-1
        skip: head
        dtype: bfloat16
        output: out
    """
    soup("--recipe", recipe(tmp_path / "soup.yaml", text))
    command = [tmp_path / "a", tmp_path / "b", "--method", "slerp", "--init", tmp_path / "base", "--weights", "1,3"]
    soup(*command, "--eta", 0.5, "--skip", "head", "--dtype", "bfloat16", "-o", tmp_path / "same")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "same/model.safetensors").read_bytes()


def test_paths_are_relative_to_the_recipe_and_flags_override_it(family, tmp_path, soup, monkeypatch):
    recipe(tmp_path / "soup.yaml", "{ingredients: [a, b], weights: '1,3', output: out}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    soup("--recipe", "../soup.yaml")
    close(tmp_path / "out", {n: (family["a"][n] + 3 * family["b"][n]) / 4 for n in NAMES})
    soup("--recipe", "../soup.yaml", "../b", "../c", "-o", "mine", "--weights", "3,1")
    close(tmp_path / "elsewhere/mine", {n: (3 * family["b"][n] + family["c"][n]) / 4 for n in NAMES})
    soup("--recipe", "../soup.yaml", "--method", "task", "--init", "../base", "--weights", "0,0", "-o", "zero")
    close(tmp_path / "elsewhere/zero", family["base"])
    recipe(tmp_path / "half.yaml", "{method: wise-ft, init: base, ingredients: a, alpha: 0.5, output: ft}")
    soup("--recipe", "../half.yaml", "--alpha", 0)
    close(tmp_path / "ft", family["base"])


LAYERED = """
ingredients: [a, b]
output: out
layers:
  embed: {%s}
  'layers\\.[01]': {%s}
"""


@pytest.mark.parametrize(
    ("method", "default", "settings"),
    [
        ("uniform", {"weights": [1, 1]}, [{"weights": [1, 3]}, {"weights": [0, 1]}]),
        ("task", {"scale": 0.5}, [{"scale": -1.0}, {"scale": 0.25, "weights": [1, -1]}]),
        ("slerp", {"eta": 0.5}, [{"eta": 0.0}, {"weights": [0.2, 0.8]}]),
    ],
)
def test_layers_have_their_own_coefficients(family, tmp_path, soup, method, default, settings):
    init = {} if method == "uniform" else {"init": str(tmp_path / "base")}
    head = yaml.dump({"method": method, **init, **default})
    inner = [yaml.dump(each, default_flow_style=True).strip().strip("{}") for each in settings]
    soup("--recipe", recipe(tmp_path / "soup.yaml", head + LAYERED % tuple(inner)))
    paths = [tmp_path / "a", tmp_path / "b"]
    make = getattr(soups, method)

    def alone(**own):
        return make(tmp_path / "base", paths, **own) if init else make(paths, **own)

    expected = alone(**default)
    for names, own in ((NAMES[:1], settings[0]), (NAMES[1:3], settings[1])):
        part = alone(**{**default, **own})
        expected = {n: part[n] if n in names else expected[n] for n in expected}
    close(tmp_path / "out", {n: expected[n].double().numpy() for n in expected})
    if method == "uniform":  # and against the formula itself
        a, b = family["a"], family["b"]
        close(tmp_path / "out", {"embed.weight": (a["embed.weight"] + 3 * b["embed.weight"]) / 4})
        close(tmp_path / "out", {n: b[n] for n in NAMES[1:3]} | {n: (a[n] + b[n]) / 2 for n in NAMES[3:]})
    record = json.loads((tmp_path / "out/soup.json").read_text())
    assert list(record["layers"]) == ["embed", r"layers\.[01]"]
    assert len(record["coefficients"]["head.weight"]) == len(record["ingredients"])


def test_the_first_pattern_found_counts(family, tmp_path, soup):
    layers = "layers:\n  layers.1: {weights: [1, 0]}\n  layers: {weights: [0, 1]}\n"
    soup("--recipe", recipe(tmp_path / "soup.yaml", "ingredients: [a, b]\noutput: out\n" + layers))
    a, b = family["a"], family["b"]
    close(tmp_path / "out", {"layers.0.w": b["layers.0.w"], "layers.1.w": a["layers.1.w"]})


@pytest.mark.parametrize("method", ["slerp", "wise-ft"])
def test_layers_beside_a_range(family, tmp_path, soup, method):
    """What the layers leave open takes each value of the range, also where the best is looked for."""
    paths, name, own = ("[a, b]", "eta", "weights: [3, 1]") if method == "slerp" else ("[a]", "alpha", "alpha: 1")
    text = f"method: {method}\ninit: base\ningredients: {paths}\nlayers: {{embed: {{{name}: 0}}, head: {{{own}}}}}\n"
    file = recipe(tmp_path / "soup.yaml", text)
    file.write_text(f"{text}{name}: 0.25:1:0.75\n")
    soup("--recipe", file, "-o", tmp_path / "range")
    file.write_text(text)
    for value in ("0.25", "1"):
        soup("--recipe", file, f"--{name}", value, "-o", tmp_path / value)
        one, many = tmp_path / value, tmp_path / "range" / f"{name}-{value}"
        assert (many / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    close(one, {"embed.weight": family["base"]["embed.weight"]})
    evaluation = ["--evaluate-command", "stat -c %s {checkpoint}/model.safetensors"]
    soup("--recipe", file, f"--{name}", "0.25,0.25001", *evaluation, "-o", tmp_path / "best")
    close(tmp_path / "best", {n: t.double().numpy() for n, t in load_file(tmp_path / "0.25/model.safetensors").items()})


# ---------------------------------------------------------------------- from the record

STAT = ["--evaluate-command", "stat -c %i {checkpoint}"]
COMMANDS = {
    "uniform": ["a", "b", "c"],
    "weights": ["a", "b", "c", "--weights", "0.3,0.1,2.7"],
    "wise-ft": ["a", "--method", "wise-ft", "--init", "base", "--alpha", "0.3", "--only", "layers"],
    "task": ["a", "b", "--method", "task", "--init", "base", "--weights=-1,0.7", "--dtype", "bf16"],
    "slerp": ["a", "b", "c", "--method", "slerp", "--init", "base", "--eta", "0.9", "--skip", "head"],
    "warp": ["a", "b", "--method", "warp", "--init", "base"],
    "rewarded": ["a", "b", "--method", "rewarded", "--lambda", "0.3"],
    "one of a range": ["a", "b", "--method", "warp", "--init", "base", "--eta", "0.1,0.7"],
    "the best of a range": ["a", "--method", "wise-ft", "--init", "base", "--alpha", "0:1:0.25", *STAT],
    "lm-cocktail": ["a", "b", "--method", "lm-cocktail", "--target", "c", "--temperature", "1e6", *STAT],
    "search": ["a", "b", "--method", "search", "--evaluations", "4", *STAT],
    "model-stock": ["a", "b", "--method", "model-stock", "--init", "base", "--like", "c"],
    "greedy": ["a", "b", "c", "--method", "greedy", *STAT],
    "recipe": ["--recipe", "layered.yaml"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_record_cooks_the_same_bytes(family, tmp_path, soup, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path / "layered.yaml", LAYERED.replace("out\n", "unused\n") % ("weights: [1, 7]", "weights: [3, 1]"))
    soup(*COMMANDS[command], "-o", "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = tmp_path / "out" / ("eta-0.7" if command == "one of a range" else "")
    soup("--recipe", out / "soup.json", "-o", "again")
    for name in ("model.safetensors", "soup.json"):
        assert (out / name).read_bytes() == (tmp_path / "elsewhere/again" / name).read_bytes()


def test_a_record_of_averages_along_a_run(tmp_path, soup, monkeypatch):
    import averaging

    model, ema = torch.nn.Linear(30, 7), averaging.PostHocEMA(tmp_path / "ema", snapshots=5)
    trajectory = averaging.Trajectory(tmp_path / "run", every=10)
    for step in range(1, 51):
        model.weight.data += torch.randn(7, 30, generator=torch.Generator().manual_seed(step))
        trajectory.update(model, step)
        ema.update(model, step)
    monkeypatch.chdir(tmp_path)
    for command in (
        ["run", "--sweep", "window=2,3", *STAT],
        ["run", "--method", "ema", "--decay", "0.9"],
        ["run", "--weights", "cosine"],
        ["ema", "--post-hoc", "0.1"],
    ):
        soup(*command, "-o", "out.safetensors", "--force")
        soup("--recipe", "out.soup.json", "-o", "again.safetensors", "--force")
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_a_record_of_a_sharded_hugging_face_model(tmp_path, soup):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    for step in (5, 10, 100):
        torch.manual_seed(step)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(
            tmp_path / f"run/checkpoint-{step}", max_shard_size="20KB"
        )
    soup(tmp_path / "run", "--weights", "inverse_sqrt", "--last", 3)
    soup("--recipe", tmp_path / "run/soup/soup.json", "-o", tmp_path / "again")
    files = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "run/soup").iterdir())
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "run/soup" / file).read_bytes()


def test_a_record_whose_ingredients_have_changed(family, tmp_path, soup):
    soup(tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out")
    again = ["--recipe", tmp_path / "out/soup.json"]
    soup(*again, says="-o OUT")
    soup(*again, "-o", tmp_path / "again", "--eta", 1, says="--eta has no meaning for the record")
    soup(*again, "-o", tmp_path / "out", says="exists already")
    assert "0.5000 × " in soup(*again, "-o", tmp_path / "again", "--dry-run")
    shutil.copy(tmp_path / "c/model.safetensors", tmp_path / "b/model.safetensors")
    soup(*again, "-o", tmp_path / "again", says=f"{tmp_path / 'b'} has changed since")
    record = json.loads((tmp_path / "out/soup.json").read_text())
    for damage in ({"ingredients": [{}]}, {"ingredients": 3}, {"like": 7}):
        (tmp_path / "soup.json").write_text(json.dumps({**record, **damage}))
        soup("--recipe", tmp_path / "soup.json", "-o", tmp_path / "again", says="is not the record of a soup")
    shutil.rmtree(tmp_path / "b")
    soup(*again, "-o", tmp_path / "again", says=f"no such file or directory: {tmp_path / 'b'}")
    assert not (tmp_path / "again").exists()


# ---------------------------------------------------------------------- what is no recipe

TWO = "ingredients: [a, b]\noutput: out\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "soup.yaml: must be a mapping"),
        ("- a\n- b\n", "must be a mapping"),
        (TWO + "metod: slerp\n", "line 3: metod: unknown key; known are"),
        (TWO + "force: true\n", "line 3: force: unknown key"),
        (TWO + "output: x\n", "line 3: output appears twice"),
        (TWO + "method: average\n", "line 3: method: must be one of uniform"),
        (TWO + "method: [slerp]\n", "line 3: method: must be text"),
        (TWO + "last: 2.0\n", "line 3: last: must be a whole number, not 2.0"),
        (TWO + "last: true\n", "line 3: last: must be a whole number"),
        (TWO + "decay: half\n", "line 3: decay: could not convert"),
        (TWO + "decay: [1]\n", "line 3: decay: must be a number"),
        (TWO + "decay: true\n", "line 3: decay: must be a number, not True"),
        (TWO + "only: no\n", "line 3: only: must be text, not False"),
        (TWO + "weights: {a: 1}\n", "line 3: weights: must be a number, text, or a list of them"),
        (TWO + "weights: [1, x]\n", "line 3: weights: expected numbers"),
        (TWO + "weights: [1, 2, 3]\n", "3 weights for 2"),
        (TWO + "allow-nonfinite: 1\n", "line 3: allow-nonfinite: must be true or false"),
        (TWO + "minimize: true\nmaximize: true\n", "line 4: maximize: said already"),
        (TWO + "sweep: [1]\n", "line 3: sweep: must be a mapping"),
        (TWO + "sweep: {size: [1]}\n", "line 3: size: expected AXIS"),
        (TWO + "1: x\n", "line 3: the key must be text"),
        (TWO + "init: &x base\n", "line 3: anchors and aliases are not allowed"),
        (TWO + "init: *x\n", "line 3: anchors and aliases are not allowed"),
        (
            TWO + "init: !!python/object/apply:os.system ['true']\n",
            "line 3: this is not valid YAML: could not determine",
        ),
        (TWO + "init: [unclosed\n", "this is not valid YAML"),
        (TWO + "at: 2020-99-99\n", "line 3: at: month must be in 1..12"),
        ("[" * 1_000_000, "nested too deeply"),
        ("x: " + "y" * (1 << 20), "that is no recipe"),
        ("ingredients: []\n", "line 1: ingredients: must be text or a list of texts"),
        ("ingredients: [1]\n", "line 1: ingredients: must be text or a list of texts"),
        ("output: out\n", "has no ingredients"),
        ("ingredients: [a, missing]\noutput: out\n", "no such file or directory"),
        (TWO + "layers: [x]\n", "line 3: layers: must be a mapping"),
        (TWO + "layers:\n  embed: {}\n", "line 4: embed: must be a mapping"),
        (TWO + "layers:\n  embed: {wieght: 1}\n", "line 4: wieght: unknown key"),
        (TWO + "layers:\n  embed: {dtype: float32}\n", "line 4: embed: dtype is nothing that a layer can have"),
        (TWO + "layers:\n  embed: {eta: 1}\n", "line 4: embed: eta is nothing that a layer can have"),
        (TWO + "layers:\n  embed: {weights: [1]}\n", "line 4: embed: 1 weights for 2"),
        (
            TWO + "layers:\n  nothing: {weights: [1, 2]}\n",
            "line 4: nothing: the pattern 'nothing' is found in the name",
        ),
        (TWO + "layers:\n  (: {weights: [1, 2]}\n", "line 4: (: the pattern '(' is not a regular expression"),
        (
            TWO + "layers:\n  w: {weights: [1, 2]}\n  embed: {weights: [1, 3]}\n",
            "line 5: embed: the pattern 'embed' is found in the name of no tensor that no earlier",
        ),
        (TWO + "method: greedy\nlayers:\n  w: {weights: [1, 2]}\n", "layers have no meaning for"),
    ],
)
def test_what_is_no_recipe(family, tmp_path, soup, text, says):
    soup("--recipe", recipe(tmp_path / "soup.yaml", text), says=says)
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_not_there(tmp_path, soup, capsys):
    soup("--recipe", tmp_path / "soup.yaml", says="no such file")
    soup("--recipe", tmp_path / "soup.json", says="no such file")
    (tmp_path / "soup.yaml").write_bytes(b"\xff\xfe\x00")
    soup("--recipe", tmp_path / "soup.yaml", says="this is not valid YAML")
    with pytest.raises(SystemExit):
        cli.main([])
    assert "name checkpoints" in capsys.readouterr().err


def test_a_search_in_a_recipe(family, tmp_path, soup, monkeypatch):
    (tmp_path / "measure.py").write_text("def size(weights): return abs(float(weights['head.weight'].sum()))")
    text = "{method: greedy, ingredients: [a, b, c], evaluate: 'measure:size', maximize: true, output: out}"
    monkeypatch.setattr("sys.path", __import__("sys").path.copy())
    soup("--recipe", recipe(tmp_path / "soup.yaml", text))
    record = json.loads((tmp_path / "out/soup.json").read_text())
    assert (record["method"], record["best"]) == ("greedy", "max")
