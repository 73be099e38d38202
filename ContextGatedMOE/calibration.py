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
SHRINKAGES = (0.03, 0.1, 0.3)
CALIBRATED, CALIBRATED_OF_ONE = 600, 8  # validation images that the handful of numbers is fitted to, and at least of an expert
WORTH = 0.05  # of the largest: a gate whose evidence varies by less is dropped


@torch.enable_grad()
def fit_numbers(model: nn.Module, seen: Seen) -> float:
    """Choose the gates' coefficients and the head's numbers by LBFGS on the joint likelihood; experts weigh alike.

    Returns the loss. Coefficients and scales stay above zero.
    """
    head, gates = model.joint_head, {name: model.gates()[name] for name in seen.features}
    with torch.no_grad():
        scores, logits, weights = seen.scores(model), seen.logits, seen.weights
    if scores.device.type != "mps":  # which has no fp64; elsewhere rounding is not to decide where the search ends
        scores, logits, weights = scores.double(), logits.double(), weights.double()
    kind, count = {"dtype": scores.dtype, "device": scores.device}, len(gates)
    start = torch.tensor([START] * 2 * count + [1.0], **kind)
    free = start.expm1().log().requires_grad_()  # the inverse of softplus
    own_scale, prior = (torch.zeros(len(model.sizes), requires_grad=True, **kind) for _ in range(2))
    optimizer = torch.optim.LBFGS([free, own_scale, prior], max_iter=100, line_search_fn="strong_wolfe")
    owner = head.classes.owner[seen.labels]
    steering = [number for number, name in enumerate(gates) if name in model.steering_gates()]

    def likelihood(said: Tensor, truth: Tensor) -> Tensor:
        return (weights * said.gather(1, truth[:, None])[:, 0]).sum()

    def loss() -> Tensor:
        optimizer.zero_grad()
        values = F.softplus(free)
        total = TOWARDS_START * (values - start).square().sum()
        total = total + TOWARDS_COMMON * (own_scale.square().sum() + prior.square().sum())
        weighed = values[:count, None] * scores  # (N, gates, C)
        for number in steering:  # a gate that steers the experts has to do it with what is known there
            router = head.classes.expert_log_probs(weighed[:, : number + 1].sum(1))
            total = total - ROUTING / len(steering) * likelihood(router, owner)
        router = (head.classes.expert_log_probs(weighed.sum(1)) + prior).log_softmax(-1)
        own = head.own(logits, (values[count:-1, None] * scores).sum(1), values[-1] * own_scale.exp())
        total = total - likelihood((own + router[:, head.classes.owner]).log_softmax(-1), seen.labels)
        total.backward()
        return total

    value = optimizer.step(loss).item()
    with torch.no_grad():
        values = F.softplus(free)
        for gate, coefficient, of_classes in zip(gates.values(), values[:count], values[count:-1], strict=True):
            gate.coefficient.copy_(coefficient)
            gate.class_coefficient.copy_(of_classes)
        head.expert_scale.copy_(values[-1] * own_scale.exp())
        head.expert_prior.copy_(prior)
    return value


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
    gates = {name: model.gates()[name] for name in seen.features}
    worth = {name: float(max(gate.coefficient, gate.class_coefficient) * own)
             for (name, gate), own in zip(gates.items(), spread, strict=True)}
    return {name for name, value in worth.items() if value >= WORTH * max(worth.values())}


def most_of_each(images: Mapping[str, object]) -> int:
    """How many validation images of each expert the numbers are fitted to."""
    return max(CALIBRATED // max(1, len(images)), CALIBRATED_OF_ONE)
