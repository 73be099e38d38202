"""Fitting the gates of a mixture of finished experts, against one pass of the plain backbone; what their statistics take."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from transformers import PreTrainedModel

from common.cli.flags import DEMO_BACKBONE, MixtureConfig
from common.data.tensors import ImageSet, TaskData
from common.errors import UserError
from common.mixture import Batches
from common.models import load_backbone, lora_folder
from common.training.evaluate import EVALUATION_BATCH
from ContextGatedMOE import ContextGatedMOE, Expert, read_expert
from ContextGatedMOE.saving import STATISTICS_FILE
from ContextGatedMOE.statistics import Statistics
from tests.bench.accuracy import config_of, tasks_of
from tests.bench.measure import FP32, Benchmark, Case, Ratio, Settings
from tests.bench.setups import beit, experts, twin

OF_THE_DEMO = 8  # experts, each with the images of one of the demo's tasks
MANY, QUICK_MANY, CLASSES, IMAGES_A_CLASS = 64, 3, 10, 20  # of which statistics are kept
WANTED = {"finished": "<= 2.5", "without adapters": "<= 1.5"}


def gates(settings: Settings) -> Benchmark:
    """Gates of 8 experts of the demo, or of the finished experts of --root on --model, and without their adapters: fitted in
    closed form, and trained on as CGM_Lora.py does, against one pass of the plain backbone over the same images."""
    config, tasks = config_of(MixtureConfig, settings, settings.seeds[0]), tasks_of(settings, settings.seeds[0])
    plain = load_backbone(settings.model, tasks[0].classes, config.seed).to(settings.device).requires_grad_(False).eval()
    if settings.model == str(DEMO_BACKBONE):
        finished = experts(plain, OF_THE_DEMO)
        data = {expert.name: tasks[number % len(tasks)] for number, expert in enumerate(finished)}
    else:
        data = {task.task.key: task for task in tasks}
        missing = [name for name, own in data.items() if not lora_folder(config, own.task).is_dir()]
        if missing:
            raise UserError(f"gates needs a --root with finished experts; that of {missing[0]} is missing")
        finished = [read_expert(plain, name, lora_folder(config, own.task)) for name, own in data.items()]
    images = [part for own in data.values() for part in (own.train, own.validation)]
    count = sum(len(part) for part in images)
    cases, ratios = [Case("plain backbone, one pass", _pass(plain, images), count, 0, FP32)], []
    for kind, made in (("finished", finished), ("without adapters", [Expert(name) for name in data])):
        for epochs, how in ((0, "closed form"), (config.epochs, f"trained {config.epochs} epochs on")):
            name = f"{len(data)} experts {kind}, {how}"
            cases.append(Case(name, _fit(plain, made, data, epochs), count, 0, FP32))
            ratios.append(Ratio(f"{name} / one pass", name, cases[0].name, "" if epochs else WANTED[kind]))
    return cases, ratios


def _pass(model: PreTrainedModel, images: list[ImageSet]) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        for part in images:
            for inputs, _ in Batches(part, EVALUATION_BATCH):
                model(inputs.to(model.device))

    return run


def _fit(plain: PreTrainedModel, made: Sequence[Expert], data: dict[str, TaskData], epochs: int) -> Callable[[], object]:
    model = ContextGatedMOE(twin(plain), made, {name: own.classes for name, own in data.items()}).eval()
    return lambda: model.fit_gates({name: Batches(own.train, EVALUATION_BATCH) for name, own in data.items()},
                                   {name: Batches(own.validation, EVALUATION_BATCH) for name, own in data.items()}, epochs=epochs)


def run_statistics(settings: Settings) -> pd.DataFrame:
    """What the statistics of 64 experts with ten classes at BEiT-base's width take in memory and on disk, MiB of an expert, with
    gates wherever they may stand; at most 15 on disk are wanted."""
    started, count = time.perf_counter(), QUICK_MANY if settings.quick else MANY
    names, classes = [f"{number}" for number in range(count)], [f"{number}" for number in range(CLASSES)]
    model = ContextGatedMOE.from_adapters(beit(settings), dict.fromkeys(names), dict.fromkeys(names, classes))
    labels = torch.arange(CLASSES).repeat(IMAGES_A_CLASS)
    for name in names:
        model.statistics[name] = {gate: Statistics.of(torch.randn(len(labels), own.feature_count), labels, CLASSES).rounded()
                                  for gate, own in model.gates().items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        on_disk = (Path(folder) / STATISTICS_FILE).stat().st_size
    in_memory = sum(tensor.nbytes for own in model.statistics.values() for statistics in own.values()
                    for tensor in vars(statistics).values())
    return pd.DataFrame([{"experts": count, "classes": CLASSES, "gates": len(model.gates()),
                          "features": max(gate.feature_count for gate in model.gates().values()),
                          "mib_in_memory": in_memory / count / 2**20, "mib_on_disk": on_disk / count / 2**20,
                          "seconds": time.perf_counter() - started}])
