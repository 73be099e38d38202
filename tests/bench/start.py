"""The time from a command to its answer: `python -m common.predict` of one image, against importing its libraries."""

import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd

from common.mixture import Batches
from common.models import load_backbone, load_processor, save
from common.training.evaluate import EVALUATION_BATCH
from ContextGatedMOE import ContextGatedMOE
from tests.bench.accuracy import tasks_of
from tests.bench.measure import Settings
from tests.bench.scripts import PROJECT, seconds_of
from tests.bench.setups import experts

IMPORTS = "importing torch and transformers"
COMMANDS = {
    IMPORTS: ["-c", "import torch, transformers"],
    "importing a model class too": ["-c", "import torch; from transformers import BeitForImageClassification"],
    "Benchmark.py --help": [PROJECT / "Benchmark.py", "--help"],
}


def run_start(settings: Settings) -> pd.DataFrame:
    """predict of one image on a mixture of the demo, as a command, against importing torch and transformers, in turn; at most
    2 is wanted."""
    with tempfile.TemporaryDirectory() as folder:
        mixture, image = _mixture(Path(folder), settings), PROJECT / "common" / "demo" / "pictures" / "one_fire.png"
        commands = COMMANDS | {"predict, one image": ["-m", "common.predict", "--mixture", mixture, image]}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(settings.repeats + 1):
            for name, command in commands.items():
                taken = seconds_of([sys.executable, *command], name)
                if number:  # the first reads the files
                    seconds[name].append(taken)
    rows = []
    for name, taken in seconds.items():
        ratios = sorted(own / imports for own, imports in zip(taken, seconds[IMPORTS], strict=True))
        rows.append({"what": name, "seconds": statistics.median(taken), "over_imports": statistics.median(ratios),
                     "low": ratios[0], "high": ratios[-1]})
    return pd.DataFrame(rows)


def _mixture(folder: Path, settings: Settings) -> Path:
    """A saved mixture of the demo's two tasks with random experts, which is opened and asked as one of trained experts is."""
    tasks = tasks_of(settings, settings.seeds[0])
    plain = load_backbone(settings.model, tasks[0].classes, settings.seeds[0]).requires_grad_(False)
    made = [replace(expert, name=data.task.key) for expert, data in zip(experts(plain, len(tasks)), tasks, strict=True)]
    model = ContextGatedMOE(plain, made, {data.task.key: data.classes for data in tasks}).eval()
    model.fit_gates({data.task.key: Batches(data.train, EVALUATION_BATCH) for data in tasks},
                    {data.task.key: Batches(data.validation, EVALUATION_BATCH) for data in tasks})
    save(folder / "mixture", model, load_processor(settings.model), {})
    return folder / "mixture"
