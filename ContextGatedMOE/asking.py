"""Asking a mixture: predictions, recorded and fixed weights, and evaluation mode for the time of a question."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ContextGatedMOE.errors import MixtureError
from ContextGatedMOE.forward import Prediction

# How many blocks of `evaluating` a mixture is in, and the modules that are to be in training mode after the last. Not a part of
# the mixture, which is copied and saved.
_evaluating: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()
_changing_modes = threading.Lock()


class Asking:
    """`predict`, `record_gates`, `fixed_gates` and what they need, of a mixture."""

    @contextmanager
    def record_gates(self) -> Iterator[dict[str, Tensor]]:
        """Collect the weights of the next forward pass: {layer name: (B, E)}, experts in `expert_names` order.

        Named are the blocks, or layers outside of any block, for which the experts are weighed. The tensors carry gradients
        where the pass does. Passes of other threads are not recorded.
        """
        record: dict[str, Tensor] = {}
        with self.router.using(record=record):
            yield record

    @contextmanager
    def fixed_gates(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Replace every gate by these weights, by expert name; experts not named get 0. Raises MixtureError."""
        with self.router.using(fixed=self.weights_of(weights)):
            yield

    def weights_of(self, weights: Mapping[str, float]) -> Tensor:
        """Weights by expert name as a tensor (E,), 0 for experts not named. Raises MixtureError for unknown names."""
        unknown = sorted(set(weights) - set(self.expert_names))
        if unknown:
            raise MixtureError(f"no expert is called {unknown[0]!r}; there are {', '.join(self.expert_names) or 'none'}")
        return torch.tensor([float(weights.get(name, 0.0)) for name in self.expert_names])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode for the block, and until blocks of other threads have ended too; afterwards every module has the mode
        it had."""
        with _changing_modes:
            count, trained = _evaluating.get(self) or (0, [module for module in self.modules() if module.training])
            if trained and not count:
                self.eval()
            _evaluating[self] = count + 1, trained
        try:
            yield
        finally:
            with _changing_modes:
                count, trained = _evaluating.pop(self)
                if count > 1:
                    _evaluating[self] = count - 1, trained
                else:
                    for module in trained:
                        module.training = True

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> Prediction:
        """Logits, weights and familiarity of a batch, from one pass in evaluation mode; arguments as of the base model."""
        features, record = {}, {}
        asked = {"plain_features" if self.passes == 2 else "features": features}
        with self.evaluating(), self.router.using(record=record, **asked):
            output = self(*args, **kwargs)
        raw, (usual, spread) = self.familiarity_of(features), self.usual_familiarity
        familiarity = None if raw is None else F.softsign((raw - usual) / spread)
        return Prediction(output if isinstance(output, Tensor) else output.logits, record, familiarity)

    def familiarity_of(self, features: Mapping[str, Tensor]) -> Tensor | None:
        """How familiar images are (B,) to the gates that tell of the experts, from what these see, {gate name: (B, K)}.

        It is not compared with what is usual yet. None where no gate was fitted.
        """
        gates = {name: gate for name, gate in self.gates().items() if name in self.routing_gates() and gate.knows_classes}
        if not gates:
            return None
        counts = torch.stack([gate.coefficient for gate in gates.values()]) + 1e-6
        near = torch.stack([gate.familiarity(features[name]) for name, gate in gates.items()])  # (gates, B)
        return ((counts / counts.sum())[:, None] * near).sum(0)
