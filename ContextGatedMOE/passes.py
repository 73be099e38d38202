"""What one forward pass of a mixture is asked for, and what it carries from gate to gate."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ContextGatedMOE.adapters import MixtureError

if TYPE_CHECKING:
    from ContextGatedMOE.routing import Router


class Enough(Exception):
    """Ends a pass of which no more is wanted."""


@dataclass(frozen=True)
class Settings:
    """What a caller asks of the passes in its `with` block.

    fixed: (E,) weights in place of the gates', or None. plain: the experts are left out, the base model is as it was.
    body: (E,) weights inside the units while the gates' evidence goes on to the head, or None. until: a pass ends, by raising
    `Enough`, when it has recorded the features or the scores of so many gates, or None.
    record: filled with {layer name: (B, E)} unless None. features: filled with {layer name: (B, K)}, what the gates see, unless
    None. scores: filled with {layer name: (B, C)}, what the gates say of the classes, and the head's parts, unless None.
    """

    fixed: Tensor | None = None
    plain: bool = False
    body: Tensor | None = None
    until: int | None = None
    record: dict[str, Tensor] | None = None
    features: dict[str, Tensor] | None = None
    scores: dict[str, Any] | None = None


@dataclass(frozen=True)
class Unit:
    """A block, or an adapted layer outside of any block: what the experts are weighed for.

    chain: units of one chain carry the evidence on from one to the next; first: the chain begins here; last: none of its gates
    comes after this unit.
    """

    name: str
    chain: str
    first: bool
    last: bool


@dataclass
class Evidence:
    """What the gates of a chain have said so far of the classes (B, C), None where the weights are fixed, and the experts'
    weights (B, E) that follow. top_k: at most so many of them are above zero; None for all."""

    classes: Tensor | None
    weights: Tensor
    top_k: int | None


@dataclass
class Pass:
    """One forward pass of one mixture.

    router: whose pass it is. batches: the leading sizes of the pass's inputs. masks: 2-D attention masks by argument name.
    cached: whether earlier tokens are in a cache, so that a mask may be longer than the tokens. evidence: by chain, the latest
    last. outer: the pass around it.
    """

    router: "Router"
    settings: Settings
    batches: list[int] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict)
    cached: bool = False
    evidence: dict[str, Evidence] = field(default_factory=dict)
    outer: "Pass | None" = None

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
