"""Averages under DeepSpeed ZeRO, of each process's float32 partition: in a loop, in transformers, and their files."""

from __future__ import annotations

import pytest
import torch
from ranks import once_on_ranks
from safetensors.torch import load_file
from shard_runs import Net, averagers, same
from test_shards import require_further, require_snapshots

from averaging import load_into
from averaging.checkpoints import Checkpoint

pytest.importorskip("deepspeed")

TRAINED = ["tokens.weight", "inner.weight", "outer.weight", "outer.bias", "scale.weight", "scale.bias"]
OPTIMIZERS = {
    "ZeRO-1, bf16": "DeepSpeedZeroOptimizer",
    "ZeRO-1, bf16, float32 gradients": "BF16_Optimizer",
    "ZeRO-2, fp32": "DeepSpeedZeroOptimizer",
    "ZeRO-2, bf16": "DeepSpeedZeroOptimizer",
    "ZeRO-3, fp32": "DeepSpeedZeroOptimizer_Stage3",
    "ZeRO-3, bf16": "DeepSpeedZeroOptimizer_Stage3",
    "ZeRO-2, bf16, offloaded": "DeepSpeedZeroOptimizer",
    "ZeRO-3, bf16, offloaded": "DeepSpeedZeroOptimizer_Stage3",
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that two processes wrote to, and what they found."""
    return once_on_ranks(2, "zero_runs:loops", tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def core(two):
    return [rank["core"] for rank in two[1]]


every_engine = pytest.mark.parametrize("engine", OPTIMIZERS)


@every_engine
def test_the_average_of_the_parts_is_the_part_of_the_average(engine, core):
    for rank in core:
        result = rank["engines"][engine]
        assert result["optimizer"] == OPTIMIZERS[engine]
        assert len(result["right"]) == 16
        assert all(result["right"].values()), result["right"]
        assert result["names"] == TRAINED


def test_memory_is_that_of_the_parts(core):
    sizes = [[shape for (shape,) in rank["engines"]["ZeRO-2, bf16"]["shapes"].values()] for rank in core]
    assert sizes == [[48, 234, 0, 0, 0, 0], [0, 14, 248, 8, 8, 1]]
    sizes = [[shape for (shape,) in rank["engines"]["ZeRO-3, bf16"]["shapes"].values()] for rank in core]
    assert sizes == [[24, 124, 124, 4, 4, 1], [24, 124, 124, 4, 4, 0]]
    assert [rank["frozen"]["inner.bias"] for rank in core] == [[16], [15]]


@every_engine
def test_evaluations_see_the_average_and_training_notices_nothing(engine, core):
    for rank in core:
        result = rank["engines"][engine]
        assert result["untouched"]  # after evaluations that ended, and others that broke off, on one process or on both
        assert result["loaded"]
        for step in (2, 4):
            (online, outer, inner, outer_again, online_again), expected = result["losses"][step]
            assert torch.equal(outer, outer_again)
            assert torch.equal(online, online_again)
            torch.testing.assert_close([online, outer, inner], expected, rtol=1e-5, atol=0)
        assert len({loss.item() for loss in expected}) == 3


def test_weights_written_back_reach_training(core):
    for rank in core:
        assert len(rank["write-backs"]) == 4
        for right, reached in rank["write-backs"].values():
            assert len(right) == 3
            assert all(right.values()), right
            assert reached == [True] * 7


def test_updates_communicate_nothing(core):
    assert [rank["collectives"] for rank in core] == [(0, 1), (0, 1)]


def test_references_follow_whole_or_sharded(core):
    for rank in core:
        assert rank["references"] == dict.fromkeys(
            ["ZeRO-1, bf16", "ZeRO-2, bf16", "ZeRO-3, bf16", "ZeRO-3, fp32", "ZeRO-2, fp32"], [True] * 12
        )


def test_steps_are_those_the_engine_has_made(core):
    for rank in core:
        assert rank["counted"] == {1: [1, 5, True], 2: [1, 5, True]}


def test_what_cannot_be_averaged_is_refused(core):
    for rank in core:
        assert rank["stage 0"] == [[6, 8], [31, 8], [8, 31], [8], [1, 8], [1]]  # in float32 it is as without DeepSpeed
        assert "set the zero_optimization stage to 1, 2 or 3" in rank["16 bits"]
        assert "without an optimizer, which is not supported: give the engine" in rank["no optimizer"]
        assert "with offloading to NVMe, which is not supported: offload to the CPU" in rank["swap_optimizer"]
        assert "zero_hpz_partition_size" in rank["zero_hpz_partition_size"]
        assert "'outer.weight' is held by DeepSpeed ZeRO in some of the processes only" in rank["ds_process_group"]
        assert "in the model but was" in rank["taken over"]


# ---------------------------------------------------------------------- files

every_stage = pytest.mark.parametrize("stage", ["ZeRO-2", "ZeRO-3"])


@every_stage
def test_a_resumed_run_equals_the_straight_one(stage, two):
    folder, ranks = two
    for rank in ranks:
        assert rank["files"][stage]["resumed"]
        assert "it is another model's state" in rank["files"][stage]["another"]
    assert not [*folder.rglob(".averaging-*")]


@every_stage
def test_other_layouts_read_what_was_saved(stage, two):
    _, ranks = two
    for rank in ranks:
        assert rank["files"][stage]["other layouts"] == dict.fromkeys(
            ["ZeRO-1, bf16", "ZeRO-2, fp32", "ZeRO-3, fp32", "FSDP2", "and back"], True
        )
        assert rank["files"][stage]["from plain"]


@every_stage
def test_one_process_reads_what_two_have_saved(stage, two):
    folder, (first, _) = two
    for average in averagers(folder):
        average.load(folder / stage / "at-3" / average.name)
        assert same(average.average(), first["files"][stage]["saved"][average.name]), average.name
        load_into(Net(), average)


@pytest.fixture(scope="module")
def four(two, tmp_path_factory):
    return once_on_ranks(4, "zero_runs:four", tmp_path_factory.getbasetemp())


@every_stage
def test_four_processes_read_what_two_have_saved(stage, two, four):
    _, (first, _) = two
    folder, ranks = four
    saved = first["files"][stage]["saved"]
    for rank in ranks:
        assert rank[stage].keys() == saved.keys()
        assert all(same(average, saved[name]) for name, average in rank[stage].items())
    for average in averagers(folder):
        average.load(folder / stage / average.name)
        assert same(average.average(), saved[average.name])


@every_stage
def test_two_processes_read_what_four_have_saved(stage, two, trained):
    _, (first, _) = two
    for rank in trained[1]:
        saved = first["files"][stage]["saved"]
        assert rank["from four"][stage].keys() == saved.keys()
        assert all(same(average, saved[name]) for name, average in rank["from four"][stage].items())


@every_stage
def test_the_whole_model_is_one_file(stage, two):
    folder, (first, _) = two
    written = load_file(folder / stage / "whole.safetensors")
    assert written.keys() == Net().state_dict().keys() - {"head.weight"}
    assert torch.equal(written["inner.bias"], Net(torch.bfloat16).inner.bias)  # frozen: the model's own
    for name, tensor in first["files"][stage]["saved"]["lawa-cpu"].items():
        assert torch.equal(written[name], tensor.bfloat16())


@every_stage
@pytest.mark.parametrize(("name", "count"), [("trail", 3), ("tracks", 6)])
def test_snapshots_that_outlive_the_run_are_whole(name, count, stage, two):
    folder = two[0] / stage
    require_snapshots(folder, name, count)


# ---------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def trained(four, tmp_path_factory):
    pytest.importorskip("transformers")
    return once_on_ranks(2, "zero_runs:transformers", tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_transformers_averages_evaluates_and_resumes(stage, trained):
    folder, ranks = trained
    for rank in ranks:
        result = rank[stage]
        assert result["averages"]
        assert result["holds"]  # at the end, the average
        assert result["online"]  # what a run without averages and evaluations trains
        assert result["resumed"] == [True] * 3
        assert rank["collectives"] == (0, 1)
    assert ranks[0][stage]["history"] == ranks[1][stage]["history"]
    assert (folder / f"straight-{stage}" / "checkpoint-6" / "averaging-manifest.json").is_file()


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_transformers_checkpoints_hold_the_averages(stage, trained):
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    folder, (first, _) = trained
    dtype = {"1": torch.float32, "2": torch.bfloat16, "3": torch.float32}[stage]
    rows = torch.randint(18, (64, 6), generator=torch.Generator().manual_seed(1))[48:]
    examples = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(folder / "measured"), use_cpu=True, report_to="none", disable_tqdm=True, bf16=stage == "2"
    )
    for name, place, metric in (("lawa", "lawa", ""), ("ema", "ema", "ema_"), ("online", "", "online_")):
        model = LlamaForCausalLM.from_pretrained(folder / f"straight-{stage}" / "checkpoint-6" / place, dtype="auto")
        expected = {key: tensor.to(dtype) for key, tensor in first[stage]["at 6"][name].items()}
        assert same({key: tensor.detach() for key, tensor in model.named_parameters()}, expected), name
        measured = Trainer(model=model, args=arguments, eval_dataset=examples).evaluate()
        assert first[stage]["history"][2][f"eval_{metric}loss"] == pytest.approx(measured["eval_loss"], rel=1e-2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_soup_reads_the_float32_weights_beside_transformers_model(stage, trained):
    folder, (first, _) = trained
    checkpoint = Checkpoint(folder / f"straight-{stage}" / "checkpoint-6" / "global_step6")
    assert checkpoint.step == 6
    for name, tensor in first[str(stage)]["at 6"]["online"].items():
        assert torch.equal(checkpoint[name], tensor)
    assert checkpoint.ties == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize("stage", [2, 3])
def test_transformers_averages_in_every_other_way(stage, trained):
    folder, ranks = trained
    for rank in ranks:
        require_further(rank["further"][stage], steps=5)
    require_snapshots(folder / f"further-{stage}", "trail", 1)
    require_snapshots(folder / f"further-{stage}", "tracks", 2)


@pytest.mark.parametrize(("kind", "dtype"), [("dpo", "torch.bfloat16"), ("grpo", "torch.float32")])
def test_references_of_trl_follow_and_resume(kind, dtype, trained):
    pytest.importorskip("trl")
    for rank in trained[1]:
        assert rank["anchors"][kind] == {"right": [True] * 6, "resumed": True, "dtype": dtype}


def test_transformers_loads_the_best(trained):
    for rank in trained[1]:
        assert rank["best"][1]
        assert rank["resumed beside the average"]
        assert "set zero_optimization.stage3_gather_16bit_weights_on_model_save to true" in rank["not gathered"]
