"""A byte-level policy to align: pretrained on Python's standard library, with TRL's trainers set up for it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import PeftConfig
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from common import text

PROMPT, ANSWER = 32, 16
LETTER = "e"


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each byte, read as a Latin-1 character."""
    characters = Tokenizer(models.WordLevel({chr(byte): byte for byte in range(256)}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="\x00", pad_token="\x01")


def pretrained(out: Path, steps: int) -> str:
    """The folder of a policy that has read the standard library for ``steps`` optimizer steps."""
    trainer = text.trainer(text.transformer(), out, [], max_steps=steps)
    trainer.train()
    trainer.save_model(str(out / "policy"))
    return str(out / "policy")


def pieces(count: int = 512) -> list[tuple[str, str]]:
    """Pieces of the source and how they go on, in ASCII."""
    rows = text.library_source()[0]
    rows = rows[(rows < 128).all(1) & (rows > 1).all(1)]
    rows = rows[:: max(1, len(rows) // count)]
    strings = [bytes(row.tolist()).decode() for row in rows]
    return [(string[:PROMPT], string[PROMPT : PROMPT + ANSWER]) for string in strings]


def letters(completions: list[str], **_: Any) -> list[float]:
    """A reward that can be hacked: the share of one letter."""
    return [completion.count(LETTER) / ANSWER for completion in completions]


def dpo(
    policy: str, out: Path, callbacks: list[Any], adapter: PeftConfig | None = None, **options: Any
) -> trl.DPOTrainer:
    """TRL's DPO, where how the source goes on is preferred to the same with small and capital letters swapped."""
    pairs = [{"prompt": a, "chosen": b, "rejected": b.swapcase()} for a, b in pieces() if b != b.swapcase()]
    arguments = trl.DPOConfig(**{**_defaults(out), "per_device_train_batch_size": 8, **options})
    return _quiet(trl.DPOTrainer, policy, arguments, pairs, callbacks, peft_config=adapter)


def grpo(policy: str, out: Path, callbacks: list[Any], **options: Any) -> trl.GRPOTrainer:
    """TRL's GRPO with the reward `letters`, four answers to each of four prompts."""
    arguments = trl.GRPOConfig(
        **{
            **_defaults(out),
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "max_completion_length": ANSWER,
            "beta": 0.1,
            **options,
        },
    )
    prompts = [{"prompt": prompt} for prompt, _ in pieces()]
    return _quiet(trl.GRPOTrainer, policy, arguments, prompts, callbacks, reward_funcs=letters)


def logged(trainer: transformers.Trainer, metric: str, parts: int = 1) -> list[float]:
    """The means of a metric over each of ``parts`` equal parts of the run."""
    values = [entry[metric] for entry in trainer.state.log_history if metric in entry]
    bounds = [round(i * len(values) / parts) for i in range(parts + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]


def drift(model: transformers.PreTrainedModel) -> float:
    """Nats per held-out byte of the standard library: what the policy has forgotten of what it was pretrained on."""
    return text.loss(model, text.library_source()[1])


@torch.no_grad()
def tested(policy: str | Path, reference: str | Path, answers: int) -> dict[str, float]:
    """The KL divergence from ``reference``, in nats, of so many answers to each held-out prompt, and their reward."""
    models = [transformers.AutoModelForCausalLM.from_pretrained(path).eval() for path in (policy, reference)]
    prompts = text.library_source()[1][:, :PROMPT].repeat(answers, 1)
    torch.manual_seed(0)
    rows = models[0].generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_new_tokens=ANSWER)
    logp, reference_logp = (model(rows).logits[:, PROMPT - 1 : -1].log_softmax(-1) for model in models)
    written = [bytes(row.tolist()).decode("latin-1") for row in rows[:, PROMPT:]]
    return {
        "KL": (logp.exp() * (logp - reference_logp)).sum((1, 2)).mean().item(),
        "reward": sum(letters(written)) / len(written),
    }


def _defaults(out: Path) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "seed": 0,
    }


def _quiet(kind: Any, policy: str, arguments: Any, data: list[Any], callbacks: list[Any], **options: Any) -> Any:
    trainer = kind(
        policy,
        args=arguments,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer(),
        callbacks=callbacks,
        **options,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer
