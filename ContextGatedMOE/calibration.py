"""What validation images choose: shrinkage, which gates stay, and a few numbers."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ContextGatedMOE.errors import MixtureError
from ContextGatedMOE.fitting import ImageFeatures
from ContextGatedMOE.gate import START

TOWARDS_START = 1.0  # a pull of the gates' coefficients to where they begin, for few validation images
TOWARDS_COMMON = 0.1  # a pull of what an expert has of its own to what all have
SCALE_START = 0.5  # how much the experts' heads count beside the gates
SHRINKAGES = (0.03, 0.1, 0.3)
CALIBRATED, CALIBRATED_OF_ONE = 600, 8  # validation images that the handful of numbers is fitted to, and at least of an expert
WORTH = 0.05  # of the largest: a gate whose evidence varies by less is dropped


def in_full_precision(tensor: Tensor) -> AbstractContextManager:
    """No autocast, which the caller may have set for the passes."""
    return torch.autocast(tensor.device.type, enabled=False)


@torch.enable_grad()
def fit_numbers(model: nn.Module, seen: ImageFeatures) -> float:
    """Choose the gates' coefficients and the head's numbers by LBFGS on the joint likelihood; experts weigh alike.

    Returns the loss. Coefficients and scales stay above zero.
    """
    head, gates, routing = model.joint_head, model.gates(), model.routing_gates()
    with torch.no_grad(), in_full_precision(seen.logits):
        of_experts = torch.stack([gates[name].score(seen.plain[name]) for name in seen.plain if name in routing])
        of_classes = torch.stack([gates[name].class_score(values) for name, values in seen.features.items()])
        logits, weights = seen.logits, seen.weights
    if logits.device.type != "mps":  # which has no fp64; elsewhere rounding is not to decide where the search ends
        of_experts, of_classes, logits, weights = (value.double() for value in (of_experts, of_classes, logits, weights))
    kind, first = {"dtype": logits.dtype, "device": logits.device}, len(of_experts)
    start = torch.tensor([START] * (first + len(of_classes)) + [SCALE_START], **kind)
    free = start.expm1().log().requires_grad_()  # the inverse of softplus
    own_scale, prior = (torch.zeros(len(model.sizes), requires_grad=True, **kind) for _ in range(2))
    optimizer = torch.optim.LBFGS([free, own_scale, prior], max_iter=100, line_search_fn="strong_wolfe")
    owner, outputs = head.classes.owner, head.columns[seen.labels]

    def weighed(scores: Tensor, values: Tensor) -> Tensor:
        return (values[:, None, None] * scores).sum(0)  # (N, C)

    def loss() -> Tensor:
        optimizer.zero_grad()
        values = F.softplus(free)
        total = TOWARDS_START * (values[:-1] - start[:-1]).square().sum() + TOWARDS_COMMON * (
            (values[-1] - start[-1]).square() + own_scale.square().sum() + prior.square().sum())
        router = head.classes.expert_log_probs(weighed(of_experts, values[:first])) + prior
        own = head.own(logits, weighed(of_classes, values[first:-1]), values[-1] * own_scale.exp())
        joint = head.merged((own + router.log_softmax(-1)[:, owner]).log_softmax(-1))
        total = total - (weights * joint.gather(1, outputs[:, None])[:, 0]).sum()
        total.backward()
        return total

    value = optimizer.step(loss).item()
    values = F.softplus(free).detach()
    if not torch.isfinite(values).all():
        raise MixtureError("the gates' coefficients are no finite numbers: look at the validation images")
    with torch.no_grad():
        for name, coefficient in zip([name for name in seen.plain if name in routing], values[:first], strict=True):
            gates[name].coefficient.copy_(coefficient)
        for name, coefficient in zip(seen.features, values[first:-1], strict=True):
            gates[name].class_coefficient.copy_(coefficient)
        head.expert_scale.copy_(values[-1] * own_scale.exp())
        head.expert_prior.copy_(prior)
    return value


@torch.no_grad()
def gates_worth_keeping(model: nn.Module, seen: ImageFeatures) -> set[str]:
    """The names of the gates whose evidence varies from class to class by enough to matter beside that of the others."""
    gates, routing = model.gates(), model.routing_gates()
    spread = {name: [gates[name](seen.plain[name])[0].std(1).mean().item() if name in routing else 0.0,
                     gates[name](seen.features[name])[1].std(1).mean().item()] for name in seen.features}
    most = [max(values[part] for values in spread.values()) or 1.0 for part in (0, 1)]
    return {name for name, values in spread.items() if any(values[part] >= WORTH * most[part] for part in (0, 1))}


def most_of_each(images: Mapping[str, object]) -> int:
    """How many validation images of each expert the numbers are fitted to."""
    return max(CALIBRATED // max(1, len(images)), CALIBRATED_OF_ONE)
