"""What goes wrong around a run: the training's own weights stay as they are, and the last whole checkpoint too."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from test_transformers import Recorder, assert_equal, snapshot, tiny_model, trainer
from transformers import TrainerCallback

import averaging
from averaging import latest_complete
from averaging.completeness import flaw, seal
from averaging.transformers import AveragingCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended"),
]


def callback():
    return AveragingCallback(averaging.LAWA(k=3, every=2), averaging.EMA(0.8))


class At(TrainerCallback):
    """Does something after an optimizer step."""

    def __init__(self, step, action) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.action()


def run(folder: Path, *more, steps: int = 12, resume=None, model=None, **options):
    """A run whose online weights and averages are what is compared."""
    averages, recorder = callback(), Recorder()
    one = trainer(folder, [averages, recorder, *more], model=model, steps=steps, eval_strategy="no", **options)
    one.recorder, one.averages = recorder, averages
    one.train(resume_from_checkpoint=resume)
    return one


def same_end(one, other) -> None:
    assert_equal(one.recorder.weights[12], other.recorder.weights[12])
    for a, b in zip(one.averages.averagers, other.averages.averagers, strict=True):
        assert_equal(dict(a.average()), dict(b.average()))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return run(tmp_path_factory.mktemp("straight"))


@contextlib.contextmanager
def files_limited_to(size: int):
    """Writing more than ``size`` bytes into a file fails, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def full_disk():
    with contextlib.ExitStack() as stack:
        yield lambda size: stack.enter_context(files_limited_to(size))


@pytest.mark.parametrize("room", [100, 2_000, 20_000])  # for less than a configuration, the model, the optimizer
def test_a_full_disk(tmp_path, straight, full_disk, room):
    recorder = Recorder()
    failing = trainer(
        tmp_path, [callback(), recorder, At(7, lambda: full_disk(room))], save_total_limit=1, eval_strategy="no"
    )
    with pytest.raises(Exception, match=r"File too large|failed writing|unexpected pos"):
        failing.train()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    assert_equal(snapshot(failing.model), recorder.weights[8])
    assert flaw(tmp_path / "checkpoint-4") is None
    assert not [*tmp_path.rglob(".averaging-*")]
    with pytest.warns(UserWarning, match="newest whole checkpoint is checkpoint-4"):
        resumed = run(tmp_path, resume=True)
    same_end(resumed, straight)
    assert latest_complete(tmp_path) == tmp_path / "checkpoint-12"


def test_a_full_disk_under_lightning(tmp_path, full_disk):
    pytest.importorskip("lightning.pytorch")
    from lightning.pytorch import Callback
    from test_lightning import Recorder, Regression, every_step, fit, make_trainer, same, state, weights_of

    import averaging.lightning

    def both():
        return averaging.lightning.AveragingCallback(averaging.LAWA(k=3, every=1), averaging.EMA(0.8))

    class Full(Callback):
        def on_train_batch_end(self, trainer, module, *_) -> None:
            if trainer.global_step == 7:
                full_disk(2_000)

    expected = both()
    fit(tmp_path / "straight", expected)
    module, recorder = Regression(), Recorder()
    failing = make_trainer(tmp_path, Full(), both(), recorder, every_step(tmp_path / "out"))
    with pytest.raises(Exception, match=r"File too large|failed writing|unexpected pos"):
        failing.fit(module)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    assert same(weights_of(module), recorder.online[7])
    assert latest_complete(tmp_path / "out") == tmp_path / "out" / "step=6.ckpt"
    assert len([*(tmp_path / "out").glob("*.averaging-*")]) == 6
    assert not [*tmp_path.rglob(".averaging-*")]
    resumed = both()
    fit(tmp_path, resumed, module=Regression(seed=1), ckpt_path=tmp_path / "out" / "step=6.ckpt")
    assert same(state(resumed), state(expected))


def test_a_folder_that_may_only_be_read():
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)

        folder.chmod(0o555)
        if os.geteuid() == 0:  # who may write anywhere
            stack.callback(os.seteuid, 0)
            os.seteuid(65534)
        recorder = Recorder()
        failing = trainer(folder, [callback(), recorder], eval_strategy="no")
        with pytest.raises(PermissionError):
            failing.train()
        assert_equal(snapshot(failing.model), recorder.weights[4])
        assert not [*folder.iterdir()]


def test_a_folder_removed_during_training(tmp_path, straight):
    folder = tmp_path / "out"
    again = run(folder, At(6, lambda: shutil.rmtree(folder)))
    same_end(again, straight)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-12", "checkpoint-8"]
    for path in folder.iterdir():
        assert flaw(path) is None
    same_end(run(folder, resume=str(folder / "checkpoint-8")), straight)


def test_two_runs_in_one_folder(tmp_path, straight):
    """One saves its first checkpoint; in the midst of it the other comes and runs to the end."""
    recorder = Recorder()
    first = trainer(tmp_path, [callback(), recorder], eval_strategy="no")
    save_optimizer = first._save_optimizer_and_scheduler

    def interrupted(output_dir) -> None:
        run(tmp_path)
        save_optimizer(output_dir)

    first._save_optimizer_and_scheduler = interrupted
    with pytest.raises(RuntimeError, match=r"checkpoint-4: another run has written into it at the same time"):
        first.train()
    assert_equal(snapshot(first.model), recorder.weights[4])
    assert flaw(tmp_path / "checkpoint-4") == "it was not written to the end"
    assert latest_complete(tmp_path) == tmp_path / "checkpoint-12"
    same_end(run(tmp_path, resume=str(tmp_path / "checkpoint-8")), straight)


def test_two_runs_in_one_folder_under_lightning(tmp_path, monkeypatch):
    pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import ModelCheckpoint
    from test_lightning import Regression, fit, same, state

    import averaging.lightning

    def one(seed: int):
        both = averaging.lightning.AveragingCallback(averaging.LAWA(k=3, every=1), averaging.EMA(0.8))
        rolling = ModelCheckpoint(tmp_path, filename="rolling", every_n_train_steps=4, enable_version_counter=False)
        fit(tmp_path, both, rolling, module=Regression(seed=seed))
        return both

    save = torch.save
    inner = []

    def interrupted(*args) -> None:
        if not inner:
            inner.append(None)
            inner[0] = one(seed=1)  # it saves and replaces while this one's folder of snapshots lies there unnamed
        save(*args)

    monkeypatch.setattr(torch, "save", interrupted)
    outer = one(seed=0)
    assert latest_complete(tmp_path) == tmp_path / "rolling.ckpt"
    resumed = averaging.lightning.AveragingCallback(averaging.LAWA(k=3, every=1), averaging.EMA(0.8))
    fit(tmp_path, resumed, module=Regression(seed=2), ckpt_path=tmp_path / "rolling.ckpt")
    assert same(state(resumed), state(outer))


def test_a_clock_that_goes_backwards(tmp_path, straight):
    def tomorrow() -> None:
        later = (tmp_path / "checkpoint-4").stat().st_mtime + 86_400
        os.utime(tmp_path / "checkpoint-4", (later, later))

    again = run(tmp_path, At(6, tomorrow), save_total_limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-12"]
    assert latest_complete(tmp_path) == tmp_path / "checkpoint-12"
    same_end(again, straight)


def test_the_state_of_another_model(tmp_path):
    run(tmp_path / "a")
    wide = tiny_model()
    wide.resize_token_embeddings(40)
    run(tmp_path / "b", model=wide)
    last = tmp_path / "a" / "checkpoint-12"
    shutil.rmtree(last / "ema")
    shutil.copytree(tmp_path / "b" / "checkpoint-12" / "ema", last / "ema")
    seal(last)
    model, recorder = tiny_model(), Recorder()
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight' is .*\(32, 16\).* was .*\(40, 16\) in what was averaged"
    ):
        trainer(tmp_path / "a", [callback(), recorder], model=model, steps=16).train(resume_from_checkpoint=True)
    assert not recorder.weights
    online = snapshot(model)
    assert_equal(online, snapshot(type(model).from_pretrained(last)))


def test_states_of_other_versions():
    average = averaging.EMA(0.8)
    average.update({"w": torch.ones(3)}, 1)
    state = average.state_dict()
    with pytest.raises(ValueError, match=r"later version of averaging \(format 99, .*upgrade averaging"):
        averaging.EMA(0.8).load_state_dict({**state, "version": 99})
    first = {name: value for name, value in state.items() if name != "owes_write_back"}  # as the first version wrote it
    again = averaging.EMA(0.8)
    again.load_state_dict(first)
    assert again.state_dict().keys() == state.keys()
    assert_equal(dict(again.average()), dict(average.average()))
