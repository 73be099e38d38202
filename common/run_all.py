"""Run the six scripts in order: `python -m common.run_all [--demo]`."""

import dataclasses
import importlib
import multiprocessing
import runpy
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from common.cli.flags import SCRIPTS, RunAllConfig
from common.cli.processes import launched
from common.cli.run import run, stop_signals
from common.errors import UserError

# A fork has the libraries imported already, which takes seconds in a process of its own. It is safe only on Linux.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def main(config: RunAllConfig) -> None:
    """Run every script with the flags given here. Raises UserError, after the script's own line, if one fails."""
    if launched()[1] > 1:
        raise UserError("run_all is one process; run the scripts one by one under accelerate launch")
    import_libraries()
    folder = Path(__file__).resolve().parents[1]
    seconds = {}
    for script, config_class in SCRIPTS.items():
        print(f"\n== {script} ==", flush=True)
        started = time.perf_counter()
        status = run_script(str(folder / f"{script}.py"), flags_for(config, config_class))
        seconds[script] = time.perf_counter() - started
        if status:
            again = "the same command without --overwrite" if config.overwrite else "the same command"
            raise UserError(f"{script}.py ended with status {status}; run {again} to go on once that is fixed")
    from common.results.summary import print_summary

    print("\n== Summary ==")
    print_summary(config.root)
    spent = [f"{script} {time_taken:.0f} s" for script, time_taken in seconds.items()]
    print("\n" + ", ".join(spent), f"in all {sum(seconds.values()):.0f} s")


def import_libraries() -> None:
    """Import what the scripts import, for the processes forked from this one."""
    for room in ("data.prepare", "results.folder", "comparison.compare"):
        importlib.import_module(f"common.{room}")


def run_script(path: str, flags: list[str]) -> int:
    """Run a script as from a terminal and return its exit status.

    Raises KeyboardInterrupt after Ctrl-C or SIGTERM, once the script has saved and ended: a terminal sends Ctrl-C to both
    processes, SIGTERM is passed on.
    """
    stopped = []

    def stop(number: int, _: FrameType | None) -> None:
        stopped.append(number)
        if number == signal.SIGTERM:
            script.terminate()

    script, signals = CONTEXT.Process(target=_run_as_main, args=(path, flags)), stop_signals()
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until there are two processes that are ready for them
        script.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        while script.is_alive():
            script.join(0.2)  # waiting without a limit misses a signal that another thread is given
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped or script.exitcode == 130:
        raise KeyboardInterrupt
    return script.exitcode


def _run_as_main(path: str, flags: list[str]) -> None:
    """What a script's process does."""
    sys.argv = [path, *flags]
    try:
        for number in stop_signals():
            signal.signal(number, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
        runpy.run_path(path, run_name="__main__")
    except KeyboardInterrupt:  # before the script could tell it
        sys.exit(130)


def flags_for(config: RunAllConfig, config_class: type) -> list[str]:
    """The flags of this run that a script has too, with their values; those that are not given are left out."""
    flags = []
    for field in dataclasses.fields(config_class):
        value = getattr(config, field.name, None)
        if value in (None, False, []):
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        flags += [f"--{field.name}", *map(str, values)]
    return flags


if __name__ == "__main__":
    run(main, RunAllConfig)
