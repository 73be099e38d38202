"""MASS: the expert whose update reads most of what reaches a layer answers alone; nothing is fitted to choose it."""

from contextlib import ExitStack

import torch
from torch import Tensor

from common.comparison.inputs import Inputs
from common.comparison.merges import svd_of_product
from common.comparison.routers import TaskRouter, one_expert
from common.comparison.score import Scores
from common.comparison.timing import collect
from common.training.evaluate import logits_of

KEPT = (1, 2, 4, 8, 16)  # singular vectors of an update, the largest first, as far as it has so many


def mass(inputs: Inputs) -> Scores:
    """MASS (Crisostomi et al. 2026, section 3, router by projection residuals), then one expert.

    For each expert, the share of a layer's input, in the plain backbone, that lies outside of the space of the expert's
    largest right singular vectors; the smallest chooses. The paper takes a late MLP; here any adapted layer may be it, and
    layer and number of vectors are chosen by validation images.
    """
    parts = [inputs.body.get_submodule(name) for name in inputs.adapters]
    spaces = [[svd_of_product(up, down)[2] for down, up in pairs] for pairs in inputs.adapters.values()]  # (d_in, r)
    seen: list[Tensor] = []
    batch = 0

    def look(space: list[Tensor], x: Tensor) -> None:
        """The shares inside (B, len(KEPT), E) of each expert's space."""
        tokens = x.reshape(batch, -1, x.shape[-1])  # (B, N, D), also where windows are folded into the batch
        whole = tokens.square().sum(-1, keepdim=True)
        inside = [((tokens @ vectors.to(tokens)).square() / whole).mean(1).cumsum(-1) for vectors in space]  # (B, r)
        seen.append(torch.stack([torch.stack([own[:, min(kept, own.shape[1]) - 1] for own in inside], dim=1)
                                 for kept in KEPT], dim=1))

    def read(images: Tensor) -> list[Tensor]:
        nonlocal batch
        batch = len(images)
        seen.clear()
        logits_of(inputs.body, images)
        return [*seen]

    with ExitStack() as hooks:
        for part, space in zip(parts, spaces, strict=True):
            hooks.enter_context(part.register_forward_pre_hook(lambda _, given, space=space: look(space, given[0])))
        validation, _ = collect(inputs.body, inputs.validation, inputs.config, read)
        test, seconds = collect(inputs.body, inputs.test, inputs.config, read, parts)
    return one_expert(inputs, [
        TaskRouter(known[:, number], asked[:, number], taken, 0, f"{name}, largest {kept} singular vectors")
        for name, known, asked, taken in zip(inputs.adapters, validation, test, seconds, strict=False)
        for number, kept in enumerate(KEPT)])
