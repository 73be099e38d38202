"""Fixtures: scripts in processes of their own that use the local hub, forked from one that has the libraries imported."""

import builtins
import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from hub import serve
from matplotlib.figure import Figure
from pipeline import write_nothing

from common.cli.run import LIBRARIES

PROJECT = Path(__file__).parents[1]


class Outcome(NamedTuple):
    """How a process ended: exit status, stdout, stderr."""

    status: int
    output: str
    errors: str


class WarmProcess:
    """Runs scripts with HF_ENDPOINT at `port` of this machine and HF_HOME in `folder`.

    The Hub's libraries read both when they are imported, and importing takes seconds, so it is done once and each
    script runs in a fork. This machine's own proxy, token and cache are left out. All pictures are empty: drawing takes long.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port, self.cache = folder, port, folder / "huggingface"
        inherited = {key: value for key, value in os.environ.items()
                     if not key.startswith(("HF_", "HUGGING")) and not key.lower().endswith("_proxy")}
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(self.cache), "PYTHONPATH": str(PROJECT),
               "LC_ALL": "C", "PYTHONHASHSEED": "1", **LIBRARIES}
        self.process = subprocess.Popen(
            [sys.executable, __file__], env={**inherited, **own}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, script, *arguments, kill_at=None, processes=1, constants=None) -> Outcome:
        """Run a script of the project, or any other by its full path, in one process or in several that work together.

        It is ended by SIGKILL when it is about to call, for the given time, the function of the given name, such as
        ("os.replace", 3); of several processes, the last one is. With the name of an exception and what it holds behind
        that, as in ("os.replace", 3, "OSError", 28, "no space left"), the call raises it instead.
        constants: values of module constants by their full names, in place of the usual ones.
        """
        streams = [self.folder / "output", self.folder / "errors"]
        for path in streams:
            path.write_bytes(b"")
        argv = [str(PROJECT / script), *map(str, arguments)]
        order = argv, [str(path) for path in streams], constants or {}, kill_at, processes
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return Outcome(int(self.process.stdout.readline()), *(path.read_text(encoding="utf-8") for path in streams))


def free_port() -> int:
    """A port at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def warm_process(tmp_path_factory):
    """The process; without the fixture `hub` beside it, nothing listens where it looks for the Hub."""
    warm = WarmProcess(tmp_path_factory.mktemp("warm_process"), free_port())
    with warm.process:  # closes its pipes and waits
        yield warm
        warm.process.kill()


@pytest.fixture
def hub(warm_process):
    """A hub without repositories, where the warm process looks for it; nothing of it is cached yet."""
    shutil.rmtree(warm_process.cache, ignore_errors=True)
    with serve({}, warm_process.port) as running:
        yield running


def _run_orders() -> None:
    """Fork for every line of stdin: run what it says and print the exit status."""
    importlib.import_module("common.comparison.compare")
    importlib.import_module("common.results.folder")
    Figure.savefig = write_nothing
    for line in sys.stdin:
        *what, kill_at, number = json.loads(line)
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        children = []
        for rank in range(number):
            environment = {**together, "RANK": rank, "LOCAL_RANK": rank} if number > 1 else {}
            started = *what, kill_at if rank == number - 1 else None, environment
            children.append(multiprocessing.get_context("fork").Process(target=_run_script, args=started))
            children[-1].start()
        for child in children:
            child.join()
        print(max((child.exitcode for child in children), key=abs), flush=True)


def _run_script(argv, streams, constants, kill_at, environment) -> None:
    """Run a script with its stdout and stderr in files."""
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    time.sleep = lambda seconds: None  # the Hub's client waits longer and longer before it tries again
    os.environ.update({name: str(value) for name, value in environment.items()})
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        setattr(pkgutil.resolve_name(module), constant, value)
    if kill_at is not None:
        _kill_at(*kill_at)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def _kill_at(name, call, error="", *held) -> None:
    """Let this process kill itself, or raise an error, when it is about to call the function for the `call`-th time."""
    owner, _, attribute = name.rpartition(".")
    place = pkgutil.resolve_name(owner)
    function, calls = getattr(place, attribute), itertools.count(1)

    def counted(*arguments, **named):
        if next(calls) == call:
            if error:
                raise getattr(builtins, error)(*held)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    setattr(place, attribute, counted)


if __name__ == "__main__":
    _run_orders()
