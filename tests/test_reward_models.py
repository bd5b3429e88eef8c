"""Soups of reward models, WARM: sequence-classification heads are averaged, open again, and may be missing in init."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from averaging import cli, soups
from averaging.checkpoints import Checkpoint

BERT = BertConfig(
    vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=8, num_labels=1,
)  # fmt: skip
LLAMA = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=8, num_labels=1, pad_token_id=0,
)  # fmt: skip
KINDS = {
    "bert": (BertForMaskedLM, BertForSequenceClassification),
    "llama": (LlamaForCausalLM, LlamaForSequenceClassification),
}
CONFIGS = {"bert": BERT, "llama": LLAMA}
HEADS = {"bert": "classifier", "llama": "score"}
BODIES = {"bert": r"^bert\.(embeddings|encoder)", "llama": r"^model\."}


@pytest.fixture(params=KINDS)
def kind(request, tmp_path, monkeypatch) -> str:
    """Reward models a, b and c, fine-tuned from base, a language model, in the current folder."""
    monkeypatch.chdir(tmp_path)
    language, reward = KINDS[request.param]
    torch.manual_seed(0)
    language(CONFIGS[request.param]).save_pretrained("base")
    for seed, name in enumerate("abc", start=1):
        torch.manual_seed(seed)
        model = reward.from_pretrained("base", num_labels=1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(name)
    return request.param


def soup(*arguments: str) -> int:
    return cli.main([*arguments])


def rewards(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(1, 13).view(3, 4)).logits


def test_warm_is_the_mean_of_the_reward_models_heads_and_all(kind):
    assert soup("a", "b", "c", "-o", "warm") == 0
    models = [AutoModelForSequenceClassification.from_pretrained(name) for name in "abc"]
    states = [model.state_dict() for model in models]
    mean = models[0]
    mean.load_state_dict({n: (sum(s[n].double() for s in states) / 3).to(states[0][n].dtype) for n in states[0]})
    opened = AutoModelForSequenceClassification.from_pretrained("warm")
    assert (type(opened), opened.config.num_labels) == (KINDS[kind][1], 1)
    assert any(name.startswith(HEADS[kind]) for name in Checkpoint("warm"))
    assert torch.equal(rewards(opened), rewards(mean))


def test_a_head_that_the_initial_model_lacks_is_pointed_out_and_can_be_left_out(kind, capsys):
    command = ["a", "b", "--method", "warp", "--init", "base", "-o", "out"]
    assert soup(*command) == 2
    error = capsys.readouterr().err
    assert "architectures is" in error
    assert "--only or --skip" in error
    assert soup(*command, "--skip", HEADS[kind]) == 2  # the language model's own head, and what is beside it, remain
    error = capsys.readouterr().err
    assert "only in base" in error
    assert "--only or --skip" in error
    assert soup(*command, "--only", BODIES[kind]) == 0
    merged, last, base = Checkpoint("out"), Checkpoint("b"), Checkpoint("base")
    body = soups.warp(["a", "b"], init="base", only=BODIES[kind])
    for name in merged:
        assert torch.equal(merged[name], body[name])
        assert torch.equal(merged[name], last[name]) == (name not in base)
    assert rewards(AutoModelForSequenceClassification.from_pretrained("out")).isfinite().all()


def test_heads_of_different_sizes_are_refused_by_name(kind, capsys):
    KINDS[kind][1].from_pretrained("base", num_labels=3).save_pretrained("other")
    assert soup("a", "other", "-o", "out") == 2
    error = capsys.readouterr().err
    assert f"'{HEADS[kind]}." in error
    assert "shape" in error
    assert soup("a", "other", "--skip", HEADS[kind], "-o", "out") == 0
