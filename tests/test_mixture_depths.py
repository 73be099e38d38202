"""Tests of gates at several depths: experts attached later, two passes, first layers on disk, and classes that are the same."""

from dataclasses import replace

import pytest
import torch
from mixture_models import BEIT, CLASSES, PLAIN, assert_close, assert_equal, logits, recorded, rows
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ContextGatedMOE import ContextGatedMOE, Expert, calibration, fitting
from ContextGatedMOE.gate import Gate
from ContextGatedMOE.saving import WEIGHTS_FILE, _file_digest
from test_mixture_gates import loader
from test_mixture_saving import edit

DEEP = replace(BEIT, make=lambda: BEIT.make(num_hidden_layers=4))  # experts begin at the second block
OWN = {expert.name: expert for expert in DEEP.joint_experts()}
IMAGES = DEEP.images()


def built(names: str, bare: str = "", passes: int = 1) -> ContextGatedMOE:
    """A fitted mixture of these experts, of which some have no adapter."""
    model = ContextGatedMOE(DEEP.build(), [Expert(name) if name in bare else OWN[name] for name in names],
                            {name: CLASSES[name] for name in names}, gate_hidden=8, passes=passes)
    if names:
        model.fit_gates({name: IMAGES[name] for name in names})
    return model


def assert_same(actual: ContextGatedMOE, expected: ContextGatedMOE) -> None:
    """Of the same experts with the same gates, to the rounding of passes through an expert that is stacked with others."""
    for name in ("expert_names", "labels", "columns", "without_adapter"):
        assert getattr(actual, name) == getattr(expected, name)
    assert actual.config.id2label == expected.config.id2label and set(actual.statistics) == set(expected.statistics)
    assert actual.router.start == expected.router.start and actual.routing_gates() == expected.routing_gates()
    found, wanted = actual.state_dict(), expected.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert_close(found[name], tensor, atol=1e-5 * tensor.abs().max().item())
    assert_close(logits(actual, DEEP.batch(3)), logits(expected, DEEP.batch(3)), atol=1e-2)


@pytest.mark.parametrize(("before", "bare", "added", "passes"), [
    ("ab", "", "c", 1), ("cb", "", "a", 2), ("", "", "a", 1), ("ac", "c", "b", 2), ("ab", "ab", "c", 1)])
def test_adding_by_own_images_is_building_at_once_in_any_order_and_removing_is_building_without(before, bare, added, passes):
    model = built(before, bare, passes).train()
    model.add_expert(added, OWN[added], classes=CLASSES[added], images=iter(IMAGES[added]))
    assert all(module.training for module in model.modules())
    assert_same(model.eval(), built("".join(sorted(before + added)), bare, passes))
    model.remove_expert(added)
    if before:
        assert_same(model, built(before, bare, passes))


@pytest.mark.parametrize(("bare", "passes"), [("b", 1), ("abc", 2)])
def test_an_adapter_attached_later_is_as_if_it_had_been_there(bare, passes):
    model = built("abc", bare, passes)
    assert model.without_adapter == list(bare)
    for name in bare:
        model.add_expert(name, OWN[name], images=IMAGES[name])
    assert_same(model, built("abc", passes=passes))


def head_inputs(model: ContextGatedMOE, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What reaches the head in each pass."""
    seen = []
    hook = model.joint_head.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    logits(model, inputs)
    hook.remove()
    return seen


@pytest.mark.parametrize("fit", [False, True])
def test_two_passes_send_an_image_through_its_likeliest_expert_alone(fit):
    model, plain = DEEP.joint(fit=fit, passes=2), {}
    inputs = {"pixel_values": torch.cat([IMAGES[name][0][0]["pixel_values"][:2] for name in "abc"])}
    with torch.no_grad(), model.router.using(plain=True, features=plain):
        model.base_model(**inputs)
    gates = model.gates()
    assert set(model.routing_gates()) == set(gates) == set(plain)
    likeliest = model.joint_head.classes.expert_log_probs(sum(gates[name](plain[name])[0] for name in gates)).argmax(1)
    assert len(likeliest.unique()) > 1
    for weights in recorded(model, inputs).values():
        assert torch.equal(weights, nn.functional.one_hot(likeliest, 3).float())
    (_, reached), answer = head_inputs(model, inputs), logits(model, inputs)
    for image, number in enumerate(likeliest.tolist()):
        with model.fixed_gates({"abc"[number]: 1.0}):
            assert_close(head_inputs(model, rows(inputs, [image]))[0], reached[[image]])
        assert_close(logits(model, rows(inputs, [image])), answer[[image]], atol=1e-3 if fit else 1e-5)
    order = [3, 1, 5, 0, 4, 2]
    assert_close(logits(model, rows(inputs, order)), answer[order], atol=1e-3 if fit else 1e-5)


@pytest.mark.parametrize("name", ["hidden_weight", "bucket"])
def test_the_first_layer_is_what_was_saved(name, tmp_path):
    wide = replace(BEIT, make=lambda: BEIT.make(hidden_size=336, num_hidden_layers=1))  # so wide that tokens are hashed
    model, layer = wide.joint(), "beit.layers.0"
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    key = f"{layer}.context_gate.{name}"
    tensors[key] = tensors[key].flip(0).contiguous() if name != "hidden_weight" else tensors[key] * 0.5
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    edit(tmp_path, weights_sha256=_file_digest(tmp_path / WEIGHTS_FILE))
    loaded = ContextGatedMOE.from_pretrained(tmp_path, wide.build())
    assert torch.equal(loaded.gates()[layer].get_buffer(name), tensors[key])
    torch.manual_seed(0)
    tokens = torch.randn(2, 5, 336)
    features = [one.gates()[layer].features(tokens) for one in (model, loaded)]
    assert not torch.equal(*features)
    loaded.add_expert("d", wide.experts(["d"], (2,))[0], classes=["p", "q"])
    assert torch.equal(loaded.gates()[layer].features(tokens), features[1])  # new gates see the same


def test_the_first_layer_is_the_same_whatever_the_default_dtype():
    expected = Gate(16, 8, [2, 3]).state_dict()
    try:
        torch.set_default_dtype(torch.bfloat16)
        actual = Gate(16, 8, [2, 3]).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {name: tensor.dtype for name, tensor in actual.items()} == {name: tensor.dtype for name, tensor in expected.items()}
    assert_equal(actual, expected)


def test_validation_images_may_be_of_several_shapes():
    model, images = PLAIN.joint(), PLAIN.images()
    mixed = {name: [({"x": inputs["x"][:, : 5 - number % 2 * 2]}, labels) for number, (inputs, labels) in enumerate(own[::-1])]
             for name, own in images.items()}
    history = model.fit_gates(images, mixed, epochs=1, learning_rate=1e-5)
    losses = [nn.functional.nll_loss(logits(model, inputs), labels, reduction="none") for inputs, labels in loader(model, mixed)]
    best = min(row["validation_loss"] for row in history)
    assert abs(torch.cat(losses).mean().item() - best) < 0.01  # late gates were seen before the numbers were fitted the last time


SAME = [[("a", "x"), ("b", "x")]]


def test_the_numbers_do_not_ask_which_of_the_same_classes_an_image_is_of():
    model = BEIT.joint(fit=True, same=SAME)
    with model.evaluating():
        seen = fitting.features_of(model, BEIT.images())
    swapped = torch.where(seen.labels == 0, 2, torch.where(seen.labels == 2, 0, seen.labels))
    assert not torch.equal(swapped, seen.labels)
    found = []
    for labels in (seen.labels, swapped):
        loss = calibration.fit_numbers(model, replace(seen, labels=labels))
        found.append([loss, *(value.tolist() for value in (model.joint_head.expert_scale, model.joint_head.expert_prior))])
    assert found[0] == found[1]


@pytest.mark.parametrize("same", [(), SAME])
def test_the_history_is_of_the_answer_also_where_classes_are_the_same(same):
    model, images = BEIT.joint(same=same), BEIT.images()
    hard = {name: [(BEIT.batch(20, 30 + number), torch.arange(20) % len(CLASSES[name]))] for number, name in enumerate(CLASSES)}
    history = model.fit_gates(images, hard, epochs=2, learning_rate=1e-4)
    answers, labels = zip(*((logits(model, inputs), labels) for inputs, labels in loader(model, hard)), strict=True)
    answers, labels = torch.cat(answers), torch.cat(labels)
    best = min(history, key=lambda row: row["validation_loss"])
    assert abs(nn.functional.nll_loss(answers, labels).item() - best["validation_loss"]) < 1e-3
    assert abs((answers.argmax(1) == labels).float().mean().item() - best["validation_accuracy"]) < 1e-6
