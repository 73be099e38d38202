"""A mixture at fixed weights as a plain dense model, or as one peft adapter."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ContextGatedMOE import building
from ContextGatedMOE.adapters import MixtureError
from ContextGatedMOE.heads import JointHead, SharedHead
from ContextGatedMOE.layers import MixtureLinear


class Exporting:
    """`merge_and_unload` and `to_adapter` of a mixture."""

    def merge_and_unload(self, weights: Mapping[str, float], head: str | None = None) -> nn.Module:
        """The plain base model with experts merged into it at fixed weights (by name, the rest 0).

        The mixture is of no use afterwards.

        head: whose head the model gets where each expert answers among classes of its own; needed unless one expert alone has a
        weight. Heads of one label space are mixed as the rest is. Raises MixtureError, and changes nothing, for unknown names.
        """
        values = self.weights_of(weights)
        heads = {name: _head(self, layer, values, weights, head) for name, layer in self.mixture_layers().items()
                 if not isinstance(layer, MixtureLinear)}
        layers = self.mixture_layers()
        base_model = self.unload()
        tied = {parameter.data_ptr() for name, parameter in base_model.named_parameters(remove_duplicate=False)
                if not any(name == f"{layer}.weight" for layer in layers)}
        for name, layer in layers.items():
            plain = base_model.get_submodule(name)
            if name in heads:
                weight, bias = heads[name]
                new = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
                new.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
                base_model.set_submodule(name, new.train(plain.training))
                _set_labels(self, base_model, plain, new, weights, head)
                continue
            scale = values.to(layer.lora_B.device)[layer.owner]
            update = (layer.lora_B.float() * scale) @ layer.lora_A.float()
            if plain.weight.data_ptr() in tied and hasattr(base_model, "config"):
                base_model.config.tie_word_embeddings = False  # else saving would put the embedding back in its place
            plain.weight = nn.Parameter((plain.weight.float() + update).to(plain.weight), plain.weight.requires_grad)
        return base_model

    def to_adapter(self, weights: Mapping[str, float], folder: str | Path, head: str | None = None) -> None:
        """Write the experts at fixed weights (by name, the rest 0) as one peft LoRA adapter, whose rank is the sum of theirs.

        It is exact: nothing is approximated. head: as for `merge_and_unload`. An adapter's head may have another number of
        outputs than the base model; load it onto a base with as many (`num_labels=...`), as with any such adapter. Raises
        MixtureError for unknown names, or if the chosen experts adapt no layer.
        """
        from peft import LoraConfig  # here: it takes long to import

        values = self.weights_of(weights)
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        heads = []
        for name, layer in self.mixture_layers().items():
            if isinstance(layer, MixtureLinear):
                scale = values.to(layer.lora_B.device)[layer.owner]
                used = scale != 0
                if used.any():
                    ranks[name] = int(used.sum())
                    tensors[f"{name}.lora_A.weight"] = layer.lora_A[used]
                    tensors[f"{name}.lora_B.weight"] = (layer.lora_B.float() * scale).to(layer.lora_B)[:, used]
            else:
                weight, bias = _head(self, layer, values, weights, head)
                heads.append(name)
                tensors |= {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})
        if not ranks:
            raise MixtureError(
                f"the experts {', '.join(weights) or '(none)'} adapt no layer but heads; there is no adapter to write"
            )
        escaped = {name: name.replace(".", r"\.") for name in ranks}
        patterns = {f"^{escaped[name]}": rank for name, rank in ranks.items()}
        config = LoraConfig(  # peft scales an update by alpha / rank, which is 1 here
            r=max(ranks.values()), lora_alpha=max(ranks.values()), rank_pattern=patterns, alpha_pattern=dict(patterns),
            target_modules=f"(?:{'|'.join(escaped.values())})", modules_to_save=heads or None, inference_mode=True,
            base_model_name_or_path=getattr(self.base_model, "name_or_path", None) or None)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({f"base_model.model.{key}": tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
                  folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)


def _head(model: nn.Module, layer: JointHead | SharedHead, values: Tensor, weights: Mapping[str, float],
          head: str | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the plain head that stands for a mixture's at fixed weights."""
    if isinstance(layer, SharedHead):
        values = values.to(layer.expert_weight.device)
        weight = torch.einsum("e,ecd->cd", values, layer.expert_weight.float()).to(layer.expert_weight)
        bias = None if layer.expert_bias is None else (values @ layer.expert_bias.float()).to(layer.expert_bias)
        return weight, bias
    number = model.expert_names.index(_owner(model, weights, head))
    sizes = layer.classes.sizes
    return layer.expert_weight.split(sizes)[number].detach().clone(), layer.expert_bias.split(sizes)[number].detach().clone()


def _owner(model: nn.Module, weights: Mapping[str, float], head: str | None) -> str:
    """The expert whose own head stays. Raises MixtureError unless it is clear."""
    used = [name for name in model.expert_names if weights.get(name)]
    if head is None and len(used) == 1:
        return used[0]
    if head not in model.expert_names:
        raise MixtureError(
            "each expert answers among classes of its own, which one plain head cannot do for several: choose one "
            f"by head=..., of {', '.join(model.expert_names)}"
        )
    return head


def _set_labels(model: nn.Module, base_model: nn.Module, plain: nn.Linear, new: nn.Linear, weights: Mapping[str, float],
                head: str | None) -> None:
    """Name the outputs of the new head, or only count them."""
    if model.classes:
        building.set_config(base_model, model.plain_config, model.classes[_owner(model, weights, head)])
    elif new.out_features != plain.out_features:
        building.set_config(base_model, model.plain_config, width=new.out_features)
