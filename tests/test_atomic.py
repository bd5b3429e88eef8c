"""Files and folders appear whole or not at all."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from averaging import atomic
from averaging.atomic import replacing


def tree(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def make(path, text, folder):
    if folder:
        path.mkdir()
        (path / "sub").mkdir()
        (path / "sub" / "file").write_text(text)
    else:
        path.write_text(text)


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("exchange", [True, False])
def test_creates_and_replaces(tmp_path, folder, exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target = tmp_path / "new" / "out"
    for text in ("first", "second"):
        with replacing(target) as temporary:
            assert temporary.name == "out"
            make(temporary, text, folder)
        assert list(tree(tmp_path).values()) == [text]
        assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_everything_as_it_was(tmp_path, folder, error):
    make(tmp_path / "out", "old", folder)
    before = tree(tmp_path)

    def fail(target):
        with replacing(target) as temporary:
            make(temporary, "new", folder)
            raise error

    for target in (tmp_path / "out", tmp_path / "a" / "b" / "c"):
        with pytest.raises(error):
            fail(target)
    assert tree(tmp_path) == before
    assert os.listdir(tmp_path) == ["out"]


def test_nothing_created_is_an_error(tmp_path):
    (tmp_path / "out").write_text("old")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "out"):
        pass
    assert tree(tmp_path) == {"out": "old"}


def test_a_failed_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    make(tmp_path / "out", "old", folder=True)
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    before = tree(tmp_path)
    rename = type(tmp_path).rename

    def failing(self, target):
        if target == tmp_path / "out" and self.parent.name != "old":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", failing)
    with pytest.raises(OSError, match="no"), replacing(tmp_path / "out") as temporary:
        make(temporary, "new", folder=True)
    assert tree(tmp_path) == before


def test_file_and_folder_replace_each_other(tmp_path):
    for folder in (False, True, False):
        with replacing(tmp_path / "out") as temporary:
            make(temporary, "x", folder)
        assert (tmp_path / "out").is_dir() == folder
    assert os.listdir(tmp_path) == ["out"]


def test_the_umask_decides_the_mode(tmp_path):
    old = os.umask(0o027)
    try:
        with replacing(tmp_path / "out") as temporary:
            temporary.write_text("x")
            temporary.chmod(0o600)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "out").write_text("old")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    with replacing(tmp_path / "out") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "out").read_text() == "new"


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, move = os.fsync, atomic._move
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(atomic, "_move", lambda *a, **k: (events.append("move"), move(*a, **k))[1])
    with replacing(tmp_path / "out") as temporary:
        make(temporary, "x", folder=True)
    names = [event.rpartition("/")[2] for event in events]
    assert names == ["file", "sub", "out", "move", tmp_path.name]


CHILD = """
import sys, time
from averaging.atomic import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("new")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_litter_of_killed_processes_is_swept_and_of_living_ones_not(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path / "out"], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    (tmp_path / ".averaging-other").mkdir()
    hidden = {name for name in os.listdir(tmp_path) if name.endswith(".tmp")}
    assert len(hidden) == 1

    def write():
        with replacing(tmp_path / "mine") as temporary:
            temporary.write_text("mine")

    write()
    assert hidden <= set(os.listdir(tmp_path))
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    write()
    assert sorted(os.listdir(tmp_path)) == [".averaging-other", "mine"]


def test_a_folder_set_aside_by_a_killed_process_comes_back(tmp_path):
    make(tmp_path / "out", "old", folder=True)
    before = tree(tmp_path)
    staging = tmp_path / ".averaging-00000000.tmp"
    (staging / "old").mkdir(parents=True)
    (tmp_path / "out").rename(staging / "old" / "out")
    atomic.sweep(tmp_path)
    assert tree(tmp_path) == before
    assert os.listdir(tmp_path) == ["out"]


SWITCH = """
import sys
from averaging.atomic import replacing
n = 0
while True:
    n += 1
    with replacing(sys.argv[1]) as temporary:
        temporary.mkdir()
        for name in "abc":
            (temporary / name).write_text(str(n))
"""


def test_killed_at_random_moments_the_folder_is_always_whole(tmp_path):
    target = tmp_path / "out"
    for wait in (0.15, 0.19, 0.23, 0.27, 0.31, 0.35):
        child = subprocess.Popen([sys.executable, "-c", SWITCH, target])
        time.sleep(wait)
        child.kill()
        child.wait()
        if target.exists():
            assert sorted(os.listdir(target)) == ["a", "b", "c"]
            assert len({(target / name).read_text() for name in "abc"}) == 1
    assert target.exists()
    atomic.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["out"]
