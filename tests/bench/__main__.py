"""Run the benchmarks: `python -m tests.bench NAME ...`; without a name all of them."""

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

from common.cli.flags import DEMO_BACKBONE, BenchmarkConfig
from common.cli.parser import parse
from common.cli.run import keep_freed_memory
from common.errors import UserError
from common.files import write_csv
from common.training.distributed import device_of
from tests.bench import (
    accuracy,
    building,
    data,
    depths,
    gates,
    lora,
    mixture,
    parts,
    photos,
    preparation,
    processes,
    routing,
    routing_mixture,
    samples,
    scripts,
    serving,
    start,
)
from tests.bench.measure import Settings, as_text, measure, save, write

BENCHMARKS = {
    "lora": lora.epoch, "lora_320": lora.epoch_large, "lora_base": lora.base,
    "mixture_training": mixture.training, "parts": parts.parts, "parts_base": parts.parts_base,
    "evaluation_batch": parts.evaluation_batch, "gates": gates.gates,
}
# Each makes a table of its own.
WHOLE = {"demo": scripts.run_demo, "preparation": preparation.run_preparation, "processes": processes.run_processes,
         "duplicates": data.run_duplicates, "stored": data.run_stored, "building": building.run_building,
         "photos": photos.run_photos, "routing_experts": routing.experts, "routing": routing_mixture.routing,
         "samples": samples.samples, "depths": depths.depths, "time_to_accuracy": accuracy.time_to_accuracy,
         "serving": serving.serving, "statistics": gates.run_statistics, "start": start.run_start}
PICTURES = {"demo": scripts.picture, "samples": samples.picture, "depths": depths.picture, "serving": serving.picture}
ON_ROOT = ["photos", "samples", "depths"]  # they need finished results, depths prepared images


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    names = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or device.type
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if os.path.exists(path) else ""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    listed = "\n".join(f"  {name:18}{' '.join(function.__doc__.split())}" for name, function in (BENCHMARKS | WHOLE).items())
    made = argparse.ArgumentParser(
        "python -m tests.bench", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog=f"benchmarks:\n{listed}",
    )
    made.add_argument("names", nargs="*", metavar="NAME", choices=[[], *BENCHMARKS, *WHOLE],
                      help=f"which to run; all by default, {', '.join(ON_ROOT)} only with --root")
    made.add_argument("--output", type=Path, default=Path("bench_results"),
                      help="folder of tables, pictures and the routing suite's experts (default: %(default)s)")
    made.add_argument("--root", type=Path,
                      help="folder for the demo's images, kept for the next run (default: a temporary one)")
    made.add_argument("--model", default=str(DEMO_BACKBONE),
                      help="backbone of what is measured on --root: a name on the Hub or a folder (default: the demo's)")
    made.add_argument("--repeats", type=int, default=5, help="rounds, after one to warm up (default: %(default)s)")
    made.add_argument("--seeds", type=int, nargs="+", default=[3407], help="seeds of the routing suite (default: 3407)")
    made.add_argument("--experts", type=int, nargs="+", default=[], help="numbers of experts of serving")
    made.add_argument("--device", default="auto", help="auto takes a GPU if there is one; or cpu, cuda (default: %(default)s)")
    made.add_argument("--cpu_time", action="store_true",
                      help="CPU seconds of one thread, for a machine that is busy with other things")
    made.add_argument("--large", action="store_true", help="BEiT-large's size wherever it says BEiT-base's, for a GPU")
    made.add_argument("--quick", action="store_true", help="tiny models and one round, to see that everything runs")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Run, print and write every benchmark that was asked for."""
    options = parser().parse_args(arguments)
    keep_freed_memory()  # as the scripts do; what is compared with them gains by it too
    device = device_of(parse(BenchmarkConfig, ["--device", options.device]))
    if options.cpu_time:
        torch.set_num_threads(1)
    name_of_machine = machine(device) + (", CPU time" if options.cpu_time else "")
    print(name_of_machine)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(device, 1 if options.quick else options.repeats, options.quick, options.root or Path(folder),
                            options.large, time.process_time if options.cpu_time else time.perf_counter, options.output,
                            options.seeds, options.model, options.experts)
        everything = [name for name in (*BENCHMARKS, *WHOLE) if name not in ON_ROOT or options.root]
        for name in options.names or everything:
            print(f"\n== {name} ==", flush=True)
            torch.manual_seed(0)
            if name in WHOLE:
                table = WHOLE[name](settings)
                write_csv(options.output / f"{name}.csv", table)
                print(table.round(3).to_string(index=False), f"\nin all {table['seconds'].sum():.0f} s", flush=True)
                if name in PICTURES:
                    save(options.output / f"{name}.png", PICTURES[name](table, name_of_machine))
                continue
            times, ratios = measure(name, *BENCHMARKS[name](settings), settings)
            write(options.output, name, times, ratios, name_of_machine)
            print(as_text(times, ratios), flush=True)
    print(f"\nTables and pictures are in {options.output}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"tests.bench: {error}")
