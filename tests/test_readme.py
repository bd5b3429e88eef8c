"""README's code runs as it stands, its commands too; what it names exists."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint

import averaging
from averaging.cli import main as soup

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> dict[str, str]:
    """README's fenced blocks of one language, by their heading; the second under a heading is "heading 2"."""
    found: dict[str, str] = {}
    heading = ""
    pattern = r"^#+ (?P<heading>[^\n]+)$|^```(?P<language>\w*)\n(?P<text>.*?)^```$"
    for match in re.finditer(pattern, README, re.M | re.S):
        if match["heading"]:
            heading = match["heading"]
        elif match["language"] == language:
            count = sum(re.fullmatch(rf"{re.escape(heading)}( \d+)?", key) is not None for key in found)
            found[f"{heading} {count + 1}" if count else heading] = match["text"]
    return found


def commands() -> list[list[str]]:
    """The words of every command in a console block, without its comment."""
    lines = [line for block in blocks("console").values() for line in block.splitlines()]
    return [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]


# ---------------------------------------------------------------------- the names that a block takes for granted


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "soup": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def transformers_trainer(_: Any, callbacks: list[Any]) -> Any:
    """What ``Trainer(..., callbacks=[...])`` stands for."""
    from transformers import Trainer, TrainingArguments

    rows = torch.randint(0, 8, (64, 4))
    data = [{"input_ids": row, "labels": row} for row in rows]
    options = TrainingArguments(
        "out", max_steps=500, save_steps=500, eval_strategy="steps", eval_steps=250, per_device_train_batch_size=1,
        report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return Trainer(llama(), options, train_dataset=data, eval_dataset=data[:8], callbacks=callbacks)


def with_transformers() -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    return {"Trainer": transformers_trainer, "AutoModelForCausalLM": AutoModelForCausalLM}


def with_lightning() -> dict[str, Any]:
    from lightning import LightningModule, Trainer
    from torch.utils.data import DataLoader

    from averaging.lightning import LAWA

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(torch.ones(8, 2))  # type: ignore[arg-type]

    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    before = Trainer(callbacks=LAWA(k=5, every="epoch"), max_epochs=2, enable_checkpointing=False, **quiet)
    before.fit(Module())
    before.save_checkpoint("last.ckpt")
    return {"Trainer": partial(Trainer, max_epochs=3, **quiet), "module": Module()}


def with_checkpoints() -> dict[str, Any]:
    from averaging.lightning import LAWA

    names = with_lightning()
    Path("checkpoints").mkdir()
    for path in Path().glob("last.ckpt*"):  # with the folder of its snapshots
        path.rename(Path("checkpoints") / path)
    return {**names, "trainer": names["Trainer"](callbacks=LAWA(k=5, every="epoch"))}


class Loss(nn.Module):
    """A model whose output is its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def forward(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()


def with_a_loop() -> dict[str, Any]:
    model = Loss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer, "batches": [torch.ones(4, 2)] * 300, "evaluate": nn.Module.eval}


def with_an_average() -> dict[str, Any]:
    model = Loss()
    average = averaging.LAWA(k=5, every=1)
    average.update(model)
    return {"model": model, "average": average}


def with_a_reference() -> dict[str, Any]:
    names = with_a_loop()
    policy = names["model"]
    return {
        **names,
        "policy": policy,
        "reference_model": Loss(),
        "loss": lambda policy, reference, batch: policy(batch) - reference(batch).detach(),
    }


def with_accelerate() -> dict[str, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    names = with_a_loop()
    names["model"], names["optimizer"] = accelerator.prepare(names["model"], names["optimizer"])
    return {**names, "accelerator": accelerator, "average": averaging.LAWA(k=5, every=100)}


def with_fine_tuned_models() -> dict[str, Any]:
    for path in ("ft-a", "ft-b"):
        llama().save_pretrained(path)
    return {**with_transformers(), "batches": [{"input_ids": torch.randint(0, 8, (4, 4))}]}


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "averaging": with_transformers,
    "transformers.Trainer, and TRL's": with_transformers,
    "Lightning": with_lightning,
    "When a run is interrupted": with_checkpoints,
    "Your own loop": with_a_loop,
    "Your own loop 2": with_accelerate,
    "Your own loop 3": with_accelerate,
    "Sharded models": with_an_average,
    "Aligning a policy: anchors and resets": lambda: dict.fromkeys(("GRPOTrainer", "DPOTrainer"), transformers_trainer),
    "Aligning a policy: anchors and resets 2": with_a_reference,
    "From fine-tuned models": with_fine_tuned_models,
    "From fine-tuned models 2": dict,
    "Choose the average afterwards": dict,
}
"""For each Python block, what gives the names that it uses and does not define."""


@pytest.mark.parametrize("heading", blocks("python"))
def test_python(heading, tmp_path, monkeypatch):
    assert heading in NAMES, f"give the new block under {heading!r} its names in NAMES"
    monkeypatch.chdir(tmp_path)
    names = NAMES[heading]()
    exec(compile(blocks("python")[heading], f"README.md, {heading}", "exec"), names)


def test_every_entry_of_names_has_its_block():
    assert NAMES.keys() == blocks("python").keys()


# ---------------------------------------------------------------------- commands


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """What the commands read: a Trainer's folder of checkpoints, and two models."""
    monkeypatch.chdir(tmp_path)
    for folder in (
        *(f"checkpoints/checkpoint-{step}" for step in range(10, 80, 10)),
        "a",
        "b",
        "ft",
        "ft-a",
        "ft-b",
        "ft-c",
        "base",
    ):
        fresh = llama()
        with torch.no_grad():
            fresh.lm_head.weight.mul_(sum(folder.encode()))  # not all alike
        fresh.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    for step in (800, 900, 1000):
        distributed_checkpoint.save({"model": fresh.state_dict()}, checkpoint_id=f"run/step-{step}", no_dist=True)
    Path("examples.txt").write_text("soup of the day")
    model, trajectory = llama(), averaging.Trajectory("runs/trajectory", every=100)
    ema = averaging.PostHocEMA("runs/ema", snapshots=100)
    # What the block under "Choose the average afterwards" is, with a model and its validation.
    Path("held_out.py").write_text(
        "import torch\nvalidation_batches = [{'input_ids': torch.arange(8)[None], 'labels': torch.arange(8)[None]}]\n"
        + blocks("python")["From fine-tuned models 2"]
    )
    Path("evaluation.py").write_text(
        "def loss(weights): return sum(float(w.sum()) for w in weights.values())\n"
        "def rewards(weights): return {'one': loss(weights), 'other': -loss(weights)}\n"
    )
    Path("metric.py").write_text("print(len(__import__('sys').argv[1]))")
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("soup.yaml").write_text(blocks("yaml")["Recipes"])
    assert soup(["ft-a", "ft-b", "-o", "made", "-q"]) == 0
    for step in range(100, 2100, 100):
        trajectory.update(model, step)
        ema.update(model, step)


@pytest.mark.parametrize("words", [words for words in commands() if words[0] == "soup"], ids=" ".join)
def test_soup(words, checkpoints, capsys):
    if "search" in words:
        pytest.importorskip("cma")
    if "--lora" in words:
        peft = pytest.importorskip("peft")
        for folder in ("lora-a", "lora-b"):
            config = peft.LoraConfig(init_lora_weights="gaussian", target_modules=["q_proj", "v_proj"])
            peft.get_peft_model(llama(), config).save_pretrained(folder)
    assert soup(words[1:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("words", [words for words in commands() if words[0] != "soup"], ids=" ".join)
def test_script(words):
    (script,) = words
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


# ---------------------------------------------------------------------- what the text names


def test_every_row_of_the_table_builds_its_average():
    rows = re.findall(r"^\| `([A-Z].+?)` \|", README, re.M)
    assert rows
    for expression in rows:
        name = ast.parse(expression, mode="eval").body.func.id
        assert isinstance(eval(expression, {name: getattr(averaging, name)}), averaging.Averager), expression


def test_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r'"\.\[(\w+)\]"', README)
    assert named
    assert set(named) <= extras.keys()


def test_files_exist():
    files = re.findall(r"^([\w./]+)  +\S", blocks("")["The code"], re.M)
    assert len(files) > 5
    for file in files:
        assert (ROOT / file).exists(), file
