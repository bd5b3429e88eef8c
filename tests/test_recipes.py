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

STEPS = {
    "accelerate_loop": 8,
    "ema_lightning": 8,
    "lawa_transformers": 2,
    "plain_loop": 2,
    "soup_checkpoints": 8,
    "swa_lightning": 80,  # three epochs, of which one begins in the last quarter
}
"""For each recipe, the fewest optimizer steps that go through all of it."""


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


def run(script: Path, steps: int, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--steps", str(steps)])
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_recipe(recipe, monkeypatch, capsys):
    assert recipe.stem in STEPS, f"say in STEPS how small {recipe.name} can run"
    run(recipe, STEPS[recipe.stem], monkeypatch)
    table = [line for line in capsys.readouterr().out.splitlines() if "  " in line]
    assert len(table) > 1
    assert "nan" not in "\n".join(table)


def test_demo(monkeypatch, capsys):
    run(ROOT / "scripts" / "demo.py", 5, monkeypatch)
    assert "bit for bit" in capsys.readouterr().out
    assert Path("runs/demo/loss.png").stat().st_size > 10_000
