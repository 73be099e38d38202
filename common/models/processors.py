"""The image processor beside a finished adapter: whether it makes the pictures that the backbone's makes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from transformers import AutoImageProcessor, BaseImageProcessor

from common.data.processing import PROBES, processed
from common.errors import UserError
from common.models.backbones import load_processor

# What a processor does, and the settings that say how.
STEPS = {"do_resize": ("size", "resample"), "do_center_crop": ("crop_size",), "do_rescale": ("rescale_factor",),
         "do_normalize": ("image_mean", "image_std")}
SAME = 0.01  # in what a model takes, where pixels span 2 or more: less is rounding in a settings file


def check_processor(place: str, where: str, hub: dict[str, Any], model: str) -> None:
    """Raise UserError if there is an image processor beside an adapter that makes other pictures than that of a backbone.

    place: for messages. where, hub: a folder, or a name on the Hub with `revision` and `subfolder`. model: the backbone's name.
    """
    own = load_processor(model)
    theirs = _beside(place, where, hub, own)
    if theirs is None or _alike(theirs, own, model):
        return
    said = ", ".join(_differences(theirs, own)) or f"it is a {type(theirs).__name__}, not a {type(own).__name__}"
    raise UserError(f"{place} was trained with other pictures than --model {model} takes ({said}); all experts see the same: "
                    "train it with these, or give --model a copy of the backbone with the adapter's preprocessor_config.json")


def _beside(place: str, where: str, hub: dict[str, Any], own: BaseImageProcessor) -> BaseImageProcessor | None:
    """The image processor beside an adapter, None if there is none."""
    try:
        settings = BaseImageProcessor.get_image_processor_dict(where, **hub)[0]
    except (OSError, ValueError):
        return None
    try:
        return AutoImageProcessor.from_pretrained(where, backend="pil", trust_remote_code=False, **hub)
    except Exception:  # of a kind that is not known here, or that the file does not name
        pass
    try:
        return type(own).from_dict(settings)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{place} has an image processor that cannot be read ({reason}); remove its preprocessor_config.json "
                        "if it was trained with that of --model") from error


def _alike(one: BaseImageProcessor, other: BaseImageProcessor, model: str) -> bool:
    """Whether two processors make the same of pictures of several sizes and shapes, but for rounding."""
    rng = np.random.default_rng(0)
    for wide, high in PROBES:
        image = PILImage.fromarray(rng.integers(0, 256, (high, wide, 3), dtype=np.uint8))
        ours = processed(other, [image], False, model)
        try:
            theirs = processed(one, [image], False, model)
        except UserError:
            return False
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=0, atol=SAME):
            return False
    return True


def _differences(theirs: BaseImageProcessor, own: BaseImageProcessor) -> Iterator[str]:
    """Settings that count and differ, as "size = 256, not 224"."""
    settings = theirs.to_dict(), own.to_dict()
    for step, names in STEPS.items():
        does, ours = (bool(one.get(step)) for one in settings)
        if does != ours:
            yield f"{step} = {does}, not {ours}"
        for name in names if does and ours else ():
            one, other = (_plain(some.get(name)) for some in settings)
            if one != other:
                yield f"{name} = {one}, not {other}"


def _plain(value: Any) -> str:
    """A setting as text, whatever type holds it."""
    if isinstance(value, dict):
        return " x ".join(f"{number}" if side in ("height", "width") else f"{side} {number}"
                          for side, number in sorted(value.items()) if number is not None)
    return ", ".join(f"{number:g}" for number in np.atleast_1d(value)) if value is not None else "none"
