"""Step 3: the pretrained backbone with an untrained head, per task: what a model knows of the classes before training."""

from common.cli.flags import BenchmarkConfig
from common.cli.run import run


def main(config: BenchmarkConfig) -> None:
    """Predict every test split and write predictions and confusion matrices."""
    from common import models  # here, so that --help is there at once
    from common.data.tensors import load_task
    from common.results.folder import Results
    from common.tasks import read_tasks
    from common.training.evaluate import evaluate

    with Results(config, "Benchmark", "Benchmark") as results:
        processor = models.load_processor(config.model)
        tasks = [load_task(task, config, processor) for task in read_tasks(config.root)]
        rows = []
        for data in results.missing(tasks):
            model = models.load_backbone(config.model, data.classes, config.seed)
            probabilities, _ = evaluate(model, data.test, config)
            name = f"Benchmark_{data.task.title}"
            rows.append(results.write_test(data, probabilities, name, "Pretrained, untrained head"))
        results.link("Benchmark_Data")
        results.finish(rows)


if __name__ == "__main__":
    run(main, BenchmarkConfig)
