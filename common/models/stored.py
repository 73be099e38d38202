"""The models of a root folder: where they are, what they were made from, writing and checking them."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from common.cli.flags import RunFlags
from common.cli.parser import command
from common.errors import UserError
from common.files import read_json, recover, write_json, writing
from common.models.backbones import backbone_fingerprint, load_backbone
from common.provenance import PROVENANCE_FILE, differences, file_hashes
from common.tasks import Task
from common.training.blocks import HEAD
from common.training.distributed import on_main

if TYPE_CHECKING:  # importing `datasets` takes a second, and who only opens a model needs none of it
    from common.data.tensors import TaskData

LONGEST_FOLDER = 200  # bytes, of 255 that a name may have: files are written aside under longer ones


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


def mixture_name(experts: list[str]) -> str:
    """What the folder of a mixture of these experts is called: by all their names or, if that is too long, their number."""
    name = f"{'_'.join(experts)}_cgm_lora"
    return name if len(name.encode()) <= LONGEST_FOLDER else f"{len(experts)}_tasks_cgm_lora"


def mixture_folder(root: str, experts: list[str]) -> Path:
    """Where the mixture of these experts is."""
    return Path(root) / "Results" / "CGM_Lora" / "Models" / mixture_name(experts)


def check_model(folder: Path, data: "TaskData", script: str, config: RunFlags, backbone: str) -> dict[str, Any]:
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


def load_base(config: RunFlags, data: "TaskData") -> PreTrainedModel:
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


def check_expert(config: RunFlags, data: "TaskData", backbone: str) -> None:
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
        model.config.save_pretrained(part)  # peft leaves it out, and with it the names of the classes
        (part / "README.md").unlink(missing_ok=True)  # peft's empty model card, with a path of this machine
        processor.save_pretrained(part)
        write_json(part / PROVENANCE_FILE, {**made_from, "files": file_hashes(part)})
