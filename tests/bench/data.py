"""Data that do not fit into memory: near-duplicates among many hashes, and training from images on disk.

`python -m tests.bench.data NAME ...` is the process in which one of the two is measured, so that its peak memory is its own.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from common.data import duplicates, pixels
from common.data.duplicates import BITS_BYTES, HASH_BYTES
from common.data.tensors import ImageSet
from common.errors import UserError
from tests.bench.lora import quiet_fit, recipe
from tests.bench.measure import Settings
from tests.bench.scripts import PROJECT
from tests.bench.setups import beit, lora

MODULE = "tests.bench.data"  # whose main part is a process
HASHES, QUICK_HASHES = 70_000, 500
IMAGES, QUICK_IMAGES = 20_000, 200  # 3 GB of 224 x 224 pixels
IN_A_ROUND, QUICK_IN_A_ROUND = 64, 8  # images trained on
AT_ONCE = 100  # images read or written together


def run_duplicates(settings: Settings) -> pd.DataFrame:
    """Groups of near-duplicates among 70,000 hashes, all of nearly the same mean colour: seconds, and memory on top."""
    return apart(MODULE, "duplicates", str(QUICK_HASHES if settings.quick else HASHES))


def run_stored(settings: Settings) -> pd.DataFrame:
    """LoRA training (BEiT-base's width, 2 blocks) on 3 GB of pixels on disk / in memory; memory on top of the model's."""
    count = QUICK_IMAGES if settings.quick else IMAGES
    path = settings.root / "pixels.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    rng, size = np.random.default_rng(0), 64 if settings.quick else 224

    def batches() -> Iterator[tuple[torch.Tensor, list[int]]]:
        for _ in range(count // AT_ONCE):
            yield torch.from_numpy(rng.integers(0, 256, (AT_ONCE, 3, size, size), dtype=np.uint8)), [0] * AT_ONCE

    pixels.write(path, {"train": count}, batches(), "benchmark")
    try:
        return apart(MODULE, "stored", str(path), str(count), str(settings.repeats), str(settings.device),
                     *["quick"] * settings.quick)
    finally:
        path.unlink()


def apart(module: str, *arguments: str) -> pd.DataFrame:
    """What a module of the benchmarks, run as a process of its own, writes as its last line."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=PROJECT, capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise UserError(f"the benchmark ended with status {done.returncode}: {done.stderr.strip()}")
    return pd.DataFrame([json.loads(done.stdout.splitlines()[-1])])


def measure_duplicates(count: int) -> dict[str, float]:
    """Random hashes, a quarter of them near-duplicates of others, some mirrored."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (count, HASH_BYTES), dtype=np.uint8)
    copies = count // 4
    hashes[-copies:] = hashes[:copies]
    hashes[-copies:, :BITS_BYTES] ^= np.packbits(rng.random((copies, 8 * BITS_BYTES)) < 0.1, axis=1)
    hashes[-copies // 2 :, BITS_BYTES // 2 : BITS_BYTES] ^= 255
    hashes[:, BITS_BYTES:] = rng.integers(110, 130, (count, HASH_BYTES - BITS_BYTES))
    before, started = _peak(), time.perf_counter()
    found = duplicates.groups(hashes)
    return {"hashes": count, "groups": len(np.unique(found)), "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time(), "mib_on_top": _peak() - before}


def measure_stored(path: Path, count: int, settings: Settings) -> dict[str, float]:
    """Rounds of training on other images each, once from disk and once from memory, and one pass over all images."""
    model, config = lora(beit(settings, num_hidden_layers=2)), recipe(settings)
    stored, labels = pixels.read(path, {"train": count}, "benchmark")["train"]
    scale, offset = torch.full((3,), 2 / 255), torch.full((3,), -1.0)
    on_disk = ImageSet(stored, labels, scale, offset)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    in_a_round = QUICK_IN_A_ROUND if settings.quick else IN_A_ROUND

    def seconds(data: ImageSet, number: int) -> float:
        rows = order[number * in_a_round : (number + 1) * in_a_round]
        started = time.perf_counter()
        quiet_fit(model, data.take(rows), data.take(rows[:4]), config)
        return time.perf_counter() - started

    seconds(on_disk, 0)  # so that the weights and activations of the model are in memory
    before = _peak()
    for rows in order.split(AT_ONCE):
        on_disk.batch(rows)
    seconds(on_disk, 1)
    on_top = _peak() - before
    in_memory = ImageSet(stored[:], labels, scale, offset)
    rounds = [(seconds(on_disk, number), seconds(in_memory, number)) for number in range(2, 2 + settings.repeats)]
    ratios = sorted(memory / disk for disk, memory in rounds)
    return {"images": count, "gb": stored.nbytes / 1e9, "seconds": statistics.median(disk for disk, _ in rounds),
            "seconds_in_memory": statistics.median(memory for _, memory in rounds), 
            "speed_of_memory": statistics.median(ratios), "low": ratios[0], "high": ratios[-1], "mib_on_top": on_top}


def _peak() -> float:
    """MiB that this process has held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main(name: str, *arguments: str) -> None:
    """Measure and print."""
    if name == "duplicates":
        measured = measure_duplicates(int(arguments[0]))
    else:
        path, count, repeats, device, *quick = arguments
        settings = Settings(torch.device(device), int(repeats), bool(quick), Path(path).parent)
        measured = measure_stored(Path(path), int(count), settings)
    print(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
