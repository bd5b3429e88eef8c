"""Averages under accelerate's FSDP2: in loops, and in transformers' Trainer."""

from __future__ import annotations

import pytest
import torch
from ranks import once_on_ranks
from safetensors.torch import load_file
from shard_runs import same
from test_shards import require_averages, require_evaluations

from averaging import latest_complete
from averaging.completeness import flaw

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

every_kind = pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])


# ---------------------------------------------------------------------- loops


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    return once_on_ranks(2, "accelerate_fsdp_runs:loops", tmp_path_factory.getbasetemp())[1]


@pytest.mark.parametrize("engine", ["FSDP2", "FSDP2, bf16", "FSDP2, compiled"])
def test_a_loop_averages_shards_evaluates_and_trains_on(engine, loops):
    require_averages(loops, engine)
    require_evaluations(loops, engine)
    for rank in loops:
        assert rank["sharded"] == [True, True]
        assert rank["engines"][engine]["after an evaluation"]
    shapes = [rank["engines"][engine]["shapes"] for rank in loops]
    assert [shape["inner.weight"] for shape in shapes] == [[16, 8], [15, 8]]
    assert [shape["scale.weight"] for shape in shapes] == [[1, 8], [0, 8]]


@every_kind
def test_a_loop_resumes_exactly(kind, loops):
    assert [rank[kind] for rank in loops] == [[True] * 9] * 2


def test_updates_in_a_loop_communicate_nothing(loops):
    assert [rank["collectives"] for rank in loops] == [(0, 1), (0, 1)]


# ---------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of all the runs, and what they found."""
    return once_on_ranks(2, "accelerate_fsdp_runs:transformers", tmp_path_factory.getbasetemp())


def opened(folder, expected):
    """Whether `from_pretrained` finds the trained weights ``expected`` in a folder, and all others somewhere."""
    model, info = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    return same({name: weights[name] for name in expected}, expected)


@every_kind
def test_trainer_averages_evaluates_and_trains_on(kind, trained):
    _, ranks = trained
    for rank in ranks:
        result = rank[kind]
        assert result["sharded"]  # in float32, whatever the model was loaded in
        assert result["averages"] == {"lawa": True, "ema": True}
        assert result["holds"]  # at the end, the average
        assert result["online"]  # what a run without averages trains, whose evaluations do not break off
        assert rank["collectives"] == (0, 1)
    assert ranks[0][kind]["history"] == ranks[1][kind]["history"]
    assert [rank[kind]["shape"] for rank in ranks] == [[8, 8], [7, 8]]


@every_kind
def test_trainer_checkpoints_hold_the_averages(kind, trained):
    folder, (first, _) = trained
    checkpoint = folder / f"straight-{kind}" / "checkpoint-6"
    own = {"online": ""} if kind == "FULL_STATE_DICT" else {}  # otherwise Trainer writes no model that opens
    for name, place in {"lawa": "lawa", "ema": "ema", **own}.items():
        assert opened(checkpoint / place, first[kind]["at 6"][name]), name
    for name, metric in (("lawa", ""), ("ema", "ema_")):
        model = transformers.LlamaForCausalLM.from_pretrained(checkpoint / name).float()
        rows = torch.randint(18, (64, 6), generator=torch.Generator().manual_seed(1))[48:]
        with torch.no_grad():
            measured = model(rows, labels=rows).loss.item()
        tolerance = 1e-5 if kind == "FULL_STATE_DICT" else 1e-2  # that computes in bf16
        assert first[kind]["history"][2][f"eval_{metric}loss"] == pytest.approx(measured, rel=tolerance)
    assert flaw(checkpoint) is None
    assert latest_complete(checkpoint.parent) == checkpoint


@every_kind
def test_trainer_resumes_exactly(kind, trained):
    folder, ranks = trained
    for rank in ranks:
        assert rank[kind]["resumed"] == [True] * 3
        assert rank[kind]["whole"] == str(folder / f"broken-{kind}" / "checkpoint-4")
        assert rank[kind]["resumed from the newest that is whole"]  # which holds the average in its own place


@every_kind
def test_the_best_model_is_the_average_that_was_measured(kind, trained):
    folder, ranks = trained
    for rank in ranks:
        assert rank[kind]["best"] == ["checkpoint-4", True]
        measured, best = rank[kind]["measured"]
        assert measured == best
        for place, expected in rank[kind]["at 4"].items():
            assert opened(folder / f"best-{kind}" / "checkpoint-4" / place, expected), place
    assert {path.name: flaw(path) for path in (folder / f"best-{kind}").iterdir()} == {
        "checkpoint-4": None, "checkpoint-6": None,
    }  # fmt: skip


def test_an_adapter_stays_one(trained):
    folder, ranks = trained
    assert [rank["lora"] for rank in ranks] == [[True] * 3] * 2
    stored = load_file(folder / "lora" / "checkpoint-6" / "ema" / "adapter_model.safetensors")
    assert same(stored, {name.replace(".default", ""): tensor for name, tensor in ranks[0]["adapter"].items()})


def test_a_compiled_model_is_saved_without_its_wrapper(trained):
    folder, ranks = trained
    assert [rank["compiled right"] for rank in ranks] == [True, True]
    assert opened(folder / "compiled" / "checkpoint-6" / "ema", ranks[0]["compiled"])


def test_weights_written_back_reach_training_and_snapshots_are_whole(trained):
    folder, ranks = trained
    for rank in ranks:
        assert rank["reset"] == [2, 4, 6]
        assert rank["reset right"]
    stored = load_file(folder / "trail" / "step-000000003.safetensors")
    assert same(stored, ranks[0]["at 3"])
    assert opened(folder / "trail" / "template", {})


def test_an_anchor_is_refused(trained):
    for rank in trained[1]:
        assert "FSDP is not supported, as its parameters are not whole weights: train with DDP" in rank["anchor"]
