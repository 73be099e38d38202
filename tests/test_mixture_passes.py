"""Tests of a mixture's passes: batch mates, masks, threads, recomputation, copies, and what other libraries do with a model."""

import copy
import inspect
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import transformers
from mixture_models import BEIT, BERT, CASES, JOINT, LLAMA, PLAIN, SWIN, assert_close, logits, recorded, rows, telling
from torch import Tensor, nn

from ContextGatedMOE import ContextGatedMOE, MixtureError


@pytest.mark.parametrize(("case", "joint", "top_k"), [
    *((case, False, None) for case in CASES), *((case, True, top_k) for case in JOINT for top_k in (None, 1))])
def test_batch_mates_and_their_order_never_matter(case, joint, top_k):
    model, inputs, order = case.joint(top_k=top_k) if joint else case.shared(), case.batch(4), [2, 0, 3, 1]
    expected, gates = logits(model, inputs), recorded(model, inputs)
    assert_close(logits(model, rows(inputs, order)), expected[order])
    assert_close(torch.cat([logits(model, rows(inputs, [image])) for image in range(4)]), expected)
    assert all((weights[0] - weights[1]).abs().max() > 1e-6 for weights in gates.values()) or top_k == 1


def test_padding_never_matters():
    model, inputs = BERT.joint(), BERT.batch(3)
    expected, gates, mask = logits(model, inputs), recorded(model, inputs), inputs["attention_mask"]
    longer = {"input_ids": torch.cat([inputs["input_ids"], torch.full((3, 5), 9)], 1),
              "attention_mask": torch.cat([mask, mask[:, :5] * 0], 1)}
    filled = {**inputs, "input_ids": torch.where(mask.bool(), inputs["input_ids"], 17)}
    for same in (filled, longer, {**inputs, "attention_mask": mask.bool()}):
        assert_close(logits(model, same), expected)
        for name, weights in recorded(model, same).items():
            assert_close(weights, gates[name])
    with torch.no_grad():
        assert_close(model(inputs["input_ids"], mask).logits, expected)  # by position


def test_passes_of_two_threads_do_not_see_each_other():
    """Both are in the middle of a pass at the same time, with batches of 1 and 7; one fixes and records the weights."""
    model, inputs, fixed = BEIT.joint(), {size: BEIT.batch(size, size) for size in (1, 7)}, {"b": 0.7, "a": 0.3}
    with model.fixed_gates(fixed):
        expected = {1: logits(model, inputs[1])}
    expected[7] = logits(model, inputs[7])
    meeting, found, records = threading.Barrier(2, timeout=60), {1: [], 7: []}, []
    for block in model.base_model.beit.layers:
        block.mlp.register_forward_pre_hook(lambda *_: (meeting.wait(), None)[1])

    def passes(size: int) -> None:
        for _ in range(3):
            if size == 7:
                found[size].append(logits(model, inputs[size]))
                continue
            with model.fixed_gates(fixed), model.record_gates() as gates:
                found[size].append(logits(model, inputs[size]))
            records.extend(gates.values())

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(passes, (1, 7)))
    assert len(found[1]) == len(found[7]) == 3 and len(records) == 6
    for size, outputs in found.items():
        for output in outputs:
            assert_close(output, expected[size])
    for weights in records:
        assert_close(weights, torch.tensor([[0.3, 0.7, 0.0]]))


@pytest.mark.parametrize("case", [BEIT, SWIN])
def test_blocks_computed_again_have_the_weights_of_their_own_pass(case):
    """Gradient checkpointing: two passes with different batches, then one backward pass that computes both again."""
    gradients = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = case.shared(top_k=2).train()
        if options:
            model.gradient_checkpointing_enable(options)
        sum(model(**case.batch(size, size)).logits.square().mean() for size in (3, 2)).backward()
        gradients.append([parameter.grad for parameter in telling(model).values()])
        assert all(gradient.abs().sum() > 0 for gradient in gradients[-1])
    for others in gradients[1:]:
        for actual, expected in zip(others, gradients[0], strict=True):
            assert_close(actual, expected)


def test_gates_compute_and_stay_in_fp32():
    model, inputs, plain, x = BEIT.joint(), BEIT.batch(3), PLAIN.joint(), PLAIN.batch(3)
    expected, without = logits(model, inputs), recorded(plain, x)
    parameters = [parameter.clone() for parameter in model.gate_parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        assert (logits(model, inputs) - expected).abs().max() < 0.1 * expected.abs().max()
        assert torch.equal(recorded(plain, x)["base"], without["base"])  # the first gate: nothing before it was in bf16
    built = replace(BEIT, make=lambda: BEIT.make().bfloat16()).joint()
    for half in (model.to(torch.bfloat16), built):
        assert half.dtype == torch.bfloat16 and {parameter.dtype for parameter in half.gate_parameters()} == {torch.float32}
    assert all(torch.equal(now, before) for now, before in zip(model.gate_parameters(), parameters, strict=True))
    half = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    assert (logits(model, half) - expected).abs().max() < 0.2 * expected.abs().max()
    model.train()(**half).logits.square().mean().backward()
    assert {parameter.grad.dtype for parameter in telling(model).values()} == {torch.float32}


def test_exported_and_compiled_with_a_changing_batch():
    """The smallest model: a trace of a transformer takes half a minute and goes through the same hooks and layers."""
    model, shapes = PLAIN.joint(), {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    exported = torch.export.export(model, (), PLAIN.batch(3), dynamic_shapes=shapes).module()
    assert_close(exported(**PLAIN.batch(5)), logits(model, PLAIN.batch(5)))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for size in (3, 2):
        assert_close(logits(compiled, PLAIN.batch(size)), logits(model, PLAIN.batch(size)))
    with model.fixed_gates({"b": 1.0}):
        assert_close(logits(compiled, PLAIN.batch(2)), logits(model, PLAIN.batch(2)))


def test_copies_are_mixtures_of_their_own():
    model, inputs, file = BEIT.joint(fit=True), BEIT.batch(2), io.BytesIO()
    expected = logits(model, inputs)
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with model.fixed_gates({"a": 1.0}):
            assert torch.equal(logits(twin, inputs), expected)
        with twin.fixed_gates({"a": 1.0}):
            assert not torch.equal(logits(twin, inputs), expected)
        twin.remove_expert("a")
        assert not any(module._forward_pre_hooks for module in twin.unload().modules())
    assert torch.equal(logits(model, inputs), expected) and model.expert_names == ["a", "b", "c"]


def test_a_replica_of_data_parallel_has_the_fixed_weights_in_its_thread():
    model, inputs = BEIT.joint(), BEIT.batch(4)
    with model.fixed_gates({"b": 1.0}), model.record_gates() as gates:
        expected, twin = logits(model, inputs), model._replicate_for_data_parallel()
        gates.clear()
        with ThreadPoolExecutor(1) as thread:
            assert_close(thread.submit(logits, twin, inputs).result(), expected)
    assert gates == {}  # a part of the batch, whichever was last, is no record


def test_trainer_takes_a_mixture_as_it_is(tmp_path):
    model = BEIT.joint()
    assert inspect.signature(model.forward) == inspect.signature(BEIT.build().forward)
    images = [{"pixel_values": image, "labels": label} for inputs, labels in BEIT.labelled(0, 8, 16)
              for image, label in zip(inputs["pixel_values"], labels, strict=True)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True,
        gradient_checkpointing=True, learning_rate=0.1, save_strategy="no")
    before = copy.deepcopy(model.state_dict())
    trainer = transformers.Trainer(model, arguments, train_dataset=[{**image, "file name": "x"} for image in images],
                                   eval_dataset=images)
    trainer.train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(telling(model))
    inputs, labels = (torch.stack([image[key] for image in images]) for key in ("pixel_values", "labels"))
    expected = nn.functional.nll_loss(logits(model.eval(), {"pixel_values": inputs}), labels)
    assert abs(trainer.evaluate()["eval_loss"] - expected.item()) < 1e-4
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_a_language_model_generates_with_a_cache():
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    model, inputs = LLAMA.shared(), LLAMA.batch(2)
    both = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**rows(inputs, [1]), **options), both[1:])
    with model.fixed_gates({}):
        assert torch.equal(model.generate(**inputs, **options), LLAMA.build().generate(**inputs, **options))


def test_what_a_mixture_cannot_tell_apart_is_refused_by_name():
    model = PLAIN.joint()
    with pytest.raises(MixtureError, match="'head' belongs to a mixture: call the mixture"):
        model.base_model.head(torch.zeros(2, 12))

    class Transposed(type(PLAIN.build())):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.base(x)).transpose(0, 1)
            return self.head(self.blocks[1](x).mean(0))

    base = PLAIN.build()
    base.__class__ = Transposed
    with pytest.raises(MixtureError, match=r"'blocks.1' gets 5 rows for inputs of \[3\]"):
        logits(ContextGatedMOE(base, PLAIN.experts()), PLAIN.batch(3))
