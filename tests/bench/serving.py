"""Serving many vision adapters: images a second where every image of a batch wants another expert, and memory."""

import os
import statistics
from collections.abc import Callable

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.errors import UserError
from common.training.blocks import lora_targets
from ContextGatedMOE import ContextGatedMOE, Expert
from ContextGatedMOE.experts import choose_start
from tests.bench.measure import BF16, FP32, Settings
from tests.bench.setups import RANK, beit, dinov2_small, experts, images, twin
from tests.bench.xlora import XLora

COUNTS, QUICK_COUNTS = (1, 8, 64, 256), (1, 4)
CLASSES, BATCH = 10, 16
CERTAIN = 1e4  # by how much the scores of the expert that an image wants are larger than the others'
SLOW = 4.0  # times the plain base: what takes longer is timed once
TOO_SLOW = 60.0  # times the plain base, as far as can be told from fewer experts: X-LoRA that would take longer is left out
PLAIN, ALL, TOP_1, EVERYWHERE = "plain base", "ours, all experts", "ours, top 1", "ours, top 1 in all blocks"
MIXED, SWITCHED, LOOP = "peft, adapter_names", "peft, set_adapter in turn", "X-LoRA"
METHODS = (PLAIN, ALL, TOP_1, EVERYWHERE, MIXED, SWITCHED, LOOP)
COMPARED = {"over_plain": PLAIN, "over_adapter_names": MIXED}  # columns of ratios of times


def serving(settings: Settings) -> pd.DataFrame:
    """Images a second and memory of 1, 8, 64 and 256 experts of rank 16 (--experts), 16 images a batch that want different
    ones, at BEiT-base's size and DINOv2-small's: ours finds the expert, peft is told it; X-LoRA mixes all in two passes."""
    rows: list[dict[str, object]] = []
    for size, make in (("BEiT-base", beit), ("DINOv2-small", dinov2_small)):
        of_one = 0.0  # how many times as long as the plain base X-LoRA takes, for each expert
        for count in settings.experts or (QUICK_COUNTS if settings.quick else COUNTS):
            for row in _rows(make(settings, num_labels=CLASSES), count, settings, of_one * count > TOO_SLOW):
                row = {"size": size, "experts": count, **row}
                print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
                rows.append(row)
            of_one = rows[-1].get("over_plain", TOO_SLOW) / count
    return pd.DataFrame(rows)


def _rows(plain: PreTrainedModel, count: int, settings: Settings, without_loop: bool) -> list[dict[str, object]]:
    """A row for each method, the last of X-LoRA; those that are left out say why in `note`."""
    made = experts(plain, count)
    inputs = images(settings, BATCH, plain)[0]
    left_out = {LOOP: f"left out: over {TOO_SLOW:.0f} times the plain base"} if without_loop else {}
    if 3 * _mib_of(made) > _room(settings.device):  # of the experts, and of the stacks and heads of two models
        left_out = dict.fromkeys(METHODS[1:], "left out: over half of the memory")
    served = Served(plain, made, inputs, settings, left_out)
    seconds = _timed(served.runs, settings)
    rows = []
    for name in METHODS:
        if name in left_out:
            rows.append({"method": name, "note": left_out[name]})
            continue
        taken = seconds[name]
        row = {"method": name, "rounds": len(taken), "seconds": statistics.median(taken), "seconds_low": min(taken),
               "seconds_high": max(taken), "images_per_second": BATCH / statistics.median(taken), "mib": served.mib[name]}
        for column, other in COMPARED.items():
            ratios = sorted(a / b for a, b in zip(taken, seconds.get(other, []), strict=False))
            row |= {column: statistics.median(ratios), f"{column}_low": ratios[0], f"{column}_high": ratios[-1]} if ratios else {}
        rows.append(row | {"note": ""})
    return rows


def _timed(runs: dict[str, Callable[[], object]], settings: Settings) -> dict[str, list[float]]:
    """Seconds of each in all rounds after one in which all warm up; of slow ones, those of that round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(settings.repeats + 1):
        for name, run in runs.items():
            if number and seconds[name][0] > SLOW * seconds[PLAIN][0]:
                continue
            settings.synchronise()
            started = settings.clock()
            run()
            settings.synchronise()
            seconds[name].append(settings.clock() - started)
    return {name: taken[1:] or taken for name, taken in seconds.items()}


class Served:
    """The ways to serve experts to a batch (B, 3, S, S): `runs`, which return logits, and `mib` that each needs beside the
    plain base; without those that are left out."""

    def __init__(self, plain: PreTrainedModel, made: list[Expert], inputs: Tensor, settings: Settings, left_out: dict[str, str]):
        self.settings, self.inputs = settings, inputs
        self.precision = BF16 if settings.device.type == "cuda" else FP32
        self.wanted = torch.linspace(0, len(made) - 1, len(inputs)).long()
        names = [made[number].name for number in self.wanted.tolist()]
        base = _mib(plain)
        self.runs: dict[str, Callable[[], Tensor]] = {PLAIN: lambda: self.logits(plain.eval())}
        self.mib = {PLAIN: 0.0}
        if ALL not in left_out:
            classes = [f"{number}" for number in range(plain.config.num_labels)]
            ours = ContextGatedMOE(twin(plain), made, {expert.name: classes for expert in made}).to(settings.device).eval()
            want_different(ours, inputs, self.wanted)
            begin = choose_start(ours)
            for name, top_k, start in ((ALL, None, begin), (TOP_1, 1, begin), (EVERYWHERE, 1, 0)):
                self._add(name, ours, base, lambda top_k=top_k, start=start: self._ours(ours, top_k, start))
        if MIXED not in left_out:
            theirs = peft_experts(plain, made)
            self._add(MIXED, theirs, base, lambda: self.logits(theirs, adapter_names=names))
            self._add(SWITCHED, theirs, base, lambda: self._switched(theirs, names))
        if LOOP not in left_out:
            loop = XLora(twin(plain), made).eval()
            self._add(LOOP, loop, base, lambda: self.logits(loop))

    def _add(self, name: str, model: nn.Module, base: float, run: Callable[[], Tensor]) -> None:
        self.runs[name], self.mib[name] = run, _mib(model) - base

    @torch.no_grad()
    def logits(self, model: nn.Module, inputs: Tensor | None = None, **more: object) -> Tensor:
        """Logits of a model, of all images if none are given."""
        with self.settings.autocast(self.precision):
            return model(self.inputs if inputs is None else inputs, **more).logits

    def _ours(self, model: ContextGatedMOE, top_k: int | None, start: int) -> Tensor:
        model.top_k, model.router.start = top_k, start
        return self.logits(model)

    def _switched(self, model: PeftModel, names: list[str]) -> Tensor:
        found: list[Tensor] = [torch.empty(0)] * len(names)
        for name in dict.fromkeys(names):
            rows = [row for row, other in enumerate(names) if other == name]
            model.set_adapter(name)
            for row, logits in zip(rows, self.logits(model, self.inputs[rows]), strict=True):
                found[row] = logits
        return torch.stack(found)


def peft_experts(plain: PreTrainedModel, made: list[Expert]) -> PeftModel:
    """peft's own model of the experts on a twin of the plain one, with the experts' memory."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=lora_targets(plain), modules_to_save=["classifier"])
    model = get_peft_model(twin(plain), config, adapter_name=made[0].name)
    layers = model.base_model.model
    for number, expert in enumerate(made):
        if number:  # as `add_adapter` does, which looks through the whole model for each
            model.peft_config[expert.name] = config
            layers.classifier.update(expert.name)
        for name, (down, up) in expert.updates.items():
            layer = layers.get_submodule(name)
            if number:
                layer.update_layer(expert.name, RANK, RANK, config=config)
            layer.lora_A[expert.name].weight = nn.Parameter(down, requires_grad=False)
            layer.lora_B[expert.name].weight = nn.Parameter(up, requires_grad=False)
        head = layers.classifier.modules_to_save[expert.name]
        head.weight, head.bias = (nn.Parameter(part, requires_grad=False) for part in expert.heads["classifier"])
    return model.eval()


@torch.no_grad()
def want_different(model: ContextGatedMOE, inputs: Tensor, wanted: Tensor) -> None:
    """Set the gates so that every image of the batch has the expert of its number in `wanted`. Raises UserError if it has not."""
    wanted = wanted.to(inputs.device)
    features: dict[str, Tensor] = {}
    with model.router.using(plain=True, features=features):
        model.base_model(inputs)
    asked = F.one_hot(wanted, len(model.expert_names)).double()
    for name, values in features.items():
        score, middle = model.gates()[name].score, values.double().mean(0)
        rows = CERTAIN * (torch.linalg.pinv(values.double() - middle) @ (asked - asked.mean(0))).T  # (E, K)
        score.weight[:: model.sizes[0]], score.bias[:: model.sizes[0]] = rows.float(), -(rows @ middle).float()
    model.top_k = 1
    for model.router.start in (choose_start(model), 0):
        with model.record_gates() as gates:
            model(inputs)
        if any(not torch.equal(weights.argmax(1), wanted) for weights in gates.values()):
            raise UserError("the benchmark's images do not get the experts that they are to want")


def _mib(model: nn.Module) -> float:
    """MiB of a model's tensors, shared ones once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values()) / 2**20


def _mib_of(made: list[Expert]) -> float:
    return sum(down.nbytes + up.nbytes for expert in made for down, up in expert.updates.values()) / 2**20


def _room(device: torch.device) -> float:
    """MiB of half of the memory there is."""
    whole = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return whole / 2 / 2**20


def picture(table: pd.DataFrame, machine: str) -> Figure:
    """Images a second by the number of experts, and memory beside the plain base, for each size."""
    sizes = list(dict.fromkeys(table["size"]))
    figure = Figure(figsize=(5.2 * len(sizes), 7.2), layout="constrained")
    axes = figure.subplots(2, len(sizes), squeeze=False)
    for column, size in enumerate(sizes):
        own = table[(table["size"] == size) & table["seconds"].notna()]
        for method, rows in own.groupby("method", sort=False):
            style = {"marker": "o", "markersize": 4, "color": "black" if method == PLAIN else f"C{METHODS.index(method)}",
                     "linestyle": "--" if method == PLAIN else "-", "label": method}
            axes[0, column].plot(rows["experts"], rows["images_per_second"], **style)
            if method != PLAIN:
                axes[1, column].plot(rows["experts"], rows["mib"].clip(lower=0.1), **style)
        for axis, label in zip(axes[:, column], ("images a second", "MiB beside the plain base"), strict=True):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(sorted(set(own["experts"])), sorted(set(own["experts"])))
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set(xlabel="experts of rank 16", ylabel=label)
            axis.grid(alpha=0.25)
        axes[0, column].set_title(f"{size}'s size, 16 images that want different experts", fontsize=10)
    figure.suptitle(machine, fontsize=9)
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    figure.legend(lines.values(), lines, fontsize=8, loc="outside lower center", ncols=4)
    return figure
