"""Runs of models in FullyShardedDataParallel (FSDP1), beside what the weights gathered from them give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ddp_runs import collectives, count_collectives
from shard_runs import STEPS, Net, averagers, beside_the_gathered, fsdp, gathered, goes_on, loss, same, train, whole
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.nn.parallel import DistributedDataParallel

from averaging import (
    EMA,
    ElasticReset,
    EMAAnchor,
    PostHocEMA,
    Reference,
    Trajectory,
    applied,
    load_into,
    named_weights,
    save_whole,
)
from averaging.averager import Averager

BETWEEN = ("FULL_SHARD", "SHARD_GRAD_OP", "one parameter")


def fsdp1(net: Net, strategy: str = "FULL_SHARD", **options: Any) -> Net:
    """The embedding, the scale and the head are the root's, as with `fsdp`."""

    def wrap(part: nn.Module) -> Any:
        return FullyShardedDataParallel(
            part, device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy[strategy],
            **{"use_orig_params": True, **options},
        )  # fmt: skip

    net.inner, net.outer = wrap(net.inner), wrap(net.outer)
    return wrap(net)


def as_one(net: Net, strategy: str = "FULL_SHARD", **options: Any) -> Net:
    """Each wrapped module shows its parameters as one; a frozen one among trained ones it must not manage."""
    if (policy := options.get("mixed_precision")) is not None:
        net.inner.bias.data = net.inner.bias.to(policy.param_dtype)
    return fsdp1(net, strategy, use_orig_params=False, ignored_states=[net.inner.bias], **options)


def core(folder: Path) -> dict[str, Any]:
    distributed.init_process_group("gloo")
    count_collectives()
    half = torch.bfloat16
    engines: dict[str, Callable[[], Net]] = {
        "FULL_SHARD": lambda: fsdp1(Net()),
        "FULL_SHARD, bf16 weights": lambda: fsdp1(Net(half)),
        "FULL_SHARD, bf16 policy": lambda: fsdp1(Net(), mixed_precision=MixedPrecision(param_dtype=half)),
        "SHARD_GRAD_OP": lambda: fsdp1(Net(), "SHARD_GRAD_OP"),
        "NO_SHARD": lambda: fsdp1(Net(), "NO_SHARD"),
        "one parameter": lambda: as_one(Net()),
        "one parameter, bf16 policy": lambda: as_one(Net(), mixed_precision=MixedPrecision(param_dtype=half)),
        "one parameter, SHARD_GRAD_OP": lambda: as_one(Net(), "SHARD_GRAD_OP"),
        "one parameter, NO_SHARD": lambda: as_one(Net(), "NO_SHARD"),
    }
    results: dict[str, Any] = {
        "engines": {name: beside_the_gathered(build, folder, True) for name, build in engines.items()}
    }
    results["writing"] = {build.__name__: writing(build) for build in (fsdp1, as_one)}
    results["between"] = {name: between_forward_and_backward(engines[name]) for name in BETWEEN}
    results["accumulated"] = [accumulated(engines[name]) for name in ("SHARD_GRAD_OP", "one parameter, SHARD_GRAD_OP")]
    results["collectives"] = collectives()

    net = Net()
    net.outer.requires_grad_(False)
    partly = as_one(net)
    results["partly frozen"] = [[*named_weights(partly)], [*named_weights(partly, frozen=True)]]
    for build in (fsdp1, as_one):
        try:
            EMA(0.8).update(build(Net()).module)
        except ValueError as error:
            results[f"inside {build.__name__}"] = str(error)
    return results


def writing(build: Callable[[Net], Net]) -> dict[str, Any]:
    """Weights written back, and a reference that follows the policy, sharded alike."""
    policy, other = build(Net()), build(Net())
    reference, anchor = Reference(EMAAnchor(0.3, every=2), policy, other), EMAAnchor(0.3, every=2)

    def follow(step: int) -> None:
        reference.update(step)
        with torch.no_grad():
            loss(other, step)

    train(policy, [anchor], follow)
    everything = EMA(0.8, frozen=True)
    everything.update(policy, 1)
    return {
        "write-backs": [
            train(build(Net()), [average]) for average in (ElasticReset(4, 0.8), EMA(0.8, switch=4, name="switch"))
        ],
        "anchor": same(gathered(other), whole(policy, anchor.average())),
        "frozen": [*everything.average()],
    }


def between_forward_and_backward(build: Callable[[], Net]) -> list[bool]:
    """Average and evaluate there, which a run that does not would not notice."""
    ends = []
    for evaluates in (False, True):
        net, average = build(), EMA(0.8)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.05)
        expected, seen = EMA(0.8), []
        for step in range(1, 5):
            weights = gathered(net)
            value = loss(net, step)
            if evaluates:
                average.update(net, step)
                expected.update(weights, step)
                with applied(net, average), torch.no_grad():
                    seen.append(loss(net, 50, False))
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(gathered(net))
    plain = Net()
    load_into(plain, expected)
    right = torch.allclose(loss(plain, 50, False), seen[-1], rtol=1e-5)
    return [same(*ends), same(whole(net, average.average()), expected.average()), right]


def accumulated(build: Callable[[], Net]) -> bool:
    """Whether evaluations while gradients are accumulated without communication leave them as they are."""
    ends = []
    for evaluates in (False, True):
        net, average = build(), EMA(0.8)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05)
        for step in range(1, 4):
            with net.no_sync():
                loss(net, 2 * step).backward()
            if evaluates:
                average.update(net, step)
                with applied(net, average), torch.no_grad():
                    loss(net, 50, False)
            loss(net, 2 * step + 1).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(gathered(net))
    return same(*ends)


def files(folder: Path) -> dict[str, Any]:
    """Save at step 3 and go on; read it again, in other engines, whole, and what they save."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    net, kept = fsdp1(Net()), averagers(folder)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.05)
    weights: list[dict[str, torch.Tensor]] = []
    saved: dict[str, Any] = {}

    def look(step: int) -> None:
        weights.append(gathered(net))
        if step == 3:
            for average in kept:
                average.save(folder / "at-3" / average.name)
            saved["averages"] = {average.name: whole(net, average.average()) for average in kept}
            saved["parameters"] = [parameter.detach().clone() for parameter in net.parameters()]
            saved["optimizer"] = copy.deepcopy(optimizer.state_dict())
            save_whole(net, folder / "whole.safetensors", kept[1])

    trails = [Trajectory(folder / "trail", every=2), PostHocEMA(folder / "tracks", snapshots=2)]
    straight = train(net, [*kept, *trails], look, optimizer=optimizer)
    results: dict[str, Any] = {"saved": saved["averages"]}

    # Everything anew, from the files.
    other = fsdp1(Net())
    with torch.no_grad():
        for parameter, value in zip(other.parameters(), saved["parameters"], strict=True):
            parameter.copy_(value)
    optimizer = torch.optim.Adam([p for p in other.parameters() if p.requires_grad], lr=0.05)
    optimizer.load_state_dict(saved["optimizer"])
    again = [average.load(folder / "at-3" / average.name, other) for average in averagers(folder)]
    for step in range(4, STEPS + 1):
        loss(other, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        for average in again:
            average.update(other, step)
    results["resumed"] = same(gathered(other), straight["final"]) and all(
        same(one.average(), two.average()) and one.step == two.step for one, two in zip(kept, again, strict=True)
    )

    # From engine to engine, training on in each.
    engines: dict[str, Callable[[Net], nn.Module]] = {
        "FSDP2": fsdp, "DDP": DistributedDataParallel, "FSDP1": fsdp1,
        "FSDP1, SHARD_GRAD_OP": lambda net: fsdp1(net, "SHARD_GRAD_OP"), "FSDP1, one parameter": as_one,
    }  # fmt: skip
    seen, place = weights[:4], folder / "at-3"
    for name, build in engines.items():
        plain = Net()
        load_into(plain, seen[-1])
        model = build(plain)
        on: list[Averager] = [average.load(place / average.name, model) for average in averagers(folder)]
        went = goes_on(model, on, averagers(folder), seen, range(len(seen), len(seen) + 2))
        seen, place = [*seen, *went["weights"]], folder / f"after {name}"
        if name != "DDP" or rank == 0:
            for average in on:
                average.save(place / average.name)
        distributed.barrier()
        results[name] = went["right"]
    return results


def four(folder: Path) -> dict[str, Any]:
    """On four processes: what two have saved, also in two groups that hold the same."""
    distributed.init_process_group("gloo")
    saved = folder.parent / "fsdp1_runs-files-2" / "at-3"
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    count_collectives()
    results: dict[str, Any] = {}
    for name, build in {
        "FULL_SHARD": lambda: fsdp1(Net()),
        "HYBRID_SHARD": lambda: fsdp1(Net(), "HYBRID_SHARD", device_mesh=mesh),
        "one parameter": lambda: as_one(Net()),
    }.items():
        net = build()
        results[name] = {}
        for average in averagers(folder):
            average.load(saved / average.name, net).save(folder / name / average.name)
            load_into(net, average)
            results[name][average.name] = gathered(net)
            average.update(net, 4)
    results["collectives"] = collectives()
    return results
