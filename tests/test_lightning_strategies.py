"""Averages under Lightning's FSDPStrategy and DeepSpeedStrategy, which run on CPUs here."""

from __future__ import annotations

import pytest
from ranks import once_on_ranks
from shard_runs import same
from test_shards import require_checkpoints, require_fits

from averaging import EMA, LAWA

pytest.importorskip("lightning.pytorch")

FSDP = ["full", "sharded"]
ZERO = ["ZeRO-2", "ZeRO-3"]


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return once_on_ranks(2, "strategy_runs:fsdp", tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory):
    pytest.importorskip("deepspeed")
    return once_on_ranks(2, "strategy_runs:deepspeed", tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("kind", FSDP)
def test_fsdp_averages_evaluates_and_resumes(kind, fsdp):
    require_fits([rank[kind] for rank in fsdp[1]])


@pytest.mark.parametrize("kind", FSDP)
def test_fsdp_checkpoints_hold_the_averages(kind, fsdp):
    folder, ranks = fsdp
    require_checkpoints(folder / kind, [rank[kind] for rank in ranks])


def test_a_run_under_ddp_goes_on_under_fsdp_and_the_other_way_round(fsdp):
    for rank in fsdp[1]:
        assert rank["full"]["from ddp"] == rank["sharded"]["from ddp"] == rank["full"]["to ddp"] == [True] * 5
        assert "and Lightning loads it under no other" in rank["sharded"]["to ddp"]
        assert 'load_average("' in rank["sharded"]["to ddp"]


def test_folders_beside_the_file_go_with_it(fsdp):
    folder, ranks = fsdp
    straight = folder / "full" / "straight"
    assert sorted(path.name.split(".averaging-")[0] for path in straight.iterdir() if path.is_dir()) == [
        "step=3.ckpt", "step=6.ckpt", "step=9.ckpt",
    ]  # fmt: skip
    (states,) = straight.glob("step=6.ckpt.averaging-*")
    for average in (LAWA(k=3, every=2), EMA(0.8)):
        assert same(average.load(states / average.name).average(), ranks[0]["full"]["at 6"][average.name])
    for rank in ranks:
        assert rank["full"]["again"] == [False, True]
        assert rank["sharded"]["again"] == [True]
        assert rank["full"]["removed"] == rank["sharded"]["removed"] == []


@pytest.mark.parametrize("kind", FSDP)
def test_fsdp_refuses_what_cannot_be_kept(kind, fsdp):
    for rank in fsdp[1]:
        assert 'checkpoint="average" is not supported under FSDPStrategy' in rank[kind]["the average"]
        assert 'use strategy="ddp"' in rank[kind]["not sharded"]
        assert ("beside the file" in rank[kind]["another IO"]) is (kind == "full")


@pytest.mark.parametrize("stage", ZERO)
def test_deepspeed_averages_evaluates_and_resumes(stage, deepspeed):
    require_fits([rank[stage] for rank in deepspeed[1]])


@pytest.mark.parametrize("stage", ZERO)
def test_deepspeed_checkpoints_hold_the_averages(stage, deepspeed):
    folder, ranks = deepspeed
    require_checkpoints(folder / stage, [rank[stage] for rank in ranks])


def test_deepspeed_refuses_what_cannot_be_kept(deepspeed):
    for rank in deepspeed[1]:
        assert 'checkpoint="average" is not supported under DeepSpeedStrategy' in rank["ZeRO-2"]["the average"]
