"""Tests of what is damaged, missing or of something else: one line that names it and the way out, and nothing is harmed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import pytest
from pipeline import Workspace, hashes
from refusals import RESULTS_OF, complaint, files_of_at_most

from common.training.checkpoint import Checkpoint

BASE, EXPERT = "Results/Base_Models/fire_base", "Results/Lora_Finetune/Models/game_lora_finetune"
CHECKPOINT = "Results/Finetune/Checkpoints/fire_finetune.safetensors"


@dataclass(frozen=True)
class Bad:
    """A script, what the one line must say, its flags, and what is done to a copy of the finished workspace.

    anew: the script's own results are not there yet; leaves: the line, and whole earlier results, come in the middle of the
    work, which may leave what it had already done; size: of any file, in bytes, that the disk takes.
    """

    script: str
    says: tuple[str, ...]
    flags: tuple[str, ...] = ()
    spoil: tuple[Callable[[Workspace], None], ...] = ()
    anew: bool = True
    leaves: bool = False
    size: int | None = None


def cut(path):
    """Keep the first half of a file."""
    def spoil(place):
        found = next(place.root.glob(path))
        found.write_bytes(found.read_bytes()[: found.stat().st_size // 2])
    return spoil


def holds(path, content):
    """Put something else into a file."""
    def spoil(place):
        (place.root / path).parent.mkdir(parents=True, exist_ok=True)
        (place.root / path).write_text(content)
    return spoil


def gone(path):
    """Delete folders or files."""
    def spoil(place):
        for found in place.root.glob(path):
            shutil.rmtree(found) if found.is_dir() else found.unlink()
    return spoil


def drop_rows(script):
    """Take a script's rows out of the summary."""
    def spoil(place):
        path = place.results / "summary.csv"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if not line.startswith(RESULTS_OF[script])))
    return spoil


def exchange_images(place):
    """Put other images in place of those that the results of a workspace were made from."""
    place.run("Data_Preparation", "--seed", "8", "--overwrite")
    place.tasks()  # so that the resized images are there too


def interrupt(place):
    """Cut a fine-tuning short after its first epoch."""
    save = Checkpoint.save

    def save_and_end(self, *state):
        save(self, *state)
        raise KeyboardInterrupt

    with mock.patch.object(Checkpoint, "save", save_and_end), pytest.raises(KeyboardInterrupt):
        place.run("Finetune")


def other_processor(place):
    """The backbone elsewhere, with an image processor that normalises otherwise."""
    shutil.copytree(place.model, place.root / "other_processor")
    path = place.root / "other_processor" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.4, 0.5, 0.6]}))


PREPARE, MAKE_BASE, MAKE_EXPERTS = (f"python {script}.py --demo --root {{root}}" for script in (
    "Data_Preparation", "Generate_Base_Model", "Lora_Finetune"))
STEPS = (("Lora_Finetune", "Generate_Base_Model"), ("CGM_Lora", "Lora_Finetune"))  # a script and the one it starts from
OTHER_PROCESSOR = {"flags": ("--model", "{root}/other_processor"), "spoil": (other_processor,), "leaves": True}
OTHER_BACKBONE = ("--model", "{other_backbone}")
BAD_INPUTS = {
    "data": [
        Bad("Benchmark", ("game_dataset", PREPARE), spoil=(gone("game_dataset"),), anew=False),
        *(Bad(script, ("manifest.json", "Data_Preparation.py", "--overwrite"), anew=False,
              spoil=(holds("fire_dataset/manifest.json", content),))
          for script, content in (("Data_Preparation", "{"), ("CGM_Lora", '{"classes": 4}'))),
        Bad("Data_Preparation", ("--fire_source {root}/a\\udcff", "rename"), ("--fire_source", "{root}/a\udcff")),
        Bad("Data_Preparation", ("--fire_source", "class", "a\\udcff", "rename"), ("--fire_source", "{root}/new"),
            (holds("new/a\udcff/0.png", ""),)),
        Bad("Benchmark", ("fire_dataset", "Data_Preparation.py", "--overwrite"),
            spoil=(gone("fire_dataset/pixels_*"), cut("fire_dataset/test/*.arrow"))),
        Bad("Finetune", ("data.fire = ", "--overwrite"), spoil=(exchange_images,), anew=False),
        Bad("Lora_Finetune", ("fire_base", "other images", MAKE_BASE, "--overwrite"), spoil=(exchange_images,)),
        Bad("CGM_Lora", ("fire_lora_finetune", "other images", MAKE_EXPERTS, "--overwrite"), spoil=(exchange_images,)),
    ],
    "models": [
        Bad("Lora_Finetune", ("fire_base", MAKE_BASE), spoil=(gone(BASE),)),
        *(Bad("Lora_Finetune", ("fire_base", MAKE_BASE, "--overwrite"), spoil=(cut(f"{BASE}/{name}"),))
          for name in ("model.safetensors", "provenance.json")),
        Bad("CGM_Lora", ("game_lora_finetune", MAKE_EXPERTS), spoil=(gone(EXPERT),)),
        Bad("CGM_Lora", ("game_lora_finetune", MAKE_EXPERTS, "--overwrite"), spoil=(cut(f"{EXPERT}/adapter_model.safetensors"),)),
        *(Bad(script, ("other backbone weights than {other_backbone}", f"{before}.py", "--overwrite", "--model {model}"),
              OTHER_BACKBONE) for script, before in STEPS),
        *(Bad(script, ("image processor", f"{before}.py", "--overwrite"), **OTHER_PROCESSOR) for script, before in STEPS),
        Bad("Finetune", ("model = {model}, not {other_backbone}", "--overwrite"), OTHER_BACKBONE, anew=False),
        Bad("Finetune", ("preprocessing = ", "--overwrite"), anew=False, **OTHER_PROCESSOR),
    ],
    "results": [
        Bad("Finetune", ("Finetune/config.json", "--overwrite"), spoil=(cut("Results/Finetune/config.json"),), anew=False),
        Bad("CGM_Lora", ("no rows of CGM_Lora", "--overwrite"), spoil=(drop_rows("CGM_Lora"),), anew=False),
        Bad("Benchmark", ("summary.csv has no column", "--overwrite"), spoil=(holds("Results/summary.csv", "a,b\n"),)),
        Bad("Benchmark", ("Benchmark_Data", "move it away"), leaves=True,
            spoil=(lambda place: (place.results / "Benchmark_Data").unlink(),
                   holds("Results/Benchmark_Data/notes.txt", "mine"))),
    ],
    "checkpoints": [
        Bad("Finetune", (CHECKPOINT, "delete it"), spoil=(interrupt, cut(CHECKPOINT))),
        Bad("Finetune", (CHECKPOINT, "batch_size = 8, not 4", "--overwrite"), ("--batch_size", "4"), (interrupt,)),
        Bad("Finetune", (CHECKPOINT, "data.fire = ", "--overwrite"), spoil=(interrupt, exchange_images)),
        Bad("Finetune", (CHECKPOINT, "not {other_backbone}", "--overwrite"), OTHER_BACKBONE, (interrupt,)),
    ],
    "disk": [
        Bad("Data_Preparation", ("{root}/file", "--root"), ("--root", "{root}/file"), (holds("file", ""),)),
        Bad("Benchmark", ("Results", "cannot be written", "--root"),
            spoil=(gone("Results"), lambda place: place.results.symlink_to("/proc/self/fdinfo"))),
        Bad("Finetune", (CHECKPOINT, "cannot be written", "make room"), leaves=True, size=50_000),
        Bad("Benchmark", ("Benchmark_Fire_Risk.csv", "cannot be written"), leaves=True, size=500),
        Bad("CGM_Lora", ("fire_game_cgm_lora", "cannot be written"), leaves=True, size=160_000),
    ],
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_a_bad_input_is_refused_in_one_line_and_harms_nothing(monkeypatch, capsys, workspace, other_backbone, tmp_path, kind):
    for number, bad in enumerate(BAD_INPUTS[kind]):
        place = workspace.copy(tmp_path / f"root{number}")
        own = "*_dataset" if bad.script == "Data_Preparation" else f"Results/{RESULTS_OF[bad.script]}"
        for spoil in (gone(own), *bad.spoil) if bad.anew else bad.spoil:
            spoil(place)
        names = {"root": place.root, "model": place.model, "other_backbone": other_backbone}
        flags = place.flags(bad.script, *(flag.format(**names) for flag in bad.flags))
        before = hashes(place.root)
        with files_of_at_most(bad.size):
            line = complaint(monkeypatch, capsys, bad.script, flags)
        assert [words for words in bad.says if words.format(**names) not in line] == [], (bad, line)
        after = hashes(place.root)
        kept = bad.leaves and before.items() <= after.items() and not any(".part" in name for name in after)
        assert after == before or kept, bad
        assert not bad.anew or not (place.root / own / "config.json").exists(), bad
        shutil.rmtree(place.root)
