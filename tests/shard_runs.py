"""Runs of models that are sharded over the processes, beside what the weights gathered from them give."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ddp_runs import collectives, count_collectives
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from averaging import (
    BEMA,
    EMA,
    LAWA,
    SWA,
    SWAD,
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

STEPS = 6


class Net(nn.Module):
    """Shards of 16 and 15 rows and of 1 and 0, a tied weight and frozen ones; with two processes."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(6, 8)
        self.inner, self.outer, self.scale = nn.Linear(8, 31), nn.Linear(31, 8), nn.Linear(8, 1)
        self.head = nn.Linear(8, 6, bias=False)
        self.head.weight = self.tokens.weight
        self.inner.bias.requires_grad_(False)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.outer(self.inner(self.tokens(x)).tanh())
        return self.head(hidden * self.scale(hidden))


def fsdp(net: Net, **policy: Any) -> Net:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for part in (net.inner, net.outer, net):  # the embedding and the scale are the root's
        fully_shard(part, mesh=mesh, **policy)
    return net


def tensor_parallel(net: Net, mesh: Any = None) -> Net:
    """By rows and by columns, a bias in each process, the rest plain."""
    mesh = mesh or init_device_mesh("cpu", (distributed.get_world_size(),))
    plan = {"inner": ColwiseParallel(use_local_output=False), "outer": RowwiseParallel()}
    return parallelize_module(net, mesh, plan)


def batch(step: int, different: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    seed = 100 * step + (distributed.get_rank() if different else 0)
    x = torch.randint(6, (12,), generator=torch.Generator().manual_seed(seed))
    return x, (x * 5 + 1) % 6


def loss(net: Net, step: int, different: bool = True) -> torch.Tensor:
    x, y = batch(step, different)
    return nn.functional.cross_entropy(net(x).float(), y)


def gathered(net: nn.Module) -> dict[str, torch.Tensor]:
    """The whole trained weights, copied; every process takes part."""
    for part in net.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    with FullyShardedDataParallel.summon_full_params(net, writeback=False):  # which names them as the model does
        return {
            bare(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in net.named_parameters()
            if p.requires_grad
        }


def bare(name: str) -> str:
    """The name that a parameter has without wrappers."""
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name


def whole(net: nn.Module, weights: Any) -> dict[str, torch.Tensor]:
    """``weights``, this process's parts of ``net``'s, gathered."""
    parameters = {bare(name): p for name, p in net.named_parameters()}
    shapes = gathered(net) if isinstance(net, FullyShardedDataParallel) else {}
    out = {}
    for name, part in weights.items():
        like = parameters.get(name)  # FSDP1 may show it within another
        if isinstance(like, DTensor):
            part = DTensor.from_local(
                part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
            ).full_tensor()
        elif name in shapes:
            parts: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(parts, part)
            if any(other.shape != shapes[name].shape for other in parts):
                # In the order of the processes, unless each holds all.
                part = torch.cat(parts)[: shapes[name].numel()].view(shapes[name].shape)
        out[name] = part.clone()
    return out


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


class Watched(SWAD):
    """Of a loss that is least at step 2: its average begins there, and ends after step 6."""

    def update(self, model: Any, step: int | None = None, *, epoch: float | None = None) -> None:
        super().update(model, step, epoch=epoch)
        assert step is not None
        self.observe({"val_loss": 1 + abs(step - 2) / 20}, step)


def averagers(folder: Path) -> list[Averager]:
    return [
        LAWA(k=3, every=2, name="lawa-device", memory="device"),
        LAWA(k=3, every=2, name="lawa-cpu"),
        LAWA(k=3, every=2, name="lawa-disk", memory=folder / "ring"),
        EMA(0.8),
        EMA(0.8, compensated=True, name="ema-wide"),
        SWA(start=0, every=1),
        BEMA(every=2),
        Watched(2, 3, tolerance=1.05, name="swad"),
    ]


def further(folder: Path, suffix: str = "") -> list[Averager]:
    """Of one run in a trainer: each sees what those before it have written back."""
    return [
        Trajectory(folder / f"trail{suffix}", every=4),
        PostHocEMA(folder / f"tracks{suffix}", snapshots=4),
        SWA(start=2, every=1),
        BEMA(every=2),
        SWAD(1),
        ElasticReset(4, 0.8, moments="reset"),
        EMA(0.8, switch=3, name="switch"),
    ]


def replayed(references: list[Averager], recorded: dict[int, Any]) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
    """(step, name) → the average of that name after that step, given the weights ``recorded`` after each."""
    averages = {}
    for step, weights in recorded.items():
        for reference in references:
            reference.update(weights, step)
            average = reference.average() if reference.absorbed else {}
            averages[step, reference.name] = {name: tensor.clone() for name, tensor in average.items()}
    return averages


def logged_losses(trainer: Any) -> list[dict[str, float]]:
    """The losses of each evaluation that a trainer of transformers has logged."""
    return [
        {key: value for key, value in entry.items() if key.endswith("loss")}
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    ]


def beside_the_recorded(
    kept: list[Averager],
    folder: Path,
    before: dict[int, Any],
    after: dict[int, Any],
    losses: dict[int, float],
    put_together: Callable[[Any], dict[str, torch.Tensor]],
) -> dict[str, bool]:
    """Whether the `further` averages, and the weights ``after`` each step, are what those ``before`` it give."""
    references, right = further(folder, "-expected"), {}
    for step, weights in before.items():
        for reference in references:
            weights = reference.update(weights, step) or weights
        right[f"after step {step}"] = same(after[step], weights)
        for reference in references if step in losses else ():
            reference.observe({"val_loss": losses[step]}, step)
    for average, reference in zip(kept, references, strict=True):
        if average.views():
            right[average.name] = same(put_together(average.average()), reference.average())
    return right


def train(
    net: Net,
    kept: list[Averager] = (),  # type: ignore[assignment]
    look: Callable[[int], None] = lambda step: None,
    different: bool = True,
    start: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Any]:
    """Train ``net``; beside ``kept`` run averagers of what is gathered, and hold both together after every step."""
    optimizer = optimizer or torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.05)
    references = copy.deepcopy(list(kept))
    for trail in (reference.trail for reference in references if isinstance(reference, Trajectory | PostHocEMA)):
        trail.folder = trail.folder.with_name(f"{trail.folder.name}-expected")
    right: dict[str, bool] = {}
    written_back: list[tuple[int, str]] = []
    offer = [(average, reference) for average, reference in zip(kept, references, strict=True)]
    for step in range(start, STEPS + 1):
        if step > start or start:
            loss(net, step, different).backward()
            optimizer.step()
            optimizer.zero_grad()
        whole_weights = gathered(net)
        for average, reference in offer:
            restart = average.update(net, step)
            expected = reference.update(whole_weights, step)
            if restart is not None:
                written_back.append((step, average.name))
                load_into(net, restart)
                right[f"{average.name} goes on"] = same(gathered(net), expected)
            for rounded in (False, True) if average.ready else ():
                key = f"{average.name} {'rounded' if rounded else 'wide'}"
                value = whole(net, average.average(rounded=rounded))
                right[key] = right.get(key, True) and same(value, reference.average(rounded=rounded))
        look(step)
    return {"right": right, "written_back": written_back, "final": gathered(net)}


class Interrupted(Exception):
    """Of an evaluation in its middle."""


def evaluations(net: Net, kept: list[Averager], losses: dict[int, Any]) -> Callable[[int], None]:
    """Evaluate at steps 2 and 4 under averages, one within another, and break off in the middle of a forward pass."""

    def look(step: int) -> None:
        if step not in (2, 4):
            return
        with torch.no_grad():
            before = loss(net, 50, False)  # leaves the root gathered
            with applied(net, kept[1]):
                under = loss(net, 50, False)
                with applied(net, kept[3]):
                    inner = loss(net, 50, False)
                again = loss(net, 50, False)
            plain, expected = Net(net.tokens.weight.dtype), []
            for weights in (gathered(net), *(whole(net, kept[i].average(rounded=True)) for i in (1, 3))):
                load_into(plain, weights)
                expected.append(loss(plain, 50, False))
            losses[step] = ([before, under, inner, again, loss(net, 50, False)], expected)
        inner = getattr(net.inner, "_fsdp_wrapped_module", net.inner)
        forward = inner.forward
        for stop in (Interrupted, KeyboardInterrupt):

            def interrupt(x: torch.Tensor, stop: Any = stop) -> torch.Tensor:
                raise stop

            inner.forward = interrupt  # type: ignore[method-assign]
            try:
                with applied(net, kept[3]), torch.no_grad():
                    net(batch(50)[0])
            except stop:
                inner.forward = forward  # type: ignore[method-assign]

    return look


def beside_the_gathered(build: Callable[[], Net], folder: Path, different: bool) -> dict[str, Any]:
    """A run with averages and evaluations, beside one without."""
    kept, losses = averagers(folder), {}
    plain, net = train(build(), different=different)["final"], build()
    result = train(net, kept, evaluations(net, kept, losses), different)
    load_into(net, kept[1])
    return {
        **result,
        "untouched": same(result["final"], plain),
        "losses": losses,
        "loaded": same(gathered(net), whole(net, kept[1].average(rounded=True))),
        "names": [*named_weights(net)],
        "shapes": {name: list(tensor.shape) for name, tensor in kept[3].average().items()},
        "plain": all(type(tensor) is torch.Tensor for average in kept for tensor in average.average().values()),
    }


def core(folder: Path) -> dict[str, Any]:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    count_collectives()
    half = torch.bfloat16
    engines: dict[str, tuple[Callable[[], Net], bool]] = {
        "FSDP2": (lambda: fsdp(Net()), True),
        "FSDP2, bf16 weights": (lambda: fsdp(Net(half)), True),
        "FSDP2, bf16 policy": (lambda: fsdp(Net(), mp_policy=MixedPrecisionPolicy(param_dtype=half)), True),
        "FSDP2, gathered after forward": (lambda: fsdp(Net(), reshard_after_forward=False), True),
        "tensor parallel": (lambda: tensor_parallel(Net()), False),
    }
    results: dict[str, Any] = {"engines": {}}
    for name, (build, different) in engines.items():
        results["engines"][name] = beside_the_gathered(build, folder, different)
    results["write-backs"] = [
        train(fsdp(Net()), [average]) for average in (ElasticReset(4, 0.8), EMA(0.8, switch=4, name="switch"))
    ]

    # A reference that follows the policy, sharded alike.
    policy, other = fsdp(Net()), fsdp(Net())
    reference = Reference(EMAAnchor(0.3, every=2), policy, other)

    def follow(step: int) -> None:
        reference.update(step)
        with torch.no_grad():
            loss(other, step)

    anchor = EMAAnchor(0.3, every=2)
    train(policy, [anchor], follow)
    results["anchor"] = same(gathered(other), whole(policy, anchor.average()))

    # Frozen weights, a state that goes to where it came from.
    everything = EMA(0.8, frozen=True)
    everything.update(policy, 1)
    results["frozen"] = [*everything.average()]
    state = everything.state_dict()
    again = EMA(0.8, frozen=True)
    again.load_state_dict(state)
    results["restored"] = same(again.average(), everything.average())
    try:
        EMA(0.8, frozen=True).load_state_dict({**state, "process": [1 - rank, 2]})
    except ValueError as error:
        results["another's"] = str(error)
    results["collectives"] = collectives()
    return results


def state(net: Net, optimizer: torch.optim.Optimizer) -> list[Any]:
    """What this process has to keep to go on with training."""
    return copy.deepcopy([net.state_dict(), optimizer.state_dict()])


def goes_on(net: nn.Module, kept: list[Averager], references: list[Averager], seen: list[Any], steps: range) -> Any:
    """Train ``net``; whether the averages are those of the weights ``seen`` at each step before, and since then."""
    weights: list[dict[str, torch.Tensor]] = []
    plain = net.module if isinstance(net, DistributedDataParallel) else net
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05)
    for step in steps:
        loss(net, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        weights.append(gathered(plain))
        for average in kept:
            average.update(net, step)
    for reference in references:
        for step, values in enumerate([*seen, *weights]):
            reference.update(values, step)
    right = {a.name: same(whole(plain, a.average()), r.average()) for a, r in zip(kept, references, strict=True)}
    return {"weights": weights, "right": right}


def files(folder: Path) -> dict[str, Any]:
    """Save at step 3 and go on; read it again, as shards and whole."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    net, kept = fsdp(Net()), averagers(folder)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.05)
    whole_weights: list[dict[str, torch.Tensor]] = []
    saved: dict[str, Any] = {}

    def look(step: int) -> None:
        whole_weights.append(gathered(net))
        if step in (3, 5):
            for average in kept:
                average.save(folder / f"at-{step}" / average.name)
            saved[str(step)] = {average.name: whole(net, average.average()) for average in kept}
        if step == 3:
            saved["state"] = state(net, optimizer)
            save_whole(net, folder / "whole.safetensors", kept[1])

    trails = [Trajectory(folder / "trail", every=2), PostHocEMA(folder / "tracks", snapshots=2)]
    straight = train(net, [*kept, *trails], look, optimizer=optimizer)
    results: dict[str, Any] = {"saved": {step: saved[step] for step in ("3", "5")}}
    results["parts"] = [*kept[3].state_dict()["tensors"]["ema"]["inner.weight"].shape]
    results["ends"] = {average.name: whole(net, average.average()) for average in kept}

    # Everything anew, from the files.
    other = fsdp(Net())
    other.load_state_dict(saved["state"][0])
    optimizer = torch.optim.Adam([p for p in other.parameters() if p.requires_grad], lr=0.05)
    optimizer.load_state_dict(saved["state"][1])
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
    for average in again:
        average.save(folder / "again" / average.name)

    # What one process has saved.
    plain = [copy.deepcopy(average) for average in averagers(folder)]
    for average in plain:
        for step, weights in enumerate(whole_weights):
            average.update(weights, step)
        if rank == 0:
            average.save(folder / "plain" / average.name)
    distributed.barrier()
    shards = [average.load(folder / "plain" / average.name, net) for average in averagers(folder)]
    results["from plain"] = all(same(one.average(), two.average()) for one, two in zip(shards, kept, strict=True))

    # From FSDP2 to DDP and back, training on in each.
    plain = Net()
    load_into(plain, whole_weights[3])
    ddp = DistributedDataParallel(plain)
    on = [average.load(folder / "at-3" / average.name, ddp) for average in averagers(folder)]
    results["under DDP"] = goes_on(ddp, on, averagers(folder), whole_weights[:4], range(4, 6))
    if rank == 0:
        for average in on:
            average.save(folder / "under-DDP" / average.name)
    distributed.barrier()
    net, seen = fsdp(copy.deepcopy(plain)), [*whole_weights[:4], *results["under DDP"]["weights"]]
    on = [average.load(folder / "under-DDP" / average.name, net) for average in averagers(folder)]
    results["under FSDP2 again"] = goes_on(net, on, averagers(folder), seen, range(6, 9))

    # What cannot be written, and what is another model's.
    for name, attempt in {
        "no folder": lambda: kept[3].save(folder / "whole.safetensors" / "ema"),
        "no file": lambda: save_whole(net, folder / "at-3", kept[1]),
        "another": lambda: EMA(0.8).load(folder / "at-3" / "ema", fully_shard(nn.Sequential(nn.Linear(8, 30)))),
    }.items():
        try:
            attempt()
        except (OSError, ValueError, RuntimeError) as error:
            results[name] = f"{type(error).__name__}: {error}"
    return results


def four(folder: Path) -> dict[str, Any]:
    """On four processes: what two have saved, in other layouts; and those layouts beside what is gathered."""
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    saved = folder.parent / "shard_runs-files-2" / "at-3"
    count_collectives()
    layouts: dict[str, Callable[[], Net]] = {
        "FSDP2": lambda: fsdp(Net()),
        "FSDP2, replicated": lambda: fully_shard(Net(), mesh=mesh),
        "FSDP2 and tensor parallel": lambda: fully_shard(tensor_parallel(Net(), mesh["model"]), mesh=mesh["data"]),
    }
    results: dict[str, Any] = {"layouts": {}}
    for name, build in layouts.items():
        net, kept = build(), averagers(folder)
        result = train(net, kept, different=False)
        loaded = [average.load(saved / average.name, net) for average in averagers(folder)]
        results["layouts"][name] = {
            "right": result["right"],
            "loaded": {average.name: whole(net, average.average()) for average in loaded},
        }
    results["collectives"] = collectives()
    return results


# ---------------------------------------------------------------------- Lightning


def lightning(folder: Path) -> dict[str, Any]:
    import schedulefree
    import strategy_runs
    from lightning.pytorch.strategies import ModelParallelStrategy

    from averaging.lightning import AveragingCallback

    logging.disable(logging.INFO)

    class Module(strategy_runs.Module):
        def configure_model(self):
            if self.device_mesh is not None and not isinstance(self.net, FSDPModule):
                for part in (self.net[0], self.net[2], self.net):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

    class ScheduleFree(Module):
        """Switches its optimizer while the model holds what is validated."""

        def configure_optimizers(self):
            return schedulefree.AdamWScheduleFree(self.parameters(), lr=0.05)

        def on_train_epoch_start(self):
            self.optimizers().train()

        def on_validation_epoch_start(self):
            self.optimizers().eval()

    def strategy(**options: Any) -> dict[str, Any]:
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, **options)
        return {"accelerator": "cpu", "strategy": strategy}

    count_collectives()
    runs = strategy_runs.Runs(folder, strategy, module=Module)
    results = runs.all()
    undisturbed = runs.run("undisturbed", kind=ScheduleFree, limit_val_batches=0)[1].weights
    switching = AveragingCallback(EMA(0.8), evaluate="both", batchnorm=0)
    switched = runs.run("switched", switching, kind=ScheduleFree, num_sanity_val_steps=0)[1].weights
    results["schedule-free"] = [same(weights, undisturbed[step]) for step, weights in switched.items()]
    for held in ("online", "average"):
        results[f"from ddp, {held}"] = runs.from_ddp(held)
    more, after = further(folder / "further"), strategy_runs.Recorder(gathered)
    model, before, _ = runs.run("others", AveragingCallback(*more, evaluate="online"), after)
    results["further"] = beside_the_recorded(
        more, folder / "further", before.weights, after.weights, before.losses, lambda average: whole(model, average)
    )
    results["to ddp"] = runs.refused(
        AveragingCallback(*runs.kept()), folder / "straight" / "step=6.ckpt", **strategy_runs.DDP
    )
    average = AveragingCallback(EMA(0.8))
    results["whole files"] = runs.refused(average, **strategy(save_distributed_checkpoint=False))
    results["the average"] = runs.refused(AveragingCallback(EMA(0.8), checkpoint="average"))
    return results


# ---------------------------------------------------------------------- transformers


def transformers(folder: Path) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
    from transformers.distributed import DistributedConfig

    from averaging.transformers import AnchorCallback, AveragingCallback

    logging.disable(logging.WARNING)
    distributed.init_process_group("gloo")
    if distributed.get_rank() == 0:
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=18, hidden_size=8, intermediate_size=15, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, tie_word_embeddings=True,
            )
        ).save_pretrained(folder / "model")  # fmt: skip
    distributed.barrier()

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.weights: dict[int, Any] = {}

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.weights[state.global_step] = gathered(model)

    rows = torch.randint(18, (64, 6), generator=torch.Generator().manual_seed(1))
    examples = [{"input_ids": row, "labels": row} for row in rows]

    def run(name: str, *callbacks: Any, resume: str | None = None, **options: Any) -> tuple[Any, Recorder, Trainer]:
        model = LlamaForCausalLM.from_pretrained(
            folder / "model", distributed_config=DistributedConfig(fsdp_size=2), dtype=torch.float32
        )
        recorder = Recorder()
        arguments = TrainingArguments(
            **{
                "output_dir": str(folder / name), "max_steps": 8, "per_device_train_batch_size": 2, "save_steps": 3,
                "eval_steps": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant", "seed": 1, "use_cpu": True,
                "report_to": "none", "disable_tqdm": True, "logging_steps": 100, "save_only_model": True,
                "eval_strategy": "steps" if callbacks else "no", "gradient_accumulation_steps": 2, **options,
            }
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=arguments, train_dataset=examples[:48], eval_dataset=examples[48:],
            callbacks=[recorder, *callbacks],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model, recorder, trainer

    def kept() -> list[Averager]:
        return [LAWA(k=3, every=2, memory=folder / "ring"), EMA(0.8)]

    count_collectives()
    plain, _, _ = run("plain", save_strategy="no")
    straight = kept()
    model, recorder, trainer = run("straight", AveragingCallback(*straight, evaluate="all"))
    references = kept()
    expected = replayed(references, recorder.weights)
    last = {average.name: whole(model, average.average()) for average in straight}
    results: dict[str, Any] = {
        "averages": all(same(last[reference.name], reference.average()) for reference in references),
        "collectives": collectives(),
        "holds": same(gathered(model), last["lawa"]),
        "history": logged_losses(trainer),
        "at 6": {name: expected[6, name] for name in ("lawa", "ema")},
        "online at 6": recorder.weights[6],
        "online": same(gathered(plain), recorder.weights[8]),
    }
    state = [average.load(folder / "straight" / "checkpoint-6" / average.name, model) for average in kept()]
    results["state"] = [same(whole(model, average.average()), expected[6, average.name]) for average in state]

    more, after = further(folder), Recorder()
    model, before, trainer = run("further", AveragingCallback(*more, evaluate="online"), after, save_strategy="no")
    start = {0: gathered(LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32))}
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    results["further"] = beside_the_recorded(
        more, folder, start | before.weights, start | after.weights, losses, lambda average: whole(model, average)
    )

    for name, callback, options in (
        ("best", AveragingCallback(EMA(0.8)), {"load_best_model_at_end": True, "save_steps": 2}),
        ("resume", AveragingCallback(*kept()), {"resume": str(folder / "straight" / "checkpoint-6")}),
        ("anchor", AnchorCallback(EMAAnchor(0.3)), {"eval_strategy": "no"}),
    ):
        try:
            run(name, callback, **options)
        except ValueError as error:
            results[name] = str(error)
    return results
