"""Fitting the gates to images: in closed form from sums over them, then a handful of numbers from validation images."""

import inspect
import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ContextGatedMOE.errors import MixtureError
from ContextGatedMOE.statistics import Statistics

ADDED_AT_ONCE = 1024  # images, as adding up sums takes as long as making them of many images

PLAIN = "plain:"  # before the name of a gate: statistics of what it sees in the plain model, where these are apart

Batches = Iterable[Any]  # batches of one expert: (inputs, labels), or a mapping of the model's arguments with "labels" in it


def batches(images: Batches, model: nn.Module, name: str = "",
            classes: int | None = None) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """The batches of an expert as arguments of the model, on its device, and labels (B,), on the CPU.

    Labels are positions in the expert's classes. A pair whose first part is a tensor means the model's main input, such as
    `pixel_values`. Raises MixtureError, naming the expert, if labels are none of that many classes.
    """
    main = getattr(model.base_model, "main_input_name", None) or next(
        iter(inspect.signature(model.base_model.forward).parameters)
    )
    if isinstance(images, tuple) and len(images) == 2 and isinstance(images[0], Tensor):
        images = [images]
    for batch in images:
        if isinstance(batch, Mapping):
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            labels = batch.get("labels")
        else:
            inputs, labels = batch
            inputs = inputs if isinstance(inputs, Mapping) else {main: inputs}
        device = model.device
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        size = len(next(value for value in inputs.values() if isinstance(value, Tensor)))
        if labels is None or classes == 1:
            labels = torch.zeros(size, dtype=torch.long)
        labels = torch.as_tensor(labels).detach().cpu()
        if classes is not None:
            check_labels(labels, size, name, classes)
        yield inputs, labels.long()


def check_labels(labels: Tensor, size: int, name: str, classes: int) -> None:
    """Raise MixtureError unless labels are one whole number for each of `size` images, from 0 to below `classes`."""
    if labels.shape != (size,) or labels.is_floating_point() or labels.is_complex():
        raise MixtureError(f"expert '{name}' needs labels of shape ({size},), one class number for each image, not "
                           f"{labels.dtype} of shape {tuple(labels.shape)}")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise MixtureError(f"expert '{name}' has {classes} classes, but an image is labelled {int(wrong[0])}")


@dataclass
class BatchFeatures:
    """What gates and head see of a batch. features: {gate name: (B, K)} where each image's expert is used, and `plain` in the
    plain model, as far as the gates tell of the experts there; logits: (B, C) of the experts' heads; labels: (B,) in the
    expert's classes."""

    features: dict[str, Tensor]
    plain: dict[str, Tensor]
    logits: Tensor
    labels: Tensor


def through_own_expert(model: nn.Module, name: str, inputs: dict[str, Any], labels: Tensor) -> BatchFeatures:
    """What is seen of a batch through an expert's weights alone, from the block on where experts begin; where the expert has no
    adapter, in the plain model. Raises MixtureError, naming the expert, if something is not finite."""
    features: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    head: dict[str, Any] = {}
    bare = name in model.without_adapter
    if model.passes == 2 or bare:
        with model.router.using(plain=True, features=plain):
            model.base_model(**inputs)
    if not bare:
        own = {"fixed": model.weights_of({name: 1.0}), "from_start": model.passes == 1}
        with model.router.using(**own, features=features, head=head):
            model.base_model(**inputs)
    features, plain = features or plain, plain or features
    check_finite({**features, **plain, **({"the head": head["logits"]} if head else {})}, name)
    logits = head.get("logits", next(iter(features.values())).new_zeros(len(labels), sum(model.sizes)))
    return BatchFeatures(features, plain, logits, labels)


@torch.no_grad()
def collect_statistics(model: nn.Module, name: str, images: Batches, classes: int,
                       keep: int = 0) -> tuple[dict[str, Statistics], list[BatchFeatures]]:
    """Statistics of an expert's images at every gate, {gate name: statistics}, from one pass through this expert, and, if two
    passes find the expert, of the plain model too, by names that begin with `PLAIN`; and what was seen of the first `keep`.

    Raises MixtureError if there are no images of some class, labels that are none of the classes, or features that are not
    finite.
    """
    found: dict[str, Statistics] = {}
    waiting: list[tuple[Tensor, dict[str, Tensor]]] = []  # labels and features of batches that are not added up yet
    kept: list[BatchFeatures] = []
    for inputs, labels in batches(images, model, name, classes):
        part = through_own_expert(model, name, inputs, labels)
        if keep > 0:
            kept.append(part)
            keep -= len(labels)
        features = dict(part.features)
        if model.passes == 2:
            features |= {f"{PLAIN}{gate}": values for gate, values in part.plain.items()}
        waiting.append((labels, features))
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
    return {gate: statistics.rounded() for gate, statistics in found.items()}, kept


def check_finite(features: Mapping[str, Tensor], name: str) -> None:
    """Raise MixtureError, naming the expert, if what gates see of its images is not finite."""
    for gate, values in features.items():
        if not torch.isfinite(values).all():
            raise MixtureError(f"an image of expert '{name}' gives values at '{gate}' that are infinite or no numbers; look at "
                               "its pixels, or load the base in bf16 or fp32 if it is in fp16")


def _add(found: dict[str, Statistics], waiting: list[tuple[Tensor, dict[str, Tensor]]], classes: int) -> None:
    """Add to the statistics what waits, after which nothing does."""
    if not waiting:
        return
    labels = torch.cat([labels for labels, _ in waiting])
    for gate in waiting[0][1]:
        new = Statistics.of(torch.cat([features[gate] for _, features in waiting]), labels, classes)
        found[gate] = found[gate] + new if gate in found else new
    waiting.clear()


Drawn = list[tuple[dict[str, Any], Tensor]]  # batches: the model's arguments and labels


def drawn(images: Iterable[tuple[dict[str, Any], Tensor]], most: int) -> Drawn:
    """At most so many of an expert's images, each as likely as any other, in batches of images of one shape, as large as those
    that they came in.

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
    shapes: dict[tuple, list] = {}
    for image in kept:
        shapes.setdefault(tuple((name, value.shape) for name, value in image[0].items()), []).append(image)
    return [_batch(group[start : start + size]) for group in shapes.values() for start in range(0, len(group), size)]


def _batch(images: list[tuple[dict[str, Tensor], dict[str, Any], Tensor]]) -> tuple[dict[str, Any], Tensor]:
    """The batch of images of which the model's arguments, those that are alike for a whole batch, and labels are given."""
    inputs = {name: torch.stack([own[name] for own, *_ in images]) for name in images[0][0]}
    return images[0][1] | inputs, torch.stack([label for *_, label in images])


@dataclass
class ImageFeatures:
    """What the gates and the head see of N images. features, plain: {gate name: (N, K)}, in the model's order, as in `BatchFeatures`;
    logits: (N, C) of the experts' heads; labels: (N,) among all experts' classes; weights: (N,), the same sum for each expert,
    1 in all."""

    features: dict[str, Tensor]
    plain: dict[str, Tensor]
    logits: Tensor
    labels: Tensor
    weights: Tensor

    @classmethod
    def of(cls, model: nn.Module, parts: Mapping[str, list[BatchFeatures]]) -> "ImageFeatures":
        """Of batches by expert. Raises MixtureError if there are none of an expert."""
        labels, weights = [], []
        for name, own in parts.items():
            count = sum(len(part.labels) for part in own)
            if not count:
                raise MixtureError(f"there are no validation images of expert '{name}'")
            first = sum(model.sizes[: model.expert_names.index(name)])
            labels += [part.labels + first for part in own]
            weights.append(torch.full((count,), 1 / (count * len(parts))))
        every = [part for own in parts.values() for part in own]
        device = every[0].logits.device
        features, plain = ({gate: torch.cat([getattr(part, kind)[gate] for part in every]) for gate in getattr(every[0], kind)}
                           for kind in ("features", "plain"))
        return cls(features, plain, torch.cat([part.logits for part in every]), torch.cat(labels).to(device),
                   torch.cat(weights).to(device))

    def only(self, gates: Collection[str]) -> "ImageFeatures":
        """The same without the features of other gates."""
        features, plain = ({name: values for name, values in every.items() if name in gates}
                           for every in (self.features, self.plain))
        return replace(self, features=features, plain=plain)


@torch.no_grad()
def features_of(model: nn.Module, images: Mapping[str, Drawn]) -> ImageFeatures:
    """One pass of the mixture over images by expert. Raises MixtureError if an expert has none, or one gives no finite
    numbers."""
    parts: dict[str, list[BatchFeatures]] = {name: [] for name in images}
    for name, own in images.items():
        for inputs, labels in own:
            inputs = {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
            features: dict[str, Tensor] = {}
            plain: dict[str, Tensor] = {}
            head: dict[str, Any] = {}
            with model.router.using(features=features, plain_features=plain, head=head):
                model.run(**inputs)
            check_finite({**features, **plain, "the head": head["logits"]}, name)
            parts[name].append(BatchFeatures(features, plain or features, head["logits"], labels))
    return ImageFeatures.of(model, parts)
