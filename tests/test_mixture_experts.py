"""Tests of the experts: exactly peft's own models; left as they were by what fails; merged, exported, taken out."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from mixture_models import BEIT, CASES, CLASSES, PLAIN, TIED, assert_close, assert_equal, logits, recorded, refused, unchanged
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from ContextGatedMOE import ContextGatedMOE, Expert, MixtureError, read_expert


@pytest.fixture(scope="module")
def all_adapters(tmp_path_factory):
    """The folders of four experts of every base."""
    return {case: case.save_experts(tmp_path_factory.mktemp("adapters")) for case in CASES}


def test_a_one_hot_gate_and_a_single_expert_are_that_peft_model(all_adapters):
    for case, adapters in all_adapters.items():
        model, inputs = case.mixture(adapters), case.batch(3)
        for name, adapter in adapters.items():
            expected = case.peft_logits(adapter, inputs)
            with model.fixed_gates({name: 1.0}):
                assert_close(logits(model, inputs), expected)
            assert_close(logits(case.mixture({name: adapter}), inputs), expected)


@pytest.mark.parametrize(("case", "options"), [
    (BEIT, dict(init_lora_weights="orthogonal", lora_dropout=0.5)), (BEIT, dict(layers_to_transform=[1])),
    (BEIT, dict(exclude_modules=["q_proj"])), (BEIT, dict(task_type="SEQ_CLS")),
    (TIED, dict(target_modules=["lm_head", "q_proj"]))])
def test_a_lora_trained_in_another_way_is_that_peft_model(case, options, tmp_path):
    folder, inputs = case.save_adapter(tmp_path, **dict(r=2, target_modules=["q_proj", "fc1"]) | options), case.batch(3)
    if "task_type" in options:  # earlier versions of peft did not write which heads a task has
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": None}))
    assert_close(logits(case.mixture({"own": folder}), inputs), case.peft_logits(folder, inputs))


def test_a_half_precision_adapter_is_scaled_in_fp32_and_read_alone_it_is_the_same(tmp_path):
    folder = BEIT.save_adapter(tmp_path, r=3, lora_alpha=7, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"])
    file = folder / "adapter_model.safetensors"
    save_file({key: tensor.half() for key, tensor in load_file(file).items()}, file)
    mixed, alone = ContextGatedMOE.from_adapters(BEIT.build(), {"a": folder}), read_expert(BEIT.build(), "a", folder)
    assert_equal(mixed.state_dict(), ContextGatedMOE(BEIT.build(), [alone]).state_dict())
    assert_close(logits(mixed, BEIT.batch(3)), BEIT.peft_logits(folder, BEIT.batch(3)))


@pytest.mark.parametrize("case", CASES)
def test_every_layer_is_the_sum_over_the_experts(case):
    model, inputs, seen = case.shared(), case.batch(3), {}
    for name, layer in model.mixture_layers().items():
        layer.register_forward_hook(lambda _, args, output, name=name: seen.update({name: (args[0], output)}))
    gates = recorded(model, inputs)
    assert set(seen) == set(model.mixture_layers())
    for name, (x, y) in seen.items():
        x, y = x.reshape(3, -1, x.shape[-1]), y.reshape(3, -1, y.shape[-1])
        inside = [unit for unit in gates if f"{name}.".startswith(f"{unit}.")]
        weights = gates[inside[0]] if inside else list(gates.values())[-1]  # a layer after the blocks has the last weights
        expected = nn.functional.linear(x, model.mixture_layers()[name].base.weight, model.mixture_layers()[name].base.bias)
        for number, expert in enumerate(case.experts()):
            if name in expert.updates:
                down, up = expert.updates[name]
                expected = expected + weights[:, number, None, None] * (x @ down.T @ up.T)
        assert_close(y, expected)


def test_an_image_s_top_experts_alone_are_computed():
    """Many tokens: experts that an image does not use are skipped; what is not computed cannot spoil it."""
    torch.manual_seed(7)
    shapes = {"blocks.0": (4, 12, 12), "base": (2, 8, 12)}
    own = [Expert(f"{n}", {layer: (torch.randn(rank, width), torch.randn(out, rank))
                           for layer, (rank, width, out) in shapes.items()}) for n in range(8)]
    inputs = {"x": torch.randn(4, 200, 8)}
    for top_k in (1, 3, 8):
        model = PLAIN.shared(own, top_k=top_k)
        output, gates = logits(model, inputs), recorded(model, inputs)
        layer = model.base_model.blocks[0]
        assert layer._skips(200, top_k) == (top_k < 4)
        assert all(((weights > 0).sum(1) == top_k).all() for weights in gates.values())
        idle = next((n for n in range(8) if not any(weights[:, n].any() for weights in gates.values())), None)
        layer._skips = lambda *_: False  # all experts are computed, those not kept with weight zero: the reference
        assert_close(logits(model, inputs), output)
        if top_k == 1:
            del layer._skips
            layer.lora_B.data[:, layer.owner == idle] = float("nan")
            assert_close(logits(model, inputs), output)


def test_what_was_trained_without_statistics_is_kept_when_experts_change():
    model, inputs = BEIT.joint(), BEIT.batch(3)

    def weights_of_b_and_c() -> torch.Tensor:
        weights = recorded(model, inputs)["beit.layers.0"][:, -2:]
        return weights / weights.sum(1, keepdim=True)

    before = weights_of_b_and_c()
    model.remove_expert("a")
    assert_close(weights_of_b_and_c(), before)
    model.add_expert("a", BEIT.experts(["a"], (2,))[0], classes=CLASSES["a"])
    assert_close(weights_of_b_and_c(), before)


def test_a_failed_change_changes_nothing(tmp_path):
    model = BEIT.joint(fit=True).train()
    names = ("expert_names", "classes", "labels", "columns", "sizes", "same", "refuse_below", "statistics",
             "without_adapter", "chosen_gates", "shrinkage", "fitted_passes")
    good, own = BEIT.experts(["d"], (2,))[0], BEIT.labelled(3, 2)
    before = {name: copy.copy(getattr(model, name)) for name in names}

    def broken():
        yield own[0]
        raise KeyboardInterrupt

    def add(name="d", expert=good, classes=("p", "q"), images=own):
        return lambda: model.add_expert(name, expert, classes=classes, images=images)

    for change, kind, message in (
        (add("a"), MixtureError, "'a' already"),
        (add(expert=tmp_path / "nowhere"), MixtureError, "'d'"),
        (add(classes=["p"]), MixtureError, "2 outputs"),
        (add(classes=None), MixtureError, "needs classes"),
        (add(images=None), MixtureError, "needs images"),
        (add(images=broken()), KeyboardInterrupt, None),
        (add(images=[]), MixtureError, "no images of 2"),
        (add(images=BEIT.labelled(3, 5)), MixtureError, "'d' has 2 classes, but an image is labelled 2"),
        (lambda: model.remove_expert("d"), MixtureError, "no expert is called 'd'"),
        (lambda: model.fit_gates({"a": own, "b": broken()}), KeyboardInterrupt, None),
        (lambda: model.fit_gates({"a": own}, {"b": broken()}), KeyboardInterrupt, None),
        (lambda: model.fit_gates({"z": own}), MixtureError, "'z'"),
        (lambda: model.merge_and_unload({"a": 1.0, "b": 0.5}), MixtureError, "choose one by head"),
        (lambda: model.to_adapter({"a": 1.0}, tmp_path / "a", head="z"), MixtureError, "choose one by head"),
    ):
        with refused(model, message, kind):
            change()
        assert {name: getattr(model, name) for name in names} == before and model.config.num_labels == 8
        assert all(module.training for module in model.modules())


def test_unloading_gives_the_base_back():
    base = BEIT.build()
    base.beit.embeddings.requires_grad_(False)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    with unchanged(base):
        model = ContextGatedMOE(base, BEIT.joint_experts(), CLASSES)
        model.train()(**BEIT.batch(2)).logits.sum().backward()
        assert model.unload().eval() is base
    assert base.config.id2label == BEIT.build().config.id2label and base.num_labels == 3
    checkpointing = {str(type(vars(module).get("_gradient_checkpointing_func"))) for module in base.modules()}
    assert not any("ContextGatedMOE" in kind for kind in checkpointing)


@pytest.mark.parametrize("case", [BEIT, PLAIN])
def test_a_fixed_mix_merged_or_as_one_adapter_is_that_mix(case, all_adapters, tmp_path):
    weights = {"attention": 0.3, "on_head": 0.5, "scaled": -0.4}
    model, inputs = case.mixture(all_adapters[case]), case.batch(3)
    with model.fixed_gates(weights):
        expected = logits(model, inputs)
    model.to_adapter(weights, tmp_path)
    assert_close(case.peft_logits(tmp_path, inputs), expected)
    assert_close(logits(ContextGatedMOE.from_adapters(case.build(), {"one": tmp_path}), inputs), expected)
    merged = model.merge_and_unload(weights)
    assert {type(module) for module in merged.modules()} == {type(module) for module in case.build().modules()}
    assert_close(logits(merged, inputs), expected)


@pytest.mark.parametrize(("weights", "head"), [({"b": 1.0}, None), ({"a": 0.4, "b": 0.6}, "b")])
def test_a_merged_joint_mixture_answers_with_one_experts_classes(weights, head, tmp_path):
    model, base, inputs = BEIT.joint(), BEIT.build(), BEIT.batch(3)
    with model.fixed_gates(weights):
        expected = logits(model, inputs)[:, model.columns["b"]].log_softmax(1)
    model.to_adapter(weights, tmp_path, head)
    base.classifier = nn.Linear(16, 5)
    merged = model.merge_and_unload(weights, head)
    merged.save_pretrained(tmp_path / "merged")
    opened = type(merged).from_pretrained(tmp_path / "merged")
    for one in (PeftModel.from_pretrained(base, tmp_path).eval(), merged, opened):
        assert_close(logits(one, inputs).log_softmax(1), expected)
    assert list(opened.config.id2label.values()) == CLASSES["b"]


def test_merging_into_a_tied_head_leaves_the_embedding_alone(tmp_path):
    head_alone = replace(TIED, first=("lm_head",), second=())
    model, inputs = ContextGatedMOE(TIED.build(), head_alone.experts(["a"])), TIED.batch(2)
    embedding = model.base_model.get_input_embeddings().weight.clone()
    with model.fixed_gates({"a": 1.0}):
        expected = logits(model, inputs)
    merged = model.merge_and_unload({"a": 1.0})
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    merged.save_pretrained(tmp_path)
    assert_close(logits(type(merged).from_pretrained(tmp_path), inputs), expected)
