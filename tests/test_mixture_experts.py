"""Tests of the experts: exactly peft's own models, added, removed, merged, exported; what cannot be mixed is refused."""

import copy
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixture_models import (
    CASES,
    CLASSES,
    Case,
    assert_close,
    assert_same_tensors,
    assert_unchanged,
    beit,
    experts,
    joint,
    labelled,
    llama,
    logits,
    loop,
    mixture,
    peft_logits,
    randomise_gates,
    recorded,
    save_adapter,
    save_experts,
    shared,
    snapshot,
)
from peft import IA3Config, PeftModel
from peft.tuners.lora import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from ContextGatedMOE import ContextGatedMOE, Expert, MixtureError, read_expert

EXPERTS = ("attention", "headless", "on_head", "scaled")
BEIT, BERT, LLAMA, PLAIN = CASES["beit"], CASES["bert"], CASES["llama"], CASES["plain"]


@pytest.fixture(scope="module")
def all_adapters(tmp_path_factory) -> dict[Case, dict[str, Path]]:
    return {case: save_experts(case, tmp_path_factory.mktemp(name)) for name, case in CASES.items()}


@pytest.fixture
def beit_adapters(all_adapters) -> dict[str, Path]:
    return all_adapters[BEIT]


# --- Exactly peft -----------------------------------------------------------------------------------------------------


def test_a_one_hot_gate_and_a_single_expert_are_that_peft_model(all_adapters):
    for case, adapters in all_adapters.items():
        model, inputs = mixture(case, adapters), case.batch(3)
        for name in EXPERTS:
            expected = peft_logits(case, adapters[name], inputs)
            with model.fixed_gates({name: 1.0}):
                assert_close(logits(model, inputs), expected)
            assert_close(logits(mixture(case, {name: adapters[name]}), inputs), expected)


def test_a_lora_trained_in_another_way_is_that_peft_model(tmp_path):
    for number, options in enumerate(
        (
            dict(init_lora_weights="gaussian"),
            dict(init_lora_weights="orthogonal"),
            dict(velora_config=VeloraConfig(num_groups=4)),
            dict(lora_dropout=0.5),
            dict(layers_to_transform=[1]),
            dict(exclude_modules=["q_proj"]),
            dict(use_rslora=True),
        )
    ):
        folder = save_adapter(BEIT.build(), tmp_path / f"{number}", **{"r": 2, "target_modules": ["q_proj", "fc1"], **options})
        inputs = BEIT.batch(3)
        assert_close(logits(mixture(BEIT, {"own": folder}), inputs), peft_logits(BEIT, folder, inputs))
    tied = Case(lambda: llama(tie_word_embeddings=True), LLAMA.inputs, LLAMA.first, LLAMA.second, LLAMA.head)
    folder = save_adapter(tied.build(), tmp_path / "tied", r=2, target_modules=["lm_head", "q_proj"])
    assert_close(logits(mixture(tied, {"own": folder}), tied.batch(2)), peft_logits(tied, folder, tied.batch(2)))


def test_every_layer_is_the_sum_over_a_loop(all_adapters):
    for case, adapters in all_adapters.items():
        model, inputs, seen = mixture(case, adapters), case.batch(3), {}
        for name, layer in model.mixture_layers().items():
            layer.register_forward_hook(lambda _, args, output, name=name, seen=seen: seen.update({name: (args[0], output)}))
        gates = recorded(model, inputs)
        assert set(seen) == set(model.mixture_layers())
        for name, (x, y) in seen.items():
            x, y = x.reshape(3, -1, x.shape[-1]), y.reshape(3, -1, y.shape[-1])
            inside = [unit for unit in gates if f"{name}.".startswith(f"{unit}.")]
            weights = gates[inside[0]] if inside else list(gates.values())[-1]  # a layer after the blocks has the last weights
            layer = model.mixture_layers()[name]
            assert_close(y, loop(x, layer.base, weights, name, [adapters[expert] for expert in EXPERTS], name == case.head))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(ranks=st.lists(st.integers(1, 5), min_size=1, max_size=8), batch=st.integers(1, 4), seed=st.integers(0, 99))
def test_any_ranks_and_numbers_of_experts(ranks, batch, seed):
    base, inputs = PLAIN.build(), PLAIN.batch(batch, seed)
    updates = {f"{index}": (torch.randn(rank, 8), torch.randn(12, rank)) for index, rank in enumerate(ranks)}
    model = randomise_gates(ContextGatedMOE(base, [Expert(name, {"base": update}) for name, update in updates.items()]), seed)
    assert_close(recorded(model, inputs)["base"].sum(1), torch.ones(batch))
    for name, (down, up) in updates.items():
        merged = PLAIN.build()
        merged.base.weight.data += up @ down
        with model.fixed_gates({name: 1.0}):
            assert_close(logits(model, inputs), logits(merged, inputs), atol=1e-4)


def test_the_order_of_experts_does_not_matter():
    for case in (BEIT, PLAIN):
        models = []
        for names in ("abc", "cab"):
            own = {expert.name: expert for expert in experts(case, list(CLASSES), (2, 5, 1))}
            model = ContextGatedMOE(
                case.build(), [own[name] for name in names], {name: CLASSES[name] for name in names}, gate_hidden=8
            )
            model.fit_gates({name: labelled(case, "abc".index(name), len(CLASSES[name])) for name in names})
            models.append(model)
        assert models[0].expert_names == models[1].expert_names == ["a", "b", "c"] and models[0].labels == models[1].labels
        assert_same_tensors(models[1].state_dict(), models[0].state_dict())


def test_an_image_top_1_expert_alone_is_computed():
    """Many tokens: experts that an image does not use are skipped; what is not computed cannot spoil it."""
    torch.manual_seed(7)
    own = [
        Expert(f"{n}", {"blocks.0": (torch.randn(4, 12), torch.randn(12, 4)), "base": (torch.randn(2, 8), torch.randn(12, 2))})
        for n in range(8)
    ]
    inputs = {"x": torch.randn(4, 200, 8)}
    for top_k in (1, 2, 3, 8):
        model = randomise_gates(ContextGatedMOE(PLAIN.build(), own, top_k=top_k))
        output, gates = logits(model, inputs), recorded(model, inputs)
        alone = torch.cat([logits(model, {"x": image[None]}) for image in inputs["x"]])
        assert_close(alone, output)
        layer = model.base_model.blocks[0]
        assert layer._skips(200) == (top_k < 4) and all(((weights > 0).sum(1) == top_k).all() for weights in gates.values())
        idle = next((n for n in range(8) if not any(weights[:, n].any() for weights in gates.values())), None)
        layer._skips = lambda tokens: False  # all experts are computed, those not kept with weight zero: the reference
        assert_close(logits(model, inputs), output)
        if idle is not None and top_k == 1:
            del layer._skips
            layer.lora_B.data[:, layer.owner == idle] = float("nan")
            assert_close(logits(model, inputs), output)


# --- Adding and removing ----------------------------------------------------------------------------------------------


def test_adding_and_removing_equals_building_with_those_experts():
    own = experts(BEIT, list(CLASSES), (2, 5, 1))
    images = {name: labelled(BEIT, number, len(classes)) for number, (name, classes) in enumerate(CLASSES.items())}
    whole = joint(BEIT, fit=True)

    def built(names: str) -> ContextGatedMOE:
        model = ContextGatedMOE(BEIT.build(), [expert for expert in own if expert.name in names],
                                {name: CLASSES[name] for name in names}, gate_hidden=8)
        model.fit_gates({name: images[name] for name in names})
        return model

    for added, expert in zip("abc", own, strict=True):
        model = built("abc".replace(added, ""))
        for mode in (True, False):
            model.train(mode)
            model.add_expert(added, expert, classes=CLASSES[added], images=iter(images[added]))
            assert {module.training for module in model.modules()} == {mode}
            assert_same_tensors(model.state_dict(), whole.state_dict())
            assert (model.labels, model.columns, model.config.id2label) == (whole.labels, whole.columns, whole.config.id2label)
            model.remove_expert(added)
        assert_same_tensors(model.state_dict(), built("abc".replace(added, "")).state_dict())
        assert set(model.statistics) == set("abc") - {added}


def test_what_was_trained_without_statistics_is_kept_when_experts_change():
    model, inputs = joint(BEIT), BEIT.batch(3)
    before = {layer: weights[:, 1:] / weights[:, 1:].sum(1, keepdim=True) for layer, weights in recorded(model, inputs).items()}
    model.remove_expert("a")
    assert_close(recorded(model, inputs)["beit.layers.0"], before["beit.layers.0"])
    model.add_expert("a", experts(BEIT, ["a"], (2,))[0], classes=CLASSES["a"])
    weights = recorded(model, inputs)["beit.layers.0"][:, 1:]
    assert_close(weights / weights.sum(1, keepdim=True), before["beit.layers.0"])


def test_same_classes_go_with_their_expert():
    model = joint(BEIT, same=[[("a", "x"), ("b", "x")], [("a", "y"), ("b", "z"), ("c", "only")]])
    model.remove_expert("a")
    assert model.same == [[("b", "z"), ("c", "only")]] and model.columns == {"b": [0, 1, 2, 3, 4], "c": [1]}


def state_of(model: ContextGatedMOE) -> dict[str, object]:
    """All that an error must leave alone."""
    names = ("expert_names", "classes", "labels", "columns", "sizes", "same", "refuse_below")
    hooks = [(name, list(module._forward_pre_hooks), list(module._forward_hooks)) for name, module in model.named_modules()]
    return {
        "modules": snapshot(model)["modules"],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "hooks": [(name, len(pre), len(post)) for name, pre, post in hooks],
        "names": model.config.id2label,
        "statistics": {name: id(value) for name, value in model.statistics.items()},
        **{name: copy.deepcopy(getattr(model, name)) for name in names},
    }


def test_a_failed_change_changes_nothing(tmp_path):
    model, inputs = joint(BEIT, fit=True).train(), BEIT.batch(2)
    state, tensors, output = (
        state_of(model),
        {name: t.clone() for name, t in model.state_dict().items()},
        logits(model.eval(), inputs),
    )
    model.train()
    good, images = experts(BEIT, ["d"], (2,))[0], labelled(BEIT, 3, 2)
    dora = save_adapter(BEIT.build(), tmp_path / "dora", r=2, target_modules=["q_proj"], use_dora=True)

    def broken():
        yield images[0]
        raise KeyboardInterrupt

    full = dict(classes=["p", "q"], images=images)
    for change, kind, message in (
        (lambda: model.add_expert("a", good, **full), MixtureError, "'a' already"),
        (lambda: model.add_expert("d", tmp_path / "nowhere", **full), MixtureError, "'d'"),
        (lambda: model.add_expert("d", dora, **full), MixtureError, "'d' uses DoRA"),
        (lambda: model.add_expert("d", good, classes=["p"], images=images), MixtureError, "2 outputs"),
        (lambda: model.add_expert("d", good, images=images), MixtureError, "needs classes"),
        (lambda: model.add_expert("d", good, classes=["p", "q"]), MixtureError, "needs images"),
        (lambda: model.add_expert("d", good, classes=["p", "q"], images=broken()), KeyboardInterrupt, ""),
        (lambda: model.add_expert("d", good, classes=["p", "q"], images=[]), MixtureError, "no images of 2"),
        (
            lambda: model.add_expert(
                "d",
                good,
                classes=["p", "q"],
                images=images[:1] + [({"pixel_values": torch.zeros(1, 4, 16, 16)}, torch.zeros(1).long())],
            ),
            Exception,
            "",
        ),
        (lambda: model.add_expert("d", good, classes=["p", "q"], images=labelled(BEIT, 3, 5)), MixtureError, "labelled 4"),
        (lambda: model.remove_expert("d"), MixtureError, "no expert is called 'd'"),
        (lambda: model.fit_gates({"a": labelled(BEIT, 5, 2), "b": broken()}), KeyboardInterrupt, ""),
        (lambda: model.fit_gates({"a": labelled(BEIT, 5, 2)}, {"b": broken()}), KeyboardInterrupt, ""),
        (lambda: model.fit_gates({"z": images}), MixtureError, "'z'"),
        (lambda: model.merge_and_unload({"z": 1.0}), MixtureError, "'z'"),
        (lambda: model.merge_and_unload({"a": 1.0, "b": 0.5}), MixtureError, "choose one by head"),
        (lambda: model.to_adapter({"a": 1.0}, tmp_path / "a", head="z"), MixtureError, "choose one by head"),
    ):
        with pytest.raises(kind, match=message):
            change()
        assert state_of(model) == state
        assert_same_tensors(model.state_dict(), tensors)
        assert all(module.training for module in model.modules())
    assert torch.equal(logits(model.eval(), inputs), output)


def test_unloading_gives_the_base_back():
    base = BEIT.build()
    base.beit.embeddings.requires_grad_(False)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    before = snapshot(base)
    model = ContextGatedMOE(base, experts(BEIT, list(CLASSES), (2, 5, 1)), CLASSES)
    model.train()(**BEIT.batch(2)).logits.sum().backward()
    assert model.unload().eval() is base
    assert_unchanged(base, before)
    assert base.config.id2label == BEIT.build().config.id2label and base.num_labels == 3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert not any(
        "ContextGatedMOE" in str(type(vars(module).get("_gradient_checkpointing_func"))) for module in base.modules()
    )


# --- Merging and exporting --------------------------------------------------------------------------------------------


def test_a_fixed_mix_merged_or_as_one_adapter_is_that_mix(all_adapters, tmp_path):
    weights = {"attention": 0.3, "on_head": 0.5, "scaled": -0.4}
    for number, (case, adapters) in enumerate(all_adapters.items()):
        model, inputs = mixture(case, adapters), case.batch(3)
        with model.fixed_gates(weights):
            expected = logits(model, inputs)
        model.to_adapter(weights, tmp_path / f"{number}")
        exported = PeftModel.from_pretrained(case.build(), tmp_path / f"{number}").eval()
        assert_close(logits(exported, inputs), expected)
        assert_close(logits(ContextGatedMOE.from_adapters(case.build(), {"one": tmp_path / f"{number}"}), inputs), expected)
        merged = model.merge_and_unload(weights)
        assert {type(module) for module in merged.modules()} == {type(module) for module in case.build().modules()}
        assert_close(logits(merged, inputs), expected)


def test_a_merged_joint_mixture_answers_with_one_experts_classes(tmp_path):
    inputs = BEIT.batch(3)
    for weights, head in (({"b": 1.0}, None), ({"a": 0.4, "b": 0.6}, "b")):
        model = joint(BEIT)
        with model.fixed_gates(weights):
            expected = logits(model, inputs)[:, model.columns["b"]].log_softmax(1)
        model.to_adapter(weights, tmp_path, head)
        base = BEIT.build()
        base.classifier = nn.Linear(16, 5)
        assert_close(logits(PeftModel.from_pretrained(base, tmp_path).eval(), inputs).log_softmax(1), expected)
        merged = model.merge_and_unload(weights, head)
        assert_close(logits(merged, inputs).log_softmax(1), expected)
        merged.save_pretrained(tmp_path / "merged")
        opened = type(merged).from_pretrained(tmp_path / "merged")
        assert torch.equal(logits(opened, inputs), logits(merged, inputs))
        assert list(opened.config.id2label.values()) == CLASSES["b"]


def test_merging_into_a_tied_head_leaves_the_embedding_alone(tmp_path):
    tied = Case(lambda: llama(tie_word_embeddings=True), LLAMA.inputs, LLAMA.first, LLAMA.second, LLAMA.head)
    model = ContextGatedMOE(tied.build(), experts(Case(tied.make, tied.inputs, ("lm_head",), (), "lm_head"), ["a"]))
    embedding, inputs = model.base_model.get_input_embeddings().weight.clone(), tied.batch(2)
    with model.fixed_gates({"a": 1.0}):
        expected = logits(model, inputs)
    merged = model.merge_and_unload({"a": 1.0})
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    merged.save_pretrained(tmp_path)
    assert_close(logits(type(merged).from_pretrained(tmp_path), inputs), expected)


# --- Refusals ---------------------------------------------------------------------------------------------------------


def assert_refused(base: nn.Module, folder: Path, message: str = "'culprit'") -> None:
    """The adapter is refused by the expert's name, in one line, and the base left exactly as it was."""
    before = snapshot(base)
    with pytest.raises(MixtureError, match=message) as refusal:
        ContextGatedMOE.from_adapters(base, {"culprit": folder})
    assert "\n" not in str(refusal.value)
    assert_unchanged(base, before)


def test_an_adapter_that_no_mixture_reproduces_is_refused(tmp_path):
    for number, options in enumerate(
        (
            dict(use_dora=True),
            dict(bias="all"),
            dict(bias="lora_only"),
            dict(lora_bias=True),
            dict(init_lora_weights="pissa"),
            dict(init_lora_weights="olora"),
            dict(target_modules=["projection"]),
            dict(modules_to_save=["layernorm"]),
            dict(modules_to_save=["mlp"]),
            dict(target_parameters=["fc1.weight"], target_modules=["q_proj"]),
            dict(kasa_config=KasaConfig()),
            dict(monteclora_config=MontecloraConfig()),
            dict(alora_invocation_tokens=[1]),
            dict(use_bdlora=BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["fc1"], nblocks=2)),
            dict(config=IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"])),
        )
    ):
        assert_refused(BEIT.build(), save_adapter(BEIT.build(), tmp_path / f"{number}", **{
            "r": 2, "target_modules": ["q_proj", "fc1"], **options}))
    for number, options in enumerate((dict(target_modules=["word_embeddings", "query"]),
                                      dict(target_modules=["query"], trainable_token_indices={"word_embeddings": [1, 2]}))):
        assert_refused(BERT.build(), save_adapter(BERT.build(), tmp_path / f"text{number}", r=2, **options))


def test_an_adapter_of_another_base_or_a_damaged_one_is_refused(beit_adapters, all_adapters, tmp_path):
    for options in (dict(hidden_size=8), dict(num_hidden_layers=1), dict(num_hidden_layers=3)):
        other = save_adapter(
            beit(**options), tmp_path / "other", r=2, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"]
        )
        assert_refused(BEIT.build(), other)
    assert_refused(BEIT.build(), all_adapters[BERT]["headless"])
    assert_refused(BEIT.build(), tmp_path / "nowhere")
    for content in ("", "{", "[]", "null", "{}", '{"peft_type": "NOPE"}', '{"peft_type": "LORA", "r": "x"}'):
        folder = shutil.copytree(beit_adapters["scaled"], tmp_path / "damaged", dirs_exist_ok=True)
        (folder / "adapter_config.json").write_text(content)
        assert_refused(BEIT.build(), folder)
    for keep in (None, 0, 5, 500, -1):
        folder = shutil.copytree(beit_adapters["scaled"], tmp_path / "damaged", dirs_exist_ok=True)
        file = folder / "adapter_model.safetensors"
        file.unlink() if keep is None else file.write_bytes(file.read_bytes()[:keep])
        assert_refused(BEIT.build(), folder)
    file = folder / "adapter_model.safetensors"
    save_file({key: torch.ones(3, 3) for key in load_file(beit_adapters["scaled"] / "adapter_model.safetensors")}, file)
    assert_refused(BEIT.build(), folder)
    base = BEIT.build()
    before = snapshot(base)
    with pytest.raises(MixtureError, match="'culprit'"):  # among good ones
        ContextGatedMOE.from_adapters(base, {**beit_adapters, "culprit": tmp_path})
    assert_unchanged(base, before)


def test_base_layers_that_cannot_be_mixed_are_refused(beit_adapters):
    module = types.ModuleType("bitsandbytes.nn")
    exec("from torch import nn\nclass Linear4bit(nn.Linear):\n    pass", module.__dict__)
    module.Linear4bit.__module__ = "bitsandbytes.nn"
    packed = BEIT.build()
    packed.beit.layers[0].mlp.fc1.__class__ = module.Linear4bit
    assert_refused(
        packed,
        beit_adapters["scaled"],
        r"'beit.layers.0.mlp.fc1' is a Linear4bit with weights in 4 or 8 bits; load the base in",
    )
    assert "bitsandbytes" not in sys.modules
    eight = BEIT.build()
    eight.beit.layers[0].mlp.fc1.weight = nn.Parameter(torch.zeros(24, 16, dtype=torch.int8), requires_grad=False)
    assert_refused(eight, beit_adapters["scaled"], "with weights in 4 or 8 bits")
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(MixtureError, match="reads without calling it"):
        ContextGatedMOE(base, [Expert("a", {"attention.out_proj": (torch.randn(2, 8), torch.randn(8, 2))})])
    offloaded = BEIT.build().to("meta")
    with pytest.raises(MixtureError, match="no data in memory"):
        ContextGatedMOE(offloaded, experts(BEIT))


def test_requests_without_sense_are_refused(beit_adapters):
    for options, message in ((dict(gate_hidden=0), "gate_hidden"), (dict(top_k=0), "top_k"), (dict(top_k=-1), "top_k")):
        base = PLAIN.build()
        before = snapshot(base)
        with pytest.raises(MixtureError, match=message):
            ContextGatedMOE(base, experts(PLAIN), **options)
        assert_unchanged(base, before)
    with pytest.raises(MixtureError, match="two experts have one name"):
        ContextGatedMOE(PLAIN.build(), experts(PLAIN, ["twin", "twin"]))
    with pytest.raises(MixtureError, match="part of a mixture already"):
        ContextGatedMOE.from_adapters(joint(BEIT).base_model, beit_adapters)


def test_reading_an_expert_leaves_the_base_alone(all_adapters, tmp_path):
    for case, adapters in all_adapters.items():
        base = case.build().train()
        next(base.parameters()).requires_grad_(False)
        before, attributes = snapshot(base), set(vars(base))
        for name in ("attention", "on_head"):
            read_expert(base, name, adapters[name])
        assert_unchanged(base, before)
        assert set(vars(base)) == attributes and all(module.training for module in base.modules())
    mixed = shared(BEIT)
    tensors = {name: tensor.clone() for name, tensor in mixed.state_dict().items()}
    read_expert(mixed.base_model, "scaled", all_adapters[BEIT]["scaled"])  # the base of a mixture
    assert_same_tensors(mixed.state_dict(), tensors)
