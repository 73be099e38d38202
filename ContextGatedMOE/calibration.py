"""What validation images choose: the block from which on experts are used, shrinkage, which gates stay, and a few numbers."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ContextGatedMOE.fitting import Drawn, Seen
from ContextGatedMOE.gate import START

ROUTING = 0.3  # weight of the gates' own log-likelihood of the experts beside that of the joint answer
TOWARDS_START = 0.03  # a pull to where the numbers begin, for few validation images
TOWARDS_COMMON = 0.1  # a pull of what an expert has of its own to what all have
SHARE_START = 0.5
SHRINKAGES = (0.03, 0.1, 0.3)
CALIBRATED, CALIBRATED_OF_ONE = 600, 8  # validation images that the handful of numbers is fitted to, and at least of an expert
WORTH = 0.05  # of the largest: a gate whose evidence varies by less is dropped


@torch.enable_grad()
def fit_numbers(model: nn.Module, seen: Seen, with_head: bool = True) -> float:
    """Choose the gates' coefficients and, `with_head`, the head's numbers by LBFGS on the joint likelihood; experts weigh alike.

    Returns the loss. Coefficients, scales and shares stay above zero.
    """
    head, gates = model.joint_head, {name: model.gates()[name] for name in seen.features}
    with torch.no_grad():
        scores, logits, weights = seen.scores(model), seen.logits, seen.weights
    if scores.device.type != "mps":  # which has no fp64; elsewhere rounding is not to decide where the search ends
        scores, logits, weights = scores.double(), logits.double(), weights.double()
    kind = {"dtype": scores.dtype, "device": scores.device}
    start = torch.tensor([START] * len(gates) + [1.0, SHARE_START, 1.0], **kind)
    free = start.expm1().log().requires_grad_()  # the inverse of softplus
    own_scale, prior = (torch.zeros(len(model.sizes), requires_grad=True, **kind) for _ in range(2))
    optimizer = torch.optim.LBFGS([free, own_scale, prior], max_iter=100, line_search_fn="strong_wolfe")
    owner = head.classes.owner[seen.labels]

    def likelihood(said: Tensor, truth: Tensor) -> Tensor:
        return (weights * said.gather(1, truth[:, None])[:, 0]).sum()

    def loss() -> Tensor:
        optimizer.zero_grad()
        values = F.softplus(free)
        coefficients, (router_scale, class_share, expert_scale) = values[: len(gates)], values[len(gates) :]
        total = TOWARDS_START * (values - start).square().sum()
        total = total + TOWARDS_COMMON * (own_scale.square().sum() + prior.square().sum())
        evidence = torch.zeros_like(scores[:, 0])
        for number in range(len(gates)):  # every gate has to route well with what is known before it
            evidence = evidence + coefficients[number] * scores[:, number]
            router = head.classes.expert_log_probs(evidence)
            total = total - ROUTING / len(gates) * likelihood(router, owner)
        if with_head:
            router = (router_scale * router + prior).log_softmax(-1)[:, head.classes.owner]
            own = head.own(logits, evidence, expert_scale * own_scale.exp())
            joint = own + router + class_share * head.classes.class_log_probs(evidence)
            total = total - likelihood(joint.log_softmax(-1), seen.labels)
        else:
            total = total - likelihood(router, owner)
        total.backward()
        return total

    value = optimizer.step(loss)
    with torch.no_grad():
        coefficients, (router_scale, class_share, expert_scale) = F.softplus(free)[: len(gates)], F.softplus(free)[len(gates) :]
        for gate, fitted in zip(gates.values(), coefficients, strict=True):
            gate.coefficient.copy_(fitted)
        if with_head:
            head.router_scale.copy_(router_scale)
            head.class_share.copy_(class_share)
            head.expert_scale.copy_(expert_scale * own_scale.exp())
            head.expert_prior.copy_(prior)
    return float(value)


@torch.no_grad()
def joint_accuracy(model: nn.Module, seen: Seen, gates: list[str]) -> float:
    """Share of images, experts weighing alike, whose expert these gates find and whose class its own head names.

    Of an expert without a head only the first counts.
    """
    head, scores = model.joint_head, Seen({name: seen.features[name] for name in gates}, *_rest(seen)).scores(model)
    owner = head.classes.owner
    own = seen.logits.masked_fill(owner[None] != owner[seen.labels][:, None], -torch.inf).argmax(1)
    right = (own == seen.labels) | head.no_head[seen.labels]
    right &= head.classes.expert_log_probs(START * scores.sum(1)).argmax(1) == owner[seen.labels]
    return float((seen.weights * right).sum())


def _rest(seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    return seen.logits, seen.labels, seen.weights


@torch.no_grad()
def gates_worth_keeping(model: nn.Module, seen: Seen) -> set[str]:
    """The names of the gates whose evidence varies from class to class by enough to matter beside that of the others."""
    spread = seen.scores(model).std(2).mean(0)  # (gates,)
    worth = {name: float(abs(model.gates()[name].coefficient) * own) for name, own in zip(seen.features, spread, strict=True)}
    return {name for name, value in worth.items() if value >= WORTH * max(worth.values())}


def most_of_each(images: Mapping[str, object]) -> int:
    """How many validation images of each expert the numbers are fitted to."""
    return max(CALIBRATED // max(1, len(images)), CALIBRATED_OF_ONE)
