"""Averages of models in FullyShardedDataParallel (FSDP1), in a loop; and their files."""

from __future__ import annotations

import pytest
import torch
from fsdp1_runs import BETWEEN
from ranks import once_on_ranks
from safetensors.torch import load_file
from shard_runs import Net, averagers, same
from test_shards import require_averages, require_evaluations, require_snapshots, require_write_backs

from averaging import load_into

ENGINES = [
    "FULL_SHARD",
    "FULL_SHARD, bf16 weights",
    "FULL_SHARD, bf16 policy",
    "SHARD_GRAD_OP",
    "NO_SHARD",
    "one parameter",
    "one parameter, bf16 policy",
    "one parameter, SHARD_GRAD_OP",
    "one parameter, NO_SHARD",
]
BUILDS = ["fsdp1", "as_one"]


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    return once_on_ranks(2, "fsdp1_runs:core", tmp_path_factory.getbasetemp())[1]


every_engine = pytest.mark.parametrize("engine", ENGINES)


@every_engine
def test_the_average_of_the_slices_is_the_slice_of_the_average(engine, core):
    require_averages(core, engine)


def test_memory_is_that_of_the_slices(core):
    shapes = [rank["engines"]["FULL_SHARD"]["shapes"] for rank in core]
    assert [shape["inner.weight"] for shape in shapes] == [[140], [108]]
    assert [shape["outer.bias"] for shape in shapes] == [[0], [8]]
    assert [rank["engines"]["NO_SHARD"]["shapes"]["inner.weight"] for rank in core] == [[31, 8], [31, 8]]


@every_engine
def test_evaluations_see_the_average_and_training_notices_nothing(engine, core):
    require_evaluations(core, engine)


def test_updates_communicate_nothing(core):
    assert [rank["collectives"] for rank in core] == [(0, 1), (0, 1)]


@pytest.mark.parametrize("build", BUILDS)
def test_weights_written_back_reach_training(build, core):
    for rank in core:
        require_write_backs(rank["writing"][build])
        assert "inner.bias" in rank["writing"][build]["frozen"]


def test_averages_and_evaluations_between_forward_and_backward_and_while_gradients_accumulate(core):
    for rank in core:
        assert rank["between"] == dict.fromkeys(BETWEEN, [True] * 3)
        assert rank["accumulated"] == [True, True]


def test_of_parameters_shown_as_one_those_that_train_are_averaged(core):
    for rank in core:
        trained, everything = rank["partly frozen"]
        assert trained == ["tokens.weight", "scale.weight", "scale.bias", "inner.weight"]
        assert sorted(everything) == sorted([*trained, "inner.bias", "outer.weight", "outer.bias"])


@pytest.mark.parametrize("build", BUILDS)
def test_what_cannot_be_averaged_is_refused_with_a_way_out(build, core):
    for rank in core:
        assert "give the wrapped model" in rank[f"inside {build}"]


# ---------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that two processes wrote to, and what they found."""
    return once_on_ranks(2, "fsdp1_runs:files", tmp_path_factory.getbasetemp())


def test_a_resumed_run_equals_the_straight_one(two):
    folder, ranks = two
    assert [rank["resumed"] for rank in ranks] == [True, True]
    assert not [*folder.rglob(".averaging-*")]


@pytest.mark.parametrize("engine", ["FSDP2", "DDP", "FSDP1", "FSDP1, SHARD_GRAD_OP", "FSDP1, one parameter"])
def test_averages_go_on_in_other_engines(engine, two):
    _, ranks = two
    for rank in ranks:
        assert len(rank[engine]) == 8
        assert all(rank[engine].values()), rank[engine]


def test_one_process_reads_what_two_have_saved(two):
    folder, (first, _) = two
    for average in averagers(folder):
        average.load(folder / "at-3" / average.name)
        assert same(average.average(), first["saved"][average.name]), average.name
        load_into(Net(), average)


def test_the_whole_model_is_one_file_and_so_are_snapshots(two):
    folder, (first, _) = two
    written = load_file(folder / "whole.safetensors")
    model = Net()
    assert written.keys() == model.state_dict().keys() - {"head.weight"}  # tied: written once
    assert torch.equal(written["inner.bias"], model.inner.bias)  # frozen: the model's own
    for name, tensor in first["saved"]["lawa-cpu"].items():
        assert torch.equal(written[name], tensor)
    require_snapshots(folder, "trail", 3)
    require_snapshots(folder, "tracks", 6)


def test_four_processes_read_what_two_have_saved(two, tmp_path_factory):
    _, (first, _) = two
    folder, ranks = once_on_ranks(4, "fsdp1_runs:four", tmp_path_factory.getbasetemp())
    for rank in ranks:
        for layout in ("FULL_SHARD", "HYBRID_SHARD", "one parameter"):
            for name, average in first["saved"].items():
                assert same(rank[layout][name], {key: value.float() for key, value in average.items()}), name
        assert rank["collectives"] == (0, 1)
    for layout in ("FULL_SHARD", "HYBRID_SHARD", "one parameter"):
        for average in averagers(folder):
            average.load(folder / layout / average.name)
            assert same(average.average(), first["saved"][average.name]), average.name
