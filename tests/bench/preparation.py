"""A large folder of images prepared, in a process of its own: images a second, cores in use, peak memory.

`python -m tests.bench.preparation SOURCE ROOT` is that process: it prepares the video games from the folder SOURCE.
"""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from common.cli.flags import PreparationConfig
from common.cli.parser import parse
from common.data.prepare import prepare
from common.errors import UserError
from common.tasks import DOCUMENTED
from tests.bench.measure import Settings
from tests.bench.scripts import PROJECT

SIZE = (640, 360)  # width and height of the frames of Gameplay_Images
IMAGES, QUICK_IMAGES, CLASSES = 10_000, 40, 4


def run_preparation(settings: Settings) -> pd.DataFrame:
    """Data_Preparation of 10,000 images of 640 x 360: images a second, cores in use, peak memory. One round."""
    count = QUICK_IMAGES if settings.quick else IMAGES
    with tempfile.TemporaryDirectory() as top:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            sizes = list(pool.map(lambda number: make(Path(top) / "source", number), range(count)))
        command = [sys.executable, "-m", "tests.bench.preparation", f"{top}/source", f"{top}/root"]
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        errors = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    if status:
        raise UserError(f"the preparation ended with status {os.waitstatus_to_exitcode(status)}: {errors.strip()}")
    return pd.DataFrame([{
        "images": count, "width": SIZE[0], "height": SIZE[1], "mib_of_images": sum(sizes) / 2**20, "seconds": seconds,
        "images_per_second": count / seconds, "cores": (used.ru_utime + used.ru_stime) / seconds,
        "peak_memory_mib": used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),  # bytes there, KiB elsewhere
    }])


def make(folder: Path, number: int) -> int:
    """Write a PNG like no other: a few coloured areas under fine noise. Returns its size in bytes."""
    rng = np.random.default_rng(number)
    areas = Image.fromarray(rng.integers(0, 256, (9, 16, 3), dtype=np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    noisy = np.asarray(areas, np.int16) + rng.integers(-3, 4, (SIZE[1], SIZE[0], 1), dtype=np.int16)
    path = folder / f"class {number % CLASSES}" / f"{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)
    return path.stat().st_size


def main(source: str, root: str) -> None:
    """Prepare all images of the folder `source` as the video games of `root`."""
    task = DOCUMENTED[1]
    prepare(task, parse(PreparationConfig, ["--root", root, "--game_source", source, "--images_per_class", "all"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
