"""Running a script as its command line does, and what it says when it refuses; a disk that is full."""

import importlib
import resource
import sys
from contextlib import contextmanager

import pytest

from common.cli.flags import SCRIPTS, RunAllConfig
from common.cli.run import run

AFTER_DATA = list(SCRIPTS)[1:]
RESULTS_OF = {script: "Base_Models" if script == "Generate_Base_Model" else script for script in SCRIPTS}


def complaint(monkeypatch, capsys, script, flags, main=None):
    """Run a script by its command line, as `python SCRIPT.py` does; return the one line it ends with."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    with pytest.raises(SystemExit) as end:
        run(main or importlib.import_module(script).main, SCRIPTS.get(script, RunAllConfig))
    return one_line(script, end.value.code, capsys.readouterr().err)


def one_line(script, status, said):
    """What a script said on stderr, if it is as it should be."""
    assert status == 2 and said.count("\n") == 1 and said.startswith(f"{script}.py: ")
    return said


@contextmanager
def files_of_at_most(size):
    """A disk that is full after `size` bytes of any one file; None for one that is not."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size or limits[0], limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
