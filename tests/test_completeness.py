"""Which checkpoints are whole, and which of them a run resumes from."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_transformers import Recorder, assert_equal, trainer

import averaging
from averaging import latest_complete
from averaging.completeness import MANIFEST, begin, flaw, seal
from averaging.transformers import LAWA, AveragingCallback

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "lawa").mkdir(parents=True)
    for name in ("model.safetensors", "lawa/averaging.json", "optimizer.pt", "trainer_state.json"):
        (path / name).write_text(f"{name} of step {step}")
    seal(path)
    return path


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def manifest(**changes):
    def change(path: Path) -> None:
        file = path / MANIFEST
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


FLAWS = {
    "a file is missing": (lambda path: (path / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "a file is cut": (lambda path: cut(path / "model.safetensors"), r"model.safetensors has \d+ bytes instead of \d+"),
    "a bit is flipped": (lambda path: flip(path / "lawa" / "averaging.json"), "lawa/averaging.json is not as it was"),
    "the averages are missing": (lambda path: shutil.rmtree(path / "lawa"), "averaging.json is missing"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), "has no averaging-manifest.json"),
    "damaged manifest": (lambda path: cut(path / MANIFEST), None),
    "nonsense in a manifest": (manifest(files={"model.safetensors": 3}), "manifest.json is damaged"),
    "nonsense for a manifest": (lambda path: (path / MANIFEST).write_text("[]"), "manifest.json is damaged"),
    "unfinished": (begin, "was not written to the end"),
    "of a later version": (manifest(version=99), "later version of averaging .*upgrade"),
}


@pytest.mark.parametrize("case", FLAWS)
def test_what_is_not_whole_is_passed_over_and_the_reason_said(tmp_path, case):
    good = checkpoint(tmp_path, 9)
    bad = checkpoint(tmp_path, 10)
    assert flaw(bad) is None
    assert latest_complete(tmp_path) == bad
    damage, message = FLAWS[case]
    damage(bad)
    if message is None:  # the last character is the end of a line
        assert flaw(bad) is None
        return
    with pytest.warns(UserWarning, match=f"newest whole checkpoint is checkpoint-9; .*checkpoint-10: .*{message}"):
        assert latest_complete(str(tmp_path)) == good


def test_steps_decide_not_times_and_not_names(tmp_path):
    for step in (9, 100, 20):
        path = checkpoint(tmp_path, step)
        os.utime(path, (10**9 - step, 10**9 - step))
    checkpoint(tmp_path / "checkpoint-best", 300)
    assert latest_complete(tmp_path) == tmp_path / "checkpoint-100"


def test_nothing_there(tmp_path):
    assert latest_complete(tmp_path) is None
    assert latest_complete(tmp_path / "nowhere") is None
    begin(tmp_path / "checkpoint-3")
    with pytest.warns(UserWarning, match="no checkpoint is whole; .*checkpoint-3: it was not written to the end"):
        assert latest_complete(tmp_path) is None


def test_without_the_optimizers_state_nothing_can_resume(tmp_path):
    path = checkpoint(tmp_path, 5)
    (path / "optimizer.pt").unlink()
    seal(path)
    assert flaw(path) is None
    with pytest.warns(UserWarning, match="no optimizer's state"):
        assert latest_complete(tmp_path) is None


def test_shared_files_are_read_once(tmp_path, monkeypatch):
    one, two = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    (two / "model.safetensors").unlink()
    os.link(one / "model.safetensors", two / "model.safetensors")
    known = seal(one)
    read = []
    crc32 = averaging.completeness._crc32
    monkeypatch.setattr("averaging.completeness._crc32", lambda file: (read.append(file.name), crc32(file))[1])
    seal(two, known=known)
    assert sorted(read) == ["averaging.json", "optimizer.pt", "trainer_state.json"]
    assert flaw(two) is None


def test_two_runs_at_the_same_checkpoint_leave_it_unfinished(tmp_path):
    path = checkpoint(tmp_path, 1)
    first = begin(path)
    second = begin(path)
    for mark in (first, second):
        with pytest.raises(RuntimeError, match="another run"):
            seal(path, mark)
        assert flaw(path) == "it was not written to the end"
    second = begin(path)
    seal(path, second)
    assert flaw(path) is None
    with pytest.raises(RuntimeError, match="another run"):
        seal(path, first)
    assert flaw(path) == "it was not written to the end"


def test_no_torch_is_needed_for_folders(tmp_path):
    checkpoint(tmp_path, 7)
    code = f"""
import sys, averaging
assert averaging.latest_complete({str(tmp_path)!r}).name == "checkpoint-7"
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------- transformers


def callback(**options):
    return AveragingCallback(averaging.LAWA(k=3, every=2), averaging.EMA(0.8), **options)


def test_transformers_seals_before_the_older_ones_go(tmp_path, monkeypatch):
    import transformers.trainer

    seen = {}
    rotate = transformers.trainer.rotate_checkpoints

    def rotating(output_dir, **options):
        seen.update({path.name: flaw(path) for path in Path(output_dir).iterdir()})
        rotate(output_dir=output_dir, **options)

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", rotating)
    run = trainer(tmp_path, [callback()], save_total_limit=1, eval_strategy="no")
    run.train()
    assert seen == {"checkpoint-4": None, "checkpoint-8": None, "checkpoint-12": None}
    assert latest_complete(tmp_path) == tmp_path / "checkpoint-12"
    run.save_state()  # into the folder above
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize("checkpoint", ["online", "average"])
def test_transformers_resumes_from_the_newest_that_is_whole(tmp_path, checkpoint):
    straight, recorder = callback(checkpoint=checkpoint), Recorder()
    trainer(tmp_path / "a", [straight, recorder], steps=16).train()
    trainer(tmp_path / "b", [callback(checkpoint=checkpoint)], steps=12).train()
    last = tmp_path / "b" / "checkpoint-12"
    cut(last / "optimizer.pt")
    with pytest.raises(ValueError, match=r"checkpoint-12: optimizer.pt has .*resume from .*checkpoint-8, the newest"):
        trainer(tmp_path / "b", [callback(checkpoint=checkpoint)], steps=16).train(resume_from_checkpoint=str(last))
    late = trainer(tmp_path / "b", [], steps=16)
    late.add_callback(callback(checkpoint=checkpoint))  # is not asked before the trainer has loaded what it can
    shutil.copy(tmp_path / "a" / "checkpoint-12" / "optimizer.pt", last)
    cut(last / "ema" / "averaging.json")
    with pytest.raises(ValueError, match=r"checkpoint-12: ema/averaging.json has .*resume from .*checkpoint-8, the n"):
        late.train(resume_from_checkpoint=True)
    second, resumed = callback(checkpoint=checkpoint), Recorder()
    run = trainer(tmp_path / "b", [second, resumed], steps=16)
    with pytest.warns(UserWarning, match=r"newest whole checkpoint is checkpoint-8; .*checkpoint-12: ema/averaging"):
        run.train(resume_from_checkpoint=True)
    assert min(resumed.weights) == 9
    assert_equal(resumed.weights[16], recorder.weights[16])
    for one, other in zip(straight.averagers, second.averagers, strict=True):
        assert_equal(dict(one.average()), dict(other.average()))
    assert flaw(last) is None  # it was written once more


def test_checkpoints_of_an_older_version_are_resumed_with_a_warning(tmp_path):
    straight, recorder = LAWA(k=3, every=2), Recorder()
    trainer(tmp_path, [straight, recorder], steps=12).train()
    for file in tmp_path.glob(f"*/{MANIFEST}"):
        file.unlink()
    for where in (True, str(tmp_path / "checkpoint-12")):
        second = LAWA(k=3, every=2)
        with pytest.warns(UserWarning, match=r"checkpoint-12: it has no .*Resuming from it nevertheless"):
            trainer(tmp_path, [second], steps=12).train(resume_from_checkpoint=where)
        assert_equal(dict(straight.averager.average()), dict(second.averager.average()))


def test_after_training_the_trainer_is_as_it_was(tmp_path):
    run = trainer(tmp_path, [callback()])
    run.train()
    assert run.state.save_to_json.__func__ is type(run.state).save_to_json
    assert run._save_rng_state.__func__ is type(run)._save_rng_state


# ---------------------------------------------------------------------- Lightning


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended")
def test_lightning(tmp_path):
    pytest.importorskip("lightning.pytorch")
    from test_lightning import Regression, every_step, fit, same, state

    import averaging.lightning

    def callback():
        return averaging.lightning.AveragingCallback(averaging.LAWA(k=3, every=1), averaging.EMA(0.8))

    straight = callback()
    fit(tmp_path, straight, every_step(tmp_path))
    last, earlier = tmp_path / "step=12.ckpt", tmp_path / "step=9.ckpt"
    assert latest_complete(tmp_path) == last
    (folder,) = tmp_path.glob("step=12.ckpt.averaging-*")
    snapshot = next(folder.rglob("snapshot-*"))

    def refused(message, error=ValueError):
        with pytest.warns(UserWarning, match=f"step=12.ckpt: .*{message}"):
            found = latest_complete(tmp_path)
        assert found == tmp_path / "step=11.ckpt"
        with pytest.raises(error, match=f"step=12.ckpt: .*{message}.*resume from .*step=11.ckpt, the newest"):
            fit(tmp_path, callback(), module=Regression(seed=1), ckpt_path=last)

    inode = snapshot.stat().st_ino
    whole = snapshot.read_bytes()
    snapshot.unlink()
    snapshot.write_bytes(whole[:-1] + b"\0")
    assert snapshot.stat().st_ino != inode
    refused("snapshot-.* is not as it was written")
    snapshot.write_bytes(whole)
    whole = last.read_bytes()
    last.write_bytes(whole[:-100])
    refused("cut off")
    with zipfile.ZipFile(tmp_path / "step=11.ckpt") as archive:
        weights = archive.read("step=11/data/0")  # as long as those of step 12, and elsewhere in no file
    place = whole.index(zipfile.ZipFile(io.BytesIO(whole)).read("step=12/data/0"))
    last.write_bytes(whole[:place] + weights + whole[place + len(weights) :])
    refused("its part step=12/data/0 is damaged")
    last.write_bytes(whole)
    shutil.move(folder, tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match=r"step=12.ckpt: .* is missing"):
        assert latest_complete(tmp_path) == tmp_path / "step=11.ckpt"
    shutil.move(tmp_path / "elsewhere", folder)
    second = callback()
    fit(tmp_path, second, module=Regression(seed=1), ckpt_path=earlier)
    assert same(state(second), state(straight))
    (folder / MANIFEST).unlink()
    with pytest.warns(UserWarning, match="Resuming from it nevertheless"):
        fit(tmp_path, callback(), module=Regression(seed=1), ckpt_path=last)
