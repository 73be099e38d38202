"""Many experts: built from their folders, gates solved, and asked by images each of which wants another expert.

`python -m tests.bench.many FOLDER COUNT QUICK` is the process in which they are built, so that its peak memory is its own.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BeitForImageClassification

from common.errors import UserError
from ContextGatedMOE import ContextGatedMOE
from ContextGatedMOE.experts import solve
from ContextGatedMOE.statistics import Statistics
from tests.bench.data import apart
from tests.bench.measure import FP32, Benchmark, Case, Ratio, Settings, forward_flops
from tests.bench.peak_memory import PeakMemory
from tests.bench.setups import beit, experts, forward, images, lora, training_step, twin

EXPERTS, QUICK_EXPERTS = 256, 16
CLASSES, BATCH = 10, 16
IMAGES_A_CLASS = 20  # of which statistics are made


def _count(settings: Settings) -> int:
    return QUICK_EXPERTS if settings.quick else EXPERTS


def _classes(base: BeitForImageClassification) -> list[str]:
    return [f"{number}" for number in range(base.config.num_labels)]


def many_experts(settings: Settings) -> Benchmark:
    """256 experts of rank 16 and one head over their 2,560 classes at BEiT-base's size, a batch of 16 images that want
    different experts: top 1 and all of them, against the plain base."""
    plain, count, precision = beit(settings, num_labels=CLASSES), _count(settings), settings.training_precision
    made = experts(plain, count)
    model = ContextGatedMOE(twin(plain), made, {expert.name: _classes(plain) for expert in made}).to(settings.device)
    batch = images(settings, BATCH, plain)
    _want_different(model, batch[0])
    flops = BATCH * forward_flops(plain, batch[0][0])
    cases = [Case("base model", forward(plain, batch[0], settings, FP32), BATCH, flops, FP32)]
    for name, top_k in (("top 1", 1), ("all experts", None)):
        cases.append(Case(name, _with(model, top_k, forward(model, batch[0], settings, FP32)), BATCH, flops, FP32))
    step = _with(model, 1, training_step(model, batch, settings, precision))
    cases.append(Case("training step", step, BATCH, 2 * flops, precision))
    return cases, [
        Ratio("inference: top 1 / base model", "top 1", "base model", "<= 1.15"),
        Ratio("inference: all experts / base model", "all experts", "base model"),
        Ratio("training step / base model's inference", "training step", "base model"),
    ]


def _with(model: ContextGatedMOE, top_k: int | None, run: Callable[[], object]) -> Callable[[], object]:
    def chosen() -> None:
        model.top_k = top_k
        run()

    return chosen


@torch.no_grad()
def _want_different(model: ContextGatedMOE, inputs: Tensor) -> None:
    """Set the gates so that every image of the batch has an expert of its own."""
    wanted = torch.linspace(0, len(model.expert_names) - 1, len(inputs)).long()
    features: dict[str, Tensor] = {}
    with model.router.using(plain=True, features=features):
        model.base_model(inputs)
    for name, values in features.items():
        score, rows, middle = model.gates()[name].score, wanted * model.sizes[0], values.mean(0)
        own = 1000 * F.normalize(values - middle, dim=1)
        score.weight[rows], score.bias[rows] = own, -own @ middle
    model.eval()
    model.top_k = 1
    with model.record_gates() as gates:
        model(inputs)
    if any(not torch.equal(weights.argmax(1).cpu(), wanted) for weights in gates.values()):
        raise UserError("the benchmark's images do not get the experts that they are to want")


def run_building(settings: Settings) -> pd.DataFrame:
    """256 experts of BEiT-base's size from their folders: seconds, peak memory over that of their tensors; then the gates
    from finished statistics of 3 blocks."""
    count = _count(settings)
    with tempfile.TemporaryDirectory(dir=settings.root if settings.root.exists() else None) as folder:
        _save(lora(beit(settings, num_labels=CLASSES)), Path(folder), count)
        return apart("tests.bench.many", folder, str(count), str(int(settings.quick)))


def _save(model: nn.Module, folder: Path, count: int) -> None:
    """Write so many adapters of a kind, each with tensors of its own."""
    model.save_pretrained(folder / "0")
    tensors = load_file(folder / "0" / "adapter_model.safetensors")
    for number in range(1, count):
        other = folder / f"{number}"
        other.mkdir()
        (other / "adapter_config.json").write_bytes((folder / "0" / "adapter_config.json").read_bytes())
        save_file({name: torch.randn_like(tensor) for name, tensor in tensors.items()}, other / "adapter_model.safetensors")


def _build(folder: Path, count: int, quick: bool) -> dict[str, float]:
    """Build the mixture of the adapters in a folder, and its gates."""
    base = beit(Settings(torch.device("cpu"), 1, quick, folder), num_labels=CLASSES)
    names = [f"{number}" for number in range(count)]
    memory, started = PeakMemory(), time.perf_counter()
    before = memory.mib()
    classes = _classes(base)
    model = ContextGatedMOE.from_adapters(base, {name: folder / name for name in names}, dict.fromkeys(names, classes))
    seconds, after = time.perf_counter() - started, memory.mib()
    tensors = sum(tensor.nbytes for layer in model.mixture_layers().values() for name, tensor in layer.state_dict().items()
                  if not name.startswith("base.")) / 2**20
    labels = torch.arange(len(classes)).repeat(IMAGES_A_CLASS)
    for name in names:
        model.statistics[name] = {
            layer: Statistics.of(torch.randn(len(labels), gate.feature_count), labels, len(classes)).rounded()
            for layer, gate in model.gates().items()
        }
    started = time.perf_counter()
    solve(model)
    return {"experts": count, "seconds": seconds, "mib_of_tensors": tensors, "mib_on_top": after - before,
            "memory_ratio": (after - before) / tensors, "seconds_of_gates": time.perf_counter() - started}


if __name__ == "__main__":
    print(json.dumps(_build(Path(sys.argv[1]), int(sys.argv[2]), bool(int(sys.argv[3])))))
