"""Tests of the layers that compute faster: they give what transformers' and peft's own give."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from pipeline import IMAGE_SIZE
from torch import nn
from transformers import BeitForImageClassification

from common import models
from common.training import kernels

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def batch():
    """Random images and labels."""
    torch.manual_seed(7)
    return torch.randn(5, 3, IMAGE_SIZE, IMAGE_SIZE), torch.tensor([0, 1, 2, 1, 0])


def adapted(backbone):
    """A model with an adapter that changes something."""
    model = models.add_lora(models.load_backbone(backbone, CLASSES, 0), rank=3, alpha=7, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def plain(backbone, folder):
    """The same model as the libraries build it by themselves."""
    base = BeitForImageClassification.from_pretrained(backbone, num_labels=len(CLASSES), ignore_mismatched_sizes=True)
    return PeftModel.from_pretrained(base, folder, is_trainable=True).eval()


def gradients(model, batch, precision=None):
    """Gradient of the loss by parameter."""
    model.zero_grad()
    with torch.autocast("cpu", precision, enabled=precision is not None):
        loss = F.cross_entropy(model(batch[0]).logits.float(), batch[1], reduction="sum")
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture(scope="module")
def pair(backbone, tmp_path_factory):
    """Our model with an adapter, and the libraries' own reading of what it saved."""
    ours, folder = adapted(backbone), tmp_path_factory.mktemp("adapter")
    ours.save_pretrained(folder)
    return ours, plain(backbone, folder)


def test_an_adapted_model_is_the_one_that_peft_opens(pair, batch):
    ours, theirs = pair
    assert any(isinstance(module, kernels.LoraLinear) for module in ours.modules())
    assert not any(isinstance(module, kernels.LoraLinear) for module in theirs.modules())
    with torch.no_grad():
        assert torch.allclose(ours(batch[0]).logits, theirs(batch[0]).logits, atol=1e-6)


@pytest.mark.parametrize("precision, tolerance", [(None, 1e-5), (torch.bfloat16, 0.05)])
def test_gradients_are_those_of_the_libraries(pair, batch, precision, tolerance):
    ours, theirs = (gradients(model, batch, precision) for model in pair)
    assert list(ours) == list(theirs)
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-6, name


def test_the_bias_learns_as_with_the_libraries_attention(backbone, batch):
    ours, theirs = models.load_backbone(backbone, CLASSES, 0), models.load_backbone(backbone, CLASSES, 0)
    theirs.set_attn_implementation("sdpa")
    ours, theirs = gradients(ours, batch), gradients(theirs, batch)
    assert any("relative_position_bias" in name and gradient.any() for name, gradient in ours.items())
    assert list(ours) == list(theirs)
    assert all(torch.allclose(ours[name], gradient, atol=1e-5) for name, gradient in theirs.items())


def test_a_merged_and_a_disabled_adapter_are_peft_s(backbone, batch):
    model, images = adapted(backbone), batch[0]
    with torch.no_grad():
        before = model(images).logits
        with model.disable_adapter():
            assert not torch.allclose(model(images).logits, before, atol=1e-3)
        model.merge_adapter()
        assert torch.allclose(model(images).logits, before, atol=1e-5)


def test_a_second_adapter_is_added_as_peft_does(backbone, batch):
    model, images = adapted(backbone), batch[0]
    model.add_adapter("second", model.peft_config["default"])
    for name in ("default", "second"):
        model.base_model.set_adapter(name)
        assert torch.isfinite(model(images).logits).all()


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4)])
def test_any_number_of_dimensions_comes_before_the_width(shape):
    config = models.PeftLoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
    layer, x = kernels.LoraLinear(nn.Linear(4, 6), "default", config=config, r=2, lora_alpha=4), torch.randn(shape)
    expected = layer.base_layer(x) + 2 * layer.lora_B["default"](layer.lora_A["default"](x))
    assert layer(x).shape == (*shape[:-1], 6) and torch.allclose(layer(x), expected, atol=1e-6)
