"""Tests of runs that are cut short: killed, stopped, or kept out; and of what they leave on the disk."""

import dataclasses
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from kill_resume import NEEDED, differences
from pipeline import Workspace, files_in, hashes
from trainings import CLASSES, examples, pictures, settings, trained, weights

import Finetune
from common import models
from common.cli.flags import SCRIPTS
from common.cli.run import run
from common.comparison import mixture
from common.errors import UserError
from common.files import locked, read_json, recover, writing
from common.training.checkpoint import Checkpoint
from common.training.evaluate import evaluate
from common.training.interrupts import stopping
from common.training.loop import fit
from common.training.objective import Objective

pytest_plugins = ["warm_process"]

MADE_FROM = {"seed": 3407, "data": {"fire": "a1", "game": "b2"}, "backbone": "c3", "packages": {"torch": "2"}}


class Killed(BaseException):
    """What a test ends a training with."""


@pytest.fixture
def kept(tmp_path):
    """Opens one and the same checkpoint, as each run of a script does."""
    return lambda made_from=MADE_FROM: Checkpoint(tmp_path / "Checkpoints" / "head.safetensors", made_from)


def end_after_saves(monkeypatch, count):
    """Let a training end as soon as it has saved for this time."""
    save, saved = Checkpoint.save, []

    def save_and_end(self, *state):
        save(self, *state)
        saved.append(state)
        if len(saved) == count:
            raise Killed

    monkeypatch.setattr(Checkpoint, "save", save_and_end)


# ---- scripts that are killed or asked to stop ----


@pytest.mark.parametrize("script, function, call", [
    ("Data_Preparation", "hashlib.sha256", 20),  # while the pool draws
    ("Generate_Base_Model", "torch.optim.AdamW.step", 10),  # in the second task's second epoch
    ("Generate_Base_Model", "os.replace", 4),
    ("Finetune", "torch.optim.AdamW.step", 5),
    ("Finetune", "os.replace", 20),
    ("Lora_Finetune", "common.training.loop.evaluate", 2),
    ("Lora_Finetune", "common.results.folder.write_json", 1),  # all is there but the mark that it is
    ("CGM_Lora", "torch.optim.AdamW.step", 9),
    ("CGM_Lora", "common.results.folder.remove", 1),  # finished, with the checkpoints still there
])
def test_a_killed_script_that_is_run_again_ends_as_if_it_had_not_been(
        warm_process, workspace, tmp_path, script, function, call):
    place = Workspace(tmp_path / "root", workspace.model)
    if NEEDED[script]:
        workspace.copy(place.root, *NEEDED[script])
    killed = warm_process.run(f"{script}.py", *place.flags(script), kill_at=(function, call))
    assert killed.status == -signal.SIGKILL
    ended = warm_process.run(f"{script}.py", *place.flags(script))
    assert (ended.status, ended.errors) == (0, "")
    assert differences(place, workspace, script) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_script_that_is_asked_to_stop_saves_and_says_how_to_go_on(monkeypatch, capsys, workspace, tmp_path, number):
    """And it does: no step is made twice, and the files are those of a run that was not stopped."""
    place, steps, step = workspace.copy(tmp_path / "root", *NEEDED["Finetune"]), [], torch.optim.AdamW.step

    def step_and_ask(self):
        step(self)
        steps.append(self)
        if len(steps) == 8:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_and_ask)
    monkeypatch.setattr(sys, "argv", ["Finetune.py", *place.flags("Finetune")])
    with pytest.raises(SystemExit) as end:
        run(Finetune.main, SCRIPTS["Finetune"])
    assert end.value.code == 130
    assert capsys.readouterr().err == ("Finetune.py: interrupted; saved: finetune game, epoch 1/2, step 2/3; run the same "
                                       "command to go on\n")
    place.run("Finetune")
    said = capsys.readouterr().out
    assert "finetune fire: trained already" in said and "going on: finetune game, epoch 1/2, step 2/3" in said
    assert len(steps) == 2 * 2 * 3
    assert differences(place, workspace, "Finetune") == []


def test_a_run_that_was_to_overwrite_goes_on_without_overwriting(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["Finetune.py", "--overwrite"])
    with pytest.raises(SystemExit):
        run(interrupted, SCRIPTS["Finetune"])
    assert capsys.readouterr().err.endswith("; run the same command without --overwrite to go on\n")


def test_a_signal_outside_of_training_has_its_usual_effect():
    with pytest.raises(KeyboardInterrupt), stopping(True) as stop_if_asked:
        os.kill(os.getpid(), signal.SIGINT)
        before = time.monotonic()
        while time.monotonic() - before < 60:
            stop_if_asked()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)


# ---- fit and its checkpoint ----


@pytest.mark.parametrize("every, saves", [(0, 1), (0, 3), (1, 1), (1, 5), (2, 2), (4, 2)])
def test_a_training_that_goes_on_equals_one_that_was_not_interrupted(monkeypatch, kept, every, saves):
    config = settings(epochs=4, checkpoint_every_steps=every)
    whole, history = trained(config)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        end_after_saves(patch, saves)
        trained(config, checkpoint=kept())
    again, history_again = trained(config, checkpoint=kept())
    assert torch.equal(again, whole) and history_again.equals(history)


def test_augmentation_and_dropout_go_on_too(monkeypatch, kept):
    """Pictures that are flipped and shifted, through a network that drops activations, in the middle of an epoch."""
    config = settings(epochs=2, batch_size=4, checkpoint_every_steps=1, augment=True)
    train, validation = pictures(12), pictures(4, seed=1)

    def run_once(checkpoint=None):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(3 * 32 * 32, CLASSES))
        fit(model, train, validation, config, "test", checkpoint=checkpoint)
        return weights(model)

    whole = run_once()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        end_after_saves(patch, 4)
        run_once(kept())
    assert torch.equal(run_once(kept()), whole)


def test_a_training_that_is_done_is_not_trained_again(monkeypatch, kept):
    config = settings()
    whole, history = trained(config, checkpoint=kept())
    monkeypatch.setattr(torch.optim.AdamW, "step", None)
    again, history_again = trained(config, checkpoint=kept())
    assert torch.equal(again, whole) and history_again.equals(history)


def test_by_default_a_checkpoint_is_written_at_the_end_of_every_epoch(monkeypatch, kept):
    written, save = [], Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", lambda self, *state: (written.append(state[1]["epoch"]), save(self, *state)))
    trained(settings(epochs=3), checkpoint=kept())
    assert written == [2, 3, 4]


def test_a_checkpoint_is_deleted_after_a_loss_that_is_not_finite(monkeypatch, kept):
    """Resumed, it would only lead to the same loss."""
    broken = examples(16)
    broken.inputs[3, 0] = float("inf")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        end_after_saves(patch, 1)
        trained(settings(), checkpoint=kept())
    assert kept().progress["epoch"] == 2
    with pytest.raises(UserError, match="loss is"):
        trained(settings(), train=broken, checkpoint=kept())
    assert kept().progress is None


@pytest.mark.parametrize("change, said", [
    ({"seed": 1}, "seed = 3407, not 1"),
    ({"data": {"fire": "a1", "game": "x"}}, "data.game = b2, not x"),
    ({"backbone": "x"}, "backbone = c3, not x"),
    ({"packages": {"torch": "3"}}, "packages.torch = 2, not 3"),
    ({"new_flag": 1}, "new_flag = None, not 1"),
])
def test_a_checkpoint_of_something_else_is_refused_by_name(kept, change, said):
    trained(settings(epochs=1), checkpoint=kept())
    with pytest.raises(UserError) as refusal:
        kept({**MADE_FROM, **change})
    assert said in str(refusal.value) and "head.safetensors" in str(refusal.value) and "--overwrite" in str(refusal.value)


def damaged(content):
    """A file's content with a bit flipped, at many places, and cut, at some."""
    for place in range(0, len(content), 5):
        yield content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]
    for length in range(0, len(content), 97):
        yield content[:length]


def test_a_damaged_checkpoint_is_refused_in_one_line_that_tells_the_way_out(kept):
    trained(settings(epochs=1), checkpoint=kept())
    whole = kept()
    content = whole.path.read_bytes()
    for spoilt in damaged(content):
        whole.path.write_bytes(spoilt)
        try:
            read = kept()
        except UserError as error:
            assert "head.safetensors is damaged; delete it" in str(error) and "\n" not in str(error)
        else:  # a blank of the header
            assert read.progress == whole.progress and all(torch.equal(read.tensors[k], t) for k, t in whole.tensors.items())


# ---- memory ----


@pytest.mark.parametrize("script", ["Finetune", "Lora_Finetune", "CGM_Lora"])
def test_gradient_checkpointing_gives_the_same_weights(workspace, tasks, script):
    found = []
    for flags in ([], ["--gradient_checkpointing"]):
        config = workspace.config(script, "--epochs", "1", *flags)
        if script == "CGM_Lora":
            model = mixture.build(config, tasks)
            mixture.fit_gates(model, config, tasks)
        else:
            base = models.load_backbone(config.model, tasks[0].classes, config.seed)
            model = base if script == "Finetune" else models.add_lora(base, 4, 8, 0)
            fit(model, tasks[0].train, tasks[0].validation, config, "test")
        found.append(weights(model))
    assert torch.equal(*found)


def test_gradient_checkpointing_computes_the_blocks_twice(workspace, tasks):
    passes = []
    config = workspace.config("Finetune", "--epochs", "1", "--batch_size", "24", "--gradient_checkpointing")
    model = models.load_backbone(config.model, tasks[0].classes, config.seed)
    model.beit.layers[0].mlp.fc1.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    fit(model, tasks[0].train, tasks[0].validation, config, "test")
    assert passes.count(True) == 2


class Greedy(Objective):
    """An objective that takes more memory than there is."""

    def __init__(self, most, after, message):
        self.most, self.after, self.message, self.sizes = most, after, message, []

    def losses(self, logits, labels):
        """Cross-entropy, but of at most `most` images at once after the first `after` times, in training."""
        losses = super().losses(logits, labels)
        if logits.requires_grad:
            self.sizes.append(len(labels))
            if len(self.sizes) > self.after and len(labels) > self.most:
                losses[0].backward()  # a part of the step is done already
                raise RuntimeError(self.message)
        return losses


CUDA, CPU = "CUDA out of memory. Tried to allocate 20.00 GiB.", "DefaultCPUAllocator: can't allocate memory"


def test_too_little_memory_is_said_with_the_ways_out():
    with pytest.raises(UserError, match="add --largest_batch, halve --batch_size .now 8. and double .* --gradient_check"):
        trained(settings(), objective=Greedy(0, 0, CUDA))
    with pytest.raises(UserError, match="out of memory; add --gradient_checkpointing"):
        trained(settings(largest_batch=True), objective=Greedy(0, 0, CUDA))


@pytest.mark.parametrize("message", [CUDA, CPU])
def test_the_largest_batch_is_the_largest_part_of_a_step_that_fits(message, capsys):
    data, config, limited = examples(40), settings(epochs=2, batch_size=4, accumulation_steps=4), Greedy(5, 1, message)
    expected = trained(config, data)
    found = trained(dataclasses.replace(config, largest_batch=True), data, objective=limited)
    assert limited.sizes == [16, 16, 8, *[4] * 4, *[4] * 2, *[4] * 10]  # steps of 16, 16 and 8 images
    assert torch.allclose(found[0], expected[0], atol=1e-6)
    pd.testing.assert_frame_equal(found[1], expected[1], atol=1e-6)
    assert "test, epoch 1/2, step 1/3: out of memory, now 4 images at once" in capsys.readouterr().out


def test_an_evaluation_takes_the_batches_that_fit(monkeypatch):
    """Also one in the middle of a training; and one image that does not fit is one line."""
    class Limited(torch.nn.Linear):
        most, sizes = 5, []

        def forward(self, x):
            self.sizes.append(len(x))
            if len(x) > self.most and not self.training:
                raise torch.OutOfMemoryError(CUDA)
            return super().forward(x)

    model, data = Limited(6, CLASSES), examples(22)
    plain = torch.nn.Linear(6, CLASSES)
    plain.load_state_dict(model.state_dict())
    expected, found = evaluate(plain, data, settings()), evaluate(model, data, settings())
    assert model.sizes == [22, 11, 6, *[3] * 7, 1]
    assert np.array_equal(found[0], expected[0]) and found[1] == pytest.approx(expected[1])
    model.most = 0
    with pytest.raises(UserError, match="out of memory for a single image"):
        evaluate(model, data, settings())


# ---- files ----


def crash(action, call):
    """Do something in a process that is killed at its `call`-th change of the file system; return whether it was."""
    if not (process := os.fork()):
        left = [call]
        for owner, name in ((os, "replace"), (os, "rename"), (os, "unlink"), (os, "mkdir"), (os, "rmdir"), (os, "symlink")):
            def counted(*arguments, function=getattr(owner, name), **named):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)
            setattr(owner, name, counted)
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_whenever_writing_is_killed_the_old_or_the_new_content_is_there(tmp_path, kind):
    target = tmp_path / "model"

    def put(text):
        with writing(target) as part:
            if kind == "folder":
                part.mkdir()
                (part / "inner").mkdir()
                (part / "inner" / "weights").write_text(text)
            else:
                part.write_text(text)

    def found():
        return (target / "inner" / "weights" if kind == "folder" else target).read_text()

    put("old")
    for call in range(1, 100):
        killed = crash(lambda: put("new"), call)
        recover(target)
        assert found() in ("old", "new")
        put("old")
        assert found() == "old" and os.listdir(tmp_path) == ["model"]
        if not killed:
            break
    assert call > (1 if kind == "file" else 4)


@pytest.mark.parametrize("name", ["provenance.json", "adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_expert_is_never_used(mutable, tasks, name):
    config, data = mutable.config("CGM_Lora"), tasks[0]
    path = models.lora_folder(config, data.task) / name
    backbone = models.backbone_fingerprint(models.load_backbone(mutable.model, data.classes, 0))
    provenance, content = path.with_name("provenance.json"), path.read_bytes()
    whole = read_json(provenance, "")
    for spoilt in list(damaged(content))[:: 1 if len(content) < 5000 else 40]:
        path.write_bytes(spoilt)
        try:
            models.check_expert(config, data, backbone)
        except UserError as error:
            assert "fire_lora_finetune" in str(error) and "Lora_Finetune.py" in str(error) and "\n" not in str(error)
        else:  # a blank, or an entry that says nothing of the files
            found = read_json(provenance, "")
            assert name == "provenance.json"
            assert all(found[key] == whole[key] for key in ("data", "backbone", "preprocessing", "base", "files"))


# ---- locks ----


def test_a_second_run_in_one_results_folder_is_refused(workspace, mutable):
    shutil.rmtree(mutable.results / "Finetune")
    before = hashes(mutable.root)
    with locked(mutable.results / "Finetune"):
        with pytest.raises(UserError, match="another run is at work in .*Finetune; wait"):
            mutable.run("Finetune")
        mutable.run("Benchmark")  # elsewhere it may
    assert hashes(mutable.root) == before
    mutable.run("Finetune")
    assert files_in(mutable.results) == files_in(workspace.results)


def test_a_lock_ends_with_its_process(tmp_path):
    def die_with_the_lock():
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert crash(die_with_the_lock, 0) and files_in(tmp_path) == {".lock"}
    with locked(tmp_path):
        assert files_in(tmp_path) == {".lock"}
    assert files_in(tmp_path) == set()


def test_a_lock_does_not_live_on_in_the_processes_of_a_pool(tmp_path):
    waiting, go_on = os.pipe()

    def die_before_the_child():
        with locked(tmp_path):
            if os.fork():
                os.kill(os.getpid(), signal.SIGKILL)
            os.close(go_on)
            os.read(waiting, 1)
            os._exit(0)

    assert crash(die_before_the_child, 0)
    with locked(tmp_path):
        os.close(go_on)


def test_where_nothing_can_be_locked_work_goes_on(tmp_path):
    (tmp_path / "file").touch()
    with locked(tmp_path / "file"):
        pass


def test_finished_results_in_a_folder_that_cannot_be_written_to_are_shown(monkeypatch, capsys, workspace):
    def open_to_read(path, mode="r", *how, open_any=Path.open, **named):
        if "w" in mode:
            raise PermissionError(13, "Permission denied", str(path))
        return open_any(path, mode, *how, **named)

    def open_only(path, flags, *how, open_any=os.open, **named):
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied", str(path))
        return open_any(path, flags, *how, **named)

    monkeypatch.setattr(Path, "open", open_to_read)
    monkeypatch.setattr(os, "open", open_only)  # as locks are made
    workspace.run("Benchmark")
    assert "Benchmark is finished already" in capsys.readouterr().out
