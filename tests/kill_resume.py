"""What a killed script must have left when it has been run again; random moments: `python -m pytest tests/kill_resume.py`."""

import random
import time
from pathlib import Path

from pipeline import Workspace, hashes

pytest_plugins = ["warm_process"]

MEASURED = ["seconds", "images_per_second", "peak_memory_mib"]  # columns of the summary that tell time or memory
MADE = {  # what a script makes
    "Data_Preparation": ["fire_dataset", "game_dataset", "tasks.json"], "Generate_Base_Model": ["Results/Base_Models"],
    "Benchmark": ["Results/Benchmark"], "Finetune": ["Results/Finetune"],
    "Lora_Finetune": ["Results/Lora_Finetune"], "CGM_Lora": ["Results/CGM_Lora"],
}
DATA = MADE["Data_Preparation"]
NEEDED = {"Data_Preparation": [], "Generate_Base_Model": DATA, "Benchmark": DATA, "Finetune": DATA,
          "Lora_Finetune": [*DATA, "Results/Base_Models"], "CGM_Lora": [*DATA, "Results/Lora_Finetune"]}


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


def test_scripts_that_are_killed_at_random_moments_end_as_if_they_had_not_been(warm_process, workspace, tmp_path):
    """Each four times; after every run of a killed script it is run again."""
    moments = random.Random()
    for number in range(4):
        for script, needed in NEEDED.items():
            share, often = moments.uniform(0.02, 0.98), ["--checkpoint_every_steps", "1"] if number % 2 else []
            place, whole = (Workspace(tmp_path / f"{script}_{number}_{kind}", workspace.model) for kind in ("killed", "whole"))
            flags = often if script not in ("Data_Preparation", "Benchmark") else []
            for copied in (place, whole) if needed else ():
                workspace.copy(copied.root, *needed)
            started = time.perf_counter()
            warm_process.run(f"{script}.py", *whole.flags(script, *flags))
            after = share * (time.perf_counter() - started)
            warm_process.run(f"{script}.py", *place.flags(script, *flags), kill_after=after)
            ended = warm_process.run(f"{script}.py", *place.flags(script, *flags))
            assert (ended.status, ended.errors) == (0, ""), (script, after)
            assert differences(place, whole, script) == [], (script, after)
