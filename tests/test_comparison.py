"""Tests of `CGM_Lora.py --compare`: what each method computes, how answers are scored, and what is written."""

import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from math import sqrt
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from mixture_models import assert_close, logits, randomise_gates
from PIL import Image
from pipeline import Workspace, hashes
from safetensors.torch import load_file
from scipy.stats import binomtest

from common import models
from common.comparison import compare, contest, methods, mixture, passes, router
from common.comparison.answers import Mix, Space, fitted_mix
from common.comparison.contest import EARLIER, JOINT, MERGED, Contest, Seen, mixed_test
from common.comparison.score import MIXTURE, ORACLE, Comparison, holm, wilson
from common.errors import UserError
from common.training.loop import Fit

pytest_plugins = ["warm_process"]

KEYS, TITLES = ["fire", "game"], ["Fire_Risk", "Game"]
READ = ["surest head", "mixture's gates"]
TRAINED = [MIXTURE, "mixture, top 1", "mixture, uniform body", JOINT, f"{EARLIER}, mixed batches", f"{EARLIER}, pure batches"]
BODIES = [*(f"{shown} merge" for shown in methods.SHOWN.values()), "Arrow, top 1", "Arrow, all"]
UNTRAINED = ["mixture, start only", "fire expert alone", "game expert alone", "all experts, surest answer",
             "router, then one expert", "router and all experts", ORACLE, *(f"{body}, {READ[0]}" for body in BODIES)]
BY_GATES = [f"{body}, {READ[1]}" for body in BODIES]  # once for each trained mixture
LAYER = "beit.layers.1.mlp.fc1"
SPACE = Space([2, 3], np.array([0, 0, 1, 1, 1]))


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


def answers_of(tasks, classes):
    """The right answers of images of tasks with 2 and 3 classes: numbers of task and class within it."""
    return SPACE.answers(SimpleNamespace(tasks=torch.as_tensor(tasks).long(), labels=torch.as_tensor(classes)))


def scores_of(answers, right):
    """Scores (N, C) that are right for these images only; wrong ones are of the same task."""
    own = [SPACE.own(task) for task in answers.tasks]
    wrong = [part.start + (label - part.start + 1) % (part.stop - part.start)
             for label, part in zip(answers.labels, own, strict=True)]
    return np.eye(5)[np.where(right, answers.labels, wrong)]


# ---- answers and scores ----


ANSWERS = answers_of([0] * 4 + [1] * 12, [0, 1] * 8)


def compared(**right):
    """The table, by method and task, of methods that are right about these images, the first one the mixture."""
    found = Comparison([SimpleNamespace(task=SimpleNamespace(title=title)) for title in TITLES], ANSWERS)
    for name, runs in right.items():
        for run in runs if isinstance(runs, list) else [runs]:
            found.put(name, "group", scores_of(ANSWERS, run), seconds=0.5, trainable=1, total=2)
    return found.table().set_index(["method", "task"])


def test_the_mixed_test_set_is_every_test_image_in_a_random_order(tasks):
    data, again, other = mixed_test(tasks, 3), mixed_test(tasks, 3), mixed_test(tasks, 4)
    everything = torch.arange(len(data))
    assert torch.equal(data.batch(everything), again.batch(everything)) and not torch.equal(data.labels, other.labels)
    assert len(data.tasks.unique_consecutive()) > len(tasks)
    for task, own in enumerate(tasks):
        theirs, found = own.test.batch(torch.arange(len(own.test))), data.batch((data.tasks == task).nonzero()[:, 0])
        assert sorted(row.sum().item() for row in theirs) == sorted(row.sum().item() for row in found)


def test_an_image_is_right_if_task_and_class_are_and_told_the_task_more_often():
    scores = np.random.default_rng(0).normal(size=(16, 5))
    scores[2:4, :2] = -np.inf  # no answer among the own task's classes
    best = scores.argmax(1)
    assert np.array_equal(ANSWERS.right(scores), best == ANSWERS.labels)
    assert np.array_equal(ANSWERS.right_task(scores), (best >= 2) == (ANSWERS.tasks == 1))
    told = ANSWERS.right_told(scores)
    assert not told[2:4].any() and (told >= ANSWERS.right(scores)).all()
    assert np.array_equal(told[4:], scores[4:, 2:].argmax(1) + 2 == ANSWERS.labels[4:])
    own = ANSWERS.right_task(scores)
    assert np.array_equal(told[own], ANSWERS.right(scores)[own])


def test_evidence_counts_as_much_as_it_helps():
    right, rng = np.eye(5)[ANSWERS.labels], np.random.default_rng(0)
    logits, parts = right + rng.normal(size=(16, 5)), [right + rng.normal(size=(16, 5)), -right]
    mix = fitted_mix(logits, parts, ANSWERS)
    assert mix.scale > 0.1 and mix.weights[0] > 0.1 and mix.weights[1] == 0
    for scale, first, second in ((0.05, 0, 0), (-0.05, 0, 0), (0, 0.05, 0), (0, -0.05, 0), (0, 0, 0.05)):
        other = Mix(SPACE, mix.scale + scale, (mix.weights[0] + first, mix.weights[1] + second))
        assert ANSWERS.loss(other.scores(logits, parts)) > ANSWERS.loss(mix.scores(logits, parts))
    assert np.allclose(np.exp(Mix(SPACE, 3.0).scores(logits)[:, SPACE.own(1)]).sum(1), 1)


def test_tasks_weigh_alike_in_the_row_of_all_and_in_what_is_chosen():
    right = np.arange(16) < 8  # all 4 of the first task, 4 of 12 of the second
    table = compared(mixture=right)
    assert [table.loc[("mixture", task), "accuracy"] for task in (*TITLES, "All")] == pytest.approx([1, 1 / 3, 2 / 3])
    assert ANSWERS.rating(scores_of(ANSWERS, right))[0] == pytest.approx(2 / 3)


def test_intervals_are_wilsons():
    for right, count in ((0, 16), (5, 16), (16, 16)):
        expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
        assert wilson(right / count, count) == pytest.approx((expected.low, expected.high))
    row = compared(mixture=np.arange(16) < 8).loc[("mixture", "All")]  # 4 and 12 images: a variance as of 12
    assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx(wilson(2 / 3, 4 / (1 / 4 + 1 / 12)))


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


def test_mean_and_spread_are_over_seeds_and_one_seed_has_no_spread():
    table = compared(mixture=[np.arange(16) < count for count in (4, 10, 16)], other=np.arange(16) < 4)
    row = table.loc[("mixture", "All")]
    assert (row["accuracy"], row["seeds"], row["accuracy_mean"], row["accuracy_spread"]) == (0.5, 3, 0.75, 0.25)
    assert table.loc[("other", "All"), "seeds"] == 1 and np.isnan(table.loc[("other", "All"), "accuracy_spread"])


def test_the_time_is_that_of_the_median_batch_after_the_first(tasks, config, monkeypatch):
    """Batches of 4: an image of the first takes 9 seconds, of the others 1, 2 and 4; half of that up to a part of the model."""
    data, body = mixed_test(tasks, 0), torch.nn.Flatten()
    ticks = [tick for seconds in (9, 1, 2, 4) for tick in (0, 2 * seconds, 4 * seconds)]
    monkeypatch.setattr(passes, "EVALUATION_BATCH", 4)
    for until, kept in ((None, [0, 2]), (body, [0, 1, 2])):
        clock = iter([tick for number, tick in enumerate(ticks) if number % 3 in kept])
        monkeypatch.setattr(passes, "_now", lambda device, clock=clock: next(clock))
        (values,), seconds = passes.collect(body, data, config, until=until)
        assert seconds == pytest.approx(2 if until is None else 1)
        assert np.array_equal(values, data.batch(torch.arange(16)).flatten(1))


# ---- the methods ----


def read_heads(bench, features):
    """The logits of the experts' heads on features."""
    weight, bias = bench.head
    return features.numpy() @ weight.T + bias


def test_an_experts_body_and_head_are_the_mixture_with_that_gate(bench, model, folders, images):
    for number, (key, folder) in enumerate(zip(KEYS, folders, strict=True)):
        own = bench.space.own(number)
        with model.fixed_gates({key: 1.0}):
            expected = logits(model, {"pixel_values": images})[:, bench.columns][:, own]
        features = logits(methods.expert_body(bench.config, bench.tasks, folder), {"pixel_values": images})
        assert_close(torch.tensor(read_heads(bench, features)[:, own]).log_softmax(1), expected)


def test_the_mean_of_peft_cat_is_the_mixture_with_a_uniform_body(bench, model, folders, images):
    scores = {}
    with model.router.using(body=torch.full((2,), 0.5), scores=scores):
        logits(model, {"pixel_values": images})
    merged = logits(methods.merge("cat", 0.5, folders, bench.config, bench.tasks), {"pixel_values": images})
    assert_close(torch.tensor(read_heads(bench, merged)), scores[model.joint_head.name][:, bench.columns])  # logits


def test_a_uniform_body_leaves_the_evidence_to_the_head(bench, model, images):
    """The gates still tell images apart, and the answer follows them; choosing one expert changes nothing of the body."""
    found = []
    for top_k in (None, 1):
        model.top_k, scores = top_k, {}
        with model.router.using(body=torch.tensor([0.5, 0.5]), scores=scores), model.record_gates() as gates:
            answer = logits(model, {"pixel_values": images})
        found.append(scores[model.joint_head.name])
        last = [*gates.values()][-1]
        own = model.joint_head.own(found[-1], model.joint_head.expert_scale)
        assert last.std(0).min() > 1e-4 and not torch.allclose(answer, own.log_softmax(1), atol=1e-3)
    assert_close(found[0], found[1])
    layer, tokens = model.mixture_layers()[LAYER], 10_000  # so many that top 1 computes the chosen expert only
    assert layer._skips(tokens)
    with model.router.using(body=torch.tensor([0.5, 0.5])):
        assert not layer._skips(tokens)


def test_gates_of_the_plain_pass_are_those_of_the_plain_backbone(bench, model, tasks):
    model.joint_head.expert_scale.data.fill_(1.7)
    gates = bench._gates(model)
    features = {}
    with torch.no_grad(), model.router.using(plain=True, features=features):
        model(pixel_values=bench.test.batch(torch.arange(len(bench.test))))
        evidence = sum(gate.coefficient * gate(features[name]) for name, gate in model.gates().items())
        head = model.joint_head
        expected = head.classes.experts(evidence)[:, head.classes.owner]
        adds = (head.router_scale * head.classes.experts(evidence)).log_softmax(1)[:, head.classes.owner]
        adds = adds + head.class_share * head.classes.classes(evidence)
    assert_close(torch.tensor(gates.experts.test), expected)
    added = gates.added.test
    assert_close(torch.tensor(added - added.mean(1, keepdims=True)), adds - adds.mean(1, keepdim=True), atol=1e-4)


def test_a_mixture_that_is_its_start_is_compared_once(bench, monkeypatch, capsys):
    bench.config.epochs, bench.seeds = 0, bench.seeds * 3
    monkeypatch.setattr(contest, "train_gates", None)
    gates, start = bench._mixtures()
    assert len(gates) == 1 and start.keys() == contest._trainable(bench.mixture).keys()
    assert list(bench.comparison.methods) == TRAINED[:3] and capsys.readouterr().out.count("it is its start") == 1


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


def test_the_earlier_formulation_averages_gates_over_the_batch_and_mixes_a_and_b_apart(model, images):
    layer, passed = model.mixture_layers()[LAYER], []
    earlier = methods.earlier_formulation(model)
    changed = model.base_model.get_submodule(LAYER)
    changed.register_forward_hook(lambda _, args, output: passed.extend([*args, output]))
    with earlier.record_gates() as gates:
        whole = logits(earlier, {"pixel_values": images})
    weights = gates[LAYER.removesuffix(".mlp.fc1")].mean(0)
    down = sum(weight * part for weight, part in zip(weights, layer.lora_A.split(layer.ranks), strict=True))
    up = sum(weight * part for weight, part in zip(weights, layer.lora_B.split(layer.ranks, 1), strict=True))
    x, y = passed
    assert_close(y, layer.base(x) + x @ down.T @ up.T)
    alone = torch.cat([logits(earlier, {"pixel_values": image[None]}) for image in images])
    assert (whole - alone).abs().max() > 1e-4


def test_with_one_expert_chosen_the_earlier_formulation_is_the_mixture(config, tasks, model, images):
    earlier = methods.earlier_formulation(mixture.build(config, tasks))
    earlier.load_state_dict(contest._trainable(model), strict=False)
    assert {name for name, value in earlier.named_parameters() if value.requires_grad} == set(contest._trainable(model))
    for key in KEYS:
        with model.fixed_gates({key: 1.0}), earlier.fixed_gates({key: 1.0}):
            assert_close(logits(earlier, {"pixel_values": images}), logits(model, {"pixel_values": images}))


def test_pure_batches_hold_one_task_and_keep_the_order(bench, monkeypatch):
    seen = []
    monkeypatch.setattr(contest, "train_gates", lambda *_: None)
    monkeypatch.setattr(bench, "results", SimpleNamespace(checkpoint=lambda name: None))
    monkeypatch.setattr(methods, "earlier_formulation", lambda _: bench.mixture)  # which no batch mate matters to
    collect = passes.collect
    monkeypatch.setattr(contest, "collect", lambda model, data, *rest: seen.append(data.tasks.unique().tolist()) or collect(
        model, data, *rest))
    bench._earlier(contest._trainable(bench.mixture))
    assert seen == [[0, 1], [0], [1]]
    mixed, pure = (bench.comparison.methods[f"{EARLIER}, {batches} batches"].runs[0] for batches in ("mixed", "pure"))
    assert np.allclose(mixed, pure, atol=1e-5)


def test_the_joint_lora_has_the_total_rank_the_base_models_heads_and_the_better_of_two_learning_rates(
        config, tasks, monkeypatch):
    heads = [models.load_base(config, data).classifier for data in tasks]
    for better in (0, 1):
        fits = []

        def fit(*arguments, **named):
            fits.append((arguments, named))
            return Fit(pd.DataFrame({"validation_loss": [2.0, 0.5 if len(fits) - 1 == better else 0.6]}), 0.0, 0)

        monkeypatch.setattr(methods, "fit", fit)
        model = methods.joint_lora(config, tasks, [16, 8])
        assert model is fits[better][0][0]
        adapter = model.peft_config["default"]
        assert (adapter.r, adapter.lora_alpha) == (24, 48)
        assert_close(model.base_model.model.classifier.weight, torch.cat([head.weight for head in heads]))
        assert_close(model.base_model.model.classifier.bias, torch.cat([head.bias for head in heads]))
        assert [settings.learning_rate for (_, _, _, settings, _), _ in fits] == [2e-3, 1e-3]
        for (_, train, validation, settings, _), named in fits:
            assert (len(train), len(validation)) == (48, 16) and named["objective"].first.tolist() == [0, 4]
            assert (settings.epochs, settings.batch_size, settings.augment) == (2, 8, True)


def test_a_router_finds_the_expert_by_what_is_told_apart_and_asks_it_alone():
    rng = np.random.default_rng(0)
    train, known = (answers_of(labels > 1, labels - 2 * (labels > 1)) for labels in (rng.permutation(60) % 5 for _ in range(2)))
    telling, silent = ([np.eye(5)[answers.labels] + 0.1 * rng.normal(size=(60, 5)) for answers in (train, known)],
                       [rng.normal(size=(60, 5)) for _ in range(2)])
    own = rng.normal(size=(60, 5))
    one, every = router.best_routers({"silent": silent[0], "telling": telling[0]}, train,
                                     {"silent": silent[1], "telling": telling[1]}, own, known)
    for found in (one, every):
        assert found.place == "telling" and found.of_classes  # which says of the classes what the experts do not know
        experts, classes = (np.exp(part) for part in found.evidence(telling[1]))
        assert np.allclose(classes.sum(1), 1)
        for own_classes in (SPACE.own(0), SPACE.own(1)):
            assert np.allclose(experts[:, own_classes], classes[:, own_classes].sum(1, keepdims=True))
        assert known.right(found.all_experts(own, telling[1])).all()
    chosen = one.one_expert(own, telling[1])
    assert known.right(chosen).all()
    by_tasks = next(found for found in router.routers({"telling": telling[0]}, train) if not found.of_classes)
    by_tasks.mix = Mix(SPACE, 1.0, (1.0,))
    assert np.array_equal(known.right_told(by_tasks.one_expert(own, silent[1])), known.right_told(own))
    asked = SPACE.owner[by_tasks.evidence(silent[1])[0].argmax(1)]
    assert np.array_equal(SPACE.owner[by_tasks.one_expert(own, silent[1]).argmax(1)], asked)


def test_a_router_sees_tokens_behind_early_blocks_and_the_pooled_features(bench, config, tasks):
    body, data, inner = methods.plain_body(config, tasks), bench.test, []
    found = router.features(body, data, config)
    body.beit.layers[0].register_forward_hook(lambda _, args, output: inner.append(output))
    pooled = logits(body, {"pixel_values": data.batch(torch.arange(len(data)))})
    assert list(found) == ["beit.layers.1", router.LAST, router.ALL]
    assert_close(torch.tensor(found["beit.layers.1"]), torch.cat([inner[0].mean(1), inner[0].std(1)], 1))
    assert_close(torch.tensor(found[router.LAST]), pooled)
    assert not body.beit.layers[1]._forward_pre_hooks


# ---- the command ----


@pytest.fixture(scope="module")
def made_by(workspace, tmp_path_factory):
    """A copy of the workspace in which the comparison was run with two seeds, failed at its end and was run again; and what
    that printed."""
    place = workspace.copy(tmp_path_factory.mktemp("compared") / "root")
    with pytest.MonkeyPatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(Comparison, "table", lambda *_: 1 / 0)
        place.run("CGM_Lora", "--compare", "--seeds", "2")
    with redirect_stdout(StringIO()) as printed:
        place.run("CGM_Lora", "--compare", "--seeds", "2")
    return place, printed.getvalue()


@pytest.fixture(scope="module")
def made(made_by):
    """That copy."""
    return made_by[0]


def table_of(place: Workspace) -> pd.DataFrame:
    return pd.read_csv(place.results / "CGM_Lora" / "CGM_Lora_Comparison.csv")


def test_every_method_has_a_row_for_every_task_and_all_and_its_number_of_seeds(made):
    table = table_of(made)
    rows = set(zip(table["method"], table["task"], strict=True))
    assert rows == {(method, task) for method in (*TRAINED, *UNTRAINED, *BY_GATES) for task in (*TITLES, "All")}
    assert len(table) == len(rows) and (table["images_per_second"] > 0).all()
    assert ((table["accuracy_low"] <= table["accuracy"]) & (table["accuracy"] <= table["accuracy_high"])).all()
    assert (table["accuracy_told_task"] >= table["accuracy"]).all()
    by_method = table.set_index("method")
    assert set(by_method.loc[[*TRAINED, *BY_GATES], "seeds"]) == {2} and set(by_method.loc[UNTRAINED, "seeds"]) == {1}
    assert by_method.loc[UNTRAINED, "accuracy_spread"].isna().all() and by_method.loc[TRAINED, "accuracy_spread"].notna().all()


def test_the_compared_mixture_is_the_finished_one_and_the_oracle_the_experts(made):
    table, summary = (frame.set_index(["method", "task"]) for frame in (table_of(made), made.summary()))
    for key, task in zip(KEYS, TITLES, strict=True):
        for name in ("accuracy", "accuracy_low", "accuracy_high", "accuracy_told_task", "right_task", "trainable_parameters"):
            assert table.loc[(MIXTURE, task), name] == pytest.approx(summary.loc[("CGM_Lora", task), name], abs=1e-6)
        expert = pytest.approx(summary.loc[("Lora_Finetune", task), "accuracy"], abs=1e-6)
        assert [table.loc[(method, task), "accuracy_told_task"] for method in (ORACLE, f"{key} expert alone")] == [expert] * 2
        assert table.loc[(ORACLE, task), "accuracy"] == expert


def test_parameters_are_those_that_are_needed(made, model):
    table, head = table_of(made).drop_duplicates("method").set_index("method"), model.joint_head
    gates = models.trainable_parameters(model)
    base = sum(value.numel() for name, value in model.named_parameters() if ".base." in name or not value.requires_grad)
    lora = sum(value.numel() for name, value in model.named_parameters() if "lora_" in name)
    heads = head.expert_weight.numel() + head.expert_bias.numel()
    backbone = base - lora - heads - sum(value.numel() for value in head.base.parameters())
    expected = {MIXTURE: backbone + lora + heads + gates, ORACLE: backbone + lora + heads,
                "fire expert alone": backbone + heads // 2, f"TIES merge, {READ[0]}": backbone + heads,
                f"TIES merge, {READ[1]}": backbone + heads + gates, f"Arrow, all, {READ[0]}": backbone + lora + heads,
                JOINT: backbone + heads}
    assert {name: table.loc[name, "total_parameters"] for name in expected} == expected
    assert table.loc[JOINT, "trainable_parameters"] == lora + heads  # as many as all experts have


def test_a_comparison_adds_two_files_and_the_page_shows_it(made, workspace):
    names = {f"CGM_Lora/CGM_Lora_Comparison.{ending}" for ending in ("csv", "png")}
    before, after = hashes(workspace.results), hashes(made.results)
    assert after.keys() - before.keys() == names
    assert {name for name, digest in before.items() if after[name] != digest} <= {"index.html"}
    with Image.open(made.results / "CGM_Lora" / "CGM_Lora_Comparison.png") as image:
        assert min(image.size) > 600


def test_a_finished_comparison_is_shown_without_work_also_after_a_spreadsheet(made, tmp_path, monkeypatch, capsys):
    again = made.copy(tmp_path / "root")
    path = again.results / "CGM_Lora" / "CGM_Lora_Comparison.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.replace(r"^(\d+)\.(\d+)$", r"\1,\2", regex=True).to_csv(path, sep=";", index=False, encoding="utf-8-sig")
    path.with_suffix(".png").unlink()
    monkeypatch.setattr(compare, "Contest", None)
    for _ in range(2):
        capsys.readouterr()
        again.run("CGM_Lora", "--compare", "--seeds", "2")
        shown = capsys.readouterr().out
        assert "finished already" in shown and all(method in shown for method in (*TRAINED, *UNTRAINED)) and "nan" not in shown
    assert path.with_suffix(".png").exists()
    path.write_text("nothing of the kind")
    with pytest.raises(UserError, match="delete it") as told:
        again.run("CGM_Lora", "--compare", "--seeds", "2")
    assert "\n" not in str(told.value)


def test_a_comparison_is_made_anew_for_other_seeds_or_another_mixture(made, tmp_path, monkeypatch):
    again = made.copy(tmp_path / "root")
    asked = []
    monkeypatch.setattr(compare.Contest, "run", lambda bench: asked.append(bench.config.seeds) or compare._read(
        made.results / "CGM_Lora" / "CGM_Lora_Comparison.csv"))
    again.run("CGM_Lora", "--compare", "--seeds", "3")
    again.run("CGM_Lora", "--overwrite", "--gate_hidden", "3")
    assert not list((again.results / "CGM_Lora").glob("*Comparison*"))
    again.run("CGM_Lora", "--gate_hidden", "3", "--compare")
    assert asked == [3, 1]


def test_a_comparison_goes_on_after_the_trainings_that_are_done(made_by):
    made, printed = made_by
    assert printed.count("trained already") == 5 and ": loss " not in printed
    assert not (made.results / "CGM_Lora" / "Checkpoints").exists()


def test_what_a_comparison_lacks_is_said_in_one_line_before_the_work(made, tmp_path, monkeypatch):
    monkeypatch.setattr(Contest, "_mixtures", lambda _: 1 / 0)
    again = made.copy(tmp_path / "root")
    (again.results / "CGM_Lora" / "CGM_Lora_Comparison.csv").unlink()
    shutil.rmtree(models.base_folder(again.config("CGM_Lora"), again.tasks()[0].task))
    with pytest.raises(UserError, match=r"Generate_Base_Model\.py") as told:
        again.run("CGM_Lora", "--compare")
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="two tasks or more"):
        compare.compare(again.config("CGM_Lora"), again.tasks()[:1], None, None)


def test_three_processes_with_uneven_batches_compare_as_one(warm_process, made, workspace, tmp_path):
    """Batches of 3: two processes have 6 of the 16 images, the third one 4, and of each task's 8 images 3, 3 and 2."""
    script = tmp_path / "CGM_Lora_in_small_batches.py"
    script.write_text("from CGM_Lora import main\nfrom common.cli.flags import MixtureConfig\nfrom common.cli.run import run\n"
                      "from common.comparison import mixture, passes\nfrom common.training import evaluate\n"
                      "for module in (mixture, passes, evaluate):\n    module.EVALUATION_BATCH = 3\nrun(main, MixtureConfig)\n")
    place = workspace.copy(tmp_path / "root")
    done = warm_process.run(script, *place.flags("CGM_Lora", "--compare"), processes=3)
    assert (done.status, done.errors) == (0, "") and done.output.count("The comparison is in") == 1
    one, three = (table_of(found).set_index(["method", "task"]) for found in (made, place))
    assert one.index.equals(three.index)
    for name in ("accuracy", "accuracy_told_task", "right_task", "total_parameters"):
        assert one.loc[UNTRAINED, name].equals(three.loc[UNTRAINED, name]), name
