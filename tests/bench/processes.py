"""Training by two processes with one thread each, against one process with two threads."""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.bench.measure import Settings
from tests.bench.scripts import PROJECT

STEPS, IMAGES = 6, 16  # of one round; the first step is not counted


def run_processes(settings: Settings) -> pd.DataFrame:
    """A LoRA step on 16 images at BEiT-base's size: two gloo processes with one thread each against one process with two
    threads, in turn; at most 1.15 times the time is wanted."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(settings.repeats):
        for number in seconds:
            seconds[number].append(_step(number, settings))
    ratios = sorted(two / one for one, two in zip(seconds[1], seconds[2], strict=True))
    return pd.DataFrame([
        {"case": case, "rounds": settings.repeats, "seconds": statistics.median(values), "seconds_low": min(values),
         "seconds_high": max(values), "ratio": ratio, "ratio_low": low, "ratio_high": high}
        for case, values, ratio, low, high in (
            ("one process, two threads", seconds[1], 1.0, 1.0, 1.0),
            ("two processes, one thread each", seconds[2], statistics.median(ratios), ratios[0], ratios[-1]))])


def _step(number: int, settings: Settings) -> float:
    """Median seconds of a training step by so many processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "seconds.json"
        started = []
        for rank in range(number):
            together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": number, "RANK": rank,
                        "LOCAL_WORLD_SIZE": number, "LOCAL_RANK": rank} if number > 1 else {}
            environment = {**os.environ, **{key: str(value) for key, value in together.items()},
                           "OMP_NUM_THREADS": str(2 // number)}
            command = [sys.executable, "-m", "tests.bench.processes", str(int(settings.quick)), result]
            started.append(subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=subprocess.DEVNULL))
        if any([process.wait() for process in started]):
            raise RuntimeError("a process of the benchmark has failed")
        return statistics.median(json.loads(result.read_text(encoding="utf-8")))


def _train(quick: bool, result: Path) -> None:
    """One of the processes: train, and let the first write how long each step took."""
    from common.cli.flags import LoraConfig
    from common.cli.processes import join
    from common.data.tensors import ImageSet
    from common.training.distributed import rank
    from common.training.loop import fit
    from tests.bench.setups import beit, images, lora

    join("cpu")
    model = lora(beit(Settings(torch.device("cpu"), 1, quick, Path())))
    inputs, labels = images(Settings(torch.device("cpu"), 1, quick, Path()), IMAGES, model)
    data = ImageSet(inputs.repeat(STEPS, 1, 1, 1), labels.repeat(STEPS))
    config = LoraConfig(device="cpu", epochs=1, batch_size=IMAGES, accumulation_steps=1, precision="fp32")
    stamps = []
    register_optimizer_step_post_hook(lambda *_: stamps.append(time.perf_counter()))
    fit(model, data, ImageSet(inputs[:2], labels[:2]), config, "step")
    if rank() == 0:
        result.write_text(json.dumps([after - before for before, after in zip(stamps, stamps[1:], strict=False)]))


if __name__ == "__main__":
    _train(bool(int(sys.argv[1])), Path(sys.argv[2]))
