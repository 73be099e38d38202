"""Step 4: full fine-tuning, all weights of the pretrained backbone and a new head, one model per task."""

from common import models
from common.config import FinetuneConfig, run
from common.data import load_task
from common.files import provenance
from common.results import Results
from common.tasks import TASKS
from common.training import evaluate, fit, layer_decay_groups


def main(config: FinetuneConfig) -> None:
    """Fine-tune, evaluate and write one model per task."""
    results = Results(config, "Finetune", "Finetune")
    processor = models.load_processor(config.model)
    tasks = [load_task(task, config, processor) for task in TASKS]
    if results.finished(tasks):
        return
    rows = []
    for data in tasks:
        model = models.load_backbone(config.model, data.classes, config.seed)
        made_from = provenance(data=data.fingerprint, backbone=models.backbone_fingerprint(model), model=config.model)
        groups = layer_decay_groups(model, config.layer_decay)
        fitted = fit(model, data.train, data.validation, config, f"finetune {data.task.key}", groups)
        probabilities, _ = evaluate(model, data.test, config)

        name = f"Finetuned_{data.task.title}"
        rows.append(results.write_test(data, probabilities, name, "Full fine-tuning", fitted, models.trainable_parameters(model)))
        results.write_history(fitted.history, name, f"Full fine-tuning, {data.task.name}")
        models.save(results.folder / "Models" / f"{data.task.key}_finetune", model, processor, made_from)
    results.finish(rows, tasks)


if __name__ == "__main__":
    run(main, FinetuneConfig)
