"""Folders of DeepSpeed ZeRO, cooked as they lie, beside DeepSpeed's own conversion of them."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from ranks import once_on_ranks
from safetensors.torch import load_file, save_file

from averaging import cli, soups
from averaging.checkpoints import Checkpoint, find

pytest.importorskip("deepspeed")

ENGINES = [
    *("ZeRO-1, bf16", "ZeRO-1, bf16, float32 gradients", "ZeRO-1, fp32"),
    *("ZeRO-2, bf16", "ZeRO-2, fp16", "ZeRO-2, fp32", "ZeRO-3, bf16", "ZeRO-3, fp16", "ZeRO-3, fp32"),
]
every_engine = pytest.mark.parametrize("engine", ENGINES)


def made(world, tmp_path_factory):
    folder, results = once_on_ranks(world, "zero_folders:folders", tmp_path_factory.getbasetemp())
    return folder, results[0]


@pytest.fixture(scope="module", params=[1, 2, 3])
def folders(request, tmp_path_factory):
    """The folders that so many processes saved, and DeepSpeed's conversions."""
    return made(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return made(2, tmp_path_factory)[0]


@every_engine
def test_the_soup_is_the_mean_of_what_deepspeed_converts(engine, folders, tmp_path):
    folder, converted = folders
    checkpoints = find(folder / engine)
    assert [checkpoint.step for checkpoint in checkpoints] == [1, 2]
    for checkpoint, right in zip(checkpoints, converted[engine], strict=True):
        # of weights frozen under ZeRO-1 zero_to_fp32 knows nothing; its model holds them
        assert checkpoint.keys() - right.keys() == ({"a.bias"} if "ZeRO-1" in engine else set())
        assert not right.keys() - checkpoint.keys()
        for name, tensor in right.items():
            assert torch.equal(checkpoint[name], tensor)
            assert checkpoint[name].dtype == tensor.dtype
        assert checkpoint.ties == {"again.weight": "b.weight"}
    soups.uniform([folder / engine], tmp_path / "out.safetensors")
    souped = load_file(tmp_path / "out.safetensors")
    one, other = converted[engine]
    for name in one.keys() - {"norm.num_batches_tracked", "again.weight"}:
        assert torch.equal(souped[name], ((one[name].double() + other[name].double()) / 2).to(one[name].dtype)), name
    assert torch.equal(souped["a.bias"], checkpoints[0]["a.bias"])


@pytest.mark.parametrize("engine", ["ZeRO-1, bf16", "ZeRO-2, fp32", "ZeRO-3, bf16"])
def test_the_command_makes_a_model_folder(engine, of_two, tmp_path):
    one = Checkpoint(of_two / engine / "checkpoint-1")
    like = tmp_path / "like"
    like.mkdir()
    save_file({name: tensor.contiguous().clone() for name, tensor in one.items()}, like / "model.safetensors")
    (like / "config.json").write_text('{"model_type": "x"}')
    # both ways to name a folder
    paths = [of_two / engine / "checkpoint-1", of_two / engine / "checkpoint-2" / "global_step2"]
    assert cli.main([*map(str, paths), "--like", str(like), "-o", str(tmp_path / "out"), "-q"]) == 0
    soups.uniform(paths, tmp_path / "out.safetensors")
    souped, flat = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "out.safetensors")
    assert (tmp_path / "out" / "config.json").exists()
    for name, tensor in flat.items():
        assert torch.equal(souped[name], tensor)


def test_without_the_optimizers_files_the_models_own_weights_are_averaged(of_two, tmp_path):
    for step in (1, 2):
        shutil.copytree(of_two / "ZeRO-2, bf16" / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    for path in tmp_path.rglob("*_optim_states.pt"):
        path.unlink()
    with pytest.warns(UserWarning, match="lacks the optimizer's files, where the float32 weights are"):
        checkpoints = find(tmp_path)
    assert [checkpoint.step for checkpoint in checkpoints] == [1, 2]
    held = torch.load(tmp_path / "checkpoint-1/global_step1/mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert checkpoints[0].keys() == held.keys()
    assert all(torch.equal(checkpoints[0][name], tensor) for name, tensor in held.items())


OPTIMIZER, STATES = "zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"
DAMAGES = {
    "a rank of ZeRO-2 is missing": ("ZeRO-2, fp32", lambda tag: (tag / OPTIMIZER).unlink(), OPTIMIZER),
    "a rank of ZeRO-3 is missing": ("ZeRO-3, fp32", lambda tag: (tag / OPTIMIZER).unlink(), OPTIMIZER),
    "all of ZeRO-3 are missing": (
        "ZeRO-3, fp32",
        lambda tag: [path.unlink() for path in tag.glob("*optim_states.pt")],
        OPTIMIZER.replace("rank_1", "rank_0"),
    ),
    "frozen weights are missing": (
        "ZeRO-3, bf16",
        lambda tag: (tag / f"zero_pp_rank_1_{STATES}").unlink(),
        f"zero_pp_rank_1_{STATES}",
    ),
    "the model's states are missing": (
        "ZeRO-3, fp16",
        lambda tag: (tag / f"zero_pp_rank_0_{STATES}").unlink(),
        f"zero_pp_rank_0_{STATES}",
    ),
    "a rank is cut off": ("ZeRO-2, fp16", lambda tag: os.truncate(tag / OPTIMIZER, 2000), OPTIMIZER),
    "a rank is another stage's": (
        "ZeRO-3, fp32",
        lambda tag: shutil.copy(tag.parents[1] / "other" / "global_step1" / OPTIMIZER, tag),
        OPTIMIZER,
    ),
    "a rank is left of a larger run": (
        "ZeRO-2, fp32",
        lambda tag: shutil.copy(tag / OPTIMIZER, tag / OPTIMIZER.replace("rank_1", "rank_2")),
        "the states of 3 optimizers, but 2 processes made them",
    ),
    "the parameters are others": ("ZeRO-2, fp32", lambda tag: reshaped(tag / STATES), "elements"),
}


def reshaped(path):
    content = torch.load(path, weights_only=False)
    content["param_shapes"][1]["c.weight"] = torch.Size([3, 70])
    torch.save(content, path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_belong_together_is_one_clear_line(damage, of_two, tmp_path, capsys):
    engine, harm, says = DAMAGES[damage]
    shutil.copytree(of_two / engine / "checkpoint-1", tmp_path / "bad")
    shutil.copytree(of_two / "ZeRO-2, fp32" / "checkpoint-1", tmp_path / "other")
    harm(tmp_path / "bad" / "global_step1")
    paths = [of_two / engine / "checkpoint-2", tmp_path / "bad"]
    assert cli.main([*map(str, paths), "-o", str(tmp_path / "out.safetensors")]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()
