"""Step 5: LoRA fine-tuning, one adapter with its head per task, starting from the base models.

--expert NAME=ADAPTER takes a finished adapter as the expert of the task NAME; it is checked and evaluated, not trained.
"""

from common.cli.flags import LoraConfig
from common.cli.run import run


def main(config: LoraConfig) -> None:
    """Train or take over, evaluate and write one LoRA expert per task."""
    from common import models  # here, so that --help is there at once
    from common.data.tensors import load_task
    from common.models import lora
    from common.results.folder import Results
    from common.tasks import read_tasks
    from common.training.evaluate import evaluate
    from common.training.loop import fit

    with Results(config, "Lora_Finetune", "Lora_Finetune") as results:
        processor = models.load_processor(config.model)
        tasks = [load_task(task, config, processor) for task in read_tasks(config.root)]
        adapters = lora.read_adapters(config.experts(), [data.task for data in tasks])
        bases = {data.task.key: models.fingerprint(models.base_folder(config, data.task)) for data in tasks}
        fingerprints = {key: adapter.fingerprint for key, adapter in adapters.items()}
        rows = []
        for data in results.missing(tasks, base=bases, adapter=fingerprints):
            folder, fitted = models.lora_folder(config, data.task), None
            name, title = f"Lora_{data.task.title}", f"LoRA, {data.task.name}"
            if data.task.key in adapters:
                model = lora.adopt(config, data, adapters[data.task.key])
            else:
                model = lora.add_lora(models.load_base(config, data), config.lora_rank, config.lora_alpha, config.seed)
                fitted = fit(model, data.train, data.validation, config, f"LoRA {data.task.key}",
                             checkpoint=results.checkpoint(folder.name, data))
                results.write_history(fitted.history, name, title)
            probabilities, _ = evaluate(model, data.test, config)
            trained = models.trainable_parameters(model)
            rows.append(results.write_test(data, probabilities, name, "LoRA", fitted, trained))
            models.save(folder, model, processor, results.made_from_for(data))
        results.finish(rows)


if __name__ == "__main__":
    run(main, LoraConfig)
