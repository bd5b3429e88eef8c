"""Averages of weights that are sharded over processes: FSDP2 and tensor parallelism, in a loop."""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks

ENGINES = ["FSDP2", "FSDP2, bf16 weights", "FSDP2, bf16 policy", "FSDP2, gathered after forward", "tensor parallel"]
TRAINED = ["tokens.weight", "inner.weight", "outer.weight", "outer.bias", "scale.weight", "scale.bias"]


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    return on_ranks(2, "shard_runs:core", tmp_path_factory.mktemp("core"))


every_engine = pytest.mark.parametrize("engine", ENGINES)


@every_engine
def test_the_average_of_the_shards_is_the_shard_of_the_average(engine, core):
    for rank in core:
        result = rank["engines"][engine]
        assert len(result["right"]) == 14
        assert all(result["right"].values()), result["right"]
        assert result["names"] == TRAINED  # a tied weight once, no frozen one
        assert result["plain"]


def test_memory_is_that_of_the_shards(core):
    shapes = [rank["engines"]["FSDP2"]["shapes"] for rank in core]
    assert [shape["inner.weight"] for shape in shapes] == [[16, 8], [15, 8]]
    assert [shape["scale.weight"] for shape in shapes] == [[1, 8], [0, 8]]
    shapes = [rank["engines"]["tensor parallel"]["shapes"] for rank in core]
    assert [shape["inner.weight"] for shape in shapes] == [[16, 8], [15, 8]]
    assert [shape["outer.weight"] for shape in shapes] == [[8, 16], [8, 15]]
    assert [shape["outer.bias"] for shape in shapes] == [[8], [8]]


@every_engine
def test_evaluations_see_the_average_and_training_notices_nothing(engine, core):
    for rank in core:
        result = rank["engines"][engine]
        assert result["untouched"]  # after evaluations that ended, and others that broke off
        assert result["loaded"]
        for step in (2, 4):
            (online, outer, inner, outer_again, online_again), expected = result["losses"][step]
            assert torch.equal(outer, outer_again)
            assert torch.equal(online, online_again)
            torch.testing.assert_close(
                [online, outer, inner], expected, rtol=2e-2 if "bf16" in engine else 1e-5, atol=0
            )
        assert len({loss.item() for loss in expected}) == 3


def test_weights_written_back_reach_training(core):
    for rank in core:
        for result, name in zip(rank["write-backs"], ("elasticreset", "switch"), strict=True):
            assert result["written_back"] == [(4, name)]
            assert all(result["right"].values()), result["right"]
        assert rank["anchor"]


def test_updates_communicate_nothing(core):
    assert [rank["collectives"] for rank in core] == [(0, 1), (0, 1)]


def test_a_state_goes_back_to_the_process_it_is_of(core):
    for number, rank in enumerate(core):
        assert rank["restored"]
        assert f"but this is process {number} of 2" in rank["another's"]
        assert "inner.bias" in rank["frozen"]


def test_whole_snapshots_are_refused(core):
    for rank in core:
        assert "Trajectory stores whole ones" in rank["refused"]
