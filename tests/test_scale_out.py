"""`torchrun -m averaging.cli`: several processes cook one soup, and it is that of one process, byte for byte."""

import json
import os
import socket
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from averaging import cli


def launch(processes, *arguments, victim=None, code=None):
    """Run the command or ``code`` in several processes, ``victim`` in the last one: exit statuses, what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-c", code] if code else ["-m", "averaging.cli"]
    commands = [command] * (processes - 1) + [["-c", victim] if victim else command]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    ranks = [
        subprocess.Popen(
            [sys.executable, *command, *map(str, arguments)],
            env={**common, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    outputs = [rank.communicate(timeout=200) for rank in ranks]
    return [rank.returncode for rank in ranks], [out for out, _ in outputs], [err for _, err in outputs]


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Sharded language models; the first one is the others' initial model."""
    folder = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, vocab_size=300
    )
    for i in range(4):
        torch.manual_seed(i)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder / f"m{i}", max_shard_size="40KB")
    return [folder / f"m{i}" for i in range(4)]


ALL = """
import json, sys
from averaging import cli
from averaging.soups.team import torchrun

with torchrun() as team:
    for words in json.loads(sys.argv[1]):
        cli._run(cli.parser().parse_args([*words, "-q"]), team)
"""
METHODS = {
    "weighted": ["m1", "m2", "m3", "--weights", "1,2,3"],
    "window": ["m0", "m1", "m2", "m3", "--last", "2", "--every", "2", "--dtype", "fp32"],
    "slerp": ["m1", "m2", "m3", "--method", "slerp", "--init", "m0"],
    "model-stock": ["m1", "m2", "m3", "--method", "model-stock", "--init", "m0", "--dtype", "fp32"],
    "task": ["m1", "m2", "--method", "task", "--init", "m0", "--weights=1,-0.5", "--skip", "layers.1"],
    "fisher": ["m1", "m2", "--method", "fisher", "--weights", "1,2"],
    "ema": ["m0", "m1", "m2", "m3", "--method", "ema", "--decay", "0.7"],
    "wise-ft": ["m1", "--method", "wise-ft", "--init", "m0", "--alpha", "0.3"],
    "warp": ["m1", "m2", "--method", "warp", "--init", "m0"],
    "rewarded": ["m1", "m2", "--method", "rewarded"],
    "range": ["m1", "m2", "--method", "warp", "--init", "m0", "--eta", "0,0.5"],
    "layers": ["--recipe", "soup.yaml"],
    "product": ["lora-1", "lora-2", "--lora", "product"],
}


@pytest.fixture
def kitchen(models, monkeypatch):
    """The folder of the models, with Fisher information, adapters and a recipe in it, as the current one."""
    monkeypatch.chdir(models[0].parent)
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        weights = LlamaForCausalLM.from_pretrained(f"m{seed}").named_parameters()
        save_file({n: torch.rand(w.shape, generator=generator) for n, w in weights}, f"m{seed}/fisher.safetensors")
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=seed + 1, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        peft.get_peft_model(LlamaForCausalLM.from_pretrained("m0"), config).save_pretrained(f"lora-{seed}")
    recipe = "method: slerp\ninit: m0\ningredients: [m1, m2]\nlayers: {mlp: {eta: 0.5}, embed: {weights: [3, 1]}}\n"
    (models[0].parent / "soup.yaml").write_text(recipe)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's
def test_processes_together_write_what_one_does(kitchen, tmp_path):
    """Every method, in one launch."""
    folders = {method: [*words, "-o", str(tmp_path / "many" / method)] for method, words in METHODS.items()}
    status, _, errors = launch(3, json.dumps([*folders.values()]), code=ALL)
    assert status == [0] * 3, errors
    for method, words in METHODS.items():
        one = tmp_path / "one" / method
        assert cli.main([*words, "-o", str(one), "-q"]) == 0
        assert len(content(one)) > 2
        assert content(tmp_path / "many" / method) == content(one), method
    LlamaForCausalLM.from_pretrained(tmp_path / "many" / "slerp")


def test_torchrun_itself(models, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "averaging.cli", *map(str, models), "-o", str(tmp_path / "many")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("average of 4") == 1
    assert cli.main([*map(str, models), "-o", str(tmp_path / "one"), "-q"]) == 0
    assert content(tmp_path / "many") == content(tmp_path / "one")


def test_a_process_that_is_killed_leaves_the_old_output(models, tmp_path):
    target = tmp_path / "out"
    assert cli.main([*map(str, models[:2]), "-o", str(target), "-q"]) == 0
    before = content(target)
    kill = "import os, signal; from averaging.soups import engine; "
    kill += "engine._Pass._work = lambda *_: os.kill(os.getpid(), signal.SIGKILL); "
    kill += "import sys; from averaging import cli; sys.exit(cli.main(distributed=True))"
    status, _, errors = launch(2, *models, "-o", target, "--force", victim=kill)
    assert status == [2, -9]
    assert "lost the connection to another process" in errors[0]
    assert content(target) == before
    assert [*tmp_path.iterdir()] == [target]


def test_one_file_and_an_existing_output(tmp_path):
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        tensors = {f"t{j}": torch.randn(50 * j, generator=generator) for j in range(5)} | {"n": torch.tensor([7])}
        save_file(tensors, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    assert cli.main([*map(str, paths), "-q", "-o", str(tmp_path / "one.safetensors")]) == 0
    target = tmp_path / "many.safetensors"
    target.write_bytes(b"something else")
    status, _, errors = launch(2, *paths, "-o", target)
    assert status == [2, 2]
    assert "--force" in errors[0]
    assert target.read_bytes() == b"something else"
    status, _, errors = launch(2, *paths, "-o", target, "--force")
    assert status == [0, 0], errors
    assert target.read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def test_what_one_process_finds_wrong_stops_all(tmp_path):
    for i in range(2):
        last = torch.full((100,), torch.nan if i else 1.0)  # the second process's part
        save_file({"a": torch.ones(100), "b": last}, tmp_path / f"{i}.safetensors")
    (tmp_path / "out").mkdir()
    status, _, errors = launch(
        2, tmp_path / "0.safetensors", tmp_path / "1.safetensors", "-o", tmp_path / "out" / "x.safetensors"
    )
    assert status == [2, 2]
    assert "process 1" in errors[0]
    assert f"{tmp_path / '1.safetensors'}: tensor 'b' holds nan at element 0" in errors[0]
    assert "Traceback" not in errors[0] + errors[1]
    assert not [*(tmp_path / "out").iterdir()]


def test_searches_stay_with_one_process(models, tmp_path):
    status, _, errors = launch(2, *models, "--method", "greedy", "--evaluate", "a:b", "-o", tmp_path / "x")
    assert status == [2, 2]
    assert "runs in one process" in errors[0]
