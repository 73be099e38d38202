"""What takes part in a comparison: the images, what all methods share, and each method's answers, one after the other."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from common import models
from common.cli.flags import MixtureConfig
from common.comparison import methods, router
from common.comparison.answers import Mix, Space, fitted_mix
from common.mixture import build, fit_start, train_gates
from common.comparison.passes import collect
from common.comparison.score import MIXTURE, ORACLE, Comparison
from common.data.tensors import ImageSet, TaskData, together
from common.results.folder import Results
from common.training.evaluate import logits_of
from ContextGatedMOE import ContextGatedMOE

JOINT, EARLIER = "joint LoRA of the total rank", "earlier formulation"
OURS, ROUTED, ALONE, MERGED, TOGETHER, TOLD = (
    "this mixture", "router, then experts", "experts alone", "one merged model", "trained together", "told the task")

Read = Callable[[Tensor], tuple[Tensor, ...]]


def mixed_test(tasks: list[TaskData], seed: int) -> ImageSet:
    """The test images of all tasks in one seeded random order."""
    data = together([task.test for task in tasks])
    return data.take(torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)))


@dataclass
class Seen:
    """What a model gives for the validation images and for the test images, each (N, ...), and the seconds of an image."""

    validation: np.ndarray
    test: np.ndarray
    seconds: float


@dataclass
class Gates:
    """What a mixture's gates say of images in the plain backbone: of the experts, and all that the head adds for a class, as
    the mixture weighs it; each (N, C)."""

    experts: Seen
    added: Seen

    def of(self, split: str) -> list[np.ndarray]:
        """Both, for one of the splits of `Seen`."""
        return [getattr(part, split) for part in (self.experts, self.added)]


class Contest:
    """One comparison. All choices are made by the validation images."""

    def __init__(self, config: MixtureConfig, tasks: list[TaskData], mixture: ContextGatedMOE, results: Results):
        self.config, self.tasks, self.mixture, self.results = config, tasks, mixture, results
        self.space = Space.of(tasks)
        self.validation, self.test = together([data.validation for data in tasks]), mixed_test(tasks, config.seed)
        self.known, self.asked = self.space.answers(self.validation), self.space.answers(self.test)
        self.comparison = Comparison(tasks, self.asked)
        self.seeds = [dataclasses.replace(config, seed=config.seed + number) for number in range(config.seeds)]
        # The mixture has its experts in an order of its own.
        self.experts = [mixture.expert_names.index(data.task.key) for data in tasks]
        self.columns = [column for data in tasks for column in mixture.columns[data.task.key]]
        self.layers = [layer for layer in mixture.mixture_layers().values() if isinstance(layer, methods.MixtureLinear)]
        head = mixture.joint_head
        self.head = [value.detach().cpu().numpy()[self.columns] for value in (head.expert_weight, head.expert_bias)]
        # Numbers of parameters; the head that the backbone came with answers nothing.
        everything, unused = (sum(value.numel() for value in part.parameters()) for part in (mixture, head.base))
        self.gates, self.heads = models.trainable_parameters(mixture), sum(value.size for value in self.head)
        self.adapters = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in self.layers)
        self.whole, self.apart = everything - unused, everything - unused - self.gates
        self.merged = self.apart - self.adapters

    def run(self) -> pd.DataFrame:
        """Compare everything, what is trained last; see `Comparison.table`."""
        methods.base_heads(self.config, self.tasks)  # what is missing is to be known before the work
        gates, start = self._mixtures()
        with methods.headless(self.config, self.tasks) as folders:
            own = self._experts(folders)
            self._routers(own)
            self._merges(folders, gates)
        self._joint()
        self._earlier(start)
        self.comparison.put(ORACLE, TOLD, np.where(self.space.owner == self.asked.tasks[:, None], own.test, -np.inf),
                            own.seconds / len(self.tasks), 0, self.apart)
        return self.comparison.table()

    # ---- the mixture ----

    def _mixtures(self) -> tuple[list[Gates], dict[str, Tensor]]:
        """The mixture in its forms, trained with every seed. Returns what the gates of each say, and where they start."""
        found = [self._mixture(self.mixture)]
        if self.config.epochs == 0:
            print(f"{MIXTURE}: trained for 0 epochs, so it is its start, and the same for every seed")
            return found, _trainable(self.mixture)
        model = build(self.config, self.tasks)
        fit_start(model, self.config, self.tasks)
        start = _trainable(model)
        self.comparison.put(f"{MIXTURE}, start only", OURS, *self._answers(model), self.gates, self.whole)
        for settings in self.seeds[1:]:
            model.load_state_dict(start, strict=False)
            train_gates(model, settings, self.tasks, f"CGM, seed {settings.seed}",
                        self.results.checkpoint(f"compared_mixture_{settings.seed}"))
            found.append(self._mixture(model))
        return found, start

    def _mixture(self, model: ContextGatedMOE) -> Gates:
        even, own = torch.full((len(self.tasks),), 1 / len(self.tasks)), model.top_k
        for name, top_k, settings in (("", own, {}), (", top 1", 1, {}), (", uniform body", own, {"body": even})):
            model.top_k = top_k
            self.comparison.put(f"{MIXTURE}{name}", OURS, *self._answers(model, **settings), self.gates, self.whole)
        model.top_k = own
        return self._gates(model)

    def _read(self, model: ContextGatedMOE, **settings: Tensor) -> Read:
        """How to read a mixture's scores (B, C), in the order of the tasks."""
        def read(inputs: Tensor) -> tuple[Tensor, ...]:
            with model.router.using(**settings):
                return (logits_of(model, inputs)[:, self.columns],)

        return read

    def _answers(self, model: ContextGatedMOE, **settings: Tensor) -> tuple[np.ndarray, float]:
        """Scores (N, C) of a mixture for the test images, and the seconds of an image."""
        (scores,), seconds = collect(model, self.test, self.config, self._read(model, **settings))
        return scores, seconds

    def _gates(self, model: ContextGatedMOE) -> Gates:
        """What the gates say where the experts' weights are 0 in all blocks, so that the backbone is as it was."""
        nothing, head = torch.zeros(len(self.tasks)), model.joint_head

        def read(inputs: Tensor) -> tuple[Tensor, ...]:
            scores: dict[str, Tensor] = {}
            with model.router.using(body=nothing, scores=scores), model.record_gates() as record:
                logits = logits_of(model, inputs)
            experts = [*record.values()][-1].clamp_min(torch.finfo(torch.float32).tiny).log()  # (B, E)
            own = head.own(scores[head.name], head.expert_scale)
            return experts[:, self.experts][:, self.space.owner], (logits - own)[:, self.columns]

        last = model.base_model.get_submodule([*model.gates()][-1])
        return Gates(*self._seen(model, read, until=last))

    # ---- the experts as they are ----

    def _seen(self, model: nn.Module, read: Read | None = None, until: nn.Module | None = None) -> list[Seen]:
        """What a model gives for the images of both splits, one entry for each value that is read."""
        before, _ = collect(model, self.validation, self.config, read, until)
        after, seconds = collect(model, self.test, self.config, read, until)
        return [Seen(*values, seconds) for values in zip(before, after, strict=True)]

    def _logits(self, body: nn.Module) -> Seen:
        """The logits (N, C) of all experts' heads on the features of a body."""
        weight, bias = self.head
        (seen,) = self._seen(body)
        return Seen(*(features @ weight.T + bias for features in (seen.validation, seen.test)), seen.seconds)

    def _surest(self, bodies: list[Seen]) -> tuple[np.ndarray, float]:
        """Scores (N, C) by the largest probability over all heads, and the seconds; of the better body, as the heads come or
        with their logits scaled. bodies: logits on each."""
        tried = [(body, mix) for body in bodies for mix in (Mix(self.space), fitted_mix(body.validation, [], self.known))]
        body, mix = max(tried, key=lambda pair: self.known.rating(pair[1].scores(pair[0].validation)))
        return mix.scores(body.test), body.seconds

    def _by_gates(self, bodies: list[Seen], gates: Gates) -> tuple[np.ndarray, float]:
        """Scores (N, C) by the heads and a mixture's gates, and the seconds; of the better body."""
        evidence = gates.of("validation")
        tried = [(body, fitted_mix(body.validation, evidence, self.known)) for body in bodies]
        body, mix = max(tried, key=lambda pair: self.known.rating(pair[1].scores(pair[0].validation, evidence)))
        return mix.scores(body.test, gates.of("test")), body.seconds + gates.experts.seconds

    def _experts(self, folders: list[str]) -> Seen:
        """Each expert alone, and all of them with the surest answer. Returns the logits (N, C) of each for its own classes."""
        parts = [self._logits(methods.expert_body(self.config, self.tasks, folder)) for folder in folders]
        for number, (data, part) in enumerate(zip(self.tasks, parts, strict=True)):
            scores = np.where(self.space.owner == number, part.test, -np.inf)
            size = self.merged - self.heads + self.heads * self.space.sizes[number] // len(self.space.owner)
            self.comparison.put(f"{data.task.key} expert alone", ALONE, scores, part.seconds, 0, size)
        theirs = [self.space.owner == number for number in range(len(parts))]
        validation, test = (np.select(theirs, [getattr(part, split) for part in parts]) for split in ("validation", "test"))
        own = Seen(validation, test, sum(part.seconds for part in parts))
        self.comparison.put("all experts, surest answer", ALONE, *self._surest([own]), 0, self.apart)
        return own

    def _routers(self, own: Seen) -> None:
        """A router on the plain backbone, then the one expert it chooses, or all of them."""
        body, training = methods.plain_body(self.config, self.tasks), together([data.train for data in self.tasks])
        train, validation, test = (router.features(body, images, self.config)
                                   for images in (training, self.validation, self.test))
        one, every = router.best_routers(train, self.space.answers(training), validation, own.validation, self.known)
        for name, chosen, scores, seconds in (
            ("router, then one expert", one, one.one_expert, own.seconds / len(self.tasks)),
            ("router and all experts", every, every.all_experts, own.seconds),
        ):
            print(f"{name}: {chosen}")
            until = body.get_submodule(chosen.place) if chosen.place in router.places(body) else None
            seconds += collect(body, self.test, self.config, until=until)[1]
            self.comparison.put(name, ROUTED, scores(own.test, test[chosen.place]), seconds, chosen.parameters,
                                self.apart + chosen.parameters)

    # ---- one model for all, without training ----

    def _merges(self, folders: list[str], gates: list[Gates]) -> None:
        """peft's merges and Arrow routing, each read by the surest of the experts' heads and by the mixture's gates."""
        alike = all(len(set(layer.ranks)) == 1 for layer in self.layers)
        experts = len(self.tasks)
        bodies = [(f"{shown} merge", [partial(methods.merge, kind, weight) for weight in (1 / experts, 1.0)], self.merged)
                  for kind, shown in methods.SHOWN.items()]
        bodies += [(f"Arrow, {name}", [partial(methods.arrow, top_k)], self.apart)
                   for name, top_k in (("top 1", 1), ("all", experts))]
        for name, makers, size in bodies:
            if not alike and name != "cat merge":
                print(f"{name}: left out, as peft makes it only of adapters of one rank on the same layers")
                continue
            seen = [self._logits(make(folders, self.config, self.tasks)) for make in makers]
            self.comparison.put(f"{name}, surest head", MERGED, *self._surest(seen), 0, size)
            for found in gates:
                self.comparison.put(f"{name}, mixture's gates", MERGED, *self._by_gates(seen, found), self.gates,
                                    size + self.gates)

    # ---- trained on all tasks together ----

    def _joint(self) -> None:
        """One LoRA for all tasks, with every seed."""
        ranks = [max(own) for own in zip(*(layer.ranks for layer in self.layers), strict=True)]
        for settings in self.seeds:
            model = methods.joint_lora(settings, self.tasks, ranks, self.results.checkpoint)
            trained = models.trainable_parameters(model)
            (scores,), seconds = collect(model.merge_and_unload(), self.test, self.config)
            self.comparison.put(JOINT, TOGETHER, scores, seconds, trained, self.merged)

    def _earlier(self, start: dict[str, Tensor]) -> None:
        """The earlier formulation, from our start and trained as our gates are, with every seed; asked in batches of images
        of all tasks, and of one task each."""
        model = methods.earlier_formulation(build(self.config, self.tasks))
        for settings in self.seeds[: None if self.config.epochs else 1]:
            model.load_state_dict(start, strict=False)
            if self.config.epochs:
                train_gates(model, settings, self.tasks, f"{EARLIER}, seed {settings.seed}",
                            self.results.checkpoint(f"compared_earlier_{settings.seed}"))
            self.comparison.put(f"{EARLIER}, mixed batches", TOGETHER, *self._answers(model), self.gates, self.whole)
            pure = np.empty((len(self.test), len(self.columns)), dtype=np.float32)
            for number in range(len(self.tasks)):
                rows = torch.nonzero(self.test.tasks == number)[:, 0]
                (pure[rows.numpy()],), seconds = collect(model, self.test.take(rows), self.config, self._read(model))
            self.comparison.put(f"{EARLIER}, pure batches", TOGETHER, pure, seconds, self.gates, self.whole)


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that are trained."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
