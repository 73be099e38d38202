"""Finished peft LoRA adapters: read from a folder or the Hub and checked, in one way for every entrance."""

import copy
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ContextGatedMOE import identity
from ContextGatedMOE.errors import MixtureError
from ContextGatedMOE.labels import from_id2label
from ContextGatedMOE.renaming import PREFIX

# Initialisations that only choose the first A and B. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) also change the
# base weights, so that two such adapters do not share one base.
_PLAIN_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Options besides peft's LoRA variants that make an adapter more than `W x + s B A x`.
_MORE_THAN_LORA = ("use_qalora", "target_parameters", "trainable_token_indices", "layer_replication")


def read_finished(name: str, place: str | Path, **hub: Any) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Options and tensors of the adapter at `place`, a folder or a Hub name, as they were stored.

    hub: for a Hub name, `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`. Raises MixtureError, with the
    expert's name, if there is no such adapter, or one that is damaged or no LoRA adapter.
    """
    folder = Path(place, hub.get("subfolder") or "")
    if not Path(place).exists() and (Path(place).is_absolute() or str(place).count("/") != 1):
        raise MixtureError(f"expert '{name}': there is no folder {place}, and a name on the Hub is OWNER/NAME")
    try:
        config = PeftConfig.from_pretrained(str(place), **hub)
        if Path(place).is_dir() and not any((folder / file).is_file() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            raise FileNotFoundError(f"{SAFETENSORS_WEIGHTS_NAME} is missing")  # peft would ask the Hub for a folder's name
        tensors = load_peft_weights(str(place), device="cpu", **hub)
    except Exception as error:  # peft, huggingface_hub, safetensors and torch raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise MixtureError(f"expert '{name}': there is no peft adapter that can be read at {place} ({reason})") from error
    if not isinstance(config, LoraConfig):
        raise MixtureError(f"expert '{name}' is a {config.peft_type} adapter; only LoRA adapters can be mixed")
    return config, tensors


def stated_classes(name: str, config: LoraConfig, place: str | Path, **hub: Any) -> list[str] | None:
    """The names of an adapter's classes in the order of its head's outputs, as an `id2label` beside it or of its base says.

    Of another number or without names they are given as they are: whoever knows the classes looks whether these are they.
    None if there is no such file; the base's is looked for here only, that of an adapter on the Hub there.
    """
    for where, options in ((place, hub), (config.base_model_name_or_path, {"local_files_only": True})):
        try:
            id2label = PreTrainedConfig.get_config_dict(where, **options)[0]["id2label"]
            return [str(label) for label in from_id2label(name, id2label)]
        except Exception:  # transformers raises many kinds for what is not there; a file without names says nothing
            continue
    return None


def check_options(name: str, config: LoraConfig) -> None:
    """Raise MixtureError if an adapter's options alone show it to be more than `W x + s B A x` on weights that all share."""
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


def check_base(name: str, config: LoraConfig, tensors: Mapping[str, Tensor], base_model: nn.Module) -> str | None:
    """Raise MixtureError if an adapter says that it was trained on a base model, and that has other weights than `base_model`.

    tensors: of the adapter, in today's names; heads of its own do not count. The stated base is looked at where it is a folder
    or in the Hub's cache; nothing is fetched. Returns a sentence if it is not there and is called otherwise, else None.
    """
    stated, own = config.base_model_name_or_path, getattr(base_model, "name_or_path", "")
    if not stated or stated == own or (Path(stated).is_dir() and Path(own).is_dir() and Path(stated).samefile(own)):
        return None
    heads = tuple(key.removeprefix(PREFIX).rpartition(".")[0] + "." for key in tensors if ".lora_" not in key)
    different = _difference(stated, config.revision, base_model, heads)
    if different:
        raise MixtureError(f"expert '{name}' was trained on {stated}, whose {different} is not that of "
                           f"{own or 'this base model'}; load {stated} as the base model")
    if different is None and Path(stated).name != Path(own).name:
        return f"expert '{name}' was trained on {stated}, which is not here; nobody can tell whether this base has its weights"
    return None


def _difference(stated: str, revision: str | None, base_model: nn.Module, heads: tuple[str, ...]) -> str | None:
    """The first weight that differs between a base model and the stated one, "" if none does, None if that cannot be told."""
    if not isinstance(base_model, PreTrainedModel):
        return None
    where = {"local_files_only": True, "revision": revision, "trust_remote_code": False}
    try:
        settings = AutoConfig.from_pretrained(stated, **where)
        if settings.model_type != base_model.config.model_type:
            return "model type"
        with identity.quiet():
            other, info = type(base_model).from_pretrained(
                stated, config=copy.deepcopy(base_model.config), dtype=settings.dtype or torch.float32,
                ignore_mismatched_sizes=True, output_loading_info=True, **where)
    except Exception:  # transformers raises many kinds for what is not there or cannot be read
        return None
    theirs, mismatched = other.state_dict(), {key for key, *_ in info["mismatched_keys"]}
    for key, tensor in identity.plain_state(base_model):
        if key.startswith(heads) or tensor.is_meta or key in info["missing_keys"]:  # which only chance has filled
            continue
        if key in mismatched or key not in theirs or not _same(tensor.cpu(), theirs[key]):
            return f"'{key}'"
    return ""


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, or one is what rounding to its type makes of the other."""
    if {one.dtype, other.dtype} == {torch.bfloat16, torch.float16}:  # of one fp32 tensor: these cannot be told apart
        return one.shape == other.shape
    coarse = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(one.to(coarse), other.to(coarse))
