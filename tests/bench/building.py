"""Many experts built from their folders, and their gates solved.

`python -m tests.bench.building FOLDER COUNT QUICK` is the process in which they are built, so that its peak memory is its own.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ContextGatedMOE import ContextGatedMOE
from ContextGatedMOE.experts import solve
from ContextGatedMOE.statistics import Statistics
from tests.bench.data import apart
from tests.bench.measure import Settings
from tests.bench.peak_memory import PeakMemory
from tests.bench.setups import beit, lora

EXPERTS, QUICK_EXPERTS = 256, 16
CLASSES = 10
IMAGES_A_CLASS = 20  # of which statistics are made


def run_building(settings: Settings) -> pd.DataFrame:
    """256 experts of BEiT-base's size from their folders: seconds, peak memory over that of their tensors; then the gates
    from finished statistics of 3 blocks."""
    count = QUICK_EXPERTS if settings.quick else EXPERTS
    with tempfile.TemporaryDirectory(dir=settings.root if settings.root.exists() else None) as folder:
        _save(lora(beit(settings, num_labels=CLASSES)), Path(folder), count)
        return apart("tests.bench.building", folder, str(count), str(int(settings.quick)))


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
    classes = [f"{number}" for number in range(CLASSES)]
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
