"""The gates of a mixture of finished experts: fitted in closed form, against four epochs of training them."""

from collections.abc import Callable

import torch

from ContextGatedMOE import ContextGatedMOE
from ContextGatedMOE.fitting import Batches
from tests.bench.measure import FP32, Benchmark, Case, Ratio, Settings
from tests.bench.setups import demo_backbone, experts, images, twin

EPOCHS = 4
TRAIN, VALIDATION, BATCH = 600, 200, 32  # images of one expert, as in the demo
WANTED = {2: ">= 8", 8: ">= 20", 32: ""}


def gates(settings: Settings) -> Benchmark:
    """Gates of 2, 8 and 32 finished experts of the demo's backbone, 600 images each (60 each for 32), ready to use: closed
    form, against an epoch of training times 4."""
    cases, ratios = [], []
    for count, wanted in WANTED.items():
        share = 100 if settings.quick else 10 if count > 8 else 1
        plain = demo_backbone(settings)
        made = experts(plain, count)
        model = ContextGatedMOE(twin(plain), made, {expert.name: list("abcd") for expert in made}).to(settings.device)
        train, validation = ({expert.name: _batches(settings, number // share, model) for expert in made}
                             for number in (TRAIN, VALIDATION))
        fitted, trained = f"{count} experts, closed form", f"{count} experts, an epoch of training"
        number = count * TRAIN // share
        cases += [Case(fitted, _fit(model, train, validation), number, 0, FP32),
                  Case(trained, _epoch(model, train), number, 0, FP32)]
        ratios.append(Ratio(f"{count} experts: {EPOCHS} epochs of training / closed form", trained, fitted, wanted, EPOCHS))
    return cases, ratios


def _batches(settings: Settings, count: int, model: ContextGatedMOE) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs, _ = images(settings, count, model)
    return list(zip(inputs.split(BATCH), (torch.arange(count) % 4).split(BATCH), strict=True))


def _fit(model: ContextGatedMOE, train: dict[str, Batches], validation: dict[str, Batches]) -> Callable[[], None]:
    return lambda: model.fit_gates(train, validation)


def _epoch(model: ContextGatedMOE, train: dict[str, Batches]) -> Callable[[], object]:
    batches = [(inputs, torch.tensor(model.columns[name])[labels]) for name, own in train.items() for inputs, labels in own]
    return lambda: model.train_gates(batches, epochs=1)
