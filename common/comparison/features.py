"""The plain backbone's pooled features at many depths, computed once and handed to every method that needs them."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from common.cli.flags import HardwareFlags
from common.comparison.timing import collect
from common.data.tensors import ImageSet
from common.training.blocks import block_names
from common.training.evaluate import logits_of

DEPTHS = 12  # at most, evenly spaced over the blocks
WIDEST = 20_000  # features of several depths together, for memory and time
EARLY = (3, 4)  # blocks behind which Any-SSR looks
HEAD_INPUT = "what reaches the head"

Depth = int | str  # number of blocks passed, 0 before the first, or HEAD_INPUT


@dataclass
class Features:
    """Features (N, K) of each split by depth. seconds: of an image up to there. blocks: how many the backbone has."""

    train: dict[Depth, np.ndarray]
    validation: dict[Depth, np.ndarray]
    test: dict[Depth, np.ndarray]
    seconds: dict[Depth, float]
    blocks: int

    @property
    def choices(self) -> list[tuple[Depth, ...]]:
        """Each depth alone, then several together: all blocks', or every second, third ... up to the last, the two choices
        of the most features that are not too many."""
        blocks = [depth for depth in self.train if depth != HEAD_INPUT]
        several = [tuple(blocks[::-1][::step][::-1]) for step in range(1, len(blocks))]
        fitting = [depths for depths in several if sum(self.train[depth].shape[1] for depth in depths) <= WIDEST]
        return [*((depth,) for depth in self.train), *(depths for depths in fitting[:2] if len(depths) > 1)]

    def together(self, depths: tuple[Depth, ...]) -> list[np.ndarray]:
        """Features of all these depths side by side, of each split."""
        splits = self.train, self.validation, self.test
        return [np.concatenate([split[depth] for depth in depths], axis=1) for split in splits]


def backbone_features(body: nn.Module, train: ImageSet, validation: ImageSet, test: ImageSet, config: HardwareFlags,
                      passed: Sequence[int] = ()) -> Features:
    """First token (the class token where there is one), mean and deviation of the tokens behind blocks, and what reaches the
    head, of the images of each split; one pass each. body: images to what reaches the head (B, D). passed: the numbers of
    blocks behind which to look, in order, 0 being before the first; by default DEPTHS of them and EARLY."""
    names = block_names(body)
    if not passed:
        evenly = np.linspace(1, len(names), min(len(names), DEPTHS)).round().astype(int)
        passed = sorted({*evenly.tolist(), *(number for number in EARLY if number <= len(names))})
    behind = [body.get_submodule(name) for name in names]
    seen: list[Tensor] = []

    def look(tokens: Tensor) -> None:
        tokens = tokens.flatten(1, -2)  # (B, N, D)
        deviation, mean = torch.std_mean(tokens, dim=1, correction=0)
        seen.append(torch.cat([tokens[:, 0], mean, deviation], dim=1))

    def enter(block: nn.Module, inputs: tuple, named: dict[str, Tensor]) -> None:
        look(inputs[0] if inputs else named["hidden_states"])

    def leave(block: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        look(output if isinstance(output, Tensor) else output[0])

    def read(inputs: Tensor) -> list[Tensor]:
        seen.clear()
        pooled = logits_of(body, inputs)
        return [*seen, pooled]

    with ExitStack() as hooks:
        for number in passed:
            hooks.enter_context(behind[number - 1].register_forward_hook(leave) if number else
                                behind[0].register_forward_pre_hook(enter, with_kwargs=True))
        found = [collect(body, images, config, read)[0] for images in (train, validation)]
        values, seconds = collect(body, test, config, read, behind)
    depths = [*passed, HEAD_INPUT]
    until = [seconds[number] for number in passed] + seconds[-1:]
    return Features(*(dict(zip(depths, split, strict=True)) for split in (*found, values)),
                    dict(zip(depths, until, strict=True)), len(names))


def depth_text(depths: tuple[Depth, ...]) -> str:
    """Depths as text."""
    blocks = [str(depth) for depth in depths if depth != HEAD_INPUT]
    return f"behind block {', '.join(blocks)}" if blocks else HEAD_INPUT
