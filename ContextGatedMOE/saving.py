"""Mixtures on disk: gates, experts, heads and statistics as safetensors, what they belong to as JSON."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ContextGatedMOE import building, hub, identity
from ContextGatedMOE.adapters import MixtureError, cut_experts
from ContextGatedMOE.heads import HEAD_GATE
from ContextGatedMOE.layers import MixtureLinear
from ContextGatedMOE.statistics import Statistics

CONFIG_FILE = "cgm_config.json"
WEIGHTS_FILE = "cgm_model.safetensors"
STATISTICS_FILE = "cgm_statistics.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE, STATISTICS_FILE)
FORMAT = 3
NOT_ITS_OWN = ("base.", f"{building.GATE}.", f"{HEAD_GATE}.")  # tensors inside a layer that belong to the base or to its gate
# What a configuration holds, and of what type.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "base_model": (str, type(None)),
    "base_commit": (str, type(None)),
    "base_class": str,
    "base_dtype": str,
    "base_fingerprint": str,
    "base_rounded": dict,
    "experts": list,
    "classes": (dict, type(None)),
    "same": list,
    "gate_hidden": int,
    "top_k": (int, type(None)),
    "refuse_below": (float, type(None)),
    "ranks": dict,
    "passes": int,
    "fitted_passes": (int, type(None)),
    "start": int,
    "gates": list,
    "shrinkage": float,
    "without_adapter": list,
    "usual_familiarity": list,
    "heads": list,
    "weights_sha256": str,
    "statistics_sha256": (str, type(None)),
}


class Saving:
    """`save_pretrained`, `from_pretrained`, `push_to_hub` and `model_card` of a mixture."""

    def base_fingerprint(self) -> str:
        """SHA-256 over the frozen base tensors, without the heads that the experts replace."""
        return identity.fingerprint(self.base_model, self._head_names())

    def _head_names(self) -> list[str]:
        return [name for name, layer in self.mixture_layers().items() if not isinstance(layer, MixtureLinear)]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write gates, experts, heads and statistics (safetensors) and what they belong to (JSON) into `folder`.

        The base weights are not copied: their folder, or name and commit on the Hub, and fingerprint are. Each file is written
        aside and moved into place.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        layers, heads = self.mixture_layers(), self._head_names()
        tensors = {f"{name}.{key}": tensor.contiguous() for name, module in _parts(self).items()
                   for key, tensor in module.state_dict().items() if not key.startswith(NOT_ITS_OWN)}
        sums = {f"{expert}/{layer}/{key}": tensor.contiguous() for expert, by_layer in self.statistics.items()
                for layer, statistics in by_layer.items() for key, tensor in vars(statistics).items()}
        files = {WEIGHTS_FILE: tensors, **({STATISTICS_FILE: sums} if sums else {})}
        for name, content in files.items():
            save_file(content, folder / f"{name}.part")
        base, commit = identity.base_place(self.base_model)
        config = {
            "format": FORMAT,
            "base_model": base,
            "base_commit": commit,
            "base_class": type(self.base_model).__name__,
            "base_dtype": identity.dtype_of(self.base_model),
            "base_fingerprint": self.base_fingerprint(),
            "base_rounded": {name: identity.fingerprint(self.base_model, heads, name) for name in identity.DTYPES},
            "experts": self.expert_names,
            "classes": self.classes,
            "same": self.same,
            "gate_hidden": self.gate_hidden,
            "top_k": self.top_k,
            "refuse_below": None if self.refuse_below is None else float(self.refuse_below),
            "ranks": {name: module.ranks for name, module in layers.items() if isinstance(module, MixtureLinear)},
            "heads": heads,
            "passes": self.passes,
            "fitted_passes": self.fitted_passes,
            "start": self.router.start,
            "gates": list(self.gates()),
            "shrinkage": self.shrinkage,
            "without_adapter": self.without_adapter,
            "usual_familiarity": list(self.usual_familiarity),
            "weights_sha256": _file_digest(folder / f"{WEIGHTS_FILE}.part"),
            "statistics_sha256": _file_digest(folder / f"{STATISTICS_FILE}.part") if sums else None,
        }
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / f"{CONFIG_FILE}.part").write_text(text, encoding="utf-8")
        if hasattr(getattr(self.base_model, "config", None), "save_pretrained"):
            self.config.save_pretrained(folder)
        if not sums:
            (folder / STATISTICS_FILE).unlink(missing_ok=True)
        for name in (*files, CONFIG_FILE):
            os.replace(folder / f"{name}.part", folder / name)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        base_model: nn.Module | None = None,
        *,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        check_base: bool = True,
        **base_options: Any,
    ) -> Self:
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
        tensors, sums = read_tensors(folder, config)
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
            same = [[(expert, name) for expert, name in group] for group in config["same"]]
            model = cls(
                base_model, experts, config["classes"], same=same, gate_hidden=config["gate_hidden"], top_k=config["top_k"],
                passes=config["passes"], gates=config["gates"],
            )
            model.router.start, model.fitted_passes = config["start"], config["fitted_passes"]
            model.shrinkage, model.usual_familiarity = config["shrinkage"], tuple(config["usual_familiarity"])
            _load_parts(model, tensors)
            model.statistics = _cut_statistics(sums)
        except (MixtureError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if model is not None:
                model.unload()
            if isinstance(error, MixtureError):
                raise
            raise MixtureError(f"{folder} does not hold together: {' '.join(str(error).split())[:200]}") from error
        model.refuse_below = config["refuse_below"]
        return model.eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        figures: Mapping[str, Any] | None = None,
        made: str = "",
        revision: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        commit_message: str = "Upload a context gated mixture of experts",
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes, and `model_card` as README.md, to the Hub. Returns the address of the commit.

        figures, made: as for `model_card`. The other arguments are those of huggingface_hub's `upload_folder` and
        `create_repo`.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            (Path(folder) / "README.md").write_text(self.model_card(figures, made, repo_id), encoding="utf-8")
            return hub.upload(folder, repo_id, revision, token, private, commit_message, create_pr)

    def model_card(self, figures: Mapping[str, Any] | None = None, made: str = "", repo_id: str = "OWNER/NAME") -> str:
        """A README.md for the Hub: base, experts, classes, how the mixture was made, and its figures.

        figures: what was measured, by name, such as {"accuracy on 800 test images": 0.95}. made: sentences on how it was made,
        besides what the mixture knows itself. repo_id: its name in the example.
        """
        return hub.card(self, figures or {}, made, repo_id)


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """The layers and gates of a mixture by the names that their tensors have on disk."""
    return {**model.mixture_layers(), **{f"{name}.{building.GATE}": gate for name, gate in model.gates().items()}}


def _load_parts(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Fill layers and gates. Raises RuntimeError unless there is exactly what they need."""
    left = set(tensors)
    for name, module in _parts(model).items():
        kept = {key: value for key, value in module.state_dict().items() if key.startswith(NOT_ITS_OWN)}
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        own = {key: value for key, value in own.items() if not key.startswith(NOT_ITS_OWN)}
        module.load_state_dict(own | kept)
        left -= {f"{name}.{key}" for key in own}
    if left:
        raise RuntimeError(f"it holds {', '.join(sorted(left)[:3])}, which no part of it needs")


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


def _cut_statistics(sums: dict[str, Tensor]) -> dict[str, dict[str, Statistics]]:
    """Statistics by expert and layer, from tensors keyed "<expert>/<layer>/<tensor>"."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in sums.items():
        rest, _, part = key.rpartition("/")
        expert, _, layer = rest.rpartition("/")
        found.setdefault(expert, {}).setdefault(layer, {})[part] = tensor
    return {expert: {layer: Statistics(**parts) for layer, parts in by_layer.items()} for expert, by_layer in found.items()}
