"""Run the six scripts in order: `python -m common.run_all [--demo]`."""

import dataclasses
import importlib
import io
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

from common.cli.flags import SCRIPTS, RunAllConfig
from common.cli.processes import launched
from common.cli.run import run, stop_signals
from common.errors import UserError
from common.tasks import read_tasks

# Measured on two cores with nothing else at work (README, "The demo").
DEMO_SECONDS, DEMO_QUICK_SECONDS = 110, 25

FOLDERS = {"Generate_Base_Model": "Base_Models"}  # script -> folder of its results, where that has another name

# A fork has the libraries imported already, which takes seconds in a process of its own. It is safe only on Linux.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")

# Scripts of which none needs another's results: with a thread each, two small models are trained 1.35 times as fast on two
# cores as one after the other with two threads, which mostly wait for each other.
SIDE_BY_SIDE = ["Finetune", "Lora_Finetune"]


def main(config: RunAllConfig) -> None:
    """Run every script with the flags given here. Raises UserError, after the script's own line, if one fails."""
    if launched()[1] > 1:
        raise UserError("run_all is one process; run the scripts one by one under accelerate launch")
    print(f"{expected_time(config)}; if it is stopped, the same command goes on", flush=True)
    import_libraries()
    folder = Path(__file__).resolve().parents[1]
    started = time.perf_counter()
    every = steps(config)
    for number, scripts in enumerate(every, start=1):
        name = f"[{number}/{len(every)}] {' and '.join(scripts)}: "
        print(name, end="" if config.quiet else "\n", flush=True)
        step_started = time.perf_counter()
        if config.overwrite and config.expert and "Lora_Finetune" in scripts:
            # By itself --overwrite leaves the experts of tasks that --expert does not name; here all is made anew.
            (Path(config.root) / "Results" / "Lora_Finetune" / "config.json").unlink(missing_ok=True)
        with stdout_closed() if config.quiet else nullcontext():
            statuses = run_scripts({str(folder / f"{script}.py"): flags_for(config, SCRIPTS[script]) for script in scripts})
        for script, status in zip(scripts, statuses, strict=True):
            if status:
                again = "the same command without --overwrite" if config.overwrite else "the same command"
                raise UserError(f"{script}.py ended with status {status}; run {again} to go on once that is fixed")
        bar_was_drawn = sys.stderr.isatty() or not config.quiet
        print(f"{name if bar_was_drawn else ''}{time.perf_counter() - step_started:.0f} s, {headline(config, scripts)}", flush=True)
    from common.results.report import PAGE
    from common.results.summary import print_summary

    print()
    print_summary(config.root)
    print(f"\n{time.perf_counter() - started:.0f} s in all; all results on one page: {Path(config.root) / 'Results' / PAGE}")


def expected_time(config: RunAllConfig) -> str:
    """About how long a run takes, in words."""
    if config.demo:
        seconds = DEMO_QUICK_SECONDS if config.quick else DEMO_SECONDS
        return f"The demo takes about {seconds} seconds on two free cores"
    if config.quick:
        return "This takes about as long as passing all images through the backbone three times"
    return "This trains three models for each task: minutes for small backbones or on a GPU, hours for large ones on a CPU"


def headline(config: RunAllConfig, scripts: list[str]) -> str:
    """What a step has made, in a few words: images, or test accuracies."""
    from common.data.store import read_manifest
    from common.results.summary import SUMMARY_FILE, read_summary

    tasks = read_tasks(config.root)
    if scripts == ["Data_Preparation"]:
        counts = {task.name: sum(read_manifest(task, config)["images"].values()) for task in tasks}
        return ", ".join(f"{name}: {count} images" for name, count in counts.items())
    table = read_summary(Path(config.root) / "Results" / SUMMARY_FILE)
    found = []
    for script in scripts:
        accuracies = table[table["method"] == FOLDERS.get(script, script)].set_index("task")["accuracy"]
        shares = ", ".join(f"{task.name} {accuracies[task.title]:.1%}" for task in tasks if task.title in accuracies)
        found.append(f"{f'{script}: ' if len(scripts) > 1 else ''}{shares}")
    return "; ".join(found)


@contextmanager
def stdout_closed() -> Iterator[None]:
    """Let what this process and its children print to stdout go nowhere."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def import_libraries() -> None:
    """Import what the scripts import, for the processes forked from this one."""
    for room in ("data.prepare", "results.folder", "comparison.compare"):
        importlib.import_module(f"common.{room}")


def steps(config: RunAllConfig) -> list[list[str]]:
    """The scripts in order; those that run at the same time are one step."""
    if config.quick:
        return [["Data_Preparation"], ["CGM_Lora"]]
    together = SIDE_BY_SIDE if config.side_by_side and torch_threads() > 1 else []
    return [together if script in together else [script] for script in SCRIPTS if script not in together[1:]]


def run_scripts(commands: dict[str, list[str]]) -> list[int]:
    """Run scripts, {path: flags}, at the same time and as from a terminal; return their exit statuses.

    Several have an equal share of PyTorch's threads each, and say a line an epoch, as bars would be drawn over each other.
    Raises KeyboardInterrupt after Ctrl-C or SIGTERM, once the scripts have saved and ended: a terminal sends Ctrl-C to all
    processes, SIGTERM is passed on.
    """
    share = torch_threads() // len(commands) if len(commands) > 1 else None
    scripts = [CONTEXT.Process(target=_run_as_main, args=(path, flags, share)) for path, flags in commands.items()]
    stopped, signals = [], stop_signals()

    def stop(number: int, _: FrameType | None) -> None:
        stopped.append(number)
        for script in scripts if number == signal.SIGTERM else ():
            script.terminate()

    before = {number: signal.signal(number, stop) for number in signals}
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until there are processes that are ready for them
        for script in scripts:
            script.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        for script in scripts:
            while script.is_alive():
                script.join(0.2)  # waiting without a limit misses a signal that another thread is given
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped or any(script.exitcode == 130 for script in scripts):
        raise KeyboardInterrupt
    return [script.exitcode for script in scripts]


def torch_threads() -> int:
    """The number of threads that PyTorch computes with on the CPU."""
    import torch

    return torch.get_num_threads()


class _NoTerminal(io.TextIOWrapper):
    """A stream that passes for a file."""

    def isatty(self) -> bool:
        return False


def _run_as_main(path: str, flags: list[str], threads: int | None) -> None:
    """What a script's process does. threads: of PyTorch, for one script of several; None for all."""
    sys.argv = [path, *flags]
    try:
        for number in stop_signals():
            signal.signal(number, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
            sys.stderr = _NoTerminal(sys.stderr.buffer, sys.stderr.encoding, sys.stderr.errors, line_buffering=True)
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
