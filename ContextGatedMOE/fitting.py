"""Fitting the gates to images: in closed form from sums over them, then a handful of numbers from validation images."""

import inspect
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ContextGatedMOE.adapters import MixtureError
from ContextGatedMOE.gate import START
from ContextGatedMOE.heads import HEAD_NUMBERS
from ContextGatedMOE.passes import Enough
from ContextGatedMOE.statistics import Statistics

ROUTING = 0.3  # weight of the gates' own log-likelihood of the experts beside that of the joint answer
TOWARDS_START = 0.03  # a pull to where the numbers begin, for few validation images
HEAD_START = (1.0, 1.0, 0.5)
ADDED_AT_ONCE = 1024  # images, as adding up sums takes as long as making them of many images
CALIBRATED, CALIBRATED_OF_ONE = 600, 8  # validation images that the handful of numbers is fitted to, and at least of an expert

Batches = Iterable[Any]  # batches of one expert: (inputs, labels), or a mapping of the model's arguments with "labels" in it


def batches(images: Batches, model: nn.Module) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """The batches of an expert as arguments of the model, on its device, and labels (B,), on the CPU.

    Labels are positions in the expert's classes. A pair whose first part is a tensor means the model's main input, such as
    `pixel_values`.
    """
    main = getattr(model.base_model, "main_input_name", None) or next(
        iter(inspect.signature(model.base_model.forward).parameters)
    )
    if isinstance(images, tuple) and len(images) == 2 and isinstance(images[0], Tensor):
        images = [images]
    for batch in images:
        if isinstance(batch, Mapping):
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            labels = batch.get("labels")
        else:
            inputs, labels = batch
            inputs = inputs if isinstance(inputs, Mapping) else {main: inputs}
        device = model.device
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        size = len(next(value for value in inputs.values() if isinstance(value, Tensor)))
        yield inputs, torch.zeros(size, dtype=torch.long) if labels is None else labels.detach().cpu().long()


@torch.no_grad()
def gather(model: nn.Module, name: str, images: Batches, classes: int) -> dict[str, Statistics]:
    """Statistics of an expert's images at every gate, {layer name: statistics}, from one pass through the plain base model.

    Raises MixtureError if there are no images of some class, or labels that are none of the classes.
    """
    found: dict[str, Statistics] = {}
    waiting: list[tuple[Tensor, dict[str, Tensor]]] = []  # labels and features of batches that are not added up yet
    for inputs, labels in batches(images, model):
        if classes == 1:
            labels = torch.zeros_like(labels)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise MixtureError(f"expert '{name}' has {classes} classes, but an image is labelled {int(labels.max())}")
        waiting.append((labels, _features(model, inputs)))
        if sum(len(labels) for labels, _ in waiting) >= ADDED_AT_ONCE:
            _add(found, waiting, classes)
    _add(found, waiting, classes)
    empty = [] if found else list(range(classes))
    for statistics in found.values():
        empty = torch.nonzero(statistics.counts == 0).flatten().tolist()
    if empty:
        raise MixtureError(
            f"expert '{name}' has no images of {len(empty)} of its {classes} classes; the gates need some of each"
        )
    return {layer: statistics.rounded() for layer, statistics in found.items()}


def _features(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What every gate sees of images in the plain base model: (B, K) by layer. The pass ends at the last gate."""
    features: dict[str, Tensor] = {}
    with suppress(Enough), model.router.using(plain=True, features=features, until=len(model.gates())):
        model.base_model(**inputs)
    return features


def _add(found: dict[str, Statistics], waiting: list[tuple[Tensor, dict[str, Tensor]]], classes: int) -> None:
    """Add to the statistics what waits, after which nothing does."""
    if not waiting:
        return
    labels = torch.cat([labels for labels, _ in waiting])
    for layer in waiting[0][1]:
        new = Statistics.of(torch.cat([features[layer] for _, features in waiting]), labels, classes)
        found[layer] = found[layer] + new if layer in found else new
    waiting.clear()


def calibrate(model: nn.Module, images: Mapping[str, Batches]) -> float:
    """Fit how much each gate counts, and how the head weighs gates and experts, to the joint likelihood of validation images.

    A handful of numbers: one coefficient a gate, and the head's three. Enough images are drawn at random, and experts weigh
    alike, whatever the number of their images. The images are seen twice: as far as the last gate, for the gates' coefficients
    alone, then to the end, by the weights that follow, for all numbers. Returns the loss. Raises MixtureError if an expert has
    no images.
    """
    most = max(CALIBRATED // len(images), CALIBRATED_OF_ONE)
    drawn = {name: _drawn(batches(own, model), most) for name, own in images.items()}
    for name, own in drawn.items():
        if not own:
            raise MixtureError(f"there are no validation images of expert '{name}'")
    _fit(model, *_seen(model, drawn, until=len(model.gates())))
    return _fit(model, *_seen(model, drawn))


Drawn = list[tuple[dict[str, Any], Tensor]]  # batches: the model's arguments and labels


def _drawn(images: Iterable[tuple[dict[str, Any], Tensor]], most: int) -> Drawn:
    """At most so many of an expert's images, each as likely as any other, in batches of the size that they came in.

    They are read once, and how many there are is not known before (Vitter 1985, reservoir sampling).
    """
    chance, count, size, kept = random.Random(0), 0, 1, []
    for inputs, labels in images:
        size = max(size, len(labels))
        by_image = {name: value for name, value in inputs.items()
                    if isinstance(value, Tensor) and value.ndim and len(value) == len(labels)}
        rest = {name: value for name, value in inputs.items() if name not in by_image}
        for row in range(len(labels)):
            place = count if count < most else chance.randrange(count + 1)
            count += 1
            if place < most:  # copied, or the whole batch would stay in memory, and that of a GPU is needed for the passes
                own = {name: value[row].clone().cpu() for name, value in by_image.items()}
                kept[place : place + 1] = [(own, rest, labels[row])]
    return [_batch(kept[start : start + size]) for start in range(0, len(kept), size)]


def _batch(images: list[tuple[dict[str, Tensor], dict[str, Any], Tensor]]) -> tuple[dict[str, Any], Tensor]:
    """The batch of images of which the model's arguments, those that are alike for a whole batch, and labels are given."""
    inputs = {name: torch.stack([own[name] for own, *_ in images]) for name in images[0][0]}
    return images[0][1] | inputs, torch.stack([label for *_, label in images])


@torch.no_grad()
def _seen(model: nn.Module, images: Mapping[str, Drawn],
          until: int | None = None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Scores of the gates (N, gates, C), the experts' own logits (N, C), joint labels (N,), and weights (N,) of images.

    until: the number of gates after which a pass ends; there are no logits then.
    """
    all_scores, all_logits, all_labels, all_weights = [], [], [], []
    head = model.joint_head
    for name, own_images in images.items():
        start = sum(head.classes.sizes[: model.expert_names.index(name)])
        weight = 1 / (sum(len(labels) for _, labels in own_images) * len(images))
        for inputs, labels in batches(own_images, model):
            scores: dict[str, Tensor] = {}
            with suppress(Enough), model.router.using(scores=scores, until=until):
                model.base_model(**inputs)
            logits = scores.pop(head.name, None)
            if until is None:
                all_logits.append(logits)
            all_scores.append(torch.stack(list(scores.values()), dim=1))
            all_labels.append(labels + start)
            all_weights.append(torch.full((len(labels),), weight))
    device, labels, weights = all_scores[0].device, torch.cat(all_labels), torch.cat(all_weights)
    return torch.cat(all_scores), torch.cat(all_logits) if all_logits else None, labels.to(device), weights.to(device)


@torch.enable_grad()
def _fit(model: nn.Module, scores: Tensor, logits: Tensor | None, labels: Tensor, weights: Tensor) -> float:
    """Choose the gates' coefficients and, where there are logits, the head's numbers by LBFGS; all stay at or above zero."""
    head, gates = model.joint_head, model.gates()
    if scores.device.type != "mps":  # which has no fp64; elsewhere rounding is not to decide where the search ends
        scores, logits, weights = scores.double(), None if logits is None else logits.double(), weights.double()
    numbers, begin = [gate.coefficient for gate in gates.values()], [START] * len(gates)
    if logits is not None:
        numbers, begin = [*numbers, *(getattr(head, name) for name in HEAD_NUMBERS)], [*begin, *HEAD_START]
    start = torch.tensor(begin, dtype=scores.dtype, device=scores.device)
    free = start.expm1().log().requires_grad_()  # the inverse of softplus
    optimizer = torch.optim.LBFGS([free], max_iter=100, line_search_fn="strong_wolfe")
    owner = head.classes.owner[labels]

    def negative_log_likelihood(said: Tensor, truth: Tensor) -> Tensor:
        return -(weights * said.gather(1, truth[:, None])[:, 0]).sum()

    def loss() -> Tensor:
        optimizer.zero_grad()
        values = F.softplus(free)
        evidence, total = torch.zeros_like(scores[:, 0]), TOWARDS_START * (values - start).square().sum()
        for number in range(len(gates)):  # every gate has to route well with what is known before it
            evidence = evidence + values[number] * scores[:, number]
            router = head.classes.experts(evidence)
            total = total + ROUTING / len(gates) * negative_log_likelihood(router, owner)
        if logits is None:
            total = total + negative_log_likelihood(router, owner)
        else:
            router_scale, expert_scale, class_share = values[len(gates) :]
            router = (router_scale * router).log_softmax(-1)[:, head.classes.owner]
            joint = head.own(logits, expert_scale) + router + class_share * head.classes.classes(evidence)
            total = total + negative_log_likelihood(joint.log_softmax(-1), labels)
        total.backward()
        return total

    value = optimizer.step(loss)
    with torch.no_grad():
        for number, fitted in zip(numbers, F.softplus(free), strict=True):
            number.copy_(fitted)
    return value.item()
