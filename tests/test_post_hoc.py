"""Post-hoc EMA: profiles by numerical integration, weights against float64 EMAs that were tracked directly."""

from __future__ import annotations

import errno
import json
import math
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from averaging import PostHocEMA, cli, load_into, named_weights, trail
from averaging.checkpoints import Checkpoint
from averaging.soups import post_hoc
from averaging.soups.post_hoc import coefficients, exponent, snapshots

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


# ---------------------------------------------------------------------- the mathematics


def profile(t: np.ndarray, end: float, gamma: float) -> np.ndarray:
    return np.where(t <= end, (gamma + 1) * (np.minimum(t, end) / end) ** gamma / end, 0.0)


def midpoints(end: float, count: int = 40_000) -> tuple[np.ndarray, float]:
    return (np.arange(count) + 0.5) * end / count, end / count


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.28, None), (0.001, None)])
def test_the_exponent_gives_the_width(width, gamma):
    found = exponent(width)
    if gamma:
        assert found == pytest.approx(gamma, abs=5e-3)  # the paper's
    t, dt = midpoints(1.0, 1_000_000)
    weight = profile(t, 1.0, found) * dt
    mean = (weight * t).sum()
    assert math.sqrt((weight * (t - mean) ** 2).sum()) == pytest.approx(width, rel=1e-4)
    for wrong in (0, -0.1, 0.3, math.nan):
        with pytest.raises(ValueError, match=r"between 0 and 0\.289"):
            exponent(wrong)


@pytest.mark.parametrize(("width", "step"), [(0.07, 800), (0.03, 800), (0.2, 800), (0.12, 500), (0.08, 560)])
def test_the_coefficients_are_the_least_squares_ones(width, step):
    """Each profile integrated numerically on a fine grid, and numpy's least squares over the grid's points."""
    stored = [(at, of) for at in range(100, step + 1, 100) for of in (0.05, 0.10)]
    t, dt = midpoints(step)
    basis = np.stack([profile(t, at, exponent(of)) for at, of in stored], axis=1)
    solution = np.linalg.lstsq(basis * math.sqrt(dt), profile(t, step, exponent(width)) * math.sqrt(dt), rcond=None)[0]
    np.testing.assert_allclose(coefficients(stored, width, step), solution / solution.sum(), rtol=2e-3, atol=1e-4)


def test_a_stored_profile_is_itself():
    stored = [(at, of) for at in range(1000, 100_001, 1000) for of in (0.05, 0.10)]
    found = coefficients(stored, 0.1, 100_000)
    assert sum(found) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(found, [0.0] * 199 + [1.0], atol=1e-9)


# ---------------------------------------------------------------------- the weights


def sgd(steps: int, size: int = 300, seed: int = 0):
    """SGD with momentum on a noisy ill-conditioned quadratic, from far away: it falls, then wanders about."""
    rng = np.random.default_rng(seed)
    curvature = np.geomspace(1e-3, 1.0, size)
    theta, velocity, optimum = rng.normal(size=size) * 3, np.zeros(size), rng.normal(size=size)
    for step in range(1, steps + 1):
        gradient = curvature * (theta - optimum) + 0.5 * rng.normal(size=size)
        velocity = 0.9 * velocity + gradient
        theta = theta - 0.02 * velocity
        yield step, theta


def tracked(trajectory, width: float, every: int, until: int) -> np.ndarray:
    """The power-function EMA kept in float64 from the start."""
    gamma, average, last = exponent(width), None, 0
    for step, theta in trajectory:
        if step % every == 0 and step <= until:
            beta = (1 - (step - last) / step) ** (gamma + 1)
            average = theta if average is None else beta * average + (1 - beta) * theta
            last = step
    return average


@pytest.fixture(scope="module")
def trajectory():
    return list(sgd(10_000))


@pytest.mark.parametrize("every", [1, 100])
def test_any_width_at_any_stored_step_is_the_directly_tracked_ema(trajectory, every, tmp_path):
    averager = PostHocEMA(tmp_path, every=every).prepare(total_steps=10_000)
    for step, theta in trajectory:
        averager.update({"theta": torch.from_numpy(theta).float()}, step)
    assert len(snapshots(tmp_path)) == 2 * 100
    for until in (10_000, 5_500):
        online = trajectory[until - 1][1]
        for width in (0.03, 0.05, 0.07, 0.10, 0.15, 0.25):
            direct = tracked(trajectory, width, every, until)
            rebuilt = post_hoc(tmp_path, width, until)["theta"].double().numpy()
            error = np.linalg.norm(rebuilt - direct)
            # Not only of the weights' norm, but of what averaging changes in them.
            assert error < 0.01 * np.linalg.norm(direct)
            assert error < 0.01 * np.linalg.norm(direct - online), (width, until)


# ---------------------------------------------------------------------- while training


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(3, 4)


def run(averager, model, steps) -> dict[int, dict[str, torch.Tensor]]:
    seen = {}
    for step in steps:
        noise = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
        averager.update(model, step)
        seen[step] = clone(named_weights(model))
    return seen


def clone(weights) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}


def assert_equal(one, other) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def stored(folder) -> dict[tuple[int, float], dict[str, torch.Tensor]]:
    return {(step, width): clone(checkpoint) for checkpoint, step, width in snapshots(folder)}


def test_the_average_is_the_first_width_and_snapshots_are_of_both(tmp_path):
    averager, model = PostHocEMA(tmp_path, (0.1, 0.05), every=3, snapshots=4), network()
    seen = run(averager, model, range(1, 13))
    points = [(step, weights["weight"].double().numpy()) for step, weights in seen.items()]
    for width in (0.1, 0.05):
        for at, until in ((3, 4), (6, 8), (12, 12)):  # the last absorption before each multiple of 4
            expected = tracked(points, width, 3, until)
            np.testing.assert_allclose(stored(tmp_path)[at, width]["weight"], expected, rtol=0, atol=1e-6)
    assert {at for at, _ in stored(tmp_path)} == {3, 6, 12}
    assert_equal(clone(averager.average()), stored(tmp_path)[12, 0.1])


def test_snapshots_in_epochs_and_the_default_spacing(tmp_path):
    averager, model = PostHocEMA(tmp_path / "epochs", snapshots="epoch", every=1), network()
    for step in range(1, 11):
        averager.update(model, step, epoch=step / 4)
    assert sorted({at for at, _ in stored(tmp_path / "epochs")}) == [4, 8]
    run(PostHocEMA(tmp_path / "run").prepare(total_steps=300), model, range(1, 10))
    assert sorted({at for at, _ in stored(tmp_path / "run")}) == [3, 6, 9]
    assert PostHocEMA(tmp_path, snapshots=1000).default_every(averager.run).amount == 1
    long = PostHocEMA(tmp_path).prepare(total_steps=1_000_000)
    assert long.default_every(long.run).amount == 100
    with pytest.raises(ValueError, match="snapshots is a fraction of the run"):
        PostHocEMA(tmp_path).update(network())


@pytest.mark.parametrize("way", ["dict", "folder"])
def test_a_resumed_run_leaves_the_snapshots_of_one_history(tmp_path, way):
    run(PostHocEMA(tmp_path / "straight", snapshots=3), network(), range(1, 15))
    folder, model = tmp_path / "cut", network()
    first = PostHocEMA(folder, snapshots=3)
    run(first, model, range(1, 6))
    first.save(tmp_path / "state")
    weights, state = clone(model.state_dict()), torch.save(first.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    run(first, network(1), range(6, 13))  # a history that is given up
    model.load_state_dict(weights)
    second = PostHocEMA(folder, snapshots=3)
    second.load_state_dict(state) if way == "dict" else second.load(tmp_path / "state")
    run(second, model, range(6, 15))
    straight, resumed = stored(tmp_path / "straight"), stored(folder)
    assert straight.keys() == resumed.keys()
    for key in straight:
        assert_equal(resumed[key], straight[key])
    assert {at for at, _ in stored(folder / "superseded-1")} == {6, 9, 12}


def test_a_new_run_in_an_old_folder_mixes_nothing(tmp_path):
    run(PostHocEMA(tmp_path, (0.05, 0.1), snapshots=2), network(), range(1, 7))
    run(PostHocEMA(tmp_path, (0.2,), snapshots=5), network(), range(1, 7))
    assert stored(tmp_path).keys() == {(5, 0.2)}
    assert len(stored(tmp_path / "superseded-1")) == 6


def test_a_full_disk_leaves_the_averages_intact_and_training_can_go_on(tmp_path, monkeypatch):
    whole = PostHocEMA(tmp_path / "whole", snapshots=2)
    run(whole, network(), range(1, 7))
    averager, model = PostHocEMA(tmp_path / "full", snapshots=2), network()
    run(averager, model, range(1, 4))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(trail, "save_weights", full)
        with pytest.raises(OSError, match="intact: make room"):
            run(averager, model, [4])
    run(averager, model, [5, 6])
    assert_equal(clone(averager.average()), clone(whole.average()))
    assert {at for at, _ in stored(tmp_path / "full")} == {2, 6}


def test_settings_and_states_that_do_not_fit(tmp_path):
    for widths in ((), (0.05, 0.05), (0.5,)):
        with pytest.raises(ValueError, match="width"):
            PostHocEMA(tmp_path, widths)
    with pytest.raises(ValueError, match="positive"):
        PostHocEMA(tmp_path, snapshots=0)
    averager = PostHocEMA(tmp_path, snapshots=2)
    run(averager, network(), range(1, 4))
    with pytest.raises(ValueError, match="give the same widths"):
        PostHocEMA(tmp_path, (0.05, 0.2), snapshots=2).load_state_dict(averager.state_dict())


# ---------------------------------------------------------------------- the command


def soup(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    run(PostHocEMA(tmp_path / "ema", snapshots=2), network(), range(1, 21))
    return tmp_path / "ema"


def test_the_command_writes_what_python_returns(folder, tmp_path):
    assert soup(folder, "--post-hoc", "0.07", "--at", "13", "-o", tmp_path / "out") == 0
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), dict(post_hoc(folder, 0.07, 13)))
    record = json.loads((tmp_path / "out" / "soup.json").read_text())
    assert (record["method"], record["width"], record["step"]) == ("post-hoc EMA", 0.07, 13)
    assert sum(part["coefficient"] for part in record["ingredients"]) == pytest.approx(1)
    assert {part["step"] for part in record["ingredients"]} == {2, 4, 6, 8, 10, 12}
    assert soup(folder, "--post-hoc", "0.07") == 0
    assert_equal(load_file(folder / "soup" / "model.safetensors"), dict(post_hoc(folder, 0.07, 20)))
    assert all("post-hoc width" not in metadata for metadata in Checkpoint(folder / "soup").metadata.values())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--post-hoc", "0.3"], "between 0 and 0.289"),
        (["--post-hoc", "0.1", "--at", "21"], "of the steps 2 to 20"),
        (["--post-hoc", "0.1", "--at", "1"], "of the steps 2 to 20"),
        (["--post-hoc", "0.1", "--last", "2"], "--last has no meaning for --post-hoc"),
        (["--at", "8"], "--at has no meaning"),
        ([], "no checkpoints"),
    ],
)
def test_what_makes_no_sense_is_refused(folder, capsys, arguments, says):
    before = sorted(os.listdir(folder))
    assert soup(folder, *arguments) == 2
    assert says in capsys.readouterr().err
    assert sorted(os.listdir(folder)) == before


def test_a_folder_without_snapshots(tmp_path, capsys):
    assert soup(tmp_path, "--post-hoc", "0.1", "-o", tmp_path / "out") == 2
    assert "holds no snapshots of PostHocEMA" in capsys.readouterr().err


# ---------------------------------------------------------------------- trainers


def test_transformers_the_result_opens_with_from_pretrained_in_the_models_dtype(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from averaging.transformers import PostHocEMA as PostHocEMACallback

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    options = TrainingArguments(
        str(tmp_path / "out"), max_steps=12, save_steps=6, per_device_train_batch_size=4, report_to="none",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 32, (40, 8))]
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    callback = PostHocEMACallback(tmp_path / "ema", snapshots=2)
    trainer = Trainer(model, options, train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert_equal(clone(named_weights(model)), clone(callback.averager.average(rounded=True)))
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert {at for at, _ in stored(tmp_path / "ema")} == {2, 4, 6, 8, 10, 12}
    assert soup(tmp_path / "ema", "--post-hoc", "0.08", "-o", tmp_path / "soup") == 0
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "soup")
    assert opened.dtype == torch.bfloat16
    assert_equal(clone(named_weights(opened)), clone(post_hoc(tmp_path / "ema", 0.08)))


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
def test_lightning_stores_and_resumes(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from averaging.lightning import PostHocEMA as PostHocEMACallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(3, 1)

        def training_step(self, batch, index):
            return self.net(torch.ones(2, 3) * (index + 1)).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(range(4))

    def fit(folder, epochs, **options) -> None:
        trainer = lightning.Trainer(
            max_epochs=epochs,
            callbacks=PostHocEMACallback(folder, snapshots=2),
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module := Module(), **options)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        load_into(module, post_hoc(folder, 0.07))

    fit(tmp_path / "cut", 2)
    fit(tmp_path / "cut", 3, ckpt_path=tmp_path / "2.ckpt")
    fit(tmp_path / "straight", 3)
    straight, resumed = stored(tmp_path / "straight"), stored(tmp_path / "cut")
    assert straight.keys() == resumed.keys()
    for key in straight:
        assert_equal(resumed[key], straight[key])
