"""Elastic Reset: now and then a policy goes back to its EMA, and the EMA to where training began.

    python recipes/elastic_reset.py

A byte-level policy, pretrained on Python's standard library, is paid for writing the letter "e", a reward that can be
hacked, with hardly any KL term. With resets (Noukhovitch et al. 2023, arXiv:2312.07551) it drifts less far from what it
was pretrained on, and gets less reward: compare at equal drift before you choose. About four minutes on two cores.
"""

from averaging.transformers import ElasticReset
from common import policy, report

steps, pretraining, out = report.arguments(__doc__, steps=120, pretraining=400)

start = policy.pretrained(out, pretraining)
every = max(1, steps // 6)
rewards, drifts = {}, {}
for name, callbacks in (("plain", []), ("elastic reset", [ElasticReset(every=every, decay=0.95)])):
    trainer = policy.grpo(start, out, callbacks, max_steps=steps, beta=0.01)
    trainer.train()
    rewards[name] = policy.logged(trainer, "reward", steps // every)
    drifts[name] = policy.drift(trainer.model)

print(f'reward (share of "e") along the run; a reset every {every} steps')
shown = [round((part + 1) * steps / (steps // every)) for part in range(steps // every)]
print(report.table(["until step", *rewards], list(zip(shown, *rewards.values(), strict=True))))
print(report.table(["held-out loss at the end", *drifts], [("nats per byte", *drifts.values())]))
