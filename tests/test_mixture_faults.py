"""Tests of what goes wrong around a mixture: images and labels of no use, interruptions, threads, and no experts' adapters."""

from collections.abc import Callable

import pytest
import torch
from mixture_models import BEIT, logits, refused
from torch import Tensor

from ContextGatedMOE import MixtureError, routing
from ContextGatedMOE.statistics import Statistics, discriminant


def spoilt(value: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images with one such pixel."""
    def changed(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        pixels = pixels.clone()
        pixels[1, 2, 3, 4] = value
        return pixels, labels

    return changed


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("change", "message"), [
    (spoilt(float("nan")), "expert 'b' gives values at .* infinite or no numbers"),
    (lambda pixels, labels: (pixels, labels[:, None]), r"expert 'b' needs labels of shape \(7,\)"),
    (lambda pixels, labels: (pixels, labels[1:]), r"expert 'b' needs labels of shape \(7,\)"),
    (lambda pixels, labels: (pixels, labels.float()), r"expert 'b' needs labels of shape \(7,\)"),
    (lambda pixels, labels: (pixels, labels - 1), "expert 'b' has 5 classes, but an image is labelled -1"),
    (lambda pixels, labels: (pixels, labels + 1), "expert 'b' has 5 classes, but an image is labelled 5"),
])
def test_images_and_labels_of_no_use_are_refused_by_expert_and_leave_the_gates_alone(change, message, passes):
    model, good = BEIT.joint(passes=passes), BEIT.images()
    pixels, labels = change(good["b"][0][0]["pixel_values"], good["b"][0][1])
    bad = {**good, "b": [({"pixel_values": pixels}, labels), *good["b"]]}
    known = (model.statistics, model.router.start, model.shrinkage, model.chosen_gates)
    for training, validation in ((bad, good), (good, bad)):
        with refused(model, message):
            model.fit_gates(training, validation)
        assert known == (model.statistics, model.router.start, model.shrinkage, model.chosen_gates)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("run", [
    lambda model: logits(model, BEIT.batch(2)), lambda model: model.fit_gates(BEIT.images(), BEIT.images())])
@pytest.mark.parametrize("passes", [1, 2])
def test_an_interruption_in_the_middle_of_a_pass_leaves_nothing_of_it(passes, run):
    model = BEIT.joint(passes=passes)
    expected = logits(model, BEIT.batch(2))
    hook = model.base_model.beit.layers[1].mlp.fc1.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    hook.remove()
    assert routing._thread.running is None and routing._thread.weights is None
    with pytest.raises(MixtureError, match="belongs to a mixture"):
        model.base_model.classifier(torch.zeros(2, 16))
    assert torch.equal(logits(model, BEIT.batch(2)), expected)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_mixture_is_in_evaluation_mode_until_the_last_that_asks_for_it_has_ended(order):
    """As in several threads, of which one ends before the other."""
    model = BEIT.joint().train()
    model.base_model.beit.eval()
    modes, blocks = [module.training for module in model.modules()], [model.evaluating(), model.evaluating()]
    for block in blocks:
        block.__enter__()
    for number in order:
        assert not any(module.training for module in model.modules())
        blocks[number].__exit__(None, None, None)
    assert [module.training for module in model.modules()] == modes


def test_nothing_is_refused_once_experts_have_changed():
    model = BEIT.joint(fit=True)
    for change in (lambda: model.remove_expert("a"),
                   lambda: model.add_expert("d", None, classes=["p", "q"], images=BEIT.labelled(3, 2))):
        model.refuse_below = 0.25
        change()
        assert model.refuse_below is None


def test_a_class_of_two_images_beside_one_of_two_hundred_is_found():
    """Unless its mean is shrunk, it lies so far off in many directions that its own images are nearer to the other."""
    torch.manual_seed(0)
    width, counts = 400, (200, 2, 200)
    centres = torch.randn(3, width) * 8 / width**0.5

    def images(classes: Tensor) -> Tensor:
        return centres[classes] + torch.randn(len(classes), width)

    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    found = discriminant([Statistics.of(images(labels), labels, 3)], 0.3)
    asked = torch.arange(3).repeat_interleave(200)
    answers = (images(asked) @ found.weight.T + found.bias).argmax(1)
    assert (answers[asked == 1] == 1).float().mean() > 0.5
    assert (answers == asked).float().mean() > 0.7


class WithoutFp64(Tensor):
    """A tensor on a device that has no fp64, as Apple's."""

    def double(self) -> Tensor:
        raise TypeError("no fp64")

    def cpu(self) -> Tensor:
        return self.as_subclass(Tensor)


def test_sums_are_made_where_there_is_fp64():
    features, labels = torch.randn(6, 3), torch.arange(6) % 2
    found, expected = (Statistics.of(values, labels, 2) for values in (features.as_subclass(WithoutFp64), features))
    assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in vars(expected))


def test_familiarity_is_of_full_precision_where_passes_are_not():
    model = BEIT.joint()
    model.fit_gates(BEIT.images())
    features = {name: torch.randn(5, gate.feature_count) for name, gate in model.gates().items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = model.familiarity_of(features)
    assert torch.equal(found, model.familiarity_of(features))
