"""Running a script: settings of its libraries, signals, and what is said when it cannot go on."""

import atexit
import ctypes
import gc
import io
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from common.cli import processes
from common.cli.parser import Config, parse
from common.errors import UserError

# What libraries are told before they are imported. What they would log or draw a bar for is told by the scripts; whoever
# wants to see it all the same sets these variables.
LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "critical", "HF_HUB_VERBOSITY": "critical",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    # A thread that waits for another soon sleeps. Where other work is running, spinning threads keep those from their core for
    # which they wait: with two threads on two cores, beside five other processes, 30 training steps of the demo's backbone
    # took 12 s with this and were not done in 100 s without it. On a quiet machine the default is 1.1 times as fast as this.
    "GOMP_SPINCOUNT": "1000",
}

# Python looks for garbage after so many new objects. Importing makes a million that stay: at the default of 700, importing
# torch, transformers, peft and datasets takes 5.0 s of CPU time instead of 4.0.
MOST_NEW_OBJECTS = 50_000

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of glibc's malloc, see mallopt(3)


def set_up_libraries() -> None:
    """Set the libraries' log levels, progress bars, threads, memory and warnings. Call it before they are imported."""
    gc.set_threshold(MOST_NEW_OBJECTS)
    atexit.register(gc.freeze)  # at its end Python looks at all that is left several times: most of a second
    keep_freed_memory()
    for name, value in LIBRARIES.items():
        os.environ.setdefault(name, value)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it would tell of every font it has no weight of
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft asks transformers by an old name
    warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")  # refused by us, in one line


def keep_freed_memory(most: int = 2**31 - 1) -> None:
    """Let malloc keep pieces of memory of up to `most` bytes that are freed; other C libraries than glibc do as they like.

    Else large tensors are given back to the kernel, which clears every page of the next ones: a training step of two blocks of
    BEiT-base's size then takes 3.7 s of CPU time instead of 3.4 (`python -m tests.bench parts_base`).
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD) if set_option else ():
        set_option(option, most)


def stop_signals() -> list[int]:
    """Ctrl-C and SIGTERM, but what whoever started this process wants to be ignored, as nohup and a shell's `&` do."""
    return [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]


def run(main: Callable[[Config], None], config_class: type[Config]) -> NoReturn:
    """Run a script's `main` with its command line, and exit.

    Status 0 is success, 2 a UserError (one line on stderr), 130 Ctrl-C or SIGTERM (one line), 1 a fault of the code (its
    traceback and one line). Of several processes rank 0 speaks, on other machines the first one there about a UserError;
    any other tells only a fault of its own.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or a log that cannot show a name is no reason to end
            stream.reconfigure(errors="backslashreplace")
    rank, world_size = processes.launched()
    stderr = processes.silence() if rank else sys.stderr
    set_up_libraries()
    for number in stop_signals():
        signal.signal(number, signal.default_int_handler)
    who = f"rank {rank}: " if rank else ""
    again, says, line, status = "the same command", rank == 0, "", 0
    try:
        config = parse(config_class, description=sys.modules["__main__"].__doc__)
        again += " without --overwrite" if config.overwrite else ""
        processes.join(getattr(config, "device", "cpu"))
        main(config)
        processes.leave()
    except UserError as error:
        line, status = str(error), 2
        says = error.own or int(os.environ.get("LOCAL_RANK", rank)) == 0
    except KeyboardInterrupt as interrupt:
        line, status = f"interrupted; {str(interrupt) or 'finished results are whole'}; run {again} to go on", 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno and error.filename is None and (line := _stdout_error("\n")):
            status = 2
        elif processes.is_lost_connection(error):
            line, status = f"another process has ended; run {again} to go on", 2
        else:
            print(who + traceback.format_exc(), end="", file=stderr)
            line, status = f"unexpected {type(error).__name__}, a fault of the program; the lines above tell where", 1
            says = True
    if unwritten := _stdout_error():
        line, status = line or unwritten, status or 2
    if line and says:
        print(f"{who}{Path(sys.argv[0]).name}: {' '.join(line.split())}", file=stderr, flush=True)
    if world_size > 1:
        os._exit(status)  # the clean-up of a process group waits for processes that may have ended
    sys.exit(status)


def _stdout_error(more: str = "") -> str:
    """Write what stdout still holds, and `more`; what to say if that fails, as when its reader or the disk's space is gone.

    After an error in the middle of a run nothing may be left to write, so only `more` shows whether stdout was the cause.
    """
    try:
        if sys.stdout is not None:  # as it is where nobody has opened one
            sys.stdout.write(more)
            sys.stdout.flush()
        return ""
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tries again at its end
        return f"stdout cannot be written ({error.strerror}); send it elsewhere and run the same command again"
