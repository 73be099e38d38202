"""Scripts killed at random moments, run again, and compared with runs that nobody killed: `python -m tests.kill_resume`."""

import argparse
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from pipeline import Workspace, hashes, save_tiny_backbone  # noqa: E402

MEASURED = ["seconds", "images_per_second", "peak_memory_mib"]  # columns of the summary that tell time or memory
MADE = {  # what a script makes
    "Data_Preparation": ["fire_dataset", "game_dataset", "tasks.json"], "Generate_Base_Model": ["Results/Base_Models"],
    "Finetune": ["Results/Finetune"], "Lora_Finetune": ["Results/Lora_Finetune"], "CGM_Lora": ["Results/CGM_Lora"],
}
DATA = MADE["Data_Preparation"]
NEEDED = {"Data_Preparation": [], "Generate_Base_Model": DATA, "Finetune": DATA,
          "Lora_Finetune": [*DATA, "Results/Base_Models"], "CGM_Lora": [*DATA, "Results/Lora_Finetune"]}
LONGER = ["--epochs", "6", "--batch_size", "4"]  # so that most of the time is training


@dataclass
class Trial:
    """A script that was killed after `killed` of the `whole` seconds that it takes, and run again."""

    script: str
    killed: float
    whole: float
    at: str
    differences: list[str]


class Killer:
    """Runs scripts in `folder` by a WarmProcess, whole for reference and killed on the way."""

    def __init__(self, folder: Path, process: Any):
        self.folder, self.process = folder, process
        self.reference = Workspace(folder / "reference", save_tiny_backbone(folder / "backbone", seed=0))
        self.seconds: dict[str, float] = {}

    def run(self, place: Workspace, script: str, *more: str, kill_after: float | None = None) -> tuple[int, str]:
        """Run a script in a place. Returns its status and the last line it printed."""
        flags = place.flags(script, *(LONGER if script != "Data_Preparation" else []), *more)
        outcome = self.process.run(f"{script}.py", *flags, kill_after=kill_after)
        if outcome.status not in (0, -9):
            raise RuntimeError(f"{script} ended with status {outcome.status}: {outcome.errors}")
        return outcome.status, (outcome.output.splitlines() or [""])[-1]

    def run_reference(self) -> None:
        """Run every script once to its end."""
        self.process.run("Data_Preparation.py", "--help")  # what comes first waits for the process
        for script in MADE:
            started = time.perf_counter()
            self.run(self.reference, script)
            self.seconds[script] = time.perf_counter() - started

    def kill_and_resume(self, script: str, share: float, *more: str) -> Trial:
        """Kill a script after this share of its usual time, run it again, and tell what differs from the reference."""
        root = self.folder / f"killed_{script}_{share:.4f}"
        while True:
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            place = Workspace(root, self.reference.model)
            if NEEDED[script]:
                self.reference.copy(root, *NEEDED[script])
            after = share * self.seconds[script]
            status, at = self.run(place, script, *more, kill_after=after)
            if status:
                break
            share *= 0.8  # it was faster than usual: too late
        self.run(place, script, *more)
        return Trial(script, after, self.seconds[script], at, differences(place, self.reference, script))


def differences(place: Workspace, reference: Workspace, script: str) -> list[str]:
    """Files of a place in which only this script has run that are missing, left over or not, byte for byte, the reference's.

    Of the summary, what tells time and memory may differ, and so may the report, which shows it.
    """
    parts = MADE[script] + NEEDED[script]
    expected = {name: digest for name, digest in hashes(reference.root).items()
                if name in parts or name.startswith(tuple(f"{part}/" for part in parts))}
    found = hashes(place.root)
    found.pop("Results/index.html", None)
    if script == "Data_Preparation":  # the resized images come with the first use
        expected = {name: digest for name, digest in expected.items() if "/pixels_" not in name}
    elif found.pop("Results/summary.csv", None):
        rows = [summary[summary["method"] == Path(MADE[script][0]).name].drop(columns=MEASURED).to_csv(index=False)
                for summary in (place.summary(), reference.summary())]
        found["Results/summary.csv"], expected["Results/summary.csv"] = rows
    return [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]


def main() -> None:
    """Kill and resume, in turn, every script that takes time, and print what came of it."""
    from warm_process import WarmProcess  # only here: pytest imports it in its own way

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: 0)")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as top:
        process = WarmProcess(Path(top), port=9)  # where nothing listens: these runs need no Hub
        killer = Killer(Path(top), process)
        killer.run_reference()
        print(f"{'script':<20} {'killed after':>16}  {'last line it had printed':<75} after the second run")
        right = 0
        for number in range(options.kills):
            often = ["--checkpoint_every_steps", "1"] if number // len(MADE) % 2 and number % len(MADE) else []
            trial = killer.kill_and_resume(list(MADE)[number % len(MADE)], moments.uniform(0.02, 0.98), *often)
            right += not trial.differences
            print(f"{trial.script:<20} {trial.killed:6.2f} of {trial.whole:5.2f} s  {trial.at[:75]:<75} "
                  f"{', '.join(trial.differences) or 'bit-equal, nothing left over'}", flush=True)
        process.close()
    print(f"{right} of {options.kills} bit-equal")
    sys.exit(right != options.kills)


if __name__ == "__main__":
    main()
