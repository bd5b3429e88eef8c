"""TR-DPO: DPO with a reference that takes a step towards the policy from time to time, full and LoRA.

    python recipes/trl_dpo_trdpo.py

A byte-level policy, pretrained on Python's standard library, learns to prefer how the source goes on to the same with
small and capital letters swapped. Soft updates mix the policy into the reference, hard ones copy it (Gorbatovski et al.
2024, arXiv:2404.09656): the margin gets wider with them, and the policy forgets more of the rest. With LoRA the
reference is a second adapter. About three minutes on two cores.
"""

from peft import LoraConfig

from averaging.transformers import EMAAnchor
from common import policy, report

steps, pretraining, out = report.arguments(__doc__, steps=80, pretraining=400)

start = policy.pretrained(out, pretraining)
every = max(1, steps // 8)
rows = []
for name, callbacks, lora in (
    ("fixed", [], False),
    ("soft", [EMAAnchor(mu=0.6, every=every)], False),
    ("hard", [EMAAnchor(mu=1.0, every=every)], False),
    ("soft, LoRA", [EMAAnchor(mu=0.6, every=every)], True),
):
    adapter = LoraConfig(r=8, target_modules="all-linear") if lora else None
    trainer = policy.dpo(start, out, callbacks, adapter, max_steps=steps)
    trainer.train()
    ends = [policy.logged(trainer, f"logps/{which}", min(8, steps))[-1] for which in ("chosen", "rejected")]
    rows.append((name, *ends, policy.drift(trainer.model)))

print(f"log-probabilities in the last eighth of the run; an update of the reference every {every} steps")
print(report.table(["reference", "chosen", "rejected", "held-out loss"], rows))
