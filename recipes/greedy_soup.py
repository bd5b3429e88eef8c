"""A greedy soup of a hyper-parameter sweep, beside other soups, its best ingredient and the ensemble.

    python recipes/greedy_soup.py

One pretrained model is fine-tuned seven times, with different learning rates, lengths and random numbers; what is
usually kept is the best on validation data. Soups are made of all (Wortsman et al. 2022, arXiv:2203.05482): the mean,
the greedy soup and the mean of the three best, chosen by validation accuracy, and coefficients learned by gradient on
the validation loss. The ensemble takes the mean of the models' logits and costs as many models when it is used. Tested
on other files. `common/finetuning.py` says what is classified: text with MiniLM where that is installed, some ten
minutes on two cores; else digits, some seconds.
Results: scripts/bench/RESULTS.md.
"""

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from averaging import load_into
from averaging.checkpoints import Checkpoint
from averaging.soups import greedy, learned, ranked, uniform
from common import finetuning, report

steps, runs, out = report.arguments(__doc__, steps=80, runs=7)

SWEEP = ((1, 1), (2, 1), (4, 1), (1, 0.5), (2, 0.5), (4, 0.5), (0.5, 1))
"""Learning rate and length of each run, times the usual ones."""

task = finetuning.task(steps)
model = task.model
start = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def logits(weights, data: finetuning.Data) -> torch.Tensor:
    load_into(model, weights)
    return finetuning.logits(model, data)


def validation(weights) -> float:
    return finetuning.accuracy(logits(weights, task.validation), task.validation)


paths = []
for seed, (rate, length) in enumerate(SWEEP[:runs], start=1):
    load_into(model, start)
    finetuning.fit(model, task.train, rate * task.rate, round(length * steps), seed)
    paths.append(out / f"run-{seed}.safetensors")
    save_file(model.state_dict(), paths[-1])

search = {"best": "max", "cache": out / "validation.json"}
chosen = greedy(paths, validation, out / "greedy.safetensors", plot=out / "greedy.png", force=True, **search)
best = chosen.tried[0]
assert chosen.metric >= best.metric
batches = [*zip(task.validation.inputs.split(64), task.validation.labels.split(64), strict=True)]
optimised = learned(
    paths,
    model=model,
    loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
    batches=batches,
    lr=0.2,
    epochs=2,
)
soups = {
    "the uniform soup": uniform(paths),
    "the mean of the best three": ranked(paths, validation, top=min(3, runs), **search).weights,
    f"the greedy soup, of {sum(one.kept for one in chosen.tried)}": chosen.weights,
    "the learned soup": optimised.weights,
}

alone = [logits(Checkpoint(path), task.test) for path in paths]
rows = [("not fine-tuned", validation(start), finetuning.accuracy(logits(start, task.test), task.test))]
metrics = {str(one.checkpoint.path): one.metric for one in chosen.tried}
for (rate, length), path, predicted in zip(SWEEP, paths, alone, strict=False):
    mark = ", the best" if path == best.checkpoint.path else ""
    name = f"rate × {rate}, {round(length * steps)} steps{mark}"
    rows.append((name, metrics[str(path)], finetuning.accuracy(predicted, task.test)))
for name, weights in soups.items():
    rows.append((name, validation(weights), finetuning.accuracy(logits(weights, task.test), task.test)))
in_greedy = {one.checkpoint.path for one in chosen.tried if one.kept}
kept = [predicted for path, predicted in zip(paths, alone, strict=True) if path in in_greedy]
rows.append(("the ensemble of all", "", finetuning.accuracy(torch.stack(alone).mean(0), task.test)))
rows.append(("the ensemble of the greedy soup's", "", finetuning.accuracy(torch.stack(kept).mean(0), task.test)))
print(f"{task.name}; accuracy")
print(report.table(["", "validation", "test"], rows))
print(f"coefficients learned: {' '.join(f'{c:.2f}' for c in optimised.coefficients['all'])}")
print(f"plot: {out / 'greedy.png'}")
