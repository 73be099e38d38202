"""Tests of what a finished adapter is refused for, alike wherever it comes in: as an expert of a mixture, or by `--expert`."""

import json
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mixture_models import BEIT, assert_close, logits, refused
from peft import LoraConfig, PeftModel, get_peft_model
from pipeline import IMAGE_SIZE, ON_CPU
from transformers import BeitForImageClassification, Swinv2Config, Swinv2ForImageClassification, ViTImageProcessorPil

from common.cli.flags import SCRIPTS
from common.cli.parser import parse
from common.data.tensors import ImageSet
from common.errors import UserError
from common.models import load_backbone, lora
from ContextGatedMOE import ContextGatedMOE, MixtureError

CLASSES = list("abcd")
NUMBERS = ["1", "2", "10", "11"]  # as this project sorts them; by characters it is 1, 10, 11, 2
IMAGES = ImageSet(torch.randn(64, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)),
                  torch.arange(64) % 4)


def adopted(model, folder, classes=CLASSES, validation=None):
    """What `Lora_Finetune.py --expert` and `CGM_Lora.py --add_expert` make of an adapter."""
    data = SimpleNamespace(classes=classes, task=SimpleNamespace(key="one"), validation=validation or IMAGES)
    config = parse(SCRIPTS["Lora_Finetune"], ["--model", model, *ON_CPU])
    return lora.adopt(config, data, lora.read_adapter("one", str(folder)))


# Whatever takes an adapter, given the name of a backbone.
ENTRANCES = {
    "from_adapters": lambda model, folder, classes=CLASSES: ContextGatedMOE.from_adapters(
        load_backbone(model, classes, 0), {"one": folder}, {"one": classes}),
    "add_expert": lambda model, folder, classes=CLASSES: ContextGatedMOE(load_backbone(model, classes, 0), []).add_expert(
        "one", folder, classes=classes),
    "--expert, --add_expert": adopted,
}


@pytest.fixture(scope="module")
def adapter(backbone, tmp_path_factory):
    """An adapter of the tiny backbone."""
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(load_backbone(backbone, CLASSES, 0), LoraConfig(
        r=2, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.0 if "bias" in name else 0.3)
    bias = model.classifier.modules_to_save.default.bias
    bias.data -= logits(model.eval(), {"pixel_values": IMAGES.inputs}).mean(0)  # so that every class is the answer at times
    model.save_pretrained(folder)
    return folder


def changed(adapter, folder, **options):
    """A copy of an adapter with other options."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    return folder


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_adapters_that_are_more_than_low_rank_updates_of_the_base_are_refused(entrance, adapter, backbone, tmp_path):
    for number, (options, words) in enumerate((
        ({"init_lora_weights": "pissa_niter_4"}, "initialised by 'pissa_niter_4', which changes the base"),
        ({"use_dora": True}, "uses DoRA"), ({"layer_replication": [[0, 1]]}, "uses layer_replication"),
    )):
        with pytest.raises((MixtureError, UserError), match=words):
            ENTRANCES[entrance](backbone, changed(adapter, tmp_path / f"{number}", **options))


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_an_adapter_of_a_base_with_other_weights_is_refused(entrance, adapter, backbone, other_backbone, tmp_path, capsys):
    """And one of a copy of the base is not, nor one of what is not here; nothing is asked of the network."""
    with pytest.raises((MixtureError, UserError), match=f"'one' was trained on {other_backbone}, whose '.*' is not that of"):
        ENTRANCES[entrance](backbone, changed(adapter, tmp_path / "other", base_model_name_or_path=other_backbone))
    model = BeitForImageClassification.from_pretrained(backbone, num_labels=7, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path / "copy")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    with warnings.catch_warnings(record=True) as warned:
        for place in ("copy", "rounded"):
            stated = str(tmp_path / place)
            ENTRANCES[entrance](backbone, changed(adapter, tmp_path / f"of_{place}", base_model_name_or_path=stated))
        assert "was trained on" not in capsys.readouterr().out and not warned
        ENTRANCES[entrance](backbone, changed(adapter, tmp_path / "of_unknown", base_model_name_or_path="nobody/nothing"))
    said = [str(one.message) for one in warned] or [capsys.readouterr().out]
    assert "trained on nobody/nothing, which is not here" in said[-1]


def test_on_swinv2_layers_that_get_an_image_are_mixed_and_its_position_mlp_is_refused(tmp_path):
    """It is the first layer in a block, and 2 wide, so that the tokens were thought to be so. Training leaves it out, too."""
    torch.manual_seed(0)
    backbone = str(tmp_path / "backbone")
    config = Swinv2Config(image_size=IMAGE_SIZE, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4)
    Swinv2ForImageClassification(config).save_pretrained(backbone)
    ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(backbone)
    everything = LoraConfig(r=2, target_modules="all-linear", exclude_modules=["classifier"], modules_to_save=["classifier"])
    get_peft_model(load_backbone(backbone, CLASSES, 0), everything).save_pretrained(tmp_path / "all")
    for entrance in ENTRANCES.values():
        with pytest.raises((MixtureError, UserError), match="position_bias_mlp.0', which gets positions and no image"):
            entrance(backbone, tmp_path / "all")
    trained = lora.add_lora(load_backbone(backbone, CLASSES, 0), 2, 4, 0)
    for name, parameter in trained.named_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) if "lora_" in name else 0
    trained.save_pretrained(tmp_path / "ours")
    mixture = ContextGatedMOE.from_adapters(load_backbone(backbone, CLASSES, 0), {"one": tmp_path / "ours"}, {"one": CLASSES})
    mixture.fit_gates({"one": [(IMAGES.inputs, IMAGES.labels)]})
    inputs = {"pixel_values": IMAGES.inputs}
    assert torch.isfinite(logits(mixture.eval(), inputs)).all()
    with mixture.fixed_gates({"one": 1}):
        assert_close(logits(mixture, inputs), logits(trained.eval(), inputs).log_softmax(1))


# ---- classes ----


def outputs(model, folder, images):
    """The logits of an adapter by peft alone, in the order of its head."""
    return logits(PeftModel.from_pretrained(load_backbone(model, CLASSES, 0), folder).eval(), {"pixel_values": images})


def test_a_head_whose_classes_are_named_in_another_order_is_put_into_that_of_the_task(adapter, backbone, tmp_path, capsys):
    """Or refused, where it is the caller who says the order: adapters that name their classes beside them or by their base."""
    stated, of_base = changed(adapter, tmp_path / "stated"), tmp_path / "base"
    for folder in (stated, of_base):
        load_backbone(backbone, sorted(NUMBERS), 0).save_pretrained(folder)
        if folder == stated:
            (folder / "model.safetensors").unlink()
    expected = outputs(backbone, adapter, IMAGES.inputs)[:, [0, 3, 1, 2]]
    for folder in (stated, changed(adapter, tmp_path / "by_base", base_model_name_or_path=str(of_base))):
        model = adopted(backbone, folder, NUMBERS)
        assert "has the classes in the order 1, 10, 11, 2" in capsys.readouterr().out
        assert_close(logits(model.eval(), {"pixel_values": IMAGES.inputs}), expected)
        mixture = ContextGatedMOE(load_backbone(backbone, NUMBERS, 0), [lora.expert_of("one", model)], {"one": NUMBERS}).eval()
        assert_close(logits(mixture, {"pixel_values": IMAGES.inputs}), expected.log_softmax(1))
        for entrance in ("from_adapters", "add_expert"):
            with pytest.raises(MixtureError, match="in the order of its id2label: 1, 10, 11, 2"):
                ENTRANCES[entrance](backbone, folder, NUMBERS)


def test_a_head_that_does_not_name_its_classes_is_tried_in_the_usual_orders(adapter, backbone, capsys):
    as_it_is = outputs(backbone, adapter, IMAGES.inputs)
    said = as_it_is.argmax(1)
    assert len(set(said.tolist())) == 4
    for labels, expected, words in (
        (torch.tensor([0, 2, 3, 1])[said], [0, 3, 1, 2], "on 100% with the classes in the order 1, 10, 11, 2, which is taken"),
        (said, [0, 1, 2, 3], ""), (torch.arange(64) % 4, [0, 1, 2, 3], "hardly more than by chance"),
    ):
        model = adopted(backbone, adapter, NUMBERS, ImageSet(IMAGES.inputs, labels))
        printed = capsys.readouterr().out
        assert words in printed and (words or not printed)
        assert_close(logits(model.eval(), {"pixel_values": IMAGES.inputs}), as_it_is[:, expected])


def test_classes_are_names_in_an_order():
    """A list, or the id2label of a model; alike for a new mixture and for an expert that is added."""
    named, (expert,) = {1: "y", 0: "x"}, BEIT.experts(["a"], [2])
    for given in (("x", "y"), named, {"1": "y", "0": "x"}, iter(["x", "y"]), dict.fromkeys("xy").keys()):
        assert ContextGatedMOE(BEIT.build(), [expert], {"a": given}).classes == {"a": ["x", "y"]}
    for given, words in (({"x", "y"}, "as a list of one or more different names, in the order"), ({1: "x", 2: "y"}, "from 0 to 1"),
                         ("xy", "not 'xy'"), ([0, 1], "different names"), (["x", "x"], "different names"), ([], "different names")):
        base = BEIT.build()
        with refused(base, words):
            ContextGatedMOE(base, [expert], {"a": given})
    mixture = ContextGatedMOE(BEIT.build(), [])
    with refused(mixture, words):
        mixture.add_expert("a", expert, classes=given)


# ---- pictures ----


def test_an_adapter_with_another_image_processor_is_refused(adapter, backbone, tmp_path):
    """And what differs is named; settings that change nothing, or are written as transformers 4 did, are no difference."""
    usual = json.loads((Path(backbone) / "preprocessor_config.json").read_text())
    old = {"feature_extractor_type": "BeitFeatureExtractor", "size": IMAGE_SIZE, "resample": 2, "do_resize": True,
           "do_normalize": True, "do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for number, (settings, words) in enumerate((
        ({**usual, "image_mean": [0.485, 0.456, 0.406]}, "image_mean = 0.485, 0.456, 0.406, not 0.5, 0.5, 0.5"),
        ({**usual, "do_center_crop": True, "crop_size": {"height": 24, "width": 24}}, "do_center_crop = True, not False"),
        ({**usual, "resample": 0}, "resample = 0, not 2"), ({**usual, "rescale_factor": 1}, "rescale_factor = 1, not 0.0039"),
        (old, None), ({**usual, "crop_size": {"height": 9, "width": 9}}, None), ({**old, "size": 48}, "size = 48 x 48, not 32 x 32"),
    )):
        folder = changed(adapter, tmp_path / f"{number}")
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match=words) if words else nullcontext():
            adopted(backbone, folder)
