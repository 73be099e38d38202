"""Tests of the layers that compute faster: they give what transformers' and peft's own give."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from pipeline import IMAGE_SIZE
from torch import nn
from transformers import BeitForImageClassification

from common import models
from common.models import lora

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def batch():
    """Random images and labels."""
    torch.manual_seed(7)
    return torch.randn(5, 3, IMAGE_SIZE, IMAGE_SIZE), torch.tensor([0, 1, 2, 1, 0])


def adapted(backbone):
    """A model with an adapter that changes something."""
    model = lora.add_lora(models.load_backbone(backbone, CLASSES, 0), rank=3, alpha=7, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def gradients(model, batch, precision=None):
    """Gradient of the loss by parameter."""
    model.zero_grad()
    with torch.autocast("cpu", precision, enabled=precision is not None):
        loss = F.cross_entropy(model(batch[0]).logits.float(), batch[1], reduction="sum")
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_outputs_and_gradients_of_an_adapted_model_are_those_of_the_one_that_peft_opens(backbone, batch, tmp_path):
    ours = adapted(backbone)
    ours.save_pretrained(tmp_path)
    base = BeitForImageClassification.from_pretrained(backbone, num_labels=len(CLASSES), ignore_mismatched_sizes=True)
    theirs = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    assert any(isinstance(module, lora.LoraLinear) for module in ours.modules())
    assert not any(isinstance(module, lora.LoraLinear) for module in theirs.modules())
    with torch.no_grad():
        assert torch.allclose(ours(batch[0]).logits, theirs(batch[0]).logits, atol=1e-6)
    for precision, tolerance in ((None, 1e-5), (torch.bfloat16, 0.05)):
        found, expected = (gradients(model, batch, precision) for model in (ours, theirs))
        assert list(found) == list(expected)
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-6, name


def test_the_bias_learns_as_with_the_libraries_attention(backbone, batch):
    ours, theirs = (models.load_backbone(backbone, CLASSES, 0) for _ in range(2))
    theirs.set_attn_implementation("sdpa")
    ours, theirs = gradients(ours, batch), gradients(theirs, batch)
    assert any("relative_position_bias" in name and gradient.any() for name, gradient in ours.items())
    assert list(ours) == list(theirs)
    assert all(torch.allclose(ours[name], gradient, atol=1e-5) for name, gradient in theirs.items())


def test_a_merged_a_disabled_and_a_second_adapter_are_peft_s(backbone, batch):
    model, images = adapted(backbone), batch[0]
    with torch.no_grad():
        before = model(images).logits
        with model.disable_adapter():
            assert not torch.allclose(model(images).logits, before, atol=1e-3)
        model.merge_adapter()
        assert torch.allclose(model(images).logits, before, atol=1e-5)
        model.unmerge_adapter()
        model.add_adapter("second", model.peft_config["default"])
        model.base_model.set_adapter("second")
        assert torch.isfinite(model(images).logits).all()


def test_any_number_of_dimensions_comes_before_the_width():
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
    layer = lora.LoraLinear(nn.Linear(4, 6), "default", config=config, r=2, lora_alpha=4)
    for x in (torch.randn(4), torch.randn(2, 4), torch.randn(2, 3, 4)):
        expected = layer.base_layer(x) + 2 * layer.lora_B["default"](layer.lora_A["default"](x))
        assert layer(x).shape == (*x.shape[:-1], 6) and torch.allclose(layer(x), expected, atol=1e-6)
