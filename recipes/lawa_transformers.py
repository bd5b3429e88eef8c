"""LAWA in transformers.Trainer: one line, and every evaluation measures the average beside the online weights.

    python recipes/lawa_transformers.py

A byte-level transformer learns Python's standard library at a constant learning rate. About two minutes on two cores.
"""

from transformers import AutoModelForCausalLM

from averaging.transformers import LAWA
from common import report, text

steps, out = report.arguments(__doc__, steps=600)

trainer = text.trainer(
    text.transformer(),
    out,
    callbacks=[LAWA(k=5, every=max(1, steps // 40), evaluate="both")],
    max_steps=steps,
    save_strategy="steps",
    save_steps=steps,
    eval_strategy="steps",
    eval_steps=max(1, steps // 10),
)
trainer.train()

# The average lies in the checkpoint, and opens like any other model.
average = AutoModelForCausalLM.from_pretrained(out / f"checkpoint-{steps}" / "lawa")
reread = text.loss(average, text.library_source()[1])

log = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
print(report.table(["step", "online", "LAWA"], [(e["step"], e["eval_online_loss"], e["eval_loss"]) for e in log]))
print(f"nats per held-out byte; the average read from the checkpoint: {reread:.4f}")
curves = {"online": [e["eval_online_loss"] for e in log], "LAWA": [e["eval_loss"] for e in log]}
report.plot(out / "loss.png", report.Panel("transformer", "nats per held-out byte", [e["step"] for e in log], curves))
