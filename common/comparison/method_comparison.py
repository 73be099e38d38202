"""All methods of a comparison, and the one run that asks each of them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from common.cli.flags import MixtureConfig
from common.comparison import joint, mass, merges, no_experts, ours, ranpac, routers
from common.comparison.inputs import Inputs
from common.comparison.score import Comparison, Scores
from common.data.tensors import TaskData
from common.results.folder import Results
from ContextGatedMOE import ContextGatedMOE

OURS, NONE, ROUTED, MERGED, TOGETHER, TOLD = (
    "this mixture", "no experts", "router, then one expert", "one merged model", "trained together", "told the task")
ORACLE = "oracle (told the task)"


@dataclass(frozen=True)
class Method:
    """A row of the comparison. seeded: whether another seed gives other answers."""

    group: str
    name: str
    answer: Callable[[Inputs], Scores]
    seeded: bool = False


def oracle(inputs: Inputs) -> Scores:
    """Each task's own expert, and the task told."""
    own = inputs.space.owner == inputs.test_answers.tasks[:, None]
    return Scores(np.where(own, inputs.experts.test, -np.inf), inputs.experts.seconds, 0, inputs.expert_parameters)


METHODS = [
    Method(NONE, "linear discriminant", no_experts.discriminant),
    Method(NONE, "RanPAC", ranpac.ranpac, seeded=True),
    Method(ROUTED, "Any-SSR, ridge router", routers.ridge_router, seeded=True),
    Method(ROUTED, "MaD, Mahalanobis router", routers.mahalanobis_router),
    Method(ROUTED, "MASS, subspace router", mass.mass),
    Method(ROUTED, "best router of all depths", routers.best_router),
    *(Method(MERGED, f"{name} merge", partial(merges.merged, merge=merge)) for name, merge in merges.MERGES.items()),
    Method(TOGETHER, "joint LoRA of the total rank", joint.joint_lora, seeded=True),
    Method(TOLD, ORACLE, oracle),
]


class MethodComparison:
    """One comparison of a finished mixture with all methods. Choices are made by the validation images."""

    def __init__(self, config: MixtureConfig, tasks: list[TaskData], mixture: ContextGatedMOE, results: Results):
        self.inputs = Inputs(config, tasks, mixture, results.checkpoint)
        self.comparison = Comparison(tasks, self.inputs.test_answers)
        others = (dataclasses.replace(config, seed=config.seed + number) for number in range(1, config.seeds))
        self.seeds = [config, *others]

    def run(self) -> pd.DataFrame:
        """Ask every method, with every seed where that makes a difference; see `Comparison.table`."""
        joint.recipe_of(self.inputs.config)  # what is missing is to be known before the work
        for name, scores in ours.mixture(self.inputs):
            self.comparison.put(name, OURS, scores)
        for method in METHODS:
            for settings in self.seeds if method.seeded else self.seeds[:1]:
                self.comparison.put(method.name, method.group, method.answer(self.inputs.seeded(settings)))
        return self.comparison.table()
