"""The mixture: a base model with frozen LoRA experts, weighed for each image by gates that are never told the task."""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ContextGatedMOE import building, fitting
from ContextGatedMOE.adapters import Expert, MixtureError, check_fit, check_heads, read_expert
from ContextGatedMOE.gate import Gate
from ContextGatedMOE.heads import HEAD_NUMBERS, JointHead
from ContextGatedMOE.layers import MixtureLinear
from ContextGatedMOE.routing import Router
from ContextGatedMOE.saving import Saving, cut_experts
from ContextGatedMOE.statistics import Statistics, discriminant

GATE_HIDDEN = 128


@dataclass
class Prediction:
    """What a mixture says of a batch of images.

    logits: (B, outputs), log-probabilities where the mixture knows classes. gates: {layer name: (B, E)}, weights of the experts.
    familiarity: (B,), between -1 and 1, how near an image is to the nearest class; None where the gates were never fitted.
    """

    logits: Tensor
    gates: dict[str, Tensor]
    familiarity: Tensor | None


class _Forward:
    """`ContextGatedMOE.forward`, with the signature of the base model's own: `transformers.Trainer` chooses arguments by it."""

    def __get__(self, model: "ContextGatedMOE | None", owner: type | None = None) -> Any:
        if model is None:
            return self
        bound = partial(ContextGatedMOE.run, model)
        bound.__signature__ = inspect.signature(model.base_model.forward)
        return bound


class ContextGatedMOE(Saving, nn.Module):
    """A frozen base model with frozen LoRA experts, mixed per image by small gates.

    Before the first blocks a gate looks at an image's tokens and finds evidence for every class of every expert (see `Gate`);
    it is carried on from block to block, and says how much each expert counts. With `classes`, the answer is one of all
    experts' classes (see `JointHead`). The mixture takes what the base model takes, and a prediction never depends on the other
    images of the batch. The batch must be the first dimension of every input.

    A gate weighs all tokens of one pass alike. In a causal language model the logits of early tokens therefore depend,
    through the gates, on later tokens of the same pass; while it generates with a cache, the gates see the prompt first and
    then each new token by itself. `fixed_gates` keeps one choice of experts for a whole text.

    Experts are kept in alphabetical order, so the order in which they are named makes no difference.

    Sources: LoRA (Hu et al. 2022, section 4.1); mixtures of frozen LoRA experts (Wu et al. 2024, MoLE; X-LoRA, Buehler and
    Buehler 2024, which runs the base model twice and adapter by adapter, this one once and all stacked); softmax over the k
    largest (Shazeer et al. 2017, section 2.1).
    """

    forward = _Forward()

    def __init__(self, base_model: nn.Module, experts: list[Expert], classes: Mapping[str, Sequence[str]] | None = None, *,
                 same: Sequence[Sequence[tuple[str, str]]] = (), gate_hidden: int = GATE_HIDDEN, top_k: int | None = None):
        """Replace layers of `base_model` in place. Raises MixtureError if the experts do not fit each other or the base."""
        super().__init__()
        if gate_hidden < 1:
            raise MixtureError(f"gate_hidden must be at least 1, not {gate_hidden}")
        if building.is_built(base_model):
            raise MixtureError("this base model is part of a mixture already; call unload() of that mixture, or load the base anew")
        self.gate_hidden = gate_hidden
        self.router = Router(tuple(inspect.signature(base_model.forward).parameters),
                             bool(getattr(getattr(base_model, "config", None), "is_encoder_decoder", False)))
        self.top_k = top_k
        self.same = [[(expert, name) for expert, name in group] for group in same]
        self.refuse_below: float | None = None
        self.statistics: dict[str, dict[str, Statistics]] = {}
        self.plain_config = getattr(base_model, "config", None)
        _check(experts, base_model, classes)
        self.base_model = base_model.requires_grad_(False)
        self._build(experts, classes)

    @classmethod
    def from_adapters(cls, base_model: nn.Module, adapters: Mapping[str, str | Path], classes: Mapping[str, Sequence[str]] | None = None,
                      *, same: Sequence[Sequence[tuple[str, str]]] = (), gate_hidden: int = GATE_HIDDEN,
                      top_k: int | None = None) -> "ContextGatedMOE":
        """Build a mixture of peft LoRA adapters.

        base_model: the model the adapters were trained on; its adapted layers are replaced in place. adapters: expert name ->
        adapter folder or Hub name. An empty mapping gives the base model itself. classes: expert name -> names of its
        classes, in the order of its head's outputs; the answer is then one of all of them. Without, heads of one label space are
        mixed. same: groups of (expert, class) that are one class, whose probabilities add up. gate_hidden: units of a gate's first
        layer. top_k: how many experts an image uses (all if None).

        Until `fit_gates` has seen images, all experts weigh the same. Raises MixtureError, with the expert's name, if an
        adapter is missing or cannot be mixed exactly.
        """
        experts = [read_expert(base_model, name, adapter) for name, adapter in adapters.items()]
        return cls(base_model, experts, classes, same=same, gate_hidden=gate_hidden, top_k=top_k)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass: arguments and result are the base model's own; labels, where it takes them, are output numbers.

        A 2-D `attention_mask` (B, T) also tells the gates which tokens count, where it fits (see `Router`).
        """
        settings = self.__dict__.get("replica_settings")
        if settings is not None:
            with self.router.using(**vars(settings)):
                return self.base_model(*args, **kwargs)
        return self.base_model(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> nn.Module:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["replica_settings"] = self.router.settings  # its thread does not see this one's `with` blocks
        return replica

    def __getattr__(self, name: str) -> Any:
        """What the mixture itself has not is the base model's: generate, main_input_name, gradient_checkpointing_enable ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    @property
    def config(self) -> Any:
        """The base model's configuration, with the mixture's own outputs where it knows classes."""
        return self.base_model.config

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.base_model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the frozen parameters; the gates compute in fp32."""
        return next(self.base_model.parameters()).dtype

    @property
    def top_k(self) -> int | None:
        """How many experts an image uses, the most weighted first; None for all. 1 is hard routing."""
        return self.router.top_k

    @top_k.setter
    def top_k(self, value: int | None) -> None:
        if value is not None and value < 1:
            raise MixtureError(f"top_k must be at least 1, not {value}")
        self.router.top_k = value

    @property
    def joint_head(self) -> JointHead | None:
        """The head over all experts' classes, None where heads share a label space."""
        return next((layer for layer in self.mixture_layers().values() if isinstance(layer, JointHead)), None)

    def mixture_layers(self) -> dict[str, building.MixtureLayer]:
        """The mixture's layers by their name in the base model, in the model's order."""
        return building.mixture_layers(self.base_model)

    def gates(self) -> dict[str, Gate]:
        """The gates by the name of the block or layer before which they stand, in the model's order."""
        return building.gates(self.base_model)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters: those of the gates and, where there is one, the head's three numbers."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    # ---- passes ----

    @contextmanager
    def record_gates(self) -> Iterator[dict[str, Tensor]]:
        """Collect the weights of the next forward pass: {layer name: (B, E)}, experts in `expert_names` order.

        Named are the blocks, or layers outside of any block, for which the experts are weighed. The tensors carry gradients where
        the pass does. Passes of other threads are not recorded.
        """
        record: dict[str, Tensor] = {}
        with self.router.using(record=record):
            yield record

    @contextmanager
    def fixed_gates(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Replace every gate by these weights, by expert name; experts not named get 0. Raises MixtureError."""
        unknown = sorted(set(weights) - set(self.expert_names))
        if unknown:
            raise MixtureError(f"no expert is called {unknown[0]!r}; there are {', '.join(self.expert_names) or 'none'}")
        with self.router.using(fixed=torch.tensor([float(weights.get(name, 0.0)) for name in self.expert_names])):
            yield

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> Prediction:
        """Logits, weights and familiarity of a batch, from one pass in evaluation mode; arguments as of the base model."""
        training, features, record = self.training, {}, {}
        try:
            with self.router.using(features=features, record=record):
                output = self.eval()(*args, **kwargs)
        finally:
            self.train(training)
        gates = self.gates()
        near = [gates[name].familiarity(values) for name, values in features.items() if gates[name].knows_classes]
        familiarity = torch.stack(near).mean(0).amax(-1) if near else None
        return Prediction(output if isinstance(output, Tensor) else output.logits, record, familiarity)

    # ---- gates and experts ----

    def fit_gates(self, images: Mapping[str, fitting.Batches], validation: Mapping[str, fitting.Batches] | None = None) -> None:
        """Fit the gates in closed form to images of every expert, each read once, through the plain base model.

        images: expert name -> batches, each (inputs, labels) or a mapping of the base model's arguments with "labels"; or one pair of
        tensors. Labels are positions in the expert's classes. Experts whose images were seen before may be left out. validation: the
        same, of other images of all experts, by which the gates' and the head's few coefficients are chosen. Raises MixtureError.
        """
        unknown = sorted({*images, *(validation or {})} - set(self.expert_names))
        missing = sorted(set(self.expert_names) - set(images) - set(self.statistics))
        if unknown or missing:
            raise MixtureError(f"no expert is called {unknown[0]!r}" if unknown else f"there are no images of expert {missing[0]!r}")
        training = self.training
        try:
            self.eval()
            for name, own in images.items():
                self.statistics[name] = fitting.gather(self, name, own, self._sizes[self.expert_names.index(name)])
            self.solve()
            if validation:
                fitting.calibrate(self, validation)
        finally:
            self.train(training)

    def solve(self) -> None:
        """Set every gate to the linear discriminants that follow from the statistics of all experts."""
        for layer, gate in self.gates().items():
            known = [self.statistics.get(name, {}).get(layer) for name in self.expert_names]
            if all(known):
                gate.start(discriminant(known))

    def add_expert(self, name: str, adapter: str | Path, *, classes: Sequence[str] | None = None,
                   images: fitting.Batches | None = None) -> None:
        """Add one peft LoRA adapter, with images of its own alone: the gates of all experts follow from their statistics.

        classes: the names of its classes, where the mixture knows those of the others. images: as in `fit_gates`; needed
        where the gates have been fitted. What training has added to the gates is lost. Raises MixtureError and leaves the
        mixture as it was if the name is taken, the adapter cannot be mixed, or there are no images.
        """
        if name in self.expert_names:
            raise MixtureError(f"there is an expert called {name!r} already")
        if self.expert_names and (classes is None) != (self.classes is None):
            raise MixtureError(f"expert {name!r} needs classes=[...], as the other experts have" if classes is None else
                               f"expert {name!r} has classes, which the other experts have not")
        if images is None and self.statistics:
            raise MixtureError(f"expert {name!r} needs images=...: without any of its own the gates cannot find it")
        new = read_expert(self.base_model, name, adapter)
        every = None if classes is None else {**(self.classes or {}), name: list(classes)}
        experts = [*self._experts(), new]
        _check(experts, self.base_model, every)
        self._rebuild(experts, every, {name: images} if images is not None else {})

    def remove_expert(self, name: str) -> None:
        """Remove an expert; the gates of the others follow from their statistics. Raises MixtureError if there is none."""
        if name not in self.expert_names:
            raise MixtureError(f"no expert is called {name!r}; there are {', '.join(self.expert_names) or 'none'}")
        classes = None if self.classes is None else {key: value for key, value in self.classes.items() if key != name}
        kept = [[entry for entry in group if entry[0] != name] for group in self.same]
        self.same = [group for group in kept if len(group) > 1]
        self.statistics.pop(name, None)
        self._rebuild([expert for expert in self._experts() if expert.name != name], classes or None, {})

    def unload(self) -> nn.Module:
        """The base model as it was; the mixture is of no use afterwards."""
        building.unbuild(self.base_model)
        _set_config(self.base_model, self.plain_config)
        return self.base_model

    def _rebuild(self, experts: list[Expert], classes: Mapping[str, Sequence[str]] | None,
                 images: Mapping[str, fitting.Batches]) -> None:
        """Other experts, with gates from the statistics, or from new ones; on an error everything is as it was before."""
        before = self._experts(), self.classes, dict(self.statistics), self._numbers()
        old_gates = {name: copy.deepcopy(gate.state_dict()) for name, gate in self.gates().items()}
        try:
            self._build(experts, classes)
            self._set_numbers(before[3])
            if images:
                self.fit_gates(images)
            else:
                self.solve()
        except BaseException:
            self.statistics = before[2]
            self._build(before[0], before[1])
            self._set_numbers(before[3])
            for name, gate in self.gates().items():
                gate.load_state_dict(old_gates[name])
            raise

    def _build(self, experts: list[Expert], classes: Mapping[str, Sequence[str]] | None) -> None:
        """Put these experts into the base model, in place of those that are there."""
        building.unbuild(self.base_model)
        experts = sorted(experts, key=lambda expert: expert.name)
        self.expert_names = [expert.name for expert in experts]
        self.classes = {name: list(classes[name]) for name in self.expert_names} if classes else None
        self._sizes = [len(self.classes[name]) if self.classes else 1 for name in self.expert_names]
        self.labels, called, columns = building.output_columns(self.expert_names, self.classes, self.same) if self.classes else ([], [], None)
        self.columns = {}
        for name, size in zip(self.expert_names, self._sizes, strict=True):
            start = sum(len(own) for own in self.columns.values())
            self.columns[name] = columns[start : start + size] if columns is not None else []
        building.build(self.base_model, experts, self._sizes, columns, self.gate_hidden, self.router)
        _set_config(self.base_model, self.plain_config, called)

    def _numbers(self) -> dict[str, float]:
        """What was fitted to validation images: coefficients of gates by name, and the head's three numbers."""
        head = self.joint_head
        numbers = {f"gate {name}": gate.coefficient.item() for name, gate in self.gates().items()}
        return numbers | ({} if head is None else {name: getattr(head, name).item() for name in HEAD_NUMBERS})

    @torch.no_grad()
    def _set_numbers(self, numbers: Mapping[str, float]) -> None:
        head = self.joint_head
        places = {f"gate {name}": gate.coefficient for name, gate in self.gates().items()}
        places |= {} if head is None else {name: getattr(head, name) for name in HEAD_NUMBERS}
        for name in places.keys() & numbers.keys():
            places[name].fill_(numbers[name])

    def _experts(self) -> list[Expert]:
        """The experts, cut out of the stacks again."""
        layers = self.mixture_layers()
        tensors = {f"{name}.{key}": value for name, module in layers.items() for key, value in module.state_dict().items()}
        ranks = {name: module.ranks for name, module in layers.items() if isinstance(module, MixtureLinear)}
        return cut_experts(self.expert_names, ranks, [name for name in layers if name not in ranks], self._sizes, tensors)


def _set_config(base_model: nn.Module, config: Any, called: list[str] | None = None) -> None:
    """Give the base model a configuration that names these outputs, or its own one."""
    if config is None:
        return
    if called:
        config = copy.deepcopy(config)
        config.id2label = dict(enumerate(called))
        config.label2id = {name: number for number, name in enumerate(called)}
    base_model.config = config
    if hasattr(base_model, "num_labels") and not isinstance(getattr(type(base_model), "num_labels", None), property):
        base_model.num_labels = config.num_labels


def _check(experts: list[Expert], base_model: nn.Module, classes: Mapping[str, Sequence[str]] | None) -> None:
    """Raise MixtureError unless the experts fit the base model, each other and the classes."""
    names = sorted(expert.name for expert in experts)
    if len(set(names)) < len(names):
        raise MixtureError(f"two experts have one name: {', '.join(names)}")
    for expert in experts:
        check_fit(expert, base_model)
    if not classes:
        return check_heads(experts, base_model)
    for name in {*classes, *names}:
        if name not in classes or name not in names:
            raise MixtureError(f"classes=... names {name!r}, which is no expert" if name in classes else f"expert {name!r} has no classes")
    for expert in experts:
        own = list(classes[expert.name])
        if len(set(own)) < max(1, len(own)):
            raise MixtureError(f"expert {expert.name!r} needs one or more different classes, not {', '.join(own) or 'none'}")
        for layer, (weight, _) in expert.heads.items():
            if len(weight) != len(own):
                raise MixtureError(f"expert {expert.name!r} has a head of {len(weight)} outputs at '{layer}' for {len(own)} classes "
                                   f"({', '.join(own)})")
