"""The heads: one answer among all experts' classes, or one mix of heads that share a label space."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ContextGatedMOE.gate import ClassMap, keep_dtype
from ContextGatedMOE.layers import InPlaceOfLinear
from ContextGatedMOE.passes import Evidence
from ContextGatedMOE.routing import Router, as_tokens, current_pass

HEAD_NUMBERS = ("expert_scale", "expert_prior")  # what validation images choose, for every expert
HEAD_GATE = "head_gate"  # the name of the gate that sees what reaches the head, as a submodule of it
TINY = torch.finfo(torch.float32).tiny  # in place of 0 in logarithms: a weight of 0 still gives a finite loss


class JointHead(InPlaceOfLinear):
    """Log-probabilities over the classes of all experts, from every expert's own head and what the gates know of the classes.

    For expert e and its class c, normalised over all:

        log p(e, c | x) = log g_e + a_e + log softmax(s_e (W_e h + b_e) + what the gates say of e's classes)_c

    The numbers `expert_scale` s_e and `expert_prior` a_e are fitted (`ContextGatedMOE.calibration`); where the experts' weights
    are fixed, s is 1, a is 0 and the gates say nothing. All experts' heads are asked, also where an image uses the adapters of
    a few only. An expert without a head of its own answers with what the gates say. weight: (sum of C_e, D) and bias
    (sum of C_e,) hold the experts' heads one after the other;
    headless: numbers of the experts that have none, whose rows are 0. columns: for each of these classes, the output that it
    adds to; classes declared to be the same share one. `base` is the head the base model had. A gate may stand before the head,
    as a submodule, which sees what reaches it.
    """

    def __init__(self, base: nn.Linear, weight: Tensor, bias: Tensor, sizes: list[int], columns: list[int], name: str,
                 router: Router, headless: list[int] = ()):
        super().__init__(base, name)
        self.expert_weight = nn.Parameter(weight, requires_grad=False)
        self.expert_bias = nn.Parameter(bias, requires_grad=False)
        self.classes = ClassMap(sizes)
        fixed = {"dtype": torch.float32}
        self.expert_scale = nn.Parameter(torch.ones(len(sizes), **fixed))
        self.expert_prior = nn.Parameter(torch.zeros(len(sizes), **fixed))
        self.register_buffer("columns", torch.tensor(columns), persistent=False)
        self.register_buffer("no_head", torch.isin(self.classes.owner, torch.tensor(list(headless), dtype=torch.long)),
                             persistent=False)  # (sum of C_e,)
        self.outputs = max(columns, default=-1) + 1
        self.router = router

    def _apply(self, fn: Callable, recurse: bool = True) -> "JointHead":
        """Conversions, but the head's numbers stay in fp32, as the gates do."""
        kept = [getattr(self, name) for name in HEAD_NUMBERS]
        return super()._apply(lambda tensor: keep_dtype(tensor, fn) if any(tensor is own for own in kept) else fn(tensor),
                              recurse)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, D) or (B, N, D). Returns log-probabilities (B, outputs) or (B, N, outputs) in fp32."""
        current = current_pass(self.name)
        settings, gate = current.settings, getattr(self, HEAD_GATE, None)
        scores, asked = None, settings.fixed is None and not settings.plain
        if gate is not None and x.ndim == 2 and (settings.features is not None or asked):
            features = gate.features(x[:, None].to(gate.score.weight.device))
            settings.note_features(self.name, features)
            scores = gate(features) if asked else None
        if settings.plain:
            return self.base(x)
        evidence = current.latest(x.shape[0], self.name)
        if scores is not None:
            routes = settings.evidence is None and self.router.head_routes
            evidence = evidence.and_also(scores[0] if routes else None, scores[1])
        if settings.record is not None and not settings.record:  # no block weighs experts, as none has an adapter
            known = evidence.experts is not None
            settings.record[self.name] = self.classes.weights(evidence.experts, None, False) if known else evidence.weights
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x, self.expert_weight.to(x.dtype), self.expert_bias.to(x.dtype)).float()
            if settings.head is not None:
                settings.head.update(logits=logits, evidence=evidence)
            return self.joint(logits, evidence)

    def joint(self, logits: Tensor, evidence: Evidence) -> Tensor:
        """Log-probabilities (..., outputs) from the logits (..., sum of C_e) of the experts' heads and what the gates say."""
        return self.merged(self.by_class(logits, evidence))

    def by_class(self, logits: Tensor, evidence: Evidence) -> Tensor:
        """The same before classes that are the same are added up (..., sum of C_e)."""
        evidence, scale = evidence.to(logits.device), self.expert_scale
        if evidence.classes is None:  # the weights are the caller's
            router, scale = evidence.weights.clamp_min(TINY).log(), torch.ones_like(scale)
        else:
            router = (self.classes.expert_log_probs(evidence.experts) + self.expert_prior).log_softmax(-1)
        router = router[:, None] if logits.ndim == 3 else router
        joint = self.own(logits, evidence.classes, scale) + router[..., self.classes.owner]
        return joint.log_softmax(-1)

    def own(self, logits: Tensor, classes: Tensor | None, scale: Tensor) -> Tensor:
        """Log-probabilities (..., sum of C_e) of each expert's own classes, by its head and what the gates say (B, sum of C_e).
        scale: (E,), of each expert's logits."""
        logits = logits * scale[self.classes.owner]
        if classes is not None:
            logits = logits + (classes[:, None] if logits.ndim == 3 else classes)
        return torch.cat([part.log_softmax(-1) for part in logits.split(self.classes.sizes, dim=-1)], dim=-1)

    def merged(self, joint: Tensor) -> Tensor:
        """Log-probabilities (..., outputs) from those of all classes (..., sum of C_e): classes that are the same add up."""
        if self.outputs == len(self.columns):
            return joint
        largest = joint.amax(-1, keepdim=True)
        summed = joint.new_zeros(*joint.shape[:-1], self.outputs).index_add_(-1, self.columns, (joint - largest).exp())
        return summed.clamp_min(TINY).log() + largest


class SharedHead(InPlaceOfLinear):
    """sum_e g_e (W_e h + b_e): heads of one label space, mixed by the weights that the gates have come to.

    expert_weight: (E, C, D); expert_bias: (E, C) or None. `base` is the head the base model had.
    """

    def __init__(self, base: nn.Linear, weight: Tensor, bias: Tensor | None, name: str, router: Router):
        super().__init__(base, name)
        self.expert_weight = nn.Parameter(weight, requires_grad=False)
        self.expert_bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.router = router

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
