"""Random mirroring and shifting of training images."""

import torch
from torch import Tensor

from common.cli.flags import TrainingFlags


def moves_of(step: Tensor, inputs: Tensor, generator: torch.Generator, config: TrainingFlags) -> Tensor | None:
    """How each image of a step is moved (3, N): mirrored (1) or not (0), and by how much down and right, from 0.

    None if the inputs are no images. Drawn for the whole step, so that all processes know of all images.
    """
    if inputs.ndim != 4:
        return None
    drawn = []
    for batch in step.split(config.batch_size):
        mirrored = torch.rand(1, len(batch), generator=generator) < 0.5
        shifts = torch.randint(2 * (inputs.shape[2] // 8) + 1, (2, len(batch)), generator=generator)
        drawn.append(torch.cat([mirrored.long(), shifts]))
    return torch.cat(drawn, dim=1)


def flip_and_shift(images: Tensor, moves: Tensor) -> Tensor:
    """Mirror images (B, C, S, S) and shift each by up to an eighth of its size, edges repeated, as `moves` (3, B) tell."""
    height, width = images.shape[2:]
    mirrored, down, right = moves.to(images.device)[:, :, None]  # each (B, 1)
    rows = (down - height // 8 + torch.arange(height, device=images.device)).clamp(0, height - 1)  # (B, H)
    columns = (right - height // 8 + torch.arange(width, device=images.device)).clamp(0, width - 1)  # (B, W)
    columns = torch.where(mirrored > 0, width - 1 - columns, columns)
    return images.gather(2, rows[:, None, :, None].expand_as(images)).gather(3, columns[:, None, None].expand_as(images))
