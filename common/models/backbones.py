"""Pretrained backbones with a new head, and their image processors."""

import re
import zlib

import torch
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from common.errors import UserError
from common.provenance import tensor_fingerprint
from common.training.blocks import HEAD, architecture_of, in_blocks
from common.training.kernels import register_attention


def load_processor(name: str) -> BaseImageProcessor:
    """The image processor that belongs to a backbone, in its PIL version. Raises UserError if it cannot be had."""
    try:
        return AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(_cannot_load(name, error)) from error


def load_backbone(name: str, classes: list[str], seed: int, revision: str = "main") -> PreTrainedModel:
    """A pretrained image classifier with a new, seeded head for `classes`, `model.classifier`.

    Every weight but the head's must come from the checkpoint, whose older names of weights transformers translates; what it
    holds beside the model, such as a text model or another head, is left out. Raises UserError if there is no such model, a
    weight is missing, or its blocks are not made of linear layers. revision: of a model on the Hub.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, revision=revision)
        config.num_labels = len(classes)  # before the names: some keep it beside them
        config.id2label = dict(enumerate(classes))
        config.label2id = {label: index for index, label in config.id2label.items()}
        architecture = architecture_of(name, config)
        attention = register_attention() if architecture._supports_sdpa else "eager"  # SwinV2 has its own
        model, info = architecture.from_pretrained(
            name, config=config, dtype=torch.float32, attn_implementation=attention, ignore_mismatched_sizes=True,
            output_loading_info=True, revision=revision,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, HTTPError) as error:
        raise UserError(_cannot_load(name, error)) from error
    missing = {key for key, *_ in info["mismatched_keys"]} | set(info["missing_keys"])
    more_blocks = {key for key in info["unexpected_keys"] if re.match(in_blocks(model), key)}
    for key in sorted(key for key in missing | more_blocks if not key.startswith(f"{HEAD}.")):
        raise UserError(f"--model {name} does not fit: {key} is missing, left over or of another shape")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed} {classes}".encode()))  # so that two tasks do not start with one head
        nn.init.trunc_normal_(model.classifier.weight, std=getattr(model.config, "initializer_range", 0.02))
        nn.init.zeros_(model.classifier.bias)
    return model


def _cannot_load(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split()).split(". ")[0][:200]
    return (f"--model {name} cannot be loaded ({reason}); check the name and the network, give a folder, "
            "or use --demo for the small backbone that comes with the code")


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers training may change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def backbone_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a classifier's weights, without the head."""
    return tensor_fingerprint({key: tensor for key, tensor in model.state_dict().items() if not key.startswith(f"{HEAD}.")})
