"""The mixture: against one adapter, the base model and X-LoRA's loop over adapters."""

from torch import nn

from tests.bench.measure import Benchmark, Case, Ratio, Settings, forward_flops
from tests.bench.setups import beit, experts, images, lora, mixture, peft_lora, training_step, twin
from tests.bench.xlora import XLora

EXPERTS = (2, 8)


def _models(settings: Settings) -> dict[str, nn.Module]:
    """All that is compared, on the same frozen weights."""
    plain = beit(settings)
    found: dict[str, nn.Module] = {"base model": plain, "LoRA, peft": peft_lora(plain), "LoRA, ours": lora(plain)}
    for count in EXPERTS:
        found[f"mixture of {count}"] = mixture(plain, count)
        found[f"X-LoRA loop of {count}"] = XLora(twin(plain), experts(plain, count))
    return found


def training(settings: Settings) -> Benchmark:
    """A training step of the mixture at BEiT-base size, batch 16."""
    count, precision, models = 16, settings.training_precision, _models(settings)
    plain = models.pop("base model")
    batch = images(settings, count, plain)
    flops = 2 * count * forward_flops(plain, batch[0][0])
    cases = [Case(name, training_step(model, batch, settings, precision), count, flops, precision)
             for name, model in models.items()]
    return cases, [
        Ratio("mixture of 2 / one LoRA, peft", "mixture of 2", "LoRA, peft", "<= 1.1"),
        Ratio("mixture of 2 / one LoRA, ours", "mixture of 2", "LoRA, ours"),
        *_against_loop({2: ">= 1.5", 8: ">= 2"}),
    ]


def _against_loop(wanted: dict[int, str]) -> list[Ratio]:
    """wanted: number of experts -> time of X-LoRA's loop over that of the mixture."""
    return [Ratio(f"X-LoRA loop / mixture, {count} experts", f"X-LoRA loop of {count}", f"mixture of {count}", figure)
            for count, figure in wanted.items()]
