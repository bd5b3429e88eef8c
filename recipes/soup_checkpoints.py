"""A soup afterwards: the mean of models that were fine-tuned from one checkpoint with different settings.

    python recipes/soup_checkpoints.py

The classifier of scikit-learn's digits learns for a while; four fine-tunings go on from there, each with its own
learning rate and order of the data (Wortsman et al. 2022, "Model soups"). In a shell it is
``soup runs/soup_checkpoints/lr=*.safetensors -o soup.safetensors``. Some seconds.
"""

import lightning
import torch
from safetensors.torch import load_file, save_file

from averaging.soups import uniform
from common import digits, report

steps, out = report.arguments(__doc__, steps=300)

lightning.seed_everything(0, verbose=False)
train, _ = digits.loaders()
held_out = list(digits.digits()[1].tensors)


def loss(classifier: digits.Classifier) -> float:
    with torch.no_grad():
        return classifier.loss(held_out).item()


base = digits.Classifier(lr=1e-3)
digits.trainer(steps, []).fit(base, train)

rows: list[tuple[str | float, ...]] = [("the common start", loss(base))]
ingredients = []
for seed, lr in enumerate((1e-3, 2e-3, 3e-3, 4e-3), start=1):
    lightning.seed_everything(seed, verbose=False)
    classifier = digits.Classifier(lr=lr)
    classifier.load_state_dict(base.state_dict())
    digits.trainer(steps, []).fit(classifier, train)
    ingredients.append(out / f"lr={lr}.safetensors")
    save_file(classifier.state_dict(), ingredients[-1])
    rows.append((f"fine-tuned, lr={lr}", loss(classifier)))

uniform(ingredients, out / "soup.safetensors", force=True)
classifier = digits.Classifier()
classifier.load_state_dict(load_file(out / "soup.safetensors"))
rows.append(("their soup", loss(classifier)))
print(report.table(["600 held-out digits", "loss"], rows))
