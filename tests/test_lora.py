"""The mean of LoRA adapters' products, against the mean of the merged models in float64."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from averaging import cli
from averaging.checkpoints import Checkpoint
from averaging.soups import lora, uniform

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
    return peft.PeftModel.from_pretrained(Base(), folder).merge_and_unload()


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
    result = lora(folders, tmp_path / "out", weights=weights, rank=11)  # at least the sum of the ranks
    assert result.error < 1e-12
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
    result = lora(folders, tmp_path / "out", rank=rank)
    base, mean, got = Base().state_dict(), mean_model(folders, [1 / 3] * 3).state_dict(), None
    got = merged(tmp_path / "out").state_dict()
    lost = total = 0.0
    for module, own in (("first", rank or 3), ("second", rank or 4)):
        assert result.ranks[f"base_model.model.{module}"] == own
        name = f"{module}.weight"
        u, s, vt = torch.linalg.svd(mean[name] - base[name], full_matrices=False)
        best = (u[:, :own] * s[:own]) @ vt[:own]
        torch.testing.assert_close(got[name] - base[name], best, rtol=1e-9, atol=1e-11)
        error = (s[own:].norm() / s.norm()).item()
        assert result.errors[f"base_model.model.{module}"] == pytest.approx(error, abs=1e-12)
        lost, total = lost + s[own:].square().sum().item(), total + s.square().sum().item()
    assert result.error == pytest.approx((lost / total) ** 0.5, abs=1e-12)
    record = json.loads((tmp_path / "out" / "soup.json").read_text())
    assert (record["method"], record["error"]) == ("lora-product", result.error)
    assert [i["coefficient"] for i in record["ingredients"]] == [1 / 3] * 3
    assert len({i["checksum"] for i in record["ingredients"]}) == 3


def test_the_command(tmp_path, capsys):
    a, b = (str(adapter(tmp_path / name, i)) for i, name in enumerate("ab"))
    out = str(tmp_path / "out")
    assert cli.main([a, b, "--lora", "product", "-o", out, "--dtype", "bf16", "--lora-rank", "6"]) == 0
    assert "out: average of 2, rank 6, relative error " in capsys.readouterr().out
    assert {t.dtype for t in load_file(f"{out}/adapter_model.safetensors").values()} == {torch.bfloat16}
    kept = Checkpoint(out)
    assert (kept.kind, kept.config["r"], kept.config["lora_alpha"]) == ("peft", 6, 6)
    assert cli.main([a, b, "--lora", "factors", "-o", out, "--force", "-q"]) == 0
    uniform([a, b], tmp_path / "factors")
    torch.testing.assert_close(dict(Checkpoint(out)), dict(Checkpoint(tmp_path / "factors")), rtol=0, atol=0)
    assert cli.main([a, b, "--lora", "product", "-o", f"{tmp_path}/dry", "--dry-run"]) == 0
    assert not (tmp_path / "dry").exists()
    lora([a, b], tmp_path / "zero", weights=[1, 0])
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
        ({}, {}, ["--lora-rank", "0"], ["rank=0"]),
        ({}, {}, ["--weights", "1"], ["1 weights for 2"]),
        ({}, {}, ["--weights=-1,1"], ["positive sum"]),
        ({}, {}, ["--dtype", "int8"], ["unknown dtype"]),
        ({}, {}, ["--method", "ema"], ["is a mean"]),
        ({}, {}, ["--init", "x"], ["--init has no meaning"]),
        ({}, {}, ["--skip", "x"], ["--skip has no meaning"]),
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


def test_other_errors(tmp_path, capsys):
    a, b = (adapter(tmp_path / name, i) for i, name in enumerate("ab"))
    assert cli.main([str(a), str(b), "-o", str(tmp_path / "out"), "--lora-rank", "2"]) == 2
    assert "--lora-rank has no meaning for a soup without --lora product" in capsys.readouterr().err
    lora([a, b], tmp_path / "out")
    assert cli.main(["--recipe", str(tmp_path / "out" / "soup.json"), "-o", str(tmp_path / "again")]) == 2
    assert "--lora product" in capsys.readouterr().err
    with pytest.raises(FileExistsError):
        lora([a, b], tmp_path / "out")
    with pytest.raises(ValueError, match="one of the ingredients"):
        lora([a, b], a, force=True)
    adapter(tmp_path / "wide", 3, r=4)
    assert cli.main([str(a), str(tmp_path / "wide"), "-o", str(tmp_path / "x")]) == 2
    assert "--lora product" in capsys.readouterr().err
