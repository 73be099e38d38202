"""Tests of runs that are cut short: killed, stopped, or kept out; and of what they leave on the disk."""

import itertools
import os
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from kill_resume import NEEDED, differences
from pipeline import Workspace
from trainings import CLASSES, examples, pictures, settings, trained, weights

import Finetune
from common.cli.flags import SCRIPTS
from common.cli.run import run
from common.errors import UserError
from common.training.checkpoint import Checkpoint
from common.training.interrupts import stopping
from common.training.loop import fit

pytest_plugins = ["warm_process"]

MADE_FROM = {"seed": 3407, "data": {"fire": "a1", "game": "b2"}, "backbone": "c3", "packages": {"torch": "2"}}


class Killed(BaseException):
    """What a test ends a training with."""


@pytest.fixture
def kept(tmp_path):
    """Opens one and the same checkpoint, as each run of a script does."""
    return lambda made_from=MADE_FROM: Checkpoint(tmp_path / "Checkpoints" / "head.safetensors", made_from)


def end_after_saves(patch, count):
    """Let a training end as soon as it has saved for this time."""
    save, saves = Checkpoint.save, itertools.count(1)

    def save_and_end(self, *state):
        save(self, *state)
        if next(saves) == count:
            raise Killed

    patch.setattr(Checkpoint, "save", save_and_end)


KILLED = {  # script -> where it is killed, one time after the other
    "Data_Preparation": [("hashlib.sha256", 20)],  # while the pool draws
    "Generate_Base_Model": [("os.replace", 4)],  # while a model is written
    "Benchmark": [("os.replace", 3)],
    "Finetune": [("torch.optim.AdamW.step", 5), ("os.replace", 15)],
    "Lora_Finetune": [("common.results.folder.write_json", 1)],  # all is there but the mark that it is
    "CGM_Lora": [("os.replace", 3), ("common.results.folder.write_json", 1)],
}


def test_scripts_that_are_killed_again_and_again_end_as_if_they_had_not_been(warm_process, workspace, tmp_path):
    """In another process, locale and folder, with another seed of hash(): the same commands give the same files."""
    for script, places in KILLED.items():
        place = Workspace(tmp_path / "wieder & wieder, дважды" / script, workspace.model)
        if NEEDED[script]:
            workspace.copy(place.root, *NEEDED[script])
        for kill_at in places:
            killed = warm_process.run(f"{script}.py", *place.flags(script), kill_at=kill_at)
            assert killed.status == -signal.SIGKILL, script
        ended = warm_process.run(f"{script}.py", *place.flags(script))
        assert (ended.status, ended.errors) == (0, ""), script
        assert differences(place, workspace, script) == [], script


def test_a_script_that_is_asked_to_stop_saves_and_says_how_to_go_on(monkeypatch, capsys, workspace, tmp_path):
    """And it does: no step is made twice, and the files are those of a run that was not stopped."""
    place, steps, step = workspace.copy(tmp_path / "root", *NEEDED["Finetune"]), [], torch.optim.AdamW.step
    place.pictures = True  # which are compared, too
    signals = {8: signal.SIGINT, 10: signal.SIGTERM}  # behind which step

    def step_and_ask(self):
        step(self)
        steps.append(self)
        if len(steps) in signals:
            os.kill(os.getpid(), signals[len(steps)])

    monkeypatch.setattr(torch.optim.AdamW, "step", step_and_ask)
    monkeypatch.setattr(sys, "argv", ["Finetune.py", *place.flags("Finetune")])
    for at in ("epoch 1/2, step 2/3", "epoch 2/2, step 1/3"):
        with pytest.raises(SystemExit) as end:
            run(Finetune.main, SCRIPTS["Finetune"])
        assert end.value.code == 130
        assert capsys.readouterr().err == (f"Finetune.py: interrupted; saved: finetune game, {at}; run the same command to go "
                                           "on\n")
    place.run("Finetune")
    said = capsys.readouterr().out
    assert "finetune fire: trained already" in said and "going on: finetune game, epoch 2/2, step 1/3" in said
    assert len(steps) == 2 * 2 * 3
    assert differences(place, workspace, "Finetune") == []


def test_a_signal_outside_of_training_has_its_usual_effect(request):
    # A shell that starts the tests in the background has them ignore it.
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler)))
    for asked in (stopping(True), nullcontext(lambda: None)):
        with pytest.raises(KeyboardInterrupt), asked as stop_if_asked:
            signal.raise_signal(signal.SIGINT)
            stop_if_asked()
            time.sleep(60)


def test_a_training_that_goes_on_equals_one_that_was_not_interrupted(monkeypatch, tmp_path):
    """Wherever it was interrupted, after so many saves, each after so many steps or, with 0, an epoch.

    Pictures that are flipped and shifted, through a network that drops activations.
    """
    def run_once(config, checkpoint=None):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(3 * 32 * 32, CLASSES))
        history = fit(model, pictures(18), pictures(4, seed=1), config, "test", checkpoint=checkpoint).history
        return weights(model), history

    for every, saves in [(0, 1), (0, 3), (1, 5), (4, 2)]:
        config, path = settings(epochs=4, checkpoint_every_steps=every, augment=True), tmp_path / f"{every}.{saves}.safetensors"
        whole, history = run_once(config)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            end_after_saves(patch, saves)
            run_once(config, Checkpoint(path, MADE_FROM))
        with monkeypatch.context() as patch:
            for step in (torch.optim.AdamW.step, None):  # what is done is not trained again
                patch.setattr(torch.optim.AdamW, "step", step)
                again, history_again = run_once(config, Checkpoint(path, MADE_FROM))
                assert torch.equal(again, whole) and history_again.equals(history)


def test_a_checkpoint_is_deleted_after_a_loss_that_is_not_finite(monkeypatch, kept):
    """In training or in validation. Resumed, it would only lead to the same loss."""
    broken = examples(16)
    broken.inputs[3, 0] = float("inf")
    for part in ("train", "validation"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            end_after_saves(patch, 1)
            trained(settings(), checkpoint=kept())
        assert kept().progress["epoch"] == 2
        with pytest.raises(UserError, match="loss is .*--learning_rate"):
            trained(settings(), **{part: broken}, checkpoint=kept())
        assert kept().progress is None


def test_a_damaged_checkpoint_is_refused_in_one_line_that_tells_the_way_out(kept):
    """With a bit flipped, at many places, or cut, at some."""
    trained(settings(epochs=1), checkpoint=kept())
    whole = kept()
    content = whole.path.read_bytes()
    flipped = [content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]
               for place in range(0, len(content), 7)]
    for spoilt in flipped + [content[:length] for length in range(0, len(content), 97)]:
        whole.path.write_bytes(spoilt)
        try:
            read = kept()
        except UserError as error:
            assert "head.safetensors is damaged; delete it" in str(error) and "\n" not in str(error)
        else:  # a blank of the header
            assert read.progress == whole.progress and all(torch.equal(read.tensors[k], t) for k, t in whole.tensors.items())
