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
from pipeline import Workspace, save_tiny_backbone, tiny_beit
from safetensors.torch import load_file, save_file
from trainings import settings

from common.data.tensors import ImageSet
from common.errors import UserError
from common.models import add_lora, backbone_fingerprint, load_backbone, load_processor
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
from safetensors.torch import save_file
from common.errors import UserError
from common.models import load_backbone, load_processor
try:
    model = load_backbone(sys.argv[1], ["ash", "beech", "cedar", "date"], 0)
    load_processor(sys.argv[1])
except UserError as error:
    sys.exit(str(error))
save_file({key: value.contiguous() for key, value in model.state_dict().items()}, sys.argv[2])
"""


def published_name(key):
    """What a weight is called in a published file."""
    for pattern, replacement in PUBLISHED_NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def published_file(model):
    """Name -> tensor of a published file: older names, 1,000 classes, and the buffers that were kept in it."""
    tensors = {published_name(key): value.contiguous() for key, value in model.state_dict().items()}
    patches = (model.config.image_size // model.config.patch_size) ** 2
    for layer in range(model.config.num_hidden_layers):
        name = f"beit.encoder.layer.{layer}.attention.attention.relative_position_bias.relative_position_index"
        tensors[name] = torch.zeros(patches + 1, patches + 1, dtype=torch.int64)
    return tensors


@pytest.fixture(scope="module")
def original():
    """A small random BEiT with a head for 1,000 classes."""
    return tiny_beit(3, num_labels=1000)


@pytest.fixture
def published(tmp_path, original):
    """A folder like a published BEiT."""
    folder = tmp_path / "published"
    save_tiny_backbone(folder, seed=0)  # for the image processor
    original.config.save_pretrained(folder)
    save_file(published_file(original), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def backbone_of(state):
    """The weights without the head."""
    return {key: value for key, value in state.items() if key not in HEAD}


def assert_same(ours, theirs):
    """Both hold the same weights, bit for bit."""
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def edit(folder, change):
    """Change the weights of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_published_file_has_the_older_names(published):
    """What these tests load is laid out as microsoft/beit-base-patch16-224 publishes it."""
    names = set(load_file(published / "model.safetensors"))
    block = "beit.encoder.layer.1."
    assert {f"{block}attention.attention.{name}" for name in (
        "query.weight", "query.bias", "key.weight", "value.weight", "value.bias",
        "relative_position_bias.relative_position_bias_table", "relative_position_bias.relative_position_index",
    )} <= names
    assert {f"{block}{name}.{kind}" for name in ("attention.output.dense", "intermediate.dense", "output.dense")
            for kind in ("weight", "bias")} <= names
    assert not any("beit.layers" in name or "proj." in name.replace("projection.", "") for name in names)


def test_a_published_backbone_arrives_in_full_from_a_folder(published, original):
    """Every weight but the head is the file's."""
    assert_same(backbone_of(load_backbone(str(published), CLASSES, 0).state_dict()), backbone_of(original.state_dict()))


def test_a_published_backbone_arrives_in_full_by_name(published, original, hub, warm_process, tmp_path):
    """The same by its name on the Hub."""
    hub.repos[NAME] = folder_repo(published)
    (tmp_path / "load.py").write_text(LOAD_BY_NAME)
    outcome = warm_process.run(tmp_path / "load.py", NAME, tmp_path / "loaded.safetensors")
    assert (outcome.status, outcome.errors) == (0, "")
    assert_same(backbone_of(load_file(tmp_path / "loaded.safetensors")), backbone_of(original.state_dict()))


def test_the_head_is_new(published):
    """It is made for the given classes, with their names, in place of the 1,000."""
    model = load_backbone(str(published), CLASSES, 0)
    assert model.classifier.weight.shape == (4, model.config.hidden_size)
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert not model.classifier.bias.any() and model.classifier.weight.std() > 0


def test_the_head_follows_the_seed(published):
    """A seed gives one head; another seed another, on the same backbone."""
    first, again, other = (load_backbone(str(published), CLASSES, seed) for seed in (0, 0, 1))
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert backbone_fingerprint(first) == backbone_fingerprint(other)


def test_older_and_newer_names_are_one_model(published, original, tmp_path):
    """A file with the names of the installed transformers gives the same backbone as the published one."""
    (tmp_path / "newer").mkdir()
    original.config.save_pretrained(tmp_path / "newer")
    newer = {key: value.contiguous() for key, value in original.state_dict().items()}
    save_file(newer, tmp_path / "newer" / "model.safetensors", metadata={"format": "pt"})
    models = [load_backbone(str(folder), CLASSES, 0) for folder in (published, tmp_path / "newer")]
    assert backbone_fingerprint(models[0]) == backbone_fingerprint(models[1])


def test_a_backbone_that_lacks_a_weight_or_has_one_of_another_shape_is_refused(published):
    """Not one weight is made up."""
    whole = load_file(published / "model.safetensors")
    for name in ("encoder.layer.1.attention.attention.query.weight", "encoder.layer.1.lambda_2", "pooler.layernorm.bias",
                 "encoder.layer.0.attention.attention.relative_position_bias.relative_position_bias_table",
                 "embeddings.cls_token"):
        tensors = {key: tensor for key, tensor in whole.items() if key != f"beit.{name}"}
        if "token" in name:
            tensors[f"beit.{name}"] = torch.zeros(1, 1, 7)
        save_file(tensors, published / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match="does not fit: beit.[a-z]+"):
            load_backbone(str(published), CLASSES, 0)


def test_a_file_of_a_deeper_model_is_refused(published):
    """A block that the model does not have is not left out in silence; what lies beside the model, such as a text tower, is."""
    edit(published, lambda tensors: tensors.update({"text_model.weight": torch.zeros(2)}))
    load_backbone(str(published), CLASSES, 0)
    edit(published, lambda tensors: tensors.update({"beit.encoder.layer.2.lambda_1": torch.zeros(32)}))
    with pytest.raises(UserError, match="does not fit: beit.layers.2.lambda_1"):
        load_backbone(str(published), CLASSES, 0)


def test_a_cut_file_is_refused(published):
    """Half a weights file is one clear line."""
    content = (published / "model.safetensors").read_bytes()
    (published / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(str(published), CLASSES, 0)


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
    published = save_family(name, tmp_path)
    model, processor = load_backbone(str(tmp_path), CLASSES, 0), load_processor(str(tmp_path))
    ours, theirs = ({key: value for key, value in part.state_dict().items() if key not in HEAD} for part in (model, published))
    assert all(torch.equal(theirs[key], value) for key, value in ours.items())

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (40, 44, 3), dtype=np.uint8)) for _ in range(3)]
    expected = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(pictures, return_tensors="pt")
    batch = processor(pictures, return_tensors="pt")["pixel_values"]
    assert torch.allclose(batch, expected["pixel_values"], atol=1e-5)

    reference = type(model).from_pretrained(tmp_path, num_labels=len(CLASSES), ignore_mismatched_sizes=True).eval()
    reference.classifier.load_state_dict(model.classifier.state_dict())
    config = settings()
    data = ImageSet(batch, torch.zeros(3, dtype=torch.int64))
    with torch.no_grad():
        logits = reference(batch).logits
        seen = features(model, data, config)
        assert torch.allclose(model.classifier(seen.inputs), logits, atol=1e-5)
        assert torch.allclose(model(batch).logits, logits, atol=1e-5)

    adapted = add_lora(model, rank=2, alpha=4, seed=0)
    blocks = {key.removeprefix("base_model.model.").partition(".lora_A")[0] for key, parameter in adapted.named_parameters()
              if "lora_A" in key}
    linears = {key for key, module in reference.named_modules() if type(module) is torch.nn.Linear}
    assert blocks == {key for key in linears if re.search(r"\.(layers?|blocks)\.\d+\.(?!downsample|blocks)", key)}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_backbone_of_any_family_goes_through_the_scripts(workspace, tmp_path, name):
    """Base model, fine-tuning and LoRA, which are opened by the libraries alone."""
    save_family(name, tmp_path / "model")
    place = Workspace(tmp_path / "root", str(tmp_path / "model"))
    workspace.copy(place.root, "fire_dataset", "game_dataset", "tasks.json")
    for script in ("Generate_Base_Model", "Finetune", "Lora_Finetune"):
        place.run(script, "--epochs", "1", *(["--layer_decay", "0.5"] if script == "Finetune" else []))
    data = place.tasks()[0].test
    with torch.no_grad():
        for method, folder in (("Finetune", "Finetune/Models/fire_finetune"),
                               ("Lora_Finetune", "Lora_Finetune/Models/fire_lora_finetune")):
            model = load_backbone(place.model, place.tasks()[0].classes, 0) if "lora" in folder else (
                transformers.AutoModelForImageClassification.from_pretrained(place.results / folder))
            if "lora" in folder:
                model = PeftModel.from_pretrained(model, place.results / folder)
            probabilities = model.eval()(data.batch(torch.arange(len(data)))).logits.softmax(1)
            written = place.predictions(method, "Fire_Risk").filter(like="Probability")
            assert np.allclose(probabilities, written, atol=1e-5)


def test_code_from_a_repository_is_not_run(published, tmp_path, monkeypatch):
    """A model that brings its own code is refused, and nobody is asked whether to run it; a yes would be ready."""
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    config = json.loads((published / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (published / "config.json").write_text(json.dumps(config))
    (published / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(str(published), CLASSES, 0)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_a_model_is_refused(tmp_path):
    """Weights and image processor alike."""
    for load in (lambda name: load_backbone(name, CLASSES, 0), load_processor):
        with pytest.raises(UserError, match="cannot be loaded"):
            load(str(tmp_path))


def test_a_name_that_cannot_be_had_is_one_line(published, warm_process, hub, tmp_path):
    """An unknown name, one without permission, and a file whose download breaks off."""
    (tmp_path / "load.py").write_text(LOAD_BY_NAME)
    for fault in ("unknown", "gated", "config.json", "model.safetensors"):
        shutil.rmtree(warm_process.cache, ignore_errors=True)
        hub.repos = {} if fault == "unknown" else {NAME: folder_repo(published)}
        hub.gated = {NAME} if fault == "gated" else set()
        hub.cuts.clear()
        hub.cuts[fault] = 1000
        assert_refused_by_name(warm_process, tmp_path)


def test_a_name_without_a_connection_is_one_line(warm_process, tmp_path):
    """Where nothing listens."""
    (tmp_path / "load.py").write_text(LOAD_BY_NAME)
    assert_refused_by_name(warm_process, tmp_path)


def assert_refused_by_name(warm_process, tmp_path):
    """Loading by name ends with one line that says what to do."""
    outcome = warm_process.run(tmp_path / "load.py", NAME, tmp_path / "loaded.safetensors")
    assert outcome.status == 1 and len(outcome.errors.splitlines()) == 1
    assert f"--model {NAME} cannot be loaded" in outcome.errors and "--demo" in outcome.errors


def test_a_broken_off_download_is_taken_up_again(published, original, hub, warm_process, tmp_path):
    """One cut connection does not spoil what arrives."""
    hub.repos[NAME] = folder_repo(published)
    hub.cuts["model.safetensors"] = 1
    (tmp_path / "load.py").write_text(LOAD_BY_NAME)
    assert warm_process.run(tmp_path / "load.py", NAME, tmp_path / "loaded.safetensors").status == 0
    assert_same(backbone_of(load_file(tmp_path / "loaded.safetensors")), backbone_of(original.state_dict()))
