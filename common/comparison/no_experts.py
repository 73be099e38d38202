"""No experts at all: a linear discriminant of all tasks' classes on the plain backbone's features."""

from common.comparison.inputs import Inputs
from common.comparison.score import Scores


def discriminant(inputs: Inputs) -> Scores:
    """Nearest class mean under one covariance for all, as SLDA (Hayes and Kanan 2020) has it, here not streamed.

    The depth, or several together, and the shrinkage are chosen by validation images.
    """
    chosen = inputs.discriminant
    return Scores(chosen.scores(inputs.features)[1], inputs.features.seconds[chosen.depths[-1]], chosen.parameters,
                  inputs.backbone_parameters + chosen.parameters, str(chosen))
