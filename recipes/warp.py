"""WARP: rounds of policies that are trained with EMA anchors, merged, and drawn back to where the round began.

    python recipes/warp.py

A byte-level policy, pretrained on Python's standard library, is paid for writing the letter "e". In each round some
policies go on from the same start with other random numbers, each against an EMA of itself (stage 1); they are merged
by SLERP (stage 2) and drawn back by LITI (stage 3), which the next round starts from. The front of reward and KL that
LITI goes along is drawn for each round. Ramé et al. 2024, arXiv:2406.16768. About five minutes on two cores.
"""

from averaging.checkpoints import Checkpoint
from averaging.soups import curve, warp
from averaging.transformers import EMAAnchor
from common import policy, report

ETA = 0.5  # the paper's 0.3 is for runs a hundred times as long

steps, rounds, policies, pretraining, answers, out = report.arguments(
    __doc__, steps=40, rounds=2, policies=2, pretraining=400, answers=4
)


def trained(start: str, name: str, seed: int, length: int) -> str:
    """A policy that goes on from ``start``, paid for its letters and anchored to an EMA of itself."""
    trainer = policy.grpo(start, out, [EMAAnchor(mu=0.05)], max_steps=length, seed=seed)
    trainer.train()
    trainer.save_model(str(out / name))
    return str(out / name)


def scores(weights: Checkpoint) -> dict[str, float]:
    return policy.tested(weights.path, sft, answers)


start = sft = policy.pretrained(out, pretraining)
rows = [("the start", *policy.tested(sft, sft, answers).values())]
for number in range(1, rounds + 1):
    paths = [trained(start, f"round-{number}-{seed}", 10 * number + seed, steps) for seed in range(policies)]
    rows += [(f"round {number}, a policy", *policy.tested(path, sft, answers).values()) for path in paths]
    front = curve("warp", paths, (0, 0.25, 0.5, 0.75, 1), scores, init=start, plot=out / f"{number}.png", force=True)
    rows += [(f"round {number}, eta {point.value:g}", *point.metrics.values()) for point in front.points]
    warp(paths, out / f"round-{number}", init=start, eta=ETA, force=True)
    start = str(out / f"round-{number}")
alone = trained(sft, "alone", 0, rounds * steps)
rows.append(("one policy, as many steps", *policy.tested(alone, sft, answers).values()))

print(report.table(["", "KL from the start, nats", "reward"], rows))
print(f"plots: {out}/*.png")
