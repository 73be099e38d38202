"""The whole demo, script by script, and where its time goes."""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from common.cli.flags import SCRIPTS
from common.errors import UserError
from tests.bench.measure import Settings
from tests.bench.phases import PHASES

PROJECT = Path(__file__).parents[2]


def run_demo(settings: Settings) -> pd.DataFrame:
    """The scripts of the demo one after the other: seconds in all and by phase; with `--quick` only the first. One round."""
    scripts = list(SCRIPTS.items())[:1 if settings.quick else None]
    with tempfile.TemporaryDirectory() as root:
        return pd.DataFrame([_run(script, config, Path(root), settings) for script, config in scripts])


def _run(script: str, config: type, root: Path, settings: Settings) -> dict[str, object]:
    """Run one script as a process; what the profile did not see is the interpreter's own start and end."""
    profile, flags = root / f"{script}.json", ["--demo", "--root", str(root)]
    if "device" in {field.name for field in dataclasses.fields(config)}:
        flags += ["--device", str(settings.device)]
    if settings.quick:
        flags += ["--images_per_class", "10"]
    command = [sys.executable, "-m", "tests.bench.phases", profile, PROJECT / f"{script}.py", *flags]
    seconds = seconds_of(command, f"{script}.py")
    spent = {phase: 0.0 for phase in PHASES} | json.loads(profile.read_text(encoding="utf-8"))
    spent["other"] += max(0.0, seconds - sum(spent.values()))
    return {"script": script, "seconds": seconds, **spent}


def seconds_of(command: list[object], name: str) -> float:
    """Seconds that a process takes, from its start to its end. Raises UserError, with `name`, if it fails."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{name} ended with status {done.returncode}: {done.stderr.strip()}")
    return time.perf_counter() - started


def picture(table: pd.DataFrame, machine: str) -> Figure:
    """Seconds of every script, by phase."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    left = pd.Series(0.0, index=table.index)
    for phase in PHASES:
        axes.barh(table.index, table[phase], left=left, label=phase)
        left += table[phase]
    for index, seconds in enumerate(table["seconds"]):
        axes.annotate(f"{seconds:.0f} s", (seconds, index), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(table.index, table["script"])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * table["seconds"].max())
    axes.set_xlabel("seconds")
    axes.set_title(f"the demo, script by script: {table['seconds'].sum():.0f} s in all\n{machine}", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    return figure
