"""Which parts of a base model the experts are weighed for, and where gates may stand."""

from collections.abc import Iterable

import torch
from torch import nn

from ContextGatedMOE.adapters import sees_positions
from ContextGatedMOE.errors import MixtureError
from ContextGatedMOE.passes import Unit

DEPTHS = 6  # gates stand before at most so many of the blocks of a list, evenly spaced; validation images choose among them


def find_units(model: nn.Module, adapted: Iterable[str], heads: Iterable[str]) -> list[tuple[Unit, bool]]:
    """What the experts are weighed for, in the model's order, and whether a gate may stand before it.

    A block is an element of the outermost `nn.ModuleList` around an adapted layer; where no layer is adapted, of the list that
    holds the most parameters. Gates may stand before evenly spaced blocks of each list, adapted or not; other blocks share what
    these have found. A layer outside of any block has a gate of its own, unless all blocks are in one list and come before it:
    then it shares theirs, as heads do. Where there is nothing else, the head has the gate.
    """
    modules = dict(model.named_modules())
    lists: set[str] = set()
    loose = []
    for layer in sorted(adapted):
        parts = layer.split(".")
        prefixes = [".".join(parts[: end + 1]) for end in range(len(parts))]
        block = next((name for name in prefixes if isinstance(modules.get(name.rpartition(".")[0]), nn.ModuleList)), None)
        if block is None:
            loose.append(layer)
        else:
            lists.add(block.rpartition(".")[0])
    if not lists and not loose:
        lists = largest_list(modules)
    numbers = {f"{name}.{number}": number for name in lists for number in range(len(modules[name]))}
    gated = {f"{name}.{number}" for name in lists for number in depths(len(modules[name]))}
    names = {*loose, *numbers} or set(list(heads)[:1])
    units, begun = [], set()
    for name in [name for name in modules if name in names]:
        parent = name.rpartition(".")[0]
        chain = "" if len(lists) < 2 else parent if parent in lists else name
        has_gate = name in gated or (parent not in lists and (not lists or not begun & gated or len(lists) > 1))
        place = numbers.get(name) if len(lists) == 1 else None
        units.append((Unit(name, chain, not any(unit.chain == chain for unit, _ in units), place), has_gate))
        begun.add(name)
    return units


def depths(blocks: int) -> list[int]:
    """The numbers of the blocks before which gates may stand: all of few, else the first and others evenly spaced."""
    return sorted({round(number * blocks / DEPTHS) for number in range(DEPTHS)}) if blocks > DEPTHS else list(range(blocks))


def largest_list(modules: dict[str, nn.Module]) -> set[str]:
    """The name of the outermost `nn.ModuleList` with the most parameters; empty if there is none."""
    sizes = {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in modules.items()
             if isinstance(module, nn.ModuleList) and len(module)}
    return {max(sizes, key=lambda name: (sizes[name], -len(name)))} if sizes else set()


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
