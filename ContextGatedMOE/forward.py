"""What a mixture gives back, and a `forward` that passes for its base model's."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass
class Prediction:
    """What a mixture says of a batch of images.

    logits: (B, outputs), log-probabilities where the mixture knows classes. gates: {layer name: (B, E)}, weights of the
    experts. familiarity: (B,), between -1 and 1, how familiar an image is: that of validation images is about 0, the lower
    the stranger; None where the gates were never fitted.
    """

    logits: Tensor
    gates: dict[str, Tensor]
    familiarity: Tensor | None


class Forward:
    """Makes `mixture.forward` a method with the signature of its base model's own: libraries choose arguments by it."""

    made: ClassVar[dict[type, Callable]] = {}  # by class of base model

    def __get__(self, model: nn.Module | None, owner: type) -> Callable:
        if model is None:
            return owner.run
        if torch.compiler.is_dynamo_compiling():
            return partial(owner.run, model)  # which it can trace
        kind = type(model.base_model)
        if kind not in self.made:
            self.made[kind] = self.make(kind)
        return MethodType(self.made[kind], model)

    @staticmethod
    def make(kind: type) -> Callable:
        """The method for mixtures on base models of a class."""
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.run(*args, **kwargs)

        forward.__signature__ = inspect.signature(kind.forward)
        return forward
