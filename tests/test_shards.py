"""Averages of weights that are sharded over processes: FSDP2 and tensor parallelism, in a loop; and their files."""

from __future__ import annotations

import os
import pickle
import shutil

import pytest
import torch
from ddp_runs import data
from ranks import once_on_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from shard_runs import Net, averagers, same
from torch import nn

from averaging import EMA, LAWA, latest_complete, load_into
from averaging.checkpoints.checkpoint import Checkpoint
from averaging.completeness import flaw

ENGINES = ["FSDP2", "FSDP2, bf16 weights", "FSDP2, bf16 policy", "FSDP2, gathered after forward", "tensor parallel"]
TRAINED = ["tokens.weight", "inner.weight", "outer.weight", "outer.bias", "scale.weight", "scale.bias"]


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    return once_on_ranks(2, "shard_runs:core", tmp_path_factory.getbasetemp())[1]


every_engine = pytest.mark.parametrize("engine", ENGINES)


def require_averages(core, engine):
    """In each rank the average of its parts is the part of the average."""
    for rank in core:
        result = rank["engines"][engine]
        assert len(result["right"]) == 16
        assert all(result["right"].values()), result["right"]
        assert sorted(result["names"]) == sorted(TRAINED)  # a tied weight once, no frozen one
        assert result["plain"]


def require_evaluations(core, engine):
    """Evaluations saw the average, and training did not notice."""
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


def require_write_backs(rank):
    """Weights written back, and a reference that follows, reached what they are for."""
    for result, name in zip(rank["write-backs"], ("elasticreset", "switch"), strict=True):
        assert result["written_back"] == [(4, name)]
        assert all(result["right"].values()), result["right"]
    assert rank["anchor"]


def require_snapshots(folder, name, count):
    """What was stored is what the whole model gives."""
    files = sorted((folder / name).glob("step-*.safetensors"))
    assert len(files) == count
    for file in files:
        with safe_open(file, "pt") as stored, safe_open(folder / f"{name}-expected" / file.name, "pt") as expected:
            assert stored.metadata() == expected.metadata()
        assert same(load_file(file), load_file(folder / f"{name}-expected" / file.name))


def require_further(rank, steps):
    """The averages that one run in a trainer has had together are right, and so is what was written back."""
    names = ["posthocema", "swa", "bema", "swad", "switch"]
    assert rank == dict.fromkeys([*(f"after step {step}" for step in range(steps + 1)), *names], True)


@every_engine
def test_the_average_of_the_shards_is_the_shard_of_the_average(engine, core):
    require_averages(core, engine)


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
    require_evaluations(core, engine)


def test_weights_written_back_reach_training(core):
    for rank in core:
        require_write_backs(rank)


def test_updates_communicate_nothing(core):
    assert [rank["collectives"] for rank in core] == [(0, 1), (0, 1)]


def test_a_state_goes_back_to_the_process_it_is_of(core):
    for number, rank in enumerate(core):
        assert rank["restored"]
        assert f"but this is process {number} of 2" in rank["another's"]
        assert "inner.bias" in rank["frozen"]


def test_a_model_without_values_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match="'weight' is on the meta device, without values: materialize the model first"):
        EMA(0.9).update(nn.Linear(2, 2, device="meta"))


# ---------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that two processes wrote to, and what they found."""
    return once_on_ranks(2, "shard_runs:files", tmp_path_factory.getbasetemp())


def test_a_resumed_run_equals_the_straight_one(two):
    folder, ranks = two
    for rank in ranks:
        assert rank["resumed"]
    assert [rank["parts"] for rank in ranks] == [[16, 8], [15, 8]]
    assert not [*folder.rglob(".averaging-*")]


def test_one_process_reads_what_two_have_saved(two):
    folder, (first, _) = two
    for step in ("3", "5"):
        for average in averagers(folder):
            average.load(folder / f"at-{step}" / average.name)
            assert same(average.average(), first["saved"][step][average.name]), average.name
            load_into(Net(), average)


def test_two_processes_read_what_one_has_saved(two):
    _, ranks = two
    assert [rank["from plain"] for rank in ranks] == [True, True]


def test_averages_go_on_under_ddp_and_under_fsdp2_again(two):
    _, ranks = two
    for rank in ranks:
        for engine in ("under DDP", "under FSDP2 again"):
            assert len(rank[engine]["right"]) == 8
            assert all(rank[engine]["right"].values()), (engine, rank[engine]["right"])


def test_the_whole_model_is_one_file(two):
    folder, (first, _) = two
    written = load_file(folder / "whole.safetensors")
    model = Net()
    model.head = torch.nn.Linear(8, 6, bias=False)  # no longer tied: its weight is written once, under the other name
    assert written.keys() == model.state_dict().keys() - {"head.weight"}
    assert torch.equal(written["inner.bias"], Net().inner.bias)  # frozen: the model's own
    for name, tensor in first["saved"]["3"]["lawa-cpu"].items():
        assert torch.equal(written[name], tensor)


@pytest.mark.parametrize(("name", "count"), [("trail", 3), ("tracks", 6)])
def test_snapshots_that_outlive_the_run_are_whole(name, count, two):
    folder, _ = two
    require_snapshots(folder, name, count)


def test_snapshots_are_written_once(two):
    folder, _ = two
    name = "lawa-cpu/snapshot-000000000002/__1_0.distcp"
    earlier, later, resumed = (os.stat(folder / at / name) for at in ("at-3", "at-5", "again"))
    assert earlier.st_ino == later.st_ino == resumed.st_ino


def test_what_cannot_be_written_or_read_is_an_error_everywhere(two):
    _, ranks = two
    for rank in ranks:
        assert "FileExistsError" in rank["no folder"]
        assert "a folder is in the place of the file" in rank["no file"]
        assert "it is another model's state" in rank["another"]


@pytest.mark.parametrize("damage", ["metadata", "part", "code", "elsewhere"])
def test_damaged_parts_are_errors(damage, two, tmp_path):
    folder, _ = two
    shutil.copytree(folder / "at-3" / "ema", tmp_path / "ema")
    metadata, numbers = tmp_path / "ema" / "ema" / ".metadata", tmp_path / "ema" / "averaging.json"
    match damage:
        case "metadata":
            metadata.write_bytes(bytes(metadata.stat().st_size))
        case "part":
            (tmp_path / "ema" / "ema" / "__1_0.distcp").unlink()
        case "code":
            code = pickle.dumps(print)
            metadata.write_bytes(code + bytes(metadata.stat().st_size - len(code)))
        case "elsewhere":
            numbers.write_text(numbers.read_text().replace("ema/__1_0.distcp", "../__1_0.distcp"))
    average = EMA(0.8)
    with pytest.raises((ValueError, FileNotFoundError), match=r"not a whole|not found|does not belong|damaged"):
        average.load(tmp_path / "ema")
    assert not average.absorbed


def test_four_processes_read_what_two_have_saved_and_average_in_other_layouts(two, tmp_path_factory):
    _, (first, _) = two
    _, ranks = once_on_ranks(4, "shard_runs:four", tmp_path_factory.getbasetemp())
    for rank in ranks:
        assert len(rank["layouts"]) == 3
        for layout in rank["layouts"].values():
            assert all(layout["right"].values()), layout["right"]
            for name, average in first["saved"]["3"].items():
                assert same(layout["loaded"][name], average), name
        assert rank["collectives"] == (0, 1)


# ---------------------------------------------------------------------- Lightning


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    pytest.importorskip("lightning.pytorch")
    pytest.importorskip("schedulefree")
    return once_on_ranks(2, "shard_runs:lightning", tmp_path_factory.getbasetemp())


def require_fits(ranks):
    """Averages and evaluations during Lightning's training, and resuming it."""
    for rank in ranks:
        assert rank["averages"]
        assert rank["holds"]  # at the end, the average
        assert rank["holds it still"]
        assert rank["online"]  # what a run without averages trains
        assert rank["interrupted"]  # holds it, too
        assert rank["history"][-1].keys() == {"val_loss", "online_val_loss", "ema_val_loss"}
        assert rank["collectives"] == (0, 1)
        assert rank["resumed"] == [True] * 4
        assert rank["reset"] == [4, 8]
        assert rank["reset right"]
    assert ranks[0]["history"] == ranks[1]["history"]
    assert same(ranks[0]["statistics"], ranks[1]["statistics"])


def test_lightning_averages_evaluates_and_trains_on(fitted):
    require_fits(fitted[1])


def test_lightning_trains_on_with_a_schedule_free_optimizer(fitted):
    _, ranks = fitted
    assert [rank["schedule-free"] for rank in ranks] == [[True] * 11] * 2


@pytest.mark.parametrize("held", ["online", "average"])
def test_lightning_goes_on_under_fsdp2_from_a_checkpoint_of_ddp(held, fitted):
    _, ranks = fitted
    assert [rank[f"from ddp, {held}"] for rank in ranks] == [[True] * 5] * 2


def test_under_ddp_averages_of_fsdp2_are_read_and_lightning_says_that_the_run_cannot_resume(fitted):
    folder, ranks = fitted
    checkpoint = folder / "straight" / "step=6.ckpt"
    for rank in ranks:
        assert "and Lightning loads it under no other" in rank["to ddp"]
        assert 'load_average("' in rank["to ddp"]
    (states,) = (path for path in checkpoint.glob("averaging-*") if path.is_dir())
    for average in (LAWA(k=3, every=2), EMA(0.8)):
        assert same(average.load(states / average.name).average(), ranks[0]["at 6"][average.name])


def require_checkpoints(folder, ranks):
    """What Lightning's checkpoints hold, read in a single process."""
    from averaging.lightning import load_average

    assert {path.name: flaw(path) for path in (folder / "straight").glob("*.ckpt")} == {
        "step=3.ckpt": None, "step=6.ckpt": None, "step=9.ckpt": None,
    }  # fmt: skip
    assert latest_complete(folder / "straight") == folder / "straight" / "step=9.ckpt"
    assert flaw(folder / "ended.ckpt") is None

    checkpoint = folder / "straight" / "step=6.ckpt"
    net = nn.Sequential(nn.Linear(4, 31), nn.Tanh(), nn.Linear(31, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).eval()
    for name, expected in {**ranks[0]["at 6"], "online": ranks[0]["online at 6"]}.items():
        stored = load_average(checkpoint, name)
        assert same({key: stored[key] for key in expected}, expected), name
        net.load_state_dict({key.removeprefix("net."): tensor for key, tensor in stored.items()})
    assert same(load_average(checkpoint), load_average(checkpoint, "lawa"))
    net.load_state_dict({key.removeprefix("net."): tensor for key, tensor in load_average(checkpoint).items()})
    x, y = data(16, 2)
    loss = (net(x) - y).square().mean().item()
    for rank in (rank for rank in ranks if "validated" in rank):
        assert rank["validated"][0]["val_loss"] == pytest.approx(loss, rel=1e-5)
        assert rank["holds what was measured"]
    with pytest.raises(ValueError, match="no average 'swa', only"):
        load_average(checkpoint, "swa")

    # After training, with the weights that were trained; or only what the model holds then.
    for name, expected in {**ranks[0]["at 10"], "online": ranks[0]["online at 10"]}.items():
        stored = load_average(folder / "ended.ckpt", name)
        assert same({key: stored[key] for key in expected}, expected), name
    weights = Checkpoint(folder / "weights.ckpt")
    assert same({key: weights[key] for key in expected}, ranks[0]["at 10"]["lawa"])

    assert same(load_file(folder / "trail" / "step-000000008.safetensors"), ranks[0]["at 8"])
    assert not [*folder.rglob(".averaging-*")]


def test_lightning_checkpoints_hold_the_averages(fitted):
    require_checkpoints(*fitted)


def test_lightning_averages_in_every_other_way(fitted):
    folder, ranks = fitted
    for rank in ranks:
        require_further(rank["further"], steps=10)
    require_snapshots(folder / "further", "trail", 2)
    require_snapshots(folder / "further", "tracks", 4)


def test_lightning_refuses_what_cannot_be_kept(fitted):
    _, ranks = fitted
    for rank in ranks:
        assert "leave out save_distributed_checkpoint=False" in rank["whole files"]
        assert 'checkpoint="average" is not supported under ModelParallelStrategy' in rank["the average"]


# ---------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pytest.importorskip("transformers")
    return once_on_ranks(2, "shard_runs:transformers", tmp_path_factory.getbasetemp())


def test_transformers_averages_evaluates_and_trains_on(trained):
    _, ranks = trained
    for rank in ranks:
        assert rank["averages"]
        assert rank["holds"]  # at the end, the average
        assert rank["online"]  # what a run without averages and evaluations trains
        assert rank["collectives"] == (0, 1)
    assert ranks[0]["history"] == ranks[1]["history"]
    assert len(ranks[0]["history"]) == 4


def test_transformers_checkpoints_hold_the_averages(trained):
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    folder, (first, second) = trained
    checkpoint = folder / "straight" / "checkpoint-6"
    rows = torch.randint(18, (64, 6), generator=torch.Generator().manual_seed(1))[48:]
    arguments = TrainingArguments(
        output_dir=str(folder / "measured"), use_cpu=True, report_to="none", disable_tqdm=True
    )
    for name, place, metric in (("lawa", "lawa", ""), ("ema", "ema", "ema_"), ("online", "", "online_")):
        model = LlamaForCausalLM.from_pretrained(checkpoint / place)
        expected = first["online at 6"] if name == "online" else first["at 6"][name]
        assert same({key: tensor.detach() for key, tensor in model.named_parameters()}, expected), name
        examples = [{"input_ids": row, "labels": row} for row in rows]
        measured = Trainer(model=model, args=arguments, eval_dataset=examples).evaluate()
        assert first["history"][2][f"eval_{metric}loss"] == pytest.approx(measured["eval_loss"], rel=1e-5)
    assert first["state"] == second["state"] == [True, True]  # for a run that begins with these weights
    assert (checkpoint / "averaging-manifest.json").is_file()


def test_transformers_averages_in_every_other_way(trained):
    from transformers import LlamaForCausalLM

    folder, ranks = trained
    for rank in ranks:
        require_further(rank["further"], steps=8)
    require_snapshots(folder, "trail", 2)
    require_snapshots(folder, "tracks", 4)
    stored = load_file(folder / "trail" / "step-000000008.safetensors")
    assert (
        stored.keys() == dict(LlamaForCausalLM.from_pretrained(folder / "trail" / "template").named_parameters()).keys()
    )


def test_transformers_refuses_what_cannot_be_kept(trained):
    _, ranks = trained
    for rank in ranks:
        assert "load_best_model_at_end does not reach" in rank["best"]
        assert "Trainer saves no state of its optimizer" in rank["resume"]
        assert "FSDP is not supported, as its parameters are not whole weights: train with DDP" in rank["anchor"]


def test_version_1_of_accelerates_fsdp_is_refused_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from averaging.transformers import EMA as EMACallback

    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    rows = [{"input_ids": torch.zeros(4, dtype=torch.long), "labels": torch.zeros(4, dtype=torch.long)}] * 8

    class Engine(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.trainer.is_fsdp_enabled = True

    trainer = transformers.Trainer(
        model=transformers.LlamaForCausalLM(config), args=arguments, train_dataset=rows,
        callbacks=[Engine, EMACallback(0.9)],
    )  # fmt: skip
    Engine.trainer = trainer
    with pytest.raises(ValueError, match=r"version 1 of accelerate's FSDP.*set fsdp_config=.*soup"):
        trainer.train()
