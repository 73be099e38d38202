"""Putting a mixture's layers, gates and hooks into a base model, and taking them out again."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ContextGatedMOE.adapters import Expert, head_of, stack_updates
from ContextGatedMOE.errors import MixtureError
from ContextGatedMOE.gate import Gate
from ContextGatedMOE.heads import HEAD_GATE, HEAD_NUMBERS, JointHead, SharedHead
from ContextGatedMOE.layers import MixtureLinear
from ContextGatedMOE.passes import Unit
from ContextGatedMOE.routing import GATE, Restoring, Router
from ContextGatedMOE.units import find_units, model_width

MixtureLayer = MixtureLinear | JointHead | SharedHead


def mixture_layers(model: nn.Module) -> dict[str, MixtureLayer]:
    """The layers that a mixture has put into a model, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtureLayer)}


def gates(model: nn.Module) -> dict[str, Gate]:
    """The gates in a model by the name of the block or layer before which they stand, in the model's order."""
    return {name.rpartition(".")[0]: module for name, module in model.named_modules() if isinstance(module, Gate)}


@dataclass
class Parts:
    """What a mixture puts into a base model: layers by name, units with the gates before them (None where there is none), and
    the gate that sees what reaches the head."""

    layers: dict[str, MixtureLayer]
    units: dict[Unit, Gate | None]
    router: Router
    head_gate: Gate | None = None

    @property
    def joint_head(self) -> JointHead | None:
        """The head over all experts' classes, if there is one."""
        return next((layer for layer in self.layers.values() if isinstance(layer, JointHead)), None)

    def gates(self) -> dict[str, Gate]:
        """The gates by the name of the block or layer before which they stand."""
        found = {unit.name: gate for unit, gate in self.units.items() if gate is not None}
        return found if self.head_gate is None else found | {self.joint_head.name: self.head_gate}


def make(model: nn.Module, experts: list[Expert], sizes: list[int], columns: list[int] | None, hidden: int, router: Router,
         chosen: set[str] | None = None) -> Parts:
    """The parts for a plain model, which stays as it is.

    sizes: number of classes of each expert, as the gates know them. columns: for each class of each expert the output it
    adds to, for a head over all of them; None for heads that share a label space. hidden: units of the gates' first layer.
    chosen: where gates stand, None for all places where they may. Raises MixtureError if the experts' heads do not make one
    answer.
    """
    replaced = {layer for expert in experts for layer in expert.heads}
    adapted = {layer for expert in experts for layer in expert.updates} - replaced
    if columns is not None and not replaced and all(not expert.updates for expert in experts):
        replaced = {classifier_of(model)}
    if columns is not None and len(replaced) != 1:
        raise MixtureError(
            f"one answer among all classes needs experts with one head each, but they replace {len(replaced)} layers "
            f"({', '.join(sorted(replaced)) or 'none'}); leave classes=... out to mix heads of one label space")
    bases = {name: base for name, base in model.named_modules() if name in replaced | adapted}
    for name, base in bases.items():
        if base.weight.is_meta:
            raise MixtureError(f"the base model's '{name}' has no data in memory; load it without offloading")
    heads = {name: _head(experts, name, base, sizes, columns, router) for name, base in bases.items() if name in replaced}
    layers: dict[str, MixtureLayer] = {}
    for name, base in bases.items():
        layer = heads[name] if name in heads else MixtureLinear(base, *stack_updates(experts, name, base), name)
        layers[name] = layer.train(base.training)
    return with_new_gates(model, Parts(layers, {}, router), sizes, hidden, chosen)


def with_new_gates(model: nn.Module, parts: Parts, sizes: list[int], hidden: int, chosen: set[str] | None) -> Parts:
    """The same layers for a plain model with new gates, at the chosen places, or, if None, wherever they may stand."""
    if not sizes:  # without experts there is nothing to weigh
        return Parts(parts.layers, {}, parts.router)
    heads = [name for name, layer in parts.layers.items() if not isinstance(layer, MixtureLinear)]
    units: dict[Unit, Gate | None] = {}
    for unit, may_have_gate in find_units(model, [name for name in parts.layers if name not in heads], heads):
        module = model.get_submodule(unit.name)
        gated, device = may_have_gate and (chosen is None or unit.name in chosen), next(module.parameters()).device
        units[unit] = Gate(model_width(module), hidden, sizes).to(device).train(module.training) if gated else None
    head, head_gate = parts.joint_head, None
    alone = head is not None and len({unit.chain for unit in units}) == 1 and head.name not in {unit.name for unit in units}
    if alone and (chosen is None or head.name in chosen):
        head_gate = Gate(head.base.in_features, hidden, sizes, of_tokens=False)
        head_gate = head_gate.to(head.base.weight.device).train(head.training)
    return Parts(parts.layers, units, parts.router, head_gate)


def with_fewer_gates(parts: Parts, chosen: set[str]) -> Parts:
    """The same parts without the gates that are not chosen."""
    units = {unit: gate if unit.name in chosen else None for unit, gate in parts.units.items()}
    head_gate = parts.head_gate if parts.head_gate is not None and parts.joint_head.name in chosen else None
    return Parts(parts.layers, units, parts.router, head_gate)


def classifier_of(model: nn.Module) -> str:
    """The name of the layer that answers: the last linear layer outside of any list of blocks. Raises MixtureError if there is
    none."""
    modules = dict(model.named_modules())
    lists = [f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    found = [name for name, module in modules.items() if isinstance(module, nn.Linear) and not name.startswith(tuple(lists))]
    if not found:
        raise MixtureError("the base model has no linear layer that could be its head; give at least one expert an adapter")
    return found[-1]


def _head(experts: list[Expert], name: str, base: nn.Linear, sizes: list[int], columns: list[int] | None,
          router: Router) -> MixtureLayer:
    """The head that stands for all experts' own; those of experts without an adapter are 0."""
    headless = [number for number, expert in enumerate(experts) if not expert.heads and not expert.updates]
    heads = [head_of(expert, name, base) for expert in experts]
    if columns is not None:
        for number in headless:
            heads[number] = base.weight.new_zeros(sizes[number], base.in_features), None
    weights = [weight.to(base.weight) for weight, _ in heads]
    biases = [(weight.new_zeros(len(weight)) if bias is None else bias).to(base.weight) for weight, bias in heads]
    for expert, weight, size in zip(experts, weights, sizes, strict=True):
        if columns is not None and len(weight) != size:
            raise MixtureError(f"expert '{expert.name}' has a head of {len(weight)} outputs at '{name}' for {size} classes")
        if columns is None and len(weight) != len(weights[0]):
            raise MixtureError(f"the experts' heads at '{name}' have different widths and cannot be mixed: "
                               f"{len(weights[0])} of '{experts[0].name}', {len(weight)} of '{expert.name}'")
    if columns is None:
        has_bias = any(bias is not None for _, bias in heads)
        return SharedHead(base, torch.stack(weights), torch.stack(biases) if has_bias else None, name, router)
    return JointHead(base, torch.cat(weights), torch.cat(biases), sizes, columns, name, router, headless).to(base.weight.device)


def install(model: nn.Module, parts: Parts) -> None:
    """Put a mixture's parts into a plain model: layers in place of the plain ones, gates before blocks, and the hooks."""
    router, handles = parts.router, []
    for unit, gate in parts.units.items():  # before a layer that is a unit itself is wrapped: the hooks go on what is called
        module = parts.layers.get(unit.name) or model.get_submodule(unit.name)
        if gate is not None:
            module.add_module(GATE, gate)
        handles += [module.register_forward_pre_hook(partial(router.enter, unit), with_kwargs=True),
                    module.register_forward_hook(router.leave, always_call=True)]
    for name, layer in parts.layers.items():
        model.set_submodule(name, layer)
    if parts.head_gate is not None:
        parts.joint_head.add_module(HEAD_GATE, parts.head_gate)
    if parts.units:
        inputs = tuple(inspect.signature(model.forward).parameters)
        handles += [model.register_forward_pre_hook(partial(router.begin, inputs), with_kwargs=True),
                    model.register_forward_hook(router.end, always_call=True)]
    router.handles = handles


def uninstall(model: nn.Module, router: Router) -> Parts:
    """Take everything of a mixture out of a model, which is then what it was, and return it."""
    parts = Parts(mixture_layers(model), units_of(model), router)
    for handle in router.handles:
        handle.remove()
    router.handles = []
    for module in model.modules():
        module._modules.pop(GATE, None)
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, Restoring):
            module._gradient_checkpointing_func = checkpoint.checkpoint
    if parts.joint_head is not None:
        parts.head_gate = parts.joint_head._modules.pop(HEAD_GATE, None)
    for name, layer in parts.layers.items():
        model.set_submodule(name, layer.base)
    return parts


def units_of(model: nn.Module) -> dict[Unit, Gate | None]:
    """The units of a mixture in a model, in its order, with the gates before them."""
    found: dict[Unit, Gate | None] = {}
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, partial) and hook.args and isinstance(hook.args[0], Unit):
                found[hook.args[0]] = module._modules.get(GATE)
    return found


def carry_over(old: Parts, new: Parts, old_places: list[tuple[str, int]], new_places: list[tuple[str, int]]) -> None:
    """Give new gates and a new head what the old ones have learned of the classes that are in both.

    old_places, new_places: (expert, number of its class) of every row of the gates' scores. The fixed first layer of a gate
    stays as it is too, so that statistics of old and new experts are of the same features.
    """
    both = [(new_places.index(place), row) for row, place in enumerate(old_places) if place in new_places]
    rows, old_rows = ([pair[side] for pair in both] for side in (0, 1))
    old_gates = old.gates()
    with torch.no_grad():
        for name, gate in new.gates().items():
            before = old_gates.get(name)
            if before is not None and gate.feature_count == before.feature_count:
                gate.copy_first_layer(before)
                gate.coefficient.copy_(before.coefficient)
                gate.class_coefficient.copy_(before.class_coefficient)
                gate.score.weight[rows] = before.score.weight[old_rows]
                gate.score.bias[rows] = before.score.bias[old_rows]
        if old.joint_head is None or new.joint_head is None:
            return
        before, after = ([expert for expert, number in places if number == 0] for places in (old_places, new_places))
        kept = [(after.index(name), row) for row, name in enumerate(before) if name in after]
        for name in HEAD_NUMBERS if before else ():
            value, own = getattr(old.joint_head, name), getattr(new.joint_head, name)
            own.fill_(value.mean())  # for a new expert, what holds for the others
            own[[row for row, _ in kept]] = value[[row for _, row in kept]]


def is_built(model: nn.Module) -> bool:
    """Whether a mixture has put something into a model."""
    return bool(mixture_layers(model) or gates(model))


def head_width(parts: Parts) -> int | None:
    """The number of outputs of heads that share a label space, where it is another than the base model's; None elsewhere."""
    heads = [layer for layer in parts.layers.values() if isinstance(layer, SharedHead)]
    width = heads[0].expert_weight.shape[1] if len(heads) == 1 else None
    return width if heads and width != heads[0].base.out_features else None


def set_config(base_model: nn.Module, config: Any, called: Sequence[str] = (), width: int | None = None) -> None:
    """Give the base model a configuration that names these outputs, or has that many without names, or else this one."""
    if config is None:
        return
    if called:
        config = copy.deepcopy(config)
        config.id2label = dict(enumerate(called))
        config.label2id = {name: number for number, name in enumerate(called)}
        config.problem_type = "single_label_classification"
    elif width is not None:
        config = copy.deepcopy(config)
        config.num_labels = width
    base_model.config = config
    if hasattr(base_model, "num_labels") and not isinstance(getattr(type(base_model), "num_labels", None), property):
        base_model.num_labels = config.num_labels
