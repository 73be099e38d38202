"""Reading peft LoRA adapters into plain tensors, and refusing those that no mixture can reproduce exactly."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

# Initialisations that only choose the first A and B. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) also change the
# base weights, so that two such adapters do not share one base.
_PLAIN_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Options besides peft's LoRA variants that make an adapter more than `W x + s B A x`.
_MORE_THAN_LORA = ("use_qalora", "target_parameters", "trainable_token_indices", "layer_replication")


class MixtureError(ValueError):
    """An adapter, a folder or a request that cannot become an exact mixture; the message is one sentence."""


@dataclass
class Expert:
    """One LoRA adapter as tensors, by the names of the base model's modules.

    updates: layer -> (A (rank, d_in), B (d_out, rank)), with the adapter's scaling already in B.
    heads: layer -> (weight (d_out, d_in), bias (d_out,) or None), the layers the adapter replaces (`modules_to_save`).
    """

    name: str
    updates: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    heads: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)


def read_expert(base_model: nn.Module, name: str, adapter: str | Path, **hub: Any) -> Expert:
    """Read the peft LoRA adapter at `adapter` (folder or Hub name) as an expert of `base_model`.

    hub: for a Hub name, `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`.

    peft itself loads the adapter, so that its rules for names, ranks and scalings hold here too, but onto a copy of the
    base without any data: `base_model` is not touched. It may be the base of a mixture already.

    Raises MixtureError if there is no such adapter, it does not fit the base, or it cannot be mixed exactly: DoRA
    and other LoRA variants, biases, adapters of anything but `nn.Linear`, initialisations that change the base.
    """
    refuse_packed(base_model)
    config = _read_config(name, adapter, hub)
    _refuse_inexact(name, config)
    # Only training knows of these: how A and B began, and VeLoRA's compressed activations. What is left is plain LoRA.
    config.init_lora_weights, config.velora_config = True, None
    try:
        stored = load_peft_weights(str(adapter), device="cpu", **hub)
        base = skeleton(base_model)
        _fit_heads(base, stored)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of missing keys; they are an error below
            model = PeftModel.from_pretrained(
                base, adapter, adapter_name="expert", config=config, low_cpu_mem_usage=True, **hub
            )
        expert = _collect(name, model.get_base_model())
        adapted = sum(".lora_A." in key for key in stored)
        if adapted != len(expert.updates):  # peft passes over tensors that have no place in the base
            raise MixtureError(f"expert '{name}' adapts {adapted} layers, of which the base model has {len(expert.updates)}")
        check_fit(expert, base_model)
        return expert
    except MixtureError:
        raise
    except Exception as error:  # peft and torch raise many kinds for a file that does not fit or is damaged
        reason = " ".join(str(error).split())[:300]
        raise MixtureError(f"expert '{name}': the adapter at {adapter} does not fit the base model: {reason}") from error


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


def plain_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by name; for a layer of a mixture, the plain layer under it."""
    return {name: m.mixture_base() if hasattr(m, "mixture_base") else m for name, m in model.named_modules()}


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


def _collect(name: str, model: nn.Module) -> Expert:
    """Copy the tensors of the adapter called "expert" out of a model that carries it."""
    expert = Expert(name)
    for layer, module in model.named_modules():
        if isinstance(module, LoraLayer):
            _refuse_module(name, layer, module)
            down, up = (_loaded(name, layer, part["expert"].weight) for part in (module.lora_A, module.lora_B))
            expert.updates[layer] = (down, up * module.scaling["expert"])
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


def head_of(expert: Expert, layer: str, base: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The head `expert` uses at `layer`: its own, the base's with its LoRA update merged, or the base's."""
    if layer in expert.heads:
        return expert.heads[layer]
    weight = base.weight.detach().clone()
    if layer in expert.updates:
        down, up = expert.updates[layer]
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


def check_fit(expert: Expert, base_model: nn.Module) -> None:
    """Raise MixtureError unless every layer of the expert is a linear layer of the base, of the same shape."""
    layers = plain_layers(base_model)
    for layer, tensors in (expert.updates | expert.heads).items():
        if not isinstance(layers.get(layer), nn.Linear):
            raise MixtureError(f"expert '{expert.name}' adapts '{layer}', which is no linear layer of the base model")
        if isinstance(layers[layer], NonDynamicallyQuantizableLinear):
            raise MixtureError(f"expert '{expert.name}' adapts '{layer}', which nn.MultiheadAttention reads without calling it")
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
        if isinstance(classes[expert.name], str) or len(set(own)) < max(1, len(own)):
            raise MixtureError(f"expert {expert.name!r} needs one or more different classes, not {', '.join(own) or 'none'}")
        for layer, (weight, _) in expert.heads.items():
            if len(weight) != len(own):
                raise MixtureError(
                    f"expert {expert.name!r} has a head of {len(weight)} outputs at '{layer}' for {len(own)} classes "
                    f"({', '.join(own)})"
                )


def stack_updates(experts: list[Expert], layer: str, like: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Stack all experts' updates of `layer`: A (sum of ranks, d_in), B (d_out, sum of ranks), rank of each expert.

    An expert without an update there has rank 0. like: the base weight (d_out, d_in), for shape, dtype and device.
    """
    width_out, width_in = like.shape
    empty = (like.new_zeros(0, width_in), like.new_zeros(width_out, 0))
    pairs = [expert.updates.get(layer, empty) for expert in experts]
    down = torch.cat([pair[0].to(like) for pair in pairs])
    up = torch.cat([pair[1].to(like) for pair in pairs], dim=1)
    return down, up, [pair[0].shape[0] for pair in pairs]
