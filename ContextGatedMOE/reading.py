"""Reading peft LoRA adapters into plain tensors, and refusing those that no mixture can reproduce exactly."""

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ContextGatedMOE.adapters import Expert, MixtureError, StoredExpert, check_fit, refuse_packed
from ContextGatedMOE.finished import check_base, check_options, read_finished, stated_classes
from ContextGatedMOE.renaming import in_todays_names

# Options of an adapter that say nothing of its layers.
_OF_NO_LAYER = ("base_model_name_or_path", "revision", "peft_version", "auto_mapping")


@dataclass(frozen=True)
class _Layout:
    """Where the tensors of an adapter are: layer -> (key of A, key of B, scaling), head -> (key of weight, key of bias)."""

    updates: dict[str, tuple[str, str, float]]
    heads: dict[str, tuple[str, str | None]]

    def expert(self, name: str, stored: Mapping[str, Tensor], stated: list[str] | None) -> StoredExpert:
        """The expert with these tensors. stated: its classes, see `Expert`."""
        return StoredExpert(
            name,
            {layer: (stored[down], stored[up]) for layer, (down, up, _) in self.updates.items()},
            {layer: (stored[weight], None if bias is None else stored[bias]) for layer, (weight, bias) in self.heads.items()},
            stated,
            {layer: scaling for layer, (_, _, scaling) in self.updates.items()},
        )


def read_expert(base_model: nn.Module, name: str, adapter: str | Path, **hub: Any) -> Expert:
    """Read the peft LoRA adapter at `adapter` (folder or Hub name) as an expert of `base_model`.

    hub: for a Hub name, `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`.

    peft itself loads the adapter, so that its rules for names, ranks and scalings hold here too, but onto a copy of the
    base without any data: `base_model` is not touched. It may be the base of a mixture already.

    Raises MixtureError if there is no such adapter, it does not fit the base, or it cannot be mixed exactly: DoRA
    and other LoRA variants, biases, adapters of anything but `nn.Linear`, initialisations that change the base. Likewise if it
    was trained on a base with other weights, as far as that can be told without a network.
    """
    return _read(base_model, name, adapter, {}, set(), hub).loaded()


def read_experts(base_model: nn.Module, adapters: Mapping[str, str | Path]) -> list[StoredExpert]:
    """Read adapters by expert name, to be mixed at once: see `read_expert`.

    peft takes longer to prepare a model than to read a file. Adapters with the same options and tensors of the same names,
    shapes and types have everything in the same place, so it prepares one model for all of them.
    """
    layouts: dict[str, _Layout] = {}
    checked: set[tuple[Any, ...]] = set()
    return [_read(base_model, name, adapter, layouts, checked, {}) for name, adapter in adapters.items()]


def _read(
    base_model: nn.Module, name: str, adapter: str | Path, layouts: dict[str, _Layout], checked: set[tuple[Any, ...]],
    hub: dict[str, Any],
) -> StoredExpert:
    """layouts: of the adapters read so far, by what makes two adapters alike. checked: what `_check_base` knows of."""
    refuse_packed(base_model)
    config, stored = read_finished(name, adapter, **hub)
    check_options(name, config)
    stated = stated_classes(name, config, adapter, **hub)
    # Only training knows of these: how A and B began, and VeLoRA's compressed activations. What is left is plain LoRA.
    config.init_lora_weights, config.velora_config = True, None
    try:
        config, stored = in_todays_names(name, base_model, config, stored)
        _check_base(name, config, stored, base_model, checked)
        kind = _kind(config, stored)
        if kind in layouts:
            return layouts[kind].expert(name, stored, stated)
        base = skeleton(base_model)
        _fit_heads(base, stored)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of missing keys; they are an error below
            model = get_peft_model(base, config, adapter_name="expert", low_cpu_mem_usage=True)
            set_peft_model_state_dict(model, stored, adapter_name="expert", low_cpu_mem_usage=True)
        expert = collect(name, model, "expert", stated)
        adapted = sum(".lora_A." in key for key in stored)
        if adapted != len(expert.updates):  # peft passes over tensors that have no place in the base
            raise MixtureError(f"expert '{name}' adapts {adapted} layers, of which the base model has {len(expert.updates)}")
        check_fit(expert, base_model)
        layout = _layout(expert, stored)
        if layout is not None:
            layouts[kind] = layout
            return layout.expert(name, stored, stated)
        return expert
    except MixtureError:
        raise
    except Exception as error:  # peft and torch raise many kinds for a file that does not fit or is damaged
        reason = " ".join(str(error).split())[:300]
        raise MixtureError(f"expert '{name}': the adapter at {adapter} does not fit the base model: {reason}") from error


def _check_base(name: str, config: LoraConfig, stored: Mapping[str, Tensor], base_model: nn.Module,
                checked: set[tuple[Any, ...]]) -> None:
    """Look at each base that adapters state once, as it may be large; warn where it is not here."""
    kind = (config.base_model_name_or_path, config.revision, *sorted(stored))
    if kind not in checked and (note := check_base(name, config, stored, base_model)):
        warnings.warn(note, stacklevel=5)
    checked.add(kind)


def _kind(config: LoraConfig, stored: Mapping[str, Tensor]) -> str:
    """What two adapters have in common that have everything in the same place."""
    options = {key: value for key, value in config.to_dict().items() if key not in _OF_NO_LAYER}
    tensors = [(key, str(tensor.dtype), list(tensor.shape)) for key, tensor in sorted(stored.items())]
    return json.dumps([options, tensors], sort_keys=True, default=lambda it: sorted(it) if isinstance(it, set) else str(it))


def _layout(expert: StoredExpert, stored: Mapping[str, Tensor]) -> _Layout | None:
    """Where an expert that peft has loaded has its tensors in the file; None if they are called as older versions did."""

    def found(key: str, tensor: Tensor | None) -> bool:
        return tensor is None or (key in stored and torch.equal(stored[key].to(tensor.dtype), tensor))

    updates, heads = {}, {}
    for layer, (down, up) in expert.updates.items():
        names = [f"base_model.model.{layer}.lora_{side}.weight" for side in "AB"]
        if not all(map(found, names, (down, up))):
            return None
        updates[layer] = (*names, expert.scaling[layer])
    for layer, (weight, bias) in expert.heads.items():
        names = [f"base_model.model.{layer}.{part}" for part in ("weight", "bias")]
        if not all(map(found, names, (weight, bias))):
            return None
        heads[layer] = (names[0], None if bias is None else names[1])
    return _Layout(updates, heads)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model without data and hooks, with plain linear layers where a mixture has put its own.

    Every tensor is one zero seen in the tensor's shape. Meta tensors would not do: peft moves an adapter to the device of
    the layer it belongs to.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            memo[id(hooks)] = type(hooks)()
        if hasattr(module, "mixture_base"):
            memo[id(module)] = copy.deepcopy(module.mixture_base(), memo)
    return copy.deepcopy(model, memo)


def _fit_heads(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Give the linear layers of `model`, which holds no data, the number of outputs that an adapter's own heads have."""
    layers = dict(model.named_modules())
    for key, tensor in stored.items():
        layer, _, part = key.removeprefix("base_model.model.").rpartition(".")
        base = layers.get(layer)
        if part == "weight" and isinstance(base, nn.Linear) and tensor.ndim == 2 and len(tensor) != base.out_features:
            head = nn.Linear(base.in_features, len(tensor), base.bias is not None, dtype=base.weight.dtype)
            model.set_submodule(layer, head)


def collect(name: str, model: PeftModel, adapter: str, stated: list[str] | None = None) -> StoredExpert:
    """Copy the tensors of the adapter that a peft model calls `adapter` out of it. stated: its classes, see `Expert`.

    Raises MixtureError if it is more than low-rank updates of linear layers and linear heads, or a tensor is missing.
    """
    expert = StoredExpert(name, stated=stated)
    for layer, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            _refuse_module(name, layer, module, adapter)
            down, up = (_loaded(name, layer, part[adapter].weight) for part in (module.lora_A, module.lora_B))
            expert.updates[layer], expert.scaling[layer] = (down, up), module.scaling[adapter]
        elif isinstance(module, ModulesToSaveWrapper):
            head = module.modules_to_save[adapter]
            if type(head) is not nn.Linear:
                raise MixtureError(
                    f"expert '{name}' replaces '{layer}', a {type(head).__name__}; only heads that are nn.Linear can be mixed"
                )
            bias = None if head.bias is None else _loaded(name, layer, head.bias)
            expert.heads[layer] = (_loaded(name, layer, head.weight), bias)
    if not expert.updates and not expert.heads:
        raise MixtureError(f"expert '{name}' adapts no layer of the base model")
    return expert


def _loaded(name: str, layer: str, tensor: Tensor) -> Tensor:
    """A copy of a tensor that came from the adapter's file."""
    if tensor.is_meta:
        raise MixtureError(f"expert '{name}' lacks the tensors of '{layer}'; its file is damaged or of another model")
    return tensor.detach().clone()


def _refuse_module(name: str, layer: str, module: LoraLayer, adapter: str) -> None:
    base = module.get_base_layer()
    if not isinstance(module, LoraLinear) or not isinstance(base, nn.Linear):
        raise MixtureError(f"expert '{name}' adapts '{layer}', a {type(base).__name__}; only nn.Linear can be mixed")
    if adapter in module.lora_variant:
        variant = type(module.lora_variant[adapter]).__name__
        raise MixtureError(f"expert '{name}' uses the LoRA variant {variant} at '{layer}', which does not mix linearly")
