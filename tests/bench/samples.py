"""How many images a class it takes: the mixture's gates against no experts, both fitted to the same few training images."""

import dataclasses
import time

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from common import mixture, models
from common.cli.flags import MixtureConfig
from common.cli.parser import parse
from common.comparison import no_experts, ours
from common.comparison.inputs import Inputs
from common.comparison.score import Scores
from common.data.tensors import load_task
from common.files import read_json
from common.tasks import read_tasks
from common.training.evaluate import EVALUATION_BATCH
from tests.bench.measure import Settings

COUNTS = (1, 8, 32, None)  # training images a class; None for all
EVERY = "all"


def samples(settings: Settings) -> pd.DataFrame:
    """the mixture against no experts by the training images a class that their statistics are of (1, 8, 32, all), on --root,
    a folder with finished experts; experts, validation and test images are the same throughout."""
    model = read_json(settings.root / "Results" / "Lora_Finetune" / "config.json",
                      "samples needs a folder with finished experts; give it with --root", {"model": str})["model"]
    config = parse(MixtureConfig, ["--root", str(settings.root), "--model", model, "--device", str(settings.device)])
    processor = models.load_processor(config.model)
    tasks = [load_task(task, config, processor) for task in read_tasks(config.root)]
    inputs = Inputs(config, tasks, mixture.build(config, tasks))
    rows = []
    for seed in settings.seeds:
        for count in COUNTS[:2] if settings.quick else COUNTS:
            drawn = draw(inputs, count, seed)
            few = taught_by(inputs, drawn)
            for name, answer in (("no experts", no_experts.discriminant), ("mixture", lambda few: fitted(few, drawn))):
                started = time.perf_counter()
                scores = answer(few).values
                right, task, told = (float(few.test_answers.weights @ of(scores)) for of in (
                    few.test_answers.right, few.test_answers.right_task, few.test_answers.right_told))
                rows.append({"seed": seed, "images_a_class": EVERY if count is None else count, "method": name,
                             "accuracy": right, "right_task": task, "accuracy_given_right_task": right / task if task else 0.0,
                             "accuracy_told_task": told, "seconds": time.perf_counter() - started})
                print({key: value for key, value in rows[-1].items() if key != "seconds"}, flush=True)
    return pd.DataFrame(rows)


def draw(inputs: Inputs, count: int | None, seed: int) -> np.ndarray:
    """Rows of so many training images of each class, at random; those of a larger number hold those of a smaller one."""
    order = np.random.default_rng(seed).permutation(len(inputs.train_answers.labels))
    labels = inputs.train_answers.labels[order]
    return np.sort(np.concatenate([order[labels == label][:count] for label in range(len(inputs.space.owner))]))


def taught_by(inputs: Inputs, drawn: np.ndarray) -> Inputs:
    """The same inputs with these training images only, of which the features are those that are there."""
    few = Inputs(inputs.config, inputs.tasks, inputs.mixture)
    few.train = inputs.train.take(torch.from_numpy(drawn))
    few.train_answers = few.space.answers(few.train)
    train = {depth: values[drawn] for depth, values in inputs.features.train.items()}
    few.__dict__ |= {"body": inputs.body, "features": dataclasses.replace(inputs.features, train=train)}
    return few


def fitted(few: Inputs, drawn: np.ndarray) -> Scores:
    """What the mixture answers, its gates fitted in closed form to these images alone."""
    starts = np.cumsum([0, *(len(data.train) for data in few.tasks)])
    images = {data.task.key: data.train.take(torch.from_numpy(drawn[(drawn >= start) & (drawn < end)] - start))
              for data, start, end in zip(few.tasks, starts, starts[1:], strict=False)}
    model = mixture.build(few.config, few.tasks)
    model.fit_gates({key: mixture.Batches(own, EVALUATION_BATCH) for key, own in images.items()},
                    {data.task.key: mixture.Batches(data.validation, EVALUATION_BATCH) for data in few.tasks})
    return ours.answers(few, model)


def picture(table: pd.DataFrame, _: str) -> Figure:
    """Accuracy among all tasks' classes, and right task, by images a class, the mean over seeds."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    counts = list(dict.fromkeys(map(str, table["images_a_class"])))
    for method, own in table.groupby("method", sort=False):
        by_count = own.groupby(own["images_a_class"].astype(str))
        for name, style in (("accuracy", "o-"), ("right_task", "s:")):
            axes.plot(counts, by_count[name].mean()[counts], style, markersize=4, label=f"{method}, {name.replace('_', ' ')}",
                      color={"mixture": "C3"}.get(method, "C0"))
    axes.set(xlabel="training images a class that statistics are made of", ylabel="share of test images", ylim=(None, 1.005))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
