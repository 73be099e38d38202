"""Reading peft LoRA adapters into plain tensors, and refusing those that no mixture can reproduce exactly."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model_state_dict
from torch import Tensor, nn

from ContextGatedMOE.adapters import Expert, check_fit
from ContextGatedMOE.errors import MixtureError
from ContextGatedMOE.finished import check_base, check_options, read_finished, stated_classes
from ContextGatedMOE.renaming import PREFIX, LayerNames, in_todays_names, of_pattern

# Heads that peft trains for a task, whether or not `modules_to_save` names them.
HEADS_OF_TASK = {TaskType.SEQ_CLS: ("classifier", "score"), TaskType.TOKEN_CLS: ("classifier", "score")}


def read_expert(base_model: nn.Module, name: str, adapter: str | Path, **hub: Any) -> Expert:
    """Read the peft LoRA adapter at `adapter` (folder or Hub name) as an expert of `base_model`, which may be that of a mixture.

    hub: for a Hub name, `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`.

    Raises MixtureError if there is no such adapter, it does not fit the base, or it cannot be mixed exactly: DoRA
    and other LoRA variants, biases, adapters of anything but `nn.Linear`, initialisations that change the base. Likewise if it
    was trained on a base with other weights, as far as that can be told without a network.
    """
    return _read(base_model, LayerNames(base_model), name, adapter, set(), hub).loaded()


def read_experts(base_model: nn.Module, adapters: Mapping[str, str | Path]) -> list[Expert]:
    """Read adapters by expert name: see `read_expert`. Tensors stay in the files, to be copied by a mixture at once."""
    names, checked = LayerNames(base_model), set()
    return [_read(base_model, names, name, adapter, checked, {}) for name, adapter in adapters.items()]


def _read(base_model: nn.Module, names: LayerNames, name: str, adapter: str | Path, checked: set[tuple[Any, ...]],
          hub: dict[str, Any]) -> Expert:
    """checked: the stated bases that have been looked at, each of which may be large, with the layers that were adapted."""
    config, stored = read_finished(name, adapter, **hub)
    check_options(name, config)
    stated = stated_classes(name, config, adapter, **hub)
    try:
        config, tensors = in_todays_names(name, names, config, stored)
        base = (config.base_model_name_or_path, config.revision, *sorted(tensors))
        if base not in checked and (note := check_base(name, config, tensors, base_model)):
            warnings.warn(note, stacklevel=4)
        checked.add(base)
        expert = to_expert(name, config, tensors, stated)
        check_fit(expert, names.layers)
    except MixtureError:
        raise
    except Exception as error:  # options of wrong types fail in many ways
        reason = " ".join(str(error).split())[:300]
        raise MixtureError(f"expert '{name}': the adapter at {adapter} does not fit the base model: {reason}") from error
    return expert


def to_expert(name: str, config: LoraConfig, tensors: Mapping[str, Tensor], stated: list[str] | None = None) -> Expert:
    """An adapter's tensors as an expert, by peft's rules for ranks and scalings. stated: its classes, see `Expert`.

    Raises MixtureError if it is more than low-rank updates of linear layers and linear heads, or a tensor is missing.
    """
    wanted = (*(config.modules_to_save or ()), *HEADS_OF_TASK.get(config.task_type, ()))
    adapted: dict[str, dict[str, Tensor]] = {}  # layer -> "A.weight", "B.weight" -> tensor
    replaced: dict[str, dict[str, Tensor]] = {}  # layer -> "weight", "bias" -> tensor
    for key, tensor in tensors.items():
        layer, lora, part = key.removeprefix(PREFIX).partition(".lora_")
        if lora:
            adapted.setdefault(layer, {})[part] = tensor
            continue
        layer, _, part = layer.rpartition(".")
        path = layer.split(".")
        if any(".".join(path[:end]).endswith(wanted) for end in range(1, len(path) + 1)):  # else a copy of an embedding
            replaced.setdefault(layer, {})[part] = tensor
    expert = Expert(name, stated=stated)
    for layer, parts in adapted.items():
        if parts.keys() != {"A.weight", "B.weight"}:
            raise MixtureError(f"expert '{name}' has {', '.join(sorted(parts))} at '{layer}', not the A and B of an nn.Linear; "
                               "it is damaged, or no plain LoRA")
        rank = len(parts["A.weight"])
        if rank != of_pattern(config.rank_pattern, layer, config.r):
            raise MixtureError(f"expert '{name}' has rank {rank} at '{layer}', but its options say another")
        alpha = of_pattern(config.alpha_pattern, layer, config.lora_alpha)
        expert.scaling[layer] = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        expert.updates[layer] = parts["A.weight"], parts["B.weight"]
    for layer, parts in replaced.items():
        if "weight" not in parts or not parts.keys() <= {"weight", "bias"}:
            raise MixtureError(f"expert '{name}' has {', '.join(sorted(parts))} at '{layer}'; only heads that are nn.Linear can be "
                               "mixed")
        expert.heads[layer] = parts["weight"], parts.get("bias")
    if not expert.updates and not expert.heads:
        raise MixtureError(f"expert '{name}' adapts no layer of the base model")
    return expert


def expert_of(name: str, model: PeftModel, stated: list[str] | None = None) -> Expert:
    """The active adapter of a peft model as an expert, with tensors of its own."""
    adapter = model.active_adapter
    tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return to_expert(name, model.peft_config[adapter], tensors, stated).loaded()
