"""Tests of near-duplicates and honest splits: what counts as one, and on which side of the split it is."""

import io
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sources import left_in, opened, prepared
from PIL import Image as PILImage
from PIL import ImageEnhance, ImageOps

from common.data import duplicates
from common.data.duplicates import BITS_BYTES, HASH_BYTES, NEAR_BITS, NEAR_COLOUR, groups, have_near, perceptual_hash
from common.data.sources import SPLITS
from common.data.splits import grouped_split
from common.errors import UserError


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


CHANGES = [jpeg, shifted, grainy, lambda image: ImageEnhance.Brightness(image).enhance(1.1),
           lambda image: image.resize((image.width // 2, image.height // 2)), lambda image: jpeg(ImageOps.mirror(image))]


def hashes_of(images):
    return np.stack([perceptual_hash(image) for image in images])


def near(one, other):
    turned = one.copy()
    turned[BITS_BYTES // 2 : BITS_BYTES] ^= 255
    bits = min(np.unpackbits(bits[:BITS_BYTES] ^ other[:BITS_BYTES]).sum() for bits in (one, turned))
    colour = np.abs(one[BITS_BYTES:].astype(int) - other[BITS_BYTES:]).max()
    return bits <= NEAR_BITS and colour <= NEAR_COLOUR


def near_pairs(hashes, others):
    return np.array([[near(one, other) for other in others] for one in hashes])


def close_hashes(count, seed):
    """Random hashes, most of which are near to some others, as they are or mirrored."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 256, (count // 4, BITS_BYTES), dtype=np.uint8)[rng.integers(0, count // 4, count)]
    bits = kinds ^ np.packbits(rng.random((count, 8 * BITS_BYTES)) < 0.12, axis=1)  # two of one kind differ in about 54 bits
    bits[rng.random(count) < 0.5, BITS_BYTES // 2 :] ^= 255
    return np.concatenate([bits, rng.integers(100, 150, (count, HASH_BYTES - BITS_BYTES), dtype=np.uint8)], axis=1)


def test_a_picture_changed_a_little_is_a_near_duplicate_of_itself_and_of_no_other():
    """Even pictures are told by their colour: black frames are near-duplicates, whatever the noise; black and white are not."""
    scenes = [scene(seed) for seed in range(20)]
    before = hashes_of(scenes)
    for change in CHANGES:
        assert np.array_equal(near_pairs(hashes_of(map(change, scenes)), before), np.eye(20, dtype=bool))
    dark, darker, bright = (PILImage.new("RGB", (96, 64), (value,) * 3) for value in (16, 4, 240))
    assert np.array_equal(groups(hashes_of([dark, bright, grainy(darker), dark])), [0, 1, 0, 0])


def test_groups_and_neighbours_are_those_of_the_definition(monkeypatch):
    """Whatever number of pairs is looked at together; groups are joined along chains."""
    hashes = close_hashes(60, seed=1)
    pairs = near_pairs(hashes, hashes)
    assert 60 < pairs.sum() < 600
    reachable = np.linalg.matrix_power(pairs.astype(float), 60) > 0
    for rows, others, joined in ((1, 1, 0), (7, 5, 3), (16, 8192, 2**22)):
        for name, value in (("ROWS_AT_ONCE", rows), ("OTHERS_AT_ONCE", others), ("PAIRS_AT_ONCE", joined)):
            monkeypatch.setattr(duplicates, name, value)
        found = groups(hashes)
        assert np.array_equal(found[:, None] == found[None], reachable)
        assert sorted(set(found)) == list(range(len(set(found))))
        assert np.array_equal(have_near(hashes[:20], hashes[20:]), pairs[:20, 20:].any(axis=1))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(1, 8), min_size=12, max_size=30), min_size=1, max_size=4))
def test_grouped_splits_keep_groups_together(sizes):
    """Every image is in one split; none is further from 60/20/20 of a class than its largest group; the seed decides."""
    labels = np.concatenate([np.full(sum(of_class), label) for label, of_class in enumerate(sizes)])
    numbers = np.repeat(np.arange(sum(map(len, sizes))), np.concatenate(sizes))
    splits, again, other = (grouped_split(labels, numbers, seed, list("abcd")) for seed in (3, 3, 4))
    assert sorted(np.concatenate(list(splits.values()))) == list(range(len(labels)))
    assert sum(len(set(numbers[rows])) for rows in splits.values()) == len(set(numbers))
    for label, of_class in enumerate(sizes):
        for name, share in SPLITS.items():
            assert abs((labels[splits[name]] == label).sum() - share * sum(of_class)) <= max(of_class) + 1
    assert all(np.array_equal(splits[name], again[name]) for name in SPLITS)
    assert any(not np.array_equal(splits[name], other[name]) for name in SPLITS)


def test_the_manifest_tells_how_many_test_images_have_a_near_duplicate_and_grouped_splits_leave_none(tmp_path):
    """Of films of three frames at random most have; grouped, every class is still cut 60/20/20, unless it is of one group."""
    films = tmp_path / "films"
    for label, name in enumerate(("dunes", "forest", "town")):
        (films / name).mkdir(parents=True)
        for number in range(20):
            first = scene(100 * label + number)
            for frame, image in enumerate([first, shifted(first), grainy(first)]):
                image.save(films / name / f"{number:02d}_{frame}.png")

    def split(folder, *flags):
        manifest = prepared(tmp_path / folder, films, "--fire_classes", "all", *flags, count="all")
        data = opened(tmp_path / folder)
        return manifest, {name: hashes_of(part["image"]) for name, part in data.items()}, data

    manifest, hashes, _ = split("random")
    assert manifest["near_duplicates_in_test"] == near_pairs(hashes["test"], hashes["train"]).any(axis=1).sum() > 18
    manifest, hashes, data = split("grouped", "--split", "grouped")
    assert manifest["near_duplicates_in_test"] == 0 and manifest["split"] == "grouped"
    assert [Counter(part["label"]) for part in data.values()] == [dict.fromkeys(range(3), count) for count in (36, 12, 12)]
    assert not any(have_near(hashes[one], hashes[other]).any() for one, other in itertools.combinations(hashes, 2))
    for path in (films / "town").iterdir():
        scene(7).save(path)
    with pytest.raises(UserError, match="grouped leaves .* without 'town'.* 1 groups .* --split random"):
        split("one group", "--split", "grouped")
    assert left_in(tmp_path / "one group") == []
