"""Experts as plain tensors: whether they fit a base model and each other, and all of them stacked."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ContextGatedMOE.errors import MixtureError
from ContextGatedMOE.labels import check_order


def at_least_one(name: str, value: int | None) -> int | None:
    """The value of an argument of that name, which may be None. Raises MixtureError if it is below 1."""
    if value is not None and value < 1:
        raise MixtureError(f"{name} must be at least 1, not {value}")
    return value


@dataclass
class Expert:
    """One LoRA adapter as tensors, by the names of the base model's modules.

    updates: layer -> (A (rank, d_in), B (d_out, rank)), with the adapter's scaling already in B.
    heads: layer -> (weight (d_out, d_in), bias (d_out,) or None), the layers the adapter replaces (`modules_to_save`).
    stated: the names of its classes in the order of its head's outputs, where the adapter or its model says so (`id2label`).
    """

    name: str
    updates: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    heads: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    stated: list[str] | None = None

    def copy_update(self, layer: str, down: Tensor, up: Tensor) -> None:
        """Copy the update of `layer` into tensors of the shapes of A and B."""
        own_down, own_up = self.updates[layer]
        down.copy_(own_down)
        up.copy_(own_up)

    def release(self) -> None:
        """Called when a mixture has copied everything; tensors of one's own are kept."""


@dataclass
class StoredExpert(Expert):
    """An adapter whose tensors stay in its file until a mixture copies them, and are given up then.

    So that many adapters need hardly more memory than the mixture of them. scaling: layer -> what B is to be multiplied by.
    """

    scaling: dict[str, float] = field(default_factory=dict)

    def copy_update(self, layer: str, down: Tensor, up: Tensor) -> None:
        """See `Expert`."""
        own_down, own_up = self.updates[layer]
        down.copy_(own_down)
        up.copy_(scaled(own_up, self.scaling[layer]))

    def release(self) -> None:
        """See `Expert`."""
        self.updates, self.heads = {}, {}

    def loaded(self) -> Expert:
        """The same with tensors in memory."""
        return Expert(
            self.name,
            {layer: (down.clone(), scaled(up, self.scaling[layer]).clone()) for layer, (down, up) in self.updates.items()},
            {layer: (weight.clone(), None if bias is None else bias.clone()) for layer, (weight, bias) in self.heads.items()},
            self.stated,
        )


def scaled(up: Tensor, scaling: float) -> Tensor:
    """B times the scaling, in fp32 at least, as peft computes it."""
    return up if scaling == 1 else up.to(torch.promote_types(up.dtype, torch.float32)) * scaling


def plain_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by name; for a layer of a mixture, the plain layer under it."""
    return {name: m.mixture_base() if hasattr(m, "mixture_base") else m for name, m in model.named_modules()}


def head_of(expert: Expert, layer: str, base: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The head `expert` uses at `layer`: its own, the base's with its LoRA update merged, or the base's."""
    if layer in expert.heads:
        return expert.heads[layer]
    weight = base.weight.detach().clone()
    if layer in expert.updates:
        down, up = (tensor.new_empty(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32))
                    for tensor in expert.updates[layer])
        expert.copy_update(layer, down, up)
        weight = weight + (up @ down).to(weight)
    return weight, None if base.bias is None else base.bias.detach().clone()


def refuse_packed(base_model: nn.Module) -> None:
    """Raise MixtureError if weights of the base are packed in 4 or 8 bits; experts mix exactly with floating-point ones."""
    for name, layer in plain_layers(base_model).items():
        weight = getattr(layer, "weight", None)
        packed = any(kind.__module__.partition(".")[0] == "bitsandbytes" for kind in type(layer).__mro__)
        if packed or (isinstance(layer, nn.Linear) and isinstance(weight, Tensor) and not weight.is_floating_point()):
            raise MixtureError(
                f"the base model's '{name}' is a {type(layer).__name__} with weights in 4 or 8 bits; load the base in "
                "bf16, fp16 or fp32 to mix experts on it"
            )


def sees_positions(layer: str) -> bool:
    """Whether a layer of this name gets positions and no image, as in SwinV2's blocks: all images share what it says."""
    return "position_bias" in layer


def refuse_positions(expert: str, layer: str) -> None:
    """Raise MixtureError if an expert adapts a layer that gets no image, whose update cannot be weighed for each image."""
    if sees_positions(layer):
        raise MixtureError(f"expert '{expert}' adapts '{layer}', which gets positions and no image, so that it cannot be "
                           "weighed for each image; retrain it with exclude_modules='.*position_bias.*'")


def check_fit(expert: Expert, base_model: nn.Module) -> None:
    """Raise MixtureError unless every layer of the expert is a linear layer of the base, of the same shape."""
    layers = plain_layers(base_model)
    for layer, tensors in (expert.updates | expert.heads).items():
        if not isinstance(layers.get(layer), nn.Linear):
            raise MixtureError(f"expert '{expert.name}' adapts '{layer}', which is no linear layer of the base model")
        if isinstance(layers[layer], NonDynamicallyQuantizableLinear):
            raise MixtureError(f"expert '{expert.name}' adapts '{layer}', which nn.MultiheadAttention reads without calling it")
        refuse_positions(expert.name, layer)
        shape = tuple(layers[layer].weight.shape)
        if layer in expert.updates:
            down, up = expert.updates[layer]
            fits = (up.shape[0], down.shape[1]) == shape
        else:
            fits = tensors[0].shape[1] == shape[1]
        if not fits:
            raise MixtureError(f"expert '{expert.name}' does not fit the base model at '{layer}': its layer is {shape}")


def check_heads(experts: list[Expert], base_model: nn.Module) -> None:
    """Raise MixtureError unless, wherever an expert replaces a head, all experts' heads have one width."""
    layers = plain_layers(base_model)
    for layer in sorted({layer for expert in experts for layer in expert.heads}):
        widths = {expert.name: head_of(expert, layer, layers[layer])[0].shape[0] for expert in experts}
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"'{name}' {width}" for name, width in widths.items())
            raise MixtureError(f"the experts' heads at '{layer}' have different widths ({listed}) and cannot be mixed")


def check_together(experts: Sequence[Expert], base_model: nn.Module, classes: Mapping[str, Sequence[str]] | None) -> None:
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
            raise MixtureError(
                f"classes=... names {name!r}, which is no expert" if name in classes else f"expert {name!r} has no classes"
            )
    for expert in experts:
        own = list(classes[expert.name])
        check_order(expert.name, expert.stated, own)
        for layer, (weight, _) in expert.heads.items():
            if len(weight) != len(own):
                raise MixtureError(
                    f"expert {expert.name!r} has a head of {len(weight)} outputs at '{layer}' for {len(own)} classes "
                    f"({', '.join(own)})"
                )


def stack_updates(experts: Sequence[Expert], layers: Mapping[str, nn.Linear]) -> dict[str, tuple[Tensor, Tensor, list[int]]]:
    """Stack all experts' updates of every layer: A (sum of ranks, d_in), B (d_out, sum of ranks), rank of each expert.

    An expert without an update there has rank 0. The stacks are of the base weights' type and on their device. Experts whose
    tensors are in files are copied and released one after the other.
    """
    ranks = {name: [len(expert.updates[name][0]) if name in expert.updates else 0 for expert in experts] for name in layers}
    stacks = {}
    for name, layer in layers.items():
        width_out, width_in = layer.weight.shape
        total = sum(ranks[name])
        stacks[name] = (layer.weight.new_empty(total, width_in), layer.weight.new_empty(width_out, total), ranks[name])
    starts = dict.fromkeys(layers, 0)
    for number, expert in enumerate(experts):
        for name in layers:
            if name in expert.updates:
                down, up, of_layer = stacks[name]
                rows = slice(starts[name], starts[name] + of_layer[number])
                expert.copy_update(name, down[rows], up[:, rows])
                starts[name] = rows.stop
        expert.release()
    return stacks


def cut_experts(names: list[str], ranks: dict[str, list[int]], heads: list[str], sizes: list[int],
                tensors: dict[str, Tensor], without_adapter: Collection[str] = ()) -> list[Expert]:
    """Cut stacked tensors, keyed "<layer>.<tensor>", into experts again. sizes: number of classes of each expert."""
    experts = [Expert(name) for name in names]
    for layer, own in ranks.items():
        downs, ups = tensors[f"{layer}.lora_A"].split(own), tensors[f"{layer}.lora_B"].split(own, dim=1)
        for expert, down, up in zip(experts, downs, ups, strict=True):
            if down.shape[0]:
                expert.updates[layer] = (down, up)
    for layer in heads:
        weights = tensors[f"{layer}.expert_weight"]
        biases = tensors.get(f"{layer}.expert_bias", [None] * len(experts))
        if weights.ndim == 2:  # one after the other
            weights, biases = weights.split(sizes), biases.split(sizes)
        for expert, weight, bias in zip(experts, weights, biases, strict=True):
            if expert.name not in without_adapter:
                expert.heads[layer] = (weight, bias)
    return experts
