"""Step 5: LoRA fine-tuning, one adapter with its head per task, starting from the base models."""

from common import models
from common.config import LoraConfig, run
from common.data import load_task
from common.results import Results
from common.tasks import TASKS
from common.training import evaluate, fit


def main(config: LoraConfig) -> None:
    """Train, evaluate and write one LoRA expert per task."""
    results = Results(config, "Lora_Finetune", "Lora_Finetune")
    processor = models.load_processor(config.model)
    tasks = [load_task(task, config, processor) for task in TASKS]
    if results.finished(tasks):
        return
    rows = []
    for data in tasks:
        base, made_from = models.load_base(config, data)
        model = models.add_lora(base, config.lora_rank, config.lora_alpha, config.seed)
        fitted = fit(model, data.train, data.validation, config, f"LoRA {data.task.key}")
        probabilities, _ = evaluate(model, data.test, config)

        name = f"Lora_{data.task.title}"
        rows.append(results.write_test(data, probabilities, name, "LoRA", fitted, models.trainable_parameters(model)))
        results.write_history(fitted.history, name, f"LoRA, {data.task.name}")
        models.save(models.lora_folder(config, data.task), model, processor, made_from)
    results.finish(rows, tasks)


if __name__ == "__main__":
    run(main, LoraConfig)
