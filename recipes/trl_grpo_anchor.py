"""GRPO whose KL term draws the policy to an average of itself, not to where it began.

    python recipes/trl_grpo_anchor.py

A byte-level policy, pretrained on Python's standard library, is paid for writing the letter "e": a reward that can be
hacked. One line lets the reference follow (WARP, stage 1: Ramé et al. 2024, arXiv:2406.16768): the policy gets further,
and away from what it was pretrained on, too. Compare at equal drift before you choose. About four minutes on two cores.
"""

from averaging.transformers import EMAAnchor
from common import policy, report

steps, pretraining, out = report.arguments(__doc__, steps=120, pretraining=400)

start = policy.pretrained(out, pretraining)
parts = min(6, steps)
rewards, drifts = {}, {}
for name, callbacks in (("fixed", []), ("EMA anchor", [EMAAnchor(mu=0.05)])):
    trainer = policy.grpo(start, out, callbacks, max_steps=steps)
    trainer.train()
    rewards[name] = policy.logged(trainer, "reward", parts)
    drifts[name] = policy.drift(trainer.model)

print('reward (share of "e") along the run, by the reference of the KL term')
shown = [round((part + 1) * steps / parts) for part in range(parts)]
print(report.table(["until step", *rewards], list(zip(shown, *rewards.values(), strict=True))))
print(report.table(["held-out loss at the end", *drifts], [("nats per byte", *drifts.values())]))
