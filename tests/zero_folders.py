"""Folders that DeepSpeed ZeRO saves, and what DeepSpeed itself converts them to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import distributed, nn
from zero_runs import start

# stage, precision, further settings
ENGINES: dict[str, tuple[int, torch.dtype, dict[str, Any]]] = {
    "ZeRO-1, bf16": (1, torch.bfloat16, {}),
    "ZeRO-1, bf16, float32 gradients": (1, torch.bfloat16, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "ZeRO-1, fp32": (1, torch.float32, {}),
    "ZeRO-2, bf16": (2, torch.bfloat16, {}),
    "ZeRO-2, fp16": (2, torch.float16, {"zero_optimization": {"parameter_alignment": True}}),
    "ZeRO-2, fp32": (2, torch.float32, {"zero_optimization": {"round_robin_gradients": True}}),
    "ZeRO-3, bf16": (3, torch.bfloat16, {"zero_optimization": {"sub_group_size": 40}}),
    "ZeRO-3, fp16": (3, torch.float16, {"zero_optimization": {"stage3_param_persistence_threshold": 0}}),
    "ZeRO-3, fp32": (3, torch.float32, {}),
}


class Net(nn.Module):
    """Odd sizes, two groups, a bias that is frozen, a weight used twice, buffers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 7)
        self.again, self.c = nn.Linear(7, 7), nn.Linear(7, 3)
        self.again.weight = self.b.weight
        self.a.bias.requires_grad = False
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.again(self.b(self.norm(self.a(x))).tanh()))


def build(name: str) -> Any:
    stage, dtype, more = ENGINES[name]
    net = Net(dtype)
    trained = [p for p in net.parameters() if p.requires_grad]
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "fp16": {"enabled": dtype is torch.float16, "initial_scale_power": 4},
        "zero_allow_untested_optimizer": True,
        **more,
        "zero_optimization": {"stage": stage, **more.get("zero_optimization", {})},
    }
    optimizer = torch.optim.Adam([{"params": trained[:3]}, {"params": trained[3:], "lr": 0.01}], lr=0.05)
    return deepspeed.initialize(model=net, optimizer=optimizer, config=settings)[0]


def folders(folder: Path) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Save each engine's folders at steps 1 and 2; returns DeepSpeed's conversion of them."""
    start()
    type(get_accelerator()).is_fp16_supported = lambda self: True  # as the few operations here are on the CPU, too
    converted: dict[str, list[dict[str, torch.Tensor]]] = {}
    for name, (_, dtype, _) in ENGINES.items():
        engine = build(name)
        for step in (1, 2):
            torch.manual_seed(10 * step + distributed.get_rank())
            engine.backward(engine(torch.randn(4, 5).to(dtype)).float().square().mean())
            engine.step()
            engine.save_checkpoint(folder / name / f"checkpoint-{step}")
            distributed.barrier()
            if distributed.get_rank() == 0:
                converted.setdefault(name, []).append(convert(folder / name / f"checkpoint-{step}"))
            distributed.barrier()
    return converted


def convert(folder: Path) -> dict[str, torch.Tensor]:
    """What DeepSpeed makes of it, in a copy where BF16_Optimizer's files name the stage that they are of."""
    copy = folder.parent / "copy"
    shutil.copytree(folder, copy)
    for path in copy.glob("*/*_optim_states.pt"):
        content = torch.load(path, weights_only=False)
        content["optimizer_state_dict"].setdefault("zero_stage", 1)
        torch.save(content, path)
    result = get_fp32_state_dict_from_zero_checkpoint(str(copy))
    shutil.rmtree(copy)
    return dict(result)
