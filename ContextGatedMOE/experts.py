"""The set of experts in a mixture: put together, changed as a whole or not at all, and cut apart again."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ContextGatedMOE import building, fitting
from ContextGatedMOE.adapters import Expert, MixtureError
from ContextGatedMOE.layers import MixtureLinear
from ContextGatedMOE.statistics import Statistics, discriminant

Classes = Mapping[str, Sequence[str]]
STATE = ("expert_names", "classes", "same", "sizes", "labels", "columns", "statistics")  # of a mixture, besides its parts


def build(model: nn.Module, chosen: Sequence[Expert], classes: Classes | None) -> building.Parts:
    """Put experts into the plain base model of a mixture, in alphabetical order. Raises MixtureError and changes nothing."""
    chosen = sorted(chosen, key=lambda expert: expert.name)
    names = [expert.name for expert in chosen]
    classes = {name: list(classes[name]) for name in names} if classes else None
    sizes = [len(classes[name]) if classes else 1 for name in names]
    labels, called, columns = building.output_columns(names, classes, model.same) if classes else ([], [], None)
    parts = building.make(model.base_model, chosen, sizes, columns, model.gate_hidden, model.router)
    building.put_in(model.base_model, parts)
    model.expert_names, model.classes, model.sizes, model.labels = names, classes, sizes, labels
    model.columns = {name: columns[sum(sizes[:at]) : sum(sizes[: at + 1])] if columns else [] for at, name in enumerate(names)}
    building.set_config(model.base_model, model.plain_config, called, building.head_width(parts))
    return parts


def rebuild(model: nn.Module, chosen: Sequence[Expert], classes: Classes | None, same: Sequence[Sequence[tuple[str, str]]],
            statistics: Mapping[str, dict[str, Statistics]], images: Mapping[str, fitting.Batches]) -> None:
    """Other experts in a mixture, with gates from the statistics of all, or, where these are unknown, as they were.

    images: of new experts. On an error everything is as it was before, down to the tensors themselves.
    """
    state: dict[str, Any] = {name: getattr(model, name) for name in STATE}
    config = getattr(model.base_model, "config", None)
    places = places_of(model)
    old = building.take_out(model.base_model, model.router)
    try:
        model.same, model.statistics = [list(group) for group in same], dict(statistics)
        new = build(model, chosen, classes)
        building.carry_over(old, new, places, places_of(model))
        if images:
            with model.evaluating():
                model.statistics |= gather(model, images)
        solve(model)
    except BaseException:
        building.take_out(model.base_model, model.router)
        building.put_in(model.base_model, old)
        building.set_config(model.base_model, config)
        for name, value in state.items():
            setattr(model, name, value)
        raise


def fit(model: nn.Module, images: Mapping[str, fitting.Batches], validation: Mapping[str, fitting.Batches]) -> None:
    """See `ContextGatedMOE.fit_gates`."""
    unknown = sorted({*images, *validation} - set(model.expert_names))
    missing = sorted(set(model.expert_names) - set(images) - set(model.statistics))
    if unknown:
        raise MixtureError(f"no expert is called {unknown[0]!r}")
    if missing:
        raise MixtureError(f"there are no images of expert {missing[0]!r}")
    if validation and model.joint_head is None:
        raise MixtureError(
            "validation images choose how much the head of all classes believes the gates; without classes=... there is "
            "no such head"
        )
    before, statistics = [parameter.detach().clone() for parameter in model.gate_parameters()], model.statistics
    buffers = {name: [buffer.clone() for buffer in gate.buffers()] for name, gate in model.gates().items()}
    try:
        with model.evaluating():
            model.statistics = {**statistics, **gather(model, images)}
            solve(model)
            if validation:
                fitting.calibrate(model, validation)
    except BaseException:
        model.statistics = statistics
        with torch.no_grad():
            for parameter, value in zip(model.gate_parameters(), before, strict=True):
                parameter.copy_(value)
            for name, gate in model.gates().items():
                for buffer, value in zip(gate.buffers(), buffers[name], strict=True):
                    buffer.copy_(value)
        raise


def gather(model: nn.Module, images: Mapping[str, fitting.Batches]) -> dict[str, dict[str, Statistics]]:
    """Statistics of experts' images, {expert: {layer: statistics}}, from one pass through the plain base model."""
    return {name: fitting.gather(model, name, own, model.sizes[model.expert_names.index(name)]) for name, own in images.items()}


def solve(model: nn.Module) -> None:
    """Set the gates to the linear discriminants that follow from the statistics, wherever these are known of all experts."""
    for layer, gate in model.gates().items():
        known = [model.statistics.get(name, {}).get(layer) for name in model.expert_names]
        if all(known):
            gate.start(discriminant(known))


def places_of(model: nn.Module) -> list[tuple[str, int]]:
    """(expert, number of its class) of every row of the gates' scores."""
    return [(name, number) for name, size in zip(model.expert_names, model.sizes, strict=True) for number in range(size)]


def experts_of(model: nn.Module) -> list[Expert]:
    """The experts of a mixture, cut out of the stacks again."""
    layers = model.mixture_layers()
    tensors = {f"{name}.{key}": value for name, module in layers.items() for key, value in module.state_dict().items()}
    ranks = {name: module.ranks for name, module in layers.items() if isinstance(module, MixtureLinear)}
    return building.cut_experts(model.expert_names, ranks, [name for name in layers if name not in ranks], model.sizes, tensors)
