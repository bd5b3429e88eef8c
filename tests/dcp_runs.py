"""What processes do together: write torch distributed checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Replicate, Shard


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens = nn.Embedding(31, 6)
        self.inner = nn.Linear(6, 1)
        self.outer = nn.Linear(6, 31, dtype=torch.bfloat16)
        self.register_buffer("count", torch.tensor(7))


def whole(weights: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in weights.items()
    }


def write(folder: Path) -> dict[str, Any]:
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    written = {}
    for seed in range(2):
        model = fully_shard(Net(seed), mesh=mesh)
        optimizer = torch.optim.Adam(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        weights = model.state_dict()
        state = {"model": weights, "optim": get_optimizer_state_dict(model, optimizer), "step": 3}
        save(state, checkpoint_id=folder / "fsdp" / f"step-{seed}")
        save(weights, checkpoint_id=folder / "plain" / f"step-{seed}")
        save({"app": state}, checkpoint_id=folder / "app" / f"checkpoint-{seed}" / "pytorch_model_fsdp_0")
        written[f"fsdp{seed}"] = whole(weights)
        torch.manual_seed(seed)
        places = {"rows": Shard(0), "columns": Shard(1), "deep": Shard(2), "same": Replicate()}
        weights = {name: distribute_tensor(torch.randn(5, 7, 3), mesh, [place]) for name, place in places.items()}
        save({"state_dict": weights}, checkpoint_id=folder / "tensor-parallel" / f"step-{seed}")
        written[f"tensor-parallel{seed}"] = whole(weights)
    return written
