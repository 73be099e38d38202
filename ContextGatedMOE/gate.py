"""The gate: a two-layer perceptron from an image's tokens to evidence for every class, and from classes to experts."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ContextGatedMOE.statistics import Discriminant

PARTS = 2  # an image's tokens are also pooled in so many by so many parts of it, where there is room
POOLED_FEATURES = 896  # at most, of the pooled tokens: with 128 random features the statistics of a gate take 2.1 MB an expert
START = 0.05  # how much each gate's scores count until validation images choose; see `calibration.fit_numbers`


def keep_dtype(tensor: Tensor, fn: Callable) -> Tensor:
    """What `fn` makes of a tensor, but never of another type."""
    changed = fn(tensor)
    return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)


class InFloat32(nn.Module):
    """A module whose tensors stay in fp32 when the model around it is converted: in bf16 small updates round to nothing."""

    def _apply(self, fn: Callable, recurse: bool = True) -> "InFloat32":
        return super()._apply(lambda tensor: keep_dtype(tensor, fn), recurse)


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

    def class_log_probs(self, evidence: Tensor) -> Tensor:
        """Log-probabilities (B, C) of all classes of all experts, from evidence (B, C)."""
        return (evidence + self.log_prior).log_softmax(-1)

    def expert_log_probs(self, evidence: Tensor) -> Tensor:
        """Log-probabilities (B, E) of the experts: an expert is as likely as its classes together."""
        classes = self.class_log_probs(evidence)[:, self.index]  # (B, E, largest number of classes)
        return classes.masked_fill(~self.used, -torch.inf).logsumexp(-1)

    def weights(self, evidence: Tensor, top_k: int | None, training: bool) -> Tensor:
        """Weights (B, E) of the experts, each row summing to one."""
        return select(self.expert_log_probs(evidence).exp(), top_k, training)


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
    """What an image's tokens at one depth say of all experts' classes.

    The first layer is fixed and random, `relu(W1 x + b1)` of every normalised token (random features, Rahimi and Recht 2008);
    its mean over the tokens, with the first token, which is the class token where a model has one, the mean and the deviation
    of the others and, where there is room, their means in two by two parts of the image, are the features of an image. Where
    the pooled tokens are too many, they are added up in groups with random signs (feature hashing, Weinberger et al. 2009). The
    second layer, the only part that learns, gives each class two scores: `score`, by which an image's expert is found, and
    `class_score`, by which its class is among those of an expert. They start as linear discriminants, in closed form
    (`ContextGatedMOE.statistics`). All is computed in fp32.
    """

    def __init__(self, width: int, hidden: int, sizes: list[int], of_tokens: bool = True):
        """width: D of the tokens. hidden: units of the first layer. sizes: number of classes of each expert. of_tokens: whether
        the gate sees all tokens (B, N, D), not one vector (B, D) of an image."""
        super().__init__()
        self.width, self.hidden, self.of_tokens = width, hidden, of_tokens
        fixed = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are: statistics of all mixtures add up
        generator = torch.Generator("cpu").manual_seed(width * 1_000_003 + hidden)
        self.register_buffer("hidden_weight", torch.randn(hidden, width, generator=generator, **fixed) / width**0.5)
        self.register_buffer("hidden_bias", torch.randn(hidden, generator=generator, **fixed) / 2)
        pooled = 3 * width if of_tokens else width
        self.with_parts = of_tokens and pooled + PARTS**2 * width <= POOLED_FEATURES
        pooled += PARTS**2 * width if self.with_parts else 0
        kept = min(pooled, POOLED_FEATURES)
        bucket = torch.arange(pooled, device="cpu")
        if kept < pooled:
            bucket = bucket[torch.randperm(pooled, generator=generator, device="cpu")] % kept
        sign = torch.randint(2, (pooled,), generator=generator, device="cpu").to(torch.float32) * 2 - 1
        self.register_buffer("bucket", bucket)
        self.register_buffer("sign", sign)
        self.classes = ClassMap(sizes)
        self.score = nn.Linear(kept + hidden, sum(sizes), **fixed)
        self.class_score = nn.Linear(kept + hidden, sum(sizes), **fixed)
        for value in (*self.score.parameters(), *self.class_score.parameters()):
            nn.init.zeros_(value)
        self.coefficient = nn.Parameter(torch.tensor(START, **fixed))  # how much `score` counts
        self.class_coefficient = nn.Parameter(torch.tensor(START, **fixed))  # how much `class_score` counts
        directions = min(sum(sizes), self.feature_count)  # as many as there may be; those that are not used are zero
        for name, shape in (("axes", (directions, self.feature_count)), ("origin", (directions,)),
                            ("centres", (directions, sum(sizes))), ("precision", (directions, directions))):
            self.register_buffer(name, torch.zeros(shape, **fixed))

    @property
    def feature_count(self) -> int:
        """K, the number of features of an image."""
        return self.score.in_features

    def features(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features (B, K) of images from their tokens (B, N, D). mask: (B, N), 1 for tokens that count; None for all."""
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.float()
            units = F.relu(F.linear(F.layer_norm(tokens, tokens.shape[-1:]), self.hidden_weight, self.hidden_bias))  # (B, N, H)
            if not self.of_tokens:
                return torch.cat([self._fewer(tokens[:, 0]), units[:, 0]], dim=1)
            first, whole, others, parts = shares(tokens, mask)  # each (B or 1, n, N)
            mean = others @ tokens  # (B, 1, D)
            deviation = (others @ (tokens - mean).square() + 1e-12).sqrt()
            pooled = torch.cat([first @ tokens, mean, deviation, *([parts @ tokens] if self.with_parts else [])], dim=1)
            return torch.cat([self._fewer(pooled.flatten(1)), (whole @ units)[:, 0]], dim=1)

    def _fewer(self, pooled: Tensor) -> Tensor:
        """Pooled tokens (B, P) as at most POOLED_FEATURES numbers."""
        kept = self.feature_count - self.hidden
        if kept == pooled.shape[1]:
            return pooled
        return pooled.new_zeros(len(pooled), kept).index_add(1, self.bucket, pooled * self.sign)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What features (B, K) say: scores (B, C) for the experts and within each expert, as much as each counts."""
        with torch.autocast(features.device.type, enabled=False):
            return self.coefficient * self.score(features), self.class_coefficient * self.class_score(features)

    @torch.no_grad()
    def set_discriminant(self, found: Discriminant | None, own: tuple[Tensor, Tensor] | None) -> None:
        """Begin with the discriminants of all experts' classes, and those within each expert, where they are known."""
        if own is not None:
            self.class_score.weight.copy_(own[0])
            self.class_score.bias.copy_(own[1])
        if found is None:  # another time the gate may have told of the experts
            for value in (*self.score.parameters(), self.axes, self.origin, self.centres, self.precision):
                value.zero_()
            return
        self.score.weight.copy_(found.weight)
        self.score.bias.copy_(found.bias)
        for name in ("axes", "origin", "centres"):
            value = getattr(found, name)
            getattr(self, name).zero_()[: len(value)] = value
        self.precision.zero_()[: len(found.precision), : len(found.precision)] = found.precision

    @torch.no_grad()
    def copy_first_layer(self, other: "Gate") -> None:
        """See the same features as another gate of as many."""
        for name in ("hidden_weight", "hidden_bias", "bucket", "sign"):
            getattr(self, name).copy_(getattr(other, name))

    @property
    def knows_classes(self) -> bool:
        """Whether the gate was ever fitted, to two classes or more."""
        return bool(self.axes.any())

    def familiarity(self, features: Tensor) -> Tensor:
        """How familiar images are (B,), from features (B, K): larger for those that are nearer to a class than images of any
        class are to all.

        It is the relative Mahalanobis distance (Ren et al. 2021) to the nearest class, negative, for each direction of the
        space of the classes' means.
        """
        with torch.autocast(features.device.type, enabled=False):
            seen = F.linear(features, self.axes) - self.origin  # (B, R)
            nearest = (seen.square().sum(1, keepdim=True) - 2 * seen @ self.centres + self.centres.square().sum(0)).amin(1)
            anywhere = ((seen @ self.precision) * seen).sum(1)
            return (anywhere - nearest) / self.precision.any(1).sum().clamp_min(1)


def side_of_square(number: int) -> int:
    """The side of the smallest square of at least so many; counted, as torch.compile knows no whole roots."""
    side = 0
    while side * side < number:
        side += 1
    return side


def shares(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How much each token counts in the first token (B, 1, N), and in three means: over all (B, 1, N), over all but the first
    (B, 1, N), and over each of two by two parts of the image (B, 4, N).

    Where the tokens but the first, or with it, make a square, the parts are those of the square; else they are consecutive
    tokens. Without a mask B is 1. A part without tokens is the mean over all.
    """
    count = tokens.shape[1]
    present = tokens.new_ones(1, count) if mask is None else mask.to(tokens)  # (B, N)
    first = present * (present.cumsum(1) == 1)  # before it there may be padding
    without_first = present - first
    special = next((number for number in (1, 0) if side_of_square(count - number) ** 2 == count - number), None)
    if mask is None and special is not None and count > 1:
        side = side_of_square(count - special)
        half = torch.arange(side, device=tokens.device) * PARTS // side
        part = torch.cat([half.new_full((special,), -1), (half[:, None] * PARTS + half).flatten()])[None]  # (1, N)
    else:
        part = ((present.cumsum(1) - 1).clamp_min(0) * PARTS**2 / present.sum(1, keepdim=True).clamp_min(1)).long()
    parts = torch.stack([present * (part == number) for number in range(PARTS**2)], dim=1)  # (B, 4, N)
    whole, others = (row / row.sum(1, keepdim=True).clamp_min(1) for row in (present, without_first))
    others = torch.where(others.any(1, keepdim=True), others, whole)
    size = parts.sum(2, keepdim=True)
    return first[:, None], whole[:, None], others[:, None], torch.where(size > 0, parts / size.clamp_min(1), whole[:, None])
