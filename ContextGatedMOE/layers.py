"""The gate, and the two layers it steers: a linear layer with stacked LoRA experts, and a mixed head."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ContextGatedMOE.experts import MixtureError


@dataclass
class Routing:
    """What the layers of one mixture share during a forward pass.

    batch: number of images (or texts) in the pass; mask: (B, T), 1 for tokens that count, or None; fixed: (E,)
    weights that replace the gates, or None; record: filled with {layer: (B, E)} unless None; top_k: see `Gate`.
    inputs: names of the base model's arguments in order; leading: those that tell the batch best; encoder_only: the mask
    is of the encoder's tokens only, as in encoder-decoder models.
    """

    inputs: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()
    encoder_only: bool = False
    batch: int | None = None
    mask: Tensor | None = None
    fixed: Tensor | None = None
    record: dict[str, Tensor] | None = None
    top_k: int | None = None

    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note batch and mask before the base model runs: a forward pre-hook.

        Both stay after the pass, as gradient checkpointing runs layers again during backward.
        """
        given = dict(zip(self.inputs, args, strict=False)) | kwargs
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.ndim}
        order = [name for name in (*self.leading, *self.inputs, *tensors) if name in tensors]
        self.batch = tensors[order[0]].shape[0] if order else None
        mask = tensors.get("attention_mask")
        self.mask = mask if mask is not None and mask.ndim == 2 else None

    def per_image(self, x: Tensor) -> Tensor:
        """View (..., D) as (B, N, D): all tokens of an image together.

        Some models fold tokens into the batch, such as Swin's windows (B * windows, T, D); images stay contiguous.
        """
        batch = x.shape[0] if self.batch is None else self.batch
        rows = x.shape[:-1].numel()
        if batch == 0:
            return x.reshape(0, 1, x.shape[-1])
        if rows % batch:
            raise MixtureError(f"a layer got {x.shape[0]} rows for a batch of {batch}; the batch must come first")
        return x.reshape(batch, rows // batch, x.shape[-1])

    def token_mask(self, tokens: Tensor, layer: str) -> Tensor | None:
        """The mask (B, N) of a layer's tokens (B, N, D), or None where no mask of that length applies.

        While a decoder generates with a cache, the mask covers earlier tokens too; the last N belong to these.
        """
        count = tokens.shape[1]
        if self.mask is None or count == 1 or self.mask.shape[1] < count:
            return None
        if self.encoder_only and ("encoder." not in layer or self.mask.shape[1] != count):
            return None
        return self.mask[:, -count:]


class Gate(nn.Module):
    """Two-layer perceptron from the tokens of an image to one weight per expert.

    g(x) = softmax(W2 . mean_tokens(relu(W1 x + b1)) + b2)

    The output layer starts at zero: all experts weigh the same until training says otherwise.
    """

    def __init__(self, in_features: int, hidden: int, experts: int):
        super().__init__()
        self.hidden = nn.Linear(in_features, hidden)
        self.output = nn.Linear(hidden, experts)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, tokens: Tensor, routing: Routing, layer: str = "", projected: Tensor | None = None) -> Tensor:
        """Weights (B, E) in float32, each row summing to one. tokens: (B, N, D), the input of the layer of that name.

        projected: W1 x (B, N, H), if it was computed already.
        """
        if routing.fixed is not None:
            weights = routing.fixed.to(tokens.device).expand(tokens.shape[0], -1)
        else:
            projected = F.linear(tokens, self.hidden.weight) if projected is None else projected
            weights = self._weigh(F.relu(projected + self.hidden.bias.to(projected)), routing, layer)
        if routing.record is not None:
            routing.record[layer] = weights
        return weights

    def _weigh(self, hidden: Tensor, routing: Routing, layer: str) -> Tensor:
        """Weights (B, E) from the hidden layer's output (B, N, H)."""
        pooled = mean_tokens(hidden, routing, layer)
        return self.select(torch.softmax(self.output(pooled).float(), dim=-1), routing.top_k)

    def select(self, weights: Tensor, top_k: int | None) -> Tensor:
        """Keep the `top_k` largest of the weights (B, E), renormalised.

        Training sees the kept weights but the gradient of all (straight-through, Bengio et al. 2013), without which
        top_k = 1 would give the gate no gradient at all.
        """
        if top_k is None or top_k >= weights.shape[-1]:
            return weights
        kept = torch.zeros_like(weights).scatter(-1, weights.topk(top_k).indices, 1.0) * weights
        kept = kept / kept.sum(-1, keepdim=True)
        return kept + weights - weights.detach() if self.training else kept

    @torch.no_grad()
    def warm_start(self, tokens: Tensor, owners: Tensor, routing: Routing, layer: str) -> None:
        """Choose weights that tell apart whose image it is, from a sample: tokens (B, N, D), owners (B,) expert of each image.

        The first hidden units look along the directions in which the experts' images differ (linear discriminants with
        diagonal covariance); they are scaled to deviation 1 over the tokens, with a bias at which most tokens pass the
        ReLU. The output layer is then fitted by logistic regression.
        """
        tokens = tokens.float()
        images, experts = mean_tokens(tokens, routing, layer), self.output.out_features  # (B, D)
        chosen = F.one_hot(owners, experts).to(images)  # (B, E)
        counts = chosen.sum(0)[:, None].clamp_min(1)
        centres = chosen.T @ images / counts  # (E, D)
        spread = (images - centres[owners]).square().mean(0).sqrt()  # (D,)
        spread = spread + spread.mean().clamp_min(1e-6)  # a feature that hardly varies in the sample proves little
        apart = (centres - images.mean(0)) / spread * (chosen.sum(0)[:, None] > 0)
        if experts > len(self.hidden.weight):  # more experts than units: the directions that tell most of them apart
            apart = torch.linalg.svd(apart, full_matrices=False).Vh[: len(self.hidden.weight)]
        weight = self.hidden.weight.float()
        weight[: len(apart)] = apart / spread
        deviation, mean = torch.std_mean((tokens @ weight.T).flatten(0, 1), dim=0)  # (H,)
        deviation = deviation.clamp_min(1e-6)
        self.hidden.weight.copy_(weight / deviation[:, None])
        self.hidden.bias.copy_(1 - mean / deviation)
        pooled = mean_tokens(F.relu(F.linear(tokens, self.hidden.weight.float(), self.hidden.bias.float())), routing, layer)
        for parameter, value in zip(self.output.parameters(), logistic_regression(pooled, owners, experts), strict=True):
            parameter.copy_(value)

    def grow(self, index: int) -> None:
        """Add an expert at position `index`; the weights of the others stay.

        The new row is the mean of the old ones, so where the gate was sure of one expert it stays sure of it.
        """
        self.output.weight = nn.Parameter(_insert_mean(self.output.weight, index))
        self.output.bias = nn.Parameter(_insert_mean(self.output.bias, index))
        self.output.out_features += 1


def mean_tokens(values: Tensor, routing: Routing, layer: str) -> Tensor:
    """The mean (B, D) over the tokens that count of values (B, N, D) in the layer of that name."""
    mask = routing.token_mask(values, layer)
    if mask is None:
        return values.mean(1)
    share = mask.to(values) / mask.sum(1, keepdim=True).clamp_min(1)  # (B, N)
    return (values * share[:, :, None]).sum(1)


@torch.enable_grad()
def logistic_regression(features: Tensor, labels: Tensor, classes: int, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weight (classes, D) and bias (classes,) of multinomial logistic regression on features (N, D), ridge on the weight
    for features of deviation 1."""
    deviation, mean = torch.std_mean(features, dim=0)
    deviation = deviation.clamp_min(1e-6)
    inputs = (features - mean) / deviation
    weight = inputs.new_zeros(classes, inputs.shape[1], requires_grad=True)
    bias = inputs.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(inputs, weight, bias), labels) + ridge * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    scaled = weight.detach() / deviation
    return scaled, bias.detach() - scaled @ mean


def _insert_mean(rows: Tensor, index: int) -> Tensor:
    rows = rows.detach()
    return torch.cat([rows[:index], rows.mean(0, keepdim=True), rows[index:]])


class MixtureLinear(nn.Module):
    """y = W x + b + sum_e g_e(x) s_e B_e A_e x, with all experts in one pass.

    lora_A: (R, d_in) and lora_B: (d_out, R) hold the experts one after the other, R the sum of their ranks, scaling in
    B; `owner` (R,) says which expert a row belongs to. `rows` (E, r), r the largest rank, are the rows of every expert,
    and `used` (E, r) is 0 where a smaller expert has none. Only the gate is trainable.
    """

    def __init__(self, base: nn.Linear, lora_A: Tensor, lora_B: Tensor, ranks: list[int], gate: Gate,
                 name: str, routing: Routing):
        super().__init__()
        self.base, self.gate = base, gate
        self.lora_A = nn.Parameter(lora_A, requires_grad=False)
        self.lora_B = nn.Parameter(lora_B, requires_grad=False)
        self.ranks, self.name, self.routing = ranks, name, routing
        sizes, within = torch.tensor(ranks, device=lora_A.device), torch.arange(max(ranks), device=lora_A.device)
        used = within < sizes[:, None]
        rows = (sizes.cumsum(0) - sizes)[:, None] + within
        owner = torch.arange(len(ranks), device=lora_A.device).repeat_interleave(sizes)
        for buffer, value in (("owner", owner), ("rows", rows.where(used, 0)), ("used", used)):
            self.register_buffer(buffer, value, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The frozen base weight (d_out, d_in): some models ask a layer for its dtype or device by it."""
        return self.base.weight

    def mixture_base(self) -> nn.Linear:
        """The plain layer this one replaces."""
        return self.base

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in) with the batch first. Returns (..., d_out)."""
        tokens = self.routing.per_image(x)  # (B, N, d_in)
        y = self.base(x)
        # The update is added in place, inside the matrix product: a second tensor as large as y costs more than the update.
        if self._skips(tokens.shape[1]):
            weights = self.gate(tokens, self.routing, self.name)  # (B, E)
            weights, chosen = weights.topk(self.routing.top_k)  # (B, k)
            rows, factor = self.rows[chosen].flatten(1), (weights[..., None] * self.used[chosen]).flatten(1)  # (B, k * r)
            low = torch.bmm(tokens, self.lora_A[rows].mT)  # (B, N, k * r)
            low = (low * factor[:, None]).to(y.dtype)
            y.view(*tokens.shape[:2], -1).baddbmm_(low, self.lora_B.T[rows].to(y.dtype))
        else:
            # One product reads x for the experts and the gate.
            both = F.linear(tokens, torch.cat([self.lora_A, self.gate.hidden.weight]))  # (B, N, R + H)
            low, projected = both.tensor_split([len(self.lora_A)], dim=-1)
            weights = self.gate(tokens, self.routing, self.name, projected)  # (B, E)
            low = (low * weights[:, None, self.owner]).to(y.dtype)  # (B, N, R)
            y.view(-1, y.shape[-1]).addmm_(low.flatten(0, 1), self.lora_B.T.to(y.dtype))
        return y

    def _skips(self, tokens: int) -> bool:
        """Whether to compute an image's top-k experts only, for that many tokens an image; training needs them all."""
        # Collecting an image's experts costs about as much as 48 tokens more. Measured at BEiT-base size (widths 768 and
        # 3072, rank 16, batch 16, one core), time of all experts over time of k of them: with 197 tokens k = 1 of 2: 1.03
        # to 1.33, 1 of 4: 1.6 to 2.0, 1 of 8: 2.8 to 3.3, 1 of 16: 4.9 to 7.4, 4 of 8: 1.3 to 1.5; with 16 tokens 1 of 2:
        # 0.7 to 0.9, 1 of 8: 1.7 to 2.2; with 1 token always below 1.
        top_k = self.routing.top_k
        if top_k is None or self.training or self.routing.fixed is not None:
            return False
        return 3 * top_k * self.rows.shape[1] * (tokens + 48) <= 2 * len(self.lora_A) * tokens


class MixtureHead(nn.Module):
    """sum_e g_e(h) (W_e h + b_e): the experts' own heads, mixed by a gate of their own.

    expert_weight: (E, C, D); expert_bias: (E, C) or None. `base` is the head the base model had; it is kept so that
    experts can be added later, and takes no part in the forward pass.
    """

    def __init__(self, base: nn.Linear, weight: Tensor, bias: Tensor | None, gate: Gate, name: str, routing: Routing):
        super().__init__()
        self.base, self.gate = base, gate
        self.expert_weight = nn.Parameter(weight, requires_grad=False)
        self.expert_bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.name, self.routing = name, routing

    @property
    def weight(self) -> Tensor:
        """The base head's weight (C, D), for models that ask a layer for its dtype or device by it."""
        return self.base.weight

    def mixture_base(self) -> nn.Linear:
        """The plain layer this one replaces."""
        return self.base

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) with the batch first. Returns (..., C)."""
        tokens = self.routing.per_image(x)  # (B, N, D)
        weights = self.gate(tokens, self.routing, self.name)  # (B, E)
        experts, classes, _ = self.expert_weight.shape
        bias = None if self.expert_bias is None else self.expert_bias.flatten()
        logits = F.linear(tokens, self.expert_weight.flatten(0, 1), bias)  # (B, N, E * C)
        logits = logits.view(*tokens.shape[:2], experts, classes)
        mixed = (logits * weights[:, None, :, None].to(logits.dtype)).sum(2)
        return mixed.view(*x.shape[:-1], classes)
