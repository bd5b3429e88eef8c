"""Trajectories: what is on the disk after runs, cuts, resumes and failures, and the soups cooked from it."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from averaging import LAWA, Trajectory, applied, cli, load_into, named_weights, trail
from averaging.checkpoints import Checkpoint, find
from averaging.soups import uniform

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def walk(model: nn.Module, step: int) -> None:
    noise = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)


def run(averager, model, steps) -> dict[int, dict[str, torch.Tensor]]:
    seen = {}
    for step in steps:
        walk(model, step)
        averager.update(model, step)
        seen[step] = clone(named_weights(model))
    return seen


def clone(weights) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}


def mean64(snapshots) -> dict[str, torch.Tensor]:
    return {n: torch.stack([s[n].double() for s in snapshots]).mean(0).float() for n in snapshots[0]}


def assert_equal(one, other) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def steps(folder) -> list[int]:
    return [checkpoint.step for checkpoint in find(folder)]


def test_snapshots_are_verbatim_and_any_average_can_be_chosen_afterwards(tmp_path):
    model = network()
    seen = run(Trajectory(tmp_path, every=2), model, range(1, 13))
    assert steps(tmp_path) == [2, 4, 6, 8, 10, 12]
    for checkpoint in find(tmp_path):
        assert_equal(clone(checkpoint), seen[checkpoint.step])
    with safe_open(tmp_path / "step-000000004.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "4"}
    assert cli.main([str(tmp_path), "--last", "2", "--every", "2"]) == 0
    assert_equal(load_file(tmp_path / "soup" / "model.safetensors"), mean64([seen[8], seen[12]]))
    load_into(model, Checkpoint(tmp_path / "soup"))
    assert steps(tmp_path) == [2, 4, 6, 8, 10, 12]  # the soup is none of them


def test_any_lawa_can_be_had_from_it_bit_for_bit(tmp_path):
    model, lawa = network(), LAWA(k=3, every=2)
    trajectory = Trajectory(tmp_path, every=2)
    for step in range(1, 13):
        walk(model, step)
        lawa.update(model, step)
        trajectory.update(model, step)
    assert_equal(clone(uniform(find(tmp_path)[-3:])), clone(lawa.average()))


def test_the_dtype_is_rounded_to_once_and_complex_weights_stay(tmp_path):
    # Beside a midpoint of two bfloat16 numbers: by way of float32 it would be rounded the wrong way.
    wide = torch.tensor([1 + 2.0**-8 + 2.0**-40, -2.5], dtype=torch.float64)
    weights = {"wide": wide, "plain": torch.tensor([0.1]), "phase": torch.tensor([1j])}
    Trajectory(tmp_path, every=1, dtype="bfloat16").update(weights)
    stored = load_file(tmp_path / "step-000000001.safetensors")
    assert stored["wide"].tolist() == [1 + 2.0**-7, -2.5]
    assert torch.equal(stored["plain"], weights["plain"].bfloat16())
    assert torch.equal(stored["phase"], weights["phase"])
    with pytest.raises(ValueError, match="int8"):
        Trajectory(tmp_path, dtype="int8")


def test_the_default_is_a_hundredth_of_the_run(tmp_path):
    run(Trajectory(tmp_path).prepare(total_steps=200), network(), range(1, 7))
    assert steps(tmp_path) == [2, 4, 6]
    with pytest.raises(ValueError, match="length is not known"):
        Trajectory(tmp_path / "other").update(network())


def test_buffers_are_stored_when_asked_for(tmp_path):
    run(Trajectory(tmp_path, every=1, buffers=True), network(), [1, 2])
    assert "1.running_var" in find(tmp_path)[0]


def test_it_leads_nothing(tmp_path):
    trajectory, model = Trajectory(tmp_path, every=1), network()
    with pytest.raises(RuntimeError, match="absorbed no weights"):
        trajectory.average()
    run(trajectory, model, range(1, 4))
    before = clone(model.state_dict())
    with applied(model, trajectory):
        assert_equal(clone(model.state_dict()), before)
    load_into(model, trajectory)
    assert_equal(clone(model.state_dict()), before)
    assert trajectory.average() == {}


@pytest.mark.parametrize("way", ["dict", "folder"])
def test_a_resumed_run_leaves_the_snapshots_of_one_history(tmp_path, way):
    straight = run(Trajectory(tmp_path / "straight", every=2), network(), range(1, 15))
    folder, model = tmp_path / "cut", network()
    first = Trajectory(folder, every=2)
    run(first, model, range(1, 6))
    weights, state = clone(model.state_dict()), first.state_dict()
    first.save(tmp_path / "state")
    walk(model, 99)  # the history that is given up is another one
    run(first, model, range(6, 12))
    model.load_state_dict(weights)
    second = Trajectory(folder, every=2)
    second.load_state_dict(state) if way == "dict" else second.load(tmp_path / "state")
    assert steps(folder) == [2, 4, 6, 8, 10]  # nothing is moved before training goes on
    run(second, model, range(6, 15))
    assert steps(folder) == [2, 4, 6, 8, 10, 12, 14]
    for checkpoint in find(folder):
        assert_equal(clone(checkpoint), straight[checkpoint.step])
    assert steps(folder / "superseded-1") == [6, 8, 10]


def test_a_new_run_in_an_old_folder_loses_nothing_and_mixes_nothing(tmp_path):
    old = run(Trajectory(tmp_path, every=2), network(0), range(1, 8))
    new = run(Trajectory(tmp_path, every=3), network(1), range(1, 8))
    run(Trajectory(tmp_path, every=5), network(1), range(1, 8))
    assert steps(tmp_path) == [5]
    assert {c.step: clone(c).keys() for c in find(tmp_path / "superseded-1")}.keys() == {2, 4, 6}
    assert_equal(clone(find(tmp_path / "superseded-1")[1]), old[4])
    assert_equal(clone(find(tmp_path / "superseded-2")[1]), new[6])


def test_a_full_disk_is_a_clear_error_and_training_can_go_on(tmp_path, monkeypatch):
    trajectory, model = Trajectory(tmp_path, every=1), network()
    run(trajectory, model, [1])
    save_weights = trail.save_weights

    def full(tensors, file, metadata):
        save_weights(tensors, file, metadata)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trail, "save_weights", full)
    with pytest.raises(OSError, match="intact: make room") as caught:
        trajectory.update(model, 2)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["step-000000001.safetensors"]
    monkeypatch.setattr(trail, "save_weights", save_weights)
    run(trajectory, model, [3])
    assert steps(tmp_path) == [1, 3]


def test_in_a_distributed_run_one_rank_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(trail.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(trail.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(trail.distributed, "get_world_size", lambda: 2)
    run(Trajectory(tmp_path, every=1), network(), [1, 2])
    assert not os.listdir(tmp_path)


def test_a_model_that_fits_completes_the_soup_and_another_is_refused(tmp_path, capsys):
    from safetensors.torch import save_file

    model = network()
    seen = run(Trajectory(tmp_path / "run", every=1), model, [1, 2])
    model[1].running_mean.fill_(float("-inf"))  # copied, not averaged
    save_file(
        {n: t.half() if t.is_floating_point() else t for n, t in model.state_dict().items()},
        tmp_path / "all.safetensors",
    )
    assert cli.main([str(tmp_path / "run"), "--like", str(tmp_path / "all.safetensors")]) == 0
    soup, expected = load_file(tmp_path / "run" / "soup" / "model.safetensors"), mean64([seen[1], seen[2]])
    assert soup.keys() == model.state_dict().keys()
    for name, tensor in soup.items():
        known = expected[name] if name in expected else model.state_dict()[name]
        assert torch.equal(tensor, known.to(tensor.dtype)), name
        assert tensor.dtype == (torch.float16 if known.is_floating_point() else torch.int64)
    save_file({"0.weight": torch.zeros(4, 3)}, tmp_path / "part.safetensors")
    save_file({**soup, "0.weight": torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    for wrong, says in (("part", "does not hold '0.bias'"), ("other", "shape [4, 3]")):
        assert (
            cli.main(
                [str(tmp_path / "run"), "--like", str(tmp_path / f"{wrong}.safetensors"), "-o", str(tmp_path / "o")]
            )
            == 2
        )
        assert says in capsys.readouterr().err


# ---------------------------------------------------------------------- transformers


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
        )
    )  # fmt: skip


def trainer(folder, callbacks, model=None, steps=12) -> Trainer:
    tokens = torch.randint(0, 32, (40, 8), generator=torch.Generator().manual_seed(1))
    options = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "save_steps": 4, "seed": 1, "disable_tqdm": True, "report_to": "none",
        "use_cpu": True, "logging_steps": 1000,
    }  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    return Trainer(model=model or llama(), args=TrainingArguments(**options), train_dataset=rows, callbacks=callbacks)


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.weights[state.global_step] = clone(named_weights(model))


def test_transformers_soups_of_the_trajectory_open_with_from_pretrained(tmp_path):
    from averaging.transformers import Trajectory as TrajectoryCallback

    recorder, folder = Recorder(), tmp_path / "trajectory"
    straight = trainer(tmp_path / "out", [TrajectoryCallback(folder, every=2), recorder])
    straight.train()
    assert_equal(clone(named_weights(straight.model)), recorder.weights[12])
    assert not (tmp_path / "out" / "checkpoint-8" / "trajectory" / "model.safetensors").exists()
    assert steps(folder) == [2, 4, 6, 8, 10, 12]
    assert cli.main([str(folder), "--last", "3", "-o", str(tmp_path / "soup")]) == 0
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "soup")
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    assert_equal(clone(named_weights(opened)), mean64([recorder.weights[t] for t in (8, 10, 12)]))

    again = trainer(tmp_path / "out", [TrajectoryCallback(folder, every=2), resumed := Recorder()], steps=16)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    assert steps(folder) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert steps(folder / "superseded-1") == [10, 12]
    assert_equal(clone(find(folder)[5]), recorder.weights[12])
    assert_equal(clone(find(folder)[-1]), resumed.weights[16])


def test_transformers_a_trajectory_of_an_adapter_becomes_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    from averaging.transformers import Trajectory as TrajectoryCallback

    recorder, folder = Recorder(), tmp_path / "trajectory"
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trainer(tmp_path / "out", [TrajectoryCallback(folder, every=2), recorder], model=adapted).train()
    assert cli.main([str(folder), "--last", "2", "-o", str(tmp_path / "soup")]) == 0
    opened = peft.PeftModel.from_pretrained(llama(), tmp_path / "soup", is_trainable=True)
    assert_equal(clone(named_weights(opened)), mean64([recorder.weights[t] for t in (10, 12)]))


def test_transformers_a_template_under_other_names_is_left_out_with_a_warning(tmp_path):
    run(Trajectory(tmp_path, every=1), network(), [1, 2])
    llama().save_pretrained(tmp_path / "template")
    with pytest.warns(UserWarning, match="only the averaged weights"):
        assert set(uniform(tmp_path)) == set(named_weights(network()))


def test_transformers_batchnorm_statistics_are_averaged_or_warned_of(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    from averaging.transformers import Trajectory as TrajectoryCallback

    def images(folder, buffers: bool):
        torch.manual_seed(0)
        config = ResNetConfig(
            num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2
        )
        options = TrainingArguments(
            str(tmp_path / "out"), max_steps=4, save_strategy="no", per_device_train_batch_size=4, report_to="none",
            disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        rows = [{"pixel_values": torch.randn(1, 16, 16) + 2, "labels": i % 2} for i in range(16)]
        model = ResNetForImageClassification(config)
        Trainer(
            model, options, train_dataset=rows, callbacks=[TrajectoryCallback(folder, every=2, buffers=buffers)]
        ).train()
        return model

    model = images(tmp_path / "with", buffers=True)
    assert cli.main([str(tmp_path / "with")]) == 0
    opened = ResNetForImageClassification.from_pretrained(tmp_path / "with" / "soup").state_dict()
    expected = mean64(list(map(clone, find(tmp_path / "with"))))
    assert expected.keys() == named_weights(model, buffers=True).keys()
    for name, tensor in expected.items():
        assert torch.equal(opened[name], tensor), name
    images(tmp_path / "without", buffers=False)
    with pytest.warns(UserWarning, match="BatchNorm statistics"):
        uniform(tmp_path / "without")


def test_buffers_that_no_checkpoint_holds_are_not_stored(tmp_path):
    model = llama()
    assert not named_weights(model, buffers=True).keys() - model.state_dict().keys()


# ---------------------------------------------------------------------- Lightning


def test_lightning_stores_and_resumes(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from averaging.lightning import Trajectory as TrajectoryCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(3, 1)
            self.seen: dict[int, dict[str, torch.Tensor]] = {}

        def training_step(self, batch, index):
            return self.net(torch.ones(2, 3) * (index + 1)).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(range(4))

        def on_train_batch_end(self, *_):
            self.seen[self.global_step] = clone(named_weights(self))

    def fit(epochs, **options):
        module = Module()
        trainer = lightning.Trainer(
            default_root_dir=tmp_path,
            max_epochs=epochs,
            callbacks=TrajectoryCallback(tmp_path / "run", every=2),
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, **options)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    first = fit(2)
    assert_equal(clone(named_weights(first)), first.seen[8])
    second = fit(3, ckpt_path=tmp_path / "2.ckpt")
    assert steps(tmp_path / "run") == [2, 4, 6, 8, 10, 12]
    expected = mean64([first.seen[8], second.seen[10], second.seen[12]])
    assert cli.main([str(tmp_path / "run"), "--last", "3", "--like", str(tmp_path / "3.ckpt")]) == 0
    second.load_state_dict(load_file(tmp_path / "run" / "soup" / "model.safetensors"))
    assert_equal(clone(named_weights(second)), expected)
