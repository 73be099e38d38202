"""What one forward pass of a mixture carries from gate to gate, visible to that pass alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ContextGatedMOE.adapters import MixtureError

GATE = "context_gate"  # the name of a gate as a submodule of the block before which it stands


@dataclass(frozen=True)
class Settings:
    """What a caller asks of the passes in its `with` block.

    fixed: (E,) weights in place of the gates', or None. plain: the experts are left out, the base model is as it was.
    body: (E,) weights inside the units while the gates' evidence goes on to the head, or None.
    record: filled with {layer name: (B, E)} unless None. features: filled with {layer name: (B, K)}, what the gates see, unless
    None. scores: filled with {layer name: (B, C)}, what the gates say of the classes, and the head's parts, unless None.
    """

    fixed: Tensor | None = None
    plain: bool = False
    body: Tensor | None = None
    record: dict[str, Tensor] | None = None
    features: dict[str, Tensor] | None = None
    scores: dict[str, Any] | None = None


@dataclass(frozen=True)
class Unit:
    """A block, or an adapted layer outside of any block: what the experts are weighed for.

    chain: units of one chain carry the evidence on from one to the next; first: the chain begins here.
    """

    name: str
    chain: str
    first: bool


@dataclass
class Evidence:
    """What the gates of a chain have said so far of the classes (B, C), None where the weights are fixed, and the experts'
    weights (B, E) that follow."""

    classes: Tensor | None
    weights: Tensor


@dataclass
class Pass:
    """One forward pass of one mixture.

    batches: the leading sizes of the pass's inputs. masks: 2-D attention masks by argument name. cached: whether earlier tokens
    are in a cache, so that a mask may be longer than the tokens. evidence: by chain, the latest last. outer: the pass around it.
    """

    settings: Settings
    batches: set[int] = field(default_factory=set)
    masks: dict[str, Tensor] = field(default_factory=dict)
    cached: bool = False
    evidence: dict[str, Evidence] = field(default_factory=dict)
    outer: "Pass | None" = None

    def latest(self, batch: int, name: str) -> Evidence:
        """The latest evidence on a batch of that size, for a layer that follows a chain. Raises MixtureError if there is none."""
        for evidence in reversed(self.evidence.values()):
            if len(evidence.weights) == batch:
                return evidence
        raise MixtureError(f"'{name}' gets a batch of {batch} that no gate has seen; a mixture needs the batch as the first dimension")


@dataclass(frozen=True)
class Weights:
    """The experts' weights (B, E) inside one block, None where the experts are left out; tokens: how many an image has there."""

    values: Tensor | None
    batch: int
    tokens: int


_pass: ContextVar[Pass | None] = ContextVar("pass", default=None)
_weights: ContextVar[tuple[Weights, Any] | None] = ContextVar("weights", default=None)
_settings: ContextVar[dict[int, Settings]] = ContextVar("settings", default={})


class Router:
    """Steers the passes of one mixture by hooks on its base model, on its blocks and on layers outside of any block.

    All that a pass carries lies in context variables: a pass in another thread, a later pass or a backward pass that computes a
    block again never sees it. inputs: names of the base model's arguments in order.
    """

    def __init__(self, inputs: tuple[str, ...], is_encoder_decoder: bool):
        self.inputs, self.is_encoder_decoder = inputs, is_encoder_decoder
        self.top_k: int | None = None

    @property
    def settings(self) -> Settings:
        """The settings of the innermost `with` block around the caller."""
        return _settings.get().get(id(self), Settings())

    @contextmanager
    def using(self, **changes: Any) -> Iterator[None]:
        """Change the settings of the passes in the block; those of other threads stay as they are."""
        token = _settings.set({**_settings.get(), id(self): replace(self.settings, **changes)})
        try:
            yield
        finally:
            _settings.reset(token)

    # ---- the hooks ----

    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the base model runs: begin a pass."""
        given = dict(zip(self.inputs, args, strict=False)) | kwargs
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.ndim}
        masks = {name: value for name, value in tensors.items() if name.endswith("attention_mask") and value.ndim == 2}
        batches = {value.shape[0] for value in tensors.values()}
        _pass.set(Pass(self.settings, batches, masks, given.get("past_key_values") is not None, outer=_pass.get()))

    def end(self, model: nn.Module, args: tuple, output: Any) -> None:
        """After the base model has run, or failed: end the pass."""
        current = _pass.get()
        _pass.set(current.outer if current is not None else None)

    def enter(self, unit: Unit, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a unit runs: weigh the experts for it."""
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point()), None)
        if x is None:
            raise MixtureError(f"'{unit.name}' got no tensor by which to weigh the experts")
        values = self._weigh(unit, module, x)
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None and not isinstance(checkpoint, _Restoring):
            # Transformers computes a block again in the backward pass, when this pass is long over.
            module._gradient_checkpointing_func = _Restoring(checkpoint)
        _weights.set((Weights(values, x.shape[0], x.shape[1:-1].numel()), _weights.get()))

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        """After a unit has run, or failed."""
        current = _weights.get()
        _weights.set(current[1] if current is not None else None)

    def _weigh(self, unit: Unit, module: nn.Module, x: Tensor) -> Tensor | None:
        """The experts' weights (B, E) in a unit, None where they are left out. x: (B, ..., D), its input."""
        current, batch = current_pass(unit.name), x.shape[0]
        settings, before = current.settings, None if unit.first else current.evidence.get(unit.chain)
        if batch not in current.batches:
            raise MixtureError(f"'{unit.name}' gets {batch} rows for inputs of {sorted(map(int, current.batches))}; a mixture needs "
                               "the batch as the first dimension")
        scores, gate = None, getattr(module, GATE, None)
        if gate is not None and (settings.features is not None or not (settings.plain or settings.fixed is not None)):
            tokens = x.reshape(batch, -1, x.shape[-1])
            features = gate.features(tokens, self._mask(current, unit.name, tokens.shape[1]))
            if settings.features is not None:
                settings.features[unit.name] = features
            scores = gate(features)  # (B, C)
        if settings.plain:
            return None
        if settings.fixed is not None:
            evidence = Evidence(None, settings.fixed.to(x.device).expand(batch, -1))
        elif scores is None:
            evidence = before or current.latest(batch, unit.name)
        else:
            if settings.scores is not None:
                settings.scores[unit.name] = scores
            total = gate.coefficient * scores if before is None else before.classes + gate.coefficient * scores
            evidence = Evidence(total, gate.classes.weights(total, self.top_k, module.training))
        current.evidence.pop(unit.chain, None)
        current.evidence[unit.chain] = evidence
        if settings.record is not None:
            settings.record[unit.name] = evidence.weights
        return evidence.weights if settings.body is None else settings.body.to(x.device).expand(batch, -1)

    def _mask(self, current: Pass, name: str, tokens: int) -> Tensor | None:
        """The attention mask (B, N) of the N tokens before a block, or None where none is known to fit.

        A mask counts if it is as long as the tokens are many. While a decoder generates with a cache, the mask covers earlier tokens
        too, and the last N entries belong to these. In any other case, as where a model shortens its input, it is not used.
        """
        decoder = self.is_encoder_decoder and "encoder." not in name
        mask = current.masks.get("decoder_attention_mask" if decoder else "attention_mask")
        if mask is None or tokens == 1 and not current.cached:
            return None
        if current.cached and mask.shape[1] > tokens:
            return mask[:, -tokens:]
        return mask if mask.shape[1] == tokens else None


class _Restoring:
    """A checkpointing function of transformers that computes a block again with the weights of its own pass."""

    def __init__(self, checkpoint: Callable | None):
        self.checkpoint = checkpoint

    def __call__(self, block: Callable, *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(partial(_with_weights, _weights.get(), block), *args, **kwargs)


def _with_weights(weights: tuple[Weights, Any] | None, block: Callable, *args: Any, **kwargs: Any) -> Any:
    token = _weights.set(weights)
    try:
        return block(*args, **kwargs)
    finally:
        _weights.reset(token)


def current_pass(name: str) -> Pass:
    """The pass under way. Raises MixtureError outside of one."""
    current = _pass.get()
    if current is None:
        raise MixtureError(f"'{name}' belongs to a mixture: call the mixture or its base_model as a whole, not a part of it")
    return current


def per_image(x: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
    """View the input (..., D) of a layer inside a block as (B, N, D), with the experts' weights (B, E) there.

    Some models fold tokens into the batch, such as Swin's windows (B * windows, T, D), or flatten both (B * T, D); images stay
    contiguous. Raises MixtureError where rows cannot be told to belong to images, as in layers that get chosen tokens only.
    """
    entry = _weights.get()
    if entry is None:
        raise MixtureError(f"'{name}' belongs to a mixture: call the mixture or its base_model as a whole, not a part of it")
    weights, rows = entry[0], x.shape[0]
    folded = rows == weights.batch or (x.ndim > 2 and rows % weights.batch == 0) or (
        x.ndim == 2 and rows == weights.batch * weights.tokens)
    if not folded:
        raise MixtureError(f"'{name}' gets {rows} rows in a block for a batch of {weights.batch}, which cannot be told apart by image")
    return x.reshape(weights.batch, -1, x.shape[-1]), weights.values
