"""What one forward pass of a mixture is asked for, and what it carries from gate to gate."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ContextGatedMOE.errors import MixtureError


@dataclass(frozen=True)
class Settings:
    """What a caller asks of the passes in its `with` block.

    fixed: (E,) weights in place of the gates', or None. plain: the experts are left out, the base model is as it was.
    body: (E,) weights inside the units while the gates' evidence goes on to the head, or None. evidence: what an earlier pass
    over the same inputs has found, by which the experts are weighed, while gates speak of classes only; or None. from_start:
    fixed weights count from the block on where the experts begin, as in passes that ask the gates.

    The others are filled by the passes unless None. record: {layer name: (B, E)}, the experts' weights. features: {gate name:
    (B, K)}, what the gates see, and plain_features: the same of the first of two passes. head: "logits", (B, C) of the experts'
    own heads, and "evidence", all that the gates have said.
    """

    fixed: Tensor | None = None
    plain: bool = False
    body: Tensor | None = None
    evidence: "Evidence | None" = None
    from_start: bool = False
    record: dict[str, Tensor] | None = None
    features: dict[str, Tensor] | None = None
    plain_features: dict[str, Tensor] | None = None
    head: dict[str, Any] | None = None

    def note_features(self, gate: str, features: Tensor) -> None:
        """Record what a gate sees (B, K), if that is asked for."""
        if self.features is not None:
            self.features[gate] = features


@dataclass(frozen=True)
class Unit:
    """A block, or an adapted layer outside of any block: what the experts are weighed for.

    chain: units of one chain carry the evidence on from one to the next; first: the chain begins here. place: the number
    of a block in the only list of blocks, None elsewhere.
    """

    name: str
    chain: str
    first: bool
    place: int | None


@dataclass
class Evidence:
    """What the gates of a chain have said so far: of the experts, by scores of the classes (B, C), and of the classes within
    each expert (B, C), both None where the weights are fixed; and the experts' weights (B, E) that follow. top_k: at most so
    many of them are above zero; None for all."""

    experts: Tensor | None
    classes: Tensor | None
    weights: Tensor
    top_k: int | None

    def to(self, device: torch.device) -> "Evidence":
        """The same on a device."""
        tensors = (None if value is None else value.to(device) for value in (self.experts, self.classes, self.weights))
        return Evidence(*tensors, self.top_k)

    def and_also(self, experts: Tensor | None, classes: Tensor | None) -> "Evidence":
        """With what one more gate says of the experts and of the classes, each (B, C) or None; the weights stay."""
        return replace(self, experts=_sum(self.experts, experts), classes=_sum(self.classes, classes))


def _sum(before: Tensor | None, more: Tensor | None) -> Tensor | None:
    if before is None or more is None:
        return before if more is None else more
    return before.to(more.device) + more


@dataclass
class Pass:
    """One forward pass of one mixture.

    batches: the leading sizes of the pass's inputs. attention_mask: of a text, (B, T). evidence: by chain, the latest last.
    outer: the pass around it.
    """

    settings: Settings
    batches: list[int] = field(default_factory=list)
    attention_mask: Tensor | None = None
    evidence: dict[str, Evidence] = field(default_factory=dict)
    outer: "Pass | None" = None

    def mask_of(self, unit: Unit, tokens: int) -> Tensor | None:
        """The attention mask (B, N) of the N tokens before a unit; None where it has another length, or for one of several
        towers, which cannot be told apart."""
        mask = self.attention_mask
        return mask if mask is not None and mask.ndim == 2 and mask.shape[1] == tokens and not unit.chain else None

    def latest(self, batch: int, name: str) -> Evidence:
        """The latest evidence on a batch of that size, for a layer after a chain. Raises MixtureError if there is none."""
        for evidence in reversed(self.evidence.values()):
            if evidence.weights.shape[0] == batch:
                return evidence
        raise MixtureError(
            f"'{name}' gets a batch of {batch} that no gate has seen; a mixture needs the batch as the first dimension"
        )


@dataclass(frozen=True)
class Weights:
    """The experts' weights (B, E) in one block, None where the experts are left out. top_k: at most so many of an image's are
    above zero; None for all. tokens: how many an image has there."""

    values: Tensor | None
    top_k: int | None
    batch: int
    tokens: int
