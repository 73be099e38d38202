"""What transformers' attention and peft's LoRA layers compute, computed faster in training."""

from typing import Any

import torch
from peft.tuners.lora import Linear
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


class LoraLinear(Linear):
    """peft's layer y = W x + b + s B A x, with scale and sum inside the last product, in the dtype of x."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., d_in). Returns (..., d_out)."""
        if self.disable_adapters or self.merged or self.lora_variant or len(self.active_adapters) != 1 or args or kwargs:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        rows = x.reshape(-1, x.shape[-1])  # in two dimensions the sum is made in place, and nothing of y is copied
        y, low = self.base_layer(rows), self.lora_A[name](self.lora_dropout[name](rows))
        y.addmm_(low, self.lora_B[name].weight.T.to(y.dtype), alpha=self.scaling[name])
        return y.view(*x.shape[:-1], y.shape[-1])
