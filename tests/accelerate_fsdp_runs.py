"""Runs under accelerate's FSDP2, beside what the gathered weights give.

Where there are no GPUs accelerate would leave its FSDP out. It does so in a single place, by the kind of the processes:
they call themselves processes with GPUs here, and all of accelerate's code for FSDP2 runs, on CPUs.
"""

from __future__ import annotations

import functools
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from ddp_runs import collectives, count_collectives
from shard_runs import (
    STEPS,
    Interrupted,
    Net,
    averagers,
    beside_the_gathered,
    gathered,
    logged_losses,
    loss,
    same,
    whole,
)
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from averaging import EMA, LAWA, ElasticReset, EMAAnchor, Trajectory, latest_complete
from averaging.averager import Averager

KINDS = {"SHARDED_STATE_DICT": True, "FULL_STATE_DICT": False}
"""How accelerate saves → whether it computes in bf16."""


def start() -> None:
    logging.disable(logging.WARNING)
    init = PartialState.__init__

    @functools.wraps(init)
    def begin(self: PartialState, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin  # type: ignore[method-assign]
    distributed.init_process_group("gloo")
    count_collectives()


# ---------------------------------------------------------------------- loops


def prepared(
    kind: str = "SHARDED_STATE_DICT", wrap: str = "size_based_wrap", **options: Any
) -> tuple[Accelerator, Net, torch.optim.Optimizer]:
    AcceleratorState._reset_state(True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type=kind, auto_wrap_policy=wrap, min_num_params=100
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, **options)
    net = Net()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.05)
    return accelerator, *accelerator.prepare(net, optimizer)


def loops(folder: Path) -> dict[str, Any]:
    start()
    engines: dict[str, dict[str, Any]] = {
        "FSDP2": {},
        "FSDP2, bf16": {"mixed_precision": "bf16"},
        "FSDP2, compiled": {"dynamo_backend": "eager", "wrap": "no_wrap"},
    }
    results: dict[str, Any] = {"engines": {}}
    for name, options in engines.items():
        build = functools.partial(lambda options: prepared(**options)[1], options)
        results["engines"][name] = beside_the_gathered(build, folder, different=True)
        net, average = build(), EMA(0.8)
        with torch.no_grad():
            loss(net, 50)  # leaves the root gathered
        average.update(net, 1)
        weights = gathered(net)
        results["engines"][name]["after an evaluation"] = same(whole(net, average.average()), weights)

    for kind in KINDS:
        run: list[Any] = []
        for first in (0, 4):
            accelerator, net, optimizer = prepared(kind, mixed_precision="bf16" if KINDS[kind] else "no")
            kept = averagers(folder / kind)
            for average in kept:
                accelerator.register_save_state_pre_hook(lambda _, __, out, a=average: a.save(f"{out}/{a.name}"))
                accelerator.register_load_state_pre_hook(
                    lambda _, out, a=average, net=net: a.load(f"{out}/{a.name}", net)
                )
            if first:
                accelerator.load_state(folder / kind / "at-3")
            for step in range(first, STEPS + 1):
                if step:
                    accelerator.backward(loss(net, step))
                    optimizer.step()
                    optimizer.zero_grad()
                for average in kept:
                    average.update(accelerator.unwrap_model(net), step)
                if step == 3:
                    accelerator.save_state(folder / kind / "at-3")
            run.append([gathered(net), {average.name: whole(net, average.average()) for average in kept}])
        (weights, averages), (weights_again, averages_again) = run
        results[kind] = [same(weights, weights_again)] + [same(averages[a], averages_again[a]) for a in averages]
    results["sharded"] = [isinstance(net, FSDPModule), accelerator.is_fsdp2]
    results["collectives"] = collectives()
    return results


# ---------------------------------------------------------------------- transformers


def transformers(folder: Path) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from averaging.transformers import AnchorCallback, AveragingCallback

    start()
    rows = torch.randint(18, (64, 6), generator=torch.Generator().manual_seed(1))
    examples = [{"input_ids": row, "labels": row} for row in rows]

    class Recorder(TrainerCallback):
        """Keeps the weights of each step, and breaks evaluations off in the middle after step 5."""

        trainer: Any = None

        def __init__(self) -> None:
            self.weights: dict[int, Any] = {}

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.start = gathered(model)
            self.sharded = all(
                isinstance(parameter, DTensor) and parameter.dtype == torch.float32
                for parameter in model.parameters()
                if parameter.requires_grad
            )

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.weights[state.global_step] = gathered(model)
            if state.global_step != 5 or args.eval_strategy == "no":
                return
            inner = next(part for name, part in model.named_modules() if "layers.1." in name and name.endswith(".mlp"))
            for stop in (Interrupted, KeyboardInterrupt):

                def interrupt(*args: Any, stop: Any = stop) -> None:
                    raise stop

                hook = inner.register_forward_pre_hook(interrupt)
                try:
                    self.trainer.evaluate()
                except stop:
                    hook.remove()

    def model_of(dtype: torch.dtype) -> LlamaForCausalLM:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=18, hidden_size=8, intermediate_size=15, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, tie_word_embeddings=True,
            )
        ).to(dtype)  # fmt: skip
        model.model.layers[0].mlp.gate_proj.requires_grad_(False)
        return model

    def run(
        name: str, *callbacks: Any, kind: str = "SHARDED_STATE_DICT", resume: Any = None, lora: bool = False,
        fsdp: Any = None, **options: Any,
    ) -> tuple[Any, Recorder, Any]:  # fmt: skip
        model: Any = model_of(torch.bfloat16 if KINDS[kind] else torch.float32)
        if lora:
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
        recorder = Recorder()
        arguments = TrainingArguments(
            **{
                "output_dir": str(folder / name), "max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 3,
                "eval_steps": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant", "seed": 1, "use_cpu": True,
                "report_to": "none", "disable_tqdm": True, "logging_steps": 100, "bf16": KINDS[kind],
                "eval_strategy": "steps" if callbacks else "no", "gradient_accumulation_steps": 2, "fsdp": True,
                "fsdp_config": {"version": 2, "state_dict_type": kind, **(fsdp or {})}, **options,
            }
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=arguments, train_dataset=examples[:48], eval_dataset=examples[48:],
            callbacks=[recorder, *callbacks],
        )  # fmt: skip
        recorder.trainer = trainer
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model, recorder, trainer

    def kept() -> list[Averager]:
        return [LAWA(k=3, every=2, memory=folder / "ring"), EMA(0.8)]

    def goes_as(one: Recorder, other: Recorder, first: int = 1) -> bool:
        return [*one.weights] == [*range(first, 7)] and all(
            same(weights, other.weights[step]) for step, weights in one.weights.items()
        )

    def averaged(average: Averager, recorder: Recorder, upto: int = 6) -> dict[str, torch.Tensor]:
        for step in range(1, upto + 1):
            average.update(recorder.weights[step], step)
        return {name: tensor.clone() for name, tensor in average.average().items()}

    results: dict[str, Any] = {}
    for kind in KINDS:
        _, undisturbed, _ = run(f"plain-{kind}", kind=kind, save_strategy="no")
        straight, again = kept(), kept()
        model, recorder, trainer = run(f"straight-{kind}", AveragingCallback(*straight, evaluate="all"), kind=kind)
        expected = {average.name: averaged(average, recorder) for average in kept()}
        result = results[kind] = {
            "sharded": recorder.sharded,
            "averages": {average.name: same(whole(model, average.average()), expected[average.name])
                for average in straight},
            "shape": [*straight[1].average()["model.layers.1.mlp.up_proj.weight"].shape],
            "holds": same(gathered(model), expected["lawa"]),
            "online": goes_as(recorder, undisturbed),
            "history": logged_losses(trainer),
            "at 6": {**expected, "online": recorder.weights[6]},
        }  # fmt: skip
        _, resumed, _ = run(
            f"resumed-{kind}", AveragingCallback(*again, evaluate="all"), kind=kind,
            resume=str(folder / f"straight-{kind}" / "checkpoint-3"),
        )  # fmt: skip
        result["resumed"] = [
            goes_as(resumed, recorder, 4),
            *(same(one.average(), two.average()) for one, two in zip(straight, again, strict=True)),
        ]

        # The average in the checkpoint's own place, the best one at the end, older checkpoints deleted.
        options = {"save_steps": 2, "eval_delay": 3, "load_best_model_at_end": True, "save_total_limit": 2}
        callback = AveragingCallback(LAWA(k=3, every=2), checkpoint="average")
        model, recorder, trainer = run(f"best-{kind}", callback, kind=kind, **options)
        best = averaged(LAWA(k=3, every=2), recorder, 4)
        result["best"] = [Path(trainer.state.best_model_checkpoint).name, same(gathered(model), best)]
        result["measured"] = [trainer.evaluate()["eval_loss"], trainer.state.best_metric]
        result["at 4"] = {"": best, "online": recorder.weights[4]}

        # The newest that is whole is resumed from.
        broken = folder / f"broken-{kind}"
        if distributed.get_rank() == 0:
            shutil.copytree(folder / f"best-{kind}", broken)
            optimizer = next((broken / "checkpoint-6").glob("optimizer*"))
            (optimizer / "__1_0.distcp" if optimizer.is_dir() else optimizer).write_bytes(b"")
        distributed.barrier()
        result["whole"] = str(latest_complete(broken))
        callback = AveragingCallback(LAWA(k=3, every=2), checkpoint="average")
        _, resumed, _ = run(f"broken-{kind}", callback, kind=kind, resume=True, **options)
        result["resumed from the newest that is whole"] = goes_as(resumed, recorder, 5)

    # An adapter; a compiled model; one that the first process alone has loaded, with checkpoints of activations.
    average, again = EMA(0.8), EMA(0.8)
    model, recorder, _ = run("lora", AveragingCallback(average), lora=True)
    results["lora"] = [
        same(whole(model, average.average()), averaged(EMA(0.8), recorder)),
        goes_as(run("lora-again", AveragingCallback(again), lora=True, resume=str(folder / "lora" / "checkpoint-3"))[1],
            recorder, 4),
        same(average.average(), again.average()),
    ]  # fmt: skip
    results["adapter"] = averaged(EMA(0.8), recorder)
    average = EMA(0.8)
    model, recorder, _ = run("compiled", AveragingCallback(average), torch_compile=True, torch_compile_backend="eager")
    results["compiled"] = averaged(EMA(0.8), recorder)
    results["compiled right"] = same(whole(model, average.average()), results["compiled"])
    results["collectives"] = collectives()
    reset, trail = ElasticReset(2, 0.8), Trajectory(folder / "trail", every=3)
    model, recorder, _ = run("reset", AveragingCallback(trail, reset), save_strategy="no", kind="FULL_STATE_DICT",
        fsdp={"cpu_ram_efficient_loading": True, "activation_checkpointing": True})  # fmt: skip
    reference = ElasticReset(2, 0.8)
    reference.update(recorder.start, 0)
    resets = {step: reference.update(weights, step) for step, weights in recorder.weights.items()}
    results["reset"] = [step for step, weights in resets.items() if weights is not None]
    results["reset right"] = same(whole(model, reset.average()), reference.average())
    results["at 3"] = recorder.weights[3]
    try:
        run("anchor", AnchorCallback(EMAAnchor(0.3)), eval_strategy="no")
    except ValueError as error:
        results["anchor"] = str(error)
    return results
