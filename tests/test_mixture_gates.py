"""Tests of the gates: recorded, fixed, chosen, fitted in closed form from sums that add up, and trained."""

import copy
from dataclasses import replace

import pytest
import torch
from mixture_models import BEIT, BERT, CASES, CLASSES, PLAIN, assert_close, assert_equal, logits, recorded, refused, rows, telling
from torch import nn

from ContextGatedMOE import ContextGatedMOE, MixtureError, calibration
from ContextGatedMOE.fitting import collect_statistics, drawn, features_of
from ContextGatedMOE.gate import Gate, select
from ContextGatedMOE.statistics import Statistics, symmetric


def test_recorded_gates_are_one_row_an_image_that_sums_to_one():
    for case in CASES:
        model = case.shared()
        with model.record_gates() as gates:
            model(**case.batch(3))
        assert set(model.gates()) <= set(gates)
        for weights in gates.values():
            assert weights.shape == (3, 3) and weights.dtype == torch.float32
            assert_close(weights.sum(1), torch.ones(3))
        list(gates.values())[-1][:, 0].sum().backward()  # evidence is carried on: the last weights reach every gate that tells
        assert all(model.gates()[name].score.weight.grad.abs().sum() > 0 for name in model.routing_gates())
    for weights in recorded(ContextGatedMOE(BEIT.build(), BEIT.experts()), BEIT.batch(2)).values():
        assert_close(weights, torch.full((2, 3), 1 / 3))  # new gates weigh all experts alike


def test_fixed_gates_nest_and_are_forgotten():
    model, inputs = BEIT.joint(), BEIT.batch(2)
    before = logits(model, inputs)
    with model.fixed_gates({"c": 0.5, "a": 2.0}):
        outer = logits(model, inputs)
        assert all(weights.tolist() == [[2.0, 0.0, 0.5]] * 2 for weights in recorded(model, inputs).values())
        with pytest.raises(KeyError), model.fixed_gates({"b": 1.0}):
            assert not torch.equal(logits(model, inputs), outer)
            raise KeyError
        assert torch.equal(logits(model, inputs), outer)
    with pytest.raises(MixtureError, match="nobody"), model.fixed_gates({"a": 1.0, "nobody": 1.0}):
        pass
    assert torch.equal(logits(model, inputs), before)


def test_the_largest_weights_are_kept_and_the_gradient_is_that_of_all():
    evidence = torch.tensor([[1.0, 3.0, 2.0], [0.5, -1.0, 0.0]], requires_grad=True)
    direction = torch.tensor([[0.3, -1.0, 0.7], [2.0, 0.1, -0.4]])
    expected_gradient, = torch.autograd.grad((evidence.softmax(1) * direction).sum(), evidence)
    for top_k, kept in {1: [[0, 1, 0], [1, 0, 0]], 2: [[0, 1, 1], [1, 0, 1]], 3: [[1] * 3] * 2}.items():
        weights = evidence.softmax(1)
        expected = torch.tensor(kept) * weights
        for training in (True, False):
            assert_close(select(weights, top_k, training), expected / expected.sum(1, keepdim=True))
        gradient, = torch.autograd.grad((select(weights, top_k, True) * direction).sum(), evidence)
        assert_close(gradient, expected_gradient)  # once: the norm that the docstring promises, not twice
    inputs = BEIT.batch(2)
    assert torch.equal(logits(BEIT.joint(top_k=5), inputs), logits(BEIT.joint(), inputs))
    for top_k in (1, 2):
        assert all(((weights > 0).sum(1) == top_k).all() for weights in recorded(BEIT.joint(top_k=top_k), inputs).values())


def test_statistics_add_up():
    torch.manual_seed(0)
    features, labels = torch.randn(60, 7) * torch.logspace(-3, 3, 7) + 5, torch.arange(60) % 4
    whole, order = Statistics.of(features, labels, 4), torch.randperm(60)
    for cut in (0, 1, 30, 59):
        parts = [Statistics.of(features[chosen], labels[chosen], 4) for chosen in (order[:cut], order[cut:])]
        for name in ("counts", "means", "scatter"):
            torch.testing.assert_close(getattr(parts[0] + parts[1], name), getattr(whole, name), rtol=1e-9, atol=1e-9)
    centred = features.double() - whole.means[labels]
    torch.testing.assert_close(symmetric(whole.scatter, 7), centred.T @ centred)


@pytest.mark.parametrize("start", [0, 2])
def test_statistics_are_of_what_gates_see_through_the_expert_from_where_experts_begin(start):
    """And, of two passes over an image, the plain model's apart; what validation images show is what the answer's pass shows."""
    model = replace(BEIT, make=lambda: BEIT.make(num_hidden_layers=5)).joint()
    model.router.start, batch, features, plain = start, BEIT.images()["b"][0], {}, {}
    with torch.no_grad(), model.router.using(plain=True, features=plain):
        model.base_model(**batch[0])
    with torch.no_grad(), model.fixed_gates({"b": 1.0}), model.router.using(from_start=True, features=features):
        model.base_model(**batch[0])
    gates = [*(f"beit.layers.{number}" for number in range(5)), "classifier"]
    assert [torch.equal(features[name], plain[name]) for name in gates] == [n <= start for n in range(6)]
    found, parts = collect_statistics(model, "b", [batch], 5, 1)
    assert list(found) == gates and len(parts) == 1 and torch.equal(parts[0].labels, batch[1])
    for name, own in found.items():
        assert_equal(vars(own), vars(Statistics.of(features[name], batch[1], 5).rounded()))
    seen, shown = features_of(model, {"b": [batch]}), {}
    with torch.no_grad(), model.router.using(features=shown):
        model.base_model(**batch[0])
    assert_equal(seen.features, shown)
    assert torch.equal(seen.labels, batch[1] + 2)
    model.passes = 2
    found, _ = collect_statistics(model, "b", [batch], 5)
    for name in gates:
        assert_equal(vars(found[f"plain:{name}"]), vars(Statistics.of(plain[name], batch[1], 5).rounded()))


@pytest.mark.parametrize(("most", "of_one", "count"), [(36, 5, 12), (1, 5, 5)])
def test_the_numbers_are_fitted_to_some_images_of_every_expert_all_experts_alike(monkeypatch, most, of_one, count):
    model, images, found = BEIT.joint(), BEIT.images(), []
    monkeypatch.setattr(calibration, "fit_numbers", lambda model, seen: found.append(seen) or 0.0)
    monkeypatch.setattr(calibration, "CALIBRATED", most)
    monkeypatch.setattr(calibration, "CALIBRATED_OF_ONE", of_one)
    model.fit_gates(images, {name: iter(own) for name, own in images.items()})  # they are read once
    assert found
    for seen in found:
        owner = model.joint_head.classes.owner[seen.labels]
        assert torch.bincount(owner).tolist() == [count] * 3
        assert_close(torch.zeros(3).index_add_(0, owner, seen.weights), torch.full((3,), 1 / 3))
    with refused(model, "there are no validation images of expert 'b'"):
        model.fit_gates(images, images | {"b": []})


def test_images_are_drawn_alike_wherever_they_are_and_keep_what_belongs_to_them():
    """The second argument is of no image: it stays as it is."""
    batches = [({"x": part[:, None] + 0.5, "of_all": torch.zeros(1, 2)}, part) for part in torch.arange(4000).split(70)]
    kept = drawn(batches, 1000)
    assert [len(labels) for _, labels in kept] == [70] * 14 + [20]
    for inputs, labels in kept:
        assert torch.equal(inputs["x"][:, 0], labels + 0.5) and inputs["of_all"].shape == (1, 2)
    by_quarter = torch.bincount(torch.cat([labels for _, labels in kept]).unique() // 1000)
    assert by_quarter.sum() == 1000 and 200 < by_quarter.min() and by_quarter.max() < 300
    for (inputs, labels), (own, expected) in zip(drawn(batches, 4000), batches, strict=True):  # all, as they came
        assert torch.equal(labels, expected) and torch.equal(inputs["x"], own["x"])


def test_images_fit_the_gates_whatever_their_batches_and_one_expert_after_the_other():
    whole, batches = BEIT.joint(fit=True), BEIT.images()
    inputs = {name: torch.cat([batch["pixel_values"] for batch, _ in own]) for name, own in batches.items()}
    labels = {name: torch.cat([label for _, label in own]) for name, own in batches.items()}
    for shape in (
        lambda name: (inputs[name], labels[name]),
        lambda name: ({"pixel_values": inputs[name][i : i + 1], "labels": labels[name][i : i + 1]} for i in range(len(labels[name]))),
    ):
        model = BEIT.joint()
        model.fit_gates({name: shape(name) for name in CLASSES})
        for gate, expected in zip(model.gates().values(), whole.gates().values(), strict=True):
            pairs = [(gate.class_score.weight, expected.class_score.weight)]
            if expected is whole.gates()[whole.routing_gates()[0]]:
                pairs.append((gate.score.weight, expected.score.weight))
            assert all((own - other).abs().max() < 1e-3 * other.abs().max() for own, other in pairs)
    later = BEIT.joint()
    later.statistics = {name: own for name, own in whole.statistics.items() if name != "b"}
    later.fit_gates({"b": batches["b"]})  # what is known of the others is used
    for name, expected in whole.gates().items():
        assert_equal(later.gates()[name].class_score.state_dict(), expected.class_score.state_dict())
        if name in whole.routing_gates():
            assert_equal(later.gates()[name].score.state_dict(), expected.score.state_dict())
    chosen = [recorded(whole, {"pixel_values": inputs[name]})["beit.layers.1"].argmax(1) == n for n, name in enumerate(CLASSES)]
    assert torch.cat(chosen).float().mean() > 0.95


def test_padding_is_no_part_of_features_or_statistics():
    gate = Gate(6, 5, [2, 3])
    torch.manual_seed(0)
    tokens = torch.randn(2, 9, 6)
    for size in (1, 3, 4, 9):
        mask = (torch.arange(14) < size).long().expand(2, -1)
        padded = torch.cat([tokens[:, :size], torch.full((2, 14 - size, 6), 1e3)], 1)
        whole = mask[:, :size]  # with it tokens are those of a text, also where without it they were a square image
        assert_close(gate.features(padded, mask), gate.features(tokens[:, :size], whole))
        assert_close(gate.features(padded.flip(1), mask.flip(1).bool()), gate.features(tokens[:, :size].flip(1), whole))
    model, found = BERT.shared(), []
    for fill in (None, 7):
        texts = {name: BERT.batch(8, seed) for seed, name in enumerate("abc")}
        if fill is not None:
            for own in texts.values():
                own["input_ids"] = torch.where(own["attention_mask"].bool(), own["input_ids"], fill)
        model.fit_gates({name: [own] for name, own in texts.items()})
        found.append([parameter.clone() for parameter in model.gate_parameters()])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, atol=1e-4)


def test_familiarity_is_an_image_s_own_and_knows_strangers():
    model, inputs = BEIT.joint(fit=True), BEIT.batch(5)
    model.train().base_model.beit.eval()
    modes = [module.training for module in model.modules()]
    whole = model.predict(**inputs)
    assert [module.training for module in model.modules()] == modes
    assert whole.logits.shape == (5, 8) and list(whole.gates) == ["beit.layers.0", "beit.layers.1"]
    assert whole.familiarity.shape == (5,) and (whole.familiarity.abs() <= 1 + 1e-6).all()
    for image in range(5):
        alone = model.predict(**rows(inputs, [image]))
        assert_close(alone.familiarity, whole.familiarity[[image]])
        assert_close(alone.logits, whole.logits[[image]], atol=1e-3)  # weights of many thousands: tiny, separable classes
    known = model.predict(**BEIT.images()["b"][0][0]).familiarity.mean()
    torch.manual_seed(5)
    assert known > model.predict(pixel_values=torch.rand(7, 3, 16, 16) * 3).familiarity.mean()
    assert BEIT.joint().predict(**inputs).familiarity is None


def loader(model: ContextGatedMOE, batches: dict[str, list]) -> list:
    """Images of all experts in one list of batches, with output numbers as labels."""
    return [(inputs, torch.tensor(model.columns[name])[labels]) for name, own in batches.items() for inputs, labels in own]


def joint_loss(model: ContextGatedMOE, batches: list) -> float:
    """The mean negative log-likelihood of the joint answer."""
    losses = [nn.functional.nll_loss(logits(model, inputs), labels, reduction="none") for inputs, labels in batches]
    return torch.cat(losses).mean().item()


def test_validation_images_choose_the_numbers():
    model, own = BEIT.joint(), BEIT.images()
    hard = {name: [(BEIT.batch(20, 30 + number), torch.arange(20) % len(CLASSES[name]))] for number, name in enumerate(CLASSES)}
    model.fit_gates(own)
    before = joint_loss(model, loader(model, hard))
    model.fit_gates({}, hard)  # pure noise: what the gates say of it is to count for little
    assert joint_loss(model, loader(model, hard)) < before - 1
    with pytest.raises(MixtureError, match="without classes="):
        BERT.shared().fit_gates({name: [BERT.batch(4)] for name in "abc"}, {"a": [BERT.batch(4)]})
    with pytest.raises(MixtureError, match="no images of expert 'b'"):
        BEIT.joint().fit_gates({"a": own["a"]})


def test_training_moves_the_gates_alone_and_ends_with_the_best_that_it_has_seen():
    for case, epochs in ((BEIT, 3), (PLAIN, 2)):
        model = case.joint().eval()
        batches, start = loader(model, case.images()), copy.deepcopy(model.state_dict())
        before = joint_loss(model, batches)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(".context_gate." in name or ".head_gate." in name or name.rpartition(".")[2] in ("expert_scale", "expert_prior")
                   for name in trainable)
        history = model.train_gates(batches, batches, epochs=epochs, learning_rate=0.02)
        after, losses = joint_loss(model, batches), [entry["validation_loss"] for entry in history]
        assert [entry["epoch"] for entry in history] == list(range(epochs + 1)) and abs(losses[0] - before) < 1e-4
        assert after < before and abs(min(losses) - after) < 1e-4
        assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])} == set(telling(model))
    model = BEIT.joint(fit=True).eval()  # what makes it worse, or fails, leaves the start
    start, right = copy.deepcopy(model.state_dict()), loader(model, BEIT.images())
    model.train_gates([(inputs, (labels + 3) % 8) for inputs, labels in right], right, epochs=1, learning_rate=0.1)
    assert_equal(model.state_dict(), start)
    spoilt = [*right, ({"pixel_values": torch.full((1, 3, 16, 16), float("nan"))}, torch.zeros(1).long())]
    for batches, message in ((spoilt, "the loss is nan"), ([], "no batches"), (iter(right), "read once only")):
        with pytest.raises(MixtureError, match=message):
            model.train_gates(batches, epochs=2, learning_rate=0.1)
        assert_equal(model.state_dict(), start)
        assert not any(module.training for module in model.modules())
