"""Experts as plain tensors: whether they fit a base model and each other, and all of them stacked."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ContextGatedMOE.errors import MixtureError
from ContextGatedMOE.labels import check_order
from ContextGatedMOE.layers import InPlaceOfLinear


def at_least_one(name: str, value: int | None) -> int | None:
    """The value of an argument of that name, which may be None. Raises MixtureError if it is below 1."""
    if value is not None and value < 1:
        raise MixtureError(f"{name} must be at least 1, not {value}")
    return value


@dataclass
class Expert:
    """One LoRA adapter as tensors, by the names of the base model's modules.

    updates: layer -> (A (rank, d_in), B (d_out, rank)). scaling: layer -> what B is to be multiplied by, 1 where none is given.
    It is apart so that tensors may stay in a mapped file until a mixture copies them: many adapters need hardly more memory than
    the mixture of them.
    heads: layer -> (weight (d_out, d_in), bias (d_out,) or None), the layers the adapter replaces (`modules_to_save`).
    stated: the names of its classes in the order of its head's outputs, where the adapter or its model says so (`id2label`).
    """

    name: str
    updates: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    heads: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    stated: list[str] | None = None
    scaling: dict[str, float] = field(default_factory=dict)

    def scaled_up(self, layer: str) -> Tensor:
        """B (d_out, rank) times the scaling, in fp32 at least, as peft computes it."""
        up, scale = self.updates[layer][1], self.scaling.get(layer, 1)
        return up if scale == 1 else up.to(torch.promote_types(up.dtype, torch.float32)) * scale

    def loaded(self) -> "Expert":
        """The same with the scaling in B and tensors of its own in memory."""
        updates = {layer: (down.clone(), self.scaled_up(layer).clone()) for layer, (down, _) in self.updates.items()}
        heads = {layer: (weight.clone(), None if bias is None else bias.clone()) for layer, (weight, bias) in self.heads.items()}
        return Expert(self.name, updates, heads, self.stated)


def plain_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by name; for a layer of a mixture, the plain layer under it."""
    return {name: m.base if isinstance(m, InPlaceOfLinear) else m for name, m in model.named_modules()}


def head_of(expert: Expert, layer: str, base: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The head `expert` uses at `layer`: its own, the base's with its LoRA update merged, or the base's."""
    if layer in expert.heads:
        return expert.heads[layer]
    weight = base.weight.detach().clone()
    if layer in expert.updates:
        kind = torch.promote_types(weight.dtype, torch.float32)
        weight += (expert.scaled_up(layer).to(kind) @ expert.updates[layer][0].to(kind)).to(weight)
    return weight, None if base.bias is None else base.bias.detach().clone()


def sees_positions(layer: str) -> bool:
    """Whether a layer of this name gets positions and no image, as in SwinV2's blocks: all images share what it says."""
    return "position_bias" in layer


def refuse_positions(expert: str, layer: str) -> None:
    """Raise MixtureError if an expert adapts a layer that gets no image, whose update cannot be weighed for each image."""
    if sees_positions(layer):
        raise MixtureError(f"expert '{expert}' adapts '{layer}', which gets positions and no image, so that it cannot be "
                           "weighed for each image; retrain it with exclude_modules='.*position_bias.*'")


def check_fit(expert: Expert, layers: Mapping[str, nn.Module]) -> None:
    """Raise MixtureError unless every layer of the expert is a linear layer of the base, of the same shape. layers: the base's, see
    `plain_layers`."""
    for layer in (*expert.updates, *expert.heads):
        base, where = layers.get(layer), f"expert '{expert.name}' adapts '{layer}', which"
        if not isinstance(base, nn.Linear):
            raise MixtureError(f"{where} is no linear layer of the base model")
        packed = any(kind.__module__.partition(".")[0] == "bitsandbytes" for kind in type(base).__mro__)
        if packed or not base.weight.is_floating_point():
            raise MixtureError(f"{where} is a {type(base).__name__} with weights in 4 or 8 bits; load the base in bf16, fp16 or fp32")
        if isinstance(base, NonDynamicallyQuantizableLinear):
            raise MixtureError(f"{where} nn.MultiheadAttention reads without calling it")
        refuse_positions(expert.name, layer)
    sizes = [(layer, (up.shape[0], down.shape[1])) for layer, (down, up) in expert.updates.items()]
    sizes += [(layer, (None, weight.shape[1])) for layer, (weight, _) in expert.heads.items()]
    for layer, (width_out, width_in) in sizes:
        shape = tuple(layers[layer].weight.shape)
        if width_in != shape[1] or width_out not in (None, shape[0]):
            raise MixtureError(f"expert '{expert.name}' does not fit the base model at '{layer}': its layer is {shape}")


def check_together(experts: Sequence[Expert], base_model: nn.Module, classes: Mapping[str, Sequence[str]] | None) -> None:
    """Raise MixtureError unless the experts fit the base model and the classes."""
    names = sorted(expert.name for expert in experts)
    if len(set(names)) < len(names):
        raise MixtureError(f"two experts have one name: {', '.join(names)}")
    if classes and (unknown := sorted(set(classes) - set(names))):
        raise MixtureError(f"classes=... names {unknown[0]!r}, which is no expert")
    layers = plain_layers(base_model)
    for expert in experts:
        check_fit(expert, layers)
        if classes and expert.name not in classes:
            raise MixtureError(f"expert {expert.name!r} has no classes")
        if classes:
            check_order(expert.name, expert.stated, classes[expert.name])


def stack_updates(experts: Sequence[Expert], layer: str, base: nn.Linear) -> tuple[Tensor, Tensor, list[int]]:
    """All experts' updates of a layer: A (sum of ranks, d_in), B (d_out, sum of ranks), and the rank of each expert.

    An expert without an update there has rank 0. The stacks are of the base weight's type and on its device.
    """
    adapted = [expert for expert in experts if layer in expert.updates]
    down = torch.cat([expert.updates[layer][0].to(base.weight) for expert in adapted])
    up = torch.cat([expert.scaled_up(layer).to(base.weight) for expert in adapted], dim=1)
    return down, up, [len(expert.updates[layer][0]) if layer in expert.updates else 0 for expert in experts]


def cut_experts(names: list[str], ranks: dict[str, list[int]], heads: list[str], sizes: list[int],
                tensors: dict[str, Tensor], without_adapter: Collection[str] = ()) -> list[Expert]:
    """Cut stacked tensors, keyed "<layer>.<tensor>", into experts again. sizes: number of classes of each expert."""
    experts = [Expert(name) for name in names]
    for layer, own in ranks.items():
        downs, ups = tensors[f"{layer}.lora_A"].split(own), tensors[f"{layer}.lora_B"].split(own, dim=1)
        for expert, down, up in zip(experts, downs, ups, strict=True):
            if len(down):
                expert.updates[layer] = (down, up)
    for layer in heads:
        weights, biases = tensors[f"{layer}.expert_weight"], tensors.get(f"{layer}.expert_bias", [None] * len(experts))
        if weights.ndim == 2:  # one after the other
            weights, biases = weights.split(sizes), biases.split(sizes)
        for expert, weight, bias in zip(experts, weights, biases, strict=True):
            if expert.name not in without_adapter:
                expert.heads[layer] = (weight, bias)
    return experts
