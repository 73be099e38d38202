"""LoRA adapters on a backbone: new ones to train, and finished ones that become experts."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.cli.flags import TrainingFlags
from common.data.tensors import TaskData
from common.errors import UserError
from common.models.backbones import load_backbone
from common.models.order import is_chance, stated_order, tested_order
from common.models.processors import check_processor
from common.provenance import tensor_fingerprint
from common.tasks import Task
from common.training import distributed
from common.training.blocks import HEAD, lora_targets
from common.training.evaluate import evaluate
from ContextGatedMOE import Expert, MixtureError, reading
from ContextGatedMOE.adapters import refuse_positions
from ContextGatedMOE.finished import check_base, check_options, read_finished, stated_classes
from ContextGatedMOE.renaming import PREFIX, LayerNames, in_todays_names, of_pattern


class LoraLinear(Linear):
    """peft's layer y = W x + b + s B A x, with scale and sum inside the last product, in the dtype of x."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., d_in). Returns (..., d_out)."""
        if self.disable_adapters or self.merged or self.lora_variant or len(self.active_adapters) != 1 or args or kwargs:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        rows = x.reshape(-1, x.shape[-1])  # in two dimensions the sum is made in place, and nothing of y is copied
        y, low = self.base_layer(rows), self.lora_A[name](self.lora_dropout[name](rows))
        y.addmm_(low, self.lora_B[name].weight.T.to(y.dtype), alpha=self.scaling[name])
        return y.view(*x.shape[:-1], y.shape[-1])


def add_lora(model: PreTrainedModel, rank: int, alpha: int, seed: int) -> PeftModel:
    """Put a LoRA adapter on every linear layer of every block; the head is trained and saved with it."""
    targets = lora_targets(model)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, modules_to_save=[HEAD])
    config._register_custom_module({nn.Linear: LoraLinear})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    config.target_modules = targets  # peft has made a set of them, which each process would write in another order
    return adapted


@dataclass
class Adapter:
    """A finished peft LoRA adapter, as it was stored.

    place: where, for messages. stated: the names of its classes in the order of its head's outputs, where it says so.
    where, hub: its folder, or its name on the Hub with `revision` and `subfolder`.
    """

    place: str
    config: LoraConfig
    tensors: dict[str, Tensor]
    stated: list[str] | None
    where: str
    hub: dict[str, str]

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


def read_adapter(name: str, source: str, flag: str = "--expert") -> Adapter:
    """Read the adapter of `--expert NAME=SOURCE`: a folder, or OWNER/NAME[@REVISION][:SUBFOLDER] on the Hub.

    Raises UserError if there is none, or one that is more than low-rank updates of weights.
    """
    place, on_hub = f"{flag} {name}={source}", re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([^:]+))?(?::(.+))?", source)
    where, hub = source, {}
    if on_hub and not Path(source).exists():
        where, hub = on_hub[1], {key: on_hub[i] for key, i in (("revision", 2), ("subfolder", 3)) if on_hub[i]}
    with _as_user_error(place, "; check the name and the network, or give a folder with adapter_config.json and "
                      "adapter_model.safetensors"):
        config, tensors = read_finished(name, where, **hub)
    with _as_user_error(place):
        check_options(name, config)
    return Adapter(place, config, tensors, stated_classes(name, config, where, **hub), where, hub)


def adopt(config: TrainingFlags, data: TaskData, adapter: Adapter) -> PeftModel:
    """The backbone with a finished adapter and its head as the expert of a task.

    Layers have the names of the installed transformers, and its head the order of the task's classes, whatever those were that
    the adapter was trained with. Raises UserError if it was trained on another backbone or with other pictures, has other
    layers than linear ones of this, or no head for the task's classes.
    """
    model = load_backbone(config.model, data.classes, config.seed)
    with _as_user_error(adapter.place, " (--model)"):
        settings, tensors = in_todays_names(data.task.key, LayerNames(model), adapter.config, adapter.tensors)
        if note := check_base(data.task.key, settings, tensors, model):
            _print_once(note)
    with _as_user_error(adapter.place):
        for key in tensors:
            refuse_positions(data.task.key, key.removeprefix(PREFIX).partition(".lora_")[0])
    check_processor(adapter.place, adapter.where, adapter.hub, config.model)
    ranks, layers, head = {}, dict(model.named_modules()), tensors.get(f"{PREFIX}{HEAD}.weight")
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix(PREFIX).partition(".lora_")
        layer = layers.get(name)
        if part in ("A.weight", "B.weight"):
            fits = isinstance(layer, nn.Linear) and tensor.shape[part == "A.weight"] == layer.weight.shape[part == "A.weight"]
            ranks[name] = tensor.shape[part == "B.weight"]
        else:
            fits = name.rpartition(".")[0] == HEAD
        if not fits:
            raise UserError(f"{adapter.place} does not fit --model {config.model}: {key.removeprefix(PREFIX)} is of no "
                            "linear layer there, or of one of another size; give the --model it was trained on")
    if head is None or len(head) != len(data.classes):
        has = "no head of its own" if head is None else f"a head for {len(head)} classes"
        raise UserError(f"{adapter.place} has {has}, where the task has {len(data.classes)} classes; train it with "
                        f"modules_to_save=['{HEAD}'] on the task's classes")
    order = stated_order(adapter.stated, data.classes)
    if order is not None and order != sorted(order):
        _print_once(f"{adapter.place} has the classes in the order {', '.join(adapter.stated)}; its head is put into that of the task")
    alphas = {layer: of_pattern(settings.alpha_pattern, layer, settings.lora_alpha) for layer in ranks}
    adopted = get_peft_model(model, LoraConfig(
        r=adapter.config.r, lora_alpha=adapter.config.lora_alpha, use_rslora=adapter.config.use_rslora, rank_pattern=ranks,
        alpha_pattern=alphas, target_modules=list(ranks), modules_to_save=[HEAD]))
    adopted.peft_config["default"].target_modules = list(ranks)  # a set would be written in another order every time
    set_peft_model_state_dict(adopted, _with_head(tensors, order))
    if order is None:
        _test_order(config, data, adapter.place, adopted, tensors)
    return adopted


def expert_of(name: str, adopted: PeftModel) -> Expert:
    """The adapter and head of an adopted model as an expert of a mixture."""
    return reading.expert_of(name, adopted, list(adopted.config.id2label.values()))


def _test_order(config: TrainingFlags, data: TaskData, place: str, adopted: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Look at validation images whether the head of an adapter that does not name its classes has them in another order."""
    predicted, labels = evaluate(adopted, data.validation, config)[0].argmax(1), data.validation.labels.numpy()
    order = tested_order(predicted, labels, data.classes)
    as_it_is = (f"{place} does not name its classes; as it is, it is right on {(predicted == labels).mean():.0%} of the "
            "validation images")
    if order is not None:
        names = [data.classes[order.index(output)] for output in range(len(order))]
        set_peft_model_state_dict(adopted, _with_head(tensors, order))
        _print_once(f"{as_it_is}, and on {(np.argsort(order)[predicted] == labels).mean():.0%} with the classes in the order "
             f"{', '.join(names)}, which is taken")
    elif is_chance(predicted, labels):
        _print_once(f"{as_it_is}, hardly more than by chance: make sure that it is of these classes, in the order "
             f"{', '.join(data.classes)}")


def _with_head(tensors: dict[str, Tensor], order: list[int] | None) -> dict[str, Tensor]:
    """Tensors with the head's outputs in this order; None for as they are."""
    head = f"{PREFIX}{HEAD}."
    return {key: tensor[order] if order is not None and key.startswith(head) else tensor for key, tensor in tensors.items()}


@contextmanager
def _as_user_error(place: str, fix: str = "") -> Iterator[None]:
    """Raise UserError for a MixtureError, with the adapter's place before it and `fix` after it."""
    try:
        yield
    except MixtureError as error:
        raise UserError(f"{place}: {error}{fix}") from error


@distributed.on_main
def _print_once(text: str) -> None:
    print(text)
