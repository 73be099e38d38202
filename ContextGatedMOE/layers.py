"""The gated linear layer: a frozen linear layer with all experts' LoRA updates, weighed per image, in one pass."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ContextGatedMOE.routing import per_image


class InPlaceOfLinear(nn.Module):
    """A layer of a mixture in place of a linear layer of the base model, `base`."""

    def __init__(self, base: nn.Linear, name: str):
        super().__init__()
        self.base, self.name = base, name

    @property
    def weight(self) -> Tensor:
        """The frozen base weight (d_out, d_in): some models ask a layer for its dtype or device by it."""
        return self.base.weight


class MixtureLinear(InPlaceOfLinear):
    """y = W x + b + sum_e g_e s_e B_e A_e x, with the weights g (B, E) of the block that the layer is in.

    lora_A: (R, d_in) and lora_B: (d_out, R) hold the experts one after the other, R the sum of their ranks, scaling in
    B; `owner` (R,) says which expert a row belongs to. `rows` (E, r), r the largest rank, are the rows of every expert,
    and `used` (E, r) is 0 where a smaller expert has none. Nothing of it is trained.
    """

    def __init__(self, base: nn.Linear, lora_A: Tensor, lora_B: Tensor, ranks: list[int], name: str):
        super().__init__(base, name)
        self.lora_A = nn.Parameter(lora_A, requires_grad=False)
        self.lora_B = nn.Parameter(lora_B, requires_grad=False)
        self.ranks = ranks
        sizes, within = torch.tensor(ranks, device=lora_A.device), torch.arange(max(ranks), device=lora_A.device)
        used = within < sizes[:, None]
        rows = (sizes.cumsum(0) - sizes)[:, None] + within
        owner = torch.arange(len(ranks), device=lora_A.device).repeat_interleave(sizes)
        for buffer, value in (("owner", owner), ("rows", rows.where(used, 0)), ("used", used)):
            self.register_buffer(buffer, value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in). Returns (..., d_out)."""
        tokens, weights, top_k = per_image(x, self.name)  # (B, N, d_in), (B, E)
        y = self.base(x)
        if weights is None:
            return y
        # The update is added in place, inside the matrix product: a second tensor as large as y costs more than the update.
        if self._skips(tokens.shape[1], top_k):
            weights, chosen = weights.topk(top_k)  # (B, k)
            rows, factor = self.rows[chosen].flatten(1), (weights[..., None] * self.used[chosen]).flatten(1)  # (B, k * r)
            low = torch.bmm(tokens, self.lora_A[rows].mT)  # (B, N, k * r)
            low = (low * factor[:, None]).to(y.dtype)
            y.view(*tokens.shape[:2], y.shape[-1]).baddbmm_(low, self.lora_B.T[rows].to(y.dtype))
        else:
            low = F.linear(tokens, self.lora_A)  # (B, N, R)
            low = (low * weights[:, None, self.owner]).to(y.dtype)
            y.view(-1, y.shape[-1]).addmm_(low.flatten(0, 1), self.lora_B.T.to(y.dtype))
        return y

    def _skips(self, tokens: int, top_k: int | None) -> bool:
        """Whether to compute an image's top-k experts only, for that many tokens an image; training needs them all."""
        # Collecting an image's experts costs about as much as 48 tokens more. Measured at BEiT-base size (widths 768 and
        # 3072, rank 16, batch 16, one core), time of all experts over time of k of them: with 197 tokens k = 1 of 2: 1.03
        # to 1.33, 1 of 4: 1.6 to 2.0, 1 of 8: 2.8 to 3.3, 1 of 16: 4.9 to 7.4, 4 of 8: 1.3 to 1.5; with 16 tokens 1 of 2:
        # 0.7 to 0.9, 1 of 8: 1.7 to 2.2; with 1 token always below 1.
        if top_k is None or self.training:
            return False
        return 3 * top_k * self.rows.shape[1] * (tokens + 48) <= 2 * len(self.lora_A) * tokens
