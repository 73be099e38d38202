"""Times measured in alternation, the machine's matrix-product rate beside them, and the tables and pictures of both."""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from common.cli.flags import DEMO_BACKBONE, LoraConfig
from common.files import write_csv, writing
from common.training.evaluate import autocast

matplotlib.use("agg")

FP32, BF16 = "fp32", "bf16"
LIMIT = "limit"  # in a ratio: the time of a case's least work at the machine's matrix-product rate


@dataclass
class Settings:
    """How to measure. large: models of BEiT-large's size, not BEiT-base's. quick: tiny ones and one round, to see
    that everything runs. root: a folder for data; output: that of the results. clock: seconds so far. seeds: of what is
    measured more than once for its accuracy. model: the backbone of what is measured on --root. experts: numbers of them, none
    for the benchmark's own."""

    device: torch.device
    repeats: int
    quick: bool
    root: Path
    large: bool = False
    clock: Callable[[], float] = time.perf_counter
    output: Path = Path("bench_results")
    seeds: list[int] = field(default_factory=lambda: [3407])
    model: str = str(DEMO_BACKBONE)
    experts: list[int] = field(default_factory=list)

    @property
    def model_name(self) -> str:
        """What tables call the backbone."""
        return "the demo's" if self.model == str(DEMO_BACKBONE) else Path(self.model).name

    @property
    def training_precision(self) -> str:
        """What `--precision auto` takes on this device."""
        return FP32 if isinstance(autocast(LoraConfig(), self.device), nullcontext) else BF16

    def autocast(self, precision: str) -> AbstractContextManager:
        """The context to compute in at this precision."""
        return torch.autocast(self.device.type, torch.bfloat16) if precision == BF16 else nullcontext()

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


@dataclass
class Case:
    """Something to time. images: how many it computes; flops: the least work that has to be done for them."""

    name: str
    run: Callable[[], object]
    images: int
    flops: float
    precision: str


@dataclass
class Ratio:
    """A comparison of two cases: time of `slower` over time of `faster`, or `LIMIT` over `faster`.

    wanted: the figure that is asked for, such as ">= 2.5", or nothing.
    """

    what: str
    slower: str
    faster: str
    wanted: str = ""
    factor: float = 1.0  # times the time of `slower`


Benchmark = tuple[list[Case], list[Ratio]]


def measure(name: str, cases: list[Case], ratios: list[Ratio], settings: Settings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Time all cases in turn, `settings.repeats` rounds after one to warm up. Returns a table of times and one of ratios.

    A ratio is the median over rounds of the ratio within a round, so that what else the machine does at the time
    changes it little. So is a case's share of the limit.
    """
    gemms = {precision: _gemm(settings, precision) for precision in dict.fromkeys(case.precision for case in cases)}
    timed = [*cases, *gemms.values()]
    seconds: dict[str, list[float]] = {case.name: [] for case in timed}
    for round_number in range(settings.repeats + 1):
        for case in timed:
            settings.synchronise()
            started = settings.clock()
            case.run()
            settings.synchronise()
            if round_number:
                seconds[case.name].append(settings.clock() - started)
    limits = {}
    for case in cases:
        gemm = gemms[case.precision]
        limits[case.name] = [case.flops / gemm.flops * taken for taken in seconds[gemm.name]]
    rows = []
    for case in cases:
        taken, gemm = seconds[case.name], gemms[case.precision]
        rows.append({
            "benchmark": name, "case": case.name, "precision": case.precision, "images": case.images, "rounds": len(taken),
            "seconds": statistics.median(taken), "seconds_low": min(taken), "seconds_high": max(taken),
            "images_per_second": case.images / statistics.median(taken), "gflop": case.flops / 1e9,
            "gflop_per_second": case.flops / 1e9 / statistics.median(taken),
            "gemm_gflop_per_second": gemm.flops / 1e9 / statistics.median(seconds[gemm.name]),
            "of_the_limit": _median_ratio(limits[case.name], taken) if case.flops else float("nan"),
        })
    compared = []
    for ratio in ratios:
        slower = limits[ratio.faster] if ratio.slower == LIMIT else seconds[ratio.slower]
        by_round = sorted(ratio.factor * a / b for a, b in zip(slower, seconds[ratio.faster], strict=True))
        compared.append({"benchmark": name, "what": ratio.what, "ratio": statistics.median(by_round), "low": by_round[0],
                         "high": by_round[-1], "wanted": ratio.wanted})
    return pd.DataFrame(rows), pd.DataFrame(compared)


def _median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def _gemm(settings: Settings, precision: str) -> Case:
    """The product of two large square matrices: the highest rate that a model can hope for."""
    size, times = (128, 1) if settings.quick else (2048, 3) if settings.device.type == "cpu" else (8192, 20)
    dtype = torch.bfloat16 if precision == BF16 else torch.float32
    a, b = torch.randn(2, size, size, device=settings.device, dtype=dtype)

    def run() -> None:
        for _ in range(times):
            a @ b

    return Case(f"matrix product, {precision}", run, 0, 2 * size**3 * times, precision)


@torch.no_grad()
def forward_flops(model: nn.Module, image: Tensor) -> float:
    """Floating-point operations of one image (3, S, S) in one forward pass, matrix products and attention."""
    config = next(module for module in model.modules() if isinstance(module, PreTrainedModel)).config
    before, config._attn_implementation = config._attn_implementation, "eager"  # the fused kernel of CPUs is not counted
    in_place = dict.fromkeys((torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), _added_product_flops)  # nor are these
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(image[None])
    config._attn_implementation = before
    return counter.get_total_flops()


def _added_product_flops(_: torch.Size, a: torch.Size, b: torch.Size, out_shape: torch.Size, **factors: float) -> int:
    """Operations of a sum with the product of matrices, or batches of them, of these shapes: (..., M, K) and (..., K, N)."""
    return 2 * math.prod(a) * b[-1]


# ---- what is written ----


def write(folder: Path, name: str, times: pd.DataFrame, ratios: pd.DataFrame, machine: str) -> None:
    """Write `<name>.csv`, `<name>_ratios.csv` and `<name>.png`."""
    write_csv(folder / f"{name}.csv", times)
    write_csv(folder / f"{name}_ratios.csv", ratios)
    save(folder / f"{name}.png", bars(name, times, machine))


def as_text(times: pd.DataFrame, ratios: pd.DataFrame) -> str:
    """Both tables as people read them."""
    first = pd.DataFrame({
        "case": times["case"], "precision": times["precision"],
        "seconds": [f"{row.seconds:.3f} ({row.seconds_low:.3f} to {row.seconds_high:.3f})" for row in times.itertuples()],
        "images/s": [f"{value:.1f}" for value in times["images_per_second"]],
        "of the limit": ["" if pd.isna(value) else f"{value:.2f}" for value in times["of_the_limit"]],
    }).to_string(index=False)
    if ratios.empty:
        return first
    second = pd.DataFrame({
        "ratio of times": ratios["what"],
        "": [f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})" for row in ratios.itertuples()],
        "wanted": ratios["wanted"],
    }).to_string(index=False)
    return f"{first}\n\n{second}"


def bars(name: str, times: pd.DataFrame, machine: str) -> Figure:
    """Median time per image of every case, with the range over all rounds."""
    figure = Figure(figsize=(9, 1.4 + 0.34 * len(times)), layout="constrained")
    axes = figure.subplots()
    scale = 1e3 / times["images"]
    middle = times["seconds"] * scale
    spread = [middle - times["seconds_low"] * scale, times["seconds_high"] * scale - middle]
    colours = ["tab:blue" if precision == BF16 else "tab:orange" for precision in times["precision"]]
    axes.barh(range(len(times)), middle, xerr=spread, color=colours, error_kw={"linewidth": 0.8, "capsize": 2})
    for index, row in enumerate(times.itertuples()):
        share = "" if pd.isna(row.of_the_limit) else f", {row.of_the_limit:.2f} of the limit"
        axes.annotate(f"{row.images_per_second:.1f} images/s{share}", (row.seconds_high * scale[index], index), (4, 0),
                      textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(times)), [f"{row.case} [{row.precision}]" for row in times.itertuples()], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * (times["seconds_high"] * scale).max())
    axes.set_xlabel("milliseconds per image: median, lowest and highest round")
    axes.set_title(f"{name}\n{machine}", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    return figure


def save(path: Path, figure: Figure) -> None:
    """Write a picture."""
    with writing(path) as part:
        figure.savefig(part, format="png", dpi=150)
