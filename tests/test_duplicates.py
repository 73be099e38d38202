"""Tests of near-duplicates and honest splits: what counts as one, and on which side of the split it is."""

import io
import itertools
import shutil
from collections import Counter

import numpy as np
import pytest
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from PIL import ImageEnhance, ImageOps

from common.cli.flags import PreparationConfig
from common.cli.parser import parse
from common.data import duplicates
from common.data.duplicates import NEAR_BITS, NEAR_COLOUR, groups, have_near
from common.data.hashes import BITS_BYTES, HASH_BYTES, perceptual_hash
from common.data.prepare import prepare
from common.data.sources import SPLITS
from common.data.splits import grouped_split
from common.errors import UserError
from common.tasks import DOCUMENTED

CLASSES = ["dunes", "forest", "town"]


def scene(seed, size=(96, 64)):
    """A picture like no other: large soft patches, and finer ones upon them."""
    rng = np.random.default_rng(seed)
    patches = [PILImage.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for side in (4, 16)]
    layers = [image.resize(size, PILImage.Resampling.BICUBIC) for image in patches]
    return PILImage.blend(*layers, 0.4)


def jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=50)
    return PILImage.open(buffer).convert("RGB")


def grainy(image):
    noise = np.random.default_rng(0).normal(0, 4, (image.height, image.width, 3))
    return PILImage.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def shifted(image):
    """The next frame of a film: everything is one pixel to the left."""
    return image.transform(image.size, PILImage.Transform.AFFINE, (1, 0, 1, 0, 1, 0))


def brighter(image):
    return ImageEnhance.Brightness(image).enhance(1.1)


CHANGES = [jpeg, shifted, brighter, grainy, lambda image: image.resize((image.width // 2, image.height // 2)),
           lambda image: jpeg(ImageOps.mirror(image))]


def hashes_of(images):
    return np.stack([perceptual_hash(image) for image in images])


def near(one, other):
    turned = one.copy()
    turned[BITS_BYTES // 2 : BITS_BYTES] ^= 255
    bits = min(np.unpackbits(bits[:BITS_BYTES] ^ other[:BITS_BYTES]).sum() for bits in (one, turned))
    colour = np.abs(one[BITS_BYTES:].astype(int) - other[BITS_BYTES:]).max()
    return bits <= NEAR_BITS and colour <= NEAR_COLOUR


def close_hashes(count, seed):
    """Random hashes, most of which are near to some others, as they are or mirrored."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 256, (count // 4, BITS_BYTES), dtype=np.uint8)[rng.integers(0, count // 4, count)]
    bits = kinds ^ np.packbits(rng.random((count, 8 * BITS_BYTES)) < 0.12, axis=1)  # two of one kind differ in about 54 bits
    bits[rng.random(count) < 0.5, BITS_BYTES // 2 :] ^= 255
    return np.concatenate([bits, rng.integers(100, 150, (count, HASH_BYTES - BITS_BYTES), dtype=np.uint8)], axis=1)


def test_a_picture_changed_a_little_is_a_near_duplicate_of_itself_and_of_no_other():
    scenes = [scene(seed) for seed in range(30)]
    before = hashes_of(scenes)
    for change in CHANGES:
        after = hashes_of([change(image) for image in scenes])
        assert np.array_equal([[near(a, b) for b in before] for a in after], np.eye(30, dtype=bool))
    assert len(np.unique(groups(before))) == 30


def test_even_pictures_are_told_by_their_colour():
    """Black frames are near-duplicates, whatever the noise upon them; black and white ones are not."""
    dark, darker, bright = (PILImage.new("RGB", (96, 64), (value,) * 3) for value in (16, 4, 240))
    assert np.array_equal(groups(hashes_of([dark, bright, grainy(darker), dark])), [0, 1, 0, 0])


def test_groups_and_neighbours_are_those_of_the_definition(monkeypatch):
    """Whatever number of pairs is looked at together; groups are joined along chains."""
    hashes = close_hashes(60, seed=1)
    pairs = np.array([[near(one, other) for other in hashes] for one in hashes])
    assert 60 < pairs.sum() < 600
    reachable = np.linalg.matrix_power(pairs.astype(float), 60) > 0
    for rows, others, joined in ((1, 1, 0), (7, 5, 3), (16, 8192, 2**22)):
        for name, value in (("ROWS_AT_ONCE", rows), ("OTHERS_AT_ONCE", others), ("PAIRS_AT_ONCE", joined)):
            monkeypatch.setattr(duplicates, name, value)
        found = groups(hashes)
        assert np.array_equal(found[:, None] == found[None], reachable)
        assert sorted(set(found)) == list(range(len(set(found))))
        assert np.array_equal(have_near(hashes[:20], hashes[20:]), pairs[:20, 20:].any(axis=1))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_grouped_splits_keep_groups_together(data):
    """Every image is in one split; none is further from 60/20/20 of a class than its largest group; the seed decides."""
    sizes = data.draw(st.lists(st.lists(st.integers(1, 8), min_size=12, max_size=30), min_size=1, max_size=4))
    labels = np.concatenate([np.full(sum(of_class), label) for label, of_class in enumerate(sizes)])
    numbers = np.repeat(np.arange(sum(map(len, sizes))), np.concatenate(sizes))
    splits = grouped_split(labels, numbers, 3, list("abcd"))
    assert sorted(np.concatenate(list(splits.values()))) == list(range(len(labels)))
    sides = {name: set(numbers[rows]) for name, rows in splits.items()}
    assert sum(map(len, sides.values())) == len(set(numbers))
    for label, of_class in enumerate(sizes):
        for name, share in SPLITS.items():
            assert abs((labels[splits[name]] == label).sum() - share * sum(of_class)) <= max(of_class) + 1
    again, other = (grouped_split(labels, numbers, seed, list("abcd")) for seed in (3, 4))
    assert all(np.array_equal(splits[name], again[name]) for name in SPLITS)
    assert any(not np.array_equal(splits[name], other[name]) for name in SPLITS)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Class folders with 20 films each of three frames: a scene and two near-duplicates of it."""
    folder = tmp_path_factory.mktemp("films")
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for number in range(20):
            first = scene(100 * label + number)
            for frame, image in enumerate([first, shifted(first), brighter(first)]):
                image.save(folder / name / f"{number:02d}_{frame}.png")
    return folder


def prepared(root, source, *flags):
    """Prepare all images; return the manifest and, by split, the hashes of its images and its labels."""
    argv = ["--root", str(root), "--fire_source", str(source), "--fire_classes", *CLASSES, "--images_per_class", "all",
            *flags]
    manifest = prepare(DOCUMENTED[0], parse(PreparationConfig, argv))
    data = load_from_disk(str(root / "fire_dataset"))
    return manifest, {name: (hashes_of(split["image"]), split["label"]) for name, split in data.items()}


def test_the_manifest_tells_how_many_test_images_have_a_near_duplicate_and_grouped_splits_leave_none(films, tmp_path):
    """Of three frames at random, most have; grouped, every class is still cut 60/20/20."""
    manifest, splits = prepared(tmp_path / "random", films)
    train, test = splits["train"][0], splits["test"][0]
    assert manifest["near_duplicates_in_test"] == sum(any(near(one, other) for other in train) for one in test) > 18
    manifest, splits = prepared(tmp_path / "grouped", films, "--split", "grouped")
    assert manifest["near_duplicates_in_test"] == 0 and manifest["split"] == "grouped"
    assert [Counter(labels) for _, labels in splits.values()] == [dict.fromkeys(range(3), count) for count in (36, 12, 12)]
    for one, other in itertools.combinations(splits, 2):
        assert not have_near(splits[one][0], splits[other][0]).any()


def test_a_class_of_one_group_cannot_be_split(films, tmp_path):
    """The line names the class and the way out, and nothing is written."""
    for name in CLASSES[:2]:
        shutil.copytree(films / name, tmp_path / "films" / name)
    (tmp_path / "films" / "town").mkdir()
    for frame in range(9):
        scene(7).save(tmp_path / "films" / "town" / f"{frame}.png")
    with pytest.raises(UserError, match="grouped leaves .* without 'town'.* 1 groups .* --split random"):
        prepared(tmp_path / "root", tmp_path / "films", "--split", "grouped")
    assert list((tmp_path / "root").rglob("*")) == []
