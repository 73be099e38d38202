"""Tests of what a model sees: what its own image processor makes of an image, kept on disk and read as it is used."""

import os
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
PROCESSORS = [  # class, settings, and whether what it makes of pixels is linear
    ("Beit", {"size": SQUARE, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, True),
    ("Beit", {"size": SQUARE, "do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 50.0, 40.0]}, True),
    ("Beit", {"size": {"height": 44, "width": 44}, "do_center_crop": True, "crop_size": SQUARE}, True),
    ("ViT", {"size": SQUARE, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, True),
    ("ViT", {"size": {"height": 20, "width": 44}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, True),
    ("ViT", {"size": SQUARE, "do_pad": True, "pad_size": LARGER}, False),
    ("ViT", {"size": SQUARE, "do_pad": True, "pad_size": LARGER, "do_normalize": False}, True),
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


def everything(data):
    return [tensor for name in SPLITS for tensor in (getattr(data, name).inputs[:], getattr(data, name).labels)]


def test_a_model_sees_what_its_processor_gives(root):
    """For every image of every split; as uint8 wherever that is enough."""
    images = load_from_disk(str(root / "fire_dataset"))
    for kind, settings, linear in PROCESSORS:
        data, processor = load(root, kind, settings), processor_of(kind, settings)
        for name in SPLITS:
            split = getattr(data, name)
            wanted = torch.cat([processor(image, return_tensors="pt").pixel_values for image in images[name]["image"]])
            seen = split.batch(torch.arange(len(split)))
            assert seen.dtype == torch.float32 and seen.shape == wanted.shape, (kind, settings)
            assert (seen - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max()), (kind, settings)
            assert split.labels.tolist() == images[name]["label"]
            assert split.inputs.dtype == (torch.uint8 if linear else torch.float32), (kind, settings)


def test_a_processor_that_makes_no_pictures_of_one_size_is_refused(root):
    before = set((root / "fire_dataset").iterdir())
    for kind, settings, reason in [("CLIP", {"size": SMALL, "do_center_crop": False}, r"different sizes \(\d+ x \d+ pixels"),
                                   ("Siglip2", {}, "cannot be used .*no picture"),
                                   ("ConvNext", {"size": SQUARE}, "cannot be used .*;")]:
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
        with pytest.raises(IndexError):
            stored[len(whole)]
    assert both.tasks.tolist() == [0] * len(data.test) + [1] * len(data.validation)
    assert both.labels.tolist() == [*data.test.labels.tolist(), *data.validation.labels.tolist()]
    rows = torch.tensor([5, 0, 4, 1])
    part = both.take(rows)
    assert torch.equal(both.batch(rows), torch.cat([part.batch(torch.arange(len(part))) for part in sets])[rows])
    assert torch.equal(part.batch(torch.arange(4)), both.batch(rows)) and torch.equal(part.tasks, both.tasks[rows])
    with pytest.raises(UserError, match="differ in size .*20, 44"):
        together([data.test, load(root, "ViT", {"size": {"height": 20, "width": 44}}).test])


def test_large_sets_stay_on_disk(root, monkeypatch):
    """On a device with its own memory, few images are copied to it as a whole; features are taken as they are."""
    data = load(root).train
    assert isinstance(data.to(torch.device("cpu")).inputs, StoredImages)
    assert data.to(torch.device("meta")).inputs.device.type == "meta"
    monkeypatch.setattr(tensors, "FEW", data.inputs.nbytes - 1)
    moved = data.to(torch.device("meta"))
    assert isinstance(moved.inputs, StoredImages) and moved.batch(torch.arange(2)).device.type == "meta"
    features = ImageSet(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0]))
    assert features.batch(torch.tensor([2, 0])).tolist() == [[4, 5], [0, 1]]


def test_a_damaged_file_of_pixels_is_made_anew(root, tmp_path):
    """At once if it is damaged anywhere but in an image; else a line tells so when that image is read, and no earlier."""
    shutil.copytree(root / "fire_dataset", tmp_path / "fire_dataset", ignore=shutil.ignore_patterns("pixels_*"))
    wanted = everything(load(tmp_path))
    path, = (tmp_path / "fire_dataset").glob("pixels_*")
    content = path.read_bytes()
    header, tail = 8 + int.from_bytes(content[:8], "little"), len(content) - 12 * 20
    for damaged in (b"", content[:header], content[:tail], content[:-1], content + b"\0", b"[" * len(content),
                    content[:header] + content[header + 3072:],
                    *(content[:place] + bytes([content[place] ^ 16]) + content[place + 1:]
                      for place in [0, 4, *range(8, header, 150), *range(tail, len(content), 80)])):
        path.write_bytes(damaged)
        assert all(map(torch.equal, everything(load(tmp_path)), wanted)) and path.read_bytes() == content
    row = wanted[0][3].numpy().tobytes()
    for damaged in (content.replace(row, bytes([row[0] ^ 1]) + row[1:]), content.replace(row, row[::-1])):
        path.write_bytes(damaged)
        data = load(tmp_path)
        assert torch.equal(data.train.inputs[2], wanted[0][2])
        with pytest.raises(UserError, match=rf"{re.escape(str(path))} is damaged .*; delete it, then run the same command again"):
            data.train.batch(torch.tensor([0, 3]))
        path.unlink()
        assert all(map(torch.equal, everything(load(tmp_path)), wanted)) and path.read_bytes() == content


def test_one_bad_read_is_no_damage_and_forked_processes_do_not_share_a_place(root, monkeypatch):
    inputs, wanted, right, bad = load(root).train.inputs, load(root).train.inputs[:2], os.pread, []
    before = os.lseek(inputs.parts[0].file.raw.fileno(), 0, os.SEEK_CUR)
    monkeypatch.setattr(os, "pread", lambda *where: bad.pop()(right(*where)) if bad else right(*where))
    for row, failure in enumerate((lambda content: b"", lambda content: content[::-1])):
        bad.append(failure)
        assert torch.equal(inputs[row], wanted[row]) and not bad
    assert os.lseek(inputs.parts[0].file.raw.fileno(), 0, os.SEEK_CUR) == before
