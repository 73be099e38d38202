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


@pytest.fixture
def birds(tmp_path):
    """A source of three classes of different sizes."""
    return write_folders(tmp_path / "birds", ["crow", "jay", "owl"], [6, 9, 5])


@pytest.fixture
def cars(tmp_path):
    """A source of two classes."""
    return write_folders(tmp_path / "cars", ["bus", "van"], [7, 5])


@pytest.fixture
def root(tmp_path):
    """Where data are prepared; it is not there yet."""
    return tmp_path / "root"


def test_own_tasks_take_the_place_of_the_documented_ones(root, birds, cars):
    """Every class and every image of each source, or those that are chosen; in the order of the command line."""
    made = run(root, "--task", f"birds={birds}", "--task", f"c-a_rs2={cars}", "--classes", "birds=owl,crow")
    assert [(task.key, task.title, task.name) for task in read_tasks(root)] == [(name,) * 3 for name in ("birds", "c-a_rs2")]
    assert sorted(path.name for path in root.iterdir()) == ["birds_dataset", "c-a_rs2_dataset", TASKS_FILE]
    found = [(manifest["classes"], sum(manifest["images"].values())) for manifest in made.values()]
    assert found == [(["owl", "crow"], 11), (["bus", "van"], 12)]


def test_one_more_task_leaves_the_others_as_they_are(root, birds, cars, tmp_path):
    """It comes last; so it does in a root that an earlier version prepared, which has no tasks.json."""
    run(root, "--task", f"birds={birds}")
    before = hashes(root / "birds_dataset")
    made = run(root, "--task", f"cars={cars}", "--images_per_class", "6", "--seed", "1")
    assert [task.key for task in read_tasks(root)] == ["birds", "cars"]
    assert hashes(root / "birds_dataset") == before
    assert sum(made["cars"]["images"].values()) == 6 + 5  # a number is the most that is taken

    earlier = tmp_path / "earlier"
    (earlier / "fire_dataset").mkdir(parents=True)
    assert read_tasks(earlier) == list(DOCUMENTED)
    run(earlier, "--task", f"birds={birds}")
    assert [task.key for task in read_tasks(earlier)] == ["fire", "game", "birds"]


def test_without_flags_the_tasks_are_those_of_the_root(root, birds, cars):
    """With their sources and classes: the same command without --task makes all of them anew."""
    run(root, "--task", f"birds={birds}", "--classes", "birds=owl,jay", "--task", f"cars={cars}")
    before = hashes(root)
    (root / "birds_dataset" / "manifest.json").unlink()
    run(root, "--overwrite")
    assert hashes(root) == before
    assert planned(parse(PreparationConfig, ["--root", str(root / "none")])) == list(DOCUMENTED)


def test_another_source_for_a_task_needs_overwrite(root, birds, cars):
    """Then it replaces this task alone, in its place."""
    run(root, "--task", f"one={birds}", f"two={cars}")
    before = hashes(root)
    with pytest.raises(UserError, match="one_dataset was made with source = .*birds, not .*cars; add --overwrite"):
        run(root, "--task", f"one={cars}")
    assert hashes(root) == before
    run(root, "--task", f"one={cars}", "--overwrite")
    assert [(task.key, task.source) for task in read_tasks(root)] == [("one", str(cars)), ("two", str(cars))]
    assert hashes(root / "two_dataset") == {name.partition("/")[2]: digest for name, digest in before.items() if "two_" in name}


def test_flags_that_make_no_sense_are_refused_by_name(root, birds):
    """One line, and nothing written."""
    for flags, said in [
        (["--task", f"a={birds}", f"a={birds}"], "two tasks have one name (a and a)"),
        (["--task", f"a={birds}", f"A={birds}"], "two tasks have one name (a and A)"),
        (["--task", f"a/b={birds}"], "letters, digits, _ and -, not a/b="),
        (["--task", "a="], "takes NAME=SOURCE"),
        (["--task", str(birds)], "takes NAME=SOURCE"),
        (["--task", f"Routing={birds}"], "choose another"),
        (["--task", f"{'x' * 61}={birds}"], "choose another"),
        (["--task", f"a={birds}", "--classes", "a=crow,hawk"], "--classes a=: there is no class 'hawk'; there are crow, jay"),
        (["--task", f"a={birds}", "--classes", "a=crow"], "needs two or more different classes"),
        (["--task", f"a={birds}", "--classes", "a=crow,crow"], "needs two or more different classes"),
        (["--task", f"a={birds}", "--classes", "a=crow,,jay"], "NAME=class,class"),
        (["--task", f"a={birds}", "--classes", "b=crow,jay"], "no --task b=SOURCE"),
        (["--task", f"a={birds}", "--classes", "a=crow,jay", "a=crow,owl"], "given twice for a"),
        (["--task", f"a={birds}", "--fire_source", str(birds)], "--fire_source is of the documented tasks"),
        (["--task", f"a={birds}/nowhere"], "nowhere does not exist"),
    ]:
        with pytest.raises(UserError, match=re.escape(said)) as refusal:
            run(root, *flags)
        assert "\n" not in str(refusal.value)
        assert not root.exists() or list(root.rglob("*")) == []


def test_a_root_without_tasks_or_with_other_text_is_one_line(root):
    """Each names Data_Preparation.py, as every script does that needs the tasks."""
    with pytest.raises(UserError, match="no images of fire risk in .*; run python Data_Preparation.py --root"):
        read_manifest(read_tasks(root)[0], parse(PreparationConfig, ["--root", str(root)]))
    root.mkdir()
    entry = {"key": "a", "title": "a", "name": "a", "source": "s", "classes": []}
    for content in ({}, {"tasks": []}, {"tasks": 3}, {"tasks": [3]}, {"tasks": [{"key": "a"}]},
                    {"tasks": [{**entry, "key": 3}]}, {"tasks": [{**entry, "classes": 3}]}, {"tasks": [{**entry, "more": 3}]}):
        write_json(root / TASKS_FILE, content)
        with pytest.raises(UserError, match=f"{re.escape(str(root / TASKS_FILE))} .*Data_Preparation.py"):
            read_tasks(root)
