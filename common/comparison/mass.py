"""MASS: the expert whose update reads most of what reaches a late layer answers alone; nothing is fitted to choose it."""

import torch
from torch import Tensor

from common.comparison.inputs import Inputs
from common.comparison.merges import svd_of_product
from common.comparison.routers import TaskRouter, one_expert
from common.comparison.score import Scores
from common.comparison.timing import collect
from common.training.evaluate import logits_of

SHARES = (1.0, 0.5, 0.25, 0.1)  # of an update's singular vectors, the largest first


def mass(inputs: Inputs) -> Scores:
    """MASS (Crisostomi et al. 2026, section 3, router by projection residuals), then one expert.

    For each expert, the share of a layer's input, in the plain backbone, that lies outside of the space of the expert's
    largest right singular vectors; the smallest chooses. The layer, the first of a late MLP, and the number of vectors are
    chosen by validation images.
    """
    layers = _late_layers(inputs)
    parts = [inputs.body.get_submodule(name) for name in layers]
    spaces = [[svd_of_product(up, down)[2] for down, up in inputs.adapters[name]] for name in layers]  # (d_in, r)
    seen: list[Tensor] = []

    def look(space: list[Tensor], given: tuple) -> None:
        """The shares inside (B, shares, E) of each expert's space."""
        tokens = given[0].flatten(1, -2)  # (B, N, D)
        whole = tokens.square().sum(-1)
        inside = [(tokens @ vectors.to(tokens)).square().cumsum(-1) / whole[..., None] for vectors in space]  # (B, N, r)
        kept = [[own[..., max(1, round(share * own.shape[-1])) - 1].mean(1) for own in inside] for share in SHARES]
        seen.append(torch.stack([torch.stack(own, dim=-1) for own in kept], dim=1))

    def read(images: Tensor) -> list[Tensor]:
        seen.clear()
        logits_of(inputs.body, images)
        return [*seen]

    hooks = [part.register_forward_pre_hook(lambda _, given, space=space: look(space, given))
             for part, space in zip(parts, spaces, strict=True)]
    try:
        validation, _ = collect(inputs.body, inputs.validation, inputs.config, read)
        test, seconds = collect(inputs.body, inputs.test, inputs.config, read, parts)
    finally:
        for hook in hooks:
            hook.remove()
    return one_expert(inputs, [
        TaskRouter(known[:, number], asked[:, number], taken, 0, f"{name}, {share:.0%} of the singular vectors")
        for name, known, asked, taken in zip(layers, validation, test, seconds, strict=False)
        for number, share in enumerate(SHARES)])


def _late_layers(inputs: Inputs) -> list[str]:
    """The adapted layers of the second half of the model that widen, as the first of an MLP does; all of that half if none."""
    late = [*inputs.adapters][len(inputs.adapters) // 2 :]
    return [name for name in late if inputs.adapters[name][0][0].shape[1] < len(inputs.adapters[name][0][1])] or late
