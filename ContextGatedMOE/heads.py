"""The heads: one answer among all experts' classes, or one mix of heads that share a label space."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ContextGatedMOE.gate import ClassMap, moved
from ContextGatedMOE.passes import Evidence
from ContextGatedMOE.routing import Router, as_tokens, current_pass

HEAD_NUMBERS = ("router_scale", "expert_scale", "class_share")
TINY = torch.finfo(torch.float32).tiny  # in place of 0 in logarithms: a weight of 0 still gives a finite loss


class JointHead(nn.Module):
    """Log-probabilities over the classes of all experts, from every expert's own head and what the gates know of the classes.

    For expert e and its class c, normalised over all:

        log p(e, c | x) = r * log g_e + log softmax(s * (W_e h + b_e))_c + w * log (what the gates say of class c)

    The three numbers `router_scale` r, `expert_scale` s and `class_share` w are fitted (`ContextGatedMOE.fitting.calibrate`);
    where the experts' weights are fixed, r and s are 1 and w is 0. All experts' heads are asked, also where an image uses the
    adapters of a few only. weight: (sum of C_e, D) and bias (sum of C_e,) hold the
    experts' heads one after the other. columns: for each of these classes, the output that it adds to; classes declared to be
    the same share one. `base` is the head the base model had.
    """

    def __init__(
        self, base: nn.Linear, weight: Tensor, bias: Tensor, sizes: list[int], columns: list[int], name: str, router: Router
    ):
        super().__init__()
        self.base = base
        self.expert_weight = nn.Parameter(weight, requires_grad=False)
        self.expert_bias = nn.Parameter(bias, requires_grad=False)
        self.classes = ClassMap(sizes)
        self.router_scale = nn.Parameter(torch.tensor(1.0))
        self.expert_scale = nn.Parameter(torch.tensor(1.0))
        self.class_share = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("columns", torch.tensor(columns), persistent=False)
        self.outputs = max(columns, default=-1) + 1
        self.name, self.router = name, router

    def _apply(self, fn: Callable, recurse: bool = True) -> "JointHead":
        """Conversions, but the head's three numbers stay in fp32, as the gates do."""
        return super()._apply(lambda tensor: fn(tensor) if tensor.ndim else moved(tensor, fn), recurse)

    @property
    def weight(self) -> Tensor:
        """The base head's weight (C, D), for models that ask a layer for its dtype or device by it."""
        return self.base.weight

    def mixture_base(self) -> nn.Linear:
        """The plain layer this one replaces."""
        return self.base

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, D) or (B, N, D). Returns log-probabilities (B, outputs) or (B, N, outputs) in fp32."""
        current = current_pass(self.name)
        if current.settings.plain:
            return self.base(x)
        evidence = current.latest(x.shape[0], self.name)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x, self.expert_weight.to(x.dtype), self.expert_bias.to(x.dtype)).float()
            if current.settings.scores is not None:
                current.settings.scores[self.name] = logits
            router, known = self._router(evidence)
            own = self.own(logits, 1.0 if evidence.classes is None else self.expert_scale)
            if x.ndim == 3:
                router, known = router[:, None], known[:, None]
            joint = (own + router[..., self.classes.owner] + known).log_softmax(-1)
            return self._merged(joint)

    def own(self, logits: Tensor, scale: Tensor | float) -> Tensor:
        """Log-probabilities (..., sum of C_e) that each expert gives its own classes."""
        return torch.cat([part.log_softmax(-1) for part in (scale * logits).split(self.classes.sizes, dim=-1)], dim=-1)

    def _router(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Log-weights of the experts (B, E) and what the gates add for each class (B, C)."""
        device = self.expert_weight.device
        weights, classes = evidence.weights.to(device), evidence.classes
        if classes is None:
            return weights.clamp_min(TINY).log(), weights.new_zeros(weights.shape[0], len(self.columns))
        classes = classes.to(device)
        router = (self.router_scale * self.classes.experts(classes)).log_softmax(-1)
        return router, self.class_share * self.classes.classes(classes)

    def _merged(self, joint: Tensor) -> Tensor:
        """Add up the probabilities of classes that are the same."""
        if self.outputs == len(self.columns):
            return joint
        largest = joint.amax(-1, keepdim=True)
        summed = joint.new_zeros(*joint.shape[:-1], self.outputs).index_add_(-1, self.columns, (joint - largest).exp())
        return summed.clamp_min(TINY).log() + largest


class SharedHead(nn.Module):
    """sum_e g_e (W_e h + b_e): heads of one label space, mixed by the weights that the gates have come to.

    expert_weight: (E, C, D); expert_bias: (E, C) or None. `base` is the head the base model had.
    """

    def __init__(self, base: nn.Linear, weight: Tensor, bias: Tensor | None, name: str, router: Router):
        super().__init__()
        self.base = base
        self.expert_weight = nn.Parameter(weight, requires_grad=False)
        self.expert_bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.name, self.router = name, router

    @property
    def weight(self) -> Tensor:
        """The base head's weight (C, D), for models that ask a layer for its dtype or device by it."""
        return self.base.weight

    def mixture_base(self) -> nn.Linear:
        """The plain layer this one replaces."""
        return self.base

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, ..., D). Returns (B, ..., C)."""
        current = current_pass(self.name)
        if current.settings.plain:
            return self.base(x)
        weights = current.latest(x.shape[0], self.name).weights.to(x.device)  # (B, E)
        tokens = as_tokens(x)
        experts, classes, _ = self.expert_weight.shape
        bias = None if self.expert_bias is None else self.expert_bias.flatten()
        logits = F.linear(tokens, self.expert_weight.flatten(0, 1), bias)  # (B, N, E * C)
        logits = logits.view(*tokens.shape[:2], experts, classes)
        mixed = (logits * weights[:, None, :, None].to(logits.dtype)).sum(2)
        return mixed.view(*x.shape[:-1], classes)
