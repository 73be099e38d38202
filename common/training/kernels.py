"""What transformers' attention computes, computed faster in training."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.beit.modeling_beit import eager_attention_forward

ATTENTION = "sdpa_or_products"


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              **options: Any) -> tuple[Tensor, Tensor | None]:
    """Attention of query, key, value (B, H, T, D) with a position bias (1, H, T, T) or none. Returns (B, T, H, D).

    PyTorch's fused kernel, but on a CPU in bf16, or where the bias learns: its backward pass there takes two to five times
    as long as that of plain matrix products (`python -m tests.bench parts`).
    """
    bias_learns = attention_mask is not None and attention_mask.requires_grad
    products = query.device.type == "cpu" and (query.dtype == torch.bfloat16 or bias_learns)
    compute = eager_attention_forward if products else sdpa_attention_forward
    return compute(module, query, key, value, attention_mask, **options)


def register_attention() -> str:
    """Let transformers know `attention`; return the name to load models with."""
    AttentionInterface.register(ATTENTION, attention)
    return ATTENTION
