"""Combinations of LoRA adapters' products, against those of the merged models in float64."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from averaging import cli, load_into
from averaging.checkpoints import Checkpoint
from averaging.soups import ema, greedy, learned, lm_cocktail, ranked, rewarded, series, task, uniform, wise_ft

peft = pytest.importorskip("peft")


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.first = nn.Linear(8, 10)
        self.second = nn.Linear(10, 7)
        self.head = nn.Linear(7, 3)
        self.double()

    def forward(self, tokens):
        x = self.conv(self.tokens(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.second(self.first(x).tanh()).tanh())


def adapter(folder, seed, **settings):
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["first", "second"]} | settings)
    model = peft.get_peft_model(Base(), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * (0.1 if "lora" in name else 1))
    model.save_pretrained(folder)
    return folder


def merged(folder):
    if str(folder).endswith(".safetensors"):
        model = Base()
        model.load_state_dict(load_file(folder))
        return model
    return peft.PeftModel.from_pretrained(Base(), folder).merge_and_unload()


def record(folder):
    return json.loads((folder / "soup.json").read_text())


def same(model, reference):
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=1e-11, atol=1e-11)


def mean_model(folders, shares):
    model = Base()
    states = [merged(folder).state_dict() for folder in folders]
    mean = {n: sum(share * state[n] for share, state in zip(shares, states, strict=True)) for n in model.state_dict()}
    model.load_state_dict(mean)
    return model


TOKENS = torch.arange(11).view(1, -1)
EVERYTHING = {"target_modules": ["tokens", "conv", "first", "second"]}
CASES = {
    "alike": [{}, {}, {}],
    "ranks and alphas": [{"r": 2, "lora_alpha": 7}, {"r": 4}, {}],
    "rsLoRA": [{"use_rslora": True}, {}, {"use_rslora": True, "r": 2}],
    "patterns": [{"rank_pattern": {"second": 1}, "alpha_pattern": {"second": 9}}, {"alpha_pattern": {"fir.t": 2}}, {}],
    "target modules": [{"target_modules": ["first"]}, {"target_modules": ["second"]}, {}],
    "regular expression": [{"target_modules": ".*(first|second)"}] * 2 + [{"target_modules": "all-linear"}],
    "embedding and convolution": [EVERYTHING, {}, EVERYTHING | {"r": 2}],
    "bias": [{"bias": "lora_only"}] * 3,
    "bias of B": [{"lora_bias": True}, {"lora_bias": True, "r": 2}, {}],
    "modules to save": [{"modules_to_save": ["head"]}] * 3,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*")  # PEFT's, on formats that it saves and merges
def test_the_mean_model_exactly(tmp_path, case):
    folders = [adapter(tmp_path / str(i), i, **settings) for i, settings in enumerate(CASES[case])]
    weights = [1, 2, 5]
    uniform(folders, tmp_path / "out", weights=weights, lora="product", lora_rank=11)  # at least the sum of the ranks
    assert record(tmp_path / "out")["error"] < 1e-12
    reference = mean_model(folders, [w / 8 for w in weights])
    model = peft.PeftModel.from_pretrained(Base(), tmp_path / "out")
    torch.testing.assert_close(model(TOKENS), reference(TOKENS), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model.merge_and_unload().state_dict(), reference.state_dict(), rtol=1e-11, atol=1e-11)
    # the mean of the factors is another model
    if case in ("alike", "bias"):
        uniform(folders, tmp_path / "factors", weights=weights)
        assert (merged(tmp_path / "factors")(TOKENS) - reference(TOKENS)).abs().max() > 1e-3


@pytest.mark.parametrize("rank", [None, 1, 2, 5, 9])
def test_the_truncation_is_the_best_one(tmp_path, rank):
    settings = [{"r": 2, "rank_pattern": {"second": 4}}, {"r": 3}, {"r": 2}]
    folders = [adapter(tmp_path / str(i), i, **own) for i, own in enumerate(settings)]
    uniform(folders, tmp_path / "out", lora="product", lora_rank=rank)
    noted = record(tmp_path / "out")
    base, mean, got = Base().state_dict(), mean_model(folders, [1 / 3] * 3).state_dict(), None
    got = merged(tmp_path / "out").state_dict()
    lost = total = 0.0
    for module, own in (("first", rank or 3), ("second", rank or 4)):
        assert noted["ranks"][f"base_model.model.{module}"] == own
        name = f"{module}.weight"
        u, s, vt = torch.linalg.svd(mean[name] - base[name], full_matrices=False)
        best = (u[:, :own] * s[:own]) @ vt[:own]
        torch.testing.assert_close(got[name] - base[name], best, rtol=1e-9, atol=1e-11)
        error = (s[own:].norm() / s.norm()).item()
        assert noted["errors"][f"base_model.model.{module}"] == pytest.approx(error, abs=1e-12)
        lost, total = lost + s[own:].square().sum().item(), total + s.square().sum().item()
    assert noted["error"] == pytest.approx((lost / total) ** 0.5, abs=1e-12)
    assert (noted["method"], noted["lora"], noted["lora_rank"]) == ("uniform", "product", rank)
    assert [i["coefficient"] for i in noted["ingredients"]] == [1 / 3] * 3
    assert len({i["checksum"] for i in noted["ingredients"]}) == 3


def test_the_command(tmp_path, capsys):
    a, b = (str(adapter(tmp_path / name, i)) for i, name in enumerate("ab"))
    out = str(tmp_path / "out")
    assert cli.main([a, b, "--lora", "product", "-o", out, "--dtype", "bf16", "--lora-rank", "6"]) == 0
    assert "out: average of 2, relative error " in capsys.readouterr().out
    assert {t.dtype for t in load_file(f"{out}/adapter_model.safetensors").values()} == {torch.bfloat16}
    kept = Checkpoint(out)
    assert (kept.kind, kept.config["r"], kept.config["lora_alpha"]) == ("peft", 6, 6)
    assert cli.main([a, b, "--lora", "factors", "-o", out, "--force", "-q"]) == 0
    uniform([a, b], tmp_path / "factors")
    torch.testing.assert_close(dict(Checkpoint(out)), dict(Checkpoint(tmp_path / "factors")), rtol=0, atol=0)
    assert cli.main([a, b, "--lora", "product", "-o", f"{tmp_path}/dry", "--dry-run"]) == 0
    assert not (tmp_path / "dry").exists()
    uniform([a, b], tmp_path / "zero", weights=[1, 0], lora="product")
    torch.testing.assert_close(merged(tmp_path / "zero")(TOKENS), merged(a)(TOKENS))


def edit(folder, config=None, **tensors):
    path = folder / "adapter_model.safetensors"
    kept = load_file(path) | tensors
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, path)
    content = json.loads((folder / "adapter_config.json").read_text()) | (config or {})
    (folder / "adapter_config.json").write_text(json.dumps(content))


A, B = (f"base_model.model.first.lora_{x}.weight" for x in "AB")
HEAD = "base_model.model.head.weight"


@pytest.mark.parametrize(
    ("config", "tensors", "options", "says"),
    [
        ({"use_dora": True}, {}, [], ["DoRA", "--lora factors"]),
        ({}, {"base_model.model.first.lora_magnitude_vector": torch.ones(10)}, [], ["DoRA"]),
        ({"target_parameters": ["x"]}, {}, [], ["stacked"]),
        ({"init_lora_weights": "pissa"}, {}, [], ["'pissa'", "changes the base model"]),
        ({"peft_type": "IA3"}, {}, [], ["no LoRA adapter"]),
        ({"base_model_name_or_path": "other"}, {}, [], ["different models", "'other'"]),
        ({"lora_alpha": None}, {}, [], ["alpha"]),
        ({"lora_alpha": "x"}, {}, [], ["alpha"]),
        ({"lora_alpha": float("nan")}, {}, [], ["alpha is nan"]),
        ({"alpha_pattern": {"(": 1}}, {}, [], ["alpha"]),
        ({"alpha_pattern": [1]}, {}, [], ["alpha"]),
        ({}, {A: None}, [], [A, "only one of"]),
        ({}, {B: None}, [], [B, "only one of"]),
        ({}, {A: torch.ones(2, 8)}, [], [A, "no factors"]),
        ({}, {A: torch.ones(3, 9)}, [], ["different shapes"]),
        ({}, {A: torch.ones(3)}, [], ["no factors"]),
        ({}, {A: torch.full((3, 8), torch.nan)}, [], [A, "NaN"]),
        ({}, {A: torch.ones(3, 8, dtype=torch.int64)}, [], [A, "int64"]),
        ({}, {HEAD: torch.ones(3, 7)}, [], [HEAD, "does not hold"]),
        ({}, {}, ["--lora-rank", "0"], ["lora_rank=0"]),
        ({}, {}, ["--weights", "1"], ["1 weights for 2"]),
        ({}, {}, ["--weights=-1,1"], ["positive sum"]),
        ({}, {}, ["--dtype", "int8"], ["unknown dtype"]),
        ({}, {}, ["--method", "model-stock", "--init", "x"], ["not model-stock", "--lora product"]),
        ({}, {}, ["--method", "learned", "--loss", "test_lora:held_out"], ["not learned", "--lora product"]),
        ({}, {"base_model.model.tokens.lora_B.bias": torch.ones(3)}, [], ["tokens.lora_B.bias", "not the factor"]),
        ({}, {}, ["--init", "x"], ["--init has no meaning"]),
        ({}, {}, ["--skip", "x"], ["skip has no meaning"]),
        ({}, {}, ["--last", "1"], ["at least two"]),
    ],
)
def test_what_is_refused(tmp_path, capsys, config, tensors, options, says):
    a, b = (adapter(tmp_path / name, i) for i, name in enumerate("ab"))
    edit(b, config, **tensors)
    assert cli.main([str(a), str(b), "--lora", "product", "-o", str(tmp_path / "out"), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("soup: error: ")
    assert "Traceback" not in printed.err
    for words in says:
        assert words in printed.err
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def held_out():
    return Base(), lambda model, batch: model(batch).sum(), [TOKENS]


def test_other_errors(tmp_path, capsys):
    a, b = (adapter(tmp_path / name, i) for i, name in enumerate("ab"))
    assert cli.main([str(a), str(b), "-o", str(tmp_path / "out"), "--lora-rank", "2"]) == 2
    assert "--lora-rank (lora_rank) has no meaning without --lora product" in capsys.readouterr().err
    product = {"lora": "product"}
    uniform([a, b], tmp_path / "out", **product)
    with pytest.raises(FileExistsError):
        uniform([a, b], tmp_path / "out", **product)
    with pytest.raises(ValueError, match="one of the ingredients"):
        uniform([a, b], a, force=True, **product)
    save_file(Base().state_dict(), tmp_path / "base.safetensors")
    adapter(tmp_path / "head", 4, modules_to_save=["head"])
    with pytest.raises(ValueError, match="besides LoRA factors"):
        wise_ft(tmp_path / "base.safetensors", tmp_path / "head", tmp_path / "x", **product)
    with pytest.raises(ValueError, match="lora='sum'"):
        uniform([a, b], lora="sum")
    adapter(tmp_path / "wide", 3, r=4)
    assert cli.main([str(a), str(tmp_path / "wide"), "-o", str(tmp_path / "x")]) == 2
    assert "--lora product" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("settings", [{}, EVERYTHING | {"modules_to_save": ["head"]}])
def test_factors_are_loaded_and_learned(tmp_path, settings):
    """A PEFT model has other names than its file."""
    folders = [adapter(tmp_path / str(i), i, **settings) for i in range(2)]
    model = peft.PeftModel.from_pretrained(Base(), folders[0])
    wanted = peft.PeftModel.from_pretrained(Base(), folders[1])(TOKENS).detach()
    load_into(model, Checkpoint(folders[1]))
    torch.testing.assert_close(model(TOKENS), wanted, rtol=0, atol=0)
    loss = lambda model, batch: (model(TOKENS) - wanted).square().sum()  # noqa: E731
    found = learned(folders, tmp_path / "out", model=model, loss=loss, batches=[0], epochs=3, lr=1.0)
    assert found.tried[0].metric > found.tried[-1].metric > 0  # the uniform soup; the one learned in the end
    assert found.best.name == str(folders[1])


PRODUCT = {"lora": "product", "lora_rank": 11}


def test_every_linear_method(tmp_path):
    """With the sum of the ranks the adapter is the same combination as that of the merged models."""
    a, b, c = folders = [adapter(tmp_path / f"checkpoint-{10 * i}", i, r=i + 2) for i in range(3)]
    ema(folders, tmp_path / "ema", decay=0.9, **PRODUCT)
    kept = 0.9**10
    same(merged(tmp_path / "ema"), mean_model(folders, [kept**2, kept * (1 - kept), 1 - kept]))
    wise_ft(a, b, tmp_path / "wise", alpha=0.3, **PRODUCT)
    same(merged(tmp_path / "wise"), mean_model([a, b], [0.7, 0.3]))
    task(a, [b, c], tmp_path / "task", scale=0.5, weights=[1, -2], **PRODUCT)
    same(merged(tmp_path / "task"), mean_model(folders, [1.5, 0.5, -1]))
    base = tmp_path / "base.safetensors"  # where adapters start: their products are zero
    save_file(Base().state_dict(), base)
    task(base, [b, c], tmp_path / "added", scale=0.5, weights=[1, -2], **PRODUCT)
    same(merged(tmp_path / "added"), mean_model([base, b, c], [1.5, 0.5, -1]))
    wise_ft(base, b, tmp_path / "half", alpha=0.5, lora="product")
    same(merged(tmp_path / "half"), mean_model([base, b], [0.5, 0.5]))
    rewarded([a, b], tmp_path / "rewarded", share=0.25, **PRODUCT)
    same(merged(tmp_path / "rewarded"), mean_model([a, b], [0.75, 0.25]))
    series("wise-ft", [b], [0, 0.5], tmp_path / "series", init=a, **PRODUCT)
    same(merged(tmp_path / "series" / "alpha-0.5"), mean_model([a, b], [0.5, 0.5]))
    assert record(tmp_path / "series" / "alpha-0")["error"] < 1e-12
    in_memory = uniform(folders, **PRODUCT)
    uniform(folders, tmp_path / "uniform", **PRODUCT)
    torch.testing.assert_close(in_memory, dict(Checkpoint(tmp_path / "uniform")), rtol=0, atol=0)


def distance(weights):
    """From the mean of a and b, the adapter of which lies beside."""
    wanted = merged(weights.path.parent.parent / "wanted").state_dict()
    got = merged(weights.path).state_dict()
    return sum((got[name] - wanted[name]).square().sum().item() for name in wanted)


def test_searches(tmp_path):
    a, b, c = folders = [adapter(tmp_path / name, i) for i, name in enumerate("abc")]
    uniform([a, b], tmp_path / "wanted", **PRODUCT)
    found = greedy(folders, distance, tmp_path / "greedy", cache=tmp_path / "cache.json", **PRODUCT)
    assert found.metric == pytest.approx(0, abs=1e-20)
    assert {one.checkpoint.path for one in found.tried if one.kept} == {a, b}
    same(merged(tmp_path / "greedy"), merged(tmp_path / "wanted"))
    ranked(folders, distance, tmp_path / "ranked", top=2, **PRODUCT)
    same(merged(tmp_path / "ranked"), merged(tmp_path / "wanted"))
    mixed = lm_cocktail([a, c], distance, tmp_path / "cocktail", **PRODUCT)
    same(merged(tmp_path / "cocktail"), mean_model([a, c], mixed.shares))
    arguments = ["--lora", "product", "--method", "search", "--evaluations", "5", "--evaluate", "test_lora:distance"]
    pytest.importorskip("cma")
    assert cli.main([*map(str, [a, b, c]), *arguments, "-q", "-o", str(tmp_path / "search")]) == 0
    assert record(tmp_path / "search")["metric"] <= min(one.metric for one in found.tried)


def test_the_record_cooks_again(tmp_path, capsys):
    a, b = (
        adapter(tmp_path / name, i, target_modules=targets)
        for i, (name, targets) in enumerate([("a", ["first"]), ("b", ["first", "second", "tokens"])])
    )
    recipe = tmp_path / "soup.yaml"
    recipe.write_text(
        "lora: product\nlora-rank: 2\ningredients: [a, b]\nweights: [1, 3]\nlayers: {second: {weights: [2, 1]}}"
    )
    for name, arguments in {
        "weighted": [a, b, "--weights", "1,2", "--lora", "product", "--dtype", "bf16"],
        "wise": [b, "--method", "wise-ft", "--init", a, "--lora", "product", "--lora-rank", "4"],
        "layers": ["--recipe", recipe],
    }.items():
        once, again = tmp_path / name, tmp_path / f"{name}-again"
        assert cli.main([*map(str, arguments), "-q", "-o", str(once)]) == 0
        assert cli.main(["--recipe", str(once / "soup.json"), "-q", "-o", str(again)]) == 0
        for path in once.iterdir():
            assert path.read_bytes() == (again / path.name).read_bytes()
    assert record(once)["coefficients"][A] == [0.25, 0.75]
    assert record(once)["coefficients"][A.replace("first", "second")] == [2 / 3, 1 / 3]
    recipe.write_text("lora: product\ningredients: [a, b]\nlayers: {'first.lora_A': {weights: [2, 1]}}")
    assert cli.main(["--recipe", str(recipe), "-o", str(tmp_path / "x")]) == 2
    assert "first.lora_A" in capsys.readouterr().err
    edit(b, **{A: torch.zeros(3, 8)})
    assert cli.main(["--recipe", str(once / "soup.json"), "-o", str(tmp_path / "x")]) == 2
    assert "has changed since" in capsys.readouterr().err
