"""Tests of prepared images: killed on the way, damaged later, made elsewhere; always whole, or one clear line."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sources import FIRE, PROJECT, SCRIPT, write_folders
from pipeline import hashes

import Data_Preparation
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


def flags(root, images, *more):
    sources = ["--fire_source", str(images), "--game_source", str(images)]
    return ["--root", str(root), *sources, "--images_per_class", "10", *more]


def prepared(root, images, *more):
    Data_Preparation.main(parse(PreparationConfig, flags(root, images, *more)))
    return root


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("whole") / "root", images)


@pytest.mark.parametrize("function, call", [
    ("common.data.reading.perceptual_hash", 60),  # in the second task
    ("os.replace", 2),  # the old folder out of the way
    ("os.replace", 3),  # the new one to its place
    ("shutil.rmtree", 1),  # the old one
])
def test_a_killed_run_leaves_nothing_that_the_next_does_not_mend(warm_process, images, whole, tmp_path, function, call):
    """While other data are being replaced; in the end nothing but the right files is there."""
    root = prepared(tmp_path / "root", images, "--seed", "1")
    assert warm_process.run(SCRIPT, *flags(root, images, "--overwrite"), kill_at=(function, call)).status == -signal.SIGKILL
    ended = warm_process.run(SCRIPT, *flags(root, images, "--overwrite"))
    assert (ended.status, ended.errors) == (0, "")
    assert hashes(root) == hashes(whole)


def test_nothing_depends_on_where_and_how_the_script_runs(images, whole, tmp_path):
    """Another working folder, locale and hash seed, relative paths with spaces and other alphabets: the same files."""
    (tmp_path / "Größe & 大").symlink_to(images.parent)
    source = Path("Größe & 大") / images.name
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONHASHSEED": "1", "TZ": "Asia/Kathmandu"}
    done = subprocess.run([sys.executable, PROJECT / SCRIPT, *flags("mein Ordner", source)], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, encoding="utf-8", timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "mäßig" in done.stdout
    assert hashes(tmp_path / "mein Ordner") == hashes(whole)


def damage(content, data):
    place = data.draw(st.integers(0, len(content) - 1))
    flipped = data.draw(st.integers(0, 255))
    return content[:place] + bytes([content[place] ^ flipped]) + content[place + 1:] if flipped else content[:place]


@pytest.fixture(scope="module")
def loaded(whole, backbone, tmp_path_factory):
    """A copy of the prepared data with its pixel cache, how to load it, and what that gives."""
    root = tmp_path_factory.mktemp("loaded")
    shutil.copytree(whole / "fire_dataset", root / "fire_dataset")
    config, processor = parse(PreparationConfig, ["--root", str(root)]), models.load_processor(backbone)
    return root / "fire_dataset", lambda: load_task(FIRE, config, processor), load_task(FIRE, config, processor)


def same(one, other):
    facts = [(data.classes, data.fingerprint) for data in (one, other)]
    tensors = [[tensor for part in (data.train, data.validation, data.test) for tensor in (part.inputs[:], part.labels)]
               for data in (one, other)]
    return facts[0] == facts[1] and all(map(torch.equal, *tensors))


@pytest.mark.parametrize("pattern, examples", [("manifest.json", 25), ("test/*.arrow", 25)])
def test_damaged_files_give_the_clear_line_or_the_same_data(loaded, pattern, examples):
    """Never other data, and never another error. Without its cache, so that the images themselves are read."""
    folder, load, wanted = loaded
    path, = folder.glob(pattern)
    content = path.read_bytes()

    @settings(max_examples=examples, deadline=None)
    @given(st.data())
    def check(data):
        if pattern.startswith("test"):
            for cache in folder.glob("pixels_*"):
                cache.unlink()
        path.write_bytes(damage(content, data))
        try:
            assert same(load(), wanted)
        except UserError as error:
            assert "fire_dataset" in str(error) and "Data_Preparation.py" in str(error) and "--overwrite" in str(error)

    try:
        check()
    finally:
        path.write_bytes(content)


def test_resized_images_of_other_data_are_not_used(loaded, images, backbone, tmp_path):
    """A cache that was copied from elsewhere is made anew, bit for bit as if it had not been there."""
    folder, load, _ = loaded
    load()
    other = prepared(tmp_path, images, "--seed", "9") / "fire_dataset"
    cache = Path(shutil.copy(*folder.glob("pixels_*"), other))
    strange = cache.read_bytes()
    config, processor = parse(PreparationConfig, ["--root", str(tmp_path)]), models.load_processor(backbone)
    first = load_task(FIRE, config, processor)
    rebuilt = cache.read_bytes()
    cache.unlink()
    assert same(load_task(FIRE, config, processor), first) and cache.read_bytes() == rebuilt != strange


def test_images_are_read_only_as_fast_as_they_are_used():
    taken = []

    def items():
        for item in range(200):
            taken.append(item)
            yield item

    def slow(item):
        time.sleep(item % 3 / 1000)
        return item

    with ThreadPoolExecutor(4) as pool:
        for used, result in enumerate(in_order(pool, slow, items())):
            assert result == used and len(taken) <= used + AHEAD
    assert len(taken) == 200
