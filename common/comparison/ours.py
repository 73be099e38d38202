"""The mixture itself, in the ways in which it can be asked."""

import dataclasses
from collections.abc import Iterator

from torch import Tensor

from common import models
from common.comparison.inputs import Inputs
from common.comparison.score import MIXTURE, Scores
from common.comparison.timing import collect
from common.mixture import build, fit_gates
from common.training.evaluate import logits_of
from ContextGatedMOE import ContextGatedMOE

TOP_1 = f"{MIXTURE}, top 1"
ANEW = {f"{MIXTURE}, two passes": {"passes": 2}, f"{MIXTURE}, no adapters": {"quick": True}}  # settings it is fitted anew with


def mixture(inputs: Inputs) -> Iterator[tuple[str, Scores]]:
    """The finished mixture, the same with one expert an image, and others of the same images. No seed changes the gates."""
    model = inputs.mixture
    yield MIXTURE, answers(inputs, model)
    usual, model.top_k = model.top_k, 1
    yield TOP_1, answers(inputs, model)
    model.top_k = usual
    for name, settings in ANEW.items():
        config = dataclasses.replace(inputs.config, **settings, compare=False)
        model = build(config, inputs.tasks)
        fit_gates(model, config, inputs.tasks)
        yield name, answers(inputs, model)


def answers(inputs: Inputs, model: ContextGatedMOE) -> Scores:
    """What a mixture answers as it is set."""
    columns = [column for data in inputs.tasks for column in model.columns[data.task.key]]

    def read(images: Tensor) -> tuple[Tensor, ...]:
        return (logits_of(model, images)[:, columns],)

    (scores,), seconds = collect(model, inputs.test, inputs.config, read)
    gates, unused = models.trainable_parameters(model), model.joint_head.base
    total = sum(value.numel() for value in model.parameters()) - sum(value.numel() for value in unused.parameters())
    return Scores(scores, seconds[-1], gates, total)
