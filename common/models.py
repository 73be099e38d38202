"""Backbones, heads and LoRA: building, loading and saving in the Hugging Face layouts."""

import hashlib
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import HTTPError
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BaseImageProcessor,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_NAME

from common.cli.flags import RunFlags
from common.cli.parser import command
from common.data.tensors import TaskData
from common.errors import UserError
from common.files import read_json, recover, write_json, writing
from common.provenance import PROVENANCE_FILE, differences, file_hashes, tensor_fingerprint
from common.tasks import Task
from common.training.blocks import HEAD, architecture_of, in_blocks, lora_targets
from common.training.distributed import on_main
from common.training.kernels import LoraLinear, register_attention

PEFT_PREFIX = "base_model.model."



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
        model, info = architecture_of(name, config).from_pretrained(
            name, config=config, dtype=torch.float32, attn_implementation=register_attention(), ignore_mismatched_sizes=True,
            output_loading_info=True,
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


@dataclass
class Adapter:
    """A finished peft LoRA adapter, as it was stored. place: where, for messages."""

    place: str
    config: PeftLoraConfig
    tensors: dict[str, Tensor]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its tensors and scaling."""
        settings = {name: getattr(self.config, name) for name in ("r", "lora_alpha", "alpha_pattern", "use_rslora")}
        return hashlib.sha256(f"{tensor_fingerprint(self.tensors)} {settings}".encode()).hexdigest()


def read_adapters(sources: dict[str, str], tasks: list[Task]) -> dict[str, Adapter]:
    """The finished adapters of `--expert`: key of the task -> adapter. Raises UserError if one cannot be an expert."""
    keys = [task.key for task in tasks]
    for name in sources:
        if name not in keys:
            raise UserError(f"--expert {name}=...: there is no task {name}; the tasks are {', '.join(keys)}")
    return {name: read_adapter(name, source) for name, source in sources.items()}


def read_adapter(name: str, source: str) -> Adapter:
    """Read the adapter of `--expert NAME=SOURCE`: a folder, or OWNER/NAME[@REVISION][:SUBFOLDER] on the Hub.

    Raises UserError if there is none, or one that is more than low-rank updates of weights.
    """
    place, on_hub = f"--expert {name}={source}", re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([^:]+))?(?::(.+))?", source)
    where, hub = source, {}
    if on_hub and not Path(source).exists():
        where, hub = on_hub[1], {key: on_hub[i] for key, i in (("revision", 2), ("subfolder", 3)) if on_hub[i]}
    try:
        config = PeftConfig.from_pretrained(where, **hub)
        tensors = load_peft_weights(where, device="cpu", **hub)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, HTTPError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{place}: there is no peft adapter that can be read ({reason}); check the name and the network, or "
                        "give a folder with adapter_config.json and adapter_model.safetensors") from error
    if not isinstance(config, PeftLoraConfig):
        raise UserError(f"{place} is a {config.peft_type} adapter; only LoRA adapters can be experts")
    if config.use_dora or config.bias != "none" or config.lora_bias:
        raise UserError(f"{place} has DoRA or biases; only low-rank updates of weights can be mixed: train it without")
    return Adapter(place, config, tensors)


def adopt(config: RunFlags, data: TaskData, adapter: Adapter) -> PeftModel:
    """The backbone with a finished adapter and its head as the expert of a task.

    Layers have the names of the installed transformers, whatever those were that the adapter was trained with. Raises UserError
    if it was trained on another backbone, has other layers than linear ones of this, or no head for the task's classes.
    """
    model = load_backbone(config.model, data.classes, config.seed)
    _check_base(config, data, adapter, backbone_fingerprint(model))
    renamings = [part for part in get_model_conversion_mapping(model) if isinstance(part, WeightRenaming)]
    tensors, old_names = {}, {}
    for key, tensor in adapter.tensors.items():
        old = key.removeprefix(PEFT_PREFIX)
        new = rename_source_key(old, renamings, [])[0]
        tensors[PEFT_PREFIX + new], old_names[new.partition(".lora_")[0]] = tensor, old.partition(".lora_")[0]
    ranks, layers, head = {}, dict(model.named_modules()), tensors.get(f"{PEFT_PREFIX}{HEAD}.weight")
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix(PEFT_PREFIX).partition(".lora_")
        layer = layers.get(name)
        if part in ("A.weight", "B.weight"):
            fits = isinstance(layer, nn.Linear) and tensor.shape[part == "A.weight"] == layer.weight.shape[part == "A.weight"]
            ranks[name] = tensor.shape[part == "B.weight"]
        else:
            fits = name.rpartition(".")[0] == HEAD
        if not fits:
            raise UserError(f"{adapter.place} does not fit --model {config.model}: {key.removeprefix(PEFT_PREFIX)} is of no "
                            "linear layer there, or of one of another size; give the --model it was trained on")
    if head is None or len(head) != len(data.classes):
        has = "no head of its own" if head is None else f"a head for {len(head)} classes"
        raise UserError(f"{adapter.place} has {has}, where the task has {len(data.classes)} classes; train it with "
                        f"modules_to_save=['{HEAD}'] on the task's classes")
    alphas = {new: adapter.config.alpha_pattern.get(get_pattern_key(adapter.config.alpha_pattern, old_names[new]),
                                                    adapter.config.lora_alpha) for new in ranks}
    adopted = get_peft_model(model, PeftLoraConfig(
        r=adapter.config.r, lora_alpha=adapter.config.lora_alpha, use_rslora=adapter.config.use_rslora, rank_pattern=ranks,
        alpha_pattern=alphas, target_modules=list(ranks), modules_to_save=[HEAD]))
    adopted.peft_config["default"].target_modules = list(ranks)  # a set would be written in another order every time
    set_peft_model_state_dict(adopted, tensors)
    return adopted


def _check_base(config: RunFlags, data: TaskData, adapter: Adapter, backbone: str) -> None:
    """Raise UserError if an adapter says that it was trained on another backbone: one of another name or of other weights."""
    stated = adapter.config.base_model_name_or_path
    if not stated or stated == config.model:
        return
    if Path(stated).is_dir():
        same = backbone_fingerprint(load_backbone(stated, data.classes, config.seed)) == backbone
    else:
        same = Path(stated).name == Path(config.model).name
    if not same:
        raise UserError(f"{adapter.place} was trained on {stated}, not on {config.model}; give --model {stated}")


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
    """Raise UserError unless a task's LoRA expert fits the images, the backbone of this fingerprint and, if it was trained
    here, the base model."""
    folder, base = lora_folder(config, data.task), base_folder(config, data.task)
    made_from = check_model(folder, data, "Lora_Finetune", config, backbone)
    if not made_from.get("adapter") and fingerprint(base) not in (None, made_from.get("base")):
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
