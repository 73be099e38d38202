"""Mixtures on disk: gates, experts, heads and statistics as safetensors, what they belong to as JSON."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ContextGatedMOE import building
from ContextGatedMOE.adapters import Expert, MixtureError
from ContextGatedMOE.layers import MixtureLinear
from ContextGatedMOE.statistics import Statistics

CONFIG_FILE = "cgm_config.json"
WEIGHTS_FILE = "cgm_model.safetensors"
STATISTICS_FILE = "cgm_statistics.safetensors"
FORMAT = 2
# What a configuration holds, and of what type.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "base_model": (str, type(None)), "base_class": str, "base_dtype": str, "base_fingerprint": str, "experts": list,
    "classes": (dict, type(None)), "same": list, "gate_hidden": int, "top_k": (int, type(None)), "refuse_below": (float, type(None)),
    "ranks": dict, "heads": list, "weights_sha256": str, "statistics_sha256": (str, type(None)),
}


class Saving:
    """`save_pretrained` and `from_pretrained` of a mixture."""

    def base_fingerprint(self) -> str:
        """SHA-256 over the frozen base tensors, without the heads that the experts replace."""
        return fingerprint(self.base_model, self._head_names())

    def _head_names(self) -> list[str]:
        return [name for name, layer in self.mixture_layers().items() if not isinstance(layer, MixtureLinear)]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write gates, experts, heads and statistics (safetensors) and what they belong to (JSON) into `folder`.

        The base weights are not copied: their name and fingerprint are. Each file is written aside and moved into place.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        layers = self.mixture_layers()
        parts = {**layers, **{f"{name}.{building.GATE}": gate for name, gate in self.gates().items()}}
        tensors = {f"{name}.{key}": tensor.contiguous() for name, module in parts.items()
                   for key, tensor in module.state_dict().items() if not key.startswith(("base.", f"{building.GATE}."))}
        sums = {f"{expert}/{layer}/{key}": tensor.contiguous() for expert, by_layer in self.statistics.items()
                for layer, statistics in by_layer.items() for key, tensor in vars(statistics).items()}
        files = {WEIGHTS_FILE: tensors, **({STATISTICS_FILE: sums} if sums else {})}
        for name, content in files.items():
            save_file(content, folder / f"{name}.part")
        config = {
            "format": FORMAT,
            "base_model": getattr(self.base_model, "name_or_path", "") or None,
            "base_class": type(self.base_model).__name__,
            "base_dtype": str(next(self.base_model.parameters()).dtype).removeprefix("torch."),
            "base_fingerprint": self.base_fingerprint(),
            "experts": self.expert_names,
            "classes": self.classes,
            "same": self.same,
            "gate_hidden": self.gate_hidden,
            "top_k": self.top_k,
            "refuse_below": self.refuse_below,
            "ranks": {name: module.ranks for name, module in layers.items() if isinstance(module, MixtureLinear)},
            "heads": self._head_names(),
            "weights_sha256": _file_digest(folder / f"{WEIGHTS_FILE}.part"),
            "statistics_sha256": _file_digest(folder / f"{STATISTICS_FILE}.part") if sums else None,
        }
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / f"{CONFIG_FILE}.part").write_text(text, encoding="utf-8")
        if hasattr(self.config, "save_pretrained"):
            self.config.save_pretrained(folder)
        if not sums:
            (folder / STATISTICS_FILE).unlink(missing_ok=True)
        for name in (*files, CONFIG_FILE):
            os.replace(folder / f"{name}.part", folder / name)

    @classmethod
    def from_pretrained(cls, folder: str | Path, base_model: nn.Module | None = None) -> Self:
        """Load what `save_pretrained` wrote, in evaluation mode.

        base_model: the base to use; if None, the transformers model that was named when saving is loaded. Raises
        MixtureError if the folder is missing, damaged, of another format, or the base is not the one it was made for.
        """
        folder = Path(folder)
        config = read_config(folder)
        tensors, sums = read_tensors(folder, config)
        base_model = _load_base(folder, config) if base_model is None else base_model
        if fingerprint(base_model, config["heads"]) != config["base_fingerprint"]:
            raise MixtureError(
                f"this base model is not the one {folder} was made for ({config['base_model']}, {config['base_dtype']}): "
                "its weights differ"
            )
        try:
            sizes = [len(config["classes"][name]) if config["classes"] else 1 for name in config["experts"]]
            experts = cut_experts(config["experts"], config["ranks"], config["heads"], sizes, tensors)
            same = [[(expert, name) for expert, name in group] for group in config["same"]]
            model = cls(base_model, experts, config["classes"], same=same, gate_hidden=config["gate_hidden"], top_k=config["top_k"])
            parts = {**model.mixture_layers(), **{f"{name}.{building.GATE}": gate for name, gate in model.gates().items()}}
            for name, module in parts.items():
                own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
                kept = {key: value for key, value in module.state_dict().items() if key.startswith(("base.", f"{building.GATE}."))}
                module.load_state_dict({key: value for key, value in own.items() if not key.startswith(f"{building.GATE}.")} | kept)
            model.statistics = _cut_statistics(sums)
        except MixtureError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise MixtureError(f"{folder} does not hold together: {' '.join(str(error).split())[:200]}") from error
        model.refuse_below = config["refuse_below"]
        return model.eval()


def plain_state(base_model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A base model's own parameters and saved buffers by their plain names, whether or not it is part of a mixture."""
    layers = building.mixture_layers(base_model)
    for name, tensor in base_model.state_dict().items():
        owner = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        if owner is not None:
            if name.startswith(f"{owner}.base."):
                yield f"{owner}.{name.removeprefix(f'{owner}.base.')}", tensor
        elif f"{building.GATE}." not in name:
            yield name, tensor


def fingerprint(base_model: nn.Module, heads: list[str]) -> str:
    """SHA-256 over a model's own parameters and saved buffers, without the layers named `heads`."""
    digest = hashlib.sha256()
    replaced = tuple(f"{name}." for name in heads)
    for name, tensor in sorted(plain_state(base_model), key=lambda entry: entry[0]):
        if replaced and name.startswith(replaced):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a saved mixture. Raises MixtureError unless there is one, of this format, with all it needs."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise MixtureError(f"there is no saved mixture in {folder}: {name} is missing")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MixtureError(f"{folder / CONFIG_FILE} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise MixtureError(f"{folder / CONFIG_FILE} is not of format {FORMAT}; make the mixture anew from its adapters")
    for name, kind in FIELDS.items():
        if name not in config or not isinstance(config[name], kind) or isinstance(config[name], bool):
            raise MixtureError(f"{folder / CONFIG_FILE} has no sensible {name!r}")
    return config


def read_tensors(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and statistics of a saved mixture. Raises MixtureError unless they are whole."""
    contents = []
    for name, digest in ((WEIGHTS_FILE, config["weights_sha256"]), (STATISTICS_FILE, config["statistics_sha256"])):
        try:
            if digest is not None and _file_digest(folder / name) != digest:
                raise MixtureError(f"{folder / name} was changed or damaged: its checksum does not fit")
            contents.append({} if digest is None else load_file(folder / name))
        except (OSError, SafetensorError) as error:
            raise MixtureError(f"{folder / name} cannot be read: {error}") from error
    return contents[0], contents[1]


def _load_base(folder: Path, config: dict[str, Any]) -> nn.Module:
    """Load the transformers model the mixture was saved on, as it was published; the experts bring their heads."""
    name, kind = config["base_model"], getattr(transformers, config["base_class"], None)
    if not name or kind is None:
        raise MixtureError(f"{folder} was made on a {config['base_class']} that has no name; pass base_model=...")
    try:
        return kind.from_pretrained(name, dtype=config["base_dtype"])
    except Exception as error:  # transformers raises many kinds for what is missing or does not fit
        reason = " ".join(str(error).split())[:300]
        raise MixtureError(f"the base model {name} of {folder} cannot be loaded; pass base_model=... ({reason})") from error


def cut_experts(names: list[str], ranks: dict[str, list[int]], heads: list[str], sizes: list[int],
                tensors: dict[str, Tensor]) -> list[Expert]:
    """Cut stacked tensors, keyed "<layer>.<tensor>", into experts again. sizes: number of classes of each expert."""
    experts = [Expert(name) for name in names]
    for layer, own in ranks.items():
        downs, ups = tensors[f"{layer}.lora_A"].split(own), tensors[f"{layer}.lora_B"].split(own, dim=1)
        for expert, down, up in zip(experts, downs, ups, strict=True):
            if down.shape[0]:
                expert.updates[layer] = (down, up)
    for layer in heads:
        weights = tensors[f"{layer}.expert_weight"]
        biases = tensors.get(f"{layer}.expert_bias", [None] * len(experts))
        if weights.ndim == 2:  # one after the other
            weights, biases = weights.split(sizes), biases.split(sizes)
        for expert, weight, bias in zip(experts, weights, biases, strict=True):
            expert.heads[layer] = (weight, bias)
    return experts


def _cut_statistics(sums: dict[str, Tensor]) -> dict[str, dict[str, Statistics]]:
    """Statistics by expert and layer, from tensors keyed "<expert>/<layer>/<tensor>"."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in sums.items():
        rest, _, part = key.rpartition("/")
        expert, _, layer = rest.rpartition("/")
        found.setdefault(expert, {}).setdefault(layer, {})[part] = tensor
    return {expert: {layer: Statistics(**parts) for layer, parts in by_layer.items()} for expert, by_layer in found.items()}
