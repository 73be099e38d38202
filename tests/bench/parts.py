"""What was done for speed, each thing on and off: kept because it pays, or left out because it does not."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from common.cli.flags import BenchmarkConfig
from common.cli.parser import parse
from common.cli.run import keep_freed_memory
from common.data.tensors import ImageSet
from common.training import evaluate as evaluation
from tests.bench.measure import FP32, Benchmark, Case, Ratio, Settings, forward_flops
from tests.bench.setups import beit, demo_backbone, forward, images, lora, peft_lora, training_step, twin


def parts(settings: Settings) -> Benchmark:
    """Single speed-ups on and off: attention, LoRA layers, AdamW, position bias, malloc; demo backbone, batch 32."""
    return _on_and_off(demo_backbone(settings), demo_backbone(settings, "sdpa"), 32, settings)


def parts_base(settings: Settings) -> Benchmark:
    """The same at BEiT-base's width with 2 blocks, batch 16."""
    return _on_and_off(beit(settings, num_hidden_layers=2), beit(settings, "sdpa", num_hidden_layers=2), 16, settings)


def _on_and_off(base: nn.Module, sdpa: nn.Module, count: int, settings: Settings) -> Benchmark:
    precision, batch = settings.training_precision, images(settings, count, base)
    flops = 2 * count * forward_flops(base, batch[0][0])
    everything = {name: copy.deepcopy(model).requires_grad_(True) for name, model in
                  (("ours", base), ("foreach", base), ("sdpa", sdpa))}

    def step(name: str, model: nn.Module, share: float = 1.0, **optimizer: bool) -> Case:
        return Case(name, training_step(model, batch, settings, precision, **optimizer), count, share * flops, precision)

    ours = lora(base)
    cases = [
        step("LoRA step, ours", ours), step("LoRA step, the fused attention everywhere", lora(sdpa)),
        step("LoRA step, peft's layers", peft_lora(base)), step("LoRA step, foreach AdamW", lora(base), foreach=True),
        step("LoRA step, position bias computed once", lora(without_bias_computation(twin(base)))),
        Case("LoRA step, memory given back", giving_back(training_step(ours, batch, settings, precision)), count, flops,
             precision),
        step("all weights, ours", everything["ours"], 1.5),
        step("all weights, foreach AdamW", everything["foreach"], 1.5, foreach=True),
        step("all weights, the fused attention everywhere", everything["sdpa"], 1.5),
        Case("inference, LoRA", forward(ours, batch[0], settings, FP32), count, flops / 2, FP32),
        Case("inference, LoRA merged", forward(merged(lora(base)), batch[0], settings, FP32), count, flops / 2, FP32),
    ]
    ratios = [Ratio(f"{other.name} / ours", other.name, own.name)
              for own, others in ((cases[0], cases[1:6]), (cases[6], cases[7:9])) for other in others]
    ratios.append(Ratio("inference: LoRA / LoRA merged", "inference, LoRA", "inference, LoRA merged"))
    return cases, ratios


GLIBC_KEEPS = 32 * 2**20  # bytes, the largest piece that glibc comes to keep if it is not told to


def giving_back(run: Callable[[], None]) -> Callable[[], None]:
    """The same work while malloc gives large pieces back to the kernel."""

    def run_so() -> None:
        keep_freed_memory(GLIBC_KEEPS)
        run()
        keep_freed_memory()

    return run_so


def without_bias_computation(model: nn.Module) -> nn.Module:
    """Replace every block's computation of the position bias by its result: what caching it would save."""
    for layer in model.beit.layers:
        bias = layer.relative_position_bias(layer.relative_position_bias.window_size).detach()
        layer.relative_position_bias = _Constant(bias)
    return model


class _Constant(nn.Module):
    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = value

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        return self.value


def merged(model: nn.Module) -> nn.Module:
    """The adapter merged into a twin's weights: the base keeps its own."""
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.weight = nn.Parameter(module.base_layer.weight.clone(), requires_grad=False)
    model.merge_adapter()
    return model


def evaluation_batch(settings: Settings) -> Benchmark:
    """Evaluation of 256 images on the demo backbone in batches of 16 to 256."""
    model, count = demo_backbone(settings), 16 if settings.quick else 256
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)
    data = ImageSet(pixels, torch.zeros(count, dtype=torch.long), torch.full((3,), 2 / 255), torch.full((3,), -1.0))
    config = parse(BenchmarkConfig, ["--demo", "--device", str(settings.device)])
    flops = count * forward_flops(model, images(settings, 1, model)[0][0])

    def evaluate(size: int) -> None:
        before, evaluation.EVALUATION_BATCH = evaluation.EVALUATION_BATCH, size
        evaluation.evaluate(model, data, config)
        evaluation.EVALUATION_BATCH = before

    cases = [Case(f"batches of {size}", lambda size=size: evaluate(size), count, flops, FP32) for size in (16, 64, 256)]
    return cases, [Ratio(f"batches of {size} / of 64", f"batches of {size}", "batches of 64") for size in (16, 256)]
