"""The set of experts in a mixture: put together, changed as a whole or not at all, and cut apart again."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ContextGatedMOE import building, calibration, fitting
from ContextGatedMOE.adapters import Expert, check_together, cut_experts
from ContextGatedMOE.errors import MixtureError
from ContextGatedMOE.fitting import PLAIN
from ContextGatedMOE.heads import HEAD_NUMBERS
from ContextGatedMOE.labels import class_names, output_columns
from ContextGatedMOE.layers import MixtureLinear
from ContextGatedMOE.statistics import Statistics, discriminant, own_discriminants
from ContextGatedMOE.training import refine

Classes = Mapping[str, Sequence[str]]
KEPT = 4096  # training images whose features are kept for training the gates on them
START_SHARE = 1 / 3  # of the blocks: see `choose_start`
# What a mixture is made of, besides its parts.
STATE = ("expert_names", "classes", "same", "sizes", "labels", "columns", "statistics", "without_adapter", "chosen_gates",
         "shrinkage", "refuse_below", "fitted_passes", "usual_familiarity")


def build(model: nn.Module, chosen: Sequence[Expert], classes: Classes | None) -> building.Parts:
    """Put experts into the plain base model of a mixture, in alphabetical order. Raises MixtureError and changes nothing."""
    chosen = sorted(chosen, key=lambda expert: expert.name)
    names = [expert.name for expert in chosen]
    classes = {name: list(classes[name]) for name in names} if classes else None
    sizes = [len(classes[name]) if classes else 1 for name in names]
    without_adapter = [expert.name for expert in chosen if not expert.updates and not expert.heads]
    labels, called, columns = output_columns(names, classes, model.same) if classes else ([], [], None)
    parts = building.make(model.base_model, chosen, sizes, columns, model.gate_hidden, model.router, model.chosen_gates)
    building.install(model.base_model, parts)
    model.router.blocks = sum(unit.place is not None for unit in parts.units)
    model.expert_names, model.classes, model.sizes, model.labels = names, classes, sizes, labels
    model.without_adapter = without_adapter
    model.columns = {name: columns[sum(sizes[:at]) : sum(sizes[: at + 1])] if columns else [] for at, name in enumerate(names)}
    building.set_config(model.base_model, model.plain_config, called, building.head_width(parts))
    return parts


def rebuild(model: nn.Module, chosen: Sequence[Expert], classes: Classes | None, same: Sequence[Sequence[tuple[str, str]]],
            statistics: Mapping[str, dict[str, Statistics]], images: Mapping[str, fitting.Batches]) -> None:
    """Other experts in a mixture, with gates from the statistics of all, or, where these are unknown, as they were.

    images: of new experts. What was unfamiliar to the old experts may not be to these, so nothing is refused until that is
    fitted anew. On an error nothing is changed.
    """
    places, before = places_of(model), (model.without_adapter, model.expert_names)
    with changed_as_a_whole(model) as old:
        model.same, model.statistics, model.refuse_below = [list(group) for group in same], dict(statistics), None
        new = build(model, chosen, classes)
        building.carry_over(old, new, places, places_of(model))
        bare = any(set(without) >= set(names) for without, names in (before, (model.without_adapter, model.expert_names)))
        if bare and (model.statistics or images):
            model.router.start = choose_start(model)  # what is known of the others is the same wherever experts begin
        if images:
            with model.evaluating():
                model.statistics |= statistics_by_expert(model, images)[0]
        solve(model)


@contextmanager
def changed_as_a_whole(model: nn.Module) -> Iterator[building.Parts]:
    """Take the experts out of the base model, which the block puts into it again in another form; given are the old ones.

    On an error everything is as it was before, down to the tensors themselves.
    """
    state, start = {name: getattr(model, name) for name in STATE}, model.router.start
    config = getattr(model.base_model, "config", None)
    old = building.uninstall(model.base_model, model.router)
    numbers = {} if old.joint_head is None else {name: getattr(old.joint_head, name).clone() for name in HEAD_NUMBERS}
    try:
        yield old
    except BaseException:
        building.uninstall(model.base_model, model.router)
        building.install(model.base_model, old)
        building.set_config(model.base_model, config)
        for name, value in state.items():
            setattr(model, name, value)
        model.router.start = start
        with torch.no_grad():
            for name, value in numbers.items():
                getattr(old.joint_head, name).copy_(value)
        raise


def add(model: nn.Module, name: str, adapter: str | Path | Expert | None, classes: Sequence[str] | None,
        images: fitting.Batches | None) -> None:
    """See `ContextGatedMOE.add_expert`."""
    from ContextGatedMOE.reading import read_expert  # here, as in `from_adapters`

    attached = adapter is not None and name in model.without_adapter
    if name in model.expert_names and not attached:
        raise MixtureError(f"there is an expert called {name!r} already")
    if attached and classes is None:
        classes = model.classes[name]
    if model.expert_names and (classes is None) != (model.classes is None):
        raise MixtureError(f"expert {name!r} needs classes=[...], as the other experts have" if classes is None else
                           f"expert {name!r} has classes, which the other experts have not")
    if images is None and model.statistics:
        raise MixtureError(f"expert {name!r} needs images=...: without any of its own the gates cannot find it")
    new = (Expert(name) if adapter is None else replace(adapter, name=name) if isinstance(adapter, Expert) else
           read_expert(model.base_model, name, adapter))
    every = None if classes is None else {**(model.classes or {}), name: class_names(name, classes)}
    chosen = [*(expert for expert in experts_of(model) if expert.name != name), new]
    check_together(chosen, model.base_model, every)
    rebuild(model, chosen, every, model.same, {key: value for key, value in model.statistics.items() if key != name},
            {name: images} if images is not None else {})


def remove(model: nn.Module, name: str) -> None:
    """See `ContextGatedMOE.remove_expert`."""
    if name not in model.expert_names:
        raise MixtureError(f"no expert is called {name!r}; there are {', '.join(model.expert_names) or 'none'}")
    classes = None if model.classes is None else {key: value for key, value in model.classes.items() if key != name}
    kept = [[entry for entry in group if entry[0] != name] for group in model.same]
    rebuild(model, [expert for expert in experts_of(model) if expert.name != name], classes or None,
            [group for group in kept if len(group) > 1],
            {key: value for key, value in model.statistics.items() if key != name}, {})


def fit(model: nn.Module, images: Mapping[str, fitting.Batches], validation: Mapping[str, fitting.Batches], epochs: int,
        learning_rate: float) -> list[dict[str, float]]:
    """See `ContextGatedMOE.fit_gates`."""
    unknown = sorted({*images, *validation} - set(model.expert_names))
    known = {} if model.fitted_passes not in (None, model.passes) else model.statistics
    missing = sorted(set(model.expert_names) - set(images) - set(known))
    if unknown:
        raise MixtureError(f"no expert is called {unknown[0]!r}")
    if missing:
        raise MixtureError(f"there are no images of expert {missing[0]!r}")
    if validation and model.joint_head is None:
        raise MixtureError(
            "validation images choose how much the head of all classes believes the gates; without classes=... there is "
            "no such head"
        )
    if epochs and not validation:
        raise MixtureError("epochs=... needs validation images, which choose the epoch")
    again = set(images) >= set(model.expert_names)  # where gates stand is chosen anew only if all images are here
    with changed_as_a_whole(model) as old:
        if again:
            model.chosen_gates = None
        new = building.with_new_gates(model.base_model, old, model.sizes, model.gate_hidden, model.chosen_gates)
        building.install(model.base_model, new)
        building.carry_over(old, new, places_of(model), places_of(model))
        with model.evaluating():
            kept = {name: fitting.drawn(fitting.batches(own, model, name, size_of(model, name)),
                                        calibration.most_of_each(validation)) for name, own in validation.items()}
            if again:
                model.router.start = choose_start(model)
            statistics, seen = statistics_by_expert(model, images, KEPT if epochs else 0)
            model.statistics, model.fitted_passes = {**known, **statistics}, model.passes
            solve(model)
            if not kept:
                return []
            judged = calibrate(model, kept)
            if not epochs:
                return []
            with calibration.in_full_precision(judged.logits):
                return refine(model, fitting.ImageFeatures.of(model, seen).only(judged.features), judged, epochs, learning_rate)


def choose_start(model: nn.Module) -> int:
    """The number of the block from which on experts are used; the gates as far as there see what the plain model sees.

    Early, an image may go to another's expert; late, its own hardly changes what is seen of it. Without adapters it is all the
    same to the gates.
    """
    if set(model.without_adapter) == set(model.expert_names):
        return model.router.blocks
    if model.joint_head is None or model.passes == 2:
        return 0
    units, latest = building.units_of(model.base_model), START_SHARE * model.router.blocks
    return max((unit.place for unit, gate in units.items()
                if gate is not None and unit.place is not None and unit.place <= latest), default=0)


def calibrate(model: nn.Module, validation: Mapping[str, fitting.Drawn]) -> fitting.ImageFeatures:
    """Fit shrinkage, the gates' coefficients and the head's numbers to validation images, and drop the gates that add nothing.

    The images are seen twice: by the gates as they start, then by the weights that follow. Returns what was seen last.
    """
    seen = fitting.features_of(model, validation)
    losses = {}
    for model.shrinkage in calibration.SHRINKAGES:
        solve(model, within=False)
        losses[model.shrinkage] = calibration.fit_numbers(model, seen)
    model.shrinkage = min(losses, key=losses.get)
    solve(model, within=False)
    calibration.fit_numbers(model, seen)
    seen = fitting.features_of(model, validation)
    calibration.fit_numbers(model, seen)
    worth = calibration.gates_worth_keeping(model, seen)
    if not worth >= set(seen.features):
        keep_gates(model, worth)
        seen = seen.only(model.gates())
        calibration.fit_numbers(model, seen)
    with torch.no_grad(), calibration.in_full_precision(seen.logits):
        known = model.familiarity_of(seen.plain)
        if known is not None:
            low, middle, high = known.quantile(known.new_tensor([0.05, 0.5, 0.95])).tolist()
            model.usual_familiarity = (middle, max(high - low, 1e-6))
    return seen


def keep_gates(model: nn.Module, chosen: set[str]) -> None:
    """Drop all gates but these, and one that tells of the experts before they are used, and their statistics."""
    chosen = chosen if chosen & set(model.routing_gates()) else {*chosen, model.routing_gates()[-1]}
    building.install(model.base_model, building.with_fewer_gates(building.uninstall(model.base_model, model.router), chosen))
    model.chosen_gates = chosen
    model.statistics = {name: {gate: own for gate, own in by_gate.items() if gate.removeprefix(PLAIN) in chosen}
                        for name, by_gate in model.statistics.items()}


def statistics_by_expert(model: nn.Module, images: Mapping[str, fitting.Batches],
                         keep: int = 0) -> tuple[dict[str, dict[str, Statistics]], dict[str, list[fitting.BatchFeatures]]]:
    """Statistics of experts' images, {expert: {gate: statistics}}, from one pass through each image's own expert; and what was
    seen of about the first `keep` of them in all."""
    statistics, seen = {}, {}
    for name, own in images.items():
        statistics[name], seen[name] = fitting.collect_statistics(model, name, own, size_of(model, name), keep // len(images))
    return statistics, seen


def solve(model: nn.Module, within: bool = True) -> None:
    """Set the gates to the discriminants that follow from the statistics, wherever these are known of all experts: of all
    experts' classes and, `within` each expert, of its own."""
    routing = model.routing_gates()
    for name, gate in model.gates().items():
        own = [model.statistics.get(expert, {}).get(name) for expert in model.expert_names]
        plain = [model.statistics.get(expert, {}).get(f"{PLAIN}{name}") for expert in model.expert_names]
        if own and all(own):
            common = discriminant(plain if all(plain) else own, model.shrinkage) if name in routing else None
            gate.set_discriminant(common, own_discriminants(own) if within and model.joint_head is not None else None)


def size_of(model: nn.Module, name: str) -> int:
    """The number of classes of an expert, as the gates know them."""
    return model.sizes[model.expert_names.index(name)]


def places_of(model: nn.Module) -> list[tuple[str, int]]:
    """(expert, number of its class) of every row of the gates' scores."""
    return [(name, number) for name, size in zip(model.expert_names, model.sizes, strict=True) for number in range(size)]


def experts_of(model: nn.Module) -> list[Expert]:
    """The experts of a mixture, cut out of the stacks again."""
    layers = model.mixture_layers()
    tensors = {f"{name}.{key}": value for name, module in layers.items() for key, value in module.state_dict().items()}
    ranks = {name: module.ranks for name, module in layers.items() if isinstance(module, MixtureLinear)}
    return cut_experts(model.expert_names, ranks, [name for name in layers if name not in ranks], model.sizes, tensors,
                       model.without_adapter)
