"""What a killed script must have left when it has been run again."""

from pathlib import Path

from pipeline import Workspace, hashes

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

    Of the summary, what tells time and memory may differ, and so may the report, which shows it; what pictures show counts
    where the place has any.
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
    if not place.pictures:
        found |= {name: expected[name] for name in found.keys() & expected.keys() if name.endswith(".png")}
    return [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
