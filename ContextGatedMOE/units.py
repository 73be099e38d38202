"""Which parts of a base model the experts are weighed for, and where a gate stands."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from ContextGatedMOE.adapters import MixtureError, sees_positions
from ContextGatedMOE.passes import Unit

GATED_BLOCKS = 3  # the first blocks of a model have a gate before them: nearly all that can be known is known early


def find_units(model: nn.Module, adapted: Iterable[str], heads: Iterable[str]) -> list[tuple[Unit, bool]]:
    """What the experts are weighed for, in the model's order, and whether a gate stands before it.

    A block is an element of the outermost `nn.ModuleList` around an adapted layer. The first blocks of each list have gates,
    adapted or not; later ones share what these have found. A layer outside of any block has a gate of its own, unless all
    blocks are in one list and come before it: then it shares theirs, as heads do. Where there is nothing else, the head has the
    gate.
    """
    modules = dict(model.named_modules())
    lists: dict[str, set[str]] = {}
    loose = []
    for layer in sorted(adapted):
        parts = layer.split(".")
        prefixes = [".".join(parts[: end + 1]) for end in range(len(parts))]
        block = next((name for name in prefixes if isinstance(modules.get(name.rpartition(".")[0]), nn.ModuleList)), None)
        if block is None:
            loose.append(layer)
        else:
            lists.setdefault(block.rpartition(".")[0], set()).add(block)
    gated = {f"{name}.{number}" for name in lists for number in range(min(GATED_BLOCKS, len(modules[name])))}
    names = {*loose, *gated, *(block for blocks in lists.values() for block in blocks)}
    if not names:
        names = set(list(heads)[:1])
    units, begun = [], set()
    for name in [name for name in modules if name in names]:
        parent = name.rpartition(".")[0]
        chain = "" if len(lists) < 2 else parent if parent in lists else name
        has_gate = name in gated or (parent not in lists and (not lists or not begun & gated or len(lists) > 1))
        units.append((Unit(name, chain, not any(unit.chain == chain for unit, _ in units), True), has_gate))
        begun.add(name)
    return [(replace(unit, last=not any(gate and after.chain == unit.chain for after, gate in units[number + 1 :])), has_gate)
            for number, (unit, has_gate) in enumerate(units)]


def model_width(module: nn.Module) -> int:
    """D, the width of the tokens that a block or layer gets."""
    if isinstance(module, nn.Linear):
        return module.in_features
    for name, part in module.named_modules():  # what a block does first is to normalise or project its tokens
        if sees_positions(name):
            continue
        if isinstance(part, nn.LayerNorm):
            return part.normalized_shape[-1]
        if isinstance(part, nn.Linear):
            return part.in_features
        if hasattr(part, "weight") and isinstance(part.weight, torch.Tensor) and part.weight.ndim == 1:
            return len(part.weight)
    raise MixtureError(f"a {type(module).__name__} holds no layer that tells the width of its tokens")
