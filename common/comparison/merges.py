"""Merges: all experts' updates made into one, which costs nothing when images are answered. One function a method."""

from collections.abc import Callable, Sequence

import torch
from peft.utils import merge_utils
from torch import Tensor

from common.comparison.answers import fitted_mix
from common.comparison.inputs import Inputs
from common.comparison.score import Scores

SCALES = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 1.6)  # of a merged update
DENSITY = 0.2  # share of the entries that TIES keeps (Yadav et al. 2023, section 4)

Pairs = Sequence[tuple[Tensor, Tensor]]  # of one layer, each expert's A (r, d_in) and B (d_out, r)
Merge = Callable[[Pairs], Tensor]  # to (d_out, d_in)


def linear(pairs: Pairs) -> Tensor:
    """The sum of the updates (task arithmetic, Ilharco et al. 2023)."""
    return _beside(pairs) @ torch.cat([down for down, _ in pairs])


def ties(pairs: Pairs) -> Tensor:
    """TIES (Yadav et al. 2023): the largest entries, elected signs, the mean of those that agree."""
    return _ties([up @ down for down, up in pairs])


def tsv_m(pairs: Pairs) -> Tensor:
    """TSV-M (Gargiulo et al. 2025, section 4): of each update the share 1 / T of the singular vectors, all together made
    orthogonal by Procrustes."""
    parts = [svd_of_product(up, down) for down, up in pairs]
    full = min(len(pairs[0][1]), pairs[0][0].shape[1])
    kept = max(1, full // len(pairs))
    left, sizes, right = (torch.cat([part[number][..., :kept] for part in parts], dim=-1) for number in range(3))
    return (_orthogonal(left) * sizes) @ _orthogonal(right).T


def iso_c(pairs: Pairs) -> Tensor:
    """Iso-C (Marczak et al. 2025, section 4): the sum of the updates with every singular value their mean."""
    left, sizes, right = svd_of_product(_beside(pairs), torch.cat([down for down, _ in pairs]))
    return sizes.mean() * left @ right.T


def knots(pairs: Pairs) -> Tensor:
    """KnOTS (Stoica et al. 2025, section 4): one SVD of the updates side by side; TIES merges their parts of its right side."""
    left, sizes, right = svd_of_product(_beside(pairs), torch.block_diag(*(down for down, _ in pairs)))
    return left @ _ties([sizes[:, None] * part.T for part in right.split(pairs[0][0].shape[1])])


def _ties(updates: list[Tensor]) -> Tensor:
    return merge_utils.ties(updates, torch.ones(len(updates)), DENSITY)


def _beside(pairs: Pairs) -> Tensor:
    """All experts' B side by side (d_out, sum of r)."""
    return torch.cat([up for _, up in pairs], dim=1)


def svd_of_product(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular vectors (d_out, r) and values (r,) and vectors (d_in, r) of up (d_out, r) @ down (r, d_in)."""
    (left, upper), (right, lower) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    inner, sizes, outer = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ inner, sizes, right @ outer.T


def _orthogonal(vectors: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns."""
    left, _, right = torch.linalg.svd(vectors, full_matrices=False)
    return left @ right


MERGES: dict[str, Merge] = {"linear": linear, "TIES": ties, "TSV-M": tsv_m, "Iso-C": iso_c, "KnOTS": knots}


def merged(inputs: Inputs, *, merge: Merge) -> Scores:
    """The backbone with one merge in its weights, read as the mixture is: by every expert's head and the best discriminant's
    evidence on the plain backbone for tasks and classes, weighed by validation images. They choose the merge's scale too."""
    updates = {name: merge(pairs) for name, pairs in inputs.adapters.items()}
    router = inputs.discriminant
    known, asked = map(inputs.space.evidence, router.scores(inputs.features))
    found = []
    for scale in SCALES:
        logits, _ = inputs.logits({name: scale * update for name, update in updates.items()}, inputs.validation)
        mix = fitted_mix(logits, known, inputs.validation_answers)
        found.append((scale, mix, mix.scores(logits, known)))
    scale, mix, _ = inputs.best(found, lambda entry: entry[2])
    logits, seconds = inputs.logits({name: scale * update for name, update in updates.items()}, inputs.test)
    return Scores(mix.scores(logits, asked), seconds + inputs.features.seconds[router.depths[-1]], router.parameters,
                  inputs.merged_parameters + router.parameters, f"scale {scale:g}")
