"""One pass of a model over images: what it says of each of them, in order, and how long it takes."""

import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from common.cli.flags import HardwareFlags
from common.data.tensors import ImageSet
from common.training import distributed
from common.training.distributed import device_of
from common.training.evaluate import EVALUATION_BATCH, logits_of
from common.training.memory import in_batches


@torch.no_grad()
def collect(model: nn.Module, data: ImageSet, config: HardwareFlags, read: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
            until: nn.Module | None = None) -> tuple[list[np.ndarray], float]:
    """What `read(inputs)` gives for all N images, each a tensor (B, ...), as arrays (N, ...); and the seconds of one image.

    read: by default the model's logits. until: the time counts until this part of the model begins. It is that of the median
    batch but the first. Several processes share out the images; the time is then that of all together.
    """
    device, read = device_of(config), read or (lambda inputs: (logits_of(model, inputs),))
    model.to(device).eval()
    stamps: list[float] = []
    taken: list[float] = []

    def compute(rows: Tensor) -> list[Tensor]:
        inputs = data.batch(rows).to(device)
        stamps.clear()
        started = _now(device)
        values = [value.float() for value in read(inputs)]
        stamps.append(_now(device))
        taken.append((stamps[0] - started) / len(rows))
        return values

    own, _ = distributed.share(len(data))
    hook = nullcontext() if until is None else until.register_forward_pre_hook(lambda *_: stamps.append(_now(device)))
    with hook:
        parts = [values for _, values in in_batches(own, EVALUATION_BATCH, compute)]
    columns = [distributed.gathered(torch.cat(values), len(data)).cpu().numpy() for values in zip(*parts, strict=True)]
    (rate,) = distributed.all_reduce([torch.tensor(1 / np.median(taken[1:] or taken), device=device)])
    return columns, 1 / rate.item()


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
