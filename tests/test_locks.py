"""Tests of files and folders that other runs write, read or lock, or whose run is killed."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from pipeline import files_in, hashes

from common.errors import UserError
from common.files import locked, recover, writing


def crash(action, call):
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


def test_whenever_writing_is_killed_the_old_or_the_new_content_is_there(tmp_path):
    for kind, least in (("file", 1), ("folder", 4)):
        target = tmp_path / kind / "model"
        inner = target / "inner" / "weights" if kind == "folder" else target

        def put(text, target=target, inner=inner):
            with writing(target) as part:
                place = part / inner.relative_to(target)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(text)

        put("old")
        for call in range(1, 100):
            killed = crash(lambda put=put: put("new"), call)
            recover(target)
            assert inner.read_text() in ("old", "new")
            put("old")
            assert inner.read_text() == "old" and os.listdir(target.parent) == ["model"]
            if not killed:
                break
        assert call > least


def test_a_second_run_in_one_results_folder_is_refused(mutable):
    shutil.rmtree(mutable.results / "Finetune")
    before = hashes(mutable.root)
    with locked(mutable.results / "Finetune"):
        with pytest.raises(UserError, match="another run is at work in .*Finetune; wait"):
            mutable.run("Finetune")
        mutable.run("Benchmark")  # elsewhere it may
    assert hashes(mutable.root) == before


def test_a_lock_ends_with_its_process(tmp_path):
    def die_with_the_lock():
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert crash(die_with_the_lock, 0) and files_in(tmp_path) == {".lock"}
    with locked(tmp_path):
        assert files_in(tmp_path) == {".lock"}
    assert files_in(tmp_path) == set()


def test_a_lock_does_not_live_on_in_the_processes_of_a_pool(tmp_path):
    waiting, go_on = os.pipe()

    def die_before_the_child():
        with locked(tmp_path):
            if os.fork():
                os.kill(os.getpid(), signal.SIGKILL)
            os.close(go_on)
            os.read(waiting, 1)
            os._exit(0)

    assert crash(die_before_the_child, 0)
    with locked(tmp_path):
        os.close(go_on)
    (tmp_path / "file").touch()
    with locked(tmp_path / "file"):  # where nothing can be locked work goes on
        pass


def test_finished_results_in_a_folder_that_cannot_be_written_to_are_shown(monkeypatch, capsys, workspace):
    def open_to_read(path, mode="r", *how, open_any=Path.open, **named):
        if "w" in mode:
            raise PermissionError(13, "Permission denied", str(path))
        return open_any(path, mode, *how, **named)

    def open_only(path, flags, *how, open_any=os.open, **named):
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied", str(path))
        return open_any(path, flags, *how, **named)

    monkeypatch.setattr(Path, "open", open_to_read)
    monkeypatch.setattr(os, "open", open_only)  # as locks are made
    workspace.run("Benchmark")
    assert "Benchmark is finished already" in capsys.readouterr().out
