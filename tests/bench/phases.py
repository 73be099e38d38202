"""A sampling profile of one script by phase, in a process of its own: `python -m tests.bench.phases OUTPUT SCRIPT FLAG ...`.

The script stays as it is, and nothing is imported here that it does not import itself.
"""

import collections
import json
import runpy
import sys
import threading
import time
from pathlib import Path
from types import FrameType

# A moment of a script belongs to the innermost of its calls that is named here: a part of the file's path, function (None is
# any), phase.
CALLS = [
    ("training/evaluate.py", "evaluate", "evaluation"), ("training/evaluate.py", "features", "evaluation"),
    ("training/loop.py", "fit", "training"), ("results/plotting.py", None, "plots"), ("common/data/", None, "data"),
    ("training/checkpoint.py", None, "files"), ("common/files.py", None, "files"), ("results/folder.py", None, "files"),
    ("common/models/stored.py", "save", "files"), ("common/models/", None, "models"),
    ("<frozen importlib._bootstrap>", None, "import"),
]
PHASES = ["import", "data", "models", "training", "evaluation", "plots", "files", "other"]
EVERY = 0.02  # seconds between two looks


def phase_of(frame: FrameType | None) -> str:
    """The phase of a thread that stands at this frame."""
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        for ending, name, phase in CALLS:
            if ending in file and name in (None, function):
                return phase
        frame = frame.f_back
    return "other"


def profile(script: str, arguments: list[str], output: Path) -> None:
    """Run a script as from a terminal; write the seconds of every phase to `output` as JSON."""
    spent: collections.Counter[str] = collections.Counter()
    main, done = threading.main_thread().ident, threading.Event()

    def look() -> None:
        last = time.perf_counter()
        while not done.wait(EVERY):
            now = time.perf_counter()
            spent[phase_of(sys._current_frames().get(main))] += now - last
            last = now

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        done.set()
        watcher.join()
        output.write_text(json.dumps(spent), encoding="utf-8")


if __name__ == "__main__":
    profile(sys.argv[2], sys.argv[3:], Path(sys.argv[1]))
