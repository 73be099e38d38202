"""The one training loop and the one evaluation that every script uses."""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from common.cli.flags import TrainingFlags
from common.data.tensors import ImageSet
from common.errors import UserError
from common.training import distributed
from common.training.augment import flip_and_shift, moves_of
from common.training.checkpoint import Checkpoint
from common.training.evaluate import autocast, device_of, evaluate, logits_of
from common.training.kernels import keep_freed_memory
from common.training.schedule import warmup_cosine

Loss = Callable[[nn.Module, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


@dataclass
class Fit:
    """A finished training. history: one row per epoch; seconds: wall-clock of all epochs; images: seen in training."""

    history: pd.DataFrame
    seconds: float
    images: int




def cross_entropy(model: nn.Module, inputs: Tensor, labels: Tensor, tasks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss of a classifier, summed over the batch, and its logits (B, C)."""
    logits = logits_of(model, inputs).float()
    return F.cross_entropy(logits, labels, reduction="sum"), logits






@dataclass
class _Training:
    """A training between two of its steps: all that a checkpoint holds.

    epoch: the one under way, from 1; step: how many of its steps are done; total_loss, correct: sums over the images of
    those, of this process's alone; generator: of the order and the augmentation of an epoch; best, lowest: weights and loss
    of the best epoch so far. at_once: images that are computed at once, which no checkpoint holds.
    """

    name: str
    config: TrainingFlags
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    images: int
    total_loss: Tensor
    correct: Tensor
    generator: torch.Generator = field(default_factory=torch.Generator)
    epoch: int = 1
    step: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    lowest: float = math.inf
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    at_once: int = field(init=False)

    def __post_init__(self) -> None:
        whole_step = math.ceil(self.step_size / distributed.count())  # this process's share of it
        self.at_once = whole_step if self.config.largest_batch else self.config.batch_size

    def __str__(self) -> str:
        return f"{self.name}, epoch {self.epoch}/{self.config.epochs}, step {self.step}/{self.steps}"

    @property
    def step_size(self) -> int:
        """Images of a step."""
        return self.config.batch_size * self.config.accumulation_steps

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(self.images / self.step_size)

    @property
    def done(self) -> bool:
        """True after the last epoch."""
        return self.epoch > self.config.epochs

    def spent(self) -> float:
        """Seconds of this training, those before an interruption too."""
        return self.seconds + time.perf_counter() - self.started

    def order(self) -> Tensor:
        """The order (N,) of the images in this epoch; at the start of one, the generator then stands behind it."""
        generator = self.generator if self.step == 0 else torch.Generator()
        return torch.randperm(self.images, generator=generator.manual_seed(self.config.seed * 100_003 + self.epoch))

    def begin_step(self) -> None:
        """Set the learning rates and the seed of what a model drops at random."""
        epochs, number = self.config.epochs, (self.epoch - 1) * self.steps + self.step
        share = warmup_cosine(round(self.config.warmup_epochs * self.steps), epochs * self.steps)(number)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * group["lr_share"] * share
        seeds = np.random.SeedSequence([self.config.seed, self.epoch, self.step, distributed.rank()])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))

    def end_epoch(self, validation_loss: float, validation_accuracy: float) -> None:
        """Note the scores and, if this is the best epoch so far, the weights."""
        total_loss, correct = distributed.add_up([self.total_loss, self.correct])
        self.rows.append({
            "epoch": self.epoch, "training_loss": total_loss.item() / self.images, "validation_loss": validation_loss,
            "training_accuracy": correct.item() / self.images, "validation_accuracy": validation_accuracy,
        })
        if validation_loss < self.lowest:
            self.lowest = validation_loss
            self.best = {key: parameter.detach().clone() for key, parameter in self.trainable.items()}
        self.total_loss.zero_()
        self.correct.zero_()
        self.epoch, self.step = self.epoch + 1, 0

    def save(self, checkpoint: Checkpoint) -> None:
        """Write everything; once the training is done, what came of it is enough."""
        tensors = {f"best.{key}": tensor for key, tensor in self.best.items()}
        if not self.done:
            tensors |= {f"weights.{key}": parameter for key, parameter in self.trainable.items()}
            tensors |= {f"optimizer.{index}.{key}": tensor for index, state in self.optimizer.state_dict()["state"].items()
                        for key, tensor in state.items()}
            total_loss, correct = distributed.add_up([self.total_loss, self.correct])
            tensors |= {"generator": self.generator.get_state(), "total_loss": total_loss, "correct": correct}
        progress = {name: getattr(self, name) for name in ("epoch", "step", "rows", "lowest")}
        checkpoint.save(tensors, {**progress, "seconds": self.spent()})

    @torch.no_grad()
    def resume(self, checkpoint: Checkpoint) -> None:
        """Take over everything that a checkpoint holds."""
        for name, value in checkpoint.progress.items():
            setattr(self, name, value)
        best = checkpoint.under("best")
        self.best = {key: best[key].to(parameter.device) for key, parameter in self.trainable.items() if key in best}
        if self.done:
            return
        for key, tensor in checkpoint.under("weights").items():
            self.trainable[key].copy_(tensor)
        states: dict[int, dict[str, Tensor]] = {}
        for key, tensor in checkpoint.under("optimizer").items():
            index, _, name = key.partition(".")
            states.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": states})
        self.generator.set_state(checkpoint.tensors["generator"])
        if distributed.rank() == 0:  # of all processes together
            self.total_loss.copy_(checkpoint.tensors["total_loss"])
            self.correct.copy_(checkpoint.tensors["correct"])


def fit(model: nn.Module, train: ImageSet, validation: ImageSet, config: TrainingFlags, name: str,
        groups: list[dict] | None = None, loss: Loss = cross_entropy, checkpoint: Checkpoint | None = None) -> Fit:
    """Train what is trainable in `model`; leave it with the weights of the epoch of lowest validation loss.

    groups: AdamW parameter groups, each with a `lr_share` of the learning rate; by default all trainable
    parameters. loss: sums what is minimised over a batch; the history always tells the cross-entropy. Batches are
    accumulated into steps whose loss is the mean over the step's images, whatever the batch size; several processes share
    out the images of every step. Raises UserError if the loss is not finite.

    checkpoint: where the training is kept, and from where it goes on if there is something. On a CPU the result is then,
    bit for bit, that of a training that was never interrupted. With it, Ctrl-C and SIGTERM wait for the step under way,
    save and raise KeyboardInterrupt, which says where.
    """
    device = device_of(config)
    keep_freed_memory()
    model.to(device)
    train, validation = train.to(device), validation.to(device)
    trainable = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    backbone = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if config.gradient_checkpointing and backbone is not None:  # reentrant, it would need inputs that have gradients
        backbone.activation_checkpointing_enable({"use_reentrant": False})
    groups = groups or [{"params": list(trainable.values()), "lr_share": 1.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=config.weight_decay,
                                  fused=device.type in ("cpu", "cuda"))
    training = _Training(name, config, trainable, optimizer, len(train), total_loss=torch.zeros((), device=device),
                         correct=torch.zeros((), dtype=torch.int64, device=device))
    distributed.same_as_main(trainable.values())
    if checkpoint is not None and checkpoint.progress is not None:
        training.resume(checkpoint)
        print(f"{name}: trained already" if training.done else f"going on: {training}", flush=True)
    try:
        with stopping(checkpoint is not None) as stop_if_asked:
            while not training.done:
                _train_epoch(model, train, training, loss, checkpoint, stop_if_asked)
                probabilities, validation_loss = evaluate(model, validation, config, after_batch=stop_if_asked)
                _check_finite(validation_loss, f"{training}, validation", config)
                accuracy = float((probabilities.argmax(1) == validation.labels.cpu().numpy()).mean())
                training.end_epoch(validation_loss, accuracy)
                if not sys.stderr.isatty():
                    row = training.rows[-1]
                    print(f"{name} epoch {row['epoch']}/{config.epochs}: loss {row['training_loss']:.3f}, validation loss "
                          f"{validation_loss:.3f}, validation accuracy {accuracy:.3f}", flush=True)
                if checkpoint is not None and (training.done or not config.checkpoint_every_steps):
                    training.save(checkpoint)
    except KeyboardInterrupt:
        if checkpoint is None:
            raise
        training.save(checkpoint)
        raise KeyboardInterrupt(f"saved: {training}") from None
    except NotFiniteError:
        if checkpoint is not None:  # there is nothing to go on with
            checkpoint.delete()
        raise
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        fix = "add" if config.largest_batch else (
            f"add --largest_batch, halve --batch_size (now {config.batch_size}) and double --accumulation_steps (now "
            f"{config.accumulation_steps}), or add")
        raise UserError(f"{training}: out of memory; {fix} --gradient_checkpointing") from error
    with torch.no_grad():
        for key, parameter in trainable.items():
            parameter.copy_(training.best[key])
    history = pd.DataFrame(training.rows)
    history["chosen"] = (history.index == history["validation_loss"].idxmin()).astype(int)
    return Fit(history, training.spent(), len(train) * config.epochs)


def _train_epoch(model: nn.Module, train: ImageSet, training: _Training, loss: Loss, checkpoint: Checkpoint | None,
                 stop_if_asked: Callable[[], None]) -> None:
    """The remaining steps of an epoch. Cross-entropy and correct predictions are added up in `training`."""
    config = training.config
    model.train()
    order = training.order().to(train.labels.device)
    with tqdm(total=len(order), initial=training.step * training.step_size, unit="img", leave=False, disable=None,
              desc=f"{training.name} {training.epoch}/{config.epochs}") as bar:
        for rows in order.split(training.step_size)[training.step:]:
            moves = moves_of(rows, train.inputs, training.generator, config) if config.augment else None
            step_loss = add_up_step(training.trainable.values(), _gradients(model, train, training, loss, rows, moves))
            mean = step_loss.item() / len(rows)
            _check_finite(mean, str(training), config)
            training.optimizer.step()
            training.optimizer.zero_grad()
            training.step += 1
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            bar.update(len(rows))
            every = config.checkpoint_every_steps
            if checkpoint is not None and every and ((training.epoch - 1) * training.steps + training.step) % every == 0:
                training.save(checkpoint)
            stop_if_asked()


def _gradients(model: nn.Module, train: ImageSet, training: _Training, loss: Loss, rows: Tensor,
               moves: Tensor | None) -> Tensor:
    """The loss, summed over this process's share of a step's images, and in the parameters the gradients of the step's mean.

    What does not fit into memory is tried again with half as many images at once, if that was asked for.
    """
    while True:
        training.begin_step()
        try:
            step_loss, total_loss, correct = _backward(model, train, training, loss, rows, moves)
        except RuntimeError as error:
            if not (training.config.largest_batch and training.at_once > 1 and should_reduce_batch_size(error)):
                raise
        else:
            training.total_loss += total_loss
            training.correct += correct
            return step_loss
        # Only out here, where the error is gone, is nothing left that holds the activations.
        training.optimizer.zero_grad()
        clear_device_cache()
        training.at_once = math.ceil(training.at_once / 2)
        print(f"{training}: out of memory, now {training.at_once} images at once", flush=True)


def _backward(model: nn.Module, train: ImageSet, training: _Training, loss: Loss, rows: Tensor,
              moves: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, cross-entropy and correct predictions, each summed over this process's share of a step's images, batch by batch."""
    device = train.labels.device
    step_loss, total_loss, correct = map(torch.zeros_like, (training.total_loss, training.total_loss, training.correct))
    for part in torch.arange(len(rows)).tensor_split(distributed.count())[distributed.rank()].split(training.at_once):
        batch = rows[part]
        inputs, labels, tasks = train.batch(batch), train.labels[batch], None if train.tasks is None else train.tasks[batch]
        if moves is not None:
            inputs = flip_and_shift(inputs, moves[:, part])
        with autocast(training.config, device):
            summed, logits = loss(model, inputs, labels, tasks)
        (summed / len(rows)).backward()
        step_loss += summed.detach()
        total_loss += F.cross_entropy(logits.detach(), labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return step_loss, total_loss, correct


@contextmanager
def stopping(wait: bool) -> Iterator[Callable[[], None]]:
    """With `wait`, Ctrl-C and SIGTERM have no effect in the block but that the yielded function raises KeyboardInterrupt.

    It does so in all processes at once, which therefore must call it equally often.
    """
    asked: list[int] = []

    def stop_if_asked() -> None:
        if distributed.any_of(bool(asked)):
            raise KeyboardInterrupt

    before = {}
    if wait and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, _: asked.append(number))
    try:
        yield stop_if_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def add_up_step(trainable: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
    """Add up a step's gradients, in place, and its loss over all processes; return the loss."""
    if distributed.count() == 1:
        return loss
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    *gradients, loss = distributed.add_up([*(parameter.grad for parameter in trainable), loss])
    for parameter, gradient in zip(trainable, gradients, strict=True):
        parameter.grad.copy_(gradient)
    return loss






class NotFiniteError(UserError):
    """A loss that is infinite or not a number."""


def _check_finite(loss: float, where: str, config: TrainingFlags) -> None:
    if not math.isfinite(loss):
        raise NotFiniteError(f"{where}: the loss is {loss}; lower --learning_rate (now {config.learning_rate}) or use "
                             "--precision fp32")








