"""Tests of files and folders that other runs write, read or lock, or whose run is killed."""

import os
import signal
import time
from functools import partial

import pytest
from pipeline import files_in, hashes

from common.errors import UserError
from common.files import HOST, LONGEST_IDLE, locked, recover, sweep, tidy, writing


def crash(action, call=0):
    """Do something in a process that is killed at its `call`-th change of the file system; return whether it was."""
    if not (process := os.fork()):
        left = [call]

        def counted(function, *arguments, **named):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        for name in ("replace", "rename", "unlink", "mkdir", "rmdir", "symlink"):
            setattr(os, name, partial(counted, getattr(os, name)))
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def put(target, inner, text):
    with writing(target) as part:
        place = part / inner
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)


def test_whenever_writing_is_killed_the_old_or_the_new_content_is_there(tmp_path):
    for inner, least in (("", 1), ("inner/weights", 4)):
        target, killed, call = tmp_path / str(least) / "model", True, 0
        put(target, inner, "old")
        while killed:
            call += 1
            killed = crash(partial(put, target, inner, "new"), call)
            recover(target)
            assert (target / inner).read_text() in ("old", "new")
            put(target, inner, "old")
            assert (target / inner).read_text() == "old" and os.listdir(target.parent) == ["model"]
        assert call > least


def test_what_another_run_is_writing_stays_where_locks_do_not_hold(tmp_path):
    """It is swept away once its process has ended or, of another machine, nothing changed for long."""
    target = tmp_path / "models" / "model"
    with writing(target) as part:
        (tmp_path / "models" / "other").mkdir()
        for process, goes in ((os.getppid(), False), (2**22 + 1, True)):  # no number of a process is as high
            for name, idle, stays in ((f"{HOST}-{process}", 0, not goes), (f"elsewhere-{process}", 0, True),
                                      (f"elsewhere-{process}", 2 * LONGEST_IDLE, False)):
                other = part.with_name(f".model.{name}.part")
                for clean in (lambda: sweep(tmp_path), lambda: tidy(target), lambda: put(target, "", "new")):
                    other.write_text("half")
                    os.utime(other, (time.time() - idle,) * 2)
                    clean()
                    assert other.exists() == stays, (name, idle)
                other.unlink(missing_ok=True)
                part.write_text("mine")
        part.write_text("mine")
    assert target.read_text() == "mine" and sorted(os.listdir(tmp_path / "models")) == ["model", "other"]


def test_a_lock_ends_with_its_process_and_does_not_live_on_in_the_processes_of_a_pool(tmp_path):
    waiting, go_on = os.pipe()

    def die_with_the_lock(child):
        with locked(tmp_path):
            if not child or os.fork():
                os.kill(os.getpid(), signal.SIGKILL)
            os.close(go_on)
            os.read(waiting, 1)
            os._exit(0)

    for child in (False, True):
        assert crash(partial(die_with_the_lock, child)) and files_in(tmp_path) == {".lock"}
        with locked(tmp_path):
            assert files_in(tmp_path) == {".lock"}
        assert files_in(tmp_path) == set()
    os.close(go_on)
    (tmp_path / "file").touch()
    with locked(tmp_path / "file"):  # where nothing can be locked work goes on
        pass


def test_a_second_run_in_one_results_folder_is_refused(mutable):
    (mutable.results / "Finetune").rename(mutable.root / "gone")
    before = hashes(mutable.root)
    with locked(mutable.results / "Finetune"):
        with pytest.raises(UserError, match="another run is at work in .*Finetune; wait"):
            mutable.run("Finetune")
        mutable.run("Benchmark")  # elsewhere it may
    assert hashes(mutable.root) == before
