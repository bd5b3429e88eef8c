"""What was averaged while training and what `soup` makes of the saved checkpoints are the same, bit for bit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from averaging import named_weights
from averaging.transformers import LAWA

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def soup(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "averaging.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_online_lawa_is_the_soup_of_the_checkpoints(tmp_path, dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    rows = torch.randint(0, 32, (40, 8))
    run = Trainer(
        model=LlamaForCausalLM(config).to(dtype),
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=10, save_steps=2, learning_rate=1e-2, lr_scheduler_type="constant",
            per_device_train_batch_size=4, disable_tqdm=True, report_to="none", use_cpu=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[LAWA(k=3, every=2)],
    )  # fmt: skip
    run.train()
    done = soup(tmp_path, "--last", 3)
    assert done.returncode == 0, done.stderr
    cooked = named_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "soup", dtype=dtype))
    kept = named_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-10" / "lawa", dtype=dtype))
    exact = [named_weights(AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{n}")) for n in (6, 8, 10)]
    assert cooked.keys() == kept.keys()
    for name, tensor in cooked.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, kept[name]), name
        assert torch.equal(tensor, named_weights(run.model)[name]), name
        mean = torch.stack([snapshot[name].double() for snapshot in exact]).mean(0)
        for towards in (float("inf"), float("-inf")):  # no neighbour in the weights' dtype is nearer to the mean
            neighbour = torch.nextafter(tensor, torch.full_like(tensor, towards)).double()
            assert ((tensor.double() - mean).abs() <= (neighbour - mean).abs()).all(), name
    again = soup(tmp_path, "--last", 3)
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert "Traceback" not in again.stderr
    assert soup(tmp_path, "--last", 3, "--force").returncode == 0


def test_help_imports_no_torch():
    code = "import sys, averaging.cli as cli\ntry:\n cli.main(['--help'])\nfinally:\n assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
