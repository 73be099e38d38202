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


def test_json_may_be_edited_where_it_does_no_harm_and_else_is_one_line_that_names_the_place(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, CONTENT)
    assert read_json(path, "", FORM) == CONTENT
    for text in (json.dumps(CONTENT, indent="\t").replace("\n", "\r\n"), f"\ufeff{json.dumps(CONTENT)}",
                 json.dumps(dict(reversed(CONTENT.items())))):
        path.write_text(text, encoding="utf-8", newline="")
        assert read_json(path, "", FORM) == CONTENT
    whole = json.dumps(CONTENT).encode()
    broken = [b"", whole[:-1], b"\0", whole.replace(b"0.5", b"0.5.1"), b"\xff", b"[" * 100_000]
    wrong = (([], "it is not an object"), ({**CONTENT, "a": "1"}, "a is not a whole number"),
             ({"a": 1, "b": []}, "c is not an object"), ({**CONTENT, "b": {}}, "b is not a list"),
             ({**CONTENT, "b": [1, None]}, "b[1] is not a number"), ({**CONTENT, "c": {"d": "é"}}, "c.e is not a list"),
             ({**CONTENT, "c": {"d": "é", "e": ["x", 1]}}, "c.e[1] is not a text"))
    for content, place in [*((content, "cannot be read") for content in broken),
                           *((json.dumps(content).encode(), place) for content, place in wrong)]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{re.escape(str(path))} [^\n]*{re.escape(place)}[^\n]*; do this$"):
            read_json(path, "do this", FORM)


def test_only_errors_of_the_disk_are_told_as_such(tmp_path, monkeypatch):
    """Whatever else goes wrong while something is written is a fault of the code; nothing half-written stays."""
    path = tmp_path / "model"
    path.write_text("old")

    def write(error):
        with writing(path) as part:
            part.write_text("half")
            raise error(part)

    for error in (lambda part: OSError(errno.ENOSPC, "No space left on device"),
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

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        for where in (tmp_path, path):
            with pytest.raises(UserError, match=f"{re.escape(str(where))} cannot be deleted .Permission denied"):
                remove(where)
