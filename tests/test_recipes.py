"""Every recipe, and the demo, runs at small size."""

from __future__ import annotations

import logging
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers

pytestmark = pytest.mark.filterwarnings("ignore")  # the trainers' remarks, which a reader of a recipe may see

ROOT = Path(__file__).parents[1]

ARGUMENTS = {
    "accelerate_loop": "--steps 8",
    "batchnorm": "--steps 4",
    "bema": "--steps 20",
    "does_it_help": "--steps 2 --seeds 1",
    "elastic_reset": "--steps 6 --pretraining 2",
    "ema_lightning": "--steps 8",
    "hare_tortoise": "--steps 20",
    "lawa_transformers": "--steps 2",
    "lawa_windows": "--steps 20",
    "plain_loop": "--steps 2",
    "post_hoc_ema": "--steps 20",
    "soup_checkpoints": "--steps 8",
    "swa_lightning": "--steps 80",  # three epochs, of which one begins in the last quarter
    "swad": "--steps 10",
    "switch_ema": "--steps 40",  # more than an epoch
    "trajectory_sweep": "--steps 80",
    "trl_dpo_trdpo": "--steps 8 --pretraining 2",
    "trl_grpo_anchor": "--steps 4 --pretraining 2",
    "warm": "--steps 4 --models 2 --pretraining 2 --seeds 1",
    "warp": "--steps 2 --rounds 1 --policies 2 --pretraining 2 --answers 1",
    "wsm": "--steps 20",
}
"""For each recipe, what makes it as small as goes through all of it."""


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """A folder to write in, and the process's settings restored afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT / "recipes"), *sys.path])
    threads, lightning = torch.get_num_threads(), logging.getLogger("lightning.pytorch").level
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    yield
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(lightning)
    transformers.logging.set_verbosity(verbosity)
    if bars:
        transformers.logging.enable_progress_bar()


def run(script: Path, arguments: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), *arguments.split()])
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_recipe(recipe, monkeypatch, capsys):
    assert recipe.stem in ARGUMENTS, f"say in ARGUMENTS how small {recipe.name} can run"
    run(recipe, ARGUMENTS[recipe.stem], monkeypatch)
    table = [line for line in capsys.readouterr().out.splitlines() if "  " in line]
    assert len(table) > 1
    assert "nan" not in "\n".join(table)


def test_demo(monkeypatch, capsys):
    run(ROOT / "scripts" / "demo.py", "--steps 5", monkeypatch)
    assert "bit for bit" in capsys.readouterr().out
    assert Path("runs/demo/loss.png").stat().st_size > 10_000
