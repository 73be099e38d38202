"""How the passes of a mixture are steered: hooks that weigh the experts, for each pass and thread alone."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ContextGatedMOE.errors import MixtureError
from ContextGatedMOE.passes import Evidence, Pass, Settings, Unit, Weights

GATE = "context_gate"  # the name of a gate as a submodule of the block before which it stands


class _Thread(threading.local):
    """What a thread is doing: the pass under way, the weights of the block it is in, and, for compiled code, the settings."""

    def __init__(self) -> None:
        self.running: Pass | None = None
        self.weights: tuple[Weights, Any] | None = None
        self.settings: Mapping[int, Settings] = {}


_thread = _Thread()
# A pass never waits, so a thread's state is its own; a `with` block may, in an event loop, so settings belong to the context.
# Code that torch.compile made cannot read context variables: it sees what the thread has set last.
_settings: ContextVar[Mapping[int, Settings]] = ContextVar("settings", default=MappingProxyType({}))


class Router:
    """Steers the passes of one mixture by hooks on its base model, on its blocks and on layers outside of any block.

    All that a pass carries belongs to its thread and ends with it: a pass in another thread or a later one never sees it, and a
    backward pass that computes a block again is given that block's own weights.
    """

    def __init__(self) -> None:
        self.start = 0  # the number of the block from which on the experts are used; the gates before it see the plain model
        self.top_k: int | None = None
        self.passes = 1
        self.blocks = 0  # how many blocks the model has in its only list
        self.handles: list[RemovableHandle] = []  # of the hooks below

    @property
    def settings(self) -> Settings:
        """The settings of the innermost `with` block around the caller."""
        every = _thread.settings if torch.compiler.is_dynamo_compiling() else _settings.get()
        return every.get(id(self), Settings())

    @contextmanager
    def using(self, **changes: Any) -> Iterator[None]:
        """Change the settings of the passes in the block; those of other threads stay as they are."""
        outer = _thread.settings
        token = _settings.set({**_settings.get(), id(self): replace(self.settings, **changes)})
        _thread.settings = _settings.get()
        try:
            with self.whole_pass():
                yield
        finally:
            _settings.reset(token)
            _thread.settings = outer

    @contextmanager
    def whole_pass(self) -> Iterator[None]:
        """Around a pass: nothing of it is left after the block, also where it is interrupted, for which no hooks are called."""
        under_way = _thread.running, _thread.weights
        try:
            yield
        finally:
            _thread.running, _thread.weights = under_way

    # ---- the hooks ----

    def begin(self, inputs: tuple[str, ...], model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the base model runs: begin a pass. inputs: names of the model's arguments in order."""
        given = dict(zip(inputs, args, strict=False)) | kwargs
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.ndim}
        batches = [value.shape[0] for value in tensors.values()]  # no set: a symbolic size of torch.export has no hash
        _thread.running = Pass(self.settings, batches, tensors.get("attention_mask"), outer=_thread.running)

    def end(self, model: nn.Module, args: tuple, output: Any) -> None:
        """After the base model has run, or failed: end the pass."""
        if _thread.running is not None:
            _thread.running = _thread.running.outer

    def enter(self, unit: Unit, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a unit runs: weigh the experts for it."""
        given = (*args, kwargs.get("hidden_states"), *kwargs.values())
        x = next((value for value in given if isinstance(value, Tensor) and value.is_floating_point()), None)
        if x is None:
            raise MixtureError(f"'{unit.name}' got no tensor by which to weigh the experts")
        values, top_k = self._weigh(unit, module, x)
        if module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for part in module.modules():  # the backward pass may compute a block again, when this pass is long over
                checkpoint = getattr(part, "_gradient_checkpointing_func", None)
                if checkpoint is not None and not isinstance(checkpoint, Restoring):
                    part._gradient_checkpointing_func = Restoring(checkpoint)
        _thread.weights = Weights(values, top_k, x.shape[0], x.shape[1:-1].numel()), _thread.weights

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        """After a unit has run, or failed."""
        if _thread.weights is not None:
            _thread.weights = _thread.weights[1]

    def _weigh(self, unit: Unit, module: nn.Module, x: Tensor) -> tuple[Tensor | None, int | None]:
        """The experts' weights (B, E) in a unit, None where they are left out, and how many are above zero; see `Weights`.

        x: (B, ..., D), its input.
        """
        current, batch = current_pass(unit.name), x.shape[0]
        settings, before = current.settings, None if unit.first else current.evidence.get(unit.chain)
        if not any(batch == size for size in current.batches):
            raise MixtureError(
                f"'{unit.name}' gets {batch} rows for inputs of {sorted(set(map(int, current.batches)))}; a mixture needs "
                "the batch as the first dimension"
            )
        gate, scores = getattr(module, GATE, None), None
        asked = settings.fixed is None and not settings.plain
        if gate is not None and (settings.features is not None or asked):
            tokens = as_tokens(x).to(gate.score.weight.device)
            features = gate.features(tokens, current.mask_of(unit, tokens.shape[1]))
            settings.note_features(unit.name, features)
            scores = gate(features) if asked else None
        if settings.plain:
            return None, None
        before_start = unit.place is not None and unit.place < self.start
        if settings.fixed is not None:
            evidence = Evidence(None, None, settings.fixed.to(x.device).expand(batch, -1), None)
            before_start = before_start and settings.from_start
        elif settings.evidence is not None:
            evidence, before_start = (before or settings.evidence.to(x.device)), False
            evidence = evidence if scores is None else evidence.and_also(None, scores[1])
        elif scores is None and before is None and unit.place is not None:
            return None, None  # no gate has seen the images yet
        elif scores is None:
            evidence = before or current.latest(batch, unit.name)
        else:
            routes = self.routes(unit) or before is None
            evidence = (before or Evidence(None, None, scores[0], None)).and_also(scores[0] if routes else None, scores[1])
            if routes:
                evidence = replace(evidence, weights=gate.classes.weights(evidence.experts, self.top_k, module.training),
                                   top_k=self.top_k)
        current.evidence.pop(unit.chain, None)
        current.evidence[unit.chain] = evidence
        if settings.record is not None and (settings.body is not None or not before_start):
            settings.record[unit.name] = evidence.weights
        if settings.body is not None:
            return settings.body.to(x.device).expand(batch, -1), None
        return (None, None) if before_start else (evidence.weights, evidence.top_k)

    @property
    def head_routes(self) -> bool:
        """Whether what the gate before the head sees tells of the experts, as where there are no adapters."""
        return self.passes == 2 or self.start >= self.blocks

    def routes(self, unit: Unit) -> bool:
        """Whether the gate before a unit tells of the experts: later ones see what the experts made of an image, in which each
        finds its own."""
        return unit.place is None or unit.place <= self.start or self.passes == 2


class Restoring:
    """A checkpointing function of transformers that computes a block again with the weights of its own pass.

    The weights are an argument of the block, so that also a reentrant checkpoint hands their gradient on.
    """

    def __init__(self, checkpoint: Callable):
        self.checkpoint = checkpoint

    def __call__(self, block: Callable, *args: Any, **kwargs: Any) -> Any:
        entry = _thread.weights
        if entry is None:
            return self.checkpoint(block, *args, **kwargs)

        def again(values: Tensor | None, *args: Any, **kwargs: Any) -> Any:
            outer = _thread.weights
            _thread.weights = replace(entry[0], values=values), outer
            try:
                return block(*args, **kwargs)
            finally:
                _thread.weights = outer

        return self.checkpoint(again, entry[0].values, *args, **kwargs)


def current_pass(name: str) -> Pass:
    """The pass under way. Raises MixtureError outside of one."""
    current = _thread.running
    if current is None:
        raise MixtureError(f"'{name}' belongs to a mixture: call the mixture or its base_model as a whole, not a part of it")
    return current


def per_image(x: Tensor, name: str) -> tuple[Tensor, Tensor | None, int | None]:
    """View the input (..., D) of a layer inside a block as (B, N, D), with the experts' weights (B, E) there and how many of
    an image's are above zero; see `Weights`.

    Some models fold tokens into the batch, such as Swin's windows (B * windows, T, D), or flatten both (B * T, D); images stay
    contiguous. Raises MixtureError where rows cannot be told to belong to images, as in layers that get chosen tokens only.
    """
    entry = _thread.weights
    if entry is None:
        raise MixtureError(f"'{name}' belongs to a mixture: call the mixture or its base_model as a whole, not a part of it")
    weights, rows = entry[0], x.shape[0]
    folded = rows == weights.batch or (x.ndim > 2 and rows % weights.batch == 0) or (
        x.ndim == 2 and rows == weights.batch * weights.tokens)
    if not folded:
        raise MixtureError(
            f"'{name}' gets {rows} rows in a block for a batch of {weights.batch}, which cannot be told apart by image"
        )
    values = weights.values if weights.values is None else weights.values.to(x.device)
    tokens = as_tokens(x) if rows == weights.batch else x.reshape(weights.batch, -1, x.shape[-1])
    return tokens, values, weights.top_k


def as_tokens(x: Tensor) -> Tensor:
    """View (B, D) or (B, ..., D) as (B, N, D)."""
    return x[:, None] if x.ndim == 2 else x.flatten(1, -2)
