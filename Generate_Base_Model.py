"""Step 2: a base model per task, the pretrained backbone with a head fitted to its frozen features."""

import time

from common.cli.flags import BaseModelConfig
from common.cli.run import run


def main(config: BaseModelConfig) -> None:
    """Fit the heads and write the base models, where LoRA and the mixture start."""
    from common import models  # here, so that --help is there at once
    from common.data.tensors import load_task
    from common.results.folder import Results
    from common.results.metrics import predictions_table
    from common.tasks import read_tasks
    from common.training.evaluate import evaluate, features
    from common.training.head import fit_head
    from common.training.loop import fit

    with Results(config, "Base_Models", "Generate_Base_Model") as results:
        processor = models.load_processor(config.model)
        tasks = [load_task(task, config, processor) for task in read_tasks(config.root)]
        rows = []
        for data in results.missing(tasks):
            name = f"{data.task.key}_base"
            checkpoint = results.checkpoint(name, data)
            model = models.load_backbone(config.model, data.classes, config.seed)
            head, started = model.classifier, time.perf_counter()
            train, validation = (features(model, part, config) for part in (data.train, data.validation))
            through_backbone = time.perf_counter() - started
            if config.learning_rate is None:
                fitted = fit_head(head, train, validation, config)
            else:
                fitted = fit(head, train, validation, config, f"base {data.task.key}", checkpoint=checkpoint)
            fitted.seconds += through_backbone
            probabilities, _ = evaluate(head, features(model, data.test, config), config)

            table = predictions_table(probabilities, data.test.labels.numpy(), data.classes)
            rows.append(results.row(data, table, fitted, models.trainable_parameters(head)))
            models.save(models.base_folder(config, data.task), model, processor, results.made_from_for(data))
            results.write_table(f"{name}_History.csv", fitted.history)
        results.finish(rows)


if __name__ == "__main__":
    run(main, BaseModelConfig)
