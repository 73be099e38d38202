"""Tests of what a finished adapter is refused for, alike wherever it comes in: as an expert of a mixture, or by `--expert`."""

import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BeitForImageClassification

from common.errors import UserError
from common.models import load_backbone, lora
from ContextGatedMOE import ContextGatedMOE, MixtureError

CLASSES = list("abcd")


def adopted(model, folder):
    """What `Lora_Finetune.py --expert` makes of an adapter."""
    data = SimpleNamespace(classes=CLASSES, task=SimpleNamespace(key="one"))
    lora.adopt(SimpleNamespace(model=model, seed=0), data, lora.read_adapter("one", str(folder)))


# Whatever takes an adapter, given the name of a backbone; `CGM_Lora.py --add_expert` calls add_expert.
ENTRANCES = {
    "from_adapters": lambda model, folder: ContextGatedMOE.from_adapters(
        load_backbone(model, CLASSES, 0), {"one": folder}, {"one": CLASSES}),
    "add_expert": lambda model, folder: ContextGatedMOE(load_backbone(model, CLASSES, 0), []).add_expert(
        "one", folder, classes=CLASSES),
    "--expert": adopted,
}


@pytest.fixture(scope="module")
def adapter(backbone, tmp_path_factory):
    """An adapter of the tiny backbone."""
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(load_backbone(backbone, CLASSES, 0), LoraConfig(
        r=2, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"])).save_pretrained(folder)
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
        ({"init_lora_weights": "olora"}, "initialised by 'olora'"), ({"init_lora_weights": "lora_ga"}, "initialised by 'lora_ga'"),
        ({"init_lora_weights": "corda"}, "initialised by 'corda'"), ({"use_dora": True}, "uses DoRA"),
        ({"bias": "lora_only"}, "trains biases"), ({"layer_replication": [[0, 1]]}, "uses layer_replication"),
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
