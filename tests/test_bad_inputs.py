"""Tests of what is damaged, missing or of something else: one line that names it and the way out, and nothing is harmed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from pipeline import Workspace, hashes
from refusals import AFTER_DATA, RESULTS_OF, complaint, files_of_at_most, one_line

from common.cli.flags import SCRIPTS
from common.training.checkpoint import Checkpoint

pytest_plugins = ["warm_process"]

BASE, EXPERT = "Results/Base_Models/fire_base", "Results/Lora_Finetune/Models/game_lora_finetune"
CHECKPOINT = "Results/Finetune/Checkpoints/fire_finetune.safetensors"


@pytest.fixture(scope="module")
def other_images(tmp_path_factory, backbone):
    """A workspace with other images of the same tasks, and no results."""
    made = Workspace(tmp_path_factory.mktemp("other_images"), backbone)
    made.run("Data_Preparation", "--seed", "8")
    made.tasks()  # so that the resized images are there too
    return made


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, workspace):
    """The workspace with a fine-tuning that was cut short after its first epoch."""
    place = workspace.copy(tmp_path_factory.mktemp("interrupted") / "root", "fire_dataset", "game_dataset")
    save = Checkpoint.save

    def save_and_end(self, *state):
        save(self, *state)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, "save", save_and_end)
        place.run("Finetune")
    return place


@dataclass(frozen=True)
class Bad:
    """A script, what the one line must say, its flags, and what is done to a copy of the finished workspace.

    spoil: may get a fixture by its name. anew: the script's own results are not there yet; leaves: the line, and whole
    earlier results, come in the middle of the work, which may leave what it had already done; size: of any file, in bytes,
    that the disk takes; alone: it runs in a process of its own, for which there is no Hub.
    """

    script: str
    says: tuple[str, ...]
    flags: tuple[str, ...] = ()
    spoil: Callable[[Workspace, Callable], None] | None = None
    anew: bool = True
    leaves: bool = False
    size: int | None = None
    alone: bool = False


def cut(path):
    """Keep the first half of a file."""
    def spoil(place, _):
        found = next(place.root.glob(path))
        found.write_bytes(found.read_bytes()[: found.stat().st_size // 2])
    return spoil


def other_processor(place, _):
    """The backbone elsewhere, with an image processor that normalises otherwise."""
    shutil.copytree(place.model, place.root / "other_processor")
    path = place.root / "other_processor" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.4, 0.5, 0.6]}))


def holds(path, content):
    """Put something else into a file."""
    return lambda place, _: (place.root / path).write_text(content)


def gone(path):
    """Delete a folder."""
    return lambda place, _: shutil.rmtree(place.root / path)


def exchange_images(place, fixture):
    """Put other images in place of those that the results of a workspace were made from."""
    for name in ("fire_dataset", "game_dataset"):
        shutil.rmtree(place.root / name)
    fixture("other_images").copy(place.root)


def damage_images(place, _):
    """Cut a file of the prepared images, of which there are no resized ones."""
    for path in (place.root / "fire_dataset").glob("pixels_*"):
        path.unlink()
    cut("fire_dataset/test/*.arrow")(place, _)


def drop_rows(script):
    """Take a script's rows out of the summary."""
    def spoil(place, _):
        path = place.results / "summary.csv"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if not line.startswith(RESULTS_OF[script])))
    return spoil


def interrupt(place, fixture):
    """Put a fine-tuning there that was cut short."""
    shutil.copytree(fixture("interrupted").results / "Finetune", place.results / "Finetune")


def and_then(*steps):
    """One thing after the other."""
    return lambda place, fixture: [step(place, fixture) for step in steps]


def nowhere(place, _):
    """Let Results/ be where nobody can make a folder."""
    shutil.rmtree(place.results)
    place.results.symlink_to("/proc/self/fdinfo")


PREPARE, MAKE_BASE, MAKE_EXPERTS = (f"python {script}.py --demo --root {{root}}" for script in (
    "Data_Preparation", "Generate_Base_Model", "Lora_Finetune"))
STEPS = (("Lora_Finetune", "Generate_Base_Model"), ("CGM_Lora", "Lora_Finetune"))  # a script and the one it starts from
OTHER_PROCESSOR = {"flags": ("--model", "{root}/other_processor"), "spoil": other_processor, "leaves": True}
OTHER_BACKBONE = ("--model", "{other_backbone}")
BAD_INPUTS = {
    "data": [
        *(Bad(script, ("game_dataset", PREPARE), spoil=gone("game_dataset"), anew=False) for script in AFTER_DATA),
        *(Bad(script, ("manifest.json", "Data_Preparation.py", "--overwrite"), anew=False,
              spoil=holds("fire_dataset/manifest.json", content))
          for script, content in zip(SCRIPTS, ("", "{", "[]", "\0", "{}", '{"classes": 4}'), strict=True)),
        Bad("Data_Preparation", ("--fire_source {root}/a\\udcff", "rename"), ("--fire_source", "{root}/a\udcff")),
        Bad("Data_Preparation", ("--fire_source", "class", "a\\udcff", "rename"), ("--fire_source", "{root}/new"),
            and_then(lambda place, _: (place.root / "new" / "a\udcff").mkdir(parents=True), holds("new/a\udcff/0.png", ""))),
        Bad("Benchmark", ("fire_dataset", "Data_Preparation.py", "--overwrite"), spoil=damage_images),
        *(Bad(script, ("data.fire = ", "--overwrite"), spoil=exchange_images, anew=False) for script in AFTER_DATA),
        Bad("Lora_Finetune", ("fire_base", "other images", MAKE_BASE, "--overwrite"), spoil=exchange_images),
        Bad("CGM_Lora", ("fire_lora_finetune", "other images", MAKE_EXPERTS, "--overwrite"), spoil=exchange_images),
    ],
    "models": [
        Bad("Lora_Finetune", ("fire_base", MAKE_BASE), spoil=gone(BASE)),
        *(Bad("Lora_Finetune", ("fire_base", MAKE_BASE, "--overwrite"), spoil=cut(f"{BASE}/{name}"))
          for name in ("config.json", "model.safetensors", "provenance.json")),
        Bad("CGM_Lora", ("game_lora_finetune", MAKE_EXPERTS), spoil=gone(EXPERT)),
        *(Bad("CGM_Lora", ("game_lora_finetune", MAKE_EXPERTS, "--overwrite"), spoil=cut(f"{EXPERT}/{name}"))
          for name in ("adapter_config.json", "adapter_model.safetensors", "provenance.json")),
        *(Bad(script, ("other backbone weights than {other_backbone}", f"{before}.py", "--overwrite", "--model {model}"),
              OTHER_BACKBONE) for script, before in STEPS),
        *(Bad(script, ("model = {model}, not {other_backbone}", "--overwrite"), OTHER_BACKBONE, anew=False)
          for script in AFTER_DATA),
        *(Bad(script, ("image processor", f"{before}.py", "--overwrite"), **OTHER_PROCESSOR) for script, before in STEPS),
        Bad("Finetune", ("preprocessing = ", "--overwrite"), anew=False, **OTHER_PROCESSOR),
    ],
    "results": [
        *(Bad(script, ("summary.csv has no column", "--overwrite"), spoil=holds("Results/summary.csv", "a,b\n"))
          for script in AFTER_DATA),
        *(Bad(script, (f"no rows of {RESULTS_OF[script]}", "--overwrite"), spoil=drop_rows(script), anew=False)
          for script in ("Finetune", "CGM_Lora")),
        *(Bad(script, (f"{RESULTS_OF[script]}/config.json", "--overwrite"),
              spoil=cut(f"Results/{RESULTS_OF[script]}/config.json"), anew=False) for script in AFTER_DATA),
        Bad("Benchmark", ("Benchmark_Data", "move it away"), leaves=True,
            spoil=and_then(lambda place, _: (place.results / "Benchmark_Data").unlink(),
                           lambda place, _: (place.results / "Benchmark_Data").mkdir(),
                           holds("Results/Benchmark_Data/notes.txt", "mine"))),
    ],
    "checkpoints": [
        Bad("Finetune", (CHECKPOINT, "delete it"), spoil=and_then(interrupt, cut(CHECKPOINT))),
        Bad("Finetune", (CHECKPOINT, "delete it"), spoil=and_then(interrupt, holds(CHECKPOINT, ""))),
        Bad("Finetune", (CHECKPOINT, "batch_size = 8, not 4", "--overwrite"), ("--batch_size", "4"), interrupt),
        Bad("Finetune", (CHECKPOINT, "data.fire = ", "--overwrite"), spoil=and_then(interrupt, exchange_images)),
        Bad("Finetune", (CHECKPOINT, "not {other_backbone}", "--overwrite"), OTHER_BACKBONE, interrupt),
    ],
    "disk": [
        Bad("Data_Preparation", ("{root}/file", "--root"), ("--root", "{root}/file"), holds("file", "")),
        Bad("Benchmark", ("Results", "cannot be written", "--root"), spoil=nowhere),
        Bad("Finetune", (CHECKPOINT, "cannot be written", "make room"), leaves=True, size=50_000),
        Bad("Finetune", (CHECKPOINT, "cannot be written"), leaves=True, size=500),
        Bad("Benchmark", ("Benchmark_Fire_Risk.csv", "cannot be written"), leaves=True, size=500),
        Bad("CGM_Lora", ("fire_game_cgm_lora", "cannot be written"), leaves=True, size=100_000),
    ],
    "network": [
        Bad("Data_Preparation", ("blanchon/FireRisk", "--demo", "--fire_source"), ("--root", "{root}/new"), alone=True),
        Bad("Benchmark", ("nobody/beit", "network", "--demo"), ("--model", "nobody/beit"), alone=True),
    ],
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_a_bad_input_is_refused_in_one_line_and_harms_nothing(
        monkeypatch, capsys, request, workspace, other_backbone, tmp_path, kind):
    for number, bad in enumerate(BAD_INPUTS[kind]):
        place = workspace.copy(tmp_path / f"root{number}")
        own = RESULTS_OF[bad.script]
        for made in [place.results / own] if bad.script in AFTER_DATA else place.root.glob("*_dataset"):
            if bad.anew:
                shutil.rmtree(made)
        if bad.spoil:
            bad.spoil(place, request.getfixturevalue)
        names = {"root": place.root, "model": place.model, "other_backbone": other_backbone}
        flags = place.flags(bad.script, *(flag.format(**names) for flag in bad.flags))
        before = hashes(place.root)
        if bad.alone:
            flags.remove("--demo")
            ended = request.getfixturevalue("warm_process").run(f"{bad.script}.py", *flags)
            line = one_line(bad.script, ended.status, ended.errors)
        else:
            with files_of_at_most(bad.size):
                line = complaint(monkeypatch, capsys, bad.script, flags)
        assert [words for words in bad.says if words.format(**names) not in line] == [], (bad, line)
        after = hashes(place.root)
        kept = bad.leaves and before.items() <= after.items() and not any(".part" in name for name in after)
        assert after == before or kept, bad
        assert not bad.anew or not (place.results / own / "config.json").exists(), bad
        shutil.rmtree(place.root)
