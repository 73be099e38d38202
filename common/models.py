"""Backbones, heads and LoRA: building, loading and saving in the Hugging Face layouts."""

import copy
import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from common.cli.flags import RunFlags
from common.cli.parser import command
from common.data.tensors import TaskData
from common.errors import UserError
from common.files import read_json, recover, write_json, writing
from common.provenance import PROVENANCE_FILE, differences, file_hashes, tensor_fingerprint
from common.tasks import Task
from common.training.distributed import on_main
from common.training.kernels import LoraLinear, register_attention
from common.training.schedule import block_names

HEAD = "classifier"  # what transformers calls the head of its image classifiers
EXAMPLES = ("BEiT", "ViT", "DeiT", "DINOv2", "Swin", "SigLIP", "CLIP")


def load_processor(name: str) -> BaseImageProcessor:
    """The image processor that belongs to a backbone, in its PIL version. Raises UserError if it cannot be had."""
    try:
        return AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(_cannot_load(name, error)) from error


def load_backbone(name: str, classes: list[str], seed: int) -> PreTrainedModel:
    """A pretrained image classifier with a new, seeded head for `classes`, `model.classifier`.

    Every weight but the head's must come from the checkpoint, whose older names of weights transformers translates; what it
    holds beside the model, such as a text model or another head, is left out. Raises UserError if there is no such model, a
    weight is missing, or its blocks are not made of linear layers.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        config.num_labels = len(classes)  # before the names: some keep it beside them
        config.id2label = dict(enumerate(classes))
        config.label2id = {label: index for index, label in config.id2label.items()}
        model, info = _architecture(name, config).from_pretrained(
            name, config=config, dtype=torch.float32, attn_implementation=register_attention(), ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, HTTPError) as error:
        raise UserError(_cannot_load(name, error)) from error
    missing = {key for key, *_ in info["mismatched_keys"]} | set(info["missing_keys"])
    more_blocks = {key for key in info["unexpected_keys"] if re.match(_in_blocks(model), key)}
    for key in sorted(key for key in missing | more_blocks if not key.startswith(f"{HEAD}.")):
        raise UserError(f"--model {name} does not fit: {key} is missing, left over or of another shape")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed} {classes}".encode()))  # so that two tasks do not start with one head
        nn.init.trunc_normal_(model.classifier.weight, std=getattr(model.config, "initializer_range", 0.02))
        nn.init.zeros_(model.classifier.bias)
    return model


def _architecture(name: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
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
    unfit = nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm
    if not parts or not isinstance(getattr(outline, HEAD, None), nn.Linear) or any(isinstance(part, unfit) for part in parts):
        raise UserError(f"--model {name} is a {config.model_type} model, not one of linear layers throughout; {choice}")
    return architecture


def _in_blocks(model: nn.Module) -> str:
    """A pattern of the names of whatever is in the lists of a model's blocks."""
    return "|".join(sorted({re.escape(block.rpartition(".")[0]) + r"\." for block in block_names(model)}))


def _cannot_load(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split()).split(". ")[0][:200]
    return (f"--model {name} cannot be loaded ({reason}); check the name and the network, give a folder, "
            "or use --demo for the small backbone that comes with the code")


def lora_targets(model: nn.Module) -> list[str]:
    """The linear layers of all blocks: how their names end if no other layer's does so too, else their whole names."""
    lists = _in_blocks(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name in linears if re.match(lists, name)]
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in found))
    return endings if [name for name in linears if name.rpartition(".")[2] in endings] == found else found


def add_lora(model: PreTrainedModel, rank: int, alpha: int, seed: int) -> PeftModel:
    """Put a LoRA adapter on every linear layer of every block; the head is trained and saved with it."""
    targets = lora_targets(model)
    config = PeftLoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, modules_to_save=[HEAD])
    config._register_custom_module({nn.Linear: LoraLinear})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    config.target_modules = targets  # peft has made a set of them, which each process would write in another order
    return adapted


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers training may change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def backbone_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a classifier's weights, without the head."""
    return tensor_fingerprint({key: tensor for key, tensor in model.state_dict().items() if not key.startswith(f"{HEAD}.")})


def fingerprint(folder: Path) -> str | None:
    """SHA-256 of a saved model, None if there is none or its provenance cannot be read."""
    try:
        files = read_json(recover(folder) / PROVENANCE_FILE, "")["files"]
    except (UserError, KeyError):
        return None
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def base_folder(config: RunFlags, task: Task) -> Path:
    """Where the base model of a task is."""
    return Path(config.root) / "Results" / "Base_Models" / f"{task.key}_base"


def lora_folder(config: RunFlags, task: Task) -> Path:
    """Where the LoRA expert of a task is."""
    return Path(config.root) / "Results" / "Lora_Finetune" / "Models" / f"{task.key}_lora_finetune"


def check_model(folder: Path, data: TaskData, script: str, config: RunFlags, backbone: str) -> dict[str, Any]:
    """Return what the model in `folder` was made from. backbone: fingerprint of the weights of `config.model`.

    Raises UserError, with the command that fixes it, if the model is missing or damaged, or was made from other images
    or on another backbone.
    """
    fix = f"run {command(script, config)}"
    if not (recover(folder) / PROVENANCE_FILE).exists():
        raise UserError(f"there is no model in {folder}; {fix}")
    made_from = read_json(folder / PROVENANCE_FILE, f"{fix} --overwrite")
    if made_from.get("data") != data.fingerprint:
        raise UserError(f"{folder} was made from other images than {data.task.dataset_folder} holds now; {fix} --overwrite")
    if made_from.get("backbone") != backbone:
        model = made_from.get("model")
        raise UserError(f"{folder} was made on other backbone weights than {config.model} has now; {fix} --overwrite" + (
            f", or give --model {model}, on which it was made" if model != config.model else ""))
    if made_from.get("preprocessing") != data.preprocessing:
        raise UserError(f"{folder} was made with another image processor than {config.model} has now; {fix} --overwrite")
    for damage in differences({"files": made_from.get("files")}, {"files": file_hashes(folder)}):
        raise UserError(f"{folder} was changed or damaged ({damage.partition(' = ')[0]}); {fix} --overwrite")
    return made_from


def load_base(config: RunFlags, data: TaskData) -> PreTrainedModel:
    """A task's base model: the backbone as it is now, with the head that was trained on it.

    Raises UserError if the base model is missing, damaged or does not fit the images or the backbone. It goes by the name
    of its backbone: an adapter that has its own head fits the published backbone just as well, and stays loadable when
    Results/ is moved.
    """
    model = load_backbone(config.model, data.classes, config.seed)
    folder = base_folder(config, data.task)
    check_model(folder, data, "Generate_Base_Model", config, backbone_fingerprint(model))
    head = {key.removeprefix(f"{HEAD}."): tensor for key, tensor in load_file(folder / SAFE_WEIGHTS_NAME).items()
            if key.startswith(f"{HEAD}.")}
    model.classifier.load_state_dict(head)
    return model


def check_expert(config: RunFlags, data: TaskData, backbone: str) -> None:
    """Raise UserError unless a task's LoRA expert fits the images, the backbone of this fingerprint and the base model."""
    folder, base = lora_folder(config, data.task), base_folder(config, data.task)
    made_from = check_model(folder, data, "Lora_Finetune", config, backbone)
    if fingerprint(base) not in (None, made_from.get("base")):
        raise UserError(f"{folder} was made from another base model than {base} is now; "
                        f"run {command('Lora_Finetune', config)} --overwrite")


@on_main
def save(folder: Path, model: Any, processor: BaseImageProcessor, made_from: dict[str, Any]) -> None:
    """Write a model with its image processor and provenance in place of what is in `folder`, whole or not at all."""
    model.to("cpu")
    with writing(folder) as part:
        model.save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)  # peft's empty model card, with a path of this machine
        processor.save_pretrained(part)
        write_json(part / PROVENANCE_FILE, {**made_from, "files": file_hashes(part)})
