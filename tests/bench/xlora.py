"""X-LoRA for images: peft's own only takes token ids. The reference for a mixture by a loop over adapters.

Buehler & Buehler (2024), X-LoRA, arXiv:2402.07148, as peft 0.21 has it: a first pass without adapters and without
gradients gives the last hidden state, a linear classifier turns it into one weight per token, layer and expert, and a
second pass adds up the adapters one after the other, each on inputs scaled by its weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from ContextGatedMOE import Expert

# peft multiplies every adapter's output by both, one after the other: that costs time whatever they are.
SCALE, GLOBAL_WEIGHT = 2.0, 1.0  # alpha / rank, which the experts here have in B; X-LoRA's own factor


class XLoraLinear(nn.Module):
    """A linear layer with a loop over adapters. `scalings` (B, T, E) is set before a pass, None disables the adapters."""

    def __init__(self, base: nn.Linear, updates: list[tuple[Tensor, Tensor]]):
        super().__init__()
        self.base, self.scalings = base, None
        self.down = nn.ParameterList([nn.Parameter(down, requires_grad=False) for down, _ in updates])
        self.up = nn.ParameterList([nn.Parameter(up / SCALE, requires_grad=False) for _, up in updates])

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, d_in). Returns (B, T, d_out)."""
        result = self.base(x)
        if self.scalings is not None:
            for index, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
                x = x.to(down.dtype)
                scaled = x * self.scalings[:, :, index, None]
                result += F.linear(F.linear(scaled, down), up) * SCALE * GLOBAL_WEIGHT
        return result


class XLora(nn.Module):
    """A frozen classifier with frozen experts; only the classifier of the weights learns."""

    def __init__(self, base: PreTrainedModel, experts: list[Expert]):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.layers = []
        for name in experts[0].updates:
            layer = XLoraLinear(base.get_submodule(name), [expert.updates[name] for expert in experts])
            base.set_submodule(name, layer)
            self.layers.append(layer)
        self.weigh = nn.Linear(base.config.hidden_size, len(self.layers) * len(experts)).to(base.classifier.weight)

    def forward(self, images: Tensor) -> ImageClassifierOutput:
        """images: (B, 3, S, S)."""
        self._set([None] * len(self.layers))
        with torch.no_grad():
            hidden = self.base.base_model(images).last_hidden_state  # (B, T, D)
        scalings = self.weigh(hidden).unflatten(-1, (len(self.layers), -1)).softmax(-1)  # (B, T, layers, E)
        self._set(list(scalings.unbind(2)))
        return self.base(images)

    def _set(self, scalings: list[Tensor | None]) -> None:
        for layer, own in zip(self.layers, scalings, strict=True):
            layer.scalings = own
