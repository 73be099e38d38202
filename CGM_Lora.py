"""Step 6: one context-gated mixture over all LoRA experts, which is never told the task and answers among all tasks' classes.

Its gates are fitted in closed form to the training images of all tasks and trained on from there; validation images choose.
--passes 2 lets the plain backbone find the expert first; --quick needs no experts: the gates alone answer.
--compare puts the mixture beside the strongest other methods, in CGM_Lora_Comparison.csv and .png.
--add_expert NAME=FOLDER adds the peft LoRA adapter in FOLDER to the finished mixture, by the images of the task NAME alone, and
--add_expert NAME an expert without an adapter; the results are in Results/CGM_Lora_NAME, the mixture it started from stays.
"""

from common.cli.flags import MixtureConfig
from common.cli.run import run


def main(config: MixtureConfig) -> None:
    """Fit the gates, evaluate on the test images of each task, and write the one model."""
    from common import mixture, models  # here, so that --help is there at once
    from common.comparison.compare import compare, forget
    from common.data.tensors import load_task
    from common.results.folder import Results
    from common.tasks import read_tasks

    added = config.added_experts()
    with Results(config, "_".join(["CGM_Lora", *added]), "CGM_Lora") as results:
        processor = models.load_processor(config.model)
        tasks = [load_task(task, config, processor) for task in read_tasks(config.root)]
        experts = dict.fromkeys([*(data.task.key for data in tasks), *added])
        folder = results.folder / "Models" / models.mixture_name([*experts])
        if not results.finished(tasks, **mixture.starts(config, tasks)):
            model = mixture.grow(config, tasks) if added else mixture.build(config, tasks)
            fitted = mixture.fit_gates(model, config, tasks)
            predictions, routes = zip(*(mixture.predict(model, data.test, config) for data in tasks), strict=True)

            trained = models.trainable_parameters(model)
            rows = results.write_joint_test(tasks, predictions, "CGM_Lora", "Context-gated mixture", fitted, trained)
            results.write_history(fitted.history, "CGM_Lora", "Context-gated mixture, all tasks")
            results.write_routing(tasks, routes, "CGM_Lora_Routing", "Routing of the mixture")
            levels = {"grey_levels": {data.task.key: data.grey_levels for data in tasks}}  # for whoever asks it
            models.save(folder, model, processor, results.made_from | levels)
            forget(results)
            results.finish(rows)
        if config.compare:
            compare(config, tasks, mixture.load(folder, config, tasks), results)


if __name__ == "__main__":
    run(main, MixtureConfig)
