"""The mean of a run's last k checkpoints, at a constant rate, beside runs whose learning rate falls to zero.

    python recipes/last_k.py

A byte-level transformer learns Python's standard library, with each seed three times for as many steps: at a constant
rate, at one that falls along a cosine from the first step on, and at one that falls along a line in the last 40 %. Of
the constant run the last 40 % are stored as 20 snapshots, and averaged afterwards: as many of the last as one likes,
all alike or with weights that stand in for a decay of the rate (WSM: Tian et al. 2025, arXiv:2507.17634). In a shell
``soup runs/last_k/seed-0 --last 10 --weights cosine -o soup.safetensors``. Some ten minutes on two cores.
Results: scripts/bench/RESULTS.md.
"""

from statistics import mean

from averaging import applied
from averaging.checkpoints import gather, select
from averaging.soups import uniform
from averaging.transformers import Trajectory
from common import report, text

steps, seeds, out = report.arguments(__doc__, steps=400, seeds=3)

every = max(1, steps // 50)
kept = min(20, steps // 2)
KS = [k for k in (2, 5, 10, 15, 20) if k <= kept]
_, held_out = text.library_source()
falling = {
    "falls along a cosine": {"lr_scheduler_type": "cosine"},
    "falls in the last 40 %": {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": kept * every, "decay_type": "linear"},
    },
}


def trained(seed, callbacks=(), **options):
    """The model of one run."""
    model = text.transformer(seed)
    text.trainer(model, out, list(callbacks), max_steps=steps, seed=seed, **options).train()
    return model


results: dict[str, list[float]] = {}
for seed in range(seeds):
    snapshots = Trajectory(out / f"seed-{seed}", every=every, start=steps - kept * every)
    model = trained(seed, [snapshots])
    losses = {"constant": text.loss(model, held_out)}
    stored = gather([out / f"seed-{seed}"])
    for weights in ("linear", "cosine", "inverse_sqrt"):
        for k in KS:
            with applied(model, uniform(select(stored, k), weights=weights)):
                losses[f"{weights} {k}"] = text.loss(model, held_out)
    for name, options in falling.items():
        losses[name] = text.loss(trained(seed, **options), held_out)
    print(f"seed {seed}: " + ", ".join(f"{name} {losses[name]:.4f}" for name in ("constant", *falling)), flush=True)
    for name, loss in losses.items():
        results.setdefault(name, []).append(loss)

every_k = {
    title: [mean(results[f"{weights} {k}"]) for k in KS]
    for title, weights in (("all alike", "linear"), ("cosine", "cosine"), ("inverse_sqrt", "inverse_sqrt"))
}
rates = {f"rate {name}": mean(results[name]) for name in ("constant", *falling)}
print(f"nats per held-out byte, mean of {seeds} seeds, after {steps} steps")
print(report.table(["", "loss"], [*rates.items()]))
print(report.table(["soup of the last", *map(str, KS)], [(name, *losses) for name, losses in every_k.items()]))
lines = {name: [loss] * len(KS) for name, loss in rates.items()}
spans = [k * every for k in KS]
report.plot(out / "loss.png", report.Panel("what a soup spans", "nats per held-out byte", spans, {**every_k, **lines}))
