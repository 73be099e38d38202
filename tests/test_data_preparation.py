"""Tests of Data_Preparation.py: which images are chosen, which tasks a root has, what a second run does, and refusals."""

import re
import shutil
from collections import Counter

import pytest
from hub import FIRE_CLASSES, image_dataset, png
from image_sources import PER_CLASS, all_identities, left_in, one_parquet, opened, prepared, run, write_folders, write_parquet
from pipeline import hashes

from common.cli.flags import PreparationConfig
from common.cli.parser import parse
from common.data.prepare import planned
from common.data.store import read_manifest
from common.errors import UserError
from common.files import write_json
from common.tasks import DOCUMENTED, TASKS_FILE, read_tasks


@pytest.fixture
def images(tmp_path):
    return write_folders(tmp_path / "images" / "FireRisk")


@pytest.fixture
def root(tmp_path):
    """Where data are prepared; it does not exist yet."""
    return tmp_path / "root"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two sources: birds of three classes and cars of two, all of different sizes."""
    top = tmp_path_factory.mktemp("sources")
    return write_folders(top / "birds", ["crow", "jay", "owl"], [6, 9, 5]), write_folders(top / "cars", ["bus", "van"], [7, 5])


def test_classes_are_taken_in_the_given_order_and_what_cannot_be_had_is_refused(images, root):
    for flags, message in ((["--fire_classes", "low", "lava"], "no class 'lava'; there are high, low, moderate"),
                           (["--fire_classes", "low", "low"], "needs two or more different classes"),
                           (["--images_per_class", "13"], "class 'high' of fire risk has 12 images, fewer than 13")):
        with pytest.raises(UserError, match=message):
            prepared(root, images, *flags)
        assert left_in(root) == []
    wanted = ["water", "low", "very_high"]
    assert prepared(root, images, "--fire_classes", *wanted)["classes"] == wanted
    assert opened(root)["test"].features["label"].names == wanted
    assert {FIRE_CLASSES[label] for label, _ in all_identities(root)} == set(wanted)


def test_the_seed_decides_and_prepared_data_need_no_source(tmp_path, images):
    """The same bytes of one seed, of another another choice; then the source may go, and the same settings do nothing."""
    found = {name: prepared(tmp_path / name, images, "--seed", name[0]) for name in ("7", "7 again", "8")}
    assert hashes(tmp_path / "7") == hashes(tmp_path / "7 again")
    assert found["7"]["fingerprint"] != found["8"]["fingerprint"]
    assert set(all_identities(tmp_path / "7")) != set(all_identities(tmp_path / "8"))
    before = {path: path.stat().st_mtime_ns for path in left_in(tmp_path / "7")}
    shutil.rmtree(images)
    assert prepared(tmp_path / "7", images, "--seed", "7") == found["7"] and len(all_identities(tmp_path / "7")) == 40
    assert {path: path.stat().st_mtime_ns for path in left_in(tmp_path / "7")} == before


def test_damaged_images_can_be_left_out(images, root):
    """With --skip_damaged the others are taken, and how many were left out is kept; a class may get too few."""
    for name, index in (("low", 3), ("low", 4), ("moderate", 0)):
        (images / name / f"{index:02d}.png").write_bytes(png(1, index)[:50])
    manifest = prepared(root, images, "--skip_damaged", count="all")
    assert (manifest["damaged"], sum(manifest["images"].values())) == (3, 4 * PER_CLASS - 3)
    assert Counter(label for label, _ in all_identities(root)) == {0: 12, 1: 10, 2: 11, 3: 12}
    for path in list((images / "low").iterdir())[:7]:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="class 'low' has only [0-5] images that are not damaged"):
        prepared(root / "other", images, "--skip_damaged", count="all")
    assert left_in(root / "other") == []


def test_what_exists_is_replaced_only_with_overwrite(images, root, tmp_path):
    """The line names the setting; what was made is kept even then when the new source is refused, and a folder of others."""
    prepared(root, images)
    before = hashes(root)
    for flags, setting in ((["--seed", "4"], "seed"), (["--images_per_class", "6"], "images_per_class"),
                           (["--fire_classes", "low", "high"], "requested_classes"), (["--split", "grouped"], "split"),
                           (["--fire_source", "elsewhere"], "source"), (["--demo"], "demo"),
                           (["--hub_choice", "uniform"], "hub_choice")):
        with pytest.raises(UserError, match=f"was made with {setting} = .*--overwrite"):
            prepared(root, images, *flags)
    (images / "low" / "03.png").write_bytes(b"cut")
    with pytest.raises(UserError, match="damaged"):
        prepared(root, images, "--overwrite", count="all")
    assert hashes(root) == before
    (root / "fire_dataset" / "manifest.json").unlink()
    source = one_parquet(tmp_path)
    with pytest.raises(UserError, match="did not make it; add --overwrite"):
        prepared(root, source)
    assert hashes(root).items() < before.items()
    (root / "fire_dataset" / "mine.txt").write_text("mine")
    prepared(root, write_parquet(source, image_dataset(FIRE_CLASSES, 6)), "--overwrite", count="all")
    assert len(all_identities(root)) == 24 and [path.name for path in root.iterdir()] == ["fire_dataset"]
    assert not (root / "fire_dataset" / "mine.txt").exists()


def test_own_tasks_replace_the_documented_ones_and_one_more_leaves_them_as_they_are(root, sources):
    """Every class and every image of each source, or those that are chosen; in the order of the command line."""
    birds, cars = sources
    assert read_tasks(root) == planned(parse(PreparationConfig, ["--root", str(root)])) == list(DOCUMENTED)
    run(root, "--task", f"birds={birds}", "--classes", "birds=owl,crow")
    before = hashes(root / "birds_dataset")
    made = run(root, "--task", f"c-a_rs2={cars}", "--images_per_class", "6", "--seed", "1")
    assert [(task.key, task.title, task.name) for task in read_tasks(root)] == [(name,) * 3 for name in ("birds", "c-a_rs2")]
    assert sorted(path.name for path in root.iterdir()) == ["birds_dataset", "c-a_rs2_dataset", TASKS_FILE]
    found = [(manifest["classes"], sum(manifest["images"].values())) for manifest in made.values()]
    assert found == [(["owl", "crow"], 11), (["bus", "van"], 11)]  # a number is the most that is taken
    assert hashes(root / "birds_dataset") == before
    (root / "birds_dataset" / "manifest.json").unlink()
    run(root, "--overwrite")  # without --task: all tasks of the root
    assert hashes(root / "birds_dataset") == before


@pytest.mark.parametrize("name", ["fire", "game"])
def test_an_own_task_may_have_the_name_of_a_documented_one(root, sources, tmp_path, name):
    """The other documented one does not come with it, and what is prepared is listed even if the next one fails."""
    with pytest.raises(UserError, match="nowhere does not exist"):
        run(root, "--task", f"{name}={sources[0]}", f"birds={tmp_path / 'nowhere'}")
    assert [(task.key, task.title) for task in read_tasks(root)] == [(name, name)]
    run(root, "--task", f"birds={sources[0]}")
    assert [task.key for task in read_tasks(root)] == [name, "birds"]


def test_another_source_for_a_task_needs_overwrite(root, sources):
    """Then it replaces this task alone, in its place."""
    birds, cars = sources
    run(root, "--task", f"one={birds}", f"two={cars}")
    before, two = hashes(root), hashes(root / "two_dataset")
    with pytest.raises(UserError, match="one_dataset was made with source = .*birds, not .*cars; add --overwrite"):
        run(root, "--task", f"one={cars}")
    assert hashes(root) == before
    run(root, "--task", f"one={cars}", "--overwrite")
    assert [(task.key, task.source) for task in read_tasks(root)] == [("one", str(cars)), ("two", str(cars))]
    assert hashes(root / "two_dataset") == two


@pytest.mark.parametrize(("flags", "message"), [
    (["a={birds}", "a={birds}"], "two tasks have one name (a and a)"),
    (["a={birds}", "A={birds}"], "two tasks have one name (a and A)"),
    (["a/b=x"], "letters, digits, _ and -, not a/b="),
    (["a="], "takes NAME=SOURCE"),
    (["Routing=x"], "choose another"),
    ([f"{'x' * 61}=x"], "choose another"),
    (["a={birds}", "--classes", "a=crow,hawk"], "--classes a=: there is no class 'hawk'; there are crow, jay"),
    (["a={birds}", "--classes", "a=crow"], "needs two or more different classes"),
    (["a={birds}", "--classes", "a=crow,,jay"], "NAME=class,class"),
    (["a={birds}", "--classes", "b=crow,jay"], "no --task b=SOURCE"),
    (["a={birds}", "--classes", "a=crow,jay", "a=crow,owl"], "given twice for a"),
    (["a={birds}", "--fire_source", "x"], "--fire_source is of the documented tasks"),
])
def test_flags_that_make_no_sense_are_one_line_and_nothing_is_written(root, sources, flags, message):
    with pytest.raises(UserError, match=f"^[^\n]*{re.escape(message)}[^\n]*$"):
        run(root, "--task", *(flag.format(birds=sources[0]) for flag in flags))
    assert left_in(root) == []


def test_a_root_without_data_and_a_list_of_tasks_that_is_none_are_one_line(root):
    with pytest.raises(UserError, match="no images of fire risk in .*; run python Data_Preparation.py --root"):
        read_manifest(read_tasks(root)[0], parse(PreparationConfig, ["--root", str(root)]))
    root.mkdir()
    entry = {"key": "a", "title": "a", "name": "a", "source": "s", "classes": []}
    for content in ({}, {"tasks": []}, {"tasks": [{"key": "a"}]}, {"tasks": [{**entry, "classes": 3}]},
                    {"tasks": [{**entry, "more": 3}]}):
        write_json(root / TASKS_FILE, content)
        with pytest.raises(UserError, match=f"{re.escape(str(root / TASKS_FILE))} .*Data_Preparation.py"):
            read_tasks(root)
