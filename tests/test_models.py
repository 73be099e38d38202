"""Tests of loading a backbone: published files arrive in full, from a folder and by name, and nothing else is taken."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, save_family
from hub import folder_repo
from peft import PeftModel
from PIL import Image
from pipeline import METHODS, Workspace, save_tiny_backbone, tiny_beit
from safetensors.torch import load_file, save_file
from trainings import settings

from common.data.tensors import ImageSet
from common.errors import UserError
from common.models import backbone_fingerprint, load_backbone, load_processor
from common.models.lora import add_lora
from common.training.evaluate import features

pytest_plugins = ["warm_process"]

NAME = "microsoft/beit-tiny-test"
CLASSES = ["ash", "beech", "cedar", "date"]
HEAD = {"classifier.weight", "classifier.bias"}
# Names of the installed transformers -> names in the files that microsoft/beit-*-patch16-224 publish.
PUBLISHED_NAMES = [
    (r"^beit\.layers\.(\d+)\.", r"beit.encoder.layer.\1."),
    (r"attention\.q_proj", "attention.attention.query"),
    (r"attention\.k_proj", "attention.attention.key"),
    (r"attention\.v_proj", "attention.attention.value"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
    (r"(\.\d+)\.relative_position_bias\.", r"\1.attention.attention.relative_position_bias."),
]
# Loads a backbone by name and writes all its weights.
LOAD_BY_NAME = """
import sys
import torch
from common.errors import UserError
from common.models import load_backbone, load_processor
try:
    model = load_backbone(sys.argv[1], ["ash", "beech", "cedar", "date"], 0)
    load_processor(sys.argv[1])
except UserError as error:
    sys.exit(str(error))
torch.save(model.state_dict(), sys.argv[2])
"""


def published_file(model):
    """Name -> tensor of a published file: older names, 1,000 classes, and the buffers that were kept in it."""
    tensors = {}
    for key, value in model.state_dict().items():
        for pattern, replacement in PUBLISHED_NAMES:
            key = re.sub(pattern, replacement, key)
        tensors[key] = value.contiguous()
        if key.endswith("relative_position_bias_table"):
            tensors[key.replace("bias_table", "index")] = torch.zeros(17, 17, dtype=torch.int64)
    return tensors


@pytest.fixture(scope="module")
def original():
    """A small random BEiT with a head for 1,000 classes."""
    return tiny_beit(3, num_labels=1000)


@pytest.fixture
def published(tmp_path, original):
    folder = tmp_path / "published"
    save_tiny_backbone(folder, seed=0)  # for the image processor
    original.config.save_pretrained(folder)
    save_file(published_file(original), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_same_backbone(ours, theirs):
    """All but the head, bit for bit."""
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key not in HEAD)


def test_a_published_backbone_arrives_in_full_with_a_new_head_of_the_seed(published, original):
    """Of older names, every weight but the head is the file's; the head is made for the given classes."""
    model, again, other = (load_backbone(str(published), CLASSES, seed) for seed in (0, 0, 1))
    assert "beit.encoder.layer.1.attention.attention.query.weight" in load_file(published / "model.safetensors")
    assert_same_backbone(model.state_dict(), original.state_dict())
    assert model.classifier.weight.shape == (4, model.config.hidden_size)
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert not model.classifier.bias.any() and model.classifier.weight.std() > 0
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)
    assert backbone_fingerprint(model) == backbone_fingerprint(other)


def test_a_backbone_by_name_arrives_in_full_also_after_a_broken_off_download_or_is_one_line(
        published, original, hub, warm_process, tmp_path):
    """Unknown, without permission, or with a file that does not come."""
    (tmp_path / "load.py").write_text(LOAD_BY_NAME)
    file = tmp_path / "loaded.pt"
    for fault in ("unknown", "gated", "model.safetensors"):
        shutil.rmtree(warm_process.cache, ignore_errors=True)
        hub.repos = {} if fault == "unknown" else {NAME: folder_repo(published)}
        hub.gated = {NAME} if fault == "gated" else set()
        hub.cuts[fault] = 1000
        outcome = warm_process.run(tmp_path / "load.py", NAME, file)
        assert outcome.status == 1 and len(outcome.errors.splitlines()) == 1
        assert f"--model {NAME} cannot be loaded" in outcome.errors and "--demo" in outcome.errors
    hub.cuts["model.safetensors"] = 1
    outcome = warm_process.run(tmp_path / "load.py", NAME, file)
    assert (outcome.status, outcome.errors) == (0, "")
    assert_same_backbone(torch.load(file), original.state_dict())


def test_a_backbone_that_lacks_a_weight_or_has_another_is_refused(published, tmp_path):
    """Not one weight is made up or left out, but what lies beside the model, such as a text tower; nor is half a file read."""
    file = published / "model.safetensors"
    whole, attention = load_file(file), "encoder.layer.1.attention.attention"
    for name, tensor in ((f"{attention}.query.weight", None), ("pooler.layernorm.bias", None),
                         (f"{attention}.relative_position_bias.relative_position_bias_table", None),
                         ("embeddings.cls_token", torch.zeros(1, 1, 7)), ("encoder.layer.2.lambda_1", torch.zeros(32))):
        tensors = {key: value for key, value in whole.items() if key != f"beit.{name}"}
        if tensor is not None:
            tensors[f"beit.{name}"] = tensor
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match="does not fit: beit.[a-z]+"):
            load_backbone(str(published), CLASSES, 0)
    save_file(whole | {"text_model.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    load_backbone(str(published), CLASSES, 0)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for load in (lambda: load_backbone(str(published), CLASSES, 0), lambda: load_processor(str(tmp_path))):
        with pytest.raises(UserError, match="cannot be loaded"):
            load()


def test_what_is_not_made_of_linear_layers_is_refused_by_name(tmp_path):
    """Convolutional classifiers, and models that are no image classifiers."""
    small = {"hidden_sizes": [8, 8], "depths": [1, 1]}
    for config in (transformers.ResNetConfig(embedding_size=8, **small), transformers.ConvNextConfig(num_stages=2, **small),
                   transformers.SegformerConfig(), transformers.LevitConfig(), transformers.BertConfig()):
        config.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=f"is a {config.model_type} model, .*; choose one made of linear layers, such as"):
            load_backbone(str(tmp_path), CLASSES, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_backbone_of_any_family_is_that_of_transformers(tmp_path, name):
    """Preprocessing and features to 1e-5; and the linear layers of the blocks, no others, learn by LoRA."""
    published = save_family(name, tmp_path).state_dict()
    model, processor = load_backbone(str(tmp_path), CLASSES, 0), load_processor(str(tmp_path))
    assert all(torch.equal(published[key], value) for key, value in model.state_dict().items() if key not in HEAD)

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (40, 44, 3), dtype=np.uint8)) for _ in range(3)]
    expected = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(pictures, return_tensors="pt")
    batch = processor(pictures, return_tensors="pt")["pixel_values"]
    assert torch.allclose(batch, expected["pixel_values"], atol=1e-5)

    reference = type(model).from_pretrained(tmp_path, num_labels=len(CLASSES), ignore_mismatched_sizes=True).eval()
    reference.classifier.load_state_dict(model.classifier.state_dict())
    with torch.no_grad():
        logits = reference(batch).logits
        seen = features(model, ImageSet(batch, torch.zeros(3, dtype=torch.int64)), settings())
        assert torch.allclose(model.classifier(seen.inputs), logits, atol=1e-5)
        assert torch.allclose(model(batch).logits, logits, atol=1e-5)

    adapted = add_lora(model, rank=2, alpha=4, seed=0)
    blocks = {key.removeprefix("base_model.model.").partition(".lora_A")[0] for key, parameter in adapted.named_parameters()
              if "lora_A" in key}
    linears = {key for key, module in reference.named_modules() if type(module) is torch.nn.Linear}
    assert blocks == {key for key in linears if re.search(r"\.(layers?|blocks)\.\d+\.(?!downsample|blocks)", key)}


@pytest.mark.parametrize("name", ["swin", "clip"])  # without a class token, and published with a text model
def test_a_backbone_of_another_family_goes_through_the_scripts(workspace, tmp_path, name):
    """All scripts run on the prepared images, and what they trained is opened by the libraries alone."""
    save_family(name, tmp_path / "model")
    place = Workspace(tmp_path / "root", str(tmp_path / "model"))
    workspace.copy(place.root, "fire_dataset", "game_dataset", "tasks.json")
    for script, *flags in (["Generate_Base_Model", "--epochs", "1"], ["Benchmark"],
                           ["Finetune", "--epochs", "1", "--layer_decay", "0.5"], ["Lora_Finetune", "--epochs", "1"],
                           ["CGM_Lora", "--epochs", "0"]):
        place.run(script, *flags)
    assert set(place.summary()["method"]) == {*METHODS}
    task = place.tasks()[0]
    images, trained = task.test.batch(torch.arange(len(task.test))), place.results
    finetuned = transformers.AutoModelForImageClassification.from_pretrained(trained / "Finetune/Models/fire_finetune")
    adapted = PeftModel.from_pretrained(load_backbone(place.model, task.classes, 0),
                                        trained / "Lora_Finetune/Models/fire_lora_finetune")
    for method, model in (("Finetune", finetuned), ("Lora_Finetune", adapted)):
        with torch.no_grad():
            probabilities = model.eval()(images).logits.softmax(1)
        written = place.predictions(method, "Fire_Risk").filter(like="Probability")
        assert np.allclose(probabilities, written, atol=1e-5)


def test_code_from_a_repository_is_not_run(published, tmp_path, monkeypatch):
    """A model that brings its own code is refused, and nobody is asked whether to run it; a yes would be ready."""
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    (published / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}))
    (published / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(str(published), CLASSES, 0)
    assert not (tmp_path / "ran").exists()
