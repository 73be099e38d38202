"""Run the six scripts in order: `python -m common.run_all [--demo]`."""

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

from common.cli.flags import SCRIPTS, RunAllConfig
from common.cli.run import run
from common.errors import UserError
from common.results.summary import print_summary
from common.training import distributed


def main(config: RunAllConfig) -> None:
    """Run every script with the flags given here. Raises UserError, after the script's own line, if one fails."""
    if distributed.launched()[1] > 1:
        raise UserError("run_all is one process; run the scripts one by one under accelerate launch")
    folder = Path(__file__).resolve().parents[1]
    seconds = {}
    for script, config_class in SCRIPTS.items():
        print(f"\n== {script} ==", flush=True)
        started = time.perf_counter()
        status = wait_for([sys.executable, folder / f"{script}.py", *_flags(config, config_class)])
        seconds[script] = time.perf_counter() - started
        if status:
            again = "the same command without --overwrite" if config.overwrite else "the same command"
            raise UserError(f"{script}.py ended with status {status}; run {again} to go on once that is fixed")
    print("\n== Summary ==")
    print_summary(config.root)
    spent = [f"{script} {time_taken:.0f} s" for script, time_taken in seconds.items()]
    print("\n" + ", ".join(spent), f"in all {sum(seconds.values()):.0f} s")


def wait_for(command: list[str | Path]) -> int:
    """Run a command and return its status. Ctrl-C, which it gets as well, and SIGTERM leave it the time to save."""
    with subprocess.Popen(command) as script:
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: script.terminate())
        while (status := script.poll()) is None:  # to wait in one go could miss a signal that another thread is given
            time.sleep(0.1)
        return status


def _flags(config: RunAllConfig, config_class: type) -> list[str]:
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
