"""Tests of what a model sees: what its own image processor makes of an image, kept on disk and read as it is used."""

import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from datasets import load_from_disk
from image_sources import FIRE, prepared
from PIL import Image as PILImage

from common.cli.flags import PreparationConfig
from common.cli.parser import parse
from common.data import tensors
from common.data.pixels import StoredImages
from common.data.splits import SPLITS
from common.data.tensors import ImageSet, load_task, together
from common.errors import UserError

SQUARE, SMALL, LARGER = {"height": 32, "width": 32}, {"shortest_edge": 40}, {"height": 40, "width": 48}
OTHER_SIZE = ("ViT", {"size": {"height": 20, "width": 44}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
PROCESSORS = [  # class, settings, and whether what it makes of pixels is linear
    ("Beit", {"size": SQUARE, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, True),
    ("Beit", {"size": SQUARE, "do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 50.0, 40.0]}, True),
    ("ViT", {"size": SQUARE, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, True),
    (*OTHER_SIZE, True),
    ("ViT", {"size": SQUARE, "do_pad": True, "pad_size": LARGER}, False),
    ("CLIP", {"size": SMALL, "crop_size": {"height": 64, "width": 48}}, True),  # larger than some of the images
    ("Bit", {"size": SMALL, "crop_size": SQUARE}, True),  # of DINOv2
    ("MobileViT", {"size": SMALL, "crop_size": SQUARE}, True),  # turns RGB into BGR
    ("EfficientNet", {"size": SQUARE, "rescale_offset": True, "include_top": False}, True),
    ("EfficientNet", {"size": SQUARE}, False),  # normalises even the pixels asked for as they are
]


def processor_of(kind, settings):
    return getattr(transformers, f"{kind}ImageProcessorPil")(**settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where 20 images are prepared, of five sizes, high and wide, smaller and larger than what models take."""
    top, rng = tmp_path_factory.mktemp("tensors"), np.random.default_rng(0)
    for label in "abcd":
        (top / "source" / label).mkdir(parents=True)
        for number, size in enumerate([(32, 32), (90, 30), (25, 60), (64, 48), (200, 150)]):
            rough = PILImage.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            rough.resize(size, PILImage.Resampling.BICUBIC).save(top / "source" / label / f"{number}.png")
    prepared(top, top / "source", count=5)
    return top


def load(root, kind="Beit", settings=None):
    return load_task(FIRE, parse(PreparationConfig, ["--root", str(root)]), processor_of(kind, settings or PROCESSORS[0][1]))


@pytest.mark.parametrize(("kind", "settings", "linear"), PROCESSORS)
def test_a_model_sees_what_its_processor_gives(root, kind, settings, linear):
    """For every image of every split; as uint8 wherever that is enough."""
    images, data, processor = load_from_disk(str(root / "fire_dataset")), load(root, kind, settings), processor_of(kind, settings)
    for name in SPLITS:
        split = getattr(data, name)
        wanted = torch.cat([processor(image, return_tensors="pt").pixel_values for image in images[name]["image"]])
        seen = split.batch(torch.arange(len(split)))
        assert seen.dtype == torch.float32 and seen.shape == wanted.shape
        assert (seen - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())
        assert split.labels.tolist() == images[name]["label"]
        assert split.inputs.dtype == (torch.uint8 if linear else torch.float32)


@pytest.mark.parametrize(("kind", "settings", "reason"), [
    ("CLIP", {"size": SMALL, "do_center_crop": False}, r"different sizes \(\d+ x \d+ pixels"),
    ("Siglip2", {}, "cannot be used .*no picture"), ("ConvNext", {"size": SQUARE}, "cannot be used .*;")])
def test_a_processor_that_makes_no_pictures_of_one_size_is_refused(root, kind, settings, reason):
    before = set((root / "fire_dataset").iterdir())
    with pytest.raises(UserError, match=f"^[^\n]*image processor of --model [^\n]*{reason}[^\n]*choose[^\n]*$"):
        load(root, kind, settings)
    assert set((root / "fire_dataset").iterdir()) == before


def test_images_on_disk_are_indexed_as_a_tensor_and_several_tasks_are_one_set(root):
    """Single rows, slices, any order, part of them; each image with its class within its task, all of one size."""
    data, sets = load(root), [load(root).test, load(root).validation]
    both = together(sets)
    for stored in (data.train.inputs, data.train.inputs.take(torch.tensor([7, 1, 1])), both.inputs):
        whole = torch.stack(list(stored))
        assert isinstance(stored, StoredImages) and stored.shape == whole.shape and stored.nbytes == whole.nbytes
        for rows in (0, -1, torch.tensor(2), slice(1, 3), slice(None), torch.tensor([2, 0, 2]), torch.arange(0)):
            assert torch.equal(stored[rows], whole[rows])
    assert both.tasks.tolist() == [0] * len(data.test) + [1] * len(data.validation)
    assert both.labels.tolist() == [*data.test.labels.tolist(), *data.validation.labels.tolist()]
    rows = torch.tensor([5, 0, 4, 1])
    part = both.take(rows)
    assert torch.equal(both.batch(rows), torch.cat([part.batch(torch.arange(len(part))) for part in sets])[rows])
    assert torch.equal(part.batch(torch.arange(4)), both.batch(rows)) and torch.equal(part.tasks, both.tasks[rows])
    with pytest.raises(UserError, match="differ in size .*20, 44"):
        together([data.test, load(root, *OTHER_SIZE).test])


def test_large_sets_stay_on_disk(root, monkeypatch):
    """On a device with its own memory, few images are copied to it as a whole; features are taken as they are."""
    data, device = load(root).train, torch.device("meta")
    assert isinstance(data.to(torch.device("cpu")).inputs, StoredImages) and data.to(device).inputs.device == device
    monkeypatch.setattr(tensors, "FEW", data.inputs.nbytes - 1)
    large = data.to(device)
    assert isinstance(large.inputs, StoredImages) and large.batch(torch.arange(2)).device == device
    features = ImageSet(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0]))
    assert features.batch(torch.tensor([2, 0])).tolist() == [[4, 5], [0, 1]]


def test_a_damaged_file_of_pixels_is_made_anew(root, tmp_path):
    """At once if it is cut short, of other images or damaged beside these; else a line says so when that image is read."""
    shutil.copytree(root / "fire_dataset", tmp_path / "fire_dataset", ignore=shutil.ignore_patterns("pixels_*"))
    wanted, fingerprint = load(tmp_path).train.inputs[:], load(tmp_path).fingerprint.encode("utf-32-le")
    path, = (tmp_path / "fire_dataset").glob("pixels_*")
    content = path.read_bytes()
    numbers = content.index(b"NUMPY", 100)  # where labels and checksums begin
    for damaged in (b"", b"[" * len(content), content[:40], content[:3000], content[:-1],
                    content.replace(fingerprint, fingerprint[::-1]),
                    *(content[:place] + bytes([content[place] ^ 16]) + content[place + 1:]
                      for place in range(numbers, len(content), 97))):
        path.unlink()  # in place, it would be changed for whoever reads it
        path.write_bytes(damaged)
        assert torch.equal(load(tmp_path).train.inputs[:], wanted) and path.read_bytes() == content
    row = wanted[3].numpy().tobytes()
    path.unlink()
    path.write_bytes(content.replace(row, row[::-1]))
    data = load(tmp_path).train
    assert torch.equal(data.inputs[2], wanted[2])
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} is damaged .*; delete it, then run the same command again"):
        data.batch(torch.tensor([0, 3]))
