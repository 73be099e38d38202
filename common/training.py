"""The one training loop and the one evaluation that every script uses."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.config import HardwareFlags, TrainingFlags, UserError
from common.data import ImageSet, batches

EVALUATION_BATCH = 64
Loss = Callable[[nn.Module, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


@dataclass
class Fit:
    """A finished training. history: one row per epoch; seconds: wall-clock of all epochs; images: seen in training."""

    history: pd.DataFrame
    seconds: float
    images: int


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits (B, C) of an image classifier or of a plain head."""
    output = model(inputs)
    return output if isinstance(output, Tensor) else output.logits


def cross_entropy(model: nn.Module, inputs: Tensor, labels: Tensor, tasks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss of a classifier, summed over the batch, and its logits (B, C)."""
    logits = logits_of(model, inputs).float()
    return F.cross_entropy(logits, labels, reduction="sum"), logits


def device_of(config: HardwareFlags) -> torch.device:
    """The device to compute on. Raises UserError if it does not exist."""
    if config.device == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        probe = torch.zeros(1, device=config.device)
        probe.item()  # a device without values, such as meta, is of no use
        return probe.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {config.device} cannot be used here ({str(error).splitlines()[0]})") from error


def autocast(config: HardwareFlags, device: torch.device) -> AbstractContextManager:
    """The precision of training on `device`: bf16 autocast, or nothing for fp32.

    A CPU takes bf16 only where it multiplies it in hardware (AVX512-BF16 or AMX); elsewhere bf16 is emulated and slower.
    """
    in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() if device.type == "cpu" else (
        device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    if config.precision == "bf16" or (config.precision == "auto" and in_hardware):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def fit(model: nn.Module, train: ImageSet, validation: ImageSet, config: TrainingFlags, name: str,
        groups: list[dict] | None = None, loss: Loss = cross_entropy) -> Fit:
    """Train what is trainable in `model`; leave it with the weights of the epoch of lowest validation loss.

    groups: AdamW parameter groups, each with a `lr_share` of the learning rate; by default all trainable
    parameters. loss: sums what is minimised over a batch; the history always tells the cross-entropy. Batches are
    accumulated into steps whose loss is the mean over the step's images, whatever the batch size. Raises UserError if
    the loss is not finite.
    """
    device = device_of(config)
    model.to(device)
    train, validation = train.to(device), validation.to(device)
    trainable = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    groups = groups or [{"params": list(trainable.values()), "lr_share": 1.0}]
    optimizer = torch.optim.AdamW(
        [{**group, "lr": config.learning_rate * group["lr_share"]} for group in groups],
        betas=(0.9, 0.999), weight_decay=config.weight_decay,
    )
    step_size = config.batch_size * config.accumulation_steps
    steps = math.ceil(len(train) / step_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, warmup_cosine(round(config.warmup_epochs * steps), config.epochs * steps)
    )
    rows, best, lowest = [], {}, math.inf
    started = time.perf_counter()
    for epoch in range(1, config.epochs + 1):
        torch.manual_seed(config.seed * 100_003 + epoch)  # order, augmentation and dropout of an epoch
        order = torch.randperm(len(train)).to(device)
        training_loss, training_accuracy = _train_epoch(
            model, train, order, optimizer, schedule, config, loss, f"{name} {epoch}/{config.epochs}", device
        )
        probabilities, validation_loss = evaluate(model, validation, config)
        _check_finite(validation_loss, f"{name} epoch {epoch}, validation", config)
        accuracy = float((probabilities.argmax(1) == validation.labels.cpu().numpy()).mean())
        rows.append({"epoch": epoch, "training_loss": training_loss, "validation_loss": validation_loss,
                     "training_accuracy": training_accuracy, "validation_accuracy": accuracy})
        if not sys.stderr.isatty():
            print(f"{name} epoch {epoch}/{config.epochs}: loss {training_loss:.3f}, validation loss {validation_loss:.3f}, "
                  f"validation accuracy {accuracy:.3f}", flush=True)
        if validation_loss < lowest:
            lowest, best = validation_loss, {key: parameter.detach().clone() for key, parameter in trainable.items()}
    seconds = time.perf_counter() - started
    with torch.no_grad():
        for key, parameter in trainable.items():
            parameter.copy_(best[key])
    history = pd.DataFrame(rows)
    history["chosen"] = (history.index == history["validation_loss"].idxmin()).astype(int)
    return Fit(history, seconds, len(train) * config.epochs)


def _train_epoch(model: nn.Module, train: ImageSet, order: Tensor, optimizer: torch.optim.Optimizer,
                 schedule: torch.optim.lr_scheduler.LRScheduler, config: TrainingFlags, loss: Loss, name: str,
                 device: torch.device) -> tuple[float, float]:
    """One pass in the given order (N,). Returns cross-entropy and accuracy, sums over images divided by their number."""
    model.train()
    total_loss = torch.zeros((), device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with tqdm(total=len(order), desc=name, unit="img", leave=False, disable=None) as bar:
        for step in order.split(config.batch_size * config.accumulation_steps):
            step_loss = torch.zeros((), device=device)
            for rows in step.split(config.batch_size):
                inputs, tasks = train.batch(rows), None if train.tasks is None else train.tasks[rows]
                if config.augment and inputs.ndim == 4:
                    inputs = flip_and_shift(inputs)
                with autocast(config, device):
                    summed, logits = loss(model, inputs, train.labels[rows], tasks)
                (summed / len(step)).backward()
                step_loss += summed.detach()
                total_loss += F.cross_entropy(logits.detach(), train.labels[rows], reduction="sum")
                correct += (logits.argmax(1) == train.labels[rows]).sum()
            mean = step_loss.item() / len(step)
            _check_finite(mean, name, config)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            bar.update(len(step))
    return total_loss.item() / len(order), correct.item() / len(order)


def flip_and_shift(images: Tensor) -> Tensor:
    """Mirror half of the images (B, C, S, S) and shift each by up to an eighth of its size, edges repeated."""
    batch, _, height, width = images.shape
    reach = height // 8
    mirrored = torch.where(torch.rand(batch, 1, 1, 1).to(images.device) < 0.5, images.flip(3), images)
    padded = F.pad(mirrored, [reach] * 4, mode="replicate")
    down, right = torch.randint(2 * reach + 1, (2, batch, 1)).to(images.device)
    rows, columns = down + torch.arange(height, device=images.device), right + torch.arange(width, device=images.device)
    image = torch.arange(batch, device=images.device)[:, None, None]
    return padded.movedim(1, 3)[image, rows[:, :, None], columns[:, None, :]].movedim(3, 1).contiguous()


def _check_finite(loss: float, where: str, config: TrainingFlags) -> None:
    if not math.isfinite(loss):
        raise UserError(f"{where}: the loss is {loss}; lower --learning_rate (now {config.learning_rate}) or use --precision fp32")


@torch.no_grad()
def evaluate(model: nn.Module, data: ImageSet, config: HardwareFlags,
             after_batch: Callable[[], None] | None = None) -> tuple[np.ndarray, float]:
    """Class probabilities (N, C) in order, and the mean loss, in evaluation mode and fp32.

    after_batch: called after each forward pass, to look at what the model recorded.
    """
    device = device_of(config)
    model.to(device).eval()
    data = data.to(device)
    total, probabilities = torch.zeros((), device=device), []
    for rows in batches(len(data), EVALUATION_BATCH):
        logits = logits_of(model, data.batch(rows)).float()
        total += F.cross_entropy(logits, data.labels[rows], reduction="sum")
        probabilities.append(logits.softmax(1).cpu())
        if after_batch is not None:
            after_batch()
    return torch.cat(probabilities).numpy(), total.item() / len(data)


@torch.no_grad()
def features(model: nn.Module, data: ImageSet, config: HardwareFlags) -> ImageSet:
    """What a BEiT classifier's head sees: pooled features (N, D), computed once, with the labels."""
    device = device_of(config)
    model.to(device).eval()
    data = data.to(device)
    pooled = [model.beit(data.batch(rows)).pooler_output for rows in batches(len(data), EVALUATION_BATCH)]
    return ImageSet(torch.cat(pooled), data.labels)


def warmup_cosine(warmup: int, total: int) -> Callable[[int], float]:
    """Share of the peak rate at each step: linear up over `warmup` steps, then half a cosine down towards zero."""

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return share


def layer_decay_groups(model: nn.Module, decay: float) -> list[dict]:
    """Parameter groups of a BEiT classifier in which every block learns at `decay` times the rate of the block above.

    The head has the full rate, the embeddings the least (Bao et al. 2022; Clark et al. 2020, ELECTRA).
    """
    depth = model.config.num_hidden_layers
    groups: dict[float, list[nn.Parameter]] = {}
    for key, parameter in model.named_parameters():
        if key.startswith("beit.layers."):
            level = depth - int(key.split(".")[2])
        else:
            level = depth + 1 if key.startswith("beit.embeddings") else 0
        groups.setdefault(decay**level, []).append(parameter)
    return [{"params": parameters, "lr_share": share} for share, parameters in groups.items()]
