"""Checkpoints share the files of what never changes, above all LAWA's snapshots, and every checkpoint stays whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from test_lightning import Regression, content, every_step, fit, make_trainer, pytestmark, same, state
from test_transformers import Recorder, assert_equal, trainer

import averaging
import averaging.lightning
import averaging.transformers
from averaging import BEMA, LAWA, ElasticReset

pytest.importorskip("lightning.pytorch")
__all__ = ["pytestmark"]
ModelCheckpoint = pytest.importorskip("lightning.pytorch.callbacks").ModelCheckpoint

K = 6


def advance(averager: LAWA, steps: Iterable[int]) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        averager.update({"w": torch.randn(1000, generator=generator)}, step)


def lawa(memory: str = "cpu") -> LAWA:
    return LAWA(k=K, every=1, memory=memory)


def snapshots(folder: Path) -> dict[str, int]:
    """The snapshots' files below ``folder`` → inode."""
    return {str(file.relative_to(folder)): file.stat().st_ino for file in folder.rglob("snapshot-*.safetensors")}


def test_saving_again_writes_only_what_is_new(tmp_path):
    averager = lawa()
    for n in range(1, 11):
        advance(averager, [n])
        averager.save(tmp_path / f"{n}")
    files = snapshots(tmp_path)
    assert len(files) == sum(min(n, K) for n in range(1, 11))
    assert len(set(files.values())) == 10
    shared = tmp_path / "10" / "snapshot-000000000006.safetensors"
    assert shared.stat().st_nlink == 5  # in the states of steps 6 to 10
    before = snapshots(tmp_path / "10")
    averager.save(tmp_path / "10")  # in its own place
    assert snapshots(tmp_path / "10") == before
    for n in range(1, 10):
        shutil.rmtree(tmp_path / f"{n}")
    assert_equal(lawa().load(tmp_path / "10").average(), averager.average())


@pytest.mark.parametrize("memory", ["cpu", "disk"])
def test_a_resumed_run_links_too(tmp_path, memory):
    where = str(tmp_path / "ring") if memory == "disk" else memory
    first = lawa(where)
    advance(first, range(1, 9))
    first.save(tmp_path / "states" / "8")
    second = lawa(where).load(tmp_path / "states" / "8")
    advance(second, [9])
    second.save(tmp_path / "states" / "9")
    assert len(set(snapshots(tmp_path / "states").values())) == K + 1
    straight = lawa()
    advance(straight, range(1, 10))
    assert_equal(lawa().load(tmp_path / "states" / "9").average(), straight.average())


def test_what_is_not_the_same_snapshot_is_never_linked(tmp_path):
    folder, later = tmp_path / "4", tmp_path / "5"
    averager = lawa()
    advance(averager, range(1, 5))

    def check() -> None:
        averager.save(later)
        assert not set(snapshots(later).values()) & set(snapshots(folder).values())
        assert_equal(lawa().load(later).average(), averager.average())

    averager.save(folder)
    other = lawa()  # another run writes into the same place, at the same steps
    for step in range(1, 5):
        other.update({"w": torch.full((1000,), float(step))}, step)
    other.save(folder)
    check()
    averager.save(folder)
    for file in folder.glob("snapshot-*"):  # a tool writes into the files
        file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    later = tmp_path / "6"
    check()
    averager.save(folder)
    averager.reset()  # a new run with the same steps
    for step in range(1, 5):
        averager.update({"w": torch.full((1000,), float(step))}, step)
    later = tmp_path / "7"
    check()


def test_after_a_failed_save_the_next_one_links(tmp_path):
    averager = lawa()
    advance(averager, range(1, 5))
    averager.save(tmp_path / "4")
    advance(averager, [5])
    with pytest.raises(OSError, match="full"), averager.saving(tmp_path / "5"):
        raise OSError("full")
    assert not (tmp_path / "5").exists()
    averager.save(tmp_path / "6")
    assert len(set(snapshots(tmp_path).values())) == 5


@pytest.mark.parametrize("memory", ["cpu", "disk"])
def test_a_file_system_without_links_gets_copies(tmp_path, monkeypatch, memory):
    def refuse(*args):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("os.link", refuse)
    averager = lawa(str(tmp_path / "ring") if memory == "disk" else memory)
    for n in (7, 8):
        advance(averager, range(averager.step + 1, n + 1))
        averager.save(tmp_path / f"{n}")
        assert_equal(lawa().load(tmp_path / f"{n}").average(), averager.average())
    assert len(set(snapshots(tmp_path / "7").values()) | set(snapshots(tmp_path / "8").values())) == 2 * K


@pytest.mark.parametrize("memory", ["cpu", "disk"])
def test_on_another_file_system(tmp_path, tmp_path_factory, memory):
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    folder = Path(shm / f"averaging-test-{os.getpid()}")
    averager = lawa(str(tmp_path / "ring") if memory == "disk" else memory)
    try:
        advance(averager, range(1, 9))
        for place in (tmp_path / "8", folder / "8"):
            averager.save(place)
        advance(averager, [9])
        averager.save(folder / "9")
        assert len(set(snapshots(folder).values())) == K + 1
        assert_equal(lawa().load(folder / "9").average(), averager.average())
    finally:
        shutil.rmtree(folder)


# ---------------------------------------------------------------------- transformers


def test_transformers_checkpoints_share_snapshots_and_survive_rotation(tmp_path):
    def callback():
        return averaging.transformers.LAWA(k=K, every=1)

    straight, recorder = callback(), Recorder()
    trainer(tmp_path / "a", [straight, recorder], steps=16, save_steps=1, eval_strategy="no").train()
    files = snapshots(tmp_path / "a")
    assert len(files) == sum(min(n, K) for n in range(1, 17))
    assert len(set(files.values())) == 16  # one for each step
    model = (tmp_path / "a" / "checkpoint-16" / "model.safetensors").stat().st_size
    sizes = {file.stat().st_ino: file.stat().st_size for file in (tmp_path / "a" / "checkpoint-16").rglob("snap*")}
    new = sum(
        size for inode, size in sizes.items() if inode not in snapshots(tmp_path / "a" / "checkpoint-15").values()
    )
    assert new < 1.1 * model

    rotating = {"save_steps": 1, "save_total_limit": 1, "eval_strategy": "no"}
    trainer(tmp_path / "b", [callback()], steps=9, **rotating).train()
    (kept,) = (tmp_path / "b").glob("checkpoint-*")
    inodes = set(snapshots(kept).values())
    second, resumed = callback(), Recorder()
    run = trainer(tmp_path / "b", [second, resumed], steps=16, save_steps=1, eval_strategy="no")
    run.train(resume_from_checkpoint=True)
    assert len(set(snapshots(tmp_path / "b").values()) - inodes) == 7  # the resumed run linked those of the first
    assert_equal(resumed.weights[16], recorder.weights[16])
    assert_equal(second.averager.average(), straight.averager.average())


# ---------------------------------------------------------------------- Lightning


def lightning_lawa(memory: str = "cpu") -> averaging.lightning.LAWA:
    return averaging.lightning.LAWA(k=K, every=1, memory=memory)


@pytest.mark.parametrize("memory", ["cpu", "disk"])
def test_lightning_checkpoints_share_snapshots(tmp_path, memory):
    where = str(tmp_path / "ring") if memory == "disk" else memory
    straight, folder = lightning_lawa(where), tmp_path / "ckpt"
    _, _, recorder = fit(tmp_path, straight, every_step(folder))
    files = snapshots(folder)
    assert len(files) == sum(min(n, K) for n in range(1, 13))
    assert len(set(files.values())) == 12
    assert not any("snapshot" in str(key) for key in content(folder / "step=9.ckpt")["averaging"]["averages"]["lawa"])
    inodes = set(files.values())
    for file in folder.glob("step=9.ckpt*"):  # moved with its folder; the others are gone
        (tmp_path / "moved").mkdir(exist_ok=True)
        shutil.move(file, tmp_path / "moved")
    shutil.rmtree(folder)
    again = lightning_lawa(where)
    _, _, rest = fit(
        tmp_path, again, every_step(folder), module=Regression(seed=1), ckpt_path=tmp_path / "moved" / "step=9.ckpt"
    )
    assert same(rest.online, {step: recorder.online[step] for step in (10, 11, 12)})
    assert same(state(again), state(straight))
    assert len(set(snapshots(folder).values()) - inodes) <= 3  # linked to those of the moved one


def test_lightning_removes_what_it_replaces_and_nothing_else(tmp_path):
    rolling = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_last=True)
    fit(tmp_path, lightning_lawa(), rolling)
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    assert len(list(tmp_path.glob("*.ckpt.averaging-*"))) == 2  # of step=12.ckpt and of last.ckpt
    assert len(set(snapshots(tmp_path).values())) == K
    other = lightning_lawa()  # a second run in the same directory
    rolling = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_last="link")
    fit(tmp_path, other, rolling, module=Regression(seed=3))
    for file, expected in (("step=12.ckpt", None), ("last-v1.ckpt", other)):
        resumed = lightning_lawa()
        fit(tmp_path, resumed, ckpt_path=tmp_path / file)
        assert resumed.averager.absorbed == 12
        assert expected is None or same(state(resumed), state(expected))


def test_lightning_an_interrupted_save_leaves_the_earlier_checkpoint_whole(tmp_path, monkeypatch):
    callback = lightning_lawa()
    run, module, _ = fit(tmp_path, callback, epochs=2)
    run.save_checkpoint(tmp_path / "last.ckpt")
    before, inodes = state(callback), snapshots(tmp_path)
    run.fit_loop.max_epochs = 3
    run.fit(module)

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("averaging.lightning.torch.save", fail)
        with pytest.raises(OSError, match="space"):
            run.save_checkpoint(tmp_path / "last.ckpt")
    assert snapshots(tmp_path) == inodes
    resumed = lightning_lawa()
    fit(tmp_path, resumed, ckpt_path=tmp_path / "last.ckpt", epochs=2)
    assert same(state(resumed), before)


def test_lightning_without_the_folder_says_so(tmp_path):
    fit(tmp_path, lightning_lawa(), every_step(tmp_path))
    file = shutil.copy(tmp_path / "step=8.ckpt", tmp_path / "alone.ckpt")
    fit(tmp_path, lightning_lawa(), ckpt_path=file)  # it names the folder that the original has
    shutil.rmtree(next(tmp_path.glob("step=8.ckpt.*")))
    assert averaging.lightning.load_average(file)
    with pytest.raises(FileNotFoundError, match="beside the checkpoint"):
        fit(tmp_path, lightning_lawa(), ckpt_path=file)
    callback = averaging.lightning.LAWA(k=K, every=1, missing="start")
    fit(tmp_path, callback, ckpt_path=file)
    assert callback.averager.absorbed == 4


def test_lightning_with_another_checkpoint_io_stays_in_one_file(tmp_path):
    from lightning.pytorch.plugins import TorchCheckpointIO

    class Own(TorchCheckpointIO):
        pass

    straight = lightning_lawa()
    fit(tmp_path, straight, every_step(tmp_path), plugins=[Own()])
    assert not list(tmp_path.glob("*.averaging-*"))
    resumed = lightning_lawa()
    make_trainer(tmp_path, resumed).fit(Regression(seed=1), ckpt_path=tmp_path / "step=8.ckpt")
    assert same(state(resumed), state(straight))


# ---------------------------------------------------------------------- BEMA and Elastic Reset


def files_of(folder: Path, name: str) -> set[int]:
    """The inodes of the files called ``name`` below ``folder``."""
    return {file.stat().st_ino for file in folder.rglob(f"{name}.safetensors")}


@pytest.mark.parametrize("memory", ["cpu", "disk"])
@pytest.mark.parametrize(
    ("build", "file", "written"),
    [(partial(BEMA, every=3), "ema", 5), (partial(BEMA, every=3), "start", 1),
     (partial(BEMA, every=3), "latest-000000000003", 1),
     (partial(ElasticReset, 4), "ema", 5), (partial(ElasticReset, 4), "initial", 1)],
)  # fmt: skip
def test_what_never_changes_is_written_once(build, file, written, memory, tmp_path):
    averager = build(memory=tmp_path / "memory" if memory == "disk" else memory)
    advance(averager, [0])
    for n in range(1, 6):
        advance(averager, [n])
        averager.save(tmp_path / "states" / f"{n}")
        if n == 3:
            averager = build(memory=averager._memory._folder if memory == "disk" else memory)
            averager.load(tmp_path / "states" / "3")
    assert len(files_of(tmp_path / "states", file)) == written
    again = build().load(tmp_path / "states" / "5")
    assert_equal(again.average(), averager.average())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("framework", ["transformers", "lightning"])
def test_checkpoints_share_the_weights_at_the_start(framework, tmp_path):
    def run(folder, **resume):
        callback = getattr(averaging, framework).BEMA(every=2)
        if framework == "lightning":
            fit(folder, callback, every_step(folder), **resume)
        else:
            run = trainer(folder, [callback], steps=12, save_steps=1, eval_strategy="no")
            run.train(**resume)
        return callback

    straight = run(tmp_path / "a")
    assert len([*(tmp_path / "a").rglob("start.safetensors")]) == 12
    assert len(files_of(tmp_path / "a", "start")) == 1
    cut = {"ckpt_path": tmp_path / "a" / "step=5.ckpt"} if framework == "lightning" else {
        "resume_from_checkpoint": str(tmp_path / "a" / "checkpoint-5")}  # fmt: skip
    again = run(tmp_path / "b", **cut)
    assert files_of(tmp_path / "b", "start") == files_of(tmp_path / "a", "start")
    assert_equal(again.averager.average(), straight.averager.average())
