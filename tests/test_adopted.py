"""Tests of `Lora_Finetune.py --expert`: adapters that were trained elsewhere become experts, or are refused in one line."""

import json

import numpy as np
import pytest
import torch
from hub import folder_repo
from peft import LoraConfig, PeftModel, get_peft_model
from pipeline import hashes, tiny_beit
from refusals import complaint
from transformers import BeitForImageClassification

from common.errors import UserError
from common.models import load_backbone

pytest_plugins = ["warm_process"]

CLASSES = list("abcd")
# Kinds of adapters, by the settings of peft.
KINDS = {
    "few": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {"r": 2, "lora_alpha": 8, "use_rslora": True, "target_modules": r".*layers\.\d+\.(mlp\.fc1|attention\.o_proj)",
                 "rank_pattern": {"fc1": 5}, "alpha_pattern": {r"layers\.1\.mlp\.fc1": 3}},
}


def make_adapter(folder, backbone, dtype=torch.float32, classes=4, **settings):
    """Write an adapter of plain peft with random numbers."""
    torch.manual_seed(0)
    base = BeitForImageClassification.from_pretrained(backbone, num_labels=classes, ignore_mismatched_sizes=True)
    model = get_peft_model(base, LoraConfig(**{"modules_to_save": ["classifier"], **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture
def place(workspace, tmp_path):
    """A root with prepared images alone."""
    return workspace.copy(tmp_path / "root", "fire_dataset", "game_dataset", "tasks.json")


def by_peft(place, folder):
    """Probabilities of an adapter on the first task's test images, by the libraries alone."""
    data = place.tasks()[0].test
    base = load_backbone(place.model, CLASSES, 0)
    base.set_attn_implementation("eager")
    with torch.no_grad():
        return PeftModel.from_pretrained(base, folder).eval()(data.batch(torch.arange(len(data)))).logits.softmax(1).numpy()


def written(place):
    """The probabilities in the CSV of the first task."""
    return place.predictions("Lora_Finetune", "Fire_Risk").filter(like="Probability")


def test_adapters_of_all_kinds_become_experts(place, backbone, tmp_path):
    """Other ranks, scalings, layers, dtypes; each answers what it answers with peft, and what is saved does so too."""
    game = make_adapter(tmp_path / "game", backbone, **KINDS["few"])
    for kind, dtype in (("patterns", torch.bfloat16), ("few", torch.float16)):
        folder = make_adapter(tmp_path / kind, backbone, dtype, **KINDS[kind])
        expected = by_peft(place, folder)
        place.run("Lora_Finetune", "--expert", f"fire={folder}", f"game={game}", "--overwrite")
        assert np.allclose(written(place), expected, atol=1e-5)
        saved = place.results / "Lora_Finetune" / "Models" / "fire_lora_finetune"
        assert np.allclose(by_peft(place, saved), expected, atol=1e-5)
    assert not list((place.results / "Lora_Finetune").glob("*History*"))
    assert len(place.summary()) == 2 and place.summary()["seconds"].isna().all()


def test_an_adapter_of_the_hub_has_a_revision_and_a_subfolder(place, backbone, tmp_path, warm_process, hub):
    make_adapter(tmp_path / "repo" / "inner", backbone, **KINDS["few"])
    game = make_adapter(tmp_path / "game", backbone, **KINDS["few"])
    hub.repos["someone/adapters"] = folder_repo(tmp_path / "repo")
    flags = place.flags("Lora_Finetune", "--expert", "fire=someone/adapters@main:inner", f"game={game}")
    done = warm_process.run("Lora_Finetune.py", *flags)
    assert (done.status, done.errors) == (0, "")
    assert np.allclose(written(place), by_peft(place, tmp_path / "repo" / "inner"), atol=1e-5)


def test_overwriting_an_expert_leaves_the_others(mutable, backbone, tmp_path, capsys, monkeypatch):
    """As in the README's order: an adapter of one's own takes the place of a trained expert; also after a run that failed."""
    flags = ["--expert", f"fire={make_adapter(tmp_path / 'fire', backbone, **KINDS['few'])}"]
    results, before = mutable.results / "Lora_Finetune", hashes(mutable.results / "Lora_Finetune")
    for more, words in (([], "add --overwrite to make those of fire anew"),
                        (["--overwrite", "--lora_rank", "3"], r"lora_rank = \d+, not 3; leave --expert out to make all anew")):
        with pytest.raises(UserError, match=words):
            mutable.run("Lora_Finetune", *flags, *more)
        assert hashes(results) == before
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr("common.models.lora.adopt", lambda *_: 1 / 0)
        mutable.run("Lora_Finetune", *flags, "--overwrite")
    for more in ([], ["--overwrite"], []):
        mutable.run("Lora_Finetune", *flags, *more)
    after = hashes(results)
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed and all("fire" in name.lower() for name in changed - {"config.json"})
    assert "Lora_Finetune is finished already" in capsys.readouterr().out
    assert np.allclose(written(mutable), by_peft(mutable, tmp_path / "fire"), atol=1e-5)


def test_what_cannot_be_an_expert_is_refused_in_one_line(place, backbone, other_backbone, tmp_path, monkeypatch, capsys):
    """And nothing is written."""
    made = iter(range(100))

    def adapter(of=backbone, **settings):
        return make_adapter(tmp_path / f"adapter{next(made)}", of, **{**KINDS["few"], **settings})

    tiny_beit(0, hidden_size=64).save_pretrained(tmp_path / "wide")
    good, cut, empty, wide = adapter(), adapter(), tmp_path / "empty", adapter(tmp_path / "wide")
    (cut / "adapter_model.safetensors").write_bytes(b"x")
    empty.mkdir()
    config = wide / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": ""}))
    for words, entries in (
        (f"that of {backbone}; load {other_backbone} as the base model (--model)", [f"fire={adapter(other_backbone)}"]),
        ("is of no linear layer there, or of one of another size", [f"fire={wide}"]),
        ("has no head of its own, where the task has 4 classes", [f"fire={adapter(modules_to_save=None)}"]),
        ("has a head for 3 classes, where the task has 4", [f"fire={adapter(classes=3)}"]),
        ("no peft adapter that can be read", [f"fire={cut}"]),
        ("check the name and the network, or give a folder", [f"fire={empty}"]),
        ("there is no task fires; the tasks are fire, game", [f"fires={good}"]),
        ("twice for one task", [f"fire={good}"] * 2),
        ("takes NAME=ADAPTER", [str(good)]),
    ):
        flags = place.flags("Lora_Finetune", "--expert", *entries, f"game={good}")
        assert words in complaint(monkeypatch, capsys, "Lora_Finetune", flags)
    assert not (place.results / "summary.csv").exists()
