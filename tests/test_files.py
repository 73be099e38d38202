"""Tests of files and folders that are written, read and locked by several runs, any of which may be killed."""

import errno
import json
import os
import re
import signal
from functools import partial
from unittest.mock import Mock

import pytest
from pipeline import files_in, hashes
from safetensors import SafetensorError

from common.errors import UserError
from common.files import locked, read_json, recover, remove, sweep, write_json, writing

CONTENT = {"a": 1, "c": {"d": "é", "e": ["x", "y"]}}
FORM = {"a": int, "c": {"d": str, "e": [str]}}


def test_json_may_be_edited_where_it_does_no_harm_and_else_is_one_line_that_names_the_place(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, CONTENT)
    assert read_json(path, "", FORM) == CONTENT
    path.write_text(f"\ufeff{json.dumps(dict(reversed(CONTENT.items())), indent=4)}", encoding="utf-8", newline="\r\n")
    assert read_json(path, "", FORM) == CONTENT
    whole = json.dumps(CONTENT)
    for text, place in (("", "cannot be read"), (whole[:-1], "cannot be read"), ("[" * 100_000, "cannot be read"),
                        ("[]", "it is not an object"), (whole.replace("1", '"1"'), "a is not a whole number"),
                        ('{"a": 1}', "c is not an object"), (whole.replace('["x"', '[1, "x"'), "c.e[0] is not a text")):
        path.write_text(text)
        with pytest.raises(UserError, match=f"^{re.escape(str(path))} [^\n]*{re.escape(place)}[^\n]*; do this$"):
            read_json(path, "do this", FORM)


def put(target, inner, text):
    with writing(target) as part:
        place = part / inner
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)


def test_what_the_file_system_refuses_is_one_line_and_leaves_what_was_there(tmp_path, monkeypatch):
    """Whatever else goes wrong while something is written is a fault of the code."""
    path = tmp_path / "model"
    path.write_text("old")
    for error, kind in ((OSError(errno.ENOSPC, "No space left on device"), UserError),
                        (SafetensorError("I/O error: No space left on device (os error 28)"), UserError),
                        (OSError("libcudart.so.12: cannot open shared object file"), OSError),
                        (SafetensorError("Error while deserializing header"), SafetensorError)):
        with pytest.raises(kind, match="model cannot be written .*No space" if kind is UserError else None), writing(path) as part:
            part.write_text("half")
            raise error
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["model"]
    monkeypatch.setattr(os, "unlink", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(UserError, match="model cannot be deleted .Permission denied"):
        remove(path)


def crash(action, call=0):
    """Do something in a process that is killed at its `call`-th change of the file system; return whether it was."""
    if not (process := os.fork()):
        left = [call]

        def counted(function, *arguments, **named):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        for name in ("replace", "rename", "unlink", "mkdir", "rmdir"):
            setattr(os, name, partial(counted, getattr(os, name)))
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("inner", ["", "inner/weights"])
def test_whenever_writing_is_killed_the_old_or_the_new_content_is_there_and_nothing_else_stays(tmp_path, inner):
    target, killed, call = tmp_path / "models" / "model", True, 0
    put(target, inner, "old")
    while killed:
        call += 1
        killed = crash(partial(put, target, inner, "new"), call)
        recover(target)
        assert (target / inner).read_text() in ("old", "new")
        sweep(tmp_path)
        assert os.listdir(target.parent) == ["model"]
        put(target, inner, "old")
    assert call > (4 if inner else 1)


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
