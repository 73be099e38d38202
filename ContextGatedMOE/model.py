"""The mixture and its forward pass: a frozen base model with frozen LoRA experts, weighed for each image by gates.

What happens to a batch of images, in order; `building` has put hooks and layers into the base model that do it:

1. `ContextGatedMOE.run` runs the base model once, or with `passes=2` twice: first to find the expert, then to answer with it.
2. Before a block with a gate, `Router.enter` hands its input (B, N, D) to `Gate.features`, which pools an image's tokens and its
   random ReLU features into (B, K).
3. `Gate.forward` scores the classes of all experts (B, C) from these; the scores are added to the evidence of the gates before.
4. `ClassMap.weights` makes one weight per expert of the evidence, g = softmax over experts (B, E), kept by `Router` for the block.
5. In the block, `MixtureLinear.forward` computes y = W x + b + sum_e g_e s_e B_e A_e x.
6. `JointHead.forward` answers with one of all experts' classes, from their own heads, the weights and the gates' scores:
   log p(e, c | x) = log g_e + log softmax(W_e h + b_e + what the gates say of e's classes)_c, normalised over all. Without class
   names, `SharedHead.forward` mixes heads of one label space: sum_e g_e (W_e h + b_e).

Fitting the gates is told in `experts.fit`; reading of adapters, saving, the Hub and export stand in files of their own.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ContextGatedMOE import building, experts, fitting
from ContextGatedMOE.adapters import Expert, at_least_one, check_together
from ContextGatedMOE.asking import Asking
from ContextGatedMOE.errors import MixtureError
from ContextGatedMOE.exporting import Exporting
from ContextGatedMOE.forward import LikeItsBase
from ContextGatedMOE.gate import Gate, select
from ContextGatedMOE.heads import JointHead
from ContextGatedMOE.hub import Sharing
from ContextGatedMOE.labels import class_lists
from ContextGatedMOE.routing import Router
from ContextGatedMOE.saving import Saving
from ContextGatedMOE.statistics import SHRINKAGE, Statistics
from ContextGatedMOE.training import train_gates

GATE_HIDDEN = 128


class ContextGatedMOE(LikeItsBase, Asking, Saving, Sharing, Exporting, nn.Module):
    """A frozen base model with frozen LoRA experts, mixed per image by small gates.

    With `classes`, the answer is one of all experts' classes. The mixture takes what the base model takes, and a prediction
    never depends on the other images of the batch. The batch must be the first dimension of every input.

    A gate weighs all tokens of one pass alike. In a causal language model the logits of early tokens therefore depend,
    through the gates, on later tokens of the same pass; while it generates with a cache, the gates see the prompt first and
    then each new token by itself. `fixed_gates` keeps one choice of experts for a whole text.

    Experts are kept in alphabetical order, so the order in which they are named makes no difference.

    Sources: LoRA (Hu et al. 2022, section 4.1); mixtures of frozen LoRA experts (Wu et al. 2024, MoLE; X-LoRA, Buehler and
    Buehler 2024, which runs the base model twice and adapter by adapter, this one once and all stacked); softmax over the k
    largest (Shazeer et al. 2017, section 2.1).
    """

    def __init__(self, base_model: nn.Module, adapters: Sequence[Expert], classes: Mapping[str, Sequence[str]] | None = None, *,
                 same: Sequence[Sequence[tuple[str, str]]] = (), gate_hidden: int = GATE_HIDDEN, top_k: int | None = None,
                 passes: int = 1, gates: Sequence[str] | None = None):
        """Replace layers of `base_model` in place. Raises MixtureError, and leaves it as it was, if the experts do not fit.

        adapters: experts that `read_expert` has read. gates: names of the blocks or layers before which gates stand, where
        that has been chosen. The rest is as for `from_adapters`.
        """
        super().__init__()
        self.gate_hidden = at_least_one("gate_hidden", gate_hidden)
        self.plain_config = getattr(base_model, "config", None)
        if building.is_built(base_model):
            raise MixtureError(
                "this base model is part of a mixture already; call unload() of that mixture, or load the base anew"
            )
        if getattr(self.plain_config, "is_encoder_decoder", False):
            raise MixtureError(f"a {type(base_model).__name__} has an encoder and a decoder; only models of one of them can be mixed")
        self.router = Router()
        self.top_k, self.passes = top_k, passes
        self.same = [[(expert, name) for expert, name in group] for group in same]
        self.refuse_below: float | None = None
        self.fitted_passes: int | None = None  # what the statistics are of
        self.chosen_gates = None if gates is None else set(gates)  # None: wherever gates may stand
        self.shrinkage = SHRINKAGE
        self.usual_familiarity = (0.0, 1.0)  # median and spread of known images, before they are brought to -1 to 1
        self.statistics: dict[str, dict[str, Statistics]] = {}
        self.trained_before = {name for name, parameter in base_model.named_parameters() if parameter.requires_grad}
        check_together(adapters, base_model, classes := class_lists(classes))
        self.base_model = base_model.requires_grad_(False)
        try:
            experts.build(self, adapters, classes)
        except BaseException:
            self.unload()
            raise

    @classmethod
    def from_adapters(cls, base_model: nn.Module, adapters: Mapping[str, str | Path | None],
                      classes: Mapping[str, Sequence[str]] | None = None, **options: Any) -> "ContextGatedMOE":
        """Build a mixture of peft LoRA adapters.

        base_model: the model the adapters were trained on; its adapted layers are replaced in place. adapters: expert name ->
        adapter folder or Hub name, or None for an expert that has images and classes only: its answer is what the gates know of
        its classes. An empty mapping gives the base model itself. classes: expert name -> its classes in the order of its
        head's outputs, or its `id2label`: the answer is one of all. Without, heads of one label space are mixed.

        options: same, groups of (expert, class) that are one class, whose probabilities add up; gate_hidden, units of a gate's
        first layer; top_k, how many experts an image uses (all if None); passes, 2 lets the plain base model find the expert at
        all depths, before the one that it finds likeliest answers in a second pass.

        Until `fit_gates` has seen images, all experts weigh the same. Raises MixtureError, with the expert's name, if an
        adapter is missing or cannot be mixed exactly.
        """
        from ContextGatedMOE.reading import read_experts  # here: peft takes long to import, and a saved mixture needs none

        stored = read_experts(base_model, {name: adapter for name, adapter in adapters.items() if adapter is not None})
        without = [Expert(name) for name, adapter in adapters.items() if adapter is None]
        return cls(base_model, [*stored, *without], classes, **options)

    # ---- the forward pass ----

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass: arguments and result are the base model's own; labels, where it takes them, are output numbers.

        A 2-D `attention_mask` (B, T) also tells the gates which of T tokens count.
        """
        settings = self.__dict__.get("replica_settings")
        with self.router.whole_pass() if settings is None else self.router.using(**settings):
            return self._passes(*args, **kwargs)

    # `transformers.Trainer` asks the class, before any base model is known, whether it takes labels.
    run.__signature__ = inspect.Signature([inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
                                           inspect.Parameter("labels", inspect.Parameter.KEYWORD_ONLY, default=None),
                                           inspect.Parameter("inputs", inspect.Parameter.VAR_KEYWORD)])

    def _passes(self, *args: Any, **kwargs: Any) -> Any:
        settings = self.router.settings
        if self.passes == 1 or settings.plain or settings.fixed is not None or settings.body is not None:
            return self.base_model(*args, **kwargs)
        found: dict[str, Any] = {}
        nothing = torch.zeros(len(self.expert_names))
        with self.router.using(body=nothing, record=None, head=found, features=settings.plain_features):
            self.base_model(*args, **kwargs)
        evidence, top_k = found["evidence"], self.top_k or 1
        weights = select(self.joint_head.classes.expert_log_probs(evidence.experts).exp(), top_k, self.training)
        with self.router.using(evidence=replace(evidence, classes=None, weights=weights, top_k=top_k)):
            return self.base_model(*args, **kwargs)

    @property
    def top_k(self) -> int | None:
        """How many experts an image uses, the most weighted first; None for all. 1 is hard routing."""
        return self.router.top_k

    @top_k.setter
    def top_k(self, value: int | None) -> None:
        self.router.top_k = at_least_one("top_k", value)

    @property
    def passes(self) -> int:
        """1: experts are used from a block on in the pass that finds them. 2: the plain base model finds the expert first."""
        return self.router.passes

    @passes.setter
    def passes(self, value: int) -> None:
        if value not in (1, 2):
            raise MixtureError(f"passes must be 1 or 2, not {value}")
        self.router.passes = value

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

    def routing_gates(self) -> list[str]:
        """The names of the gates that tell which expert an image needs; all tell which class of an expert it is of."""
        units, head = building.units_of(self.base_model), self.joint_head
        names = [unit.name for unit, gate in units.items() if gate is not None and self.router.routes(unit)]
        return names + [name for name in self.gates() if head is not None and name == head.name and self.router.head_routes]

    def gate_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in fp32: those of the gates and, where there is one, the head's numbers."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    # ---- gates ----

    def fit_gates(self, images: Mapping[str, fitting.Batches], validation: Mapping[str, fitting.Batches] | None = None, *,
                  epochs: int = 0, learning_rate: float = 1e-3) -> list[dict[str, float]]:
        """Fit the gates in closed form to images of every expert, each read once, through this expert.

        images: expert name -> batches, each (inputs, labels) or a mapping of the base model's arguments with "labels"; or one
        pair of tensors. Labels are positions in the expert's classes. Experts whose images were seen before may be left out.
        validation: the same, of other images of all experts, each read once: 600 of them, or 8 of an expert if that is more,
        choose which gates stay, how much each counts, and the head's numbers. epochs: the gates are then trained on for so
        many, by what they saw of about 4,000 images; the best by validation stays. Returns a row for each epoch, the start
        being epoch 0, with loss and accuracy of training and validation. Raises MixtureError and leaves the gates as they were.
        """
        return experts.fit(self, images, validation or {}, epochs, learning_rate)

    def train_gates(self, loader: fitting.Batches, validation: fitting.Batches | None = None, *, epochs: int = 10,
                    learning_rate: float = 2e-3, weight_decay: float = 0.0) -> list[dict[str, float]]:
        """Train the gates from where they are, by AdamW on the loss of the joint answer.

        loader, validation: batches that can be read again, such as a DataLoader or a list, each (inputs, labels) or a mapping
        of the base model's arguments with "labels". Labels are output numbers: `columns` has those of every expert's classes.
        With validation images the epoch of the lowest loss stays, which may be the start. Returns the mean loss per image of
        every epoch, the start being epoch 0: {"epoch", "loss", "validation_loss"}. Raises MixtureError, and leaves the gates as
        they were, if there are no batches or a loss is not finite.
        """
        return train_gates(self, loader, validation, epochs, learning_rate, weight_decay)

    # ---- experts ----

    def add_expert(self, name: str, adapter: str | Path | Expert | None, *, classes: Sequence[str] | None = None,
                   images: fitting.Batches | None = None) -> None:
        """Add one peft LoRA adapter, with images of its own alone: the gates of all experts follow from their statistics.

        adapter: folder, Hub name, or what `read_expert` has read; None for an expert without one, to which an adapter may be
        added later under the same name. classes: the names of its classes, where the mixture knows
        those of the others. images: as in `fit_gates`; needed where the gates have been fitted. Where they have, what training
        has added to them is lost; else the other experts' gates stay as they are. Raises MixtureError and leaves the mixture as
        it was if the name is taken, the adapter cannot be mixed, or there are no images.
        """
        experts.add(self, name, adapter, classes, images)

    def remove_expert(self, name: str) -> None:
        """Remove an expert; the gates of the others follow from their statistics, or stay as they are where these are unknown.

        Raises MixtureError, and leaves the mixture as it was, if there is no such expert.
        """
        experts.remove(self, name)

    def unload(self) -> nn.Module:
        """The base model as it was; the mixture is of no use afterwards."""
        building.uninstall(self.base_model, self.router)
        for name, parameter in self.base_model.named_parameters():
            parameter.requires_grad_(name in self.trained_before)
        building.set_config(self.base_model, self.plain_config)
        return self.base_model
