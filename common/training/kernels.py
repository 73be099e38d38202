"""What transformers' attention and peft's LoRA layers compute, computed faster in training."""

import ctypes
import sys
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.beit.modeling_beit import eager_attention_forward

ATTENTION = "sdpa_or_products"  # the name models are loaded with


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


AttentionInterface.register(ATTENTION, attention)


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


def keep_freed_memory() -> None:
    """Have the C library keep what a step frees for the next one.

    glibc returns large blocks to the system at once; getting them back, zeroed page by page, is a twentieth of a training
    step of BEiT-base's width on a CPU (eight processes, with and without in turn: 1.04 to 1.07 times the time in bf16,
    0.99 to 1.12 in fp32). Other C libraries have no such switch.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)
