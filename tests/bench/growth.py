"""How the cost grows: with experts, their rank, the number of images and their size."""

import torch
from torch import nn

from tests.bench.lora import prepared_task, quiet_fit, recipe
from tests.bench.measure import FP32, Benchmark, Case, Ratio, Settings, forward_flops
from tests.bench.setups import beit, demo_backbone, forward, images, lora, mixture, training_step


def _both(name: str, model: nn.Module, settings: Settings, count: int = 16) -> list[Case]:
    """Inference and training of a model; the limit is of its own operations, experts included."""
    batch, precision = images(settings, count, model), settings.training_precision
    flops = count * forward_flops(model, batch[0][0])
    return [Case(f"{name}, inference", forward(model, batch[0], settings, FP32), count, flops, FP32),
            Case(f"{name}, training step", training_step(model, batch, settings, precision), count, 2 * flops, precision)]


def by_experts(settings: Settings) -> Benchmark:
    """The mixture of 1, 2, 4, 8 and 16 experts of rank 16 at BEiT-base size, batch 16."""
    plain, numbers = beit(settings), (1, 2, 4, 8, 16)
    cases = [case for number in numbers
             for case in _both(f"{number} expert{'s' * (number > 1)}", mixture(plain, number), settings)]
    return cases, [
        Ratio("inference: 16 experts / 1", "16 experts, inference", "1 expert, inference", "< 1.6"),
        Ratio("training step: 16 experts / 1", "16 experts, training step", "1 expert, training step"),
    ]


def by_rank(settings: Settings) -> Benchmark:
    """The mixture of 2 experts of rank 4, 16 and 64 at BEiT-base size, batch 16."""
    plain, ranks = beit(settings), (4, 16, 64)
    cases = [case for rank in ranks for case in _both(f"rank {rank}", mixture(plain, 2, rank), settings)]
    return cases, [Ratio(f"{kind}: rank 64 / 4", f"rank 64, {kind}", f"rank 4, {kind}")
                   for kind in ("inference", "training step")]


def by_size(settings: Settings) -> Benchmark:
    """The mixture of 2 experts of BEiT-base's width, 2 blocks, on images of 96 to 384 pixels, batch 4."""
    cases = []
    for size in (32, 64) if settings.quick else (96, 160, 224, 384):
        cases += _both(f"{size} pixels", mixture(beit(settings, num_hidden_layers=2, image_size=size), 2), settings, 4)
    return cases, []


def by_images(settings: Settings) -> Benchmark:
    """An epoch of LoRA training on the demo backbone with 150, 300 and 600 images."""
    task = prepared_task(settings)
    config, base, cases = recipe(settings), demo_backbone(settings), []
    flops, model = forward_flops(base, images(settings, 1, base)[0][0]), lora(base)
    for share in (4, 2, 1):
        count = len(task.train) // share
        data = task.train.take(torch.arange(count))
        cases.append(Case(
            f"{count} images", lambda data=data: quiet_fit(model, data, task.validation, config), count,
            2 * count * flops + len(task.validation) * flops, settings.training_precision,
        ))
    return cases, [Ratio("four times the images: time", cases[-1].name, cases[0].name)]
