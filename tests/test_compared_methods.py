"""Tests of what each method of `CGM_Lora.py --compare` computes."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from mixture_models import assert_close, logits, randomise_gates
from sklearn.linear_model import Ridge

from common import mixture, models
from common.comparison import inputs as inputs_module
from common.comparison import joint, linear, mass, merges, ours, ranpac, routers
from common.comparison.features import HEAD_INPUT, Features
from common.comparison.inputs import Inputs, Logits, mixed_test
from common.comparison.score import Scores
from common.training.evaluate import features
from common.training.loop import Fit

KEYS = ["fire", "game"]
LAYER = "beit.layers.1.mlp.fc1"


@pytest.fixture(scope="module")
def config(workspace):
    return workspace.config("CGM_Lora")


@pytest.fixture(scope="module")
def inputs(config, tasks):
    """What a comparison with a mixture of the workspace's experts, its gates random, gives its methods."""
    return Inputs(config, tasks, randomise_gates(mixture.build(config, tasks)).eval())


@pytest.fixture(scope="module")
def images(tasks):
    """A few images of both tasks, as a model takes them."""
    return mixed_test(tasks, 0).batch(torch.arange(6))


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- what all methods are given ----


def test_an_experts_logits_are_those_of_the_mixture_with_that_gate(inputs):
    """Of validation and of test images; the backbone is bit for bit as it was afterwards."""
    before = {name: value.clone() for name, value in inputs.body.state_dict().items()}
    columns = [column for data in inputs.tasks for column in inputs.mixture.columns[data.task.key]]
    for found, data in ((inputs.experts.validation, inputs.validation), (inputs.experts.test, inputs.test)):
        for number, key in enumerate(KEYS):
            own = inputs.space.own(number)
            with inputs.mixture.fixed_gates({key: 1.0}):
                expected = logits(inputs.mixture, {"pixel_values": data.batch(torch.arange(len(data)))})[:, columns][:, own]
            assert_close(torch.tensor(found[:, own]).log_softmax(1), expected)
    with pytest.raises(UserWarning), pytest.MonkeyPatch.context() as broken:
        broken.setattr(inputs_module, "collect", lambda *_: (_ for _ in ()).throw(UserWarning))
        inputs.logits(inputs.expert(0), inputs.test)
    assert all(torch.equal(value, before[name]) for name, value in inputs.body.state_dict().items())


def test_features_are_first_token_mean_and_deviation_behind_blocks_and_what_reaches_the_head(inputs):
    found, data, inner = inputs.features, inputs.test, []
    hook = inputs.body.beit.layers[0].register_forward_hook(lambda _, args, output: inner.append(output))
    pooled = logits(inputs.body, {"pixel_values": data.batch(torch.arange(len(data)))})
    hook.remove()
    assert list(found.test) == [1, 2, HEAD_INPUT] == list(found.seconds)
    assert found.choices == [(1,), (2,), (HEAD_INPUT,), (1, 2)]
    tokens = inner[0]
    assert_close(torch.tensor(found.test[1]), torch.cat([tokens[:, 0], tokens.mean(1), tokens.std(1, correction=0)], 1))
    assert_close(torch.tensor(found.test[HEAD_INPUT]), pooled)
    assert [len(split[1]) for split in (found.train, found.validation, found.test)] == [48, 16, 16]
    assert np.array_equal(found.together((2, 1))[2], np.concatenate([found.test[2], found.test[1]], axis=1))
    assert found.seconds[1] < found.seconds[2] <= found.seconds[HEAD_INPUT]
    assert not inputs.body.beit.layers[0]._forward_hooks


# ---- linear classifiers ----


@pytest.mark.parametrize("images", [200, 12])  # more than features, and fewer
def test_discriminants_are_those_of_the_shrunk_correlations_within_classes(images):
    features, labels = random(images, 30) * np.arange(1, 31, dtype=np.float32), np.arange(images) % 3
    weights, priors = np.full(images, 1 / images), np.array([0.5, 0.3, 0.2])
    means = np.stack([features[labels == number].mean(0) for number in range(3)])
    covariance = (features - means[labels]).T @ (features - means[labels]) / (images - 3)
    scale = np.sqrt(covariance.diagonal())
    asked = random(9, 30, seed=1) * scale
    for found, shrinkage in zip(linear.discriminants(features, labels, weights, priors, (0.1, 0.4)), (0.1, 0.4), strict=True):
        shrunk = covariance * (1 - shrinkage) + np.diag(shrinkage * scale**2)
        distances = [np.einsum("nk,nk->n", asked - mean, np.linalg.solve(shrunk, (asked - mean).T).T) for mean in means]
        expected = np.log(priors) - np.stack(distances, axis=1) / 2
        scores = found(asked)
        assert np.allclose(scores - scores[:, :1], expected - expected[:, :1], atol=1e-3)


@pytest.mark.parametrize("images", [90, 15])
def test_ridges_are_scikit_learns(images):
    features, targets, weights = random(images, 30), random(images, 2, seed=1), np.arange(1, images + 1) / 1000
    unit = (weights @ np.square(features)).mean()
    for found, strength in zip(linear.ridges(features, targets, weights, (0.02, 2)), (0.02, 2), strict=True):
        expected = Ridge(alpha=strength * unit, fit_intercept=False).fit(features, targets, sample_weight=weights)
        assert np.allclose(found(features), expected.predict(features), atol=1e-3)


# ---- choices ----


@pytest.fixture
def made_up(inputs):
    """Inputs of which only the answers are real: depth 1 tells nothing, depth 2 classes, what reaches the head tasks."""
    other = inputs.seeded(inputs.config)
    parts = []
    for seed, answers in enumerate((other.train_answers, other.validation_answers, other.test_answers)):
        near = 0.3 * random(len(answers.labels), 8, seed=seed)
        parts.append({1: near, 2: near + np.eye(8, dtype=np.float32)[answers.labels] * 2,
                      HEAD_INPUT: near + np.eye(8, dtype=np.float32)[answers.tasks] * 2})
    other.__dict__.update(features=Features(*parts, seconds={1: 1.0, 2: 2.0, HEAD_INPUT: 3.0}, blocks=2))
    for name in ("discriminants", "discriminant"):
        other.__dict__.pop(name, None)
    right = [9 * np.eye(8)[answers.labels] for answers in (other.validation_answers, other.test_answers)]
    other.__dict__["experts"] = Logits(*right, seconds=10.0)
    return other


def test_no_experts_choose_the_depth_that_tells_classes(made_up):
    for method in (made_up.discriminant, *made_up.discriminants):
        assert method.parameters == 8 * 8 * len(method.depths) + 8
    found = made_up.discriminant
    assert 2 in found.depths
    for scores in (ranpac.ranpac(made_up).values, found.scores(made_up.features)[1]):
        assert made_up.test_answers.right(scores).mean() > 0.9


@pytest.mark.parametrize(("router", "seconds"), [
    (routers.ridge_router, 1 + 10), (routers.mahalanobis_router, 3 + 10), (routers.best_router, None)])
def test_a_router_chooses_one_expert_whose_answer_counts(made_up, router, seconds):
    made_up.features.train[1], made_up.features.validation[1], made_up.features.test[1] = (
        getattr(made_up.features, split)[HEAD_INPUT] for split in ("train", "validation", "test"))
    found = router(made_up)
    assert made_up.test_answers.right(found.values).mean() > 0.9 and np.isfinite(found.values).all()
    assert (np.ptp(found.values, axis=1) > 1000).all()  # the other expert does not run
    assert seconds is None or found.seconds == pytest.approx(seconds)
    assert found.total == made_up.expert_parameters + found.trainable > made_up.expert_parameters


def test_a_gaussian_for_each_task_tells_tasks_of_one_mean(made_up):
    for split in ("train", "validation", "test"):
        features, answers = getattr(made_up.features, split)[HEAD_INPUT], getattr(made_up, f"{split}_answers")
        wide = np.where(answers.tasks[:, None] == 0, [[1, 9] * 4], [[9, 1] * 4])
        features[:] = random(*features.shape, seed=len(features)) * wide
    found = routers.mahalanobis_router(made_up)
    assert made_up.test_answers.right_task(found.values).mean() > 0.9 and found.choice.startswith("each")


def test_of_routers_the_best_by_validation_is_asked(inputs):
    """The first is right about validation images and wrong about test images, the second the other way round."""
    ways = [(np.eye(2)[answers.tasks], np.eye(2)[1 - answers.tasks])
            for answers in (inputs.validation_answers, inputs.test_answers)]
    found = routers.one_expert(inputs, [routers.TaskRouter(ways[0][flip], ways[1][1 - flip], 1.0, 0, str(flip))
                                        for flip in (1, 0)])
    assert found.choice == "0" and not inputs.test_answers.right_task(found.values).any()


# ---- MASS ----


def test_mass_measures_what_of_a_layers_input_lies_in_each_experts_row_space(inputs, monkeypatch):
    asked, inner = [], []
    monkeypatch.setattr(mass, "one_expert", lambda _, found: asked.extend(found))
    mass.mass(inputs)
    hook = inputs.body.get_submodule(LAYER).register_forward_pre_hook(lambda _, args: inner.append(args[0].detach()))
    logits(inputs.body, {"pixel_values": inputs.test.batch(torch.arange(len(inputs.test)))})
    hook.remove()
    assert len(asked) == len(inputs.adapters) * len(mass.KEPT)
    assert all(first.seconds <= second.seconds for first, second in zip(asked, asked[len(mass.KEPT) :], strict=False))
    for rank in (1, 4, 16):
        router = next(router for router in asked if router.choice == f"{LAYER}, largest {rank} singular vectors")
        for task, (down, up) in enumerate(inputs.adapters[LAYER]):
            axes = torch.linalg.svd(up @ down)[2][:rank]
            rest = inner[0] - inner[0] @ axes.T @ axes
            expected = 1 - rest.square().sum(-1) / inner[0].square().sum(-1)
            assert_close(torch.tensor(router.test[:, task]), expected.mean(1), atol=1e-4)


# ---- merges ----


def pairs(count, *, apart=False, seed=0):
    """A (3, 24) and B (20, 3) of some experts; apart: with rows and columns of their own."""
    torch.manual_seed(seed)
    made = []
    for number in range(count):
        down, up = torch.randn(3, 24), torch.randn(20, 3)
        if apart:
            own = torch.arange(4)[:, None] == number
            down, up = down * own.repeat_interleave(6).float(), up * own.repeat_interleave(5).float()[:, None]
        made.append((down, up))
    return made


@pytest.mark.parametrize("name", ["linear", "TSV-M"])
def test_updates_with_nothing_in_common_add_up(name):
    apart = pairs(4, apart=True)
    assert_close(merges.MERGES[name](apart), sum(up @ down for down, up in apart))


def test_tsv_m_keeps_a_share_of_each_updates_rank_and_orthogonalises():
    own = pairs(10)  # 20 / 10 singular vectors of each
    parts = [torch.linalg.svd(up @ down) for down, up in own]
    left, sizes, right = (torch.cat([cut(part) for part in parts], dim=-1) for cut in (
        lambda part: part[0][:, :2], lambda part: part[1][:2], lambda part: part[2][:2].T))
    orthogonal = [outer @ inner for outer, _, inner in (torch.linalg.svd(side, full_matrices=False) for side in (left, right))]
    assert_close(merges.tsv_m(own), orthogonal[0] * sizes @ orthogonal[1].T, atol=1e-4)


def test_iso_c_makes_all_singular_values_of_the_sum_their_mean():
    own = pairs(3)
    before, after = torch.linalg.svd(merges.linear(own)), torch.linalg.svd(merges.iso_c(own))
    assert_close(after[1][:9], before[1][:9].mean().expand(9), atol=1e-4)
    assert_close(before[0][:, :9] @ before[0][:, :9].T, after[0][:, :9] @ after[0][:, :9].T, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The density")
def test_ties_and_knots_elect_signs_and_average_those_that_agree(monkeypatch):
    monkeypatch.setattr(merges, "DENSITY", 1.0)
    (down, up), (other, _) = pairs(2)
    for merge in (merges.ties, merges.knots):
        assert_close(merge([(down, up)] * 3), up @ down, atol=1e-4)
        assert_close(merge([(down, up), (-down / 2, up), (down * 3, up)]), 2 * up @ down, atol=1e-4)
    assert not torch.allclose(merges.ties([(down, up), (other, up)]), merges.knots([(down, up), (other, up)]), atol=1e-2)
    monkeypatch.setattr(merges, "DENSITY", 0.1)
    assert (merges.ties([(down, up)]) != 0).sum() == 48


@pytest.mark.parametrize("best", merges.SCALES[::3])
def test_the_scale_of_a_merge_is_chosen_by_validation(inputs, monkeypatch, best):
    """A scale is right about validation images, and about test images every one but it."""
    def read(updates, data):
        right = (updates[LAYER].item() == pytest.approx(best)) == (data is not inputs.test)
        answers = inputs.validation_answers if data is not inputs.test else inputs.test_answers
        asked.append((data is inputs.test, updates[LAYER].item()))
        return (9 if right else -9) * np.eye(8)[answers.labels], 1.0

    asked, other = [], inputs.seeded(inputs.config)
    other.__dict__["discriminant"] = SimpleNamespace(scores=lambda _: [np.zeros((16, 8))] * 2, parameters=5, depths=(1,))
    monkeypatch.setattr(other, "logits", read)
    monkeypatch.setattr(other, "adapters", {LAYER: None})
    found = merges.merged(other, merge=lambda _: torch.ones(1))
    assert not inputs.test_answers.right(found.values).any() and found.choice == f"scale {best:g}"
    assert [scale for test, scale in asked if test] == pytest.approx([best])  # test images are read once


# ---- what is trained ----


@pytest.mark.parametrize("better", [0, 1])
def test_the_joint_lora_has_the_total_rank_a_fitted_head_and_the_better_of_two_learning_rates(inputs, monkeypatch, better):
    fits = []

    def fit(model, train, validation, settings, *_, objective, **named):
        fits.append((model, settings.learning_rate))
        assert (len(train), len(validation)) == (48, 16) and objective.first.tolist() == [0, 4]
        assert (settings.epochs, settings.batch_size, settings.augment) == (2, 8, None)
        adapter, head = model.peft_config["default"], model.base_model.model.classifier
        assert (adapter.r, adapter.lora_alpha) == (32, 64)
        seen = features(models.load_backbone(inputs.config.model, ["x"], 0), train, inputs.config).inputs
        losses = objective.losses(head(seen), objective.labels(train))
        assert losses.mean() < 0.9 * math.log(8)  # less than that of a head that knows nothing
        return Fit(pd.DataFrame({"validation_loss": [2.0, 0.5 if len(fits) - 1 == better else 0.6]}), 0.0, 0)

    monkeypatch.setattr(joint, "fit", fit)
    found = joint.joint_lora(inputs)
    assert [learning_rate for _, learning_rate in fits] == [2e-3, 1e-3] and found.values.shape == (16, 8)
    assert found.choice == f"learning rate {fits[better][1]:g}"


def test_a_mixture_is_asked_in_every_form_and_is_then_as_it_was(inputs, monkeypatch):
    seen = []
    forms = "mixture", "mixture, top 1", "mixture, two passes", "mixture, no adapters"

    def answers(_, model):
        seen.append((model.top_k, model.passes, len(model.without_adapter)))
        return Scores(None, 1.0, 0, 0)

    monkeypatch.setattr(ours, "answers", answers)
    assert tuple(name for name, _ in ours.mixture(inputs)) == forms
    assert seen == [(None, 1, 0), (1, 1, 0), (None, 2, 0), (None, 1, 2)] and inputs.mixture.top_k is None


def test_few_experts_are_all_used_and_of_many_one_unless_it_is_said(config, tasks):
    assert mixture.build(config, tasks).top_k is None
    assert mixture.build(replace(config, top_k="1"), tasks).top_k == 1
    assert [mixture.experts_at_once(config, number) for number in (16, 17)] == [None, 1]
    assert [mixture.experts_at_once(replace(config, top_k=asked), 99) for asked in ("3", "all")] == [3, None]
