"""A mixture at fixed weights as a plain dense model, or as one peft adapter."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ContextGatedMOE import building
from ContextGatedMOE.errors import MixtureError
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
        values, layers = self.weights_of(weights), self.mixture_layers()
        owner = self.classes and _owner(self, weights, head)
        base_model = self.unload()
        tied = {parameter.data_ptr() for name, parameter in base_model.named_parameters(remove_duplicate=False)
                if not any(name == f"{layer}.weight" for layer in layers)}
        for name, layer in layers.items():
            plain = base_model.get_submodule(name)
            if isinstance(layer, MixtureLinear):
                scale = values.to(layer.lora_B.device)[layer.owner]
                update = (layer.lora_B.float() * scale) @ layer.lora_A.float()
                if plain.weight.data_ptr() in tied and hasattr(base_model, "config"):
                    base_model.config.tie_word_embeddings = False  # else saving would put the embedding back in its place
                plain.weight = nn.Parameter((plain.weight.float() + update).to(plain.weight), plain.weight.requires_grad)
                continue
            weight, bias = _head(layer, values, self.expert_names.index(owner) if owner else None)
            new = nn.Linear(*weight.shape[::-1], bias is not None, device=weight.device, dtype=weight.dtype)
            new.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
            base_model.set_submodule(name, new.train(plain.training))
            width = new.out_features if new.out_features != plain.out_features else None
            building.set_config(base_model, self.plain_config, self.classes[owner] if owner else (), width)
        return base_model

    def to_adapter(self, weights: Mapping[str, float], folder: str | Path, head: str | None = None) -> None:
        """Write the experts at fixed weights (by name, the rest 0) as one peft LoRA adapter, whose rank is the sum of theirs.

        It is exact: nothing is approximated. head: as for `merge_and_unload`. An adapter's head may have another number of
        outputs than the base model; load it onto a base with as many (`num_labels=...`), as with any such adapter. Raises
        MixtureError for unknown names, or if the chosen experts adapt no layer.
        """
        from peft import LoraConfig  # here: it takes long to import

        values, tensors, ranks, heads = self.weights_of(weights), {}, {}, []
        owner = self.classes and _owner(self, weights, head)
        for name, layer in self.mixture_layers().items():
            if isinstance(layer, MixtureLinear):
                scale = values.to(layer.lora_B.device)[layer.owner]
                used = scale != 0
                if used.any():
                    ranks[name] = int(used.sum())
                    tensors[f"{name}.lora_A.weight"] = layer.lora_A[used]
                    tensors[f"{name}.lora_B.weight"] = (layer.lora_B.float() * scale).to(layer.lora_B)[:, used]
            else:
                weight, bias = _head(layer, values, self.expert_names.index(owner) if owner else None)
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
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({f"base_model.model.{key}": tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
                  Path(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
        config.save_pretrained(folder)


def _head(layer: JointHead | SharedHead, values: Tensor, owner: int | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the plain head that stands for a mixture's at fixed weights (E,); owner: the number of the expert whose
    own head stays, where each has one."""
    if isinstance(layer, JointHead):
        return tuple(value.split(layer.classes.sizes)[owner].detach().clone() for value in (layer.expert_weight, layer.expert_bias))
    values, weight, bias = values.to(layer.expert_weight.device), layer.expert_weight, layer.expert_bias
    return (torch.einsum("e,ecd->cd", values, weight.float()).to(weight),
            None if bias is None else (values @ bias.float()).to(bias))


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
