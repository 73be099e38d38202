"""Tests of adapters whose layers are called as in transformers 4, or as torch.compile and DistributedDataParallel call them."""

import json
from types import SimpleNamespace

import pytest
import torch
from families import save_family
from mixture_models import assert_close, logits
from peft import LoraConfig, get_peft_model
from pipeline import IMAGE_SIZE, ON_CPU
from safetensors.torch import load_file, save_file

from common.cli.flags import SCRIPTS
from common.cli.parser import parse
from common.data.tensors import ImageSet
from common.models import load_backbone, lora
from ContextGatedMOE import ContextGatedMOE, MixtureError, read_expert

CLASSES = list("abcd")
VIT = {"layers.": "encoder.layer.", "attention.q_proj": "attention.attention.query",
       "attention.v_proj": "attention.attention.value", "mlp.fc1": "intermediate.dense", "q_proj": "query", "v_proj": "value"}
# Family -> today's names and those of transformers 4, and what a wrapper puts before or into these.
EARLIER = {
    "vit": (VIT, "base_model.model.", "base_model.model._orig_mod."),
    "deit": (VIT, "base_model.model.", "module.base_model.model."),
    "dinov2": ({key: VIT[key] for key in VIT if "proj" in key}, "encoder.layer.1.", "encoder.layer.1._orig_mod."),
    "dinov2_giant": ({}, "base_model.", "_orig_mod.base_model."),
    "swin": ({"attention.q_proj": "attention.self.query", "attention.v_proj": "attention.self.value",
              "mlp.fc1": "intermediate.dense", "q_proj": "query", "v_proj": "value"}, "model.swin.", "model.module.swin."),
    "siglip": ({"model.vision_model.": "model.vision_model.vision_model."}, "base_model.", "module._orig_mod.base_model."),
}


def make_adapter(folder, backbone, targets, **settings):
    """Write an adapter of random numbers with today's names, ranks and scalings different from layer to layer."""
    torch.manual_seed(1)
    model = get_peft_model(load_backbone(backbone, CLASSES, 0), LoraConfig(
        r=2, lora_alpha=3, target_modules=targets, modules_to_save=["classifier"], **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def make_earlier(folder, today, names, plain, wrapped):
    """Write the same adapter with the layers' earlier names, in its options as well."""
    folder.mkdir()
    tensors, options = load_file(today / "adapter_model.safetensors"), (today / "adapter_config.json").read_text()
    for new, old in names.items():
        tensors = {key.replace(new, old): tensor for key, tensor in tensors.items()}
        options = options.replace(new, old)
    save_file({key.replace(plain, wrapped): tensor for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(options)
    return folder


def fuse(folder):
    """Make one layer of the two that DINOv2's gated MLP has of the first today, as transformers 4 did."""
    file, described = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    for key in [key for key in tensors if "up_proj" in key]:
        other = tensors.pop(key.replace("up_proj", "gate_proj"))
        tensors[key.replace("up_proj", "weights_in")] = torch.cat([other, tensors[key]]) if "lora_B" in key else tensors[key]
        del tensors[key]
    save_file(tensors, file)
    described.write_text(json.dumps(json.loads(described.read_text()) | {"target_modules": ["weights_in"]}))


def with_one_a(folder):
    """Give both layers of DINOv2's gated MLP the same A, as one layer of transformers 4 has."""
    tensors = load_file(folder / "adapter_model.safetensors")
    same = {key: tensors[key.replace("up_proj", "gate_proj")] if "lora_A" in key else tensor for key, tensor in tensors.items()}
    save_file({key: tensor.clone() for key, tensor in same.items()}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("family", EARLIER)
def test_an_adapter_with_earlier_names_says_what_it_says_with_todays(family, tmp_path):
    """In a mixture, added to one, and as `Lora_Finetune.py --expert` takes it."""
    backbone = str(tmp_path / "backbone")
    save_family(family.partition("_")[0], backbone, **({"use_swiglu_ffn": True} if family == "dinov2_giant" else {}))
    if family == "dinov2_giant":
        today = make_adapter(tmp_path / "today", backbone, ["gate_proj", "up_proj"])
        with_one_a(today)
        earlier = make_earlier(tmp_path / "earlier", today, *EARLIER[family])
        fuse(earlier)
    else:
        today = make_adapter(tmp_path / "today", backbone, ["q_proj", "v_proj", "mlp.fc1"], rank_pattern={"v_proj": 3},
                             alpha_pattern={r"1\..*q_proj": 7, "mlp.fc1": 5})
        earlier = make_earlier(tmp_path / "earlier", today, *EARLIER[family])
    torch.manual_seed(2)
    inputs = {"pixel_values": torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    answers = []
    for folder in (today, earlier):
        mixture = ContextGatedMOE.from_adapters(load_backbone(backbone, CLASSES, 0).eval(), {"one": folder}, {"one": CLASSES})
        mixture.add_expert("two", folder, classes=CLASSES)
        with mixture.fixed_gates({"one": 0.5, "two": 0.5}):
            mixed = logits(mixture, inputs)
        data = SimpleNamespace(classes=CLASSES, task=SimpleNamespace(key="one"),
                               validation=ImageSet(inputs["pixel_values"], torch.tensor([0, 1])))
        config = parse(SCRIPTS["Lora_Finetune"], ["--model", backbone, *ON_CPU])
        adopted = lora.adopt(config, data, lora.read_adapter("one", str(folder)))
        answers.append(torch.cat([mixed, logits(adopted.eval(), inputs)], 1))
    assert_close(answers[1], answers[0])
    assert_close(answers[1][:, 8:].log_softmax(1) - torch.tensor(2).log(), answers[1][:, :4])


def test_an_adapter_with_earlier_names_that_lacks_a_layer_is_refused(tmp_path):
    """Its options name the layers of every block."""
    backbone = str(tmp_path / "backbone")
    save_family("vit", backbone)
    today = make_adapter(tmp_path / "today", backbone, ["q_proj", "v_proj"])
    earlier = make_earlier(tmp_path / "earlier", today, *EARLIER["vit"])
    file = earlier / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "layer.1" not in key}, file)
    with pytest.raises(MixtureError, match="expert 'one' lacks the tensors of 'vit.layers.1.attention.q_proj'"):
        read_expert(load_backbone(backbone, CLASSES, 0), "one", earlier)
