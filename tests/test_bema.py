"""BEMA against float64, and against trl's BEMACallback in the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from averaging import BEMA, applied, load_into, named_weights


def stream(steps: int, dtype=torch.float32) -> list[torch.Tensor]:
    """Weights before the first step and after each."""
    torch.manual_seed(0)
    return list(torch.cumsum(0.01 * torch.randn(steps + 1, 97), 0).add(torch.randn(97)).to(dtype))


def reference(weights, first, absorbed, kappa=0.5, eta=0.2, rho=10.0, gamma=1.0):
    start = ema = weights[first].double()
    for t in absorbed:
        beta, alpha = (rho + gamma * t) ** -kappa, (rho + gamma * t) ** -eta
        ema = (1 - beta) * ema + beta * weights[t].double()
        corrected = ema + alpha * (weights[t].double() - start)
    return corrected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory", ["cpu", "device", "disk"])
@pytest.mark.parametrize(
    ("settings", "start", "absorbed"),
    [
        ({"every": 1}, 0, range(1, 61)),
        ({"every": 7}, 0, range(7, 61, 7)),
        ({"every": 7, "start": 10}, 10, range(14, 61, 7)),
        ({"every": 5, "start": 0.5}, 30, range(35, 61, 5)),
        ({"every": 3, "kappa": 0.8, "eta": 0.0, "rho": 2.0, "gamma": 0.5}, 0, range(3, 61, 3)),
    ],
)
def test_against_float64(settings, start, absorbed, dtype, memory, tmp_path):
    weights = stream(60, dtype)
    averager = BEMA(**settings, memory=tmp_path if memory == "disk" else memory).prepare(total_steps=60)
    for step, tensor in enumerate(weights):
        averager.update({"w": tensor}, step)
        assert averager.ready == (step >= absorbed[0])
    powers = {key: value for key, value in settings.items() if key not in ("every", "start")}
    expected = reference(weights, start, absorbed, **powers)
    average = averager.average()["w"]
    assert average.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-6)
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype != torch.bfloat16 else {"rtol": 2**-8, "atol": 0}
    torch.testing.assert_close(averager.average(rounded=True)["w"].double(), expected, **close)


def test_before_the_first_correction_the_average_is_the_model():
    model = torch.nn.Linear(3, 2)
    averager = BEMA(every=5)
    averager.update(model, 0)
    with torch.no_grad():
        model.weight.add_(1)
    averager.update(model, 1)
    before = model.weight.clone()
    with applied(model, averager):
        assert torch.equal(model.weight, before)
    with pytest.raises(RuntimeError, match="too few weights"):
        averager.average()


def test_an_absorption_after_the_initial_one_keeps_only_one_more_copy():
    averager = BEMA(every=1)
    for step, tensor in enumerate(stream(9, torch.bfloat16)):
        averager.update({"w": tensor}, step)
    kept = {group: weights["w"].dtype for group, weights in averager.tensors().items()}
    assert [*kept.values()] == [torch.float32, torch.bfloat16, torch.bfloat16]


# ---------------------------------------------------------------------- in a trainer


def tiny_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
        )
    )  # fmt: skip


def train(folder: Path, callbacks, model, steps: int = 12, resume: bool = False):
    from transformers import Trainer, TrainingArguments

    tokens = torch.randint(0, 32, (40, 8), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=4,
        lr_scheduler_type="constant", seed=1, logging_steps=1000, disable_tqdm=True, report_to="none", use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("every", "start"), [(1, 0), (3, 0), (2, 4)])
def test_equals_trls(every, start, tmp_path):
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    from averaging.transformers import BEMA as Callback

    trl = callbacks.BEMACallback(update_freq=every, update_after=start)
    ours = Callback(every=every, start=start)
    trainer = train(tmp_path, [trl, ours], tiny_model())
    theirs = dict(trl.running_model.named_parameters())
    for name, tensor in ours.averager.average().items():
        torch.testing.assert_close(tensor, theirs[name].detach(), rtol=1e-5, atol=1e-7)
    for name, tensor in named_weights(trainer.model).items():
        assert torch.equal(tensor, ours.averager.average(rounded=True)[name])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:training ended before", "ignore:bema. the first average would be there after 5")
@pytest.mark.parametrize("every", [3, 5])  # at the cut, after step 4: absorbed once, and not yet
@pytest.mark.parametrize("lora", [False, True])
def test_resumes_exactly_with_frozen_parameters_and_lora(every, lora, tmp_path):
    from averaging.transformers import BEMA as Callback

    def model():
        base = tiny_model()
        if lora:
            peft = pytest.importorskip("peft")
            return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).train()
        base.model.embed_tokens.requires_grad_(False)
        return base

    straight, second = Callback(every=every), Callback(every=every)
    begun = model()
    start = {name: tensor.clone() for name, tensor in named_weights(begun).items()}
    train(tmp_path / "a", [straight], begun)
    begun = model()
    load_into(begun, start)
    train(tmp_path / "b", [Callback(every=every)], begun, steps=4)
    resumed = train(tmp_path / "b", [second], model(), resume=True)
    averages = straight.averager.average(), second.averager.average(), start
    assert averages[0].keys() == averages[1].keys() == averages[2].keys()
    for name in start:
        assert torch.equal(averages[0][name], averages[1][name])
    if lora:
        assert len(start) == 4
        assert set(resumed.model.peft_config) == {"default"}


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning")
def test_lightning_begins_with_the_weights_before_the_first_step(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from averaging.lightning import BEMA as Callback

    class Regression(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(3, 2)
            self.seen = [self.net.weight.detach().clone()]

        def training_step(self, batch, batch_idx):
            return self.net(torch.ones(1, 3) + batch_idx).square().sum()

        def on_train_batch_end(self, *_):
            self.seen.append(self.net.weight.detach().clone())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(range(6))

    module, callback = Regression(), Callback(every=2)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    lightning.Trainer(
        accelerator="cpu", max_epochs=2, callbacks=[callback], default_root_dir=tmp_path, enable_checkpointing=False,
        **options,
    ).fit(module)  # fmt: skip
    expected = reference(module.seen, 0, range(2, 13, 2))
    torch.testing.assert_close(module.net.weight.double(), expected, rtol=1e-6, atol=1e-6)
