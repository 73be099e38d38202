"""A mixture passes for its base model: the signature of `forward`, attributes, device and dtype; and what `predict` returns."""

from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

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
    """Makes `mixture.forward` the method `run` with the signature of its base model's own: libraries choose arguments by it."""

    def __get__(self, model: nn.Module | None, owner: type) -> Any:
        if model is None:
            return owner.run
        run = partial(owner.run, model)
        return run if torch.compiler.is_dynamo_compiling() else update_wrapper(run, model.base_model.forward)


class LikeItsBase:
    """What a mixture has in common with its base model, besides the answer."""

    forward = Forward()

    def __getattr__(self, name: str) -> Any:
        """What the mixture itself has not is the base model's: generate, main_input_name, gradient_checkpointing_enable ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    @property
    def config(self) -> Any:
        """The base model's configuration, with the mixture's own outputs where it knows classes."""
        return self.base_model.config

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.base_model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the frozen parameters; the gates compute in fp32."""
        return next(self.base_model.parameters()).dtype

    def _replicate_for_data_parallel(self) -> nn.Module:
        replica, settings = super()._replicate_for_data_parallel(), self.router.settings
        # Its thread does not see this one's `with` blocks. Passes are not recorded there: each sees a part of the batch.
        replica.__dict__["replica_settings"] = {name: getattr(settings, name) for name in ("fixed", "plain", "body")}
        return replica
