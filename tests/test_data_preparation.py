"""Tests of Data_Preparation.py: what is chosen, what a second run does, and what a refusal leaves."""

import json
import shutil
from collections import Counter

import pytest
from hub import FIRE_CLASSES, image_dataset, png
from image_sources import PER_CLASS, all_identities, left_in, one_parquet, opened, prepared, write_folders, write_parquet
from pipeline import hashes

from common.errors import UserError


@pytest.fixture
def images(tmp_path):
    return write_folders(tmp_path / "images" / "FireRisk")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


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
    path = tmp_path / "7" / "fire_dataset" / "manifest.json"  # as an earlier version wrote it, without what came later
    manifest = {key: value for key, value in found["7"].items() if key not in ("hub_choice", "own_splits")}
    path.write_text(json.dumps(manifest))
    assert prepared(tmp_path / "7", images, "--seed", "7") == manifest


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


def test_what_is_there_is_replaced_only_with_overwrite(images, root, tmp_path):
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
    prepared(root, source, "--overwrite")
    write_parquet(source, image_dataset(FIRE_CLASSES, 6))
    (root / "fire_dataset" / "mine.txt").write_text("mine")
    prepared(root, source, "--overwrite", count="all")
    assert len(all_identities(root)) == 24 and [path.name for path in root.iterdir()] == ["fire_dataset"]
    assert not (root / "fire_dataset" / "mine.txt").exists()
