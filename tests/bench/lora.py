"""LoRA training: against transformers' Trainer and peft with images transformed on the fly, and against the limit."""

import contextlib
import dataclasses
import io
import itertools
import random
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from PIL import Image, ImageOps
from torch import nn
from transformers import Trainer, TrainingArguments

from common.cli.flags import DEMO_BACKBONE, LoraConfig, PreparationConfig, TrainingFlags
from common.cli.parser import parse
from common.data.generated import generator
from common.data.prepare import prepare
from common.data.tensors import ImageSet, TaskData, load_task
from common.models import load_processor
from common.tasks import DOCUMENTED
from common.training.loop import fit
from tests.bench.measure import BF16, LIMIT, Benchmark, Case, Ratio, Settings, forward_flops
from tests.bench.setups import beit, demo_backbone, forward, images, lora, peft_lora, training_step, twin


def prepared_task(settings: Settings, enlarge: bool = False) -> TaskData:
    """The demo's first task in memory: 600 images to train on, 24 with `--quick`; stored, if so asked, at 320 x 320."""
    task, count = DOCUMENTED[0], 10 if settings.quick else 250
    flags = ["--demo", "--root", str(settings.root), "--images_per_class", str(count)]
    if enlarge:
        source = settings.root / "enlarged"
        missing = [] if (settings.root / task.dataset_folder).exists() else range(count)  # kept from an earlier run
        for label, number in itertools.product(range(len(generator(task).CLASS_NAMES)), missing):
            picture = Image.fromarray(generator(task).render(label, np.random.default_rng([label, number]))).resize((320, 320))
            path = source / generator(task).CLASS_NAMES[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        flags += [f"--{task.key}_source", str(source)]
    config = parse(PreparationConfig, flags)
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(task, config)
    return load_task(task, config, load_processor(str(DEMO_BACKBONE)))


def quiet_fit(model: nn.Module, train: ImageSet, validation: ImageSet, config: TrainingFlags) -> None:
    """Train without a word."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        fit(model, train, validation, config, "benchmark")


def on_the_fly(folder: Path, model: str, split: str = "train") -> Dataset:
    """Prepared images as the image processor of a model makes them, decoded and resized whenever they are asked for, and
    mirrored at random where they are to train on."""
    processor = load_processor(model)
    dataset = load_from_disk(str(folder))[split]

    def transform(rows: dict[str, list]) -> dict[str, object]:
        pictures = [image.convert("RGB") for image in rows["image"]]
        if split == "train":
            pictures = [ImageOps.mirror(image) if random.random() < 0.5 else image for image in pictures]
        # One by one, as the example does.
        pixels = [processor(image, return_tensors="pt").pixel_values[0] for image in pictures]
        return {"pixel_values": pixels, "labels": rows["label"]}

    return dataset.with_transform(transform)


def collate(rows: list[dict[str, object]]) -> dict[str, torch.Tensor]:
    """A batch of transformed rows."""
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows])}


def trainer(model: nn.Module, dataset: Dataset, config: LoraConfig, settings: Settings, epochs: int = 1,
            evaluation: Dataset | None = None, **more: object) -> None:
    """Train as the public image-classification example of transformers does, and evaluate after each epoch on `evaluation`.
    more: arguments of the Trainer."""
    arguments = TrainingArguments(
        output_dir=str(settings.root / "trainer"), per_device_train_batch_size=config.batch_size, num_train_epochs=epochs,
        learning_rate=config.learning_rate, bf16=settings.training_precision == BF16, use_cpu=settings.device.type == "cpu",
        remove_unused_columns=False, save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        eval_strategy="no" if evaluation is None else "epoch", seed=config.seed,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(model, arguments, data_collator=collate, train_dataset=dataset, eval_dataset=evaluation, **more).train()


def epoch(settings: Settings) -> Benchmark:
    """LoRA on the demo backbone: an epoch and a step, ours against transformers' Trainer and peft with images transformed
    on the fly."""
    cases = _epochs(settings, prepared_task(settings)) + _steps(settings)
    return cases, [
        Ratio("epoch: Trainer + peft on the fly / ours", cases[1].name, cases[0].name, ">= 2.5"),
        Ratio("step: peft / ours", cases[3].name, cases[2].name),
    ]


def epoch_large(settings: Settings) -> Benchmark:
    """The same epoch on images of FireRisk's size, 320 x 320; the demo's are 128 x 128."""
    settings = dataclasses.replace(settings, root=settings.root / "large")
    cases = _epochs(settings, prepared_task(settings, enlarge=True))
    return cases, [Ratio("epoch: Trainer + peft on the fly / ours", cases[1].name, cases[0].name, ">= 2.5")]


def recipe(settings: Settings) -> LoraConfig:
    """The demo's settings of LoRA, for one epoch."""
    return parse(LoraConfig, ["--demo", "--root", str(settings.root), "--epochs", "1", "--device", str(settings.device)])


def _epochs(settings: Settings, task: TaskData) -> list[Case]:
    precision, config, plain = settings.training_precision, recipe(settings), demo_backbone(settings)
    ours, theirs = lora(plain), peft_lora(demo_backbone(settings, "sdpa"))  # transformers takes sdpa by itself
    dataset, count = on_the_fly(settings.root / task.task.dataset_folder, str(DEMO_BACKBONE)), len(task.train)
    # An epoch of ours ends with a validation, theirs does not.
    few = task.validation.take(torch.arange(4))
    flops = 2 * count * forward_flops(plain, images(settings, 1, plain)[0][0])
    return [
        Case("epoch, ours", lambda: quiet_fit(ours, task.train, few, config), count, flops, precision),
        Case("epoch, Trainer + peft, on the fly", lambda: trainer(theirs, dataset, config, settings), count, flops,
             precision),
    ]


def _steps(settings: Settings) -> list[Case]:
    precision, count, plain = settings.training_precision, recipe(settings).batch_size, demo_backbone(settings)
    batch, flops = images(settings, count, plain), 2 * count * forward_flops(plain, images(settings, 1, plain)[0][0])
    ours = training_step(lora(plain), batch, settings, precision)
    theirs = training_step(peft_lora(demo_backbone(settings, "sdpa")), batch, settings, precision, fused=True)  # as the Trainer
    return [
        Case("step, ours", ours, count, flops, precision),
        Case("step, peft", theirs, count, flops, precision),
    ]


def base(settings: Settings) -> Benchmark:
    """LoRA at BEiT-base size, batch 16: a training step against two forward passes, and against their operations at the
    rate of matrix products."""
    count, precision, plain = 16, settings.training_precision, beit(settings)
    batch, flops = images(settings, count, plain), count * forward_flops(plain, images(settings, 1, plain)[0][0])
    unmodified = twin(plain)
    unmodified.set_attn_implementation("sdpa")
    cases = [
        Case("step, ours", training_step(lora(plain), batch, settings, precision), count, 2 * flops, precision),
        Case("step, peft", training_step(peft_lora(unmodified), batch, settings, precision), count, 2 * flops, precision),
        Case("forward of the base", forward(plain, batch[0], settings, precision), count, flops, precision),
        Case("forward of the base, transformers' attention", forward(unmodified, batch[0], settings, precision), count, flops,
             precision),
    ]
    return cases, [
        Ratio("limit (2 forward passes' operations) / step", LIMIT, cases[0].name, ">= 0.5"),
        Ratio("2 forward passes / step", cases[2].name, cases[0].name, ">= 0.8", factor=2),
        Ratio("2 forward passes with transformers' attention / step", cases[3].name, cases[0].name, factor=2),
        Ratio("step: peft / ours", cases[1].name, cases[0].name),
    ]
