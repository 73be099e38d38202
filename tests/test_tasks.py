"""Tests of the tasks of a root folder: tasks.json, and own tasks by --task and --classes."""

import re

import pytest
from image_sources import run, write_folders
from pipeline import hashes

from common.cli.flags import PreparationConfig
from common.cli.parser import parse
from common.data.prepare import planned
from common.data.store import read_manifest
from common.errors import UserError
from common.files import write_json
from common.tasks import DOCUMENTED, TASKS_FILE, read_tasks


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two sources: birds of three classes and cars of two, all of different sizes."""
    top = tmp_path_factory.mktemp("sources")
    return write_folders(top / "birds", ["crow", "jay", "owl"], [6, 9, 5]), write_folders(top / "cars", ["bus", "van"], [7, 5])


@pytest.fixture
def root(tmp_path):
    """Where data are prepared; it is not there yet."""
    return tmp_path / "root"


def test_own_tasks_take_the_place_of_the_documented_ones_and_one_more_leaves_them_as_they_are(root, sources, tmp_path):
    """Every class and every image of each source, or those that are chosen; in the order of the command line."""
    birds, cars = sources
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

    earlier = tmp_path / "earlier"  # a root that an earlier version prepared, which has no tasks.json
    for task in DOCUMENTED:
        (earlier / task.dataset_folder).mkdir(parents=True)
    assert read_tasks(earlier) == planned(parse(PreparationConfig, ["--root", str(root / "none")])) == list(DOCUMENTED)
    run(earlier, "--task", f"birds={birds}")
    assert [task.key for task in read_tasks(earlier)] == ["fire", "game", "birds"]


def test_an_own_task_may_have_the_name_of_a_documented_one(root, sources, tmp_path):
    """The other documented one does not come with it, and what is prepared is listed even if the next one fails."""
    for name in ("fire", "game"):
        top = root / name
        with pytest.raises(UserError, match="nowhere does not exist"):
            run(top, "--task", f"{name}={sources[0]}", f"birds={tmp_path / 'nowhere'}")
        assert [(task.key, task.title) for task in read_tasks(top)] == [(name, name)]
        run(top, "--task", f"birds={sources[0]}")
        assert [task.key for task in read_tasks(top)] == [name, "birds"]
        (top / TASKS_FILE).unlink()  # a root of an earlier version that was cut short
        run(top, "--task", f"cars={sources[1]}")
        assert [task.key for task in read_tasks(top)] == [name, "cars"]


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


def test_flags_that_make_no_sense_and_a_root_without_tasks_are_one_line(root, sources):
    """And nothing is written."""
    one = f"a={sources[0]}"
    for flags, said in [
        ([one, one], "two tasks have one name (a and a)"),
        ([one, f"A={sources[0]}"], "two tasks have one name (a and A)"),
        (["a/b=x"], "letters, digits, _ and -, not a/b="),
        (["a="], "takes NAME=SOURCE"),
        ([str(sources[0])], "takes NAME=SOURCE"),
        (["Routing=x"], "choose another"),
        ([f"{'x' * 61}=x"], "choose another"),
        ([one, "--classes", "a=crow,hawk"], "--classes a=: there is no class 'hawk'; there are crow, jay"),
        ([one, "--classes", "a=crow"], "needs two or more different classes"),
        ([one, "--classes", "a=crow,crow"], "needs two or more different classes"),
        ([one, "--classes", "a=crow,,jay"], "NAME=class,class"),
        ([one, "--classes", "b=crow,jay"], "no --task b=SOURCE"),
        ([one, "--classes", "a=crow,jay", "a=crow,owl"], "given twice for a"),
        ([one, "--fire_source", "x"], "--fire_source is of the documented tasks"),
    ]:
        with pytest.raises(UserError, match=f"^[^\n]*{re.escape(said)}[^\n]*$"):
            run(root, "--task", *flags)
        assert not root.exists() or list(root.rglob("*")) == []
    with pytest.raises(UserError, match="no images of fire risk in .*; run python Data_Preparation.py --root"):
        read_manifest(read_tasks(root)[0], parse(PreparationConfig, ["--root", str(root)]))
    root.mkdir(exist_ok=True)
    entry = {"key": "a", "title": "a", "name": "a", "source": "s", "classes": []}
    for content in ({}, {"tasks": []}, {"tasks": [{"key": "a"}]}, {"tasks": [{**entry, "classes": 3}]},
                    {"tasks": [{**entry, "more": 3}]}):
        write_json(root / TASKS_FILE, content)
        with pytest.raises(UserError, match=f"{re.escape(str(root / TASKS_FILE))} .*Data_Preparation.py"):
            read_tasks(root)
