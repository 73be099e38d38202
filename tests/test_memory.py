"""Tests of trainings and evaluations for which memory is short."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from trainings import examples, head, settings, trained, weights

from common import models
from common.errors import UserError
from common.training.evaluate import evaluate
from common.training.loop import fit
from common.training.objective import Objective


def test_gradient_checkpointing_computes_the_blocks_twice_and_gives_the_same_weights(workspace, tasks):
    found = []
    for flags in ([], ["--gradient_checkpointing"]):
        config, passes = workspace.config("Finetune", "--epochs", "1", "--batch_size", "24", *flags), []
        model = models.load_backbone(config.model, tasks[0].classes, config.seed)
        model.beit.layers[0].mlp.fc1.register_forward_hook(lambda *_, seen=passes: seen.append(torch.is_grad_enabled()))
        fit(model, tasks[0].train, tasks[0].validation, config, "test")
        found.append((weights(model), passes.count(True)))
    assert [count for _, count in found] == [1, 2] and torch.equal(found[0][0], found[1][0])


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


def test_the_largest_batch_is_the_largest_part_of_a_step_that_fits(capsys):
    data, config = examples(40), settings(epochs=2, batch_size=4, accumulation_steps=4)
    expected = trained(config, data)
    for message in (CUDA, CPU):
        limited = Greedy(5, 1, message)
        found = trained(dataclasses.replace(config, largest_batch=True), data, objective=limited)
        assert limited.sizes == [16, 16, 8, *[4] * 4, *[4] * 2, *[4] * 10]  # steps of 16, 16 and 8 images
        assert torch.allclose(found[0], expected[0], atol=1e-6)
        pd.testing.assert_frame_equal(found[1], expected[1], atol=1e-6)
        assert "test, epoch 1/2, step 1/3: out of memory, now 4 images at once" in capsys.readouterr().out


def test_an_evaluation_takes_the_batches_that_fit():
    """And one image that does not fit is one line."""
    most, sizes = [5], []

    def limit(model, passed):
        sizes.append(len(passed[0]))
        if sizes[-1] > most[0]:
            raise torch.OutOfMemoryError(CUDA)

    model, data = head(), examples(22)
    expected = evaluate(model, data, settings())
    model.register_forward_pre_hook(limit)
    found = evaluate(model, data, settings())
    assert sizes == [22, 11, 6, *[3] * 7, 1]
    assert np.array_equal(found[0], expected[0]) and found[1] == pytest.approx(expected[1])
    most[0] = 0
    with pytest.raises(UserError, match="out of memory for a single image"):
        evaluate(model, data, settings())
