"""Learning rates: over the steps of a training, and by the depth of a layer."""

import math
from collections.abc import Callable

from torch import nn


def warmup_cosine(warmup: int, total: int) -> Callable[[int], float]:
    """Share of the peak rate at each step: linear up over `warmup` steps, then half a cosine down towards zero."""

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return share


def layer_decay_groups(model: nn.Module, decay: float) -> list[dict]:
    """Parameter groups of a BEiT classifier in which every block learns at `decay` times the rate of the block above.

    The head has the full rate, the embeddings the least (Bao et al. 2022; Clark et al. 2020, ELECTRA).
    """
    depth = model.config.num_hidden_layers
    groups: dict[float, list[nn.Parameter]] = {}
    for key, parameter in model.named_parameters():
        if key.startswith("beit.layers."):
            level = depth - int(key.split(".")[2])
        else:
            level = depth + 1 if key.startswith("beit.embeddings") else 0
        groups.setdefault(decay**level, []).append(parameter)
    return [{"params": parameters, "lr_share": share} for share, parameters in groups.items()]
