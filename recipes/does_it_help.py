"""Does averaging help? The steps until an average reaches the best loss that the online weights reach in the whole run.

    python recipes/does_it_help.py

A byte-level transformer learns Python's standard library, three times at a constant learning rate and three times at
one that falls to zero. Ajroldi et al. 2025 (arXiv:2502.06761) found about 78 % of the steps on much larger tasks.
Some 20 minutes on two cores.
"""

from math import inf
from statistics import mean

from averaging import EMA, LAWA
from averaging.transformers import AveragingCallback
from common import report, text

steps, seeds, out = report.arguments(__doc__, steps=600, seeds=3)

METRICS = {"online": "eval_online_loss", "LAWA": "eval_loss", "EMA": "eval_ema_loss"}


def train(schedule: str, seed: int) -> tuple[list[int], dict[str, list[float]]]:
    """One run: the steps of its evaluations, and the held-out losses there."""
    averaging = AveragingCallback(LAWA(k=5, window="10%"), EMA(window="10%", warmup="debias"), evaluate="all")
    trainer = text.trainer(
        text.transformer(seed),
        out,
        [averaging],
        max_steps=steps,
        lr_scheduler_type=schedule,
        eval_strategy="steps",
        eval_steps=max(1, steps // 30),
        seed=seed,
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    losses = {name: [entry[metric] for entry in log] for name, metric in METRICS.items()}
    print(
        f"{schedule}, seed {seed}: " + ", ".join(f"{name} {loss[-1]:.4f}" for name, loss in losses.items()), flush=True
    )
    return [entry["step"] for entry in log], losses


def steps_to(target: float, at: list[int], losses: list[float]) -> float:
    """The step at which ``losses`` first came down to ``target``, on a straight line between evaluations."""
    before, above = 0, inf
    for step, loss in zip(at, losses, strict=True):
        if loss <= target:
            return step if above == inf else before + (above - target) / (above - loss) * (step - before)
        before, above = step, loss
    return inf


rows, panels = [], []
for schedule in ("constant", "cosine"):
    runs = [train(schedule, seed) for seed in range(seeds)]
    for name in METRICS:
        shares = []
        for at, losses in runs:
            target = min(losses["online"])
            shares.append(steps_to(target, at, losses[name]) / steps_to(target, at, losses["online"]))
        loss = mean(losses[name][-1] for _, losses in runs)
        rows.append(
            (
                f"{schedule} rate, {name}",
                loss,
                "  ".join(f"{share:.0%}" if share < inf else "never" for share in shares),
            )
        )
    curves = {name: [mean(at) for at in zip(*(losses[name] for _, losses in runs), strict=True)] for name in METRICS}
    panels.append(report.Panel(f"{schedule} learning rate", "nats per held-out byte", runs[0][0], curves))

print(report.table(["", "loss at the end", "steps to the online weights' best loss, of theirs"], rows))
report.plot(out / "loss.png", *panels)
