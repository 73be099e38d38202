"""Step 1: fetch (or, with --demo, generate) the images of every task and split them: fire_dataset/, game_dataset/, tasks.json.

--task NAME=SOURCE, once per task, prepares other tasks instead: NAME_dataset/. In a root that has tasks it adds one more.
"""

from pathlib import Path

from common.cli.flags import PreparationConfig
from common.cli.processes import launched
from common.cli.run import run


def main(config: PreparationConfig) -> None:
    """Prepare every task that is asked for, and print what there is."""
    from common.data.prepare import planned, prepare  # here, so that --help is there at once
    from common.tasks import add_tasks

    if launched()[0]:  # one process does it
        return
    tasks = planned(config)
    for task in tasks:
        manifest = prepare(task, config)
        every = add_tasks(config.root, [task] if config.task else tasks)  # at once: a later one may fail
        counts = ", ".join(f"{count} {name}" for name, count in manifest["images"].items())
        print(f"{task.name}: {counts} images of {', '.join(manifest['classes'])}")
        print(f"  from {manifest['source']}, in {Path(config.root) / task.dataset_folder}")
        if manifest["damaged"]:
            print(f"  damaged images left out: {manifest['damaged']}")
        near = manifest["near_duplicates_in_test"]
        print(f"  test images with a near-duplicate in train: {near} of {manifest['images']['test']}"
              f"{'; --split grouped keeps such on one side' if near else ''}")
    if len(every) > len(tasks):
        print(f"{config.root} holds the tasks {', '.join(task.key for task in every)}")


if __name__ == "__main__":
    run(main, PreparationConfig)
