"""Reading peft LoRA adapters into plain tensors, and refusing those that no mixture can reproduce exactly."""

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from torch import Tensor, nn

from ContextGatedMOE.adapters import Expert, MixtureError, StoredExpert, check_fit, refuse_packed
from ContextGatedMOE.renaming import in_todays_names

# Initialisations that only choose the first A and B. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) also change the
# base weights, so that two such adapters do not share one base.
_PLAIN_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Options besides peft's LoRA variants that make an adapter more than `W x + s B A x`.
_MORE_THAN_LORA = ("use_qalora", "target_parameters", "trainable_token_indices", "layer_replication")
# Options of an adapter that say nothing of its layers.
_OF_NO_LAYER = ("base_model_name_or_path", "revision", "peft_version", "auto_mapping")


@dataclass(frozen=True)
class _Layout:
    """Where the tensors of an adapter are: layer -> (key of A, key of B, scaling), head -> (key of weight, key of bias)."""

    updates: dict[str, tuple[str, str, float]]
    heads: dict[str, tuple[str, str | None]]

    def expert(self, name: str, stored: Mapping[str, Tensor]) -> StoredExpert:
        """The expert with these tensors."""
        return StoredExpert(
            name,
            {layer: (stored[down], stored[up]) for layer, (down, up, _) in self.updates.items()},
            {layer: (stored[weight], None if bias is None else stored[bias]) for layer, (weight, bias) in self.heads.items()},
            {layer: scaling for layer, (_, _, scaling) in self.updates.items()},
        )


def read_expert(base_model: nn.Module, name: str, adapter: str | Path, **hub: Any) -> Expert:
    """Read the peft LoRA adapter at `adapter` (folder or Hub name) as an expert of `base_model`.

    hub: for a Hub name, `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`.

    peft itself loads the adapter, so that its rules for names, ranks and scalings hold here too, but onto a copy of the
    base without any data: `base_model` is not touched. It may be the base of a mixture already.

    Raises MixtureError if there is no such adapter, it does not fit the base, or it cannot be mixed exactly: DoRA
    and other LoRA variants, biases, adapters of anything but `nn.Linear`, initialisations that change the base.
    """
    return _read(base_model, name, adapter, {}, hub).loaded()


def read_experts(base_model: nn.Module, adapters: Mapping[str, str | Path]) -> list[StoredExpert]:
    """Read adapters by expert name, to be mixed at once: see `read_expert`.

    peft takes longer to prepare a model than to read a file. Adapters with the same options and tensors of the same names,
    shapes and types have everything in the same place, so it prepares one model for all of them.
    """
    layouts: dict[str, _Layout] = {}
    return [_read(base_model, name, adapter, layouts, {}) for name, adapter in adapters.items()]


def _read(
    base_model: nn.Module, name: str, adapter: str | Path, layouts: dict[str, _Layout], hub: dict[str, Any]
) -> StoredExpert:
    """layouts: of the adapters read so far, by what makes two adapters alike."""
    refuse_packed(base_model)
    config = _read_config(name, adapter, hub)
    _refuse_inexact(name, config)
    # Only training knows of these: how A and B began, and VeLoRA's compressed activations. What is left is plain LoRA.
    config.init_lora_weights, config.velora_config = True, None
    try:
        config, stored = in_todays_names(name, base_model, config, load_peft_weights(str(adapter), device="cpu", **hub))
        kind = _kind(config, stored)
        if kind in layouts:
            return layouts[kind].expert(name, stored)
        base = skeleton(base_model)
        _fit_heads(base, stored)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of missing keys; they are an error below
            model = get_peft_model(base, config, adapter_name="expert", low_cpu_mem_usage=True)
            set_peft_model_state_dict(model, stored, adapter_name="expert", low_cpu_mem_usage=True)
        expert = _collect(name, model.get_base_model())
        adapted = sum(".lora_A." in key for key in stored)
        if adapted != len(expert.updates):  # peft passes over tensors that have no place in the base
            raise MixtureError(f"expert '{name}' adapts {adapted} layers, of which the base model has {len(expert.updates)}")
        check_fit(expert, base_model)
        layout = _layout(expert, stored)
        if layout is not None:
            layouts[kind] = layout
            return layout.expert(name, stored)
        return expert
    except MixtureError:
        raise
    except Exception as error:  # peft and torch raise many kinds for a file that does not fit or is damaged
        reason = " ".join(str(error).split())[:300]
        raise MixtureError(f"expert '{name}': the adapter at {adapter} does not fit the base model: {reason}") from error


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


def _read_config(name: str, adapter: str | Path, hub: dict[str, Any]) -> LoraConfig:
    try:
        config = PeftConfig.from_pretrained(adapter, **hub)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MixtureError(f"expert '{name}': there is no readable peft adapter at {adapter}") from error
    if not isinstance(config, LoraConfig):
        raise MixtureError(f"expert '{name}' is a {config.peft_type} adapter; only LoRA adapters can be mixed")
    config.inference_mode = True
    return config


def _refuse_inexact(name: str, config: LoraConfig) -> None:
    """Refuse what the configuration alone shows to be more than `W x + s B A x`."""
    if config.use_dora:
        raise MixtureError(f"expert '{name}' uses DoRA, whose weight normalisation does not mix linearly")
    if config.bias != "none" or config.lora_bias:
        raise MixtureError(f"expert '{name}' trains biases (bias={config.bias!r}, lora_bias={config.lora_bias}); "
                           "retrain it with bias='none', lora_bias=False")
    if config.init_lora_weights not in _PLAIN_INITIALISATIONS:
        raise MixtureError(f"expert '{name}' was initialised by {config.init_lora_weights!r}, which changes the base "
                           "weights; convert it to a plain LoRA with peft first")
    variants = [option.name for option in fields(config) if option.metadata.get("is_lora_variant")]
    for option in (*variants, *_MORE_THAN_LORA):
        if option != "velora_config" and getattr(config, option, None):
            raise MixtureError(f"expert '{name}' uses {option}, which a mixture of linear layers cannot reproduce")


def _fit_heads(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Give the linear layers of `model`, which holds no data, the number of outputs that an adapter's own heads have."""
    layers = dict(model.named_modules())
    for key, tensor in stored.items():
        layer, _, part = key.removeprefix("base_model.model.").rpartition(".")
        base = layers.get(layer)
        if part == "weight" and isinstance(base, nn.Linear) and tensor.ndim == 2 and len(tensor) != base.out_features:
            head = nn.Linear(base.in_features, len(tensor), base.bias is not None, dtype=base.weight.dtype)
            model.set_submodule(layer, head)


def _collect(name: str, model: nn.Module) -> StoredExpert:
    """Copy the tensors of the adapter called "expert" out of a model that carries it."""
    expert = StoredExpert(name)
    for layer, module in model.named_modules():
        if isinstance(module, LoraLayer):
            _refuse_module(name, layer, module)
            down, up = (_loaded(name, layer, part["expert"].weight) for part in (module.lora_A, module.lora_B))
            expert.updates[layer], expert.scaling[layer] = (down, up), module.scaling["expert"]
        elif isinstance(module, ModulesToSaveWrapper):
            head = module.modules_to_save["expert"]
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


def _refuse_module(name: str, layer: str, module: LoraLayer) -> None:
    base = module.get_base_layer()
    if not isinstance(module, LoraLinear) or not isinstance(base, nn.Linear):
        raise MixtureError(f"expert '{name}' adapts '{layer}', a {type(base).__name__}; only nn.Linear can be mixed")
    if "expert" in module.lora_variant:
        variant = type(module.lora_variant["expert"]).__name__
        raise MixtureError(f"expert '{name}' uses the LoRA variant {variant} at '{layer}', which does not mix linearly")
