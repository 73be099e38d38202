"""What is timed: models of the sizes that matter with random weights, random images, and a step of training."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BeitConfig, BeitForImageClassification, Dinov2Config, Dinov2ForImageClassification, PreTrainedModel

from common.cli.flags import DEMO_BACKBONE
from common.models import load_backbone
from common.models.lora import add_lora
from common.training.blocks import lora_targets
from common.training.evaluate import logits_of
from common.training.kernels import register_attention
from ContextGatedMOE import ContextGatedMOE, Expert
from tests.bench.measure import Settings

RANK = 16
# BEiT's published sizes, at 224 pixels in patches of 16 (Bao et al. 2022, appendix).
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64,
        "patch_size": 16}


def beit(settings: Settings, attention: str | None = None, **shape: int) -> BeitForImageClassification:
    """A BEiT with random weights, of BEiT-base's shape or, with `--large`, BEiT-large's, but for the `shape` given here; a
    tiny one with `--quick`."""
    torch.manual_seed(0)
    size = shape | TINY if settings.quick else (LARGE if settings.large else BASE) | shape
    config = BeitConfig(**{
        "use_relative_position_bias": True, "layer_scale_init_value": 0.1, "drop_path_rate": 0.0, "use_mean_pooling": True,
        "num_labels": 4, **size,
    })
    with settings.device:
        model = BeitForImageClassification(config)
    model.set_attn_implementation(attention or register_attention())
    return model.requires_grad_(False)


def dinov2_small(settings: Settings, **shape: int) -> Dinov2ForImageClassification:
    """A DINOv2 of ViT-S/14's shape at 112 pixels with random weights, frozen; a tiny one with `--quick`."""
    torch.manual_seed(0)
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56} if settings.quick else {}
    small = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 112}
    with settings.device:
        model = Dinov2ForImageClassification(Dinov2Config(**{**small, "patch_size": 14, **shape, **tiny}))
    model.set_attn_implementation(register_attention())
    return model.requires_grad_(False)


def demo_backbone(settings: Settings, attention: str | None = None) -> BeitForImageClassification:
    """The demo's backbone, frozen; a tiny one for images of the same size with `--quick`."""
    if settings.quick:
        return beit(settings, attention)
    model = load_backbone(str(DEMO_BACKBONE), list("abcd"), seed=0).to(settings.device)
    model.set_attn_implementation(attention or register_attention())
    return model.requires_grad_(False)


def twin(model: nn.Module) -> nn.Module:
    """A copy whose parameters are its own, but with the same memory for their values."""
    return copy.deepcopy(model, {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()})


def images(settings: Settings, count: int, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Random normalised images (N, 3, S, S) that fit the model, and labels (N,)."""
    size = model.config.image_size
    return (torch.randn(count, 3, size, size, device=settings.device),
            torch.randint(model.config.num_labels, (count,), device=settings.device))


def lora(base: PreTrainedModel) -> PeftModel:
    """One adapter of the project on a twin of `base`."""
    return add_lora(twin(base), RANK, 2 * RANK, seed=0)


def peft_lora(base: PreTrainedModel) -> PeftModel:
    """The same with peft's own layers."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=lora_targets(base), modules_to_save=["classifier"])
    return get_peft_model(twin(base), config)


def experts(base: PreTrainedModel, count: int, rank: int = RANK) -> list[Expert]:
    """Experts with random tensors for every linear layer of every block, each with a head."""
    made = []
    for index in range(count):
        expert = Expert(f"expert{index:02d}")
        for name, layer in base.named_modules():
            if name.rpartition(".")[2] in lora_targets(base):
                like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
                expert.updates[name] = (torch.randn(rank, layer.in_features, **like) * 0.02,
                                        torch.randn(layer.out_features, rank, **like) * 0.02)
        expert.heads["classifier"] = (torch.randn_like(base.classifier.weight), torch.zeros_like(base.classifier.bias))
        made.append(expert)
    return made


def mixture(base: PreTrainedModel, count: int, rank: int = RANK) -> ContextGatedMOE:
    """A mixture of `count` random experts on a twin of `base`."""
    return ContextGatedMOE(twin(base), experts(base, count, rank))


def training_step(model: nn.Module, batch: tuple[Tensor, Tensor], settings: Settings, precision: str,
                  **optimizer: bool) -> Callable[[], None]:
    """One step of training on a batch that is on the device already: forward, backward, AdamW as `fit` has it."""
    options = optimizer or {"fused": settings.device.type in ("cpu", "cuda")}
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0, **options)
    inputs, labels = batch

    def run() -> None:
        model.train()
        with settings.autocast(precision):
            loss = F.cross_entropy(logits_of(model, inputs).float(), labels)
        loss.backward()
        adam.step()
        adam.zero_grad()

    return run


def forward(model: nn.Module, inputs: Tensor, settings: Settings, precision: str) -> Callable[[], None]:
    """One forward pass without gradients."""

    @torch.no_grad()
    def run() -> None:
        model.eval()
        with settings.autocast(precision):
            model(inputs)

    return run
