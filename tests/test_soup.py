"""Uniform and weighted soups: exact numbers, the same kind of output, in Python and from the command line."""

import functools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from averaging import cli, compiled, kernels
from averaging.checkpoints import Checkpoint
from averaging.soups import arithmetic, engine, uniform

HALF = [torch.bfloat16, torch.float16]
FLOATS = [*HALF, torch.float32, torch.float64]


@functools.cache
def every_number(dtype):
    """The finite numbers of ``dtype`` in order, and as float64."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every)]
    values, order = np.unique(every.double().numpy(), return_index=True)
    return every[torch.from_numpy(order)], values


def nearest(wide, dtype):
    """The numbers of ``dtype`` nearest to float64 ``wide``, ties to even: a search among the neighbours."""
    if dtype not in HALF:
        return torch.from_numpy(wide).to(dtype)
    every, values = every_number(dtype)
    at = np.clip(np.searchsorted(values, wide), 1, len(values) - 1)
    low, high = values[at - 1], values[at]
    even = (every[torch.from_numpy(at - 1)].view(torch.int16) & 1 == 0).numpy()
    down, up = wide - low, high - wide  # exact: neighbours of half precision, float64 between
    return every[torch.from_numpy(np.where((down < up) | ((down == up) & even), at - 1, at))]


def random(shape, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    scale = 2.0 ** torch.randint(-20, 3, shape, generator=g)
    return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype)


def write(path, tensors, **metadata):
    save_file(tensors, path, metadata=metadata or None)
    return path


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(engine, "PIECE", 1024)


@pytest.fixture(params=["compiled", "torch"])
def both(request, monkeypatch):
    """Once with the compiled kernels and once as where they could not be built."""
    if request.param == "torch":
        monkeypatch.setattr(compiled, "kernels", None)
    elif compiled.kernels is None:
        pytest.skip("built without a compiler")


def soup(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_is_to_the_nearest(dtype, both):
    wide = torch.cat([random((20000,), torch.float64, 1) * s for s in (1, 2.0**-5, 2.0**-12, 2.0**-120)])
    middle = wide.to(dtype)
    beside = (middle.view(torch.int16) + 1).view(dtype)
    ties = (middle.double() + beside.double()) / 2
    hard = torch.cat([wide, ties, ties * (1 + 2.0**-52), ties * (1 - 2.0**-52), ties * (1 + 2.0**-26)])
    assert torch.equal(rounded(hard, dtype), nearest(hard.numpy(), dtype))
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 1e300, -1e300], dtype=torch.float64)
    expected = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, torch.inf, -torch.inf]).to(dtype)
    assert torch.equal(rounded(odd, dtype).nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_rounding_next_to_every_number_and_midpoint(dtype, scale, both):
    # Some numbers at a time: they are rounded faster where all of them are normal.
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(-1, 64)
    for low in bits.view(dtype):
        high = (low.view(torch.int16) + 1).view(dtype)
        exact = torch.cat([low.double(), (low.double() + high.double()) / 2])
        exact = exact[exact.isfinite()]
        wide = torch.cat([exact * factor for factor in (1, 1 + 2.0**-52, 1 - 2.0**-53, 1 - 2.0**-52, 1 + 2.0**-30)])
        wide /= scale
        if len(wide):
            assert torch.equal(rounded(wide, dtype, scale=scale), nearest(wide.numpy() * scale, dtype))


def rounded(wide, dtype, **options):
    out = torch.empty(len(wide), dtype=dtype)
    kernels.round_into(out, wide, **options)
    return out


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weights", [None, [0.3, 0.1, 2.0, 1.0, 0.7, -0.1]])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_every_entry_is_the_nearest_to_the_float64_mean(tmp_path, dtype, weights, count, small_pieces, both):
    shapes = {"matrix": (70, 33), "vector": (1025,), "scalar": (), "empty": (0, 3)}
    models = [{n: random(s, dtype, 10 * i + j) for j, (n, s) in enumerate(shapes.items())} for i in range(count)]
    paths = [write(tmp_path / f"{i}.safetensors", model) for i, model in enumerate(models)]
    weights = weights and weights[:count]
    mixed = uniform(paths, weights=weights)
    for name in shapes:
        total = 0.0
        for weight, model in zip(weights or [1.0] * count, models, strict=True):
            total = total + weight * model[name].double().numpy()
        mean = np.asarray(total / (math.fsum(weights) if weights else count))
        expected = nearest(mean.reshape(-1), dtype).reshape(shapes[name])
        assert mixed[name].dtype == dtype
        torch.testing.assert_close(mixed[name], expected, rtol=1e-15 if dtype == torch.float64 else 0, atol=0)
        if weights is None:
            live = torch.empty_like(mixed[name])
            kernels.combine([([model[name] for model in models], live)], divisor=count)
            assert torch.equal(live, mixed[name])


def test_pieces_of_the_real_size_and_all_outputs_agree(tmp_path, both):
    models = [{"a": random((3, 150_001), torch.bfloat16, i), "b": random((7,), torch.float32, i)} for i in range(5)]
    paths = [write(tmp_path / f"{i}.safetensors", model) for i, model in enumerate(models)]
    written = uniform(paths, tmp_path / "soup.safetensors")
    memory = uniform(paths)
    for name in models[0]:
        total = sum(model[name].double().numpy() for model in models)
        expected = nearest(total / 5, models[0][name].dtype)
        assert torch.equal(memory[name], expected)
        assert torch.equal(written[name], expected)
        assert torch.equal(load_file(tmp_path / "soup.safetensors")[name], expected)


def test_complex_and_what_is_not_averaged(tmp_path, both):
    z = torch.complex(torch.randn(5), torch.randn(5))
    fixed = {"bool": torch.tensor([True]), "int": torch.arange(3), "fp8": torch.ones(4).to(torch.float8_e4m3fn)}
    for i in range(3):
        write(tmp_path / f"{i}.safetensors", {"z": z * i, "bn.num_batches_tracked": torch.tensor(10 * i)} | fixed)
    mixed = uniform([tmp_path])
    assert torch.equal(mixed["z"], z)
    assert mixed["bn.num_batches_tracked"] == 20
    assert all(torch.equal(mixed[name], fixed[name]) for name in ("bool", "int"))
    assert torch.equal(mixed["fp8"].view(torch.uint8), fixed["fp8"].view(torch.uint8))


@pytest.mark.parametrize("dtype", ["bfloat16", "fp16", "float32", "float64"])
def test_another_dtype(tmp_path, dtype, both):
    models = [{"a": random((999,), torch.float32, i), "n": torch.tensor([3])} for i in range(3)]
    paths = [write(tmp_path / f"{i}.safetensors", model) for i, model in enumerate(models)]
    mixed = uniform(paths, tmp_path / "out.safetensors", dtype=dtype)
    target = {"fp16": torch.float16}.get(dtype) or getattr(torch, dtype)
    assert torch.equal(mixed["a"], nearest(sum(m["a"].double().numpy() for m in models) / 3, target))
    assert mixed["n"].dtype == torch.int64


def test_threads_are_put_back_and_do_not_matter(tmp_path, small_pieces):
    paths = [write(tmp_path / f"{i}.safetensors", {"a": random((50_000,), torch.float32, i)}) for i in range(2)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(uniform(paths)["a"])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


# --- Hugging Face, PEFT, Lightning -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three checkpoints of a tiny tied language model, in shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("run")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    for step in (5, 10, 100):
        torch.manual_seed(step)
        path = folder / f"checkpoint-{step}"
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="20KB")
        (path / "tokenizer.json").write_text('{"x": 1}')
        (path / "custom.py").write_text("pass")
        (path / "additional_chat_templates").mkdir()
        (path / "additional_chat_templates" / "a.jinja").write_text("t")
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (path / "optimizer.pt").write_bytes(b"x")
        (path / "training_args.bin").write_bytes(b"x")
    return folder


def test_a_folder_of_checkpoints_becomes_a_model(run, capsys):
    from transformers import AutoModelForCausalLM

    assert soup(run) == 0
    assert "average of 3" in capsys.readouterr().out
    paths = [run / f"checkpoint-{step}" for step in (5, 10, 100)]
    models = [AutoModelForCausalLM.from_pretrained(path) for path in paths]
    model = AutoModelForCausalLM.from_pretrained(run / "soup")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    state = model.state_dict()
    for name in state:
        total = sum(m.state_dict()[name].double().numpy() for m in models)
        assert torch.equal(state[name], nearest(total / 3, torch.bfloat16)), name
    # the same files with the same tensors in the same order
    last = paths[-1]
    copied = ["additional_chat_templates/a.jinja", "config.json", "custom.py", "generation_config.json"]
    copied += ["model.safetensors.index.json", "tokenizer.json"]
    shards = sorted(path.name for path in last.glob("*.safetensors"))
    assert len(shards) > 2
    written = {str(path.relative_to(run / "soup")) for path in (run / "soup").rglob("*") if path.is_file()}
    assert written == {*copied, *shards, "soup.json"}
    for name in copied[:-2] + copied[-1:]:
        assert (run / "soup" / name).read_bytes() == (last / name).read_bytes()
    one, two = Checkpoint(last), Checkpoint(run / "soup")
    assert one.shards == two.shards
    assert [(e.dtype, e.shape) for e in one.entries.values()] == [(e.dtype, e.shape) for e in two.entries.values()]
    for shard in shards:
        with safe_open(run / "soup" / shard, "pt") as file:
            assert file.metadata()["format"] == "pt"
            assert json.loads(file.metadata()["soup"]) == json.loads((run / "soup" / "soup.json").read_text())

    # a second run takes the same three, and needs --force
    before = (run / "soup" / shards[0]).read_bytes()
    assert soup(run) == 2
    assert "--force" in capsys.readouterr().err
    assert soup(run, "--force", "-q") == 0
    assert capsys.readouterr() == ("", "")
    assert (run / "soup" / shards[0]).read_bytes() == before


def test_the_record_says_what_was_done(run, tmp_path):
    assert soup(run, "-o", tmp_path / "out", "--last", 2, "--weights", "1,3", "-q") == 0
    record = json.loads((tmp_path / "out" / "soup.json").read_text())
    assert [(i["step"], i["coefficient"]) for i in record["ingredients"]] == [(10, 0.25), (100, 0.75)]
    assert record["versions"]["torch"] == torch.__version__
    assert all(len(i["checksum"]) == len("piecesums-sha256:") + 64 for i in record["ingredients"])
    assert len({i["checksum"] for i in record["ingredients"]}) == 2


def test_another_dtype_is_named_in_the_configuration(run, tmp_path):
    from transformers import AutoModelForCausalLM

    assert soup(run, "-o", tmp_path / "out", "--dtype", "float32", "-q") == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == Checkpoint(tmp_path / "out").nbytes


def test_checksums_see_content_and_order_but_not_the_files(tmp_path, small_pieces, both):
    def checksums(*models):
        for i, model in enumerate(models):
            write(tmp_path / f"{i}.safetensors", model)
        uniform([tmp_path / f"{i}.safetensors" for i in range(len(models))], tmp_path / "o.safetensors", force=True)
        return [i["checksum"] for i in json.loads((tmp_path / "o.soup.json").read_text())["ingredients"]]

    a = torch.arange(3000.0)
    flipped, swapped = a.clone(), a.clone()
    flipped[2999] += 1
    swapped[[100, 102]] = a[[102, 100]]
    moved = a.roll(1)
    found = checksums(*({"a": x, "b": torch.ones(1)} for x in (a, flipped, swapped, moved)))
    assert len(set(found)) == 4
    with pytest.warns(UserWarning, match="same content"):
        assert len(set(checksums({"a": a}, {"a": a.clone()}))) == 1


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_stay_adapters(run, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    for i in range(2):
        base = AutoModelForCausalLM.from_pretrained(run / "checkpoint-5", dtype=torch.float32)
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapted.save_pretrained(tmp_path / f"adapter-{i}")
    mixed = uniform([tmp_path / "adapter-0", tmp_path / "adapter-1"], tmp_path / "out")
    ones = [load_file(tmp_path / f"adapter-{i}" / "adapter_model.safetensors") for i in range(2)]
    base = AutoModelForCausalLM.from_pretrained(run / "checkpoint-5", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").state_dict()
    for name in mixed:
        expected = ((ones[0][name].double() + ones[1][name].double()) / 2).float()
        assert torch.equal(mixed[name], expected)
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], expected)

    config = json.loads((tmp_path / "adapter-1" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "another"
    (tmp_path / "adapter-1" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        uniform([tmp_path / "adapter-0", tmp_path / "adapter-1"])


@pytest.mark.filterwarnings("ignore")  # of Lightning, about workers and the like
def test_lightning_checkpoints(tmp_path):
    import lightning
    from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset

    trainer = lightning.Trainer(
        default_root_dir=tmp_path, max_epochs=2, limit_train_batches=3, limit_val_batches=0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, save_last=True)],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(RandomDataset(32, 3))
    trainer.fit(BoringModel(), loader)
    states = [torch.load(p, weights_only=True) for p in sorted((tmp_path / "ckpt").glob("epoch*.ckpt"))]
    assert soup(tmp_path / "ckpt", "-q") == 0
    mixed = load_file(tmp_path / "ckpt" / "soup" / "model.safetensors")
    BoringModel().load_state_dict(mixed)
    for name, tensor in mixed.items():
        total = sum(state["state_dict"][name].double() for state in states)
        assert torch.equal(tensor, (total / len(states)).float())
    record = json.loads((tmp_path / "ckpt" / "soup" / "soup.json").read_text())
    assert [i["step"] for i in record["ingredients"]] == [3, 6]


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing_and_needs_no_torch(run, tmp_path):
    code = (
        "import sys; from averaging import cli; "
        f"status = cli.main([{str(run)!r}, '-o', {str(tmp_path / 'out')!r}, '--dry-run', '--weights=1,1,2']); "
        "assert not {'torch', 'numpy'} & sys.modules.keys(); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert list(tmp_path.iterdir()) == []
    assert "0.5000 × " in done.stdout
    assert "checkpoint-100" in done.stdout
    assert "step 100" in done.stdout
    assert "tokenizer.json (copied)" in done.stdout


@pytest.mark.skipif(compiled.kernels is None, reason="built without a compiler")
@pytest.mark.parametrize("arguments", [[], ["--method", "slerp"], ["--method", "model-stock"], ["--dtype", "fp16"]])
def test_safetensors_are_mixed_without_torch(tmp_path, arguments):
    for i in range(3):
        write(tmp_path / f"{i}.safetensors", {"a": random((50,), torch.bfloat16, i), "n": torch.arange(3)})
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(3)]
    if "--method" in arguments:
        arguments = [*arguments, "--init", paths.pop(0)]
    code = (
        "import sys; from averaging import cli; "
        f"status = cli.main({[*paths, *arguments, '-o', str(tmp_path / 'out.safetensors')]!r}); "
        "sys.exit(status or 'torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert torch.isfinite(load_file(tmp_path / "out.safetensors")["a"]).all()


@pytest.mark.skipif(compiled.kernels is None, reason="built without a compiler")
@pytest.mark.parametrize("divisor", [3.0, 4.0])
@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_compiled_kernels_and_torch_give_the_same_bits(dtype, target, divisor):
    """Every number of half precision, NaN, infinity and subnormal ones among them, in every position of a vector."""
    g = torch.Generator().manual_seed(1)
    if dtype in HALF:
        rows = [torch.randperm(2**16, generator=g).to(torch.int16).view(dtype) for _ in range(3)]
    else:
        scales = 10.0 ** torch.randint(-44, 38, (3, 65_537), generator=g, dtype=torch.float64)
        rows = [*(torch.randn(scales.shape, generator=g, dtype=torch.float64) * scales).to(dtype)]
        rows[1][7], rows[2][1000] = torch.nan, torch.inf
    count = len(rows[0])
    for coefficients in (None, [0.25, -1.5, 1e-3]):
        ours, expected = torch.empty(count, dtype=target), torch.empty(count, dtype=target)
        finite = arithmetic.Compiled().combine(
            [row.view(torch.uint8).numpy().data for row in rows],
            str(dtype).removeprefix("torch."),
            coefficients,
            divisor,
            ours.view(torch.uint8).numpy().data,
            str(target).removeprefix("torch."),
        )
        kernels.Combiner()(rows, expected, coefficients, divisor)
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[target.itemsize]
        assert not finite
        assert torch.equal(ours.isnan(), expected.isnan())
        real = ~expected.isnan()
        assert torch.equal(ours.view(bits)[real], expected.view(bits)[real])


@pytest.mark.skipif(compiled.kernels is None, reason="built without a compiler")
def test_compiled_kernels_refuse_what_does_not_fit():
    row, out, matrix = memoryview(bytes(8)), memoryview(bytearray(8)), memoryview(bytearray(32))
    kernel = compiled.kernels
    for wrong in (
        lambda: kernel.combine([], 2, None, 1.0, out, 2),
        lambda: kernel.combine([row, row[:4]], 2, None, 1.0, out, 2),
        lambda: kernel.combine([row[:6]], 2, None, 1.0, out, 2),
        lambda: kernel.combine([row], 2, None, 1.0, out[:4], 2),
        lambda: kernel.combine([row], 9, None, 1.0, out, 2),
        lambda: kernel.combine([row], 2, None, 1.0, out, -1),
        lambda: kernel.products([row, row], 2, matrix[:16]),
        lambda: kernel.products([row] * 5000, 2, matrix),
        lambda: kernel.sums(row, 512, memoryview(bytearray(arithmetic.SUMS))),
        lambda: kernel.sums(row, 256 * 1024, memoryview(bytearray(arithmetic.SUMS))),
        lambda: kernel.sums(row, 0, out),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            wrong()
    for coefficients, place in ((["a"], out), (None, row)):  # the last is read-only
        with pytest.raises(TypeError):
            kernel.combine([row], 2, coefficients, 1.0, place, 2)
    with pytest.raises(IndexError):
        kernel.combine([row, row], 2, [1.0], 1.0, out, 2)


def test_help_and_version_need_no_torch():
    for option in ("--help", "--version"):
        code = (
            "import sys; from averaging import cli\n"
            f"try: cli.main([{option!r}])\nexcept SystemExit as e: assert e.code == 0\n"
            "assert not {'torch', 'numpy'} & sys.modules.keys()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "soup" in done.stdout


def test_the_options_are_frozen():
    options = {option for action in cli.parser()._actions for option in action.option_strings}
    assert options == {
        "-h", "--help", "--version", "-o", "--output", "--last", "--every", "--weights", "--like", "--dtype",
        "--post-hoc", "--at", "--sweep", "--evaluate", "--metric", "--method", "--init", "--alpha", "--scale", "--eta",
        "--lambda", "--slerp-weights", "--lora", "--lora-rank",
        "--decay", "--only", "--skip", "--top", "--evaluate-command", "--minimize", "--maximize", "--plot",
        "--loss", "--per", "--normalize", "--lr", "--epochs", "--evaluations", "--seed",
        "--recipe", "--fisher", "--floor", "--target", "--temperature",
        "--allow-nonfinite", "--dry-run", "--force", "-q", "--quiet", "--debug",
    }  # fmt: skip


def test_a_bar_on_a_terminal_only(tmp_path, monkeypatch, capsys):
    for i in range(2):
        write(tmp_path / f"{i}.safetensors", {"a": torch.ones(10) * i})
    assert soup(tmp_path) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert soup(tmp_path, "--force") == 0
    assert "100%" in capsys.readouterr().err
