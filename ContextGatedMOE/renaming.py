"""Names of an adapter's layers: as transformers 4 called them, or with what torch.compile and data parallelism add."""

import copy
from collections.abc import Mapping

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming, rename_source_key

from ContextGatedMOE.adapters import plain_layers
from ContextGatedMOE.errors import MixtureError
from ContextGatedMOE.layers import InPlaceOfLinear

PREFIX = "base_model.model."  # before every name in an adapter's file
# What torch.compile, DistributedDataParallel, FSDP and activation checkpointing call the module that they wrap.
WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


class LayerNames:
    """Today's names of a model's layers, and those of earlier versions of transformers."""

    def __init__(self, model: nn.Module):
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, InPlaceOfLinear))
        self.layers = {name: layer for name, layer in plain_layers(model).items() if not name.startswith(inside)}
        self._wrappers = WRAPPERS - {part for name in self.layers for part in name.split(".")}
        conversions = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
        self._renamings = [part for part in conversions if isinstance(part, WeightRenaming)]
        self._cuts = [part for part in conversions if isinstance(part, WeightConverter) and _cuts_rows(part)]

    def unwrapped(self, name: str) -> str:
        """A name without the parts that wrappers of the model have added."""
        return ".".join(part for part in name.split(".") if part not in self._wrappers)

    def today(self, name: str) -> tuple[str, ...]:
        """The layers that `name` is today: one, or several where the outputs of one layer are those of several now."""
        if name in self.layers:
            return (name,)
        renamed, cut = rename_source_key(f"{name}.weight", self._renamings, self._cuts)
        if cut is None:
            return (renamed.removesuffix(".weight"),)
        targets = next(part.target_patterns for part in self._cuts if cut in part.source_patterns)
        return tuple(renamed.replace(targets[0], target).removesuffix(".weight") for target in targets)

    def earlier(self, name: str) -> str:
        """What transformers 4 called the layer `name`."""
        reverse = [part.reverse_transform() for part in reversed(self._renamings)]
        return rename_source_key(f"{name}.weight", reverse, [], reverse=True)[0].removesuffix(".weight")


def _cuts_rows(conversion: WeightConverter) -> bool:
    """Whether a conversion cuts one weight into several of as many rows each; for a low-rank update this is a cut of B."""
    operations = conversion.operations
    return len(operations) == 1 and isinstance(operations[0], Chunk) and operations[0].dim == 0


def in_todays_names(name: str, names: LayerNames, config: LoraConfig,
                    tensors: Mapping[str, Tensor]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The options and tensors of the expert `name`, layers called as in the base, whatever they were when it was trained.

    names: of the base model, which may be that of a mixture. Of the options, `rank_pattern`, `alpha_pattern` and `modules_to_save` are
    in today's names. Raises MixtureError if the options name layers that there are no tensors of.
    """
    before: dict[str, str] = {}  # an adapted layer today -> the same in the adapter
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = names.unwrapped(key).removeprefix(PREFIX)
        layer, lora, _ = plain.partition(".lora_")
        layer = layer if lora else layer.rpartition(".")[0]
        rest, today = plain[len(layer):], names.today(layer)
        parts = [tensor] * len(today) if ".lora_A." in rest else tensor.chunk(len(today))
        renamed |= {f"{PREFIX}{own}{rest}": part for own, part in zip(today, parts, strict=True)}
        before |= dict.fromkeys(today, layer) if lora else {}
    config, has_earlier_names = copy.copy(config), renamed.keys() != tensors.keys()
    if has_earlier_names:
        for pattern, otherwise in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):
            given = getattr(config, pattern) or {}
            setattr(config, pattern, {today: of_pattern(given, layer, otherwise) for today, layer in before.items()})
        config.modules_to_save = [
            today for layer in config.modules_to_save or () for today in names.today(names.unwrapped(layer))]
    for layer, module in names.layers.items():
        if layer in before or not isinstance(module, nn.Linear) or f"{PREFIX}{layer}.weight" in renamed:
            continue
        called = (layer, names.earlier(layer)) if has_earlier_names else (layer,)
        if layer.endswith(tuple(config.modules_to_save or ())) or any(check_target_module_exists(config, one) for one in called):
            raise MixtureError(f"expert '{name}' lacks the tensors of '{layer}'; its file is damaged or of another model")
    return config, renamed


def of_pattern(pattern: Mapping[str, float], layer: str, otherwise: float) -> float:
    """What a `rank_pattern` or `alpha_pattern` says of a layer, by peft's rule."""
    return pattern.get(get_pattern_key(pattern.keys(), layer), otherwise)
