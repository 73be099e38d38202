"""Tests of how `CGM_Lora.py --compare` scores answers, and of what a router learns from them."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest

from common.comparison import timing
from common.comparison.answers import Mix, Space, fitted_mix
from common.comparison.inputs import mixed_test
from common.comparison.score import Comparison, Scores, holm, wilson

TITLES = ["Fire_Risk", "Game"]
SPACE = Space([2, 3], np.array([0, 0, 1, 1, 1]))


def answers_of(tasks, classes):
    """The right answers of images of tasks with 2 and 3 classes: numbers of task and class within it."""
    return SPACE.answers(SimpleNamespace(tasks=torch.as_tensor(tasks).long(), labels=torch.as_tensor(classes)))


def scores_of(answers, right):
    """Scores (N, C) that are right for these images only; wrong ones are of the same task."""
    own = [SPACE.own(task) for task in answers.tasks]
    wrong = [part.start + (label - part.start + 1) % (part.stop - part.start)
             for label, part in zip(answers.labels, own, strict=True)]
    return np.eye(5)[np.where(right, answers.labels, wrong)]


ANSWERS = answers_of([0] * 4 + [1] * 12, [0, 1] * 8)


def compared(**right):
    """The table, by method and task, of methods that are right about these images, the first one the mixture."""
    found = Comparison([SimpleNamespace(task=SimpleNamespace(title=title)) for title in TITLES], ANSWERS)
    for name, runs in right.items():
        for run in runs if isinstance(runs, list) else [runs]:
            found.put(name, "group", Scores(scores_of(ANSWERS, run), seconds=0.5, trainable=1, total=2))
    return found.table().set_index(["method", "task"])


def test_the_mixed_test_set_is_every_test_image_in_a_random_order(tasks):
    data, again, other = mixed_test(tasks, 3), mixed_test(tasks, 3), mixed_test(tasks, 4)
    everything = torch.arange(len(data))
    assert torch.equal(data.batch(everything), again.batch(everything)) and not torch.equal(data.labels, other.labels)
    assert len(data.tasks.unique_consecutive()) > len(tasks)
    for task, own in enumerate(tasks):
        theirs, found = own.test.batch(torch.arange(len(own.test))), data.batch((data.tasks == task).nonzero()[:, 0])
        assert sorted(theirs.sum((1, 2, 3)).tolist()) == sorted(found.sum((1, 2, 3)).tolist())


def test_an_image_is_right_if_task_and_class_are_and_told_the_task_more_often():
    scores = np.random.default_rng(0).normal(size=(16, 5))
    scores[2:4, :2] = -np.inf  # no answer among the own task's classes
    best, told = scores.argmax(1), ANSWERS.right_told(scores)
    assert np.array_equal(ANSWERS.right(scores), best == ANSWERS.labels)
    assert np.array_equal(ANSWERS.right_task(scores), (best >= 2) == (ANSWERS.tasks == 1))
    assert not told[2:4].any() and (told >= ANSWERS.right(scores)).all()
    assert np.array_equal(told[4:], scores[4:, 2:].argmax(1) + 2 == ANSWERS.labels[4:])


def test_evidence_counts_as_much_as_it_helps():
    right, rng = np.eye(5)[ANSWERS.labels], np.random.default_rng(0)
    logits, parts = right + rng.normal(size=(16, 5)), [right + rng.normal(size=(16, 5)), -right]
    mix = fitted_mix(logits, parts, ANSWERS)
    assert mix.scale > 0.1 and mix.weights[0] > 0.1 and mix.weights[1] == 0
    for scale, first, second in ((0.05, 0, 0), (-0.05, 0, 0), (0, 0.05, 0), (0, -0.05, 0), (0, 0, 0.05)):
        other = Mix(SPACE, mix.scale + scale, (mix.weights[0] + first, mix.weights[1] + second))
        assert ANSWERS.loss(other.scores(logits, parts)) > ANSWERS.loss(mix.scores(logits, parts))
    assert np.allclose(np.exp(Mix(SPACE, 3.0).scores(logits)[:, SPACE.own(1)]).sum(1), 1)


def test_tasks_weigh_alike_in_the_row_of_all_intervals_are_wilsons_and_the_spread_is_over_seeds():
    right = np.arange(16) < 8  # all 4 of the first task, 4 of 12 of the second
    table = compared(mixture=[right, np.arange(16) < 4, np.arange(16) < 16], other=right)
    assert [table.loc[("mixture", task), "accuracy"] for task in (*TITLES, "All")] == pytest.approx([1, 1 / 3, 2 / 3])
    assert ANSWERS.rating(scores_of(ANSWERS, right))[0] == pytest.approx(2 / 3)
    for found, count in ((0, 16), (5, 16), (16, 16)):
        expected = binomtest(found, count).proportion_ci(0.95, method="wilson")
        assert wilson(found / count, count) == pytest.approx((expected.low, expected.high))
    row, other = table.loc[("mixture", "All")], table.loc[("other", "All")]  # 4 and 12 images: a variance as of 12
    assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx(wilson(2 / 3, 4 / (1 / 4 + 1 / 12)))
    of_seeds = [2 / 3, 1 / 2, 1]
    assert (row["seeds"], row["accuracy_mean"], row["accuracy_spread"]) == pytest.approx(
        (3, np.mean(of_seeds), np.std(of_seeds, ddof=1)))
    assert other["seeds"] == 1 and np.isnan(other["accuracy_spread"])


def test_mcnemar_is_the_binomial_test_by_hand_and_holms_correction_over_methods():
    """Of all images, 7 only the mixture gets right and 1 only the other: twice the chance of at most 1 head in 8 tosses."""
    number = np.arange(16)
    table = compared(mixture=number < 11, other=(number < 4) | (number == 15), same=number < 11, worse=number < 0)
    assert np.isnan(table.loc[("mixture", "All"), "mcnemar_p"])
    found = {name: row[["mcnemar_p", "mcnemar_p_holm"]].tolist() for name, row in table.xs("All", level="task").iterrows()}
    assert found["other"] == pytest.approx([2 * 9 / 2**8, 2 * 2 * 9 / 2**8]) and found["same"] == [1, 1]
    assert found["worse"] == pytest.approx([2 / 2**11, 3 * 2 / 2**11])
    assert [table.loc[("other", task), "mcnemar_p"] for task in TITLES] == [1, found["other"][0]]
    assert holm(pd.Series([0.04, np.nan, 0.01, 0.03])).tolist() == pytest.approx([0.06, np.nan, 0.03, 0.06], nan_ok=True)


def test_the_time_is_that_of_the_median_batch_after_the_first(workspace, tasks, monkeypatch):
    """Batches of 4: an image of the first takes 9 seconds, of the others 1, 2 and 4."""
    data, clock = mixed_test(tasks, 0), iter([tick for seconds in (9, 1, 2, 4) for tick in (0, 4 * seconds)])
    monkeypatch.setattr(timing, "EVALUATION_BATCH", 4)
    monkeypatch.setattr(timing, "_now", lambda device: next(clock))
    (values,), (seconds,) = timing.collect(torch.nn.Flatten(), data, workspace.config("CGM_Lora"))
    assert seconds == pytest.approx(2) and np.array_equal(values, data.batch(torch.arange(16)).flatten(1))


def test_the_time_until_a_part_of_a_model_is_that_until_it_begins(workspace, tasks, monkeypatch):
    """Batches of 16 images, that is all: an image takes 1, 2 and 3 seconds in the three parts."""
    clock, parts = [0], []

    def passed(seconds):
        clock[0] += 16 * seconds

    for seconds in (1, 2, 3):
        parts.append(torch.nn.Flatten())
        parts[-1].register_forward_hook(lambda *_, seconds=seconds: passed(seconds))
    monkeypatch.setattr(timing, "_now", lambda device: clock[0])
    model, data = torch.nn.Sequential(*parts), mixed_test(tasks, 0)
    assert timing.collect(model, data, workspace.config("CGM_Lora"), parts=parts[1:])[1] == pytest.approx([1, 3, 6])


def test_evidence_of_classes_is_normalised_and_a_tasks_is_that_of_its_classes_together():
    scores = np.random.default_rng(0).normal(size=(7, 5))
    tasks, classes = (np.exp(part) for part in SPACE.evidence(scores))
    assert np.allclose(classes.sum(1), 1) and np.allclose(classes / classes[:, :1], np.exp(scores - scores[:, :1]))
    for own in (SPACE.own(0), SPACE.own(1)):
        assert np.allclose(tasks[:, own], classes[:, own].sum(1, keepdims=True))
