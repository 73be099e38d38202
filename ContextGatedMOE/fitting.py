"""Fitting the gates to images: in closed form from sums over them, then a handful of numbers from validation images."""

import inspect
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
CALIBRATED, CALIBRATED_OF_ONE = 600, 32  # validation images that the handful of numbers is fitted to, and at least of an expert

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

    A handful of numbers: one coefficient a gate, and the head's three. Experts weigh alike, whatever the number of their
    images. These are seen twice: all as far as the last gate, for the gates' coefficients alone, then enough of them to the
    end, by the weights that follow, for all numbers. Returns the loss.
    """
    seen = _seen(model, images)
    _fit(model, *seen)
    owner, most = model.joint_head.classes.owner[seen[2]], max(CALIBRATED / len(images), CALIBRATED_OF_ONE)
    shares = {name: most / max((owner == model.expert_names.index(name)).sum().item(), 1) for name in images}
    return _fit(model, *_seen(model, images, shares))


@torch.no_grad()
def _seen(model: nn.Module, images: Mapping[str, Batches],
          shares: Mapping[str, float] | None = None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Scores of the gates (N, gates, C), the experts' own logits (N, C), joint labels (N,), and weights (N,) of images.

    shares: what part of every expert's images is seen, chosen at random. Without it all are, but only up to the last gate, and
    there are no logits.
    """
    all_scores, all_logits, all_labels, all_weights = [], [], [], []
    head, generator = model.joint_head, torch.Generator().manual_seed(0)
    until = len(model.gates()) if shares is None else None
    for name, own_images in images.items():
        first, start = len(all_labels), sum(head.classes.sizes[: model.expert_names.index(name)])
        for inputs, labels in batches(own_images, model):
            if shares is not None:
                taken = torch.rand(len(labels), generator=generator) < shares[name]
                if not taken.any():
                    continue
                labels = labels[taken]
                inputs = {key: value[taken.to(value.device)] if isinstance(value, Tensor) and len(value) == len(taken)
                          else value for key, value in inputs.items()}
            scores: dict[str, Tensor] = {}
            with suppress(Enough), model.router.using(scores=scores, until=until):
                model.base_model(**inputs)
            logits = scores.pop(head.name, None)
            if shares is not None:
                all_logits.append(logits)
            all_scores.append(torch.stack(list(scores.values()), dim=1))
            all_labels.append(labels + start)
        count = sum(len(labels) for labels in all_labels[first:])
        all_weights += [torch.full((len(labels),), 1 / (count * len(images))) for labels in all_labels[first:]]
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
