"""The parts of an image classifier: blocks of linear layers and a head."""

import copy
import re

import torch
from torch import nn
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, PreTrainedConfig, PreTrainedModel

from common.errors import UserError

HEAD = "classifier"  # what transformers calls the head of its image classifiers
POSITIONS = "position_bias"  # in the names of layers that get positions and no image, as in SwinV2: not for a mixture
EXAMPLES = ("BEiT", "ViT", "DeiT", "DINOv2", "Swin", "SigLIP", "CLIP")


def architecture_of(name: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The image classifier of a configuration; of DeiT's two, that with one head. Raises UserError if it is none that fits:
    blocks of linear layers, without convolutions, and one linear layer as the head."""
    choice = f"choose one made of linear layers, such as {', '.join(EXAMPLES)}"
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise UserError(f"--model {name} is a {config.model_type} model, which is no image classifier; {choice}")
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    architecture = found[0] if isinstance(found, tuple) else found
    with torch.device("meta"):
        outline = architecture(copy.deepcopy(config))
    parts = [part for block in block_names(outline) for part in outline.get_submodule(block).modules()]
    convolutions = any(isinstance(part, nn.modules.conv._ConvNd) for part in parts)
    if not parts or convolutions or not isinstance(getattr(outline, HEAD, None), nn.Linear):
        raise UserError(f"--model {name} is a {config.model_type} model, not one of linear layers throughout; {choice}")
    return architecture


def block_names(model: nn.Module) -> list[str]:
    """The names of a model's blocks in order: the entries of the innermost lists of modules that hold linear layers."""
    lists = [name for name, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and any(isinstance(part, nn.Linear) for part in module.modules())]
    innermost = [name for name in lists if not any(other.startswith(f"{name}.") for other in lists)]
    return [f"{name}.{index}" for name in innermost for index in range(len(model.get_submodule(name)))]


def in_blocks(model: nn.Module) -> str:
    """A pattern of the names of whatever is in the lists of a model's blocks."""
    return "|".join(sorted({re.escape(block.rpartition(".")[0]) + r"\." for block in block_names(model)}))


def lora_targets(model: nn.Module) -> list[str]:
    """The linear layers of all blocks that get an image's tokens: how their names end if no other layer's does so too, else
    their whole names."""
    lists = in_blocks(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name in linears if re.match(lists, name) and POSITIONS not in name]
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in found))
    return endings if [name for name in linears if name.rpartition(".")[2] in endings] == found else found
