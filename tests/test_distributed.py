"""Tests of several processes at work on one run, as `accelerate launch` starts them: here two, over gloo, on CPUs."""

import itertools

import numpy as np
import pandas as pd
import pytest
from kill_resume import NEEDED, differences
from pipeline import files_in, hashes
from safetensors.numpy import load_file

from common.training import distributed

pytest_plugins = ["warm_process"]

SHARED = ["--precision", "fp32", "--epochs", "1"]
# Flags of each script. Batches of 7 images in training and of 3 in evaluation: neither these nor the steps come out even.
FLAGS = {
    "Finetune": [*SHARED, "--batch_size", "7", "--gradient_checkpointing"],
    "Lora_Finetune": [*SHARED, "--batch_size", "23", "--largest_batch"],  # a step of 1 image remains
    # By small steps: where a gradient is hardly more than rounding, Adam makes a whole one, in another direction.
    "CGM_Lora": [*SHARED, "--batch_size", "7", "--learning_rate", "1e-4"],
}
UNEVEN = {"common.training.evaluate.EVALUATION_BATCH": 3}


@pytest.fixture(scope="module")
def both(tmp_path_factory, workspace, warm_process):
    """Where one process has run the scripts that compute, and where two have."""
    places = []
    for number in (1, 2):
        root = tmp_path_factory.mktemp(f"by_{number}")
        places.append(workspace.copy(root, "fire_dataset", "game_dataset", "tasks.json", "Results/Base_Models"))
        for script, flags in FLAGS.items():
            done = warm_process.run(f"{script}.py", *places[-1].flags(script, *flags), processes=number, constants=UNEVEN)
            assert (done.status, done.errors) == (0, "")
            assert done.output.count("Results are in") == 1  # one of them speaks
    return places


def test_two_processes_predict_every_image_once_in_order_as_one(both):
    for method, title in itertools.product(FLAGS, ["Fire_Risk", "Game"]):
        one, two = (place.predictions(method, title) for place in both)
        assert list(one) == list(two)
        assert one["Image"].equals(two["Image"]) and one["Actual Class"].equals(two["Actual Class"])
        numbers = [name for name in one if name.startswith(("Probability", "Gate"))]
        # The closed-form fit of the gates inverts a covariance: rounding of sums in another order grows with its condition.
        assert np.allclose(one[numbers], two[numbers], atol=1e-4 if method == "CGM_Lora" else 1e-5), (method, title)
    counted = ["method", "task", "accuracy", "trainable_parameters"]
    one, two = (place.summary() for place in both)
    assert one[counted].equals(two[counted])
    seen = [table["seconds"] * table["images_per_second"] for table in (one, two)]
    assert np.allclose(*seen, rtol=1e-3, equal_nan=True)


def test_two_processes_train_as_one_and_leave_the_same_files(both):
    """On the same images, in the same order, moved alike: all that differs is the order in which numbers are added up.

    Where a gradient is hardly more than that, as of a few gates', Adam makes a step of it all the same.
    """
    assert files_in(both[0].root) == files_in(both[1].root)
    for name in files_in(both[0].results):
        tolerance = 1e-4 if name.startswith("CGM_Lora") else 1e-5  # the search for the head's numbers ends a little elsewhere
        if name.endswith(".safetensors"):
            one, two = (load_file(place.results / name) for place in both)
            for key, values in one.items():  # rounding is relative: the gates' scores are in the hundreds
                assert np.abs(values - two[key]).max() <= tolerance * max(1, np.abs(values).max()), (name, key)
        elif name.endswith("_History.csv"):
            one, two = (pd.read_csv(place.results / name) for place in both)
            assert np.allclose(one, two, atol=tolerance, equal_nan=True), (name, one - two)


def test_two_processes_of_which_one_is_killed_end_with_one_line_and_go_on_where_they_were(warm_process, both, tmp_path):
    """Then they have the results of a run that was not killed, and running them again is of no effect."""
    place = both[1].copy(tmp_path / "root", *NEEDED["Finetune"])
    flags = place.flags("Finetune", *FLAGS["Finetune"], "--checkpoint_every_steps", "1")
    killed = warm_process.run("Finetune.py", *flags, kill_at=("torch.optim.AdamW.step", 7), processes=2, constants=UNEVEN)
    assert killed.status and killed.errors == "Finetune.py: another process has ended; run the same command to go on\n"
    ended = warm_process.run("Finetune.py", *flags, processes=2, constants=UNEVEN)
    assert (ended.status, ended.errors) == (0, "") and "going on: finetune game, epoch 1/1, step 2/4" in ended.output
    assert differences(place, both[1], "Finetune") == []
    before = hashes(place.root)
    again = warm_process.run("Finetune.py", *flags, processes=2)
    assert again.status == 0 and again.output.count("Finetune is finished already") == 1 and hashes(place.root) == before


def test_a_fault_in_one_of_two_processes_is_told_whole(warm_process, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text("from common.cli.flags import BenchmarkConfig\nfrom common.cli.run import run\n"
                      "from common.training import distributed\n\n"
                      "def main(config):\n    if distributed.rank() == 1:\n        1 / 0\n    distributed.any_of(False)\n\n"
                      "run(main, BenchmarkConfig)\n")
    ended = warm_process.run(script, "--device", "cpu", processes=2)
    assert ended.status and ended.errors.count("Traceback") == 1
    assert "\nZeroDivisionError: division by zero\nrank 1: faulty.py: unexpected ZeroDivisionError" in ended.errors


def test_every_row_counts_in_one_process_and_all_have_equally_many(monkeypatch):
    for total, number in itertools.product([1, 2, 5, 8, 64], [1, 2, 3, 7]):
        shares = []
        for rank in range(number):
            monkeypatch.setattr(distributed, "world_size", lambda number=number: number)
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            shares.append(distributed.share(total))
        assert [row for rows, real in shares for row in rows[:real].tolist()] == list(range(total))
        assert len({len(rows) for rows, _ in shares}) == 1
