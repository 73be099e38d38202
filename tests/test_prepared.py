"""Tests of prepared images: killed on the way, damaged later, made elsewhere; always whole, or one clear line."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sources import FIRE, PROJECT, SCRIPT, run, write_folders
from pipeline import hashes

from common import models
from common.cli.flags import PreparationConfig
from common.cli.parser import parse
from common.data.tensors import load_task
from common.data.threads import AHEAD, in_order
from common.errors import UserError

pytest_plugins = ["warm_process"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("Luftbilder – 火災") / "große Übersicht"
    return write_folders(folder, ["sehr hoch", "mäßig", "低い", "keins"])


def flags(images, *more):
    return "--fire_source", images, "--game_source", images, "--images_per_class", 10, *more


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    run(root, *flags(images))
    return root


@pytest.mark.parametrize("kill_at", [("common.data.reading.perceptual_hash", 60),  # in the second task
                                     ("os.replace", 2),  # the old folder out of the way
                                     ("os.replace", 3),  # the new one to its place
                                     ("shutil.rmtree", 1)])  # the old one
def test_a_killed_run_leaves_nothing_that_the_next_does_not_mend(warm_process, images, whole, tmp_path, kill_at):
    """While other data are being replaced; in the end nothing but the right files is there."""
    run(tmp_path, *flags(images, "--seed", 1))
    again = "--root", tmp_path, *flags(images, "--overwrite")
    assert warm_process.run(SCRIPT, *again, kill_at=kill_at).status == -signal.SIGKILL
    ended = warm_process.run(SCRIPT, *again)
    assert (ended.status, ended.errors) == (0, "") and hashes(tmp_path) == hashes(whole)


def test_nothing_depends_on_where_and_how_the_script_runs(images, whole, tmp_path):
    """Another working folder, locale and hash seed, relative paths with spaces and other alphabets: the same files."""
    (tmp_path / "Größe & 大").symlink_to(images.parent)
    command = [PROJECT / SCRIPT, "--root", "mein Ordner", *flags(Path("Größe & 大") / images.name)]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONHASHSEED": "1", "TZ": "Asia/Kathmandu"}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, encoding="utf-8", timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "mäßig" in done.stdout
    assert hashes(tmp_path / "mein Ordner") == hashes(whole)


@pytest.mark.parametrize("pattern", ["manifest.json", "test/*.arrow"])
def test_damaged_files_give_the_clear_line_or_the_same_data(whole, backbone, tmp_path, pattern):
    """Never other data, and never another error. Without their cache, so that the images themselves are read."""
    shutil.copytree(whole / "fire_dataset", tmp_path / "fire_dataset")
    config, processor = parse(PreparationConfig, ["--root", str(tmp_path)]), models.load_processor(backbone)
    path, = (tmp_path / "fire_dataset").glob(pattern)
    content = path.read_bytes()

    def facts():
        for cache in (tmp_path / "fire_dataset").glob("pixels_*"):
            cache.unlink()
        data = load_task(FIRE, config, processor)
        parts = [tensor for part in (data.train, data.validation, data.test) for tensor in (part.inputs[:], part.labels)]
        return data.classes, data.fingerprint, [tensor.tolist() for tensor in parts]

    wanted = facts()

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, len(content) - 1), st.integers(0, 255))
    def check(place, flipped):
        changed = bytes([content[place] ^ flipped]) + content[place + 1:] if flipped else b""  # else it is cut short
        path.write_bytes(content[:place] + changed)
        try:
            assert facts() == wanted
        except UserError as error:
            assert all(part in str(error) for part in ("fire_dataset", "Data_Preparation.py", "--overwrite"))

    check()


def test_images_are_read_only_as_fast_as_they_are_used():
    """And what has not begun when reading ends early is left undone."""
    taken, begun, go_on = [], [], threading.Event()

    def slow(item):
        begun.append(item)
        return item if item < 50 else go_on.wait()

    with ThreadPoolExecutor(4) as pool:
        results = in_order(pool, slow, (taken.append(item) or item for item in range(200)))
        for used in range(50):
            assert next(results) == used and len(taken) <= used + AHEAD
        results.close()
        go_on.set()
    assert len(begun) <= 50 + 4 and len(taken) < 50 + AHEAD
