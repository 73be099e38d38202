"""One pass of a model over images: what it gives for each of them, in order, and how long it takes."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

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
def collect(model: nn.Module, data: ImageSet, config: HardwareFlags, read: Callable[[Tensor], Sequence[Tensor]] | None = None,
            parts: Sequence[nn.Module] = ()) -> tuple[list[np.ndarray], list[float]]:
    """What `read(inputs)` gives for all N images, each a tensor (B, ...), as arrays (N, ...); and seconds of one image.

    read: by default the model's logits. The seconds are those until each of `parts` of the model begins, in the model's order,
    and until the end: of the median batch but the first. Several processes share out the images; the time is then that of all
    together.
    """
    device, read = device_of(config), read or (lambda inputs: (logits_of(model, inputs),))
    model.to(device).eval()
    stamps: list[float] = []
    taken: list[list[float]] = []

    def compute(rows: Tensor) -> list[Tensor]:
        inputs = data.batch(rows).to(device)
        stamps.clear()
        started = _now(device)
        values = [value.float() for value in read(inputs)]
        stamps.append(_now(device))
        taken.append([(stamp - started) / len(rows) for stamp in stamps])
        return values

    own, _ = distributed.share(len(data))
    with ExitStack() as hooks:
        for part in parts:
            hooks.enter_context(part.register_forward_pre_hook(lambda *_: stamps.append(_now(device))))
        batches = [values for _, values in in_batches(own, EVALUATION_BATCH, compute)]
    columns = [distributed.gathered(torch.cat(values), len(data)).cpu().numpy() for values in zip(*batches, strict=True)]
    (rates,) = distributed.all_reduce([torch.tensor(1 / np.median(taken[1:] or taken, axis=0), device=device)])
    return columns, (1 / rates).tolist()


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
