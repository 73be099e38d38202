"""Learning rates over the steps of a training and by the depth of a layer; which parameters are decayed."""

import math
import re
from collections.abc import Callable

from torch import nn

from common.training.blocks import block_names


def warmup_cosine(warmup: int, total: int) -> Callable[[int], float]:
    """Share of the peak rate at each step: linear up over `warmup` steps, then half a cosine down towards zero."""

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return share


def parameter_groups(model: nn.Module, layer_decay: float = 1.0) -> list[dict]:
    """AdamW groups of all trainable parameters, each with the `lr_share` of the learning rate it has.

    Every block learns at `layer_decay` times the rate of the block above it, what lies below the blocks at the least, what
    lies above them, such as the head, at the full rate (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT). Biases, norms,
    positions and special tokens, which have no `weight_decay`, are in groups of their own (BEiT's and MAE's recipes).
    """
    blocks, below = block_names(model), 0
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for key, parameter in model.named_parameters():  # in the order from the embeddings to the head
        below = next((index for index, block in enumerate(blocks, start=1) if key.startswith(f"{block}.")), below)
        inside = any(key.startswith(f"{block}.") for block in blocks)
        level = 0 if below == len(blocks) and not inside else len(blocks) + 1 - below
        decayed = parameter.ndim > 1 and not re.search("position|token", key)
        if parameter.requires_grad:
            groups.setdefault((layer_decay**level, decayed), []).append(parameter)
    return [{"params": parameters, "lr_share": share, **({} if decayed else {"weight_decay": 0.0})}
            for (share, decayed), parameters in groups.items()]
