"""The gate: a two-layer perceptron from an image's tokens to evidence for every class, and from classes to experts."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ContextGatedMOE.statistics import Discriminant

BANDS = 4  # consecutive parts of the tokens, each pooled by itself: coarse positions
LINEAR_FEATURES = 256  # at most, of the pooled tokens themselves
START = 0.3  # how much each gate's scores count before validation images have said; see `fitting.calibrate`


def moved(tensor: Tensor, fn: Callable) -> Tensor:
    """What `fn` makes of a tensor, but never of another type."""
    changed = fn(tensor)
    return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)


class InFloat32(nn.Module):
    """A module whose tensors stay in fp32 when the model around it is converted: in bf16 small updates round to nothing."""

    def _apply(self, fn: Callable, recurse: bool = True) -> "InFloat32":
        return super()._apply(lambda tensor: moved(tensor, fn), recurse)


class ClassMap(InFloat32):
    """Which classes belong to which expert, and what follows for the experts from evidence for the classes.

    sizes: number of classes of each expert. A class has the prior 1 / (experts * classes of its expert).
    """

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.sizes = list(sizes)
        widest, total = max(self.sizes, default=0), sum(self.sizes)
        starts = torch.tensor([0, *self.sizes]).cumsum(0)[:-1]
        within = torch.arange(widest)
        used = within < torch.tensor(self.sizes)[:, None] if self.sizes else torch.zeros(0, 0, dtype=torch.bool)
        index = torch.where(used, starts[:, None] + within, 0)
        prior = (
            torch.cat([torch.full((size,), 1 / (size * len(self.sizes))) for size in self.sizes]) if total else torch.zeros(0)
        )
        owner = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes, dtype=torch.long))
        for name, value in (("index", index), ("used", used), ("log_prior", prior.log()), ("owner", owner)):
            self.register_buffer(name, value, persistent=False)

    def classes(self, evidence: Tensor) -> Tensor:
        """Log-probabilities (B, C) of all classes of all experts, from evidence (B, C)."""
        return (evidence + self.log_prior).log_softmax(-1)

    def experts(self, evidence: Tensor) -> Tensor:
        """Log-probabilities (B, E) of the experts: an expert is as likely as its classes together."""
        classes = self.classes(evidence)[:, self.index]  # (B, E, largest number of classes)
        return classes.masked_fill(~self.used, -torch.inf).logsumexp(-1)

    def weights(self, evidence: Tensor, top_k: int | None, training: bool) -> Tensor:
        """Weights (B, E) of the experts, each row summing to one."""
        return select(self.experts(evidence).exp(), top_k, training)


def select(weights: Tensor, top_k: int | None, training: bool) -> Tensor:
    """Keep the `top_k` largest of the weights (B, E), renormalised.

    Training sees the kept weights but has the gradient of all (straight-through, Bengio et al. 2013), without which top_k = 1
    would give the gates no gradient.
    """
    if top_k is None or top_k >= weights.shape[-1]:
        return weights
    kept = torch.zeros_like(weights).scatter(-1, weights.topk(top_k).indices, 1.0) * weights
    kept = kept / kept.sum(-1, keepdim=True)
    return weights + (kept - weights).detach() if training else kept


class Gate(InFloat32):
    """What an image's tokens before a block say of all experts' classes.

    The first layer is fixed and random, `relu(W1 x + b1)` of every normalised token (random features, Rahimi and Recht 2008);
    its mean in each of four consecutive parts of the tokens, with mean, deviation and the parts' means of the tokens
    themselves, are the features of an image. The second layer, the only part that learns, gives each class a score; its start
    is the linear discriminant of the classes, in closed form (`ContextGatedMOE.statistics`). All is computed in fp32.
    """

    def __init__(self, width: int, hidden: int, sizes: list[int]):
        """width: D of the tokens. hidden: units of the first layer. sizes: number of classes of each expert."""
        super().__init__()
        self.width, self.hidden = width, hidden
        generator = torch.Generator().manual_seed(width * 1_000_003 + hidden)  # the same for every mixture: statistics add up
        self.register_buffer("hidden_weight", torch.randn(hidden, width, generator=generator) / width**0.5, persistent=False)
        self.register_buffer("hidden_bias", torch.randn(hidden, generator=generator) / 2, persistent=False)
        pooled = (2 + BANDS) * width
        picked = torch.linspace(0, pooled - 1, min(pooled, LINEAR_FEATURES)).round().long()
        self.register_buffer("picked", picked, persistent=False)
        self.classes = ClassMap(sizes)
        self.score = nn.Linear(len(picked) + BANDS * hidden, sum(sizes))
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        self.coefficient = nn.Parameter(torch.tensor(START))
        directions = min(sum(sizes), self.feature_count)  # as many as there may be; those that are not used are zero
        for name, shape in (
            ("axes", (directions, self.feature_count)),
            ("origin", (directions,)),
            ("centres", (directions, sum(sizes))),
        ):
            self.register_buffer(name, torch.zeros(shape))

    @property
    def feature_count(self) -> int:
        """K, the number of features of an image."""
        return self.score.in_features

    def features(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features (B, K) of images from their tokens (B, N, D). mask: (B, N), 1 for tokens that count; None for all."""
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.float()
            units = F.relu(F.linear(F.layer_norm(tokens, tokens.shape[-1:]), self.hidden_weight, self.hidden_bias))  # (B, N, H)
            whole, bands = shares(tokens, mask)  # (B or 1, 1, N), (B or 1, bands, N)
            mean = whole @ tokens  # (B, 1, D)
            deviation = (whole @ (tokens - mean).square() + 1e-12).sqrt()
            pooled = torch.cat([mean, deviation, bands @ tokens], dim=1).flatten(1)
            return torch.cat([pooled[:, self.picked], (bands @ units).flatten(1)], dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """Scores (B, C) of all classes from features (B, K), before they are weighed by `coefficient`."""
        with torch.autocast(features.device.type, enabled=False):
            return self.score(features)

    @torch.no_grad()
    def start(self, found: Discriminant) -> None:
        """Begin with the discriminants of all experts' classes."""
        self.score.weight.copy_(found.weight)
        self.score.bias.copy_(found.bias)
        for buffer, value in ((self.axes, found.axes), (self.origin, found.origin), (self.centres, found.centres)):
            buffer.zero_()[: len(value)] = value

    @property
    def knows_classes(self) -> bool:
        """Whether the gate was ever fitted, to two classes or more."""
        return bool(self.axes.any())

    def familiarity(self, features: Tensor) -> Tensor:
        """How near images are to each class (B, C), from features (B, K).

        It is the cosine between an image and a class in the whitened space of the classes' means, both as seen from the middle
        of all classes.
        """
        seen = F.normalize(F.linear(features, self.axes) - self.origin, dim=-1)
        return seen @ self.centres


def shares(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """How much each token counts in the mean over all (B, 1, N) and over each of four consecutive parts (B, 4, N).

    Without a mask B is 1. A part without tokens, where there are fewer than four, is the mean over all.
    """
    present = tokens.new_ones(1, tokens.shape[1]) if mask is None else mask.to(tokens)  # (B, N)
    count = present.sum(1, keepdim=True).clamp_min(1)
    part = ((present.cumsum(1) - 1).clamp_min(0) * BANDS / count).long()  # (B, N), which part a token belongs to
    bands = torch.stack([present * (part == number) for number in range(BANDS)], dim=1)  # (B, bands, N)
    size = bands.sum(2, keepdim=True)
    whole = (present / count)[:, None]
    return whole, torch.where(size > 0, bands / size.clamp_min(1), whole)
