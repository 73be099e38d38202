"""Step 4: full fine-tuning, all weights of the pretrained backbone and a new head, one model per task."""

from common.cli.flags import FinetuneConfig
from common.cli.run import run


def main(config: FinetuneConfig) -> None:
    """Fine-tune, evaluate and write one model per task."""
    from common import models  # here, so that --help is there at once
    from common.data.tensors import load_task
    from common.results.folder import Results
    from common.tasks import read_tasks
    from common.training.evaluate import evaluate
    from common.training.loop import fit
    from common.training.schedule import parameter_groups

    with Results(config, "Finetune", "Finetune") as results:
        processor = models.load_processor(config.model)
        tasks = [load_task(task, config, processor) for task in read_tasks(config.root)]
        rows = []
        for data in results.missing(tasks):
            folder = results.folder / "Models" / f"{data.task.key}_finetune"
            model = models.load_backbone(config.model, data.classes, config.seed)
            fitted = fit(model, data.train, data.validation, config, f"finetune {data.task.key}",
                         parameter_groups(model, config.layer_decay), checkpoint=results.checkpoint(folder.name, data))
            probabilities, _ = evaluate(model, data.test, config)

            name, trained = f"Finetuned_{data.task.title}", models.trainable_parameters(model)
            rows.append(results.write_test(data, probabilities, name, "Full fine-tuning", fitted, trained))
            results.write_history(fitted.history, name, f"Full fine-tuning, {data.task.name}")
            models.save(folder, model, processor, results.made_from_for(data))
        results.finish(rows)


if __name__ == "__main__":
    run(main, FinetuneConfig)
