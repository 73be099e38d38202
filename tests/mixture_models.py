"""Tiny base models, random experts in memory and adapters on disk, and mixtures of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from ContextGatedMOE import ContextGatedMOE, Expert, MixtureError

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
VISION = dict(SMALL, image_size=16, patch_size=8, num_labels=3)
TEXT = dict(SMALL, vocab_size=40, max_position_embeddings=32)
CLASSES = {"a": ["x", "y"], "b": ["x", "z", "u", "v", "w"], "c": ["only"]}


class Plain(nn.Module):
    """A model that is no transformers model: token features (B, T, 8) to logits (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 12)  # named like things inside the mixture and peft, on purpose
        self.blocks = nn.ModuleList([nn.Linear(12, 12, bias=False), nn.Linear(12, 12)])
        self.embed = nn.Embedding(5, 8)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.base(x))
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(self.norm(x).mean(1))


@dataclass(frozen=True)
class Case:
    """A tiny base model: how to build it, what to feed it, and how its layers are called; and mixtures on it."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    first: tuple[str, ...]
    second: tuple[str, ...]
    head: str

    def build(self, seed: int = 0) -> nn.Module:
        """The base model, in evaluation mode; one seed gives one set of weights, large enough for every layer to matter."""
        torch.manual_seed(seed)
        model = self.make().eval()
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
        return model

    def batch(self, size: int, seed: int = 0) -> dict[str, Tensor]:
        torch.manual_seed(100 + seed)
        return self.inputs(size)

    def labelled(self, seed: int, classes: int, size: int = 24) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Images of one expert in batches of several sizes, with labels that they tell of."""
        labels = torch.arange(size) % classes
        inputs = self.batch(size, seed)
        for name, tensor in inputs.items():
            if tensor.is_floating_point():
                shift = (labels + 3 * seed).view(-1, *[1] * (tensor.ndim - 1))
                inputs[name] = tensor + torch.sin(shift * torch.arange(tensor.shape[-1])) * 2
        return [(rows(inputs, chosen.tolist()), labels[chosen]) for chosen in torch.arange(size).split(7)]

    def images(self) -> dict[str, list]:
        """Labelled images of every expert of a joint mixture."""
        return {name: self.labelled(number, len(own)) for number, (name, own) in enumerate(CLASSES.items())}

    def experts(self, names: Sequence[str] = "abc", sizes: Sequence[int] = ()) -> list[Expert]:
        """Experts of random tensors, of ranks 1, 2, 3 ..., of which every second adapts fewer layers.

        sizes: number of classes of each, which then has a head of its own.
        """
        torch.manual_seed(500)
        layers = {name: layer for name, layer in self.build().named_modules() if isinstance(layer, nn.Linear)}
        made = []
        for number, name in enumerate(names):
            wanted = self.first if number % 2 else (*self.first, *self.second)
            updates = {
                layer: (torch.randn(number + 1, module.in_features) * 0.3, torch.randn(module.out_features, number + 1) * 0.3)
                for layer, module in layers.items() if f".{layer}".endswith(tuple(f".{end}" for end in wanted))
            }
            width = layers[self.head].in_features
            heads = {self.head: (torch.randn(sizes[number], width), torch.randn(sizes[number]))} if sizes else {}
            made.append(Expert(name, updates, heads))
        return made

    def joint_experts(self) -> list[Expert]:
        """Experts of which each has its own classes."""
        return self.experts(list(CLASSES), [len(own) for own in CLASSES.values()])

    def joint(self, fit: bool = False, **options: object) -> ContextGatedMOE:
        """A mixture that answers among all classes of random experts, its gates random or fitted to random images."""
        model = ContextGatedMOE(self.build(), self.joint_experts(), CLASSES, gate_hidden=8, **options)
        if fit:
            model.fit_gates(self.images())
            return model
        return randomise_gates(model)

    def shared(self, experts: Sequence[Expert] = (), **options: object) -> ContextGatedMOE:
        """A mixture of these or of random experts that share the base's head, its gates random."""
        return randomise_gates(ContextGatedMOE(self.build(), experts or self.experts(), gate_hidden=8, **options))

    def mixture(self, adapters: dict[str, Path]) -> ContextGatedMOE:
        """A mixture of adapters on disk on a fresh base, its gates random."""
        return randomise_gates(ContextGatedMOE.from_adapters(self.build(), adapters))

    def save_adapter(self, folder: Path, seed: int = 0, config: object = None, **options: object) -> Path:
        """Write an adapter of the base with random tensors (LoRA with these options unless a config is given)."""
        base = self.build()
        torch.manual_seed(200 + seed)
        model = get_peft_model(base, config or LoraConfig(**options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(folder)
        return folder

    def save_experts(self, folder: Path) -> dict[str, Path]:
        """Write four adapters of one base that differ in everything that an exact mixture allows."""
        head = [self.head]
        options = {
            "attention": dict(r=2, lora_alpha=4, target_modules=list(self.first), modules_to_save=head),
            "headless": dict(r=3, lora_alpha=2, target_modules=[*self.first[:1], *self.second],
                             rank_pattern={self.second[0]: 1}, alpha_pattern={self.first[0]: 7}),
            "on_head": dict(r=2, lora_alpha=1, target_modules=[*self.second, self.head]),
            "scaled": dict(r=5, lora_alpha=3, use_rslora=True, target_modules=[*self.first, *self.second],
                           modules_to_save=head),
        }
        return {name: self.save_adapter(folder / name, at, **own) for at, (name, own) in enumerate(options.items())}

    def peft_logits(self, adapter: Path, inputs: dict[str, Tensor]) -> Tensor:
        return logits(PeftModel.from_pretrained(self.build(), adapter).eval(), inputs)


def _images(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(size, 3, 16, 16)}


def _texts(size: int) -> dict[str, Tensor]:
    lengths = torch.arange(size) % 4 + 4  # 4 to 7 of 7 tokens
    return {"input_ids": torch.randint(1, 39, (size, 7)), "attention_mask": (torch.arange(7) < lengths[:, None]).long()}


def beit(**options: object) -> nn.Module:
    return transformers.BeitForImageClassification(transformers.BeitConfig(**{**VISION, "drop_path_rate": 0.0, **options}))


def _llama(**options: object) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **options))


def _swin() -> nn.Module:  # 4 windows, the second block's shifted, then 1 window
    return transformers.SwinForImageClassification(transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4, num_labels=3,
        drop_path_rate=0.0))


def _bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        **TEXT, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


BEIT = Case(beit, _images, ("q_proj", "v_proj"), ("fc1", "fc2"), "classifier")
SWIN = Case(_swin, _images, ("q_proj", "v_proj"), ("fc1", "reduction"), "classifier")
BERT = Case(_bert, _texts, ("query", "value"), ("intermediate.dense", "pooler.dense"), "classifier")
LLAMA = Case(_llama, lambda size: {"input_ids": torch.randint(1, 39, (size, 6))}, ("q_proj", "v_proj"), ("up_proj", "down_proj"),
             "lm_head")
PLAIN = Case(Plain, lambda size: {"x": torch.randn(size, 5, 8)}, ("base",), ("blocks.0", "blocks.1"), "head")
CASES = (BEIT, SWIN, BERT, LLAMA, PLAIN)
JOINT = (BEIT, SWIN, BERT, PLAIN)
TIED = replace(LLAMA, make=lambda: _llama(tie_word_embeddings=True))


def randomise_gates(model: ContextGatedMOE, seed: int = 0) -> ContextGatedMOE:
    """Fill the gates with random numbers, so that every image has weights of its own in every block."""
    torch.manual_seed(300 + seed)
    with torch.no_grad():
        for gate in model.gates().values():
            gate.score.weight.normal_(std=0.1)
            gate.score.bias.normal_(std=0.3)
            gate.coefficient.fill_(0.3)
            gate.class_score.weight.normal_(std=0.1)
            gate.class_score.bias.normal_(std=0.3)
            gate.class_coefficient.fill_(0.4)
    return model


def telling(model: ContextGatedMOE) -> dict[str, nn.Parameter]:
    """The trainable parameters on which the answer depends: late gates tell of classes alone, and of these only a joint head asks."""
    idle = [value for name, gate in model.gates().items() for value in (
        *(() if name in model.routing_gates() else (gate.coefficient, *gate.score.parameters())),
        *(() if model.joint_head is not None else (gate.class_coefficient, *gate.class_score.parameters())))]
    return {name: value for name, value in model.named_parameters()
            if value.requires_grad and not any(value is other for other in idle)}


def recorded(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with model.record_gates() as gates:
        logits(model, inputs)
    return gates


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


def rows(inputs: dict[str, Tensor], index: list[int]) -> dict[str, Tensor]:
    return {name: tensor[index] for name, tensor in inputs.items()}


def _state(model: nn.Module) -> dict[str, object]:
    return {
        "modules": [(name, type(module), id(module), len(module._forward_pre_hooks), len(module._forward_hooks))
                    for name, module in model.named_modules()],
        "trainable": {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()},
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What is done in the block leaves the model as it was: modules, hooks, what is trainable, and tensors' bits."""
    before = _state(model)
    yield
    after = _state(model)
    assert_equal(after.pop("tensors"), before["tensors"])
    assert all(after[kind] == before[kind] for kind in after)


@contextmanager
def refused(model: nn.Module, message: str, kind: type[BaseException] = MixtureError) -> Iterator[None]:
    """What is done in the block is refused in one line, and leaves the model as it was."""
    with unchanged(model), pytest.raises(kind, match=message) as refusal:
        yield
    assert kind is not MixtureError or "\n" not in str(refusal.value)


def assert_close(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    """Equal to fp32 rounding."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)
