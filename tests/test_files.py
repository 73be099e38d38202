"""Tests of common.files: JSON that people open and save, and whose fault an error is."""

import errno
import json
import os
import re

import pytest
from safetensors import SafetensorError

from common.errors import UserError
from common.files import read_json, remove, write_json, writing

CONTENT = {"a": 1, "b": [0.5, 2], "c": {"d": "é", "e": ["x", "y"]}}
FORM = {"a": int, "b": [float], "c": {"d": str, "e": [str]}}


def refusal(path, form=FORM):
    """The one line that a JSON file is refused with."""
    with pytest.raises(UserError) as refused:
        read_json(path, "do this", form)
    said = str(refused.value)
    assert said.startswith(f"{path} ") and said.endswith("; do this") and "\n" not in said
    return said


def test_json_may_be_edited_where_it_does_no_harm(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, CONTENT)
    assert read_json(path, "", FORM) == CONTENT
    for text in (json.dumps(CONTENT), json.dumps(CONTENT, indent="\t").replace("\n", "\r\n"), f"\ufeff{json.dumps(CONTENT)}",
                 json.dumps(dict(reversed(CONTENT.items())))):
        path.write_text(text, encoding="utf-8", newline="")
        assert read_json(path, "", FORM) == CONTENT


def test_json_that_cannot_be_meant_is_one_line_that_names_the_place(tmp_path):
    path = tmp_path / "config.json"
    whole = json.dumps(CONTENT).encode()
    for text in (b"", whole[:-1], b"\0", whole.replace(b"0.5", b"0.5.1"), b"\xff", b"[" * 100_000):
        path.write_bytes(text)
        assert "cannot be read" in refusal(path)
    (tmp_path / "folder").mkdir()
    assert "cannot be read (Is a directory)" in refusal(tmp_path / "folder")
    for wrong, place in (
            ([], "it is not an object"), ({**CONTENT, "a": "1"}, "a is not a whole number"),
            ({"a": 1, "b": []}, "c is not an object"), ({**CONTENT, "b": {}}, "b is not a list"),
            ({**CONTENT, "b": [1, None]}, "b[1] is not a number"), ({**CONTENT, "c": {"d": "é"}}, "c.e is not a list"),
            ({**CONTENT, "c": {"d": "é", "e": ["x", 1]}}, "c.e[1] is not a text")):
        path.write_text(json.dumps(wrong))
        assert place in refusal(path)


def test_only_errors_of_the_disk_are_told_as_such(tmp_path):
    """Whatever else goes wrong while something is written is a fault of the code; nothing half-written stays."""
    path = tmp_path / "model"
    path.write_text("old")

    def write(error):
        with writing(path) as part:
            part.write_text("half")
            raise error(part)

    for error in (lambda part: OSError(errno.ENOSPC, "No space left on device"),
                  lambda part: OSError(errno.EACCES, "Permission denied", str(part)),
                  lambda part: OSError(errno.EACCES, "Permission denied", os.fsencode(part / "inner")),
                  lambda part: SafetensorError("I/O error: No space left on device (os error 28)")):
        with pytest.raises(UserError, match=f"{re.escape(str(path))} cannot be written .*(No space|Permission denied)"):
            write(error)
    for error in (lambda part: OSError("libcudart.so.12: cannot open shared object file"),
                  lambda part: FileNotFoundError(errno.ENOENT, "No such file or directory", "/elsewhere"),
                  lambda part: SafetensorError("Error while deserializing header")):
        with pytest.raises((OSError, SafetensorError)):
            write(error)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["model"]


def test_what_cannot_be_deleted_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        for path in (tmp_path / "folder", tmp_path / "folder" / "file"):
            with pytest.raises(UserError, match=f"{re.escape(str(path))} cannot be deleted .Permission denied"):
                remove(path)
