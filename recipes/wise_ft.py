"""WiSE-FT: between a pretrained model and what fine-tuning made of it, on data like those it learned from and others.

    python recipes/wise_ft.py

Fine-tuning on one kind of data can cost what the pretrained model knew of others. The models on the straight line
between the two are tested on both, which is the curve of Wortsman et al. 2022 (arXiv:2109.01903): α = 0.5 is what they
advise where shifted data are not at hand to choose with. `common/finetuning.py` says what is classified: text with
MiniLM where that is installed, some five minutes on two cores; else digits, some seconds.
Results: scripts/bench/RESULTS.md.
"""

from safetensors.torch import save_file

from averaging import load_into
from averaging.soups import curve
from common import finetuning, report

steps, out = report.arguments(__doc__, steps=200)

ALPHAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)

task = finetuning.task(steps)
start, tuned = out / "start.safetensors", out / "tuned.safetensors"
save_file(task.model.state_dict(), start)
finetuning.fit(task.model, task.train, 2 * task.rate, steps, seed=1)
save_file(task.model.state_dict(), tuned)


def accuracies(weights) -> dict[str, float]:
    load_into(task.model, weights)
    tests = {"in-distribution": task.test, "shifted": task.shifted}
    return {name: finetuning.accuracy(finetuning.logits(task.model, data), data) for name, data in tests.items()}


found = curve("wise-ft", [tuned], ALPHAS, accuracies, init=start, best="max", plot=out / "curve.png", force=True)
points = {point.value: point.metrics for point in found.points}
rows = [("pretrained", 0.0), ("fine-tuned", 1.0), ("α = 0.5", 0.5)]
for name in points[0.0]:
    best = max(points, key=lambda alpha: points[alpha][name])
    rows.append((f"the best {name}, α = {best}", best))
print(found.table())
print(f"{task.name}; accuracy")
print(report.table(["", *points[0.0]], [(title, *points[alpha].values()) for title, alpha in rows]))
print(f"plot: {out / 'curve.png'}")
