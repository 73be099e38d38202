"""The one evaluation that every script uses, its precision, and features computed once."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from common.cli.flags import HardwareFlags
from common.data.tensors import ImageSet
from common.training import distributed
from common.training.distributed import device_of
from common.training.memory import in_batches
from common.training.objective import CROSS_ENTROPY, Objective

EVALUATION_BATCH = 64


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits (B, C) of an image classifier or of a plain head."""
    output = model(inputs)
    return output if isinstance(output, Tensor) else output.logits


def autocast(config: HardwareFlags, device: torch.device) -> AbstractContextManager:
    """The precision of training on `device`: bf16 autocast, or nothing for fp32.

    A CPU takes bf16 only where it multiplies it in hardware (AVX512-BF16 or AMX); elsewhere bf16 is emulated and slower.
    """
    in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() if device.type == "cpu" else (
        device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    if config.precision == "bf16" or (config.precision == "auto" and in_hardware):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


@torch.no_grad()
def evaluate(model: nn.Module, data: ImageSet, config: HardwareFlags, objective: Objective = CROSS_ENTROPY,
             between: Callable[[], None] | None = None) -> tuple[np.ndarray, float]:
    """Class probabilities (N, C) in order, and the weighted mean loss, in evaluation mode and fp32.

    between: called equally often in all processes, which have a share of the rows each (`distributed.share`) and all return
    the whole.
    """
    device = device_of(config)
    model.to(device).eval()
    data = data.to(device)
    labels, weights = objective.labels(data), objective.weights(data)
    total, probabilities = torch.zeros((), device=device), []
    own, counted = distributed.share(len(data))
    for batch in own.split(EVALUATION_BATCH):
        for rows, logits in in_batches(batch, EVALUATION_BATCH, lambda rows: logits_of(model, data.batch(rows)).float()):
            kept, counted = rows[:counted], max(counted - len(rows), 0)
            total += (objective.losses(logits[: len(kept)], labels[kept]) * weights[kept]).sum()
            probabilities.append(logits.softmax(1))
        if between is not None:
            between()
    (total,) = distributed.all_reduce([total])
    return distributed.gathered(torch.cat(probabilities), len(data)).cpu().numpy(), total.item() / weights.sum().item()


@torch.no_grad()
def features(model: nn.Module, data: ImageSet, config: HardwareFlags) -> ImageSet:
    """What reaches `model.classifier` for each image: features (N, D), computed once, with the labels."""
    device = device_of(config)
    model.to(device).eval()
    data = data.to(device)
    own, _ = distributed.share(len(data))
    seen: list[Tensor] = []

    def compute(rows: Tensor) -> Tensor:
        model(data.batch(rows))
        return seen.pop()

    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with hook:
        pooled = [result for _, result in in_batches(own, EVALUATION_BATCH, compute)]
    return ImageSet(distributed.gathered(torch.cat(pooled), len(data)), data.labels)
