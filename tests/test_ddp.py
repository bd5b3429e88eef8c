"""Averages under DistributedDataParallel on two processes: in both trainers, under accelerate, in a loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ddp_runs import CUT, STEPS
from ranks import once_on_ranks
from safetensors.torch import load_file

from averaging import latest_complete
from averaging.completeness import MANIFEST


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each engine's runs, as (folder, what rank 0 saw, what rank 1 saw); each is done once."""
    done: dict[str, Any] = {}

    def of(engine: str):
        pytest.importorskip({"lightning": "lightning.pytorch", "a_loop": "torch"}.get(engine, engine))
        if engine not in done:
            folder, ranks = once_on_ranks(2, f"ddp_runs:with_{engine}", tmp_path_factory.getbasetemp())
            done[engine] = folder, *ranks
        return done[engine]

    return of


every_engine = pytest.mark.parametrize("engine", ["transformers", "lightning", "accelerate", "a_loop"])
trainers = pytest.mark.parametrize("engine", ["transformers", "lightning"])


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def mean(seen: dict[int, dict[str, torch.Tensor]], at: int) -> dict[str, torch.Tensor]:
    """LAWA's average after step ``at``, in float64."""
    snapshots = [seen[t] for t in range(2, at + 1, 2)][-3:]
    return {name: torch.stack([s[name].double() for s in snapshots]).mean(0) for name in snapshots[0]}


def ema(seen: dict[int, dict[str, torch.Tensor]], at: int) -> dict[str, torch.Tensor]:
    average: dict[str, torch.Tensor] = {}
    for t in range(1, at + 1):
        average = {name: 0.8 * average.get(name, w.double()) + 0.2 * w.double() for name, w in seen[t].items()}
    return average


@every_engine
def test_the_averages_are_those_of_what_was_trained_and_the_same_everywhere(engine, runs):
    _, first, second = runs(engine)
    one, other = first["straight"], second["straight"]
    assert [*one["seen"]] == [*range(1, STEPS + 1)]
    assert equal(one["seen"], other["seen"])
    assert equal(one["averages"], other["averages"])
    expected = mean(one["seen"], STEPS)
    assert equal(one["averages"]["lawa"], {name: tensor.float() for name, tensor in expected.items()})
    for name, tensor in ema(one["seen"], STEPS).items():
        torch.testing.assert_close(one["averages"]["ema"][name].double(), tensor, rtol=1e-6, atol=1e-7)
    for name, tensor in one["averages"]["lawa"].items():  # which the model holds at the end
        assert torch.equal(one["final"][name], tensor)


@every_engine
def test_updates_communicate_nothing(engine, runs):
    _, *ranks = runs(engine)
    assert [rank["collectives"] for rank in ranks] == [(0, 1), (0, 1)]


@every_engine
def test_batchnorm_statistics_are_those_of_the_batches_of_all_ranks(engine, runs):
    _, *ranks = runs(engine)
    finals = [rank["straight"]["final"] for rank in ranks]
    assert equal(*finals)
    batches = [rank["straight"]["collected"] for rank in ranks]
    assert all(batches)
    weight, bias = (finals[0][f"inner.{part}"].double() for part in ("weight", "bias"))
    hidden = [x.double() @ weight.T + bias for x in (*batches[0], *batches[1])]
    for name, expected in (
        ("running_mean", torch.stack([h.mean(0) for h in hidden]).mean(0)),
        ("running_var", torch.stack([h.var(0) for h in hidden]).mean(0)),
    ):
        torch.testing.assert_close(finals[0][f"norm.{name}"].double(), expected, rtol=1e-5, atol=1e-6)
    assert finals[0]["norm.num_batches_tracked"] == len(hidden)
    assert not equal(*batches)


@pytest.mark.parametrize("engine", ["transformers", "lightning", "accelerate"])
def test_a_resumed_run_equals_the_straight_one(engine, runs):
    for rank in runs(engine)[1:]:
        straight, resumed = rank["straight"], rank["resumed"]
        assert [*resumed["seen"]] == [*range(CUT + 1, STEPS + 1)]
        assert equal(resumed["seen"], {t: straight["seen"][t] for t in resumed["seen"]})
        for part in ("averages", "final"):
            assert equal(resumed[part], straight[part])


@pytest.mark.parametrize("cut", [2 * CUT, 2 * CUT + 1])
def test_a_loop_goes_on_exactly_also_while_gradients_are_accumulated(cut, runs):
    for rank in runs("a_loop")[1:]:
        straight, resumed = rank["straight"], rank["cuts"][cut]
        for part in ("seen", "averages", "trained", "policy", "final"):
            assert equal(resumed[part], straight[part])


@trainers
def test_every_rank_evaluates_the_averages(engine, runs):
    _, first, second = runs(engine)
    one = first["straight"]
    assert equal(one["evaluated"], second["straight"]["evaluated"])
    assert equal(one["history"], second["straight"]["history"])
    for step in (4, 8):
        for expected in (one["seen"][step], mean(one["seen"], step), ema(one["seen"], step)):
            distances = [float((w.double() - expected["inner.weight"]).abs().max()) for w in one["evaluated"]]
            assert min(distances) < 1e-6


@trainers
def test_a_checkpoint_holds_the_averages_of_its_step(engine, runs):
    folder, first, _ = runs(engine)
    seen = first["straight"]["seen"]
    for step in (CUT, 3 * CUT):
        for name, expected in (("lawa", mean(seen, step)), ("ema", ema(seen, step))):
            if engine == "transformers":
                stored = load_file(folder / "straight" / f"checkpoint-{step}" / name / "model.safetensors")
            else:
                from averaging.lightning import load_average

                stored = load_average(folder / "straight" / f"step={step}.ckpt", name)
                stored = {key.removeprefix("net."): tensor for key, tensor in stored.items()}
            for key, tensor in expected.items():
                torch.testing.assert_close(stored[key].double(), tensor, rtol=1e-6, atol=1e-7)


@trainers
def test_a_checkpoint_is_whole_with_what_every_rank_wrote(engine, runs):
    folder, *_ = runs(engine)
    newest = latest_complete(folder / "straight")
    assert newest is not None
    if engine == "transformers":
        assert newest.name == f"checkpoint-{STEPS}"
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= json.loads((newest / MANIFEST).read_text())["files"].keys()
    else:
        assert newest.name == f"step={STEPS // CUT * CUT}.ckpt"


@trainers
def test_only_the_first_rank_writes(engine, runs):
    folder, first, second = runs(engine)
    assert first["written"]
    assert second["written"] == []
    assert not [*folder.rglob(".averaging-*")]
    assert not [*folder.rglob("run-*")]  # the rings were each rank's own, and are gone


def test_every_rank_ends_with_the_best_average(runs):
    _, *ranks = runs("transformers")
    for rank in ranks:
        best = load_file(Path(rank["chosen"]) / "ema" / "model.safetensors")
        assert equal(rank["best"], {name: best[name] for name in rank["best"]})


@trainers
def test_elastic_resets_happen_on_all_ranks(engine, runs):
    _, first, second = runs(engine)
    one = first["reset"]
    assert equal(one, second["reset"])
    assert {t for t in one["before"] if not equal(one["before"][t], one["after"][t])} == {4, 8}


def test_decisions_are_those_of_the_first_rank(runs):
    """Lightning's metrics are each process's own unless they are logged with sync_dist=True."""
    _, first, second = runs("lightning")
    assert equal(first["swad"], second["swad"])
    seen = [first["reset"]["after"][t] for t in range(1, 9)]
    for name, tensor in first["swad"].items():
        torch.testing.assert_close(tensor.double(), torch.stack([w[name].double() for w in seen]).mean(0))


def test_each_rank_keeps_its_snapshots_in_a_folder_of_its_own(runs):
    _, *ranks = runs("a_loop")
    assert [rank["straight"]["rings"] for rank in ranks] == [2, 2]


def test_switches_and_references_are_the_same_everywhere(runs):
    _, first, second = runs("a_loop")
    one, other = first["straight"], second["straight"]
    for part in ("trained", "policy", "evaluated"):
        assert equal(one[part], other[part])
    for name, tensor in one["averages"]["anchor"].items():
        assert torch.equal(one["policy"][name], tensor)
