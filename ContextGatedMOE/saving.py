"""Mixtures on disk: gates, experts, heads and statistics as safetensors, what they belong to as JSON."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ContextGatedMOE import building, hub, identity
from ContextGatedMOE.adapters import cut_experts
from ContextGatedMOE.errors import MixtureError
from ContextGatedMOE.heads import HEAD_GATE
from ContextGatedMOE.layers import MixtureLinear
from ContextGatedMOE.statistics import Statistics

CONFIG_FILE = "cgm_config.json"
WEIGHTS_FILE = "cgm_model.safetensors"
STATISTICS_FILE = "cgm_statistics.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE, STATISTICS_FILE)
FORMAT = 3
NOT_ITS_OWN = ("base.", f"{building.GATE}.", f"{HEAD_GATE}.")  # tensors inside a layer that belong to the base or to its gate
# What is kept of a mixture under its own name; the rest of a configuration is `_config`'s.
KEPT = ("classes", "same", "gate_hidden", "top_k", "refuse_below", "passes", "fitted_passes", "shrinkage", "without_adapter",
        "usual_familiarity")
FIELDS = {*KEPT, "format", "base_model", "base_commit", "base_class", "base_dtype", "base_fingerprint", "base_rounded", "experts",
          "ranks", "heads", "start", "gates", "weights_sha256", "statistics_sha256"}


class Saving:
    """`save_pretrained` and `from_pretrained` of a mixture."""

    def base_fingerprint(self) -> str:
        """SHA-256 over the frozen base tensors, without the heads that the experts replace."""
        return identity.fingerprint(self.base_model, _heads_of(self))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write gates, experts, heads and statistics (safetensors) and what they belong to (JSON) into `folder`.

        The base weights are not copied: their folder, or name and commit on the Hub, and fingerprint are. Each file is written
        aside and moved into place.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in _tensors(self).items()}
        sums = {f"{expert}/{layer}/{key}": tensor.contiguous() for expert, by_layer in self.statistics.items()
                for layer, statistics in by_layer.items() for key, tensor in vars(statistics).items()}
        files = {WEIGHTS_FILE: tensors, **({STATISTICS_FILE: sums} if sums else {})}
        for name, content in files.items():
            save_file(content, folder / f"{name}.part")
        digests = {f"{kind}_sha256": _file_digest(folder / f"{name}.part") if name in files else None
                   for kind, name in (("weights", WEIGHTS_FILE), ("statistics", STATISTICS_FILE))}
        text = json.dumps(_config(self) | digests, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / f"{CONFIG_FILE}.part").write_text(text, encoding="utf-8")
        if hasattr(getattr(self.base_model, "config", None), "save_pretrained"):
            self.config.save_pretrained(folder)
        if not sums:
            (folder / STATISTICS_FILE).unlink(missing_ok=True)
        for name in (*files, CONFIG_FILE):
            os.replace(folder / f"{name}.part", folder / name)

    @classmethod
    def from_pretrained(cls, name: str | Path, base_model: nn.Module | None = None, *, revision: str | None = None,
                        subfolder: str = "", token: str | bool | None = None, cache_dir: str | Path | None = None,
                        local_files_only: bool = False, check_base: bool = True, **base_options: Any) -> Self:
        """Load what `save_pretrained` wrote, in evaluation mode.

        name: a folder, or a Hub name "owner/name" with `revision` (branch, tag or commit), `subfolder`, `token`, `cache_dir`
        and `local_files_only` as huggingface_hub takes them. base_model: the base to use; if None, the transformers model that
        was named when saving is loaded, with `base_options` such as dtype or device_map; the Hub is asked only for a commit
        that was saved. check_base: whether to make sure that the base is the one the mixture was made for; the same weights in
        another floating-point type are. Raises MixtureError if the mixture is missing, damaged, of another format, or the base
        is another one.
        """
        hub_options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = Path(name) if Path(name).is_dir() else hub.download(str(name), revision, subfolder, FILES, **hub_options)
        folder = folder / subfolder
        config = read_config(folder)
        tensors, sums = (_read_tensors(folder / file, config[digest])
                         for file, digest in ((WEIGHTS_FILE, "weights_sha256"), (STATISTICS_FILE, "statistics_sha256")))
        if base_model is None:
            base_model = identity.load_base(folder, config, hub_options | base_options)
        if check_base and not identity.is_same(base_model, config):
            raise MixtureError(
                f"this base model is not the one {folder} was made for ({config['base_model']}, {config['base_dtype']}): "
                "its weights differ"
            )
        model = None
        try:
            sizes = [len(config["classes"][name]) if config["classes"] else 1 for name in config["experts"]]
            experts = cut_experts(config["experts"], config["ranks"], config["heads"], sizes, tensors,
                                  config["without_adapter"])
            model = cls(base_model, experts, config["classes"], gates=config["gates"],
                        **{key: config[key] for key in ("same", "gate_hidden", "top_k", "passes")})
            model.router.start, model.fitted_passes = int(config["start"]), config["fitted_passes"]
            model.shrinkage, model.usual_familiarity = float(config["shrinkage"]), tuple(map(float, config["usual_familiarity"]))
            model.refuse_below = None if config["refuse_below"] is None else float(config["refuse_below"])
            _fill(model, tensors)
            model.statistics = _cut_statistics(sums)
        except (MixtureError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if model is not None:
                model.unload()
            if isinstance(error, MixtureError):
                raise
            raise MixtureError(f"{folder} does not hold together: {' '.join(str(error).split())[:200]}") from error
        return model.eval()


def _heads_of(model: nn.Module) -> list[str]:
    return [name for name, layer in model.mixture_layers().items() if not isinstance(layer, MixtureLinear)]


def _config(model: nn.Module) -> dict[str, Any]:
    """What a mixture's tensors belong to, as it is saved, but for their checksums."""
    heads, (base, commit) = _heads_of(model), identity.base_place(model.base_model)
    return {key: getattr(model, key) for key in KEPT} | {
        "format": FORMAT,
        "base_model": base,
        "base_commit": commit,
        "base_class": type(model.base_model).__name__,
        "base_dtype": identity.dtype_of(model.base_model),
        "base_fingerprint": model.base_fingerprint(),
        "base_rounded": {name: identity.fingerprint(model.base_model, heads, name) for name in identity.DTYPES},
        "experts": model.expert_names,
        "ranks": {name: layer.ranks for name, layer in model.mixture_layers().items() if name not in heads},
        "heads": heads,
        "refuse_below": None if model.refuse_below is None else float(model.refuse_below),
        "start": model.router.start,
        "gates": list(model.gates()),
    }


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a mixture has besides its base: the tensors of its layers and gates by their names on disk."""
    parts = {**model.mixture_layers(), **{f"{name}.{building.GATE}": gate for name, gate in model.gates().items()}}
    return {f"{name}.{key}": tensor for name, module in parts.items() for key, tensor in module.state_dict().items()
            if not key.startswith(NOT_ITS_OWN)}


def _fill(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Fill layers and gates. Raises ValueError unless there is exactly what they need."""
    own = _tensors(model)
    if wrong := sorted(name for name in own.keys() | stored.keys()
                       if name not in own or name not in stored or own[name].shape != stored[name].shape):
        raise ValueError(f"{', '.join(wrong[:3])} is missing, too much or of another shape")
    for name, tensor in own.items():
        tensor.copy_(stored[name])


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
    if not isinstance(config, dict) or config.get("format") != FORMAT or not FIELDS <= config.keys():
        raise MixtureError(f"{folder / CONFIG_FILE} is not of format {FORMAT}; make the mixture anew from its adapters")
    return config


def _read_tensors(path: Path, digest: str | None) -> dict[str, Tensor]:
    """The tensors of a file, none where it has no checksum. Raises MixtureError unless they are as they were saved."""
    if digest is None:
        return {}
    if not path.is_file() or _file_digest(path) != digest:
        raise MixtureError(f"{path} was lost, changed or damaged: its checksum does not fit")
    return load_file(path)


def _cut_statistics(sums: dict[str, Tensor]) -> dict[str, dict[str, Statistics]]:
    """Statistics by expert and layer, from tensors keyed "<expert>/<layer>/<tensor>"."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in sums.items():
        rest, _, part = key.rpartition("/")
        expert, _, layer = rest.rpartition("/")
        found.setdefault(expert, {}).setdefault(layer, {})[part] = tensor
    return {expert: {layer: Statistics(**parts) for layer, parts in by_layer.items()} for expert, by_layer in found.items()}
