"""Schedule-free optimizers (Defazio et al. 2024, https://arxiv.org/abs/2405.15682) keep y in the model while they train
and x while it is evaluated: y = (1 - β) z + β x. An average is put in its place in between, in both trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

schedulefree = pytest.importorskip("schedulefree")

BETA = 0.9


def x_of(optimizer: Any, weights: dict[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    """x of the optimizer's z and the model's weights y, in float64."""
    z = {name: optimizer.state[parameter]["z"].double() for name, parameter in model.named_parameters()}
    return {name: (y.double() - (1 - BETA) * z[name]) / BETA for name, y in weights.items()}


def mean(snapshots: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name].double() for one in snapshots]).mean(0) for name in snapshots[0]}


# ---------------------------------------------------------------------- Lightning

lightning = pytest.importorskip("lightning.pytorch")
from test_lightning import VALIDATION_BATCHES, Regression, batch, pytestmark  # noqa: E402, F401

from averaging.lightning import LAWA as LightningLAWA  # noqa: E402


class ScheduleFree(Regression):
    """Switches the optimizer itself where ``hooks`` says: nowhere, around an evaluation, or within."""

    def __init__(self, hooks: str) -> None:
        super().__init__()
        self.hooks = hooks
        self.trained: dict[int, dict[str, Tensor]] = {}
        self.evaluated: dict[int, dict[str, Tensor]] = {}

    def configure_optimizers(self) -> Any:
        return schedulefree.AdamWScheduleFree(self.parameters(), lr=0.05, betas=(BETA, 0.999))

    def on_train_start(self) -> None:
        self.optimizers().train()

    def on_train_epoch_start(self) -> None:
        if self.hooks == "within":
            self.optimizers().train()

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        if self.hooks == "around":
            self.optimizers().eval()

    def on_validation_epoch_start(self) -> None:
        if self.hooks == "within":
            self.optimizers().eval()

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        if self.hooks == "around":
            self.optimizers().train()

    def on_train_batch_end(self, *_: Any) -> None:
        weights = {name: p.detach().clone() for name, p in self.named_parameters()}
        self.trained[self.trainer.global_step] = weights
        self.evaluated[self.trainer.global_step] = x_of(self.trainer.optimizers[0], weights, self)


def fit(folder: Path, hooks: str, callbacks: list[Any], **options: Any) -> tuple[ScheduleFree, Any]:
    module = ScheduleFree(hooks)
    trainer = lightning.Trainer(
        default_root_dir=folder, max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(module)
    return module, trainer


def loss(weights: dict[str, Tensor]) -> float:
    model = Regression().double()
    model.load_state_dict(weights)
    losses = [
        mse_loss(model.net(x.double()), y.double()) for x, y in (batch(-1 - i) for i in range(VALIDATION_BATCHES))
    ]
    return sum(one.item() for one in losses) / VALIDATION_BATCHES


@pytest.mark.parametrize("hooks", ["none", "around", "within"])
def test_lightning(tmp_path, hooks):
    # What a module switches around an evaluation rounds the weights, with averages and without.
    alone, _ = fit(tmp_path, hooks, [], limit_val_batches=None if hooks == "around" else 0)
    module, trainer = fit(tmp_path, hooks, [LightningLAWA(k=2, every=1, evaluate="both")])
    assert module.trained.keys() == alone.trained.keys()
    for step, weights in alone.trained.items():
        for name, tensor in weights.items():
            assert torch.equal(module.trained[step][name], tensor), (step, name)
    last = max(module.trained)
    average = mean([module.trained[last - 1], module.trained[last]])
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(loss(average), rel=1e-5)
    assert trainer.callback_metrics["online_val_loss"].item() == pytest.approx(loss(module.evaluated[last]), rel=1e-5)
    trainer.optimizers[0].eval()  # which a validation afterwards may do: the model holds the average, and keeps it
    for name, tensor in module.named_parameters():
        torch.testing.assert_close(tensor.detach().double(), average[name], rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------- transformers

pytest.importorskip("transformers")
from test_transformers import Recorder, loss_of, trainer  # noqa: E402

from averaging.transformers import LAWA  # noqa: E402


@pytest.mark.parametrize("eval_strategy", ["steps", "no"])  # training ends with an evaluation, or without
def test_transformers(tmp_path, eval_strategy):
    options = {"optim": "schedule_free_adamw", "adam_beta1": BETA, "save_strategy": "no"}
    options |= {"eval_strategy": eval_strategy}
    alone = Recorder()
    trainer(tmp_path / "alone", [alone], **options).train()
    seen = Recorder()
    run = trainer(tmp_path / "average", [seen, LAWA(k=2, every=1, evaluate="both")], **options)
    run.train()
    assert seen.weights.keys() == alone.weights.keys()
    for step, weights in alone.weights.items():
        for name, tensor in weights.items():
            assert torch.equal(seen.weights[step][name], tensor), (step, name)
    averages = {step: mean([seen.weights[step - 1], seen.weights[step]]) for step in seen.weights if step > 1}
    for entry in run.state.log_history:
        if "eval_loss" in entry:
            average = {name: tensor.float() for name, tensor in averages[entry["step"]].items()}
            assert entry["eval_loss"] == pytest.approx(loss_of(average), rel=1e-5)
    last = max(averages)
    if eval_strategy == "steps":
        online = x_of(run.optimizer.optimizer, seen.weights[last], run.model)
        online = {name: tensor.float() for name, tensor in online.items()}
        logged = next(entry for entry in reversed(run.state.log_history) if "eval_online_loss" in entry)
        assert logged["eval_online_loss"] == pytest.approx(loss_of(online), rel=1e-5)
    run.evaluate()
    for name, tensor in run.model.named_parameters():
        torch.testing.assert_close(tensor.detach().double(), averages[last][name], rtol=1e-6, atol=1e-7)
