"""Sweeps: every average against float64, the files that are left, and what goes wrong."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from averaging import EMA, PostHocEMA, Trajectory, cli, load_into, named_weights
from averaging.checkpoints import find
from averaging.soups import post_hoc, sweep

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

STEPS = range(10, 90, 10)


def clone(weights) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def combined(snapshots, weights) -> dict[str, torch.Tensor]:
    """Σ wᵢθᵢ / Σ wᵢ in float64."""
    total = math.fsum(weights)
    return {n: sum(w * s[n].double() for s, w in zip(snapshots, weights, strict=True)) / total for n in snapshots[0]}


def size(weights) -> float:
    """A metric that tells any two averages apart."""
    return sum(float(tensor.double().square().sum()) * (1 + i) for i, (_, tensor) in enumerate(sorted(weights.items())))


@pytest.fixture
def seen(tmp_path) -> dict[int, dict[str, torch.Tensor]]:
    """A trajectory in tmp_path/run, and what was stored at which step."""
    torch.manual_seed(0)
    model, trajectory, seen = nn.Linear(5, 3), Trajectory(tmp_path / "run", every=10), {}
    for step in STEPS:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) + 1 / step)
        trajectory.update(model, step)
        seen[step] = clone(named_weights(model))
    return seen


def values(result) -> dict[tuple[str, int], float]:
    return {(cell.label, cell.step): cell.metric for cell in result.cells}


# ---------------------------------------------------------------------- what is evaluated


def test_windows_and_spacings_match_float64_and_the_best_is_written(tmp_path, seen):
    result = sweep(tmp_path / "run", size, tmp_path / "best", window=(1, 3, 4), spacing=(1, 2), plot=tmp_path / "a.png")
    expected = {}
    for window in (1, 3, 4):
        for spacing in (1, 2):
            for end in STEPS:
                steps = [end - 10 * spacing * i for i in range(window)][::-1]
                if steps[0] > 0:  # a window that does not fit is left out
                    average = combined([seen[step] for step in steps], [1] * window)
                    expected[f"window {window}, spacing {spacing}", end] = size(average)
    assert values(result) == pytest.approx(expected, rel=1e-5)
    best = min(expected, key=expected.get)
    assert (result.best.label, result.best.step) == best
    window, spacing = result.best.setting["window"], result.best.setting["spacing"]
    steps = [best[1] - 10 * spacing * i for i in range(window)][::-1]
    written = load_file(tmp_path / "best" / "model.safetensors")
    average = combined([seen[step] for step in steps], [1] * window)
    assert written.keys() == average.keys()
    for name in average:
        assert torch.equal(written[name], average[name].float())
    record = json.loads((tmp_path / "best" / "soup.json").read_text())
    assert record["sweep"] == {"window": window, "spacing": spacing, "step": best[1], "metric": result.best.metric}
    assert [part["step"] for part in record["ingredients"]] == steps

    with (tmp_path / "best.sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, cell in zip(rows, result.cells, strict=True):
        assert {**cell.setting, "step": cell.step, "metric": cell.metric} == {n: float(v) for n, v in row.items()}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["a.png", "best", "best.sweep.csv", "run"]
    lines = result.table().splitlines()
    assert len(lines) == 1 + len(STEPS)
    first = f"{result.cells[0].metric:.6g}"
    assert lines[1].split() == ["10", first, first, "-", "-", "-", "-"]
    assert sum("*" in line for line in lines) == 1


def test_a_decay_is_the_ema_that_absorbed_just_these(tmp_path, seen):
    result = sweep(tmp_path / "run", size, decay=(0.5, 0.95, 0.999), at=(40, 80))
    expected = {}
    for decay in (0.5, 0.95, 0.999):
        average = None
        for step, weights in seen.items():
            kept = decay**10
            wide = {name: tensor.double() for name, tensor in weights.items()}
            average = {n: kept * average[n] + (1 - kept) * wide[n] for n in wide} if average else wide
            if step in (40, 80):
                expected[f"decay {decay}", step] = size(average)
    assert values(result) == pytest.approx(expected, rel=1e-5)
    ema = EMA(0.95, every=10)
    for step, weights in seen.items():
        ema.update(weights, step)
    assert values(result)["decay 0.95", 80] == pytest.approx(size(ema.average()), rel=1e-5)


def test_windows_with_weights_of_a_rate_decay(tmp_path, seen):
    result = sweep(tmp_path / "run", size, window=(4,), weights=("linear", "cosine", "inverse_sqrt"), at=(80,))
    rates = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
        "inverse_sqrt": lambda x: 1 - math.sqrt(x),
    }
    for cell in result.cells:
        rate = rates[cell.setting["weights"]]
        weights = [rate(i / 4) - rate((i + 1) / 4) for i in range(4)]
        average = combined([seen[step] for step in (50, 60, 70, 80)], weights)
        assert cell.metric == pytest.approx(size(average), rel=1e-5)
    assert len(result.cells) == 3


def test_the_highest_can_be_best_and_nothing_need_be_written(tmp_path, seen):
    before = sorted(tmp_path.rglob("*"))
    result = sweep(find(tmp_path / "run"), size, window=(1, 2), best="max")
    assert result.best.metric == max(cell.metric for cell in result.cells)
    assert size(result.weights) == pytest.approx(result.best.metric, rel=1e-6)
    assert sorted(tmp_path.rglob("*")) == before


def test_widths_of_a_post_hoc_ema(tmp_path, seen):
    averager = PostHocEMA(tmp_path / "ema", snapshots=20, every=10)
    for step, weights in seen.items():
        averager.update(weights, step)
    result = sweep(tmp_path / "ema", size, tmp_path / "out.safetensors", post_hoc=(0.06, 0.2))
    expected = {}
    for width in (0.06, 0.2):
        for step in (20, 40, 60, 80):
            expected[f"post-hoc {width}", step] = size(post_hoc(tmp_path / "ema", width, step))
    assert values(result) == pytest.approx(expected, rel=1e-6)
    assert size(load_file(tmp_path / "out.safetensors")) == min(cell.metric for cell in result.cells)
    record = json.loads((tmp_path / "out.soup.json").read_text())
    assert record["width"] == record["sweep"]["post_hoc"]


def test_progress_names_what_is_next(tmp_path, seen):
    calls = []
    sweep(tmp_path / "run", size, window=(8, 7), progress=lambda *call: calls.append(call))
    assert calls == [(0, 3, "window 8 at step 80"), (1, 3, "window 7 at step 70"), (2, 3, "window 7 at step 80")]


# ---------------------------------------------------------------------- the command


EVALUATIONS = """
import torch
ran = []
def size(weights):
    ran.append(weights.path)
    return torch.stack([t.double().square().sum() for t in weights.values()]).sum()
def broken(weights): raise RuntimeError("the disk of validation data is not there")
def nothing(weights): return float("nan")
def words(weights): return "good"
def stopped(weights): raise KeyboardInterrupt
"""


@pytest.fixture
def here(tmp_path, seen, monkeypatch):
    """The folder in which the command runs, with evaluations to import; a unique module name for each test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"evaluations_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(EVALUATIONS)
    (tmp_path / f"{name}_import.py").write_text("1 / 0")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return name


def soup(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_the_command_prints_the_table_and_writes_the_best(here, tmp_path, capsys):
    assert (
        soup("run", "--sweep", "window=1,2,4", "--every", "2", "--evaluate", f"{here}:size", "--maximize", "--plot")
        == 0
    )
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["step", "window", "1", "window", "2", "window", "4"]
    assert [line.split()[0] for line in out[1:-1]] == ["20", "40", "60", "80"]
    assert out[-1].startswith("run/soup: window ")
    assert {"soup", "soup.sweep.csv", "soup.sweep.png"} <= set(os.listdir("run"))
    assert [checkpoint.step for checkpoint in find("run")] == list(STEPS)
    ran = sys.modules[here].ran
    assert len(ran) == 4 + 3 + 1
    assert not any(Path(path).exists() for path in ran)
    # again: refused without --force, and before anything is evaluated
    assert soup("run", "--sweep", "window=2", "--evaluate", f"{here}:size") == 2
    assert "--force" in capsys.readouterr().err
    assert len(ran) == 8
    assert soup("run", "--sweep", "window=2", "--evaluate", f"{here}:size", "--force", "-q") == 0
    assert capsys.readouterr().out == ""


def test_a_dry_run_evaluates_nothing(here, capsys):
    assert soup("run", "--sweep", "window=1,7", "--at", "70,80", "--evaluate", f"{here}:size", "--dry-run") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["window 1 at step 70", "window 1 at step 80"]
    assert out[-1] == "4 averages to evaluate; the best to run/soup"
    assert os.listdir("run") == os.listdir("run")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sweep", "window=2", "--evaluate", "HERE"], "MODULE:FUNCTION"),
        (["--sweep", "window=2", "--evaluate", "no_such_module:f"], "No module named 'no_such_module'"),
        (["--sweep", "window=2", "--evaluate", "HERE:missing"], "no attribute 'missing'"),
        (["--sweep", "window=2", "--evaluate", "HERE:ran"], "is not a function"),
        (["--sweep", "window=2", "--evaluate", "HERE_import:f"], "ZeroDivisionError"),
        (["--sweep", "window=2", "--evaluate", "HERE:broken"], "raised RuntimeError for window 2 at step 20: the disk"),
        (["--sweep", "window=2", "--evaluate", "HERE:nothing"], "returned nan for window 2 at step 20"),
        (["--sweep", "window=2", "--evaluate", "HERE:words"], "must return a number, not 'good'"),
        (["--sweep", "window=2"], "--sweep needs --evaluate"),
        (["--evaluate", "HERE:size"], "--evaluate has no meaning"),
        (["--metric", "max"], "--metric has no meaning"),
        (["--sweep", "window=0", "--evaluate", "HERE:size"], "at least 1"),
        (["--sweep", "window=9", "--evaluate", "HERE:size"], "only 8 checkpoints"),
        (["--sweep", "decay=1.5", "--evaluate", "HERE:size"], "less than 1"),
        (["--sweep", "weights=square", "--evaluate", "HERE:size"], "inverse_sqrt"),
        (["--sweep", "window=2", "--at", "75", "--evaluate", "HERE:size"], "no checkpoint of step 75"),
        (["--sweep", "window=2", "--sweep", "window=3", "--evaluate", "HERE:size"], "one axis twice"),
        (["--sweep", "decay=.9", "--sweep", "weights=cosine", "--evaluate", "HERE:size"], "together"),
        (["--sweep", "post-hoc=0.1", "--evaluate", "HERE:size"], "no snapshots of PostHocEMA"),
        (["--sweep", "window=2", "--weights", "1,2", "--evaluate", "HERE:size"], "--weights has no meaning"),
    ],
)
def test_errors_are_clear_and_leave_nothing(here, capsys, arguments, says):
    before = sorted(Path.cwd().rglob("*"))
    assert soup("run", *(argument.replace("HERE", here) for argument in arguments)) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.mark.parametrize("axis", ["windows=1", "window", "window=a"])
def test_an_axis_that_is_none_is_a_usage_error(axis, capsys):
    with pytest.raises(SystemExit) as stopped:
        soup("run", "--sweep", axis, "--evaluate", "a:b")
    assert stopped.value.code == 2
    assert "expected" in capsys.readouterr().err


def test_debug_shows_where_an_evaluation_failed(here):
    with pytest.raises(ValueError, match="RuntimeError") as caught:
        soup("run", "--sweep", "window=2", "--evaluate", f"{here}:broken", "--debug")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_interrupt_leaves_nothing(here):
    before = sorted(Path.cwd().rglob("*"))
    assert soup("run", "--sweep", "window=2", "--evaluate", f"{here}:stopped") == 130
    assert sorted(Path.cwd().rglob("*")) == before


def test_steps_must_be_known(tmp_path, seen):
    for checkpoint in find(tmp_path / "run"):
        checkpoint.path.rename(checkpoint.path.with_name("x" * (checkpoint.step // 10) + ".safetensors"))
    with pytest.raises(ValueError, match="needs the step"):
        sweep(tmp_path / "run", size, window=(2,))


# ---------------------------------------------------------------------- after a real run


def test_a_trainers_run_is_searched_with_from_pretrained(tmp_path):
    from averaging.transformers import Trajectory as TrajectoryCallback

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    tokens = torch.randint(0, 32, (48, 8)).sort(dim=1).values
    options = TrainingArguments(
        str(tmp_path / "out"), max_steps=24, save_strategy="no", per_device_train_batch_size=4, report_to="none",
        disable_tqdm=True, use_cpu=True, learning_rate=3e-2, lr_scheduler_type="constant",
    )  # fmt: skip
    online: dict[int, dict[str, torch.Tensor]] = {}

    class Recorder(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
            online[state.global_step] = clone(named_weights(model))

    rows = [{"input_ids": row, "labels": row} for row in tokens[:40]]
    callbacks = [TrajectoryCallback(tmp_path / "run", every=4), Recorder()]
    Trainer(LlamaForCausalLM(config), options, train_dataset=rows, callbacks=callbacks).train()

    def loss_of(model) -> float:
        with torch.no_grad():
            return model.eval()(input_ids=tokens[40:], labels=tokens[40:]).loss.item()

    def validation_loss(weights) -> float:
        return loss_of(AutoModelForCausalLM.from_pretrained(weights.path))

    result = sweep(tmp_path / "run", validation_loss, tmp_path / "best", window=(1, 2, 3))
    for cell in result.cells:
        model = LlamaForCausalLM(config)
        steps = range(cell.step - 4 * (cell.setting["window"] - 1), cell.step + 1, 4)
        load_into(model, combined([online[step] for step in steps], [1] * len(steps)))
        assert cell.metric == pytest.approx(loss_of(model), rel=1e-5)
    assert loss_of(AutoModelForCausalLM.from_pretrained(tmp_path / "best")) == result.best.metric
