"""Step 6: one context-gated mixture over all LoRA experts; only its gates are trained, and it is never told the task.

--compare puts it beside single experts, merges, Arrow routing and joint training, in CGM_Lora_Comparison.csv and .png.
--add_expert NAME=FOLDER starts from the finished mixture, adds the peft LoRA adapter in FOLDER as one more expert and trains
the gates again, on the images of all tasks; the results are in Results/CGM_Lora_NAME, the mixture it started from stays.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from common.cli.flags import MixtureConfig
from common.cli.run import run

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from common.data.tensors import TaskData
    from common.results.folder import Results

COMPARISON = "CGM_Lora_Comparison"


def main(config: MixtureConfig) -> None:
    """Train the gates on all tasks together, evaluate on each, and write the one model."""
    from common import models  # here, so that --help is there at once
    from common.comparison import methods, mixture
    from common.data.tensors import load_task
    from common.results import plotting
    from common.results.folder import Results
    from common.tasks import read_tasks

    added = config.added_experts()
    with Results(config, "_".join(["CGM_Lora", *added]), "CGM_Lora") as results:
        processor = models.load_processor(config.model)
        tasks = [load_task(task, config, processor) for task in read_tasks(config.root)]
        adapters = {data.task.key: models.lora_folder(config, data.task) for data in tasks} | added
        folder = results.folder / "Models" / mixture.mixture_name(list(adapters))
        starts = {"experts": {name: models.fingerprint(adapter) for name, adapter in adapters.items()}}
        if added:
            starts["start"] = {"mixture": models.fingerprint(mixture.start_folder(config))}
        if not results.finished(tasks, **starts):
            make(config, tasks, results, processor, folder)
        if config.compare:
            table = methods.compare(config, tasks, mixture.load(folder, config, tasks), mixture.build, mixture.train,
                                    results.checkpoint)
            results.write_table(f"{COMPARISON}.csv", table)
            plotting.comparison(results.folder / f"{COMPARISON}.png", table, results.title("One model for all tasks"))
            shown = table[["method", "task", "accuracy_mean", "accuracy_spread", "mcnemar_p"]]
            print(shown.to_string(index=False, float_format="{:.3g}".format))


def make(config: MixtureConfig, tasks: "list[TaskData]", results: "Results", processor: "BaseImageProcessor",
         folder: Path) -> None:
    """Train the mixture and write it into `folder`, and its predictions and routing beside that."""
    import pandas as pd

    from common import models
    from common.comparison import mixture
    from common.files import remove
    from common.results import plotting

    model = mixture.grow(config, tasks) if config.add_expert else mixture.build(config, tasks)
    fitted = mixture.train(model, config, tasks, results.checkpoint(folder.name))
    rows, routes = [], []
    for data in tasks:
        probabilities, by_image, by_layer = mixture.predict(model, data.test, config)
        rows.append(results.write_test(
            data, probabilities, f"CGM_Lora_{data.task.title}", "Context-gated mixture", fitted,
            models.trainable_parameters(model), gates=dict(zip(model.expert_names, by_image.T, strict=True)),
        ))
        by_layer.insert(0, "Task", data.task.name)
        routes.append(by_layer)
    results.write_history(fitted.history, "CGM_Lora", "Context-gated mixture, all tasks")
    routing = pd.concat(routes)
    results.write_table("CGM_Lora_Routing.csv", routing)
    plotting.routing(results.folder / "CGM_Lora_Routing.png", routing, results.title("Routing of the mixture"))
    classes = {data.task.key: data.classes for data in tasks}
    models.save(folder, model, processor, {**results.made_from, "classes": classes})
    for ending in (".csv", ".png"):
        remove(results.folder / f"{COMPARISON}{ending}")  # one from before was of another mixture
    results.finish(rows)


if __name__ == "__main__":
    run(main, MixtureConfig)
