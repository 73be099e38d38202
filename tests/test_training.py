"""Tests of the training loop and the evaluation, on heads and tiny backbones."""

import dataclasses
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pipeline import tiny_beit
from torch import nn
from trainings import CLASSES, WIDTH, examples, head, pictures, settings, trained, weights

from common.training import evaluate as evaluation
from common.training.evaluate import evaluate
from common.training.loop import fit
from common.training.objective import JointObjective
from common.training.schedule import parameter_groups, warmup_cosine

WEIGHT_LEVELS = {  # of a BEiT with two blocks: how many times the decay applies
    "classifier": 0, "beit.pooler": 0, "beit.layers.1": 1, "beit.layers.0": 2, "beit.embeddings": 3,
}


def test_the_weights_kept_are_those_of_the_lowest_validation_loss():
    """At the high rate the last epoch is not the best one."""
    for learning_rate in (0.05, 2.0):
        config, validation = settings(epochs=6, learning_rate=learning_rate, warmup_epochs=0), examples(16, seed=1)
        model = head()
        fitted = fit(model, examples(21), validation, config, "test")
        history = fitted.history
        assert (history["chosen"].sum(), fitted.images) == (1, 6 * 21) and history["chosen"].iloc[-1] == (learning_rate < 1)
        assert learning_rate > 1 or history["training_loss"].iloc[-1] < 0.9 * history["training_loss"].iloc[0]
        assert evaluate(model, validation, config)[1] == pytest.approx(history["validation_loss"].min(), abs=1e-6)


def test_accumulated_batches_equal_one_large_batch():
    for count in (24, 21, 17):
        train = examples(count)
        large, large_history = trained(settings(batch_size=8), train)
        small, small_history = trained(settings(batch_size=4, accumulation_steps=2), train)
        assert torch.allclose(large, small, atol=1e-5)
        assert np.allclose(large_history, small_history, atol=1e-5)


def test_tasks_weigh_alike_however_many_images_they_have():
    """Joint cross-entropy of tasks of 12 and 3 images with 2 and 1 classes: the mean of the tasks' means, not of batches'."""
    data = dataclasses.replace(examples(15), labels=torch.tensor([0, 1] * 6 + [0] * 3), tasks=torch.tensor([0] * 12 + [1] * 3))
    objective, joint = JointObjective(torch.tensor([0, 2])), torch.tensor([0, 1] * 6 + [2] * 3)
    assert torch.equal(objective.labels(data), joint)
    with torch.no_grad():
        logits = head()(data.inputs)
    losses, right = F.cross_entropy(logits, joint, reduction="none"), (logits.argmax(1) == joint).double()
    loss, accuracy = (pytest.approx((of[:12].mean() + of[12:].mean()).item() / 2, abs=1e-6) for of in (losses, right))
    row = trained(settings(epochs=1, learning_rate=0), data, data, objective=objective)[1].iloc[0]
    for part in ("training", "validation"):
        assert (row[f"{part}_loss"], row[f"{part}_accuracy"]) == (loss, accuracy)


def test_the_model_as_it_comes_can_be_the_chosen_one():
    """It is where there is no training, or one that makes it worse."""
    for epochs, learning_rate in [(0, 0.05), (2, 0.05), (2, 1e6)]:
        start, config = weights(head()), settings(epochs=epochs, learning_rate=learning_rate, warmup_epochs=0)
        found, history = trained(config, start_counts=True)
        assert history["epoch"].tolist() == list(range(epochs + 1)) and history.loc[0, :"training_loss"].isna().sum() == 1
        assert history["validation_loss"][0] == pytest.approx(evaluate(head(), examples(16, seed=1), config)[1])
        assert history["chosen"][0] == torch.equal(found, start) == (learning_rate > 1 or epochs == 0)
        assert history["chosen"].sum() == 1 and history.drop(0).notna().all(axis=None)


def test_the_same_seed_gives_the_same_weights_bit_for_bit_whatever_ran_before():
    """With activations that are dropped at random, in either precision."""
    for precision in ("fp32", "bf16"):
        found = []
        for seed in (1, 1, 2):
            model = tiny_beit(0, drop_path_rate=0.5, num_labels=CLASSES)
            torch.rand(7 * len(found))
            config = settings(seed=seed, epochs=1, learning_rate=1e-3, batch_size=4, precision=precision)
            fit(model, pictures(8), pictures(4, seed=1), config, "test")
            found.append(weights(model))
        assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_frozen_parameters_stay_and_groups_learn_at_their_share_of_the_rate():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), head())
    model[0].requires_grad_(False)
    frozen, weight, bias = weights(model[0]), model[1].weight.detach().clone(), model[1].bias.detach().clone()
    groups = [{"params": [model[1].weight], "lr_share": 0.0}, {"params": [model[1].bias], "lr_share": 1.0}]
    fit(model, examples(21), examples(16, seed=1), settings(), "test", groups)
    assert torch.equal(weights(model[0]), frozen)
    assert torch.equal(model[1].weight, weight) and not torch.equal(model[1].bias, bias)


def test_evaluation_gives_the_softmax_in_order_and_the_mean_loss_whatever_its_batches_and_the_precision(monkeypatch):
    model, data = head(), examples(21)
    with torch.no_grad():
        logits = model(data.inputs)
    for size, precision in ((1, "fp32"), (5, "fp32"), (5, "bf16"), (100, "bf16")):
        monkeypatch.setattr(evaluation, "EVALUATION_BATCH", size)
        probabilities, loss = evaluate(model, data, settings(precision=precision))
        assert np.allclose(probabilities, logits.softmax(1), atol=1e-6)
        assert loss == pytest.approx(F.cross_entropy(logits, data.labels).item(), abs=1e-6)


def test_evaluation_drops_nothing_and_changes_nothing():
    model, data = tiny_beit(0, drop_path_rate=0.5, num_labels=CLASSES).train(), pictures(5)
    before = weights(model)
    assert np.array_equal(evaluate(model, data, settings())[0], evaluate(model.train(), data, settings())[0])
    assert torch.equal(weights(model), before)


def test_the_rate_rises_to_its_peak_and_falls_towards_zero():
    for warmup, total in [(0, 10), (4, 10), (10, 10), (20, 10)]:
        shares = [warmup_cosine(warmup, total)(step) for step in range(total)]
        rising, falling = shares[:warmup], shares[warmup:]
        assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
        assert all(0 < share <= 1 for share in shares) and falling[:1] in ([], [1])
    share = warmup_cosine(4, 24)
    assert [share(0), share(3), share(14), share(24)] == pytest.approx([0.2, 0.8, 0.5, 0])


def test_every_parameter_learns_at_the_rate_of_its_depth_and_matrices_alone_decay():
    """Not biases, norms, layer scales, positions and tokens."""
    model = tiny_beit(0, num_labels=CLASSES, use_absolute_position_embeddings=True)
    for decay in (0.5, 1.0):
        found = {id(parameter): group for group in parameter_groups(model, decay) for parameter in group["params"]}
        assert len(found) == len([*model.parameters()])
        for name, parameter in model.named_parameters():
            level = next(level for prefix, level in WEIGHT_LEVELS.items() if name.startswith(f"{prefix}."))
            assert found[id(parameter)]["lr_share"] == pytest.approx(decay**level), name
            matrix = re.search(r"(proj|fc\d|projection|classifier)\.weight$", name)
            assert ("weight_decay" not in found[id(parameter)]) == bool(matrix), name
