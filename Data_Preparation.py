"""Step 1: fetch (or, with --demo, generate) the images of every task and split them: fire_dataset/, game_dataset/."""

from pathlib import Path

from common.cli.flags import PreparationConfig
from common.cli.run import run
from common.data.prepare import prepare
from common.tasks import TASKS
from common.training.distributed import on_main


@on_main
def main(config: PreparationConfig) -> None:
    """Prepare every task and print what there is."""
    for task in TASKS:
        manifest = prepare(task, config)
        counts = ", ".join(f"{count} {name}" for name, count in manifest["images"].items())
        print(f"{task.name}: {counts} images of {', '.join(manifest['classes'])}")
        print(f"  from {manifest['source']}, in {Path(config.root) / task.dataset_folder}")
        if manifest["damaged"]:
            print(f"  damaged images left out: {manifest['damaged']}")
        near = manifest["near_duplicates_in_test"]
        print(f"  test images with a near-duplicate in train: {near} of {manifest['images']['test']}"
              f"{'; --split grouped keeps such on one side' if near else ''}")


if __name__ == "__main__":
    run(main, PreparationConfig)
