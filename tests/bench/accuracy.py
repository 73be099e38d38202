"""Time to an accuracy: seconds until an adapter is as accurate as one that transformers' Trainer and peft make."""

import contextlib
import io
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from transformers import EvalPrediction, TrainerCallback

from common.cli.flags import DEMO_BACKBONE, BaseModelConfig, LoraConfig, PreparationConfig, RunFlags
from common.cli.parser import parse
from common.data.prepare import prepare
from common.data.tensors import TaskData, load_task
from common.models import load_backbone, load_processor
from common.models.lora import add_lora
from common.tasks import read_tasks
from common.training.evaluate import features
from common.training.head import fit_head
from common.training.loop import fit
from tests.bench.lora import on_the_fly, trainer
from tests.bench.measure import Settings
from tests.bench.setups import peft_lora

EPOCHS, RATE = 25, 2e-4  # of the documented experiment, for Trainer and peft


def time_to_accuracy(settings: Settings) -> pd.DataFrame:
    """Seconds until an adapter of the demo's tasks, or of those of --root on --model, has the validation accuracy that Trainer
    + peft ends with after 25 epochs at 2e-4: ours by its defaults, base head included. Evaluation after each epoch counts."""
    rows = []
    for seed in settings.seeds:
        for data in tasks_of(settings, seed):
            theirs, ours = _trainer(data, settings, seed), _ours(data, settings, seed)
            wanted = theirs[-1][1]
            row = {"model": settings.model_name, "task": data.task.key, "seed": seed, "accuracy": wanted,
                   "accuracy_of_ours": ours[-1][1], "best_of_ours": max(accuracy for _, accuracy in ours),
                   "trainer_seconds": theirs[-1][0], "trainer_seconds_until": _until(theirs, wanted),
                   "our_seconds": ours[-1][0], "our_seconds_until": _until(ours, wanted)}
            row |= {"ratio": row["trainer_seconds"] / row["our_seconds_until"],
                    "ratio_of_first_times": row["trainer_seconds_until"] / row["our_seconds_until"],
                    "seconds": row["trainer_seconds"] + row["our_seconds"]}
            print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
            rows.append(row)
    return pd.DataFrame(rows)


def _until(curve: list[tuple[float, float]], accuracy: float) -> float:
    """The first seconds of a curve of (seconds, accuracy) with that accuracy; none is not a number."""
    return next((seconds for seconds, reached in curve if reached >= accuracy - 1e-9), float("nan"))


def config_of(kind: type[RunFlags], settings: Settings, seed: int) -> RunFlags:
    """The default settings of a script; of its demo, if that is what is measured."""
    flags = ["--root", str(settings.root), "--model", settings.model, "--seed", str(seed)]
    flags += ["--demo"] * (settings.model == str(DEMO_BACKBONE))
    if kind is PreparationConfig:
        return parse(kind, [*flags, "--images_per_class", "10" if settings.quick else "250"])
    short = ["--epochs", "1"] * (settings.quick and kind is LoraConfig)
    return parse(kind, [*flags, *short, "--device", str(settings.device)])


def tasks_of(settings: Settings, seed: int) -> list[TaskData]:
    """The tasks of --root as --model sees them; the demo's are prepared where they are missing."""
    config = config_of(LoraConfig, settings, seed)
    tasks = read_tasks(settings.root)
    for task in tasks:
        if settings.model == str(DEMO_BACKBONE) and not (settings.root / task.dataset_folder).exists():
            with contextlib.redirect_stdout(io.StringIO()):
                prepare(task, config_of(PreparationConfig, settings, seed))
    return [load_task(task, config, load_processor(settings.model)) for task in tasks]


def _ours(data: TaskData, settings: Settings, seed: int) -> list[tuple[float, float]]:
    """Seconds and validation accuracy of the base model, whose head is fitted to features computed once, and after each epoch
    of the adapter that goes on from it. All epochs take the same time."""
    started, config = settings.clock(), config_of(LoraConfig, settings, seed)
    model = load_backbone(settings.model, data.classes, seed)
    base = config_of(BaseModelConfig, settings, seed)
    train, validation = (features(model, part, base) for part in (data.train, data.validation))
    head = fit_head(model.classifier, train, validation, base).history
    first = settings.clock() - started
    adapted = add_lora(model, config.lora_rank, config.lora_alpha, seed)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        history = fit(adapted, data.train, data.validation, config, "benchmark").history
    epoch = (settings.clock() - started - first) / len(history)
    accuracies = [head["validation_accuracy"][head["chosen"].argmax()], *history["validation_accuracy"]]
    return [(first + number * epoch, accuracy) for number, accuracy in enumerate(accuracies)]


def _trainer(data: TaskData, settings: Settings, seed: int) -> list[tuple[float, float]]:
    """The same after each epoch of transformers' Trainer on peft's adapter with a new head, images transformed on the fly."""
    torch.manual_seed(seed)
    curve, started, folder = [], settings.clock(), settings.root / data.task.dataset_folder
    config = config_of(LoraConfig, settings, seed)
    config.learning_rate = RATE
    model = load_backbone(settings.model, data.classes, seed)
    model.set_attn_implementation("sdpa")  # which transformers takes by itself
    train, validation = (on_the_fly(folder, settings.model, split) for split in ("train", "validation"))
    trainer(peft_lora(model), train, config, settings, 1 if settings.quick else EPOCHS, validation,
            compute_metrics=_accuracy, callbacks=[_Curve(curve, lambda: settings.clock() - started)])
    return curve


def _accuracy(said: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(said.predictions.argmax(1) == said.label_ids))}


class _Curve(TrainerCallback):
    """Notes the seconds and the accuracy of each evaluation."""

    def __init__(self, curve: list[tuple[float, float]], seconds: Callable[[], float]):
        self.curve, self.seconds = curve, seconds

    def on_evaluate(self, *_: object, metrics: dict[str, float], **__: object) -> None:
        """See `TrainerCallback`."""
        self.curve.append((self.seconds(), metrics["eval_accuracy"]))
