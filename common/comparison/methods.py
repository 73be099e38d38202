"""The other ways to make one model of the same adapters: each function makes a model.

Models that end in features have no head of their own: they give what reaches the head, and every expert's head reads it.
"""

import copy
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import ArrowConfig, PeftModel, create_arrow_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import models
from common.cli.flags import MixtureConfig, TrainingFlags
from common.cli.parser import command
from common.data.tensors import TaskData, together
from common.files import read_json
from common.models.lora import add_lora
from common.training.blocks import HEAD
from common.training.checkpoint import Checkpoint
from common.training.loop import fit
from common.training.objective import JointObjective
from ContextGatedMOE.layers import MixtureLinear
from ContextGatedMOE.routing import per_image

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
# Name in peft -> its own options. Half of the entries are kept, the value peft's documentation uses in its examples.
HALF = {"density": 0.5}
MERGES = {"linear": {}, "cat": {}, "ties": HALF, "dare_linear": HALF, "dare_ties": HALF}
SHOWN = {"linear": "linear", "cat": "cat", "ties": "TIES", "dare_linear": "DARE linear", "dare_ties": "DARE TIES"}


def plain_body(config: MixtureConfig, tasks: list[TaskData]) -> nn.Module:
    """The pretrained backbone: images to features (B, D)."""
    body = models.load_backbone(config.model, tasks[0].classes, config.seed)
    body.classifier = nn.Identity()
    return body


def expert_body(config: MixtureConfig, tasks: list[TaskData], folder: str) -> nn.Module:
    """The backbone with one adapter of `headless` in its weights: images to features (B, D)."""
    return PeftModel.from_pretrained(plain_body(config, tasks), folder).merge_and_unload()


def merge(kind: str, weight: float, folders: list[str], config: MixtureConfig, tasks: list[TaskData]) -> nn.Module:
    """The backbone with one of peft's MERGES of the adapters in its weights, each weighed alike: images to features (B, D).

    Raises ValueError, as peft does, if it cannot merge adapters of these shapes in this way.
    """
    model = PeftModel.from_pretrained(plain_body(config, tasks), folders[0], adapter_name="0")
    for index, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, str(index))
    names = [str(index) for index in range(len(folders))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # DARE drops entries at random
        model.add_weighted_adapter(names, [weight] * len(names), "merged", combination_type=kind, **MERGES[kind])
    return model.merge_and_unload(adapter_names=["merged"])


def arrow(top_k: int, folders: list[str], config: MixtureConfig, tasks: list[TaskData]) -> nn.Module:
    """peft's Arrow routing (Ostapenko et al. 2024): every token chooses adapters, layer by layer. Images to features (B, D).

    Raises ValueError, as peft does, if the adapters are of different shapes.
    """
    return create_arrow_model(plain_body(config, tasks), folders, ArrowConfig(top_k=top_k, rng_seed=config.seed))


@contextmanager
def headless(config: MixtureConfig, tasks: list[TaskData]) -> Iterator[list[str]]:
    """Folders with copies of the experts' adapters without their heads, which peft does not merge."""
    with tempfile.TemporaryDirectory() as top:
        folders = []
        for data in tasks:
            source, target = models.lora_folder(config, data.task), Path(top) / data.task.key
            target.mkdir()
            tensors = load_file(source / ADAPTER_FILES[0])
            kept = {key: tensor for key, tensor in tensors.items() if f".{HEAD}." not in key}
            save_file(kept, target / ADAPTER_FILES[0])
            settings = json.loads((source / ADAPTER_FILES[1]).read_text(encoding="utf-8"))
            (target / ADAPTER_FILES[1]).write_text(json.dumps({**settings, "modules_to_save": None}), encoding="utf-8")
            folders.append(str(target))
        yield folders


# ---- trained on all tasks together ----


def base_heads(config: MixtureConfig, tasks: list[TaskData]) -> nn.Linear:
    """The heads of the tasks' base models, one after the other. Raises UserError if one is missing."""
    heads = [models.load_base(config, data).classifier for data in tasks]
    joint = nn.Linear(heads[0].in_features, sum(head.out_features for head in heads))
    with torch.no_grad():
        joint.weight.copy_(torch.cat([head.weight for head in heads]))
        joint.bias.copy_(torch.cat([head.bias for head in heads]))
    return joint


def joint_lora(config: MixtureConfig, tasks: list[TaskData], ranks: list[int],
               checkpoint: Callable[[str], Checkpoint | None] = lambda name: None) -> nn.Module:
    """One LoRA of the experts' total rank for all tasks' classes, trained on all tasks together, tasks weighing alike.

    It starts from the base models' heads, as the experts do, and learns by their recipe. With many tasks and the rank of all
    their experts the recipe's learning rate can be too high, so it is also trained with that rate over the number of tasks;
    the one of lower validation loss is returned. ranks: those of the experts. checkpoint: by name, where training goes on.
    """
    folder = Path(config.root) / "Results" / "Lora_Finetune"
    recipe = read_json(folder / "config.json", f"run {command('Lora_Finetune', config)} --overwrite",
                       {"lora_rank": int, "lora_alpha": int})
    kept = {field.name: recipe[field.name] for field in dataclasses.fields(TrainingFlags) if field.name in recipe}
    settings = dataclasses.replace(config, **kept)
    rank, head = sum(ranks), base_heads(config, tasks)
    first = torch.tensor([0, *(len(data.classes) for data in tasks[:-1])]).cumsum(0)
    train, validation = together([data.train for data in tasks]), together([data.validation for data in tasks])
    trained = []
    for rate in (settings.learning_rate, settings.learning_rate / len(tasks)):
        base = models.load_backbone(config.model, tasks[0].classes, config.seed)
        base.classifier = copy.deepcopy(head)
        model = add_lora(base, rank, round(rank * recipe["lora_alpha"] / recipe["lora_rank"]), config.seed)
        name = f"joint LoRA, seed {config.seed}, learning rate {rate:g}"
        fitted = fit(model, train, validation, dataclasses.replace(settings, learning_rate=rate), name,
                     objective=JointObjective(first), checkpoint=checkpoint(f"compared_joint_{config.seed}_{rate:g}"))
        trained.append((fitted.history["validation_loss"].min(), model))
    return min(trained, key=lambda pair: pair[0])[1]


class BatchAveraged(nn.Module):
    """A gated layer in the formulation found in earlier implementations.

    The weights are averaged over the batch, and A and B are mixed apart: y = W x + b + (sum_e g_e B_e)(sum_e g_e A_e) x. A
    prediction then depends on its batch mates, and products B_i A_j of different experts appear.
    """

    def __init__(self, layer: MixtureLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in). Returns (..., d_out)."""
        layer = self.layer
        y, (_, weights, _) = layer.base(x), per_image(x, layer.name)
        if weights is None:
            return y
        shares = weights.mean(0)[:, None] * layer.used  # (E, r), r the largest rank
        down = torch.einsum("er,erd->rd", shares, layer.lora_A[layer.rows])
        up = torch.einsum("er,oer->or", shares, layer.lora_B[:, layer.rows])
        return y + ((x @ down.T.to(x.dtype)) @ up.T.to(x.dtype)).to(y.dtype)


def earlier_formulation(mixture: nn.Module) -> nn.Module:
    """Turn a mixture, in place, into the earlier formulation, with the same gates and the same head."""
    for name, layer in mixture.mixture_layers().items():
        if isinstance(layer, MixtureLinear):
            mixture.base_model.set_submodule(name, BatchAveraged(layer))
    return mixture
