"""Base models: heads trained on features computed once, against training through the backbone at every epoch."""

from common.cli.flags import BaseModelConfig
from common.cli.parser import parse
from common.training.evaluate import features
from tests.bench.lora import prepared_task, quiet_fit
from tests.bench.measure import FP32, Benchmark, Case, Ratio, Settings, forward_flops
from tests.bench.setups import demo_backbone, images, twin


def heads(settings: Settings) -> Benchmark:
    """A base model of the demo, 10 epochs, validation included: on cached features against through the backbone."""
    task = prepared_task(settings)
    epochs = 1 if settings.quick else 10
    config = parse(BaseModelConfig, ["--demo", "--root", str(settings.root), "--epochs", str(epochs), "--augment", "False", "--learning_rate", "2e-4",
                                     "--device", str(settings.device)])
    model = demo_backbone(settings)
    model.classifier.requires_grad_(True)
    through, seen = twin(model), len(task.train) + len(task.validation)
    flops = seen * forward_flops(model, images(settings, 1, model)[0][0])

    def cached() -> None:
        train, validation = features(model, task.train, config), features(model, task.validation, config)
        quiet_fit(model.classifier, train, validation, config)

    cases = [
        Case("cached features", cached, epochs * seen, flops, FP32),
        Case("through the backbone", lambda: quiet_fit(through, task.train, task.validation, config), epochs * seen, flops,
             settings.training_precision),
    ]
    wanted = "" if settings.quick else ">= 6"
    return cases, [Ratio("through the backbone / cached features", cases[1].name, cases[0].name, wanted)]
