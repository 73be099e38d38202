"""Tests of what each method of `CGM_Lora.py --compare` computes."""

from dataclasses import replace
from math import sqrt
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from mixture_models import assert_close, logits, randomise_gates
from safetensors.torch import load_file

from common import models
from common.comparison import contest, methods, mixture, passes, router
from common.comparison.contest import EARLIER, MERGED, Contest, Seen, mixed_test
from common.training.loop import Fit

KEYS = ["fire", "game"]
READ = ["surest head", "mixture's gates"]
BODIES = [*(f"{shown} merge" for shown in methods.SHOWN.values()), "Arrow, top 1", "Arrow, all"]
LAYER = "beit.layers.1.mlp.fc1"


@pytest.fixture(scope="module")
def config(workspace):
    return workspace.config("CGM_Lora")


@pytest.fixture
def model(config, tasks):
    """A mixture of the workspace's experts with random gates."""
    return randomise_gates(mixture.build(config, tasks)).eval()


@pytest.fixture
def bench(config, tasks, model, tmp_path):
    """A comparison with that mixture."""
    return Contest(replace(config), tasks, model, SimpleNamespace(folder=tmp_path))


@pytest.fixture(scope="module")
def folders(config, tasks):
    """The experts' adapters without heads."""
    with methods.headless(config, tasks) as found:
        yield found


@pytest.fixture(scope="module")
def images(tasks):
    """A few images of both tasks, as a model takes them."""
    return mixed_test(tasks, 0).batch(torch.arange(6))


def read_heads(bench, features):
    """The logits of the experts' heads on features."""
    weight, bias = bench.head
    return features.numpy() @ weight.T + bias


def test_an_experts_body_is_the_mixture_with_that_gate_and_the_mean_of_all_that_with_equal_gates(
        bench, model, folders, images):
    for number, (key, folder) in enumerate(zip(KEYS, folders, strict=True)):
        own = bench.space.own(number)
        with model.fixed_gates({key: 1.0}):
            expected = logits(model, {"pixel_values": images})[:, bench.columns][:, own]
        features = logits(methods.expert_body(bench.config, bench.tasks, folder), {"pixel_values": images})
        assert_close(torch.tensor(read_heads(bench, features)[:, own]).log_softmax(1), expected)
    scores = {}
    with model.router.using(body=torch.full((2,), 0.5), scores=scores):
        logits(model, {"pixel_values": images})
    merged = logits(methods.merge("cat", 0.5, folders, bench.config, bench.tasks), {"pixel_values": images})
    assert_close(torch.tensor(read_heads(bench, merged)), scores[model.joint_head.name][:, bench.columns])  # logits


def test_a_uniform_body_leaves_the_evidence_to_the_head(model, images):
    """The gates still tell images apart, and the answer follows them; choosing one expert changes nothing of the body."""
    found, head = [], model.joint_head
    for top_k in (None, 1):
        model.top_k, scores = top_k, {}
        with model.router.using(body=torch.tensor([0.5, 0.5]), scores=scores), model.record_gates() as gates:
            answer = logits(model, {"pixel_values": images})
        found.append(scores[head.name])
        assert [*gates.values()][-1].std(0).min() > 1e-4
        assert not torch.allclose(answer, head.own(found[-1], head.expert_scale).log_softmax(1), atol=1e-3)
    assert_close(*found)


def test_gates_of_the_plain_pass_are_those_of_the_plain_backbone(bench, model):
    head, features = model.joint_head, {}
    head.expert_scale.data.fill_(1.7)
    gates = bench._gates(model)
    with torch.no_grad(), model.router.using(plain=True, features=features):
        model(pixel_values=bench.test.batch(torch.arange(len(bench.test))))
        evidence = sum(gate.coefficient * gate(features[name]) for name, gate in model.gates().items())
        expected = head.classes.experts(evidence)[:, head.classes.owner]
        adds = (head.router_scale * head.classes.experts(evidence)).log_softmax(1)[:, head.classes.owner]
        adds = adds + head.class_share * head.classes.classes(evidence)
    assert_close(torch.tensor(gates.experts.test), expected)
    added = gates.added.test
    assert_close(torch.tensor(added - added.mean(1, keepdims=True)), adds - adds.mean(1, keepdim=True), atol=1e-4)


def test_the_linear_merge_adds_up_a_and_b_apart(config, tasks, folders):
    """Which is how peft documents it; alpha / rank is 2 here."""
    base = models.load_backbone(config.model, tasks[0].classes, 0).get_submodule(LAYER).weight
    adapters = [load_file(models.lora_folder(config, data.task) / "adapter_model.safetensors") for data in tasks]
    down, up = (sum(adapter[f"base_model.model.{LAYER}.lora_{part}.weight"] for adapter in adapters) for part in "AB")
    merged = methods.merge("linear", 0.5, folders, config, tasks)
    assert_close(merged.get_submodule(LAYER).weight, base + sqrt(0.5 * 2) ** 2 * up @ down)


def test_the_weight_of_a_merge_is_chosen_by_validation(bench, monkeypatch):
    """1 / E is right about validation images and wrong about test images; 1 the other way round."""
    right, wrong = ({split: sign * 9 * np.eye(8)[answers.labels] for split, answers in
                     (("validation", bench.known), ("test", bench.asked))} for sign in (1, -1))
    bodies = {0.5: Seen(right["validation"], wrong["test"], 1.0), 1.0: Seen(wrong["validation"], right["test"], 1.0)}
    monkeypatch.setattr(methods, "merge", lambda kind, weight, *_: weight)
    monkeypatch.setattr(methods, "arrow", lambda *_: 0.5)
    monkeypatch.setattr(bench, "_logits", bodies.__getitem__)
    silent = Seen(np.zeros((16, 8)), np.zeros((16, 8)), 1.0)
    bench._merges([], [contest.Gates(silent, silent)])
    chosen = bench.comparison.methods
    assert list(chosen) == [f"{body}, {read}" for body in BODIES for read in READ]
    assert all(method.group == MERGED and method.runs[0] is not None and not bench.asked.right(method.runs[0]).any()
               for method in chosen.values())


def test_adapters_of_different_ranks_are_merged_where_peft_can(bench, monkeypatch, capsys):
    bench.layers[0].ranks = [8, 16]
    monkeypatch.setattr(methods, "merge", lambda *_: None)
    monkeypatch.setattr(bench, "_logits", lambda _: Seen(np.zeros((16, 8)), np.zeros((16, 8)), 1.0))
    bench._merges([], [])
    assert list(bench.comparison.methods) == ["cat merge, surest head"] and capsys.readouterr().out.count("left out") == 6


def test_the_earlier_formulation_averages_gates_over_the_batch_and_mixes_a_and_b_apart(config, tasks, model, images):
    """With one expert chosen it is the mixture."""
    layer, passed = model.mixture_layers()[LAYER], []
    earlier = methods.earlier_formulation(mixture.build(config, tasks))
    earlier.load_state_dict(contest._trainable(model), strict=False)
    assert {name for name, value in earlier.named_parameters() if value.requires_grad} == set(contest._trainable(model))
    hook = earlier.base_model.get_submodule(LAYER).register_forward_hook(lambda _, args, output: passed.extend([*args, output]))
    with earlier.record_gates() as gates:
        whole = logits(earlier, {"pixel_values": images})
    hook.remove()
    weights = gates[LAYER.removesuffix(".mlp.fc1")].mean(0)
    down = sum(weight * part for weight, part in zip(weights, layer.lora_A.split(layer.ranks), strict=True))
    up = sum(weight * part for weight, part in zip(weights, layer.lora_B.split(layer.ranks, 1), strict=True))
    x, y = passed
    assert_close(y, layer.base(x) + x @ down.T @ up.T)
    alone = torch.cat([logits(earlier, {"pixel_values": image[None]}) for image in images])
    assert (whole - alone).abs().max() > 1e-4
    for key in KEYS:
        with model.fixed_gates({key: 1.0}), earlier.fixed_gates({key: 1.0}):
            assert_close(logits(earlier, {"pixel_values": images}), logits(model, {"pixel_values": images}))


def test_pure_batches_hold_one_task_and_keep_the_order(bench, monkeypatch):
    seen, collect = [], passes.collect
    monkeypatch.setattr(contest, "train_gates", lambda *_: None)
    monkeypatch.setattr(bench, "results", SimpleNamespace(checkpoint=lambda name: None))
    monkeypatch.setattr(methods, "earlier_formulation", lambda _: bench.mixture)  # which no batch mate matters to
    monkeypatch.setattr(contest, "collect", lambda model, data, *rest: (
        seen.append(data.tasks.unique().tolist()), collect(model, data, *rest))[1])
    bench._earlier(contest._trainable(bench.mixture))
    assert seen == [[0, 1], [0], [1]]
    mixed, pure = (bench.comparison.methods[f"{EARLIER}, {batches} batches"].runs[0] for batches in ("mixed", "pure"))
    assert np.allclose(mixed, pure, atol=1e-5)


@pytest.mark.parametrize("better", [0, 1])
def test_the_joint_lora_has_the_total_rank_the_base_models_heads_and_the_better_of_two_learning_rates(
        config, tasks, monkeypatch, better):
    heads, fits = [models.load_base(config, data).classifier for data in tasks], []

    def fit(model, train, validation, settings, *_, objective, **named):
        fits.append((model, settings.learning_rate))
        assert (len(train), len(validation)) == (48, 16) and objective.first.tolist() == [0, 4]
        assert (settings.epochs, settings.batch_size, settings.augment) == (2, 8, True)
        return Fit(pd.DataFrame({"validation_loss": [2.0, 0.5 if len(fits) - 1 == better else 0.6]}), 0.0, 0)

    monkeypatch.setattr(methods, "fit", fit)
    model = methods.joint_lora(config, tasks, [16, 8])
    assert model is fits[better][0] and [learning_rate for _, learning_rate in fits] == [2e-3, 1e-3]
    adapter, head = model.peft_config["default"], model.base_model.model.classifier
    assert (adapter.r, adapter.lora_alpha) == (24, 48)
    assert_close(head.weight, torch.cat([own.weight for own in heads]))
    assert_close(head.bias, torch.cat([own.bias for own in heads]))


def test_a_router_sees_tokens_behind_early_blocks_and_the_pooled_features(bench, config, tasks):
    body, data, inner = methods.plain_body(config, tasks), bench.test, []
    found = router.features(body, data, config)
    body.beit.layers[0].register_forward_hook(lambda _, args, output: inner.append(output))
    pooled = logits(body, {"pixel_values": data.batch(torch.arange(len(data)))})
    assert list(found) == ["beit.layers.1", router.LAST, router.ALL]
    assert_close(torch.tensor(found["beit.layers.1"]), torch.cat([inner[0].mean(1), inner[0].std(1)], 1))
    assert_close(torch.tensor(found[router.LAST]), pooled)
    assert not body.beit.layers[1]._forward_pre_hooks


def test_few_experts_are_all_used_and_of_many_one_unless_it_is_said(config, tasks):
    assert mixture.build(config, tasks).top_k is None
    model = mixture.build(replace(config, top_k=1), tasks)
    assert (model.top_k, model.early_top_k) == (1, 3)
    assert [mixture.experts_at_once(config, number) for number in (16, 17)] == [None, 1]
    assert mixture.experts_at_once(replace(config, top_k=3), 99) == 3
