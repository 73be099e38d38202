"""Tests of the heads: one answer among all experts' classes, and heads of one label space."""

import itertools

import pytest
import torch
import transformers
from mixture_models import BEIT, CASES, CLASSES, JOINT, LLAMA, PLAIN, assert_close, logits, recorded, refused, telling
from PIL import Image
from torch import nn

from ContextGatedMOE import ContextGatedMOE, Expert


@pytest.mark.parametrize(("start", "routing"), [
    (0, ["beit.layers.0"]), (1, ["beit.layers.0", "beit.layers.1"]), (2, ["beit.layers.0", "beit.layers.1", "classifier"])])
def test_the_answer_follows_the_formula(start, routing):
    """log p(e, c) = log g_e + a_e + log softmax(s_e (W_e h + b_e) + what all gates say of classes)_c, normalised; one image after
    the other. Of the experts only gates tell that stand no later than where these begin."""
    model, inputs, seen = BEIT.joint(), BEIT.batch(3), []
    model.router.start, head = start, model.joint_head
    assert model.routing_gates() == routing
    head.expert_scale.data.copy_(scales := torch.tensor([0.5, 0.9, 1.3]))
    head.expert_prior.data.copy_(prior := torch.tensor([0.3, -0.2, 0.7]))
    head.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    answer, last = logits(model, inputs), list(recorded(model, inputs).values())[-1]
    features: dict[str, torch.Tensor] = {}
    with model.router.using(features=features):
        logits(model, inputs)
    gates = model.gates()
    assert set(features) == set(gates) == {"beit.layers.0", "beit.layers.1", "classifier"}
    for image in range(3):
        evidence = sum(0.3 * gates[name].score(features[name])[image] for name in routing).detach()
        said = sum(0.4 * gates[name].class_score(features[name])[image] for name in gates).detach()
        of_class = [1 / (3 * len(own)) for own in CLASSES.values() for _ in own]
        known = torch.softmax(evidence + torch.tensor(of_class).log(), 0)
        joint_logs, at = [], 0
        for number, (expert, own) in enumerate(zip(BEIT.joint_experts(), CLASSES.values(), strict=True)):
            weight, bias = expert.heads["classifier"]
            likely = known[at : at + len(own)].sum()  # an expert is as likely as its classes together
            if start < 2:
                assert_close(likely, last[image, number])
            own_logs = scales[number] * (seen[0][image] @ weight.T + bias) + said[at : at + len(own)]
            joint_logs.append(likely.log() + prior[number] + torch.log_softmax(own_logs, 0))
            at += len(own)
        routers = torch.cat(joint_logs)
        assert_close(answer[image], routers - routers.logsumexp(0), atol=1e-4)


@pytest.mark.parametrize("case", JOINT)
def test_the_answer_is_a_probability_of_every_class_and_with_a_one_hot_gate_that_expert_s(case):
    model, inputs = case.joint(), case.batch(3)
    for expert in case.joint_experts():
        alone = ContextGatedMOE(case.build(), [expert])  # heads of one label space: the expert's own logits
        with model.fixed_gates({expert.name: 1.0}):
            answer = logits(model, inputs).exp()
        own = model.columns[expert.name]
        assert_close(answer[:, own], logits(alone, inputs).softmax(1))
        assert answer[:, [column for column in range(8) if column not in own]].max() < 1e-30
    for top_k in (None, 1):
        answer = logits(case.joint(top_k=top_k), inputs)
        assert answer.shape == (3, 8) and answer.dtype == torch.float32
        assert_close(answer.exp().sum(1), torch.ones(3))
    assert model.labels == [(name, label) for name, own in CLASSES.items() for label in own]


def test_losses_and_gradients_are_finite_and_reach_the_gates_whatever_the_weights():
    """Once, the logarithm of a weight below 1e-6 had no gradient, and with top_k = 1 none had."""
    for top_k, wrong in itertools.product((None, 1), (False, True)):
        model = BEIT.joint(top_k=top_k).train()
        with torch.no_grad():
            for gate in model.gates().values() if wrong else ():
                gate.score.weight.zero_()
                gate.score.bias.copy_(torch.tensor([60.0, 60] + [0.0] * 6))  # all for expert a, where c is right
        model(**BEIT.batch(3), labels=torch.tensor([7, 7, 7] if wrong else [0, 4, 7])).loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in telling(model).values())
        for gate in (model.gates()[name] for name in model.routing_gates()):
            assert gate.score.weight.grad.abs().sum() > 0
            assert not wrong or (gate.score.bias.grad[7] < -0.1 and gate.score.bias.grad[:2].sum() > 0.1)
    for fixed in ({"a": 1.0}, {"a": 0.5, "c": 0.5}, {}):
        with model.fixed_gates(fixed):
            assert model(**BEIT.batch(3), labels=torch.tensor([0, 4, 7])).loss.isfinite()


def test_classes_that_are_the_same_add_up_and_go_with_their_expert():
    same = [[("a", "x"), ("b", "x")]]
    for case in (BEIT, PLAIN):
        apart, model, inputs = case.joint(), case.joint(same=same), case.batch(3)
        expected, answer = logits(apart, inputs).exp(), logits(model, inputs).exp()
        assert model.columns == {"a": [0, 1], "b": [0, 2, 3, 4, 5], "c": [6]}
        assert_close(answer[:, 0], expected[:, 0] + expected[:, 2])
        assert_close(answer[:, 1:], expected[:, [1, 3, 4, 5, 6, 7]])
        with model.fixed_gates({"c": 1.0}):
            assert logits(model, inputs).isfinite().all()
    names = ["a / b: x", "a: y", "b: z", "b: u", "b: v", "b: w", "c: only"]
    assert BEIT.joint(same=same).config.id2label == dict(enumerate(names))
    model = BEIT.joint(same=[*same, [("a", "y"), ("b", "z"), ("c", "only")]])
    model.remove_expert("a")
    assert model.same == [[("b", "z"), ("c", "only")]] and model.columns == {"b": [0, 1, 2, 3, 4], "c": [1]}


def test_without_classes_heads_of_one_label_space_are_mixed_by_the_weights():
    for case in (BEIT, LLAMA, PLAIN):
        own = case.experts(sizes=(case.build().get_submodule(case.head).out_features,) * 3)
        model, seen = case.shared(own), []
        head = model.base_model.get_submodule(case.head)
        head.register_forward_hook(lambda _, args, output, seen=seen: seen.append((args[0], output)))
        weights = list(recorded(model, case.batch(2)).values())[-1]
        x, y = seen[0]
        single = torch.stack([nn.functional.linear(x, *expert.heads[case.head]) for expert in own])  # (E, B, ...)
        assert_close(y, torch.einsum("eb...,be->b...", single, weights), atol=1e-4)
    # Another width than the base's: the base's own loss is told.
    model = ContextGatedMOE(BEIT.build(), BEIT.experts(sizes=(5, 5, 5)))
    output = model(**BEIT.batch(2), labels=torch.tensor([4, 0]))
    assert_close(output.loss, nn.functional.cross_entropy(output.logits, torch.tensor([4, 0])))
    assert model.unload().config.num_labels == 3


def test_no_experts_is_the_base_with_nothing_to_train():
    for case in CASES:
        model, emptied, inputs = ContextGatedMOE.from_adapters(case.build(), {}), case.shared(), case.batch(3)
        for name in "abc":
            emptied.remove_expert(name)
        for one in (model, emptied):
            assert torch.equal(logits(one, inputs), logits(case.build(), inputs)) and not one.gate_parameters()


def test_classes_that_do_not_fit_the_experts_are_refused_and_the_base_is_left_alone():
    own, two_heads = PLAIN.joint_experts(), PLAIN.experts("a", (2,))
    two_heads[0].heads["blocks.1"] = (torch.randn(2, 12), torch.randn(2))
    headless = Expert("a", PLAIN.experts()[0].updates)
    for chosen, classes, same, message in (
        (own, {"a": ["x", "y"]}, (), "expert '[bc]' has no classes"),
        (own, {**CLASSES, "d": ["x"]}, (), "names 'd', which is no expert"),
        (own, {**CLASSES, "a": ["x"]}, (), "'a' has a head of 2 outputs at 'head' for 1 classes"),
        (own, {**CLASSES, "a": ["x", "x"]}, (), "one or more different names"),
        (two_heads, {"a": ["x", "y"]}, (), "they replace 2 layers"),
        ([headless, *own[1:]], CLASSES, (), "'a' has a head of 3 outputs at 'head' for 2 classes"),
        ([own[0], PLAIN.experts(["z"], (4,))[0]], None, (), "different widths"),
        (own, CLASSES, [[("a", "nothing"), ("b", "x")]], "no class 'nothing'"),
        (own, CLASSES, [[("d", "x")]], "expert 'd' has no class"),
        (own, CLASSES, [[("a", "x"), ("b", "x")], [("b", "x"), ("c", "only")]], "in two groups"),
    ):
        base = PLAIN.build()
        with refused(base, message):
            ContextGatedMOE(base, chosen, classes, same=same)


def test_the_pipeline_of_transformers_names_expert_and_class():
    processor = transformers.BeitImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    model, picture = BEIT.joint(), Image.new("RGB", (20, 30), (200, 10, 90))
    classify = transformers.pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    expected = logits(model, {"pixel_values": processor(picture, return_tensors="pt").pixel_values}).exp()[0]
    answers = classify(picture, top_k=8)
    assert {answer["label"] for answer in answers} == {f"{expert}: {label}" for expert, label in model.labels}
    for answer in answers:
        assert abs(answer["score"] - expected[model.config.label2id[answer["label"]]].item()) < 1e-5
