"""Putting a mixture's layers, gates and hooks into a base model, and taking them out again."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from ContextGatedMOE.adapters import Expert, MixtureError, head_of, stack_updates
from ContextGatedMOE.gate import Gate
from ContextGatedMOE.heads import JointHead, SharedHead
from ContextGatedMOE.layers import MixtureLinear
from ContextGatedMOE.routing import GATE, Router, Unit

GATED_BLOCKS = 3  # the first blocks of a model have a gate before them: nearly all that can be known is known early

MixtureLayer = MixtureLinear | JointHead | SharedHead


def mixture_layers(model: nn.Module) -> dict[str, MixtureLayer]:
    """The layers that a mixture has put into a model, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtureLayer)}


def gates(model: nn.Module) -> dict[str, Gate]:
    """The gates in a model by the name of the block or layer before which they stand, in the model's order."""
    return {name.rpartition(".")[0]: module for name, module in model.named_modules() if isinstance(module, Gate)}


def build(model: nn.Module, experts: list[Expert], sizes: list[int], columns: list[int] | None, hidden: int, router: Router) -> None:
    """Put gated layers in place of the plain ones that experts adapt or replace, gates before blocks, and the hooks.

    sizes: number of classes of each expert, as the gates know them. columns: for each class of each expert the output it
    adds to, for a head over all of them; None for heads that share a label space. hidden: units of the gates' first layer.
    """
    replaced = {layer for expert in experts for layer in expert.heads}
    adapted = {layer for expert in experts for layer in expert.updates} - replaced
    if columns is not None and len(replaced) != 1:
        raise MixtureError(f"one answer among all classes needs experts with one head each, but they replace {len(replaced)} layers "
                           f"({', '.join(sorted(replaced)) or 'none'}); leave classes=... out to mix heads of one label space")
    units = find_units(model, adapted, replaced)
    for layer in [name for name, _ in model.named_modules() if name in replaced | adapted]:
        base = model.get_submodule(layer)
        if layer not in replaced:
            module: nn.Module = MixtureLinear(base, *stack_updates(experts, layer, base.weight), layer, router)
        else:
            heads = [head_of(expert, layer, base) for expert in experts]
            biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in heads]
            weights = [weight.to(base.weight) for weight, _ in heads]
            biases = [bias.to(base.weight) for bias in biases]
            if columns is not None:
                module = JointHead(base, torch.cat(weights), torch.cat(biases), sizes, columns, layer, router).to(base.weight.device)
            else:
                has_bias = any(bias is not None for _, bias in heads)
                module = SharedHead(base, torch.stack(weights), torch.stack(biases) if has_bias else None, layer, router)
        model.set_submodule(layer, module.train(base.training))
    for unit, gated in units:
        module = model.get_submodule(unit.name)
        if gated:
            width = model_width(module)
            gate = Gate(width, hidden, sizes).to(next(model.parameters()).device)
            module.add_module(GATE, gate.train(module.training))
        module.register_forward_pre_hook(partial(router.enter, unit), with_kwargs=True)
        module.register_forward_hook(router.leave, always_call=True)
    if experts:
        model.register_forward_pre_hook(router.begin, with_kwargs=True)
        model.register_forward_hook(router.end, always_call=True)


def unbuild(model: nn.Module) -> None:
    """Take everything of a mixture out of a model: it is then what it was."""
    for name, module in mixture_layers(model).items():
        model.set_submodule(name, module.base)
    for module in list(model.modules()):
        if GATE in module._modules:
            del module._modules[GATE]
        remove_hooks(module)


def remove_hooks(module: nn.Module) -> None:
    """Remove a router's hooks from a module."""
    for hooks, *others in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
    ):
        for key, hook in list(hooks.items()):
            function = hook.func if isinstance(hook, partial) else hook
            if isinstance(getattr(function, "__self__", None), Router):
                for entries in (hooks, *others):
                    entries.pop(key, None)


def is_built(model: nn.Module) -> bool:
    """Whether a mixture has put something into a model."""
    return any(isinstance(module, MixtureLayer | Gate) for module in model.modules())


def find_units(model: nn.Module, adapted: Iterable[str], heads: Iterable[str]) -> list[tuple[Unit, bool]]:
    """What the experts are weighed for, in the model's order, and whether a gate stands before it.

    A block is an element of the outermost `nn.ModuleList` around an adapted layer. The first blocks of each list have gates, adapted
    or not; later ones share what these have found. A layer outside of any block has a gate of its own, unless all blocks are in one
    list and come before it: then it shares theirs, as heads do. Where there is nothing else, the head has the gate.
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
        units.append((Unit(name, chain, not any(unit.chain == chain for unit, _ in units)), has_gate))
        begun.add(name)
    return units


def model_width(module: nn.Module) -> int:
    """D, the width of the tokens that a block or layer gets."""
    if isinstance(module, MixtureLayer):
        return module.base.in_features
    if isinstance(module, nn.Linear):
        return module.in_features
    for part in module.modules():  # what a block does first is to normalise or project its tokens
        if isinstance(part, nn.LayerNorm):
            return part.normalized_shape[-1]
        if isinstance(part, MixtureLinear | nn.Linear):
            return (part.base if isinstance(part, MixtureLinear) else part).in_features
        if hasattr(part, "weight") and isinstance(part.weight, torch.Tensor) and part.weight.ndim == 1:
            return len(part.weight)
    raise MixtureError(f"a {type(module).__name__} holds no layer that tells the width of its tokens")


def output_columns(names: Sequence[str], classes: Mapping[str, Sequence[str]],
                   same: Sequence[Sequence[tuple[str, str]]]) -> tuple[list[tuple[str, str]], list[str], list[int]]:
    """Labels of the outputs as (expert, class), what they are called, and for each class of each expert the output it adds to.

    same: groups of (expert, class) that are one class; their output stands where the first of them does. Raises MixtureError
    if a class is not there, or in two groups.
    """
    group_of: dict[tuple[str, str], int] = {}
    for number, group in enumerate(same):
        for entry in group:
            expert, name = entry
            if name not in classes.get(expert, ()):
                raise MixtureError(f"same=...: expert {expert!r} has no class {name!r}")
            if group_of.setdefault((expert, name), number) != number:
                raise MixtureError(f"same=...: class {name!r} of expert {expert!r} is in two groups")
    labels: list[tuple[str, str]] = []
    called: list[str] = []
    columns: list[int] = []
    column_of: dict[int, int] = {}
    for expert in names:
        for name in classes[expert]:
            group = group_of.get((expert, name))
            if group is not None and group in column_of:
                columns.append(column_of[group])
                continue
            if group is not None:
                column_of[group] = len(labels)
            sharing = [expert] if group is None else [other for other in names if any((other, c) in group_of and group_of[other, c] == group
                                                                                     for c in classes[other])]
            columns.append(len(labels))
            labels.append((expert, name))
            called.append(f"{' / '.join(sharing)}: {name}")
    return labels, called, columns
