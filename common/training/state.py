"""The state of a training between two optimizer steps: what a checkpoint stores."""

import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from common.cli.flags import TrainingFlags
from common.training import distributed
from common.training.checkpoint import Checkpoint
from common.training.schedule import warmup_cosine


@dataclass
class TrainingState:
    """Where a training is.

    images: how many there are to train on. total_loss, correct: sums over this epoch's images so far, each times its
    weight, of this process's images only. epoch: the current one, from 1; step: how many of its steps are done.
    generator: draws the order and the augmentation of an epoch. rows: the history so far. best, lowest: weights and
    validation loss of its best row.
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
    rows: list[dict[str, float | None]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    lowest: float = math.inf
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

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
    def steps_done(self) -> int:
        """Steps of the whole training so far."""
        return (self.epoch - 1) * self.steps + self.step

    @property
    def done(self) -> bool:
        """True after the last epoch."""
        return self.epoch > self.config.epochs

    def spent(self) -> float:
        """Seconds of this training, with those before an interruption."""
        return self.seconds + time.perf_counter() - self.started

    def order(self) -> Tensor:
        """The order (N,) of the images in this epoch. Called at its first step, it leaves the generator ready for the
        epoch's augmentation."""
        generator = self.generator if self.step == 0 else torch.Generator()
        return torch.randperm(self.images, generator=generator.manual_seed(self.config.seed * 100_003 + self.epoch))

    def begin_step(self) -> None:
        """Set the learning rates and the seed of what a model drops at random."""
        share = warmup_cosine(round(self.config.warmup_epochs * self.steps), self.config.epochs * self.steps)(self.steps_done)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * group["lr_share"] * share
        seeds = np.random.SeedSequence([self.config.seed, self.epoch, self.step, distributed.rank()])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))

    def totals(self) -> list[Tensor]:
        """total_loss and correct of all processes together."""
        return distributed.all_reduce([self.total_loss, self.correct])

    def judge(self, row: dict[str, float | None]) -> None:
        """Add a row to the history; keep the weights if no row before has as low a validation loss."""
        self.rows.append(row)
        if row["validation_loss"] < self.lowest:
            self.lowest = row["validation_loss"]
            self.best = {key: parameter.detach().clone() for key, parameter in self.trainable.items()}

    def begin_epoch(self) -> None:
        """Go on to the next epoch."""
        self.total_loss.zero_()
        self.correct.zero_()
        self.epoch, self.step = self.epoch + 1, 0

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the state; of a finished training, only the history and the best weights."""
        tensors = {f"best.{key}": tensor for key, tensor in self.best.items()}
        if not self.done:
            tensors |= {f"weights.{key}": parameter for key, parameter in self.trainable.items()}
            tensors |= {f"optimizer.{index}.{key}": tensor for index, state in self.optimizer.state_dict()["state"].items()
                        for key, tensor in state.items()}
            total_loss, correct = self.totals()
            tensors |= {"generator": self.generator.get_state(), "total_loss": total_loss, "correct": correct}
        progress = {name: getattr(self, name) for name in ("epoch", "step", "rows", "lowest")}
        checkpoint.save(tensors, {**progress, "seconds": self.spent()})

    @torch.no_grad()
    def resume(self, checkpoint: Checkpoint) -> None:
        """Take over the state that a checkpoint holds."""
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
