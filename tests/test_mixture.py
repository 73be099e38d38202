"""Tests of the mixture: what an exact, per-image mixture of frozen LoRA experts must hold to, whatever the base model."""

import copy
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from mixture_models import (
    CASES,
    T5,
    Case,
    assert_close,
    assert_same_tensors,
    assert_unchanged,
    beit,
    llama,
    logits,
    loop,
    mixture,
    peft_logits,
    randomise_gates,
    rows,
    save_adapter,
    save_experts,
    snapshot,
)
from peft import IA3Config, PeftModel
from peft.tuners.lora import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ContextGatedMOE import ContextGatedMOE, Expert, MixtureError, read_expert
from ContextGatedMOE.layers import Gate, MixtureHead, Routing

EXPERTS = ("attention", "headless", "on_head", "scaled")
BEIT, BERT, LLAMA, PLAIN = CASES["beit"], CASES["bert"], CASES["llama"], CASES["plain"]


@pytest.fixture(scope="module")
def all_adapters(tmp_path_factory) -> dict[Case, dict[str, Path]]:
    return {case: save_experts(case, tmp_path_factory.mktemp(name)) for name, case in CASES.items()}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request) -> Case:
    return request.param


@pytest.fixture
def adapters(case, all_adapters) -> dict[str, Path]:
    return all_adapters[case]


@pytest.fixture
def beit_adapters(all_adapters) -> dict[str, Path]:
    return all_adapters[BEIT]


@pytest.fixture
def plain_adapters(all_adapters) -> dict[str, Path]:
    return all_adapters[PLAIN]


def recorded(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gates of one pass."""
    with model.record_gates() as gates:
        logits(model, inputs)
    return gates


# --- What the mixture computes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERTS)
def test_a_one_hot_gate_is_that_peft_model(case, adapters, name):
    inputs, model = case.batch(3), mixture(case, adapters)
    with model.fixed_gates({name: 1.0}):
        assert_close(logits(model, inputs), peft_logits(case, adapters[name], inputs))


@pytest.mark.parametrize("name", EXPERTS)
def test_a_single_expert_is_that_peft_model(case, adapters, name):
    inputs, model = case.batch(3), mixture(case, {name: adapters[name]})
    assert_close(logits(model, inputs), peft_logits(case, adapters[name], inputs))


@pytest.mark.parametrize("options", [
    dict(init_lora_weights="gaussian"), dict(init_lora_weights="orthogonal"), dict(init_lora_weights="mica"),
    dict(velora_config=VeloraConfig(num_groups=4)), dict(lora_dropout=0.5), dict(layers_to_transform=[1]),
    dict(exclude_modules=["q_proj"]),
], ids=str)
def test_a_lora_trained_in_another_way_is_that_peft_model(tmp_path, options):
    """Options that end in a plain update of some layers."""
    folder = save_adapter(BEIT.build(), tmp_path, r=2, target_modules=["q_proj", "fc1"], **options)
    inputs, model = BEIT.batch(3), mixture(BEIT, {"own": folder})
    assert_close(logits(model, inputs), peft_logits(BEIT, folder, inputs))
    assert (logits(model, inputs) - logits(BEIT.build(), inputs)).abs().max() > 1e-3


def test_no_experts_is_the_base_with_nothing_to_train(case):
    inputs, model = case.batch(3), ContextGatedMOE.from_adapters(case.build(), {})
    assert torch.equal(logits(model, inputs), logits(case.build(), inputs))
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_every_layer_is_the_sum_over_a_loop(case, adapters):
    model, inputs = mixture(case, adapters), case.batch(3)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in model.mixture_layers().items():
        layer.register_forward_hook(lambda _, args, output, name=name: seen.update({name: (args[0], output)}))
    logits(model, inputs)
    assert set(seen) == set(model.mixture_layers())
    for name, (x, y) in seen.items():
        layer = model.mixture_layers()[name]
        x, y = x.reshape(3, -1, x.shape[-1]), y.reshape(3, -1, y.shape[-1])
        hidden = torch.relu(x @ layer.gate.hidden.weight.T + layer.gate.hidden.bias)  # (B, N, H)
        counts = inputs.get("attention_mask", torch.ones(hidden.shape[:2])) if hidden.shape[1] > 1 else torch.ones(3, 1)
        pooled = torch.stack([tokens[own.bool()].mean(0) for tokens, own in zip(hidden, counts, strict=True)])
        weights = torch.softmax(pooled @ layer.gate.output.weight.T + layer.gate.output.bias, dim=-1)
        expected = loop(x, layer.base, weights, name, [adapters[expert] for expert in EXPERTS], name == case.head)
        assert_close(y, expected)


def test_fixed_gates_mix_heads_linearly(plain_adapters):
    model = mixture(PLAIN, plain_adapters)
    x = torch.randn(2, 12)
    heads = {}
    for name in EXPERTS:
        with model.fixed_gates({name: 1.0}):
            heads[name] = model.base_model.head(x)
    with model.fixed_gates({"attention": 0.3, "on_head": 0.5}):
        assert_close(model.base_model.head(x), 0.3 * heads["attention"] + 0.5 * heads["on_head"])


def test_batch_order_permutes_the_output(case, adapters):
    model, inputs, order = mixture(case, adapters), case.batch(4), [2, 0, 3, 1]
    assert_close(logits(model, rows(inputs, order)), logits(model, inputs)[order])


def test_an_image_alone_is_the_image_in_a_batch(case, adapters):
    model, inputs = mixture(case, adapters), case.batch(4)
    alone = torch.cat([logits(model, rows(inputs, [image])) for image in range(4)])
    assert_close(alone, logits(model, inputs))


def test_an_empty_batch_gives_no_logits(plain_adapters):
    assert logits(mixture(PLAIN, plain_adapters), {"x": torch.zeros(0, 5, 8)}).shape == (0, 3)


def test_images_get_gates_of_their_own(case, adapters):
    gates = recorded(mixture(case, adapters), case.batch(2))
    assert all((weights[0] - weights[1]).abs().max() > 1e-6 for weights in gates.values())


def test_the_order_of_experts_does_not_matter(case, adapters):
    models = []
    for names in (EXPERTS, EXPERTS[::-1]):
        base = case.build()
        torch.manual_seed(1)
        models.append(ContextGatedMOE.from_adapters(base, {name: adapters[name] for name in names}))
    assert models[0].expert_names == models[1].expert_names == sorted(EXPERTS)
    assert_same_tensors(models[1].state_dict(), models[0].state_dict())


def test_new_gates_weigh_all_experts_alike(case, adapters):
    gates = recorded(ContextGatedMOE.from_adapters(case.build(), adapters), case.batch(2))
    assert all(torch.equal(weights, torch.full((2, 4), 0.25)) for weights in gates.values())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(ranks=st.lists(st.integers(1, 5), min_size=1, max_size=8), batch=st.integers(1, 4), seed=st.integers(0, 99))
def test_any_ranks_and_numbers_of_experts(ranks, batch, seed):
    base, x = PLAIN.build(), PLAIN.batch(batch, seed)["x"]
    updates = {f"{index}": (torch.randn(rank, 8), torch.randn(12, rank)) for index, rank in enumerate(ranks)}
    expected = [base.base(x) + x @ down.T @ up.T for down, up in updates.values()]
    model = randomise_gates(ContextGatedMOE(base, [Expert(name, {"base": update}) for name, update in updates.items()]), seed)
    assert_close(recorded(model, {"x": x})["base"].sum(1), torch.ones(batch))
    for name, output in zip(updates, expected, strict=True):
        with model.fixed_gates({name: 1.0}):
            assert_close(model.base_model.base(x), output, atol=1e-4)


# --- Texts: padding, arguments, generation ----------------------------------------------------------------------------


def test_padding_changes_neither_gates_nor_logits(all_adapters):
    model, inputs = mixture(BERT, all_adapters[BERT]), BERT.batch(3)
    longer = {"input_ids": torch.cat([inputs["input_ids"], torch.full((3, 5), 9)], 1),
              "attention_mask": torch.cat([inputs["attention_mask"], torch.zeros(3, 5, dtype=torch.long)], 1)}
    for name, weights in recorded(model, inputs).items():
        assert_close(recorded(model, longer)[name], weights)
    assert_close(logits(model, longer), logits(model, inputs))


def test_the_content_of_padding_does_not_matter(all_adapters):
    model, inputs = mixture(BERT, all_adapters[BERT]), BERT.batch(3)
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 17)}
    assert not torch.equal(other["input_ids"], inputs["input_ids"])
    assert_close(logits(model, other), logits(model, inputs))


def test_a_boolean_mask_is_a_mask(all_adapters):
    model, inputs = mixture(BERT, all_adapters[BERT]), BERT.batch(3)
    assert_close(logits(model, {**inputs, "attention_mask": inputs["attention_mask"].bool()}), logits(model, inputs))


def test_a_mask_given_by_position_is_a_mask(all_adapters):
    model, inputs = mixture(BERT, all_adapters[BERT]), BERT.batch(3)
    with torch.no_grad():
        by_position = model(inputs["input_ids"], inputs["attention_mask"]).logits
    assert_close(by_position, logits(model, inputs))


def test_the_order_of_keywords_does_not_matter(all_adapters):
    model, inputs, positions = mixture(LLAMA, all_adapters[LLAMA]), LLAMA.batch(3), torch.arange(6)[None]  # (1, T): no batch
    assert_close(logits(model, {"position_ids": positions, **inputs}), logits(model, {**inputs, "position_ids": positions}))


def test_padding_for_an_encoder_does_not_matter_to_its_decoder(tmp_path):
    adapters = {name: save_adapter(T5.build(), tmp_path / name, seed, r=2, target_modules=["q", "wi", "lm_head"])
                for seed, name in enumerate("ab")}
    model, inputs = mixture(T5, adapters), T5.batch(2)
    longer = {"input_ids": torch.cat([inputs["input_ids"], torch.zeros(2, 5, dtype=torch.long)], 1),
              "attention_mask": torch.cat([inputs["attention_mask"], torch.zeros(2, 5, dtype=torch.long)], 1)}
    assert_close(logits(model, {**inputs, **longer}), logits(model, inputs))


def test_embeddings_can_be_given_instead_of_tokens(all_adapters):
    model, inputs = mixture(LLAMA, all_adapters[LLAMA]), LLAMA.batch(3)
    embeds = model.base_model.get_input_embeddings()(inputs["input_ids"]).detach()
    assert_close(logits(model, {"inputs_embeds": embeds}), logits(model, inputs))


def test_one_hot_generation_is_that_peft_model(all_adapters):
    adapters, inputs = all_adapters[LLAMA], LLAMA.batch(2)
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    model, reference = mixture(LLAMA, adapters), PeftModel.from_pretrained(LLAMA.build(), adapters["scaled"])
    with model.fixed_gates({"scaled": 1.0}):
        assert torch.equal(model.base_model.generate(**inputs, **options), reference.generate(**inputs, **options))


def test_generation_forgets_earlier_passes(all_adapters):
    options = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    fresh, used = (mixture(LLAMA, all_adapters[LLAMA]) for _ in range(2))
    logits(used, LLAMA.batch(3))
    assert torch.equal(used.base_model.generate(**LLAMA.batch(2), **options), fresh.base_model.generate(**LLAMA.batch(2), **options))


def test_a_tied_lm_head_can_be_adapted(tmp_path):
    tied = Case(lambda: llama(tie_word_embeddings=True), LLAMA.inputs, LLAMA.first, LLAMA.second, LLAMA.head)
    adapters = {"a": save_adapter(tied.build(), tmp_path / "a", r=2, target_modules=["lm_head", "q_proj"]),
                "b": save_adapter(tied.build(), tmp_path / "b", 1, r=3, target_modules=["lm_head"])}
    model, inputs = mixture(tied, adapters), tied.batch(2)
    with model.fixed_gates({"a": 1.0}):
        assert_close(logits(model, inputs), peft_logits(tied, adapters["a"], inputs))


# --- Gates: recording, fixing, top-k ----------------------------------------------------------------------------------


def test_recorded_gates_are_one_row_an_image_summing_to_one(case, adapters):
    model = mixture(case, adapters)
    with model.record_gates() as gates:
        model(**case.batch(3))
    assert list(gates) == list(model.mixture_layers())
    for weights in gates.values():
        assert weights.shape == (3, 4) and weights.dtype == torch.float32 and weights.requires_grad
        assert_close(weights.sum(1), torch.ones(3))


def test_a_loss_on_recorded_gates_trains_every_gate(case, adapters):
    model = mixture(case, adapters)
    with model.record_gates() as gates:
        model(**case.batch(3))
    sum(weights[:, 0].sum() for weights in gates.values()).backward()
    assert all(layer.gate.output.weight.grad.abs().sum() > 0 for layer in model.mixture_layers().values())


def test_nothing_is_recorded_after_the_context(plain_adapters):
    model = mixture(PLAIN, plain_adapters)
    with model.record_gates() as gates:
        pass
    logits(model, PLAIN.batch(2))
    assert gates == {}


def test_fixed_gates_are_recorded_and_forgotten(plain_adapters):
    model, inputs = mixture(PLAIN, plain_adapters), PLAIN.batch(2)
    before = logits(model, inputs)
    with model.fixed_gates({"scaled": 0.5, "attention": 2.0}):
        assert all(weights.tolist() == [[2.0, 0.0, 0.0, 0.5]] * 2 for weights in recorded(model, inputs).values())
    assert torch.equal(logits(model, inputs), before)


def test_fixed_gates_nest(plain_adapters):
    model, inputs = mixture(PLAIN, plain_adapters), PLAIN.batch(2)
    with model.fixed_gates({"scaled": 1.0}):
        outer = logits(model, inputs)
        with model.fixed_gates({"attention": 1.0}):
            assert not torch.equal(logits(model, inputs), outer)
        assert torch.equal(logits(model, inputs), outer)


def test_fixed_gates_are_forgotten_after_an_error(plain_adapters):
    model, inputs = mixture(PLAIN, plain_adapters), PLAIN.batch(2)
    before = logits(model, inputs)
    with pytest.raises(KeyError), model.fixed_gates({"scaled": 1.0}):
        raise KeyError
    assert torch.equal(logits(model, inputs), before)


def test_fixed_gates_refuse_unknown_names(plain_adapters):
    model, inputs = mixture(PLAIN, plain_adapters), PLAIN.batch(2)
    before = logits(model, inputs)
    with pytest.raises(MixtureError, match="nobody"), model.fixed_gates({"scaled": 1.0, "nobody": 1.0}):
        pass
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_keeps_the_largest_weights_renormalised(top_k, training):
    weights = torch.softmax(torch.tensor([[1.0, 3.0, 2.0], [0.5, -1.0, 0.0]]), dim=-1)
    selected = Gate(4, 2, 3).train(training).select(weights, top_k)
    kept = {1: [[0, 1, 0], [1, 0, 0]], 2: [[0, 1, 1], [1, 0, 1]]}[top_k]
    expected = torch.tensor(kept) * weights
    assert_close(selected, expected / expected.sum(1, keepdim=True))


@pytest.mark.parametrize("top_k", [4, 5])
def test_top_k_of_all_is_dense(case, adapters, top_k):
    inputs = case.batch(2)
    assert torch.equal(logits(mixture(case, adapters, top_k=top_k), inputs), logits(mixture(case, adapters), inputs))


def test_top_1_is_one_hot_in_every_layer(case, adapters):
    for weights in recorded(mixture(case, adapters, top_k=1), case.batch(3)).values():
        assert torch.equal(weights.sort(1).values, torch.tensor([[0.0, 0.0, 0.0, 1.0]] * 3))


def test_top_1_still_trains_every_gate(case, adapters):
    model = mixture(case, adapters, top_k=1).train()
    logits = model(**case.batch(3))
    (logits if isinstance(logits, Tensor) else logits.logits).square().sum().backward()
    assert all(layer.gate.output.weight.grad.abs().sum() > 0 for layer in model.mixture_layers().values())


# Eight experts of different rank, one of which has no update in one of the layers.
RANKS = {"base": (3, 3, 1, 2, 3, 3, 3, 3), "blocks.0": (2, 0, 4, 4, 4, 4, 4, 4)}
MANY_TOKENS = 200


def many_experts(seed: int = 0, **options: object) -> ContextGatedMOE:
    torch.manual_seed(400 + seed)
    base, experts = PLAIN.build(), []
    for index in range(8):
        sizes = {layer: ranks[index] for layer, ranks in RANKS.items() if ranks[index]}
        experts.append(Expert(f"{index}", {
            layer: (torch.randn(rank, base.get_submodule(layer).in_features) * 0.3, torch.randn(12, rank) * 0.3)
            for layer, rank in sizes.items()}))
    return randomise_gates(ContextGatedMOE(base, experts, **options), seed)


def weights_of(gates: dict[str, Tensor], expert: int) -> Tensor:
    """The weights of one expert in all layers (layers, B)."""
    return torch.stack([weights[:, expert] for weights in gates.values()])


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 8])
def test_skipping_experts_is_exact(top_k):
    """With many tokens an image only its own experts are computed; kept weights over all experts are the reference."""
    model, x = many_experts(top_k=top_k), torch.randn(4, MANY_TOKENS, 8)
    output, gates = logits(model, {"x": x}), recorded(model, {"x": x})
    for name, layer in model.mixture_layers().items():
        layer.gate.forward = lambda *_, name=name, **__: gates[name]
    model.top_k = None  # every expert is computed, those not kept with weight zero
    assert_close(output, logits(model, {"x": x}))


def test_an_expert_that_no_image_chooses_is_not_computed():
    model, x = many_experts(top_k=1), torch.randn(3, MANY_TOKENS, 8)
    gates = recorded(model, {"x": x})
    idle = next(expert for expert in range(8) if not weights_of(gates, expert).any())
    expected = logits(model, {"x": x})
    for name, layer in model.mixture_layers().items():
        layer.lora_B.data[:, layer.owner == idle] = float("nan")
    assert torch.equal(logits(model, {"x": x}), expected)
    model.top_k = None
    assert logits(model, {"x": x}).isnan().all()


def test_skipping_experts_keeps_images_apart():
    model, x = many_experts(top_k=2), torch.randn(4, MANY_TOKENS, 8)
    alone = torch.cat([logits(model, {"x": image[None]}) for image in x])
    assert_close(alone, logits(model, {"x": x}))


def test_skipping_experts_compiled():
    model, x = many_experts(top_k=1), torch.randn(3, MANY_TOKENS, 8)
    torch.compiler.reset()
    assert_close(logits(torch.compile(model, backend="eager", fullgraph=True), {"x": x}), logits(model, {"x": x}))


def test_skipping_experts_in_bf16():
    model, x = many_experts(top_k=1), torch.randn(3, MANY_TOKENS, 8)
    for layer in model.mixture_layers().values():
        layer.gate.output.bias.data[2] += 100  # rounding shall not choose another expert
    expected = logits(model, {"x": x})
    with torch.autocast("cpu", torch.bfloat16):
        assert (logits(model, {"x": x}).float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_below_one_is_refused_and_the_base_left_alone(plain_adapters, top_k):
    base = PLAIN.build()
    before = snapshot(base)
    with pytest.raises(MixtureError, match="top_k"):
        ContextGatedMOE.from_adapters(base, plain_adapters, top_k=top_k)
    assert_unchanged(base, before)


# --- Training ---------------------------------------------------------------------------------------------------------


def test_only_gates_are_trainable(case, adapters):
    model = mixture(case, adapters)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"base_model.{layer}.gate.{part}.{tensor}" for layer in model.mixture_layers()
                         for part in ("hidden", "output") for tensor in ("weight", "bias")}
    assert {id(p) for p in model.gate_parameters()} == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_training_step_moves_every_gate_and_nothing_else(case, adapters):
    model = mixture(case, adapters).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output = model(**case.batch(4))
    (output if isinstance(output, Tensor) else output.logits).square().mean().backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".gate." in name}
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is not None and ".gate." not in name]


def test_train_and_eval_reach_every_layer(plain_adapters):
    model = mixture(PLAIN, plain_adapters)
    assert not any(module.training for module in model.base_model.modules())
    assert all(module.training for module in model.train().modules())


@pytest.mark.parametrize("name", ["swin", "plain"])
def test_compiled_with_a_changing_batch_size(all_adapters, name):
    case = CASES[name]
    model = mixture(case, all_adapters[case])
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for size in (3, 2):
        assert_close(logits(compiled, case.batch(size)), logits(model, case.batch(size)))


def test_compiled_sees_fixed_gates(plain_adapters):
    model, inputs = mixture(PLAIN, plain_adapters), PLAIN.batch(2)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits(compiled, inputs)
    with model.fixed_gates({"scaled": 1.0}):
        assert_close(logits(compiled, inputs), logits(model, inputs))


def test_bf16_autocast_is_close_and_trains(case, adapters):
    model, inputs = mixture(case, adapters), case.batch(3)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
    output = output if isinstance(output, Tensor) else output.logits
    expected = logits(model, inputs)
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()
    output.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.gate_parameters())


def test_a_bf16_model_is_close_to_fp32(case, adapters):
    model, inputs = mixture(case, adapters), case.batch(3)
    expected = logits(model, inputs)
    model.to(torch.bfloat16)
    half = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    output = logits(model, half)
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("name", ["beit", "bert", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(all_adapters, name):
    case, gradients = CASES[name], []
    for checkpointing in (False, True):
        model = mixture(case, all_adapters[case]).train()
        if checkpointing:
            model.base_model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**case.batch(3)).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.gate_parameters()])
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        assert_close(actual, expected)


def two_kinds(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of two kinds that differ in every image, and the expert each belongs to."""
    inputs = case.batch(12)
    owners = torch.arange(12) % 2
    for name, tensor in inputs.items():
        if tensor.is_floating_point():
            inputs[name] = tensor + 2.0 * owners.view(-1, *[1] * (tensor.ndim - 1))
        elif name == "input_ids":
            inputs[name] = torch.where(owners[:, None].bool(), tensor % 20, tensor % 20 + 20)
    return inputs, owners


@pytest.mark.parametrize("hidden", [1, 4])
def test_a_warm_start_chooses_the_own_expert_and_moves_gates_only(case, adapters, hidden):
    names = ["attention", "headless"]
    model = ContextGatedMOE.from_adapters(case.build(), {name: adapters[name] for name in names}, gate_hidden=hidden).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs, owners = two_kinds(case)
    model.warm_start(owners, **inputs)
    assert model.training and {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])} == {
        name for name in before if ".gate." in name}
    chosen = torch.stack([weights.argmax(1) == owners for weights in recorded(model.eval(), inputs).values()])
    assert chosen.float().mean() > 0.9


def test_a_warm_start_leaves_trained_gates_alone(plain_adapters):
    model = mixture(PLAIN, plain_adapters)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.warm_start(torch.arange(12) % 4, **PLAIN.batch(12))
    assert_same_tensors(model.state_dict(), before)


def test_accelerate_trains_a_step(beit_adapters):
    accelerator, model = Accelerator(cpu=True), mixture(BEIT, beit_adapters).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.gate_parameters(), lr=0.1))
    accelerator.backward(model(**BEIT.batch(3), labels=torch.tensor([0, 1, 2])).loss)
    optimizer.step()
    state = accelerator.unwrap_model(model).state_dict()
    assert {name for name in before if not torch.equal(state[name], before[name])} == {name for name in before if ".gate." in name}


# --- Copies -----------------------------------------------------------------------------------------------------------


def test_a_deep_copy_is_independent(plain_adapters):
    model, inputs = mixture(PLAIN, plain_adapters), PLAIN.batch(2)
    expected, twin = logits(model, inputs), copy.deepcopy(model)
    with model.fixed_gates({"scaled": 1.0}):
        assert torch.equal(logits(twin, inputs), expected)
    with twin.fixed_gates({"scaled": 1.0}):
        assert not torch.equal(logits(twin, inputs), expected)


def test_a_pickled_mixture_still_steers_its_layers(beit_adapters):
    model, inputs, file = mixture(BEIT, beit_adapters), BEIT.batch(2), io.BytesIO()
    torch.save(model, file)
    twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(logits(twin, inputs), logits(model, inputs))
    with model.fixed_gates({"scaled": 1.0}), twin.fixed_gates({"scaled": 1.0}):
        assert torch.equal(logits(twin, inputs), logits(model, inputs))


def test_a_state_dict_round_trip(case, adapters):
    model, twin = mixture(case, adapters), mixture(case, adapters, gates=1)
    assert not torch.equal(logits(twin, case.batch(2)), logits(model, case.batch(2)))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin, case.batch(2)), logits(model, case.batch(2)))


# --- Saving and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [None, 2])
def test_saved_and_loaded_is_bit_equal(case, adapters, tmp_path, top_k):
    model = mixture(case, adapters, top_k=top_k, gate_hidden=3)
    model.save_pretrained(tmp_path)
    loaded = ContextGatedMOE.from_pretrained(tmp_path, case.build())
    assert (loaded.expert_names, loaded.gate_hidden, loaded.top_k) == (model.expert_names, 3, top_k)
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert torch.equal(logits(loaded, case.batch(3)), logits(model, case.batch(3)))


def test_a_loaded_mixture_is_ready_to_use_and_to_train(case, adapters, tmp_path):
    mixture(case, adapters).save_pretrained(tmp_path)
    loaded = ContextGatedMOE.from_pretrained(tmp_path, case.build().train())
    assert not any(module.training for module in loaded.modules())
    assert {id(p) for p in loaded.parameters() if p.requires_grad} == {id(p) for p in loaded.gate_parameters()}


def test_saved_files_hold_gates_experts_and_heads_only(case, adapters, tmp_path):
    model = mixture(case, adapters)
    model.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json"}
    gate = {f"gate.{part}.{tensor}" for part in ("hidden", "output") for tensor in ("weight", "bias")}
    expected = set()
    for name, layer in model.mixture_layers().items():
        is_head, bias = name == case.head, layer.base.bias is not None
        own = {"expert_weight"} | ({"expert_bias"} if bias else set()) if is_head else {"lora_A", "lora_B"}
        expected |= {f"{name}.{key}" for key in gate | own}
    assert set().union(*(load_file(file) for file in tmp_path.glob("*.safetensors"))) == expected


def test_the_base_is_found_by_its_name(beit_adapters, tmp_path):
    base = BEIT.build()
    base.save_pretrained(tmp_path / "base")
    model = randomise_gates(ContextGatedMOE.from_adapters(type(base).from_pretrained(tmp_path / "base"), beit_adapters))
    model.save_pretrained(tmp_path / "saved")
    loaded = ContextGatedMOE.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded, BEIT.batch(3)), logits(model, BEIT.batch(3)))


@pytest.mark.parametrize(("key", "value"), [("base_class", "NoSuchModel"), ("base_class", "pipeline"), ("base_class", None),
                                            ("base_dtype", "float33"), ("base_dtype", 3), ("base_model", None),
                                            ("base_model", "/no/such/folder")])
def test_a_base_that_cannot_be_found_is_refused(beit_adapters, tmp_path, key, value):
    base = BEIT.build()
    base.save_pretrained(tmp_path / "base")
    ContextGatedMOE.from_adapters(type(base).from_pretrained(tmp_path / "base"), beit_adapters).save_pretrained(tmp_path / "saved")
    edit_json(tmp_path / "saved", lambda config: config.update({key: value}))
    with pytest.raises(MixtureError):
        ContextGatedMOE.from_pretrained(tmp_path / "saved")


def test_a_base_without_experts_is_saved_and_loaded(tmp_path):
    ContextGatedMOE.from_adapters(PLAIN.build(), {}).save_pretrained(tmp_path)
    loaded = ContextGatedMOE.from_pretrained(tmp_path, PLAIN.build())
    assert torch.equal(logits(loaded, PLAIN.batch(2)), logits(PLAIN.build(), PLAIN.batch(2)))


def test_another_base_is_refused(case, adapters, tmp_path):
    mixture(case, adapters).save_pretrained(tmp_path)
    with pytest.raises(MixtureError, match="base model"):
        ContextGatedMOE.from_pretrained(tmp_path, case.build(seed=1))


def test_a_refused_base_is_left_alone(plain_adapters, tmp_path):
    mixture(PLAIN, plain_adapters).save_pretrained(tmp_path)
    base = PLAIN.build(seed=1)
    before = snapshot(base)
    with pytest.raises(MixtureError):
        ContextGatedMOE.from_pretrained(tmp_path, base)
    assert_unchanged(base, before)


def test_a_base_of_another_precision_is_refused(plain_adapters, tmp_path):
    mixture(PLAIN, plain_adapters).save_pretrained(tmp_path)
    with pytest.raises(MixtureError, match="base model"):
        ContextGatedMOE.from_pretrained(tmp_path, PLAIN.build().double())


def test_the_replaced_head_is_no_part_of_the_fingerprint(plain_adapters):
    fingerprints = set()
    for seed in (1, 2):
        base = PLAIN.build()
        torch.manual_seed(seed)
        base.head.reset_parameters()
        fingerprints.add(ContextGatedMOE.from_adapters(base, {"attention": plain_adapters["attention"]}).base_fingerprint())
    assert len(fingerprints) == 1


@pytest.fixture(scope="module")
def saved(all_adapters, tmp_path_factory) -> tuple[ContextGatedMOE, Path]:
    model, folder = mixture(PLAIN, all_adapters[PLAIN]), tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def damaged(saved, tmp_path) -> Path:
    """A copy of a saved mixture for the test to damage."""
    return shutil.copytree(saved[1], tmp_path / "damaged")


def assert_refused_or_intact(model: ContextGatedMOE, folder: Path) -> None:
    """What is left of a saved mixture is refused in one line, or loads as if nothing had happened to it."""
    try:
        loaded = ContextGatedMOE.from_pretrained(folder, PLAIN.build())
    except MixtureError as error:
        assert "\n" not in str(error)
        return
    assert (loaded.expert_names, loaded.top_k) == (model.expert_names, model.top_k)
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert torch.equal(logits(loaded, PLAIN.batch(2)), logits(model, PLAIN.batch(2)))


def edit_json(folder: Path, edit: object) -> None:
    file = folder / "cgm_config.json"
    config = json.loads(file.read_text())
    edit(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["cgm_config.json", "cgm_model.safetensors"])
def test_a_missing_file_is_refused(damaged, name):
    (damaged / name).unlink()
    with pytest.raises(MixtureError, match=name):
        ContextGatedMOE.from_pretrained(damaged, PLAIN.build())


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(MixtureError, match="nowhere"):
        ContextGatedMOE.from_pretrained(tmp_path / "nowhere", PLAIN.build())


@pytest.mark.parametrize("number", [0, 2, "1", None])
def test_another_format_is_refused(damaged, number):
    edit_json(damaged, lambda config: config.update(format=number))
    with pytest.raises(MixtureError, match="format"):
        ContextGatedMOE.from_pretrained(damaged, PLAIN.build())


KEYS = ("format", "base_model", "base_class", "base_dtype", "base_fingerprint", "experts", "gate_hidden", "top_k", "ranks", "heads")


@pytest.mark.parametrize("key", KEYS)
def test_json_without_a_key_is_refused_or_harmless(saved, damaged, key):
    edit_json(damaged, lambda config: config.pop(key))
    assert_refused_or_intact(saved[0], damaged)


@pytest.mark.parametrize("value", [None, -1, 1.5, "x", [], ["x"], {}, {"x": 1}, [None], 10**20], ids=repr)
@pytest.mark.parametrize("key", KEYS)
def test_json_with_a_value_of_another_kind_is_refused_or_harmless(saved, damaged, key, value):
    edit_json(damaged, lambda config: config.update({key: value}))
    assert_refused_or_intact(saved[0], damaged)


def test_json_that_is_no_object_is_refused_or_harmless(saved, damaged):
    (damaged / "cgm_config.json").write_text("[1]")
    assert_refused_or_intact(saved[0], damaged)


def test_json_with_an_expert_renamed_is_refused_or_harmless(saved, damaged):
    edit_json(damaged, lambda config: config["experts"].__setitem__(0, "zebra"))  # sorts last instead of first
    assert_refused_or_intact(saved[0], damaged)


def test_json_with_two_experts_exchanged_is_refused_or_harmless(saved, damaged):
    edit_json(damaged, lambda config: config["experts"].reverse())
    assert_refused_or_intact(saved[0], damaged)


def test_json_with_ranks_exchanged_is_refused_or_harmless(saved, damaged):
    edit_json(damaged, lambda config: config["ranks"]["base"].reverse())
    assert_refused_or_intact(saved[0], damaged)


def test_weights_with_a_tensor_missing(damaged):
    file = damaged / "cgm_model.safetensors"
    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if key != "head.gate.output.bias"}, file)
    with pytest.raises(MixtureError):
        ContextGatedMOE.from_pretrained(damaged, PLAIN.build())


def test_weights_with_a_tensor_too_many(damaged):
    file = damaged / "cgm_model.safetensors"
    save_file({**load_file(file), "norm.weight": torch.ones(12)}, file)
    with pytest.raises(MixtureError):
        ContextGatedMOE.from_pretrained(damaged, PLAIN.build())


def test_weights_with_one_bit_flipped_are_refused_or_harmless(saved, damaged):
    file = damaged / "cgm_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert_refused_or_intact(saved[0], damaged)


@pytest.mark.parametrize("name", ["cgm_config.json", "cgm_model.safetensors"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_bytes_cut_or_flipped_are_refused_or_harmless(saved, tmp_path_factory, name, data):
    model, source = saved
    folder = shutil.copytree(source, tmp_path_factory.mktemp("damaged") / "copy")
    content = bytearray((folder / name).read_bytes())
    start = data.draw(st.integers(0, min(len(content), 4000) - 1))
    if data.draw(st.booleans()):
        del content[start:]
    else:
        content[start] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(content)
    assert_refused_or_intact(model, folder)


# --- Adding an expert -------------------------------------------------------------------------------------------------


def without(adapters: dict[str, Path], name: str) -> dict[str, Path]:
    return {key: folder for key, folder in adapters.items() if key != name}


@pytest.mark.parametrize("name", EXPERTS)
def test_adding_an_expert_keeps_the_ratios_of_the_others(case, adapters, name):
    model = mixture(case, without(adapters, name))
    old = {layer: copy.deepcopy(module.gate) for layer, module in model.mixture_layers().items()}
    model.add_expert(name, adapters[name])
    others = [index for index, expert in enumerate(model.expert_names) if expert != name]
    for layer, gate in old.items():
        tokens = torch.randn(3, 5, gate.hidden.in_features)
        weights = model.mixture_layers()[layer].gate(tokens, Routing())[:, others]
        assert_close(weights / weights.sum(1, keepdim=True), gate(tokens, Routing()))


def test_an_added_expert_never_outweighs_the_others_at_once(case, adapters):
    model = mixture(case, without(adapters, "headless"))
    model.add_expert("headless", adapters["headless"])
    index = model.expert_names.index("headless")
    for weights in recorded(model, case.batch(4)).values():
        assert (weights.argmax(1) != index).all() and (weights[:, index] > 0).all()


@pytest.mark.parametrize("name", EXPERTS)
def test_an_added_expert_can_be_used(case, adapters, name):
    model, inputs = mixture(case, without(adapters, name)), case.batch(3)
    model.add_expert(name, adapters[name])
    assert model.expert_names == sorted(EXPERTS)
    for expert in EXPERTS:
        with model.fixed_gates({expert: 1.0}):
            assert_close(logits(model, inputs), peft_logits(case, adapters[expert], inputs))


def test_an_added_expert_can_bring_layers_of_its_own(case, adapters):
    model = mixture(case, {"headless": adapters["headless"]})
    before = set(model.mixture_layers())
    model.add_expert("attention", adapters["attention"])
    assert case.head not in before and case.head in model.mixture_layers() and before < set(model.mixture_layers())
    assert isinstance(model.mixture_layers()[case.head], MixtureHead)
    weights = recorded(model, case.batch(2))[case.head]
    assert torch.equal(weights, torch.full((2, 2), 0.5))


def test_only_gates_are_trainable_after_adding(case, adapters):
    model = mixture(case, without(adapters, "scaled"))
    model.add_expert("scaled", adapters["scaled"])
    assert all(parameter.requires_grad == (".gate." in name) for name, parameter in model.named_parameters())


def test_adding_an_expert_equals_building_with_it(case, adapters):
    added, built = mixture(case, without(adapters, "headless")), mixture(case, adapters)
    added.add_expert("headless", adapters["headless"])
    randomise_gates(added)
    assert_same_tensors(added.state_dict(), built.state_dict())


def test_an_extended_mixture_is_saved_and_loaded(case, adapters, tmp_path):
    model = mixture(case, without(adapters, "attention"))
    model.add_expert("attention", adapters["attention"])
    model.save_pretrained(tmp_path)
    loaded = ContextGatedMOE.from_pretrained(tmp_path, case.build())
    assert torch.equal(logits(loaded, case.batch(2)), logits(model, case.batch(2)))


@pytest.mark.parametrize("training", [False, True])
def test_adding_an_expert_keeps_the_mode(beit_adapters, training):
    model = mixture(BEIT, without(beit_adapters, "scaled")).train(training)
    model.add_expert("scaled", beit_adapters["scaled"])
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("fault", ["missing", "taken", "dora", "shape"])
def test_a_failed_addition_changes_nothing(case, adapters, tmp_path, fault):
    model, inputs = mixture(case, adapters).train(), case.batch(2)
    state, output = {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits(model, inputs)
    name, folder = "culprit", tmp_path / "culprit"
    if fault == "taken":
        name, folder = "scaled", adapters["scaled"]
    elif fault != "missing":
        save_adapter(case.build(), folder, r=2, target_modules=list(case.first), use_dora=fault == "dora")
    if fault == "shape":
        file = folder / "adapter_model.safetensors"
        save_file({key: torch.ones(3, 3) for key in load_file(file)}, file)
    with pytest.raises(MixtureError, match=name):
        model.add_expert(name, folder)
    assert_same_tensors(model.state_dict(), state)
    assert torch.equal(logits(model, inputs), output)
    assert all(parameter.requires_grad == (".gate." in key) for key, parameter in model.named_parameters())
    assert all(module.training for module in model.modules())


# --- Refusals ---------------------------------------------------------------------------------------------------------


def assert_refused(base: nn.Module, folder: Path) -> None:
    """The adapter is refused by the expert's name, in one line, and the base left exactly as it was."""
    before = snapshot(base)
    with pytest.raises(MixtureError, match="'culprit'") as refusal:
        ContextGatedMOE.from_adapters(base, {"culprit": folder})
    assert "\n" not in str(refusal.value)
    assert_unchanged(base, before)


@pytest.mark.parametrize("options", [
    dict(use_dora=True), dict(bias="all"), dict(bias="lora_only"), dict(lora_bias=True), dict(init_lora_weights="pissa"),
    dict(init_lora_weights="olora"), dict(target_modules=["projection"]), dict(target_modules=["q_proj"], modules_to_save=["layernorm"]),
    dict(target_modules=["q_proj"], modules_to_save=["mlp"]), dict(target_parameters=["fc1.weight"], target_modules=["q_proj"]),
    dict(kasa_config=KasaConfig()), dict(monteclora_config=MontecloraConfig()), dict(alora_invocation_tokens=[1]),
    dict(use_bdlora=BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["fc1"], nblocks=2)),
], ids=lambda options: "-".join(options))
def test_an_inexact_lora_is_refused(tmp_path, options):
    folder = save_adapter(BEIT.build(), tmp_path, **{"r": 2, "target_modules": ["q_proj", "fc1"], **options})
    assert_refused(BEIT.build(), folder)


def test_lora_on_an_embedding_is_refused(tmp_path):
    assert_refused(BERT.build(), save_adapter(BERT.build(), tmp_path, r=2, target_modules=["word_embeddings", "query"]))


def test_trained_tokens_are_refused(tmp_path):
    folder = save_adapter(BERT.build(), tmp_path, r=2, target_modules=["query"], trainable_token_indices={"word_embeddings": [1, 2]})
    assert_refused(BERT.build(), folder)


def test_another_kind_of_adapter_is_refused(tmp_path):
    config = IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"])
    assert_refused(BEIT.build(), save_adapter(BEIT.build(), tmp_path, config=config))


def test_a_missing_adapter_is_refused(tmp_path):
    assert_refused(BEIT.build(), tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"peft_type": "NOPE"}', '{"peft_type": "LORA", "r": "x"}'])
def test_a_damaged_adapter_configuration_is_refused(beit_adapters, tmp_path, content):
    (tmp_path / "adapter_model.safetensors").write_bytes((beit_adapters["scaled"] / "adapter_model.safetensors").read_bytes())
    (tmp_path / "adapter_config.json").write_text(content)
    assert_refused(BEIT.build(), tmp_path)


@pytest.mark.parametrize("keep", [None, 0, 5, 500, -1])
def test_damaged_adapter_weights_are_refused(beit_adapters, tmp_path, keep):
    for file in beit_adapters["scaled"].glob("adapter_*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "adapter_model.safetensors"
    file.unlink() if keep is None else file.write_bytes(file.read_bytes()[:keep])
    assert_refused(BEIT.build(), tmp_path)


@pytest.mark.parametrize("options", [dict(hidden_size=8), dict(num_hidden_layers=1), dict(num_hidden_layers=3), dict(num_labels=5)], ids=str)
def test_an_adapter_of_another_base_is_refused(tmp_path, options):
    folder = save_adapter(beit(**options), tmp_path, r=2, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"])
    assert_refused(BEIT.build(), folder)


def test_an_adapter_of_another_architecture_is_refused(all_adapters):
    assert_refused(BEIT.build(), all_adapters[BERT]["headless"])


def test_a_head_of_another_width_than_the_base_has_is_refused(tmp_path):
    folder = save_adapter(beit(num_labels=5), tmp_path, r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    with pytest.raises(MixtureError, match="'culprit' has a head of 5 outputs at 'classifier', where the base model has 3; "):
        ContextGatedMOE.from_adapters(BEIT.build(), {"culprit": folder})


def test_heads_of_different_width_are_refused():
    base = PLAIN.build()
    before = snapshot(base)
    heads = {width: {"head": (torch.randn(width, 12), torch.randn(width))} for width in (3, 5)}
    with pytest.raises(MixtureError, match="'three' 3, 'five' 5"):
        ContextGatedMOE(base, [Expert("three", heads=heads[3]), Expert("five", heads=heads[5])])
    assert_unchanged(base, before)


def test_two_experts_of_one_name_are_refused(plain_adapters):
    base = PLAIN.build()
    before, expert = snapshot(base), read_expert(base, "twin", plain_adapters["scaled"])
    with pytest.raises(MixtureError, match="twin"):
        ContextGatedMOE(base, [expert, expert])
    assert_unchanged(base, before)


def test_gates_without_hidden_units_are_refused(plain_adapters):
    base = PLAIN.build()
    before = snapshot(base)
    with pytest.raises(MixtureError, match="gate_hidden"):
        ContextGatedMOE.from_adapters(base, plain_adapters, gate_hidden=0)
    assert_unchanged(base, before)


def test_one_bad_expert_among_good_ones_leaves_the_base_alone(beit_adapters, tmp_path):
    base = BEIT.build()
    before = snapshot(base)
    with pytest.raises(MixtureError, match="'culprit'"):
        ContextGatedMOE.from_adapters(base, {**beit_adapters, "culprit": tmp_path})
    assert_unchanged(base, before)


# --- Reading an expert ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERTS)
def test_reading_an_expert_leaves_the_base_alone(case, adapters, name):
    base = case.build()
    next(base.parameters()).requires_grad_(False)
    before, attributes = snapshot(base), set(vars(base))
    read_expert(base, name, adapters[name])
    assert_unchanged(base, before)
    assert set(vars(base)) == attributes


def test_reading_an_expert_keeps_the_mode(beit_adapters):
    base = BEIT.build().train()
    read_expert(base, "scaled", beit_adapters["scaled"])
    assert all(module.training for module in base.modules())


def test_reading_an_expert_leaves_no_hooks(beit_adapters):
    base = BEIT.build()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    before = [len(module._forward_hooks) for module in base.modules()]
    read_expert(base, "scaled", beit_adapters["scaled"])
    assert [len(module._forward_hooks) for module in base.modules()] == before


def test_base_weights_inside_an_adapter_do_not_reach_the_base(tmp_path):
    folder = save_adapter(LLAMA.build(seed=1), tmp_path, r=2, target_modules=["lm_head"])  # peft saves lm_head's base layer too
    base = LLAMA.build()
    before = snapshot(base)
    try:
        read_expert(base, "other", folder)
    except MixtureError as error:
        assert "other" in str(error)
    assert_unchanged(base, before)
