"""Checkpoints as trainers and engines leave them, cooked as they lie."""

import json

import pytest
import torch
from safetensors.torch import load_file

from averaging import cli
from averaging.checkpoints import Checkpoint, find

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}


def llama(seed, **config):
    torch.manual_seed(seed)
    settings = TINY | {"num_key_value_heads": 2, "tie_word_embeddings": False} | config
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


def same(one, other):
    assert dict(one).keys() == dict(other).keys()
    for name, tensor in other.items():
        assert torch.equal(one[name], tensor), name


def mean(*states):
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(states[0][name].dtype)
        for name in states[0]
    }


def soup(*arguments):
    assert cli.main([*map(str, arguments), "-q"]) == 0


# --- pytorch_model.bin ------------------------------------------------------------------------------------------------


def bin_folder(path, model, shards=1, step=None):
    """What save_pretrained(safe_serialization=False) wrote, when it still did."""
    path.mkdir(parents=True)
    state, names = model.state_dict(), list(model.state_dict())
    files = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    files = ["pytorch_model.bin"] if shards == 1 else files
    places = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
    for file in files:
        torch.save({name: state[name] for name in names if places[name] == file}, path / file)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    torch.save({"not": "weights"}, path / "training_args.bin")
    if step is not None:
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_folders_with_pytorch_model_bin(tmp_path, shards, tied):
    models = [llama(i, tie_word_embeddings=tied) for i in range(2)]
    for i, model in enumerate(models):
        bin_folder(tmp_path / "run" / f"checkpoint-{i + 1}", model, shards, step=i + 1)
    checkpoints = find(tmp_path / "run")
    assert [(c.kind, c.step, len(c.shards)) for c in checkpoints] == [("huggingface", i, shards) for i in (1, 2)]
    same(checkpoints[0], models[0].state_dict())
    soup(tmp_path / "run", "-o", tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()} - {"config.json", "generation_config.json"}
    files = {"model.safetensors"}
    if shards > 1:
        files = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)} | {"model.safetensors.index.json"}
    assert written == files | {"soup.json"}
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    same(opened.state_dict(), mean(*(model.state_dict() for model in models)))
    same(Checkpoint(tmp_path / "out"), opened.state_dict())  # with an index that tells the truth
    soup(tmp_path / "run", "-o", tmp_path / "half", "--dtype", "bf16")
    assert transformers.LlamaForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_model_folders_of_either_format_mix(tmp_path):
    models = [llama(i) for i in range(2)]
    bin_folder(tmp_path / "a", models[0], shards=2)
    models[1].save_pretrained(tmp_path / "b")
    for last in ("a", "b"):
        first = "ab".replace(last, "")
        soup(tmp_path / first, tmp_path / last, "-o", tmp_path / f"out-{last}")
        assert (tmp_path / f"out-{last}" / "model.safetensors.index.json").exists() == (last == "a")
        opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path / f"out-{last}")
        same(opened.state_dict(), mean(*(model.state_dict() for model in models)))


def test_adapters_with_adapter_model_bin(tmp_path):
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        torch.save({"a.lora_A.weight": torch.full((2, 3), float(i))}, tmp_path / str(i) / "adapter_model.bin")
        (tmp_path / str(i) / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    soup(tmp_path / "0", tmp_path / "1", "-o", tmp_path / "out")
    same(load_file(tmp_path / "out" / "adapter_model.safetensors"), {"a.lora_A.weight": torch.full((2, 3), 0.5)})


def test_an_index_of_torch_files_must_tell_the_truth(tmp_path):
    folder = bin_folder(tmp_path / "m", llama(0), shards=2)
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())

    def says(places, error, message):
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
        with pytest.raises(error, match=message):
            Checkpoint(folder)

    places = index["weight_map"]
    says(places | {"x": "../pytorch_model.bin"}, ValueError, "own folder")
    says(places | {"x": "pytorch_model-00009-of-00002.bin"}, FileNotFoundError, "missing")
    says(places | {"x": next(iter(places.values()))}, ValueError, "'x', but it does not")
    says({name: places[name] for name in list(places)[1:]}, ValueError, "does not say")
    torch.save({"x": torch.ones(1)}, folder / "model-00001-of-00002.bin")
    says(places | {"x": "model-00001-of-00002.bin"}, ValueError, "another shard")


class Code:
    pass


def test_pickles_in_folders_do_not_execute(tmp_path):
    for name in "ab":
        folder = bin_folder(tmp_path / name, llama(0))
        torch.save({"w": torch.ones(1), "x": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin needs the code of \S*Code"):
        Checkpoint(tmp_path / "a")


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


def deepspeed(path, step, files=("mp_rank_00_model_states.pt",), script=False, **content):
    """What DeepSpeed writes, as transformers and Lightning have it."""
    (path / f"global_step{step}").mkdir(parents=True)
    (path / "latest").write_text(f"global_step{step}")
    weights = {"w": torch.full((3,), float(step)).bfloat16()}
    for file in files:
        content = {"module": weights, "global_steps": step, "optimizer": None, "ds_config": {"a": 1}} | content
        torch.save(content, path / f"global_step{step}" / file)
    torch.save({"x": Code()}, path / f"global_step{step}" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    if script:
        (path / "zero_to_fp32.py").write_text("")
    return path


def test_deepspeed_with_the_whole_model(tmp_path):
    for step in (10, 20):
        deepspeed(tmp_path / "run" / f"checkpoint-{step}", step)
        deepspeed(tmp_path / "raw", step)
    for folder in ("run", "raw"):
        assert [c.step for c in find(tmp_path / folder)] == [10, 20]
        soup(tmp_path / folder, "-o", tmp_path / f"{folder}.safetensors")
        same(load_file(tmp_path / f"{folder}.safetensors"), {"w": torch.full((3,), 15.0).bfloat16()})
    # beside a model, DeepSpeed's files are not looked at
    model = llama(0)
    model.save_pretrained(tmp_path / "run" / "checkpoint-10")
    same(Checkpoint(tmp_path / "run" / "checkpoint-10"), model.state_dict())


STATES = "mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    "files",
    [
        [STATES, "mp_rank_01_model_states.pt"],
        [STATES, "layer_00-model_states.pt"],
        [STATES, "layer_0_expert_0_mp_rank_00_model_states.pt"],
        [STATES, "expp_rank_0_mp_rank_00_optim_states.pt"],
        [STATES, "zero"],
        ["zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_01_model_states.pt"],
        [STATES, "zero_pp_rank_0_mp_rank_00_model_states.pt"],
    ],
)
def test_deepspeeds_partitions_get_the_command_that_converts_them(tmp_path, capsys, files):
    a = deepspeed(tmp_path / "a", 1, files, script=True)
    b = deepspeed(tmp_path / "my run", 2, files)
    for first, command in [
        (a, f"python {a}/zero_to_fp32.py {a} {a}-fp32 -t global_step1"),
        (b, f"python -m deepspeed.utils.zero_to_fp32 '{b}' '{b}-fp32' -t global_step2"),
        (b / "global_step2", f"zero_to_fp32 '{b}' '{b}/global_step2-fp32' -t global_step2"),
    ]:
        assert cli.main([str(first), str(a if first != a else b), "-o", str(tmp_path / "out")]) == 2
        assert command in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a", "my run"}


def test_deepspeeds_files_do_not_execute(tmp_path, capsys):
    a, b = deepspeed(tmp_path / "a", 1), deepspeed(tmp_path / "b", 1, client=Code())
    assert cli.main([str(a), str(b), "-o", str(tmp_path / "out")]) == 2
    assert "mp_rank_00_model_states.pt needs the code of" in capsys.readouterr().err


# --- the Hub's cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts a model into the Hub's cache, and no network."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", None)
    monkeypatch.chdir(tmp_path)

    def download(model, name, commit, revision="main"):
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        model.save_pretrained(folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        (folder / "blobs").mkdir(exist_ok=True)
        for number, file in enumerate(sorted((folder / "snapshots" / commit).iterdir())):  # as the cache has them
            file.symlink_to(file.rename(folder / "blobs" / f"{commit}-{number}"))

    return download


def test_models_in_the_hubs_cache(tmp_path, hub):
    models = [llama(i) for i in range(3)]
    hub(models[0], "kitchen/one", "a" * 40)
    hub(models[1], "kitchen/one", "b" * 40, revision="v2")
    hub(models[2], "kitchen/two.five", "c" * 40)
    soup("kitchen/one", "kitchen/one@v2", "kitchen/two.five", "-o", "out")
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    same(opened.state_dict(), mean(*(model.state_dict() for model in models)))
    soup("kitchen/one@v2", "--method", "wise-ft", "--init", f"kitchen/one@{'a' * 40}", "-o", "robust")
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "robust")
    same(opened.state_dict(), mean(*(model.state_dict() for model in models[:2])))
    record = json.loads((tmp_path / "out" / "soup.json").read_text())
    assert record["ingredients"][0]["path"].endswith("a" * 40)  # a name may come to stand for another model
    models[2].save_pretrained(tmp_path / "kitchen" / "one")
    same(Checkpoint("kitchen/one"), models[2].state_dict())  # what is here comes first


def test_models_that_are_not_in_the_hubs_cache(hub, capsys):
    hub(llama(0), "kitchen/one", "a" * 40)
    for name, command in [
        ("kitchen/two", "hf download kitchen/two"),
        ("kitchen/one@v3", "hf download kitchen/one --revision v3"),
        ("runs/mistyped", "no such file or directory: runs/mistyped"),
        ("..-/--x", "no such file or directory: ..-/--x"),
        ("runs/x.ckpt", "no such file or directory: runs/x.ckpt"),
    ]:
        assert cli.main(["kitchen/one", name, "-o", "out"]) == 2
        assert command in capsys.readouterr().err


# --- heads ------------------------------------------------------------------------------------------------------------


def head(kind, seed, **settings):
    torch.manual_seed(seed)
    if kind == "vision":
        tiny = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.ViTConfig(**tiny, image_size=8, patch_size=4, num_labels=3)
        return transformers.ViTForImageClassification(config)
    if kind == "resnet":  # with BatchNorm's buffers, integers among them
        config = transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
        )
        return transformers.ResNetForImageClassification(config)
    config = transformers.LlamaConfig(**TINY, num_key_value_heads=2, num_labels=3, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(config)


@pytest.mark.parametrize("kind", ["vision", "resnet", "sequence"])
def test_classifiers(tmp_path, kind):
    models = [head(kind, seed) for seed in range(2)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / "run" / f"checkpoint-{i + 1}")
        for name in ("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.save({"x": Code()}, tmp_path / "run" / f"checkpoint-{i + 1}" / name)
    soup(tmp_path / "run", "-o", tmp_path / "out")
    opened = type(models[0]).from_pretrained(tmp_path / "out")
    assert opened.config.num_labels == 3
    same(opened.state_dict(), mean(*(model.state_dict() for model in models)))
    data = {"pixel_values": torch.ones(1, 3, 32 if kind == "resnet" else 8, 32 if kind == "resnet" else 8)}
    data = data if kind != "sequence" else {"input_ids": torch.tensor([[1, 2, 3]])}
    with torch.no_grad():
        assert opened.eval()(**data).logits.shape == (1, 3)
