"""A byte-level transformer on the source of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

CONTEXT = 128


def library_source() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library in rows of CONTEXT, from files to train on and from others held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    rows = []
    for part in ([f for i, f in enumerate(files) if i % 10], files[::10]):
        data = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in part)), dtype=torch.uint8)
        rows.append(data[: len(data) // CONTEXT * CONTEXT].view(-1, CONTEXT).long())
    train, held_out = rows
    return train, held_out[torch.linspace(0, len(held_out) - 1, 96).long()]


def examples(rows: Tensor) -> list[dict[str, Tensor]]:
    """``rows`` as `transformers.Trainer` takes them."""
    return [{"input_ids": row, "labels": row} for row in rows]


def transformer(seed: int = 0) -> transformers.LlamaForCausalLM:
    """A Llama of 0.9 million parameters, freshly initialised."""
    transformers.set_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def trainer(
    model: nn.Module, out: Path, callbacks: list[transformers.TrainerCallback], **options: Any
) -> transformers.Trainer:
    """A quiet Trainer of ``model`` at a constant learning rate; ``options`` are those of TrainingArguments."""
    train, held_out = library_source()
    defaults = {
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": len(held_out),
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    arguments = transformers.TrainingArguments(str(out), **{**defaults, **options})
    trainer = transformers.Trainer(
        model, arguments, train_dataset=examples(train), eval_dataset=examples(held_out), callbacks=callbacks
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@torch.no_grad()
def loss(model: nn.Module, rows: Tensor) -> float:
    """Nats per byte of ``rows``."""
    mode = model.training
    nats = model.eval()(input_ids=rows, labels=rows).loss.item()
    model.train(mode)
    return nats
