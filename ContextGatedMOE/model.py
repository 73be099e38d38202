"""The mixture: a base model whose LoRA'd layers are replaced by gated ones, with saving, loading and adding experts."""

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ContextGatedMOE.experts import Expert, MixtureError, check_fit, check_heads, head_of, read_expert, stack_updates
from ContextGatedMOE.layers import Gate, MixtureHead, MixtureLinear, Routing

CONFIG_FILE = "cgm_config.json"
WEIGHTS_FILE = "cgm_model.safetensors"
FORMAT = 1


class ContextGatedMOE(nn.Module):
    """A frozen base model with frozen LoRA experts, mixed per image by small trainable gates.

    Wherever at least one expert adapts or replaces a linear layer, a two-layer perceptron weighs the experts by the
    mean over that image's tokens (see `Gate`). It takes what the base model takes and returns what it returns; a
    prediction never depends on the other images of the batch. The batch must be the first dimension of every input.

    A gate weighs all tokens of one pass alike. In a causal language model the logits of early tokens therefore depend,
    through the gates, on later tokens of the same pass; while it generates with a cache, the gates see the prompt first and
    then each new token by itself. `fixed_gates` keeps one choice of experts for a whole text.

    Experts are kept in alphabetical order, so the order in which they are named makes no difference.

    Sources: LoRA (Hu et al. 2022, section 4.1); mixtures of frozen LoRA experts with gates in every layer (Wu et al. 2024,
    MoLE; X-LoRA, Buehler and Buehler 2024, which runs the base model twice and adapter by adapter, this one once and all
    stacked); softmax over the k largest (Shazeer et al. 2017, section 2.1).
    """

    def __init__(self, base_model: nn.Module, experts: list[Expert], gate_hidden: int = 4, top_k: int | None = None):
        """Replace layers of `base_model` in place. Raises MixtureError if the experts do not fit each other or the base."""
        super().__init__()
        if gate_hidden < 1:
            raise MixtureError(f"gate_hidden must be at least 1, not {gate_hidden}")
        self.gate_hidden = gate_hidden
        self.routing = Routing(
            inputs=tuple(inspect.signature(base_model.forward).parameters),
            leading=(getattr(base_model, "main_input_name", ""), "inputs_embeds"),
            encoder_only=bool(getattr(getattr(base_model, "config", None), "is_encoder_decoder", False)),
        )
        self.top_k = top_k
        _check(experts, base_model)
        self.base_model = base_model.requires_grad_(False)
        self._wrap(experts, {})
        base_model.register_forward_pre_hook(self.routing.begin, with_kwargs=True)

    @classmethod
    def from_adapters(cls, base_model: nn.Module, adapters: Mapping[str, str | Path], gate_hidden: int = 4,
                      top_k: int | None = None) -> "ContextGatedMOE":
        """Build a mixture of peft LoRA adapters.

        base_model: the model the adapters were trained on; its adapted layers are replaced in place.
        adapters: expert name -> adapter folder or Hub name. An empty mapping gives the base model itself.
        gate_hidden: width of each gate's hidden layer. top_k: how many experts an image uses (all if None).

        Raises MixtureError, with the expert's name, if an adapter is missing or cannot be mixed exactly.
        """
        experts = [read_expert(base_model, name, adapter) for name, adapter in adapters.items()]
        return cls(base_model, experts, gate_hidden, top_k)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base model with gated experts; arguments and result are the base model's own.

        A 2-D `attention_mask` (B, T) also tells the gates which tokens to average over.
        """
        return self.base_model(*args, **kwargs)

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self.base_model.config

    @property
    def top_k(self) -> int | None:
        """How many experts an image uses, the most weighted first; None for all. 1 is hard routing."""
        return self.routing.top_k

    @top_k.setter
    def top_k(self, value: int | None) -> None:
        if value is not None and value < 1:
            raise MixtureError(f"top_k must be at least 1, not {value}")
        self.routing.top_k = value

    def mixture_layers(self) -> dict[str, MixtureLinear | MixtureHead]:
        """The gated layers by their name in the base model, in the model's order."""
        found = {name: m for name, m in self.base_model.named_modules() if isinstance(m, MixtureLinear | MixtureHead)}
        return found

    def gate_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters: those of the gates, nothing else."""
        return [parameter for layer in self.mixture_layers().values() for parameter in layer.gate.parameters()]

    @contextmanager
    def record_gates(self) -> Iterator[dict[str, Tensor]]:
        """Collect the gate weights of the next forward pass: {layer name: (B, E)}, experts in `expert_names` order.

        The tensors carry gradients where the pass does, so a loss on them trains the gates.
        """
        previous, self.routing.record = self.routing.record, {}
        try:
            yield self.routing.record
        finally:
            self.routing.record = previous

    @contextmanager
    def fixed_gates(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Replace every gate by these weights, by expert name; experts not named get 0. Raises MixtureError."""
        unknown = sorted(set(weights) - set(self.expert_names))
        if unknown:
            raise MixtureError(f"no expert is called {unknown[0]!r}; there are {', '.join(self.expert_names) or 'none'}")
        previous = self.routing.fixed
        self.routing.fixed = torch.tensor([float(weights.get(name, 0.0)) for name in self.expert_names])
        try:
            yield
        finally:
            self.routing.fixed = previous

    @torch.no_grad()
    def warm_start(self, owners: Tensor, *args: Any, **kwargs: Any) -> None:
        """Before training: let every gate that was not trained yet choose the right expert for a sample of inputs.

        owners: (B,) int64, for each image the position in `expert_names` of the expert it belongs to; the other arguments
        are those of `forward`, best a hundred inputs or more of all kinds. One pass: layer after layer, each gate is fitted
        in closed form to what its layer sees (`Gate.warm_start`). Gates start far apart in the size of their input; without
        this some learn slowly or never. Gates that were trained, their output layer no longer zero, stay.
        """

        def fit(layer: MixtureLinear | MixtureHead, inputs: tuple[Tensor]) -> None:
            tokens = self.routing.per_image(inputs[0])
            layer.gate.warm_start(tokens, owners.to(tokens.device), self.routing, layer.name)

        untrained = [layer for layer in self.mixture_layers().values() if not layer.gate.output.weight.any()]
        hooks = [layer.register_forward_pre_hook(fit) for layer in untrained]
        training = self.training
        try:
            self.eval()(*args, **kwargs)
        finally:
            self.train(training)
            for hook in hooks:
                hook.remove()

    def add_expert(self, name: str, adapter: str | Path) -> None:
        """Add one peft LoRA adapter; the gates grow by one output and keep what they learned about the others.

        Train the gates again to make use of it. Raises MixtureError and leaves the mixture as it was if the name is taken
        or the adapter cannot be mixed.
        """
        if name in self.expert_names:
            raise MixtureError(f"there is an expert called {name!r} already")
        new = read_expert(self.base_model, name, adapter)
        _check([*self._experts(), new], self.base_model)
        experts, gates = self._experts(), {layer: module.gate for layer, module in self.mixture_layers().items()}
        for layer, module in self.mixture_layers().items():
            self.base_model.set_submodule(layer, module.base)
        index = sorted([*self.expert_names, name]).index(name)
        for gate in gates.values():
            gate.grow(index)
        self._wrap([*experts, new], gates)

    def _wrap(self, experts: list[Expert], gates: dict[str, Gate]) -> None:
        """Put gated layers in place of the plain ones that experts adapt or replace; `gates` are taken over by name."""
        experts = sorted(experts, key=lambda expert: expert.name)
        self.expert_names = [expert.name for expert in experts]
        replaced = {layer for expert in experts for layer in expert.heads}
        adapted = {layer for expert in experts for layer in expert.updates} - replaced
        for layer in [name for name, _ in self.base_model.named_modules() if name in replaced | adapted]:
            base = self.base_model.get_submodule(layer)
            gate = gates.get(layer) or Gate(base.in_features, self.gate_hidden, len(experts)).to(base.weight)
            if layer in replaced:
                heads = [head_of(expert, layer, base) for expert in experts]
                biases = [base.weight.new_zeros(base.out_features) if bias is None else bias for _, bias in heads]
                has_bias = any(bias is not None for _, bias in heads)
                module = MixtureHead(
                    base, torch.stack([weight.to(base.weight) for weight, _ in heads]),
                    torch.stack([bias.to(base.weight) for bias in biases]) if has_bias else None, gate, layer, self.routing,
                )
            else:
                module = MixtureLinear(base, *stack_updates(experts, layer, base.weight), gate, layer, self.routing)
            self.base_model.set_submodule(layer, module.train(base.training))

    def _experts(self) -> list[Expert]:
        """The experts, cut out of the stacks again."""
        layers = self.mixture_layers()
        tensors = {f"{name}.{key}": value for name, module in layers.items() for key, value in module.state_dict().items()}
        ranks = {name: module.ranks for name, module in layers.items() if isinstance(module, MixtureLinear)}
        return _cut(self.expert_names, ranks, [name for name in layers if name not in ranks], tensors)

    def base_fingerprint(self) -> str:
        """SHA-256 over the frozen base tensors, without the heads that the experts replace."""
        return _fingerprint(self.base_model, [n for n, m in self.mixture_layers().items() if isinstance(m, MixtureHead)])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write gates, experts and heads (safetensors) and what they belong to (JSON) into `folder`.

        The base weights are not copied: their name and fingerprint are. Each file is written aside and moved into place.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        layers = self.mixture_layers()
        tensors = {
            f"{name}.{key}": tensor.contiguous()
            for name, module in layers.items() for key, tensor in module.state_dict().items() if not key.startswith("base.")
        }
        base_config = getattr(self.base_model, "config", None)
        config = {
            "format": FORMAT,
            "base_model": getattr(self.base_model, "name_or_path", "") or None,
            "base_class": type(self.base_model).__name__,
            "base_dtype": str(next(self.base_model.parameters()).dtype).removeprefix("torch."),
            "base_fingerprint": self.base_fingerprint(),
            "experts": self.expert_names,
            "gate_hidden": self.gate_hidden,
            "top_k": self.top_k,
            "ranks": {name: module.ranks for name, module in layers.items() if isinstance(module, MixtureLinear)},
            "heads": [name for name, module in layers.items() if isinstance(module, MixtureHead)],
        }
        save_file(tensors, folder / f"{WEIGHTS_FILE}.part")
        config["weights_sha256"] = _file_digest(folder / f"{WEIGHTS_FILE}.part")
        config["checksum"] = _checksum(config)
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / f"{CONFIG_FILE}.part").write_text(text, encoding="utf-8")
        if hasattr(base_config, "save_pretrained"):
            base_config.save_pretrained(folder)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(folder / f"{name}.part", folder / name)

    @classmethod
    def from_pretrained(cls, folder: str | Path, base_model: nn.Module | None = None) -> "ContextGatedMOE":
        """Load what `save_pretrained` wrote, in evaluation mode.

        base_model: the base to use; if None, the transformers model that was named when saving is loaded. Raises
        MixtureError if the folder is missing, damaged, of another format, or the base is not the one it was made for.
        """
        folder = Path(folder)
        config, tensors = _read_folder(folder)
        base_model = _load_base(folder, config) if base_model is None else base_model
        if _fingerprint(base_model, config["heads"]) != config["base_fingerprint"]:
            raise MixtureError(
                f"this base model is not the one {folder} was made for ({config['base_model']}, {config['base_dtype']}): "
                "its weights differ"
            )
        model = cls(base_model, _cut(config["experts"], config["ranks"], config["heads"], tensors),
                    config["gate_hidden"], config["top_k"])
        for name, module in model.mixture_layers().items():
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            base = {f"base.{key}": value for key, value in module.base.state_dict().items()}
            module.load_state_dict(own | base)
        return model.eval()


def _check(experts: list[Expert], base_model: nn.Module) -> None:
    """Raise MixtureError unless the experts fit the base model and each other."""
    names = sorted(expert.name for expert in experts)
    if len(set(names)) < len(names):
        raise MixtureError(f"two experts have one name: {', '.join(names)}")
    for expert in experts:
        check_fit(expert, base_model)
    check_heads(experts, base_model)


def _fingerprint(base_model: nn.Module, heads: list[str]) -> str:
    """SHA-256 over a model's parameters and saved buffers by their plain names, without the layers named `heads`."""
    layers = {name: m for name, m in base_model.named_modules() if isinstance(m, MixtureLinear | MixtureHead)}
    replaced = tuple(f"{name}." for name in heads)
    digest = hashlib.sha256()
    for name, tensor in sorted(base_model.state_dict().items()):
        owner, _, key = name.rpartition(".base.")
        plain = f"{owner}.{key}" if owner in layers else name
        foreign = owner not in layers and name.startswith(tuple(f"{layer}." for layer in layers))  # gates and experts
        if foreign or plain.startswith(replaced):
            continue
        digest.update(f"{plain} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(config: dict) -> str:
    """SHA-256 of a configuration, its own checksum left out."""
    rest = {key: value for key, value in config.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_folder(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and tensors of a saved mixture. Raises MixtureError unless they are there, whole and of this format."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise MixtureError(f"there is no saved mixture in {folder}: {name} is missing")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MixtureError(f"{folder / CONFIG_FILE} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise MixtureError(f"{folder / CONFIG_FILE} is not of format {FORMAT}")
    if config.get("checksum") != _checksum(config):
        raise MixtureError(f"{folder / CONFIG_FILE} was changed or damaged: its checksum does not fit")
    if config["weights_sha256"] != _file_digest(folder / WEIGHTS_FILE):
        raise MixtureError(f"{folder / WEIGHTS_FILE} was changed or damaged: its checksum does not fit")
    return config, load_file(folder / WEIGHTS_FILE)


def _load_base(folder: Path, config: dict) -> nn.Module:
    """Load the transformers model the mixture was saved on, with the label count of the mixture's own configuration."""
    name, kind = config["base_model"], getattr(transformers, config["base_class"], None)
    if not name or kind is None:
        raise MixtureError(f"{folder} was made on a {config['base_class']} that has no name; pass base_model=...")
    try:
        base_config = transformers.AutoConfig.from_pretrained(folder)
        return kind.from_pretrained(name, config=base_config, dtype=config["base_dtype"], ignore_mismatched_sizes=True)
    except Exception as error:  # transformers raises many kinds for what is missing or does not fit
        reason = " ".join(str(error).split())[:300]
        raise MixtureError(f"the base model {name} of {folder} cannot be loaded; pass base_model=... ({reason})") from error


def _cut(names: list[str], ranks: dict[str, list[int]], heads: list[str], tensors: dict[str, Tensor]) -> list[Expert]:
    """Cut stacked tensors, keyed "<layer>.<tensor>", into experts again."""
    experts = [Expert(name) for name in names]
    for layer, sizes in ranks.items():
        downs, ups = tensors[f"{layer}.lora_A"].split(sizes), tensors[f"{layer}.lora_B"].split(sizes, dim=1)
        for expert, down, up in zip(experts, downs, ups, strict=True):
            if down.shape[0]:
                expert.updates[layer] = (down, up)
    for layer in heads:
        biases = tensors.get(f"{layer}.expert_bias", [None] * len(experts))
        for expert, weight, bias in zip(experts, tensors[f"{layer}.expert_weight"], biases, strict=True):
            expert.heads[layer] = (weight, bias)
    return experts
