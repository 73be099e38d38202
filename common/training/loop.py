"""The one training loop that every script uses."""

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pandas as pd
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import PreTrainedModel

from common.cli.flags import TrainingFlags
from common.data.tensors import ImageSet
from common.errors import UserError
from common.training import distributed
from common.training.augment import flip_and_shift, moves_of
from common.training.checkpoint import Checkpoint
from common.training.distributed import device_of
from common.training.evaluate import autocast, evaluate, logits_of
from common.training.interrupts import stopping
from common.training.objective import CROSS_ENTROPY, Objective
from common.training.schedule import parameter_groups
from common.training.state import TrainingState


class NotFiniteError(UserError):
    """A loss that is infinite or not a number."""


@dataclass
class Fit:
    """A finished training. history: one row per epoch; seconds: wall-clock of all epochs; images: seen in training."""

    history: pd.DataFrame
    seconds: float
    images: int


def fit(model: nn.Module, train: ImageSet, validation: ImageSet, config: TrainingFlags, name: str,
        groups: list[dict] | None = None, objective: Objective = CROSS_ENTROPY, checkpoint: Checkpoint | None = None,
        start_counts: bool = False) -> Fit:
    """Train what is trainable in `model`; leave it with the weights of the epoch of lowest validation loss.

    groups: AdamW parameter groups, each with a `lr_share` of the learning rate; by default those of `parameter_groups`.
    objective: how loss and accuracy follow from logits. start_counts: the model as it comes is epoch 0 of the history,
    without values of training, and may be the chosen one; `config.epochs` may then be 0.

    The loss of an optimizer step is the weighted mean over the step's images, whatever the batch size and the number of
    processes, which share out the images of every step. Raises UserError if a loss is not finite or memory does not suffice.

    checkpoint: where the state is saved and resumed from. On a CPU the result is then, bit for bit, that of a training that
    was never interrupted. With it, Ctrl-C and SIGTERM wait for the current step, save and raise KeyboardInterrupt, whose
    text says where.
    """
    config, device = config.for_images(len(train)), device_of(config)
    model.to(device)
    backbone = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if config.gradient_checkpointing and backbone is not None:  # reentrant, it would need inputs that have gradients
        backbone.activation_checkpointing_enable({"use_reentrant": False})
    trainable = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(groups or parameter_groups(model), lr=config.learning_rate, betas=(0.9, 0.999),
                                  weight_decay=config.weight_decay, fused=device.type in ("cpu", "cuda"))
    state = TrainingState(name, config, trainable, optimizer, len(train), total_loss=torch.zeros((), device=device),
                          correct=torch.zeros((), device=device))
    run = _Run(model, train.to(device), validation.to(device), objective, state)
    if checkpoint is not None and checkpoint.progress is not None:
        state.resume(checkpoint)
        if state.rows or not state.done:  # with no epochs to train there may be nothing yet to go on with
            print(f"{name}: trained already" if state.done else f"going on: {state}", flush=True)
    try:
        with stopping(checkpoint is not None) as stop_if_asked:
            if start_counts and not state.rows:
                run.validate(0, None, None, stop_if_asked)
                if checkpoint is not None and state.done:
                    state.save(checkpoint)
            while not state.done:
                run.train_epoch(checkpoint, stop_if_asked)
                total_loss, correct = (total.item() / run.weight for total in state.totals())
                run.validate(state.epoch, total_loss, correct, stop_if_asked)
                state.begin_epoch()
                if checkpoint is not None and (state.done or not config.checkpoint_every_steps):
                    state.save(checkpoint)
    except KeyboardInterrupt:
        if checkpoint is None:
            raise
        state.save(checkpoint)
        raise KeyboardInterrupt(f"saved: {state}") from None
    except NotFiniteError:
        if checkpoint is not None:  # it would only lead here again
            checkpoint.delete()
        raise
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        fix = "add" if config.largest_batch else (
            f"add --largest_batch, halve --batch_size (now {config.batch_size}) and double --accumulation_steps (now "
            f"{config.accumulation_steps}), or add")
        raise UserError(f"{state}: out of memory; {fix} --gradient_checkpointing", own=True) from error
    with torch.no_grad():
        for key, parameter in trainable.items():
            parameter.copy_(state.best[key])
    history = pd.DataFrame(state.rows, dtype=float).astype({"epoch": int})
    history["chosen"] = (history.index == history["validation_loss"].idxmin()).astype(int)
    return Fit(history, state.spent(), len(train) * config.epochs)


def _parallel(model: nn.Module, train: ImageSet) -> DistributedDataParallel:
    """The model such that a backward pass leaves in all processes the mean of their gradients, which is computed while the
    pass goes on. All processes get the first one's weights."""
    logits_of(model, train.batch(torch.zeros(1, dtype=torch.int64))).sum().backward()
    unused = any(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model.zero_grad()
    return DistributedDataParallel(model, forward_sync_buffers=False, find_unused_parameters=unused,
                                   gradient_as_bucket_view=True)


class _Run:
    """A model, what it learns from, and the state of its training. at_once: images that are computed at once."""

    def __init__(self, model: nn.Module, train: ImageSet, validation: ImageSet, objective: Objective, state: TrainingState):
        self.model, self.train, self.validation, self.objective, self.state = model, train, validation, objective, state
        self.config: TrainingFlags = state.config
        self.labels, self.weights = objective.labels(train), objective.weights(train)  # each (N,)
        self.weight = self.weights.sum().item()
        self.parallel = _parallel(model, train) if distributed.world_size() > 1 else model
        own_share = math.ceil(state.step_size / distributed.world_size())
        self.at_once = own_share if self.config.largest_batch else self.config.batch_size

    def validate(self, epoch: int, training_loss: float | None, training_accuracy: float | None,
                 stop_if_asked: Callable[[], None]) -> None:
        """Write an epoch's row of the history and keep its weights if they are the best so far."""
        probabilities, loss = evaluate(self.model, self.validation, self.config, self.objective, between=stop_if_asked)
        self._check_finite(loss, f"{self.state}, validation")
        labels, weights = (value.cpu() for value in (self.objective.labels(self.validation),
                                                     self.objective.weights(self.validation)))
        right = self.objective.correct(torch.from_numpy(probabilities), labels).to(weights.dtype)
        accuracy = (right * weights).sum().item() / weights.sum().item()
        self.state.judge({"epoch": epoch, "training_loss": training_loss, "validation_loss": loss,
                          "training_accuracy": training_accuracy, "validation_accuracy": accuracy})
        if not sys.stderr.isatty():
            trained = "" if training_loss is None else f"loss {training_loss:.3f}, "
            print(f"{self.state.name} epoch {epoch}/{self.config.epochs}: {trained}validation loss {loss:.3f}, validation "
                  f"accuracy {accuracy:.3f}", flush=True)

    def train_epoch(self, checkpoint: Checkpoint | None, stop_if_asked: Callable[[], None]) -> None:
        """The remaining steps of an epoch."""
        state, every = self.state, self.config.checkpoint_every_steps
        self.model.train()
        order = state.order().to(self.labels.device)
        with tqdm(total=len(order), initial=state.step * state.step_size, unit="img", leave=False, disable=None,
                  desc=f"{state.name} {state.epoch}/{self.config.epochs}") as bar:
            for rows in order.split(state.step_size)[state.step:]:
                mean = distributed.all_reduce([self._gradients(rows)])[0].item()
                self._check_finite(mean, str(state))
                state.optimizer.step()
                state.optimizer.zero_grad()
                state.step += 1
                bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
                bar.update(len(rows))
                if checkpoint is not None and every and state.steps_done % every == 0:
                    state.save(checkpoint)
                stop_if_asked()

    def _gradients(self, rows: Tensor) -> Tensor:
        """Put the gradients of a step's mean loss into the parameters; return this process's part of that loss.

        What does not fit into memory is tried again with half as many images at once, if --largest_batch asks for it.
        """
        inputs = self.train.inputs
        moves = moves_of(rows, inputs, self.state.generator, self.config) if self.config.augment else None
        while True:
            self.state.begin_step()
            try:
                total_loss, correct = self._backward(rows, moves)
            except RuntimeError as error:
                if not (self.config.largest_batch and self.at_once > 1 and should_reduce_batch_size(error)):
                    raise
            else:
                self.state.total_loss += total_loss
                self.state.correct += correct
                return total_loss / self.weights[rows].sum()
            self.state.optimizer.zero_grad()  # outside of the except block, where the error keeps the activations alive
            clear_device_cache()
            self.at_once = math.ceil(self.at_once / 2)
            print(f"{self.state}: out of memory, now {self.at_once} images at once", flush=True)

    def _backward(self, rows: Tensor, moves: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weighted sums of loss and correct answers over this process's images of a step, batch by batch."""
        processes = distributed.world_size()
        own = torch.arange(len(rows)).tensor_split(processes)[distributed.rank()]
        batches = [(part, 1) for part in own.split(self.at_once) if len(part)]
        if processes > 1 and (self.config.largest_batch or not batches):
            # All processes add up gradients in their last batch. One image that counts nothing is a batch for those that
            # have none, and where batches may have to be tried again, adding up comes after them.
            batches.append((torch.zeros(1, dtype=torch.int64), 0))
        step_weight = self.weights[rows].sum()
        total_loss, correct = torch.zeros_like(self.state.total_loss), torch.zeros_like(self.state.correct)
        for number, (part, counts) in enumerate(batches, start=1):
            batch = rows[part]
            inputs, labels, weights = self.train.batch(batch), self.labels[batch], self.weights[batch] * counts
            if moves is not None:
                inputs = flip_and_shift(inputs, moves[:, part])
            adds_up = number == len(batches) or processes == 1
            with nullcontext() if adds_up else self.parallel.no_sync():
                with autocast(self.config, inputs.device):
                    logits = logits_of(self.parallel, inputs).float()
                    summed = (self.objective.losses(logits, labels) * weights).sum()
                (summed * processes / step_weight).backward()  # DistributedDataParallel takes the mean over processes
            total_loss += summed.detach()
            correct += (self.objective.correct(logits.detach(), labels) * weights).sum()
        return total_loss, correct

    def _check_finite(self, loss: float, where: str) -> None:
        if not math.isfinite(loss):
            raise NotFiniteError(f"{where}: the loss is {loss}; lower --learning_rate (now {self.config.learning_rate}) or use "
                                 "--precision fp32")
