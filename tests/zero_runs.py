"""Runs under DeepSpeed ZeRO, beside what the float32 weights gathered from the processes give."""

# ruff: noqa: E402
from __future__ import annotations

import copy
import gc
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
warnings.filterwarnings("ignore", "torch.distributed.*is deprecated", FutureWarning)

import deepspeed
import torch
from ddp_runs import collectives, count_collectives
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file
from shard_runs import (
    STEPS,
    Interrupted,
    Net,
    averagers,
    batch,
    beside_the_recorded,
    fsdp,
    further,
    logged_losses,
    loss,
    replayed,
    same,
)
from shard_runs import whole as whole_of_shards
from torch import distributed, nn

from averaging import (
    EMA,
    LAWA,
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
from averaging.weights import Binding

# stage, bf16, further settings
ENGINES: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "ZeRO-1, bf16": (1, True, {}),
    "ZeRO-1, bf16, float32 gradients": (1, True, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "ZeRO-2, fp32": (2, False, {}),
    "ZeRO-2, bf16": (2, True, {"gradient_accumulation_steps": 2}),
    "ZeRO-3, fp32": (3, False, {}),
    "ZeRO-3, bf16": (3, True, {"zero_optimization": {"stage3_param_persistence_threshold": 0}}),
    "ZeRO-2, bf16, offloaded": (2, True, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
    "ZeRO-3, bf16, offloaded": (
        3, True, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}
    ),
}  # fmt: skip


def prepare() -> None:
    # Compiling it takes longer than all the rest. (deepspeed.comm.torch is torch itself.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    logging.disable(logging.WARNING)
    gc.freeze()  # DeepSpeed collects garbage at every turn


def start() -> None:
    prepare()
    deepspeed.init_distributed("gloo")


def settings(stage: int, bf16: bool, more: dict[str, Any] = {}) -> dict[str, Any]:  # noqa: B006
    return {
        "train_micro_batch_size_per_gpu": 12,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **more,
        "zero_optimization": {"stage": stage, **more.get("zero_optimization", {})},
    }


def initialize(net: nn.Module, settings: dict[str, Any]) -> Any:
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.05)
    return deepspeed.initialize(model=net, optimizer=optimizer, config=settings)[0]


def build(name: str) -> Any:
    stage, bf16, more = ENGINES[name]
    return initialize(Net(torch.bfloat16 if bf16 else torch.float32), settings(stage, bf16, more))


def gathered(engine: Any) -> dict[str, torch.Tensor]:
    """The whole trained weights in float32, put together by DeepSpeed."""
    return {
        name: safe_get_full_fp32_param(p).view(getattr(p, "ds_shape", p.shape)).detach().clone()
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }


def whole(engine: Any, weights: Any) -> dict[str, torch.Tensor]:
    """``weights``, this process's parts of ``engine``'s, put together as they lie in its parameters."""
    like = Binding(engine).tensors
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, {name: (like[name].offset, part) for name, part in weights.items()})
    out = {name: torch.zeros(like[name].shape, dtype=part.dtype) for name, part in weights.items()}
    for parts in everyone:
        for name, (offset, piece) in parts.items():
            out[name].view(-1)[offset : offset + len(piece)] = piece
    return out


def advance(engine: Any, step: int) -> None:
    for part in range(engine.gradient_accumulation_steps()):
        engine.backward(loss(engine, step + 1000 * part))
        engine.step()


def train(engine: Any, kept: Any = (), look: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """Train; beside ``kept`` run averagers of what is gathered, and hold both together after every step."""
    references = copy.deepcopy(list(kept))
    for trail in (reference.trail for reference in references if isinstance(reference, Trajectory | PostHocEMA)):
        trail.folder = trail.folder.with_name(f"{trail.folder.name}-expected")
    right: dict[str, bool] = {}
    for step in range(STEPS + 1):
        if step:
            advance(engine, step)
        whole_weights = gathered(engine)
        for average, reference in zip(kept, references, strict=True):
            # The engine, or the model inside of it, of which trainers' callbacks know.
            restart, expected = average.update(engine.module, step), reference.update(whole_weights, step)
            if restart is not None:
                load_into(engine, restart)
                right[f"{average.name} goes on at {step}"] = same(gathered(engine), expected)
            for rounded in (False, True) if average.ready else ():
                key = f"{average.name} {'rounded' if rounded else 'wide'}"
                value = whole(engine, average.average(rounded=rounded))
                right[key] = right.get(key, True) and same(value, reference.average(rounded=rounded))
        look(step)
    return {"right": right, "final": gathered(engine)}


def evaluations(engine: Any, kept: list[Averager], losses: dict[int, Any]) -> Callable[[int], None]:
    """Evaluate at steps 2 and 4 under averages, one within another, and break off in the middle of a forward pass."""

    def look(step: int) -> None:
        if step not in (2, 4):
            return
        with torch.no_grad():
            before = loss(engine, 50, False)
            with applied(engine, kept[1]):
                under = loss(engine, 50, False)
                with applied(engine, kept[3]):
                    inner = loss(engine, 50, False)
                again = loss(engine, 50, False)
            plain, expected = Net(next(engine.module.parameters()).dtype), []
            for weights in (gathered(engine), *(whole(engine, kept[i].average()) for i in (1, 3))):
                load_into(plain, weights)
                expected.append(loss(plain, 50, False))
            losses[step] = ([before, under, inner, again, loss(engine, 50, False)], expected)
        forward = engine.module.inner.forward
        for stop in (Interrupted, KeyboardInterrupt):
            alone = stop is Interrupted and engine.zero_optimization_stage() < 3  # which gathers nothing there

            def interrupt(x: torch.Tensor, stop: Any = stop, alone: bool = alone) -> torch.Tensor:
                if alone and distributed.get_rank():
                    return forward(x)
                raise stop

            engine.module.inner.forward = interrupt
            try:
                with applied(engine, kept[3]), torch.no_grad():
                    engine(batch(50)[0])
            except stop:
                pass
            engine.module.inner.forward = forward

    return look


def loops(folder: Path) -> dict[str, Any]:
    start()
    return {"core": core(folder), "files": files(folder)}


def core(folder: Path) -> dict[str, Any]:
    count_collectives()
    results: dict[str, Any] = {"engines": {}}
    for name in ENGINES:
        kept, losses = averagers(folder), {}
        plain, engine = train(build(name))["final"], build(name)
        result = train(engine, kept, evaluations(engine, kept, losses))
        load_into(engine, kept[1])
        with torch.no_grad():
            loaded = loss(engine, 50, False)
            with applied(engine, kept[1]):
                loaded = [loaded, loss(engine, 50, False)]
        results["engines"][name] = {
            **result,
            "untouched": same(result["final"], plain),
            "losses": losses,
            "loaded": same(gathered(engine), whole(engine, kept[1].average())) and torch.equal(*loaded),
            "names": [*named_weights(engine)],
            "optimizer": type(engine.optimizer).__name__,
            "shapes": {name: list(tensor.shape) for name, tensor in kept[3].average().items()},
        }
    results["write-backs"] = {}
    for name in ("ZeRO-2, bf16", "ZeRO-3, bf16"):
        for average in (ElasticReset(4, 0.8), EMA(0.8, switch=4, name="switch")):
            engine, plain, reached = build(name), Net(torch.bfloat16), []

            def look(step: int, engine: Any = engine, plain: Net = plain, reached: list[bool] = reached) -> None:
                load_into(plain, gathered(engine))
                with torch.no_grad():
                    reached.append(torch.allclose(loss(engine, 50, False), loss(plain, 50, False)))

            result = train(engine, [average], look)
            results["write-backs"][f"{average.name}, {name}"] = [result["right"], reached]
    results["counted"] = {accumulation: counted(accumulation) for accumulation in (1, 2)}
    results["references"] = {
        name: follows(build(name), reference())
        for name, reference in {
            "ZeRO-1, bf16": bare_engine,
            "ZeRO-2, bf16": lambda: Net(torch.bfloat16),
            "ZeRO-3, bf16": bare_engine,
            "ZeRO-3, fp32": lambda: Net(torch.bfloat16),
            "ZeRO-2, fp32": lambda: build("ZeRO-1, bf16"),
        }.items()
    }
    results["collectives"] = collectives()

    everything = EMA(0.8, frozen=True)
    everything.update(engine, 1)
    results["frozen"] = {name: list(tensor.shape) for name, tensor in everything.average().items()}

    # An engine that takes the model over after it was averaged; and what cannot be averaged.
    net = Net()
    early = EMA(0.8)
    early.update(net, 1)
    plain = initialize(Net(), settings(0, False))
    results["stage 0"] = [list(tensor.shape) for tensor in named_weights(plain).values()]
    for key, attempt in {
        "taken over": lambda: [initialize(net, settings(2, False)), early.update(net, 2)],
        "16 bits": lambda: named_weights(initialize(Net(torch.bfloat16), settings(0, True))),
        "no optimizer": lambda: named_weights(bare_engine().module),
    }.items():
        try:
            attempt()
        except ValueError as error:
            results[key] = str(error)
    alone = [distributed.new_group([rank]) for rank in range(2)][distributed.get_rank()]
    for owner, key, value in (
        (engine.optimizer, "swap_optimizer", True),
        (engine.optimizer, "zero_hpz_partition_size", 2),
        (engine.module.outer.weight, "ds_process_group", alone),
    ):
        usual = getattr(owner, key)
        setattr(owner, key, value)
        try:
            named_weights(engine)
        except ValueError as error:
            results[key] = str(error)
        setattr(owner, key, usual)
    return results


def bare_engine() -> Any:
    """As TRL prepares reference models."""
    return deepspeed.initialize(model=Net(torch.bfloat16), config=settings(3, True))[0]


def follows(policy: Any, model: nn.Module) -> list[bool]:
    """Whether a reference ``model`` holds after each step what the gathered weights give, and computes with it."""
    reference, expected, plain = Reference(EMAAnchor(0.3, every=2), policy, model), EMAAnchor(0.3, every=2), Net()
    expected.update({name: tensor.float() for name, tensor in visible(model).items()}, 0)
    right = []
    for step in range(1, STEPS + 1):
        advance(policy, step)
        reference.update(step)
        expected.update(gathered(policy), step)
        dtype = next(model.parameters()).dtype
        right.append(same(visible(model), {name: part.to(dtype) for name, part in expected.average().items()}))
        load_into(plain.to(dtype), expected)
        with torch.no_grad():
            right.append(torch.equal(loss(model, 50, False), loss(plain, 50, False)))
    return right


def visible(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole weights that ``model`` computes with, of those that a policy trains."""
    inner = getattr(model, "module", model)
    with deepspeed.zero.GatheredParameters([p for p in inner.parameters() if hasattr(p, "ds_id")]):
        return {name: p.detach().clone() for name, p in inner.named_parameters() if name != "inner.bias"}


def counted(accumulation: int) -> list[Any]:
    """Offer a float16 engine after each batch, of which those of the third step overflow."""
    get_accelerator().is_fp16_supported = lambda: True
    more = {"fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}}
    accumulating = {"gradient_accumulation_steps": accumulation}
    engine = initialize(Net(torch.float16), settings(2, False, {**more, **accumulating}))
    average, expected = EMA(0.8), EMA(0.8)
    for batch_number in range(1, STEPS * accumulation + 1):
        overflows = (batch_number - 1) // accumulation == 2
        engine.backward(loss(engine, batch_number) * (torch.inf if overflows else 1))
        engine.step()
        average.update(engine)
        if engine.was_step_applied():
            expected.update(gathered(engine))
    return [engine.skipped_steps, average.step, same(whole(engine, average.average()), expected.average())]


def files(folder: Path) -> dict[str, Any]:
    """Save at step 3 and go on; read it again in the same layout, in others and from a single process."""
    results: dict[str, Any] = {}
    for name in ("ZeRO-2, bf16", "ZeRO-3, bf16"):
        place = folder / name[:6]
        engine, kept = build(name), averagers(folder)
        whole_weights: list[dict[str, torch.Tensor]] = []
        saved: dict[int, Any] = {}

        def look(step: int, engine: Any = engine, kept: Any = kept, place: Path = place, all_: Any = whole_weights,
                 saved: Any = saved) -> None:  # fmt: skip
            all_.append(gathered(engine))
            if step in (3, 5):
                for average in kept:
                    average.save(place / f"at-{step}" / average.name)
                saved[step] = {average.name: whole(engine, average.average()) for average in kept}
            if step == 3:
                engine.save_checkpoint(place / "engine")
                save_whole(engine, place / "whole.safetensors", kept[1])

        trails = [Trajectory(place / "trail", every=2), PostHocEMA(place / "tracks", snapshots=2)]
        straight = train(engine, [*kept, *trails], look)
        result = results[name[:6]] = {"saved": saved[3]}

        other = build(name)
        other.load_checkpoint(place / "engine")
        again = [average.load(place / "at-3" / average.name, other) for average in averagers(folder)]
        for step in range(4, STEPS + 1):
            advance(other, step)
            for average in again:
                average.update(other, step)
        result["resumed"] = same(gathered(other), straight["final"]) and all(
            same(one.average(), two.average()) and one.step == two.step for one, two in zip(kept, again, strict=True)
        )
        for average in again:
            average.save(place / "again" / average.name)

        result["other layouts"] = {}
        for layout in ("ZeRO-1, bf16", "ZeRO-2, fp32", "ZeRO-3, fp32"):
            other = build(layout)
            loaded = [average.load(place / "at-5" / average.name, other) for average in averagers(folder)]
            result["other layouts"][layout] = all(same(whole(other, a.average()), saved[5][a.name]) for a in loaded)
        net = fsdp(Net())
        loaded = [average.load(place / "at-5" / average.name, net) for average in averagers(folder)]
        result["other layouts"]["FSDP2"] = all(
            same(whole_of_shards(net, a.average()), saved[5][a.name]) for a in loaded
        )
        for average in loaded:
            average.save(place / "FSDP2" / average.name)
        back = [average.load(place / "FSDP2" / average.name, engine) for average in averagers(folder)]
        result["other layouts"]["and back"] = all(same(whole(engine, a.average()), saved[5][a.name]) for a in back)

        plain = averagers(folder)
        for average in plain:
            for step, weights in enumerate(whole_weights):
                average.update(weights, step)
            if distributed.get_rank() == 0:
                average.save(place / "plain" / average.name)
        distributed.barrier()
        parts = [average.load(place / "plain" / average.name, engine) for average in averagers(folder)]
        result["from plain"] = all(same(one.average(), two.average()) for one, two in zip(parts, kept, strict=True))
        try:
            EMA(0.8).load(place / "at-3" / "ema", initialize(nn.Sequential(nn.Linear(8, 30)), settings(3, False)))
        except ValueError as error:
            result["another"] = str(error)
    return results


def four(folder: Path) -> dict[str, Any]:
    """On four processes: what two have saved, and what they save themselves."""
    start()
    saved = folder.parent / "zero_runs-loops-2"
    results: dict[str, Any] = {}
    for name in ("ZeRO-2, bf16", "ZeRO-3, bf16"):
        place, engine = name[:6], build(name)
        results[place] = {}
        for average in averagers(folder):
            average.load(saved / place / "at-3" / average.name, engine).save(folder / place / average.name)
            results[place][average.name] = whole(engine, average.average())
            average.update(engine, 4)
    return results


def anchors(folder: Path) -> dict[str, Any]:
    """References of TRL's trainers: whole beside stage 2 in bfloat16, partitioned beside stage 3 in float32."""
    from accelerate.state import AcceleratorState
    from test_anchors import save_policy, trainer, word_tokenizer
    from transformers import TrainerCallback

    from averaging import transformers

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.policy: dict[int, Any] = {}
            self.reference: dict[int, Any] = {}

        def on_step_end(self, args, state, control, **kwargs):
            self.policy[state.global_step] = gathered(self.trainer.deepspeed)
            self.reference[state.global_step] = visible(self.trainer.ref_model)

    def run(kind: str, stage: int, resume: str | None = None, **options: Any) -> Recorder:
        AcceleratorState._reset_state(True)
        recorder = Recorder()
        deepspeed = {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "bf16": {"enabled": "auto"}, "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        }  # fmt: skip
        callbacks = [transformers.EMAAnchor(0.3, every=3), recorder]
        recorder.trainer = trainer(
            kind, str(folder / "policy"), word_tokenizer(), folder / kind, callbacks,
            deepspeed=deepspeed, max_steps=6, save_steps=2, **options,
        )  # fmt: skip
        recorder.trainer.train(resume_from_checkpoint=resume)
        return recorder

    if distributed.get_rank() == 0:
        save_policy(folder / "policy")
    distributed.barrier()
    results: dict[str, Any] = {}
    for kind, stage, options in (("dpo", 2, {"bf16": True}), ("grpo", 3, {})):
        straight = run(kind, stage, **options)
        expected, right = EMAAnchor(0.3, every=3), []
        dtype = next(straight.trainer.ref_model.parameters()).dtype
        start = load_file(folder / "policy" / "model.safetensors")
        expected.update({name: tensor.to(dtype).float() for name, tensor in start.items()}, 0)
        for step, weights in straight.policy.items():
            expected.update(weights, step)
            average = {name: tensor.to(dtype) for name, tensor in expected.average().items()}
            right.append(same(straight.reference[step], average))
        resumed = run(kind, stage, resume=str(folder / kind / "checkpoint-2"), **options)
        again = [*resumed.policy] == [3, 4, 5, 6] and all(
            same(resumed.policy[step], straight.policy[step])
            and same(resumed.reference[step], straight.reference[step])
            for step in resumed.policy
        )
        results[kind] = {"right": right, "resumed": again, "dtype": str(dtype)}
    return results


def transformers(folder: Path) -> dict[str, Any]:
    """transformers.Trainer with accelerate's DeepSpeed: stage 2 in bfloat16, stages 1 and 3 in float32."""
    from accelerate.state import AcceleratorState
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from averaging.transformers import AveragingCallback

    start()
    rows = torch.randint(18, (64, 6), generator=torch.Generator().manual_seed(1))
    examples = [{"input_ids": row, "labels": row} for row in rows]

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.weights: dict[int, Any] = {}

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.start = gathered_of(model)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.weights[state.global_step] = gathered_of(model)

    def gathered_of(model: nn.Module) -> dict[str, torch.Tensor]:
        return {
            name: safe_get_full_fp32_param(p).view(getattr(p, "ds_shape", p.shape)).detach().clone()
            for name, p in model.named_parameters()
        }

    def run(name: str, *callbacks: Any, stage: int, resume: Any = None, **options: Any) -> tuple[Any, Recorder, Any]:
        AcceleratorState._reset_state(True)
        settings = {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "bf16": {"enabled": "auto"}, "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": stage, "stage3_gather_16bit_weights_on_model_save": options.pop("gather", True)
            },
        }  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=18, hidden_size=8, intermediate_size=15, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, tie_word_embeddings=True,
            )
        )  # fmt: skip
        recorder = Recorder()
        arguments = TrainingArguments(
            **{
                "output_dir": str(folder / name), "max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 3,
                "eval_steps": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant", "seed": 1, "use_cpu": True,
                "report_to": "none", "disable_tqdm": True, "logging_steps": 100, "bf16": stage == 2,
                "eval_strategy": "steps" if callbacks else "no", "gradient_accumulation_steps": 2,
                "deepspeed": settings, **options,
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

    def put_together(model: nn.Module, average: Averager) -> dict[str, torch.Tensor]:
        return whole(model, average.average())

    # What four processes have saved, in two.
    results: dict[str, Any] = {"from four": {}}
    for name in ("ZeRO-2, bf16", "ZeRO-3, bf16"):
        engine, saved = build(name), folder.parent / "zero_runs-four-4" / name[:6]
        loaded = [average.load(saved / average.name, engine) for average in averagers(folder)]
        results["from four"][name[:6]] = {average.name: whole(engine, average.average()) for average in loaded}

    count_collectives()
    for stage in (1, 2, 3):
        _, undisturbed, _ = run(f"plain-{stage}", stage=stage, save_strategy="no")
        straight, again, references = kept(), kept(), kept()
        model, recorder, trainer = run(f"straight-{stage}", AveragingCallback(*straight, evaluate="all"), stage=stage)
        expected = replayed(references, recorder.weights)
        last = {average.name: put_together(model, average) for average in straight}
        result = results[str(stage)] = {
            "averages": all(same(last[reference.name], reference.average()) for reference in references),
            "holds": same(gathered_of(model), last["lawa"]),
            "online": recorder.weights.keys() == undisturbed.weights.keys()
            and all(same(weights, undisturbed.weights[step]) for step, weights in recorder.weights.items()),
            "history": logged_losses(trainer),
            "at 6": {name: expected[6, name] for name in ("lawa", "ema")} | {"online": recorder.weights[6]},
        }
        checkpoint = folder / f"straight-{stage}" / "checkpoint-3"
        _, resumed, _ = run(f"straight-{stage}", AveragingCallback(*again, evaluate="all"), stage=stage,
            resume=str(checkpoint))  # fmt: skip
        result["resumed"] = [
            [*resumed.weights] == [4, 5, 6],
            all(same(weights, recorder.weights[step]) for step, weights in resumed.weights.items()),
            all(same(one.average(), two.average()) for one, two in zip(straight, again, strict=True)),
        ]
    results["collectives"] = collectives()

    results["further"] = {}
    for stage in (2, 3):
        more, after, place = further(folder / f"further-{stage}"), Recorder(), folder / f"further-{stage}"
        callbacks = (AveragingCallback(*more, evaluate="online"), after)
        model, before, trainer = run(place.name, *callbacks, stage=stage, save_strategy="no", max_steps=5)
        losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
        results["further"][stage] = beside_the_recorded(
            more, place, {0: before.start} | before.weights, {0: after.start} | after.weights, losses,
            lambda average, model=model: whole(model, average),
        )  # fmt: skip

    # The average in the checkpoint's own file, and the best.
    average, options = LAWA(k=3, every=2), {"stage": 2, "save_steps": 2, "load_best_model_at_end": True}
    model, recorder, trainer = run("best", AveragingCallback(average, checkpoint="average"), **options)
    best, reference = int(trainer.state.best_model_checkpoint.rsplit("-")[-1]), LAWA(k=3, every=2)
    for step in range(1, best + 1):
        reference.update(recorder.weights[step], step)
    results["best"] = [best, same(gathered_of(model), reference.average())]
    again = AveragingCallback(LAWA(k=3, every=2), checkpoint="average")
    _, resumed, _ = run("best", again, resume=str(folder / "best" / "checkpoint-4"), **options)
    results["resumed beside the average"] = [*resumed.weights] == [5, 6] and all(
        same(weights, recorder.weights[step]) for step, weights in resumed.weights.items()
    )
    try:
        run("not gathered", AveragingCallback(EMA(0.8)), stage=3, gather=False)
    except ValueError as error:
        results["not gathered"] = str(error)
    if importlib.util.find_spec("trl") is not None:
        results["anchors"] = anchors(folder)
    return results
