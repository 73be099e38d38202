"""Tests of what no mixture reproduces: adapters and bases that are refused by name, and left as they were."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from mixture_models import BEIT, BERT, PLAIN, refused, unchanged
from peft import IA3Config
from peft.tuners.lora import KasaConfig
from safetensors.torch import load_file, save_file
from torch import nn

from ContextGatedMOE import ContextGatedMOE, Expert, MixtureError, read_expert

LAYERS = {"r": 2, "target_modules": ["q_proj", "fc1"]}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    return BEIT.save_experts(tmp_path_factory.mktemp("adapters"))


def assert_refused(base: nn.Module, folder: Path, message: str = "'culprit'") -> None:
    """The adapter is refused by the expert's name."""
    with refused(base, message):
        ContextGatedMOE.from_adapters(base, {"culprit": folder})


@pytest.mark.parametrize(("case", "options"), [
    *((BEIT, LAYERS | options) for options in (
        dict(use_dora=True), dict(bias="lora_only"), dict(lora_bias=True), dict(init_lora_weights="pissa"),
        dict(target_modules=["projection"]), dict(modules_to_save=["layernorm"]), dict(kasa_config=KasaConfig()),
        dict(target_parameters=["fc1.weight"], target_modules=["q_proj"]))),
    (BEIT, dict(config=IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]))),
    (BERT, dict(r=2, target_modules=["word_embeddings", "query"])),
    (BERT, dict(r=2, target_modules=["query"], trainable_token_indices={"word_embeddings": [1, 2]})),
])
def test_an_adapter_that_no_mixture_reproduces_is_refused(case, options, tmp_path):
    assert_refused(case.build(), case.save_adapter(tmp_path, **options))


def test_an_adapter_of_another_base_or_a_damaged_one_is_refused(adapters, tmp_path):
    for options in (dict(hidden_size=8), dict(num_hidden_layers=1), dict(num_hidden_layers=3)):
        other = replace(BEIT, make=partial(BEIT.make, **options))
        assert_refused(BEIT.build(), other.save_adapter(tmp_path / "other", modules_to_save=["classifier"], **LAYERS))
    assert_refused(BEIT.build(), tmp_path / "nowhere")
    folder = tmp_path / "damaged"
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    tensors = load_file(adapters["scaled"] / weights.name)
    for damage in (
        *(partial(config.write_text, text) for text in ("", '{"peft_type": "NOPE"}', '{"peft_type": "LORA", "r": "x"}')),
        lambda: weights.write_bytes(weights.read_bytes()[:-1]),
        weights.unlink,
        partial(save_file, {key: torch.ones(3, 3) for key in tensors}, weights),
        *(partial(save_file, {key: tensor for key, tensor in tensors.items() if lost not in key}, weights)
          for lost in ("lora_A", "layers.1.mlp", "classifier")),
    ):
        shutil.copytree(adapters["scaled"], folder, dirs_exist_ok=True)
        damage()
        assert_refused(BEIT.build(), folder)
    base = BEIT.build()
    with refused(base, "'culprit'"):  # among good ones
        ContextGatedMOE.from_adapters(base, {**adapters, "culprit": tmp_path})


def test_base_models_that_cannot_be_mixed_are_refused(adapters):
    eight = BEIT.build()
    eight.beit.layers[0].mlp.fc1.weight = nn.Parameter(torch.zeros(24, 16, dtype=torch.int8), requires_grad=False)
    assert_refused(eight, adapters["scaled"], "'beit.layers.0.mlp.fc1', which is a Linear with weights in 4 or 8 bits; load the")
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(MixtureError, match="reads without calling it"):
        ContextGatedMOE(base, [Expert("a", {"attention.out_proj": (torch.randn(2, 8), torch.randn(8, 2))})])
    with pytest.raises(MixtureError, match="no data in memory"):
        ContextGatedMOE(BEIT.build().to("meta"), BEIT.experts())
    both = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1))
    with refused(both, "an encoder and a decoder"):
        ContextGatedMOE(both, [])
    with pytest.raises(MixtureError, match="part of a mixture already"):
        ContextGatedMOE.from_adapters(BEIT.joint().base_model, adapters)


def test_requests_without_sense_are_refused():
    for names, options, message in (
        ("abc", dict(gate_hidden=0), "gate_hidden"), ("abc", dict(top_k=0), "top_k"), ("abc", dict(passes=0), "passes"),
        ("aa", {}, "two experts have one name")
    ):
        base = PLAIN.build()
        with refused(base, message):
            ContextGatedMOE(base, PLAIN.experts(names), **options)
    with pytest.raises(MixtureError, match="passes must be 1 or 2, not 3"):
        PLAIN.joint().passes = 3


def test_reading_an_expert_leaves_the_base_alone(adapters):
    base, mixed = BEIT.build().train(), BEIT.shared()
    next(base.parameters()).requires_grad_(False)
    with unchanged(base), unchanged(mixed):
        for name in ("attention", "on_head", "scaled"):
            read_expert(base, name, adapters[name])
            read_expert(mixed.base_model, name, adapters[name])  # the base of a mixture
    assert all(module.training for module in base.modules())
