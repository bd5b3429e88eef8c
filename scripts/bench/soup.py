"""`soup` as a whole process beside the limit (`cat` of the inputs and a write of the output) and its peers.

    python scripts/bench/soup.py [--count 4] [--repeats 5] [--methods uniform ...] [--folder /tmp/soup-bench]

Writes `count` sharded bf16 checkpoints of about 0.9 GB and what they come from into the folder, then takes turns, and
prints medians of wall seconds and of peak resident memory, and how many numbers of each result are not mergekit's.
mergekit takes part when its command `mergekit-yaml` is on the PATH (it pins old versions of other packages: give it a
virtual environment of its own). The start-up is that of `soup --version`, and for the peers that of a process that
imports torch and does nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

LOAD_EVERYTHING = """
import glob, sys, torch
from safetensors.torch import load_file, save_file
folders = sorted(glob.glob(sys.argv[1] + "/checkpoint-*"))
models = [{k: v for f in sorted(glob.glob(d + "/*.safetensors")) for k, v in load_file(f).items()} for d in folders]
mean = {k: (sum(m[k].float() for m in models) / len(models)).bfloat16() for k in models[0]}
save_file(mean, sys.argv[2])
"""


# Of each method its own options, and mergekit's name, settings of the whole and of each model.
METHODS = {
    "uniform": ([], "linear", "", "{weight: 1}"),
    "task": (["--scale", "0.3"], "task_arithmetic", "parameters: {normalize: false}", "{weight: 0.3}"),
    "slerp": ([], "multislerp", "", "{weight: 1}"),
    "model-stock": ([], "model_stock", "", "{}"),
}

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
LAYER = {f"self_attn.{part}_proj": (1536, 1536) for part in "qkvo"}
LAYER |= {"mlp.gate_proj": (4096, 1536), "mlp.up_proj": (4096, 1536), "mlp.down_proj": (1536, 4096)}
LAYER |= {"input_layernorm": (1536,), "post_attention_layernorm": (1536,)}


def make(folder: Path, count: int) -> None:
    """Checkpoints as along one run: a common base and a little noise of their own."""
    import torch
    from safetensors.torch import save_file

    shapes = {f"model.layers.{i}.{part}.weight": shape for i in range(16) for part, shape in LAYER.items()}
    shapes |= {"model.embed_tokens.weight": (8192, 1536), "model.norm.weight": (1536,)}
    names = list(shapes)
    shards = [names[i : i + 49] for i in range(0, len(names), 49)]
    for i in range(-1, count):
        target = folder / (f"checkpoint-{100 * (i + 1)}" if i >= 0 else "base")
        if (target / "config.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        places: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name in shard:
                base = torch.randn(shapes[name], generator=torch.Generator().manual_seed(names.index(name))) * 0.02
                noise = torch.randn(shapes[name], generator=torch.Generator().manual_seed(1000 + i)) * 0.001
                tensors[name] = (base + noise if i >= 0 else base).bfloat16()
            save_file(tensors, target / file, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file)
        (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        (target / "config.json").write_text(json.dumps(CONFIG))


def run(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Wall seconds and peak resident megabytes of one process."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed: {process.stderr.read().decode() if process.stderr else ''}")
    return time.perf_counter() - begin, usage.ru_maxrss / 1000


def differing(one: Path, other: Path) -> str:
    """How many numbers of two results differ, and by how much at most."""
    import torch
    from safetensors.torch import load_file

    ours, theirs = (
        {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}
        for path in (one, other)
    )
    different, count, most = 0, 0, 0.0
    for name, tensor in ours.items():
        wide = tensor.double().abs()
        apart = (tensor.double() - theirs[name].double()).abs_()
        different += int((apart != 0).sum())
        count += tensor.numel()
        common = wide > wide.square().mean().sqrt() / 100
        most = max(most, float((apart / torch.exp2(torch.floor(torch.log2(wide)) - 7))[common].max()))
    return (
        f"{different / count:.2%} of the numbers differ; those above a hundredth of their tensor's root mean square by "
        f"{most:.0f} units in the last place at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["uniform"])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/soup-bench"))
    options = parser.parse_args()
    folder: Path = options.folder / str(options.count)
    # In a process of its own: a child's peak memory counts what its parent held when it was started.
    spawn = multiprocessing.get_context("spawn")
    maker = spawn.Process(target=make, args=(folder, options.count))
    maker.start()
    maker.join()
    first, paths = folder / "checkpoint-100", [folder / f"checkpoint-{100 * (i + 1)}" for i in range(options.count)]
    limit = f"cat {{inputs}} >/dev/null; cat {first}/*.safetensors >{folder}/copy"
    inputs = f"{folder}/checkpoint-*/*.safetensors"
    commands = {
        "limit: cat inputs, write output": ["bash", "-c", limit.format(inputs=inputs)],
        "limit, the initial model too": ["bash", "-c", limit.format(inputs=f"{inputs} {folder}/base/*.safetensors")],
        "start-up of soup": [sys.executable, "-m", "averaging.cli", "--version"],
        "start-up of the peers: import torch": [sys.executable, "-c", "import torch"],
    }
    mergekit = shutil.which("mergekit-yaml")
    for method in options.methods:
        own, theirs, settings, of_each = METHODS[method]
        based = method != "uniform"
        command = [sys.executable, "-m", "averaging.cli", *map(str, paths), "-q", "-o", str(folder / f"soup-{method}")]
        commands[f"soup {method}"] = [
            *command,
            *(["--method", method, "--init", f"{folder}/base"] if based else []),
            *own,
        ]
        if mergekit:
            recipe = folder / f"{method}.yaml"
            models = "".join(f"  - {{model: {path}, parameters: {of_each}}}\n" for path in paths)
            base = f"base_model: {folder}/base\n" if based else ""
            recipe.write_text(
                f"merge_method: {theirs}\n{base}dtype: float32\nout_dtype: bfloat16\n{settings}\nmodels:\n{models}"
            )
            commands[f"mergekit {theirs}"] = [mergekit, str(recipe), str(folder / f"mergekit-{method}")]
    if "uniform" in options.methods:
        everything = str(folder / "all.safetensors")
        commands["load everything"] = [sys.executable, "-c", LOAD_EVERYTHING, str(folder), everything]
    env = {**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(options.repeats + 1):  # the first round warms the page cache
        for name, command in commands.items():
            for output in (*folder.glob("soup-*"), *folder.glob("mergekit-*")):
                if str(output) in command:
                    shutil.rmtree(output)
            for file in ("copy", "all.safetensors"):
                (folder / file).unlink(missing_ok=True)
            taken[name].append(run(command, env))
    seconds = {name: statistics.median(t for t, _ in runs[1:]) for name, runs in taken.items()}
    print(f"{options.count} checkpoints of {sum(f.stat().st_size for f in first.iterdir()) / 1e9:.2f} GB")
    print("\n| | seconds | besides start-up, × limit | peak MB |\n|---|---:|---:|---:|")
    for name, runs in taken.items():
        extra = ""
        if not name.startswith(("limit", "start")):
            start = seconds["start-up of soup" if name.startswith("soup") else "start-up of the peers: import torch"]
            alone = name in ("soup uniform", "mergekit linear", "load everything")
            bound = seconds["limit: cat inputs, write output" if alone else "limit, the initial model too"]
            extra = f"{(seconds[name] - start) / bound:.2f}"
        print(f"| {name} | {seconds[name]:.2f} | {extra} | {max(m for _, m in runs):.0f} |")
    for method in options.methods if mergekit else ():
        result = differing(folder / f"soup-{method}", folder / f"mergekit-{method}")
        print(f"\n{method}, beside mergekit's {METHODS[method][1]}: {result}.")


if __name__ == "__main__":
    main()
