"""What a model sees of an image, as its own image processor says: once as pixels, and how these are scaled."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor
from transformers import BaseImageProcessor

from common.errors import UserError

# Width and height of what a processor is tried on: small, wide, high and large, so that what it does to some images only,
# such as padding, shows.
PROBES = [(12, 8), (400, 40), (40, 300), (448, 448)]
UNSCALED = {"do_rescale": False, "do_normalize": False}


def affine_of(processor: BaseImageProcessor) -> tuple[Tensor, Tensor] | None:
    """scale, offset (C,): what this processor makes of an image is `pixels * scale + offset` of the uint8 pixels that it
    makes unscaled, whatever its settings mean.

    None if it is not so (a processor that pads after it has scaled, for example): then only its result can be kept.
    """
    rng = np.random.default_rng(0)
    images = [PILImage.fromarray(rng.integers(0, 256, (high, wide, 3), dtype=np.uint8)) for wide, high in PROBES]
    try:
        before, after = ([_pixel_values(processor, image, **flags)[0].double().flatten(1) for image in images]
                         for flags in (UNSCALED, {}))
        pixels, wanted = torch.cat(before, 1), torch.cat(after, 1)  # (C, P)
        lowest, highest = pixels.argmin(1, keepdim=True), pixels.argmax(1, keepdim=True)
        span = pixels.gather(1, highest) - pixels.gather(1, lowest)
        scale = (wanted.gather(1, highest) - wanted.gather(1, lowest)) / span
        offset = wanted.gather(1, lowest) - scale * pixels.gather(1, lowest)
        exact = torch.allclose(pixels * scale + offset, wanted, rtol=1e-6, atol=1e-6 * max(1.0, float(wanted.abs().max())))
    except Exception:  # foreign code with any settings: what is wrong will show, and be told, with the images themselves
        return None
    if not exact or not torch.equal(pixels, pixels.to(torch.uint8).double()):
        return None
    return scale.flatten().float(), offset.flatten().float()


def processed(processor: BaseImageProcessor, images: Sequence[PILImage.Image], unscaled: bool, model: str) -> Tensor:
    """What the processor makes of each image, (N, C, H, W): uint8 if `unscaled`, else float32.

    Raises UserError, naming the model, if it can make nothing of them, or pictures of different sizes.
    """
    try:
        made = [_pixel_values(processor, image, **(UNSCALED if unscaled else {})) for image in images]
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the image processor of --model {model} cannot be used ({reason}); choose another model") from error
    return torch.cat([same_size(image, made[0].shape, model) for image in made]).to(torch.uint8 if unscaled else torch.float32)


def same_size(image: Tensor, shape: Sequence[int], model: str) -> Tensor:
    """Images (n, C, H, W). Raises UserError, naming the model, if they are not of the shape (any, C, H, W)."""
    if image.shape[1:] != torch.Size(shape[1:]):
        sizes = " and ".join("{1} x {0} pixels".format(*size[2:]) for size in (shape, image.shape))
        raise UserError(f"the image processor of --model {model} makes pictures of different sizes ({sizes}); choose a model "
                        "whose processor resizes or crops all to one size, or images of one size")
    return image


def _pixel_values(processor: BaseImageProcessor, image: PILImage.Image, **flags: Any) -> Tensor:
    """What the processor makes of one image: (1, C, H, W)."""
    values = torch.as_tensor(processor(image, return_tensors="pt", **flags)["pixel_values"])
    if values.ndim != 4 or len(values) != 1:
        raise ValueError(f"it makes no picture of an image, but numbers of shape {tuple(values.shape)}")
    return values
