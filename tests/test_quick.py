"""Tests of mixtures whose experts have no adapters and of refusing."""

import numpy as np
import pandas as pd
import pytest
from datasets import load_from_disk
from pipeline import files_in

from common import mixture, predict
from common.cli.flags import MixtureConfig, PredictConfig
from common.cli.parser import parse
from common.errors import UserError
from common.files import read_json
from ContextGatedMOE import ContextGatedMOE

MODEL = "Models/fire_game_cgm_lora"


@pytest.fixture(scope="module")
def quick(workspace, tmp_path_factory):
    """A root with images alone, of which a mixture was made by --quick."""
    place = workspace.copy(tmp_path_factory.mktemp("quick") / "root", "fire_dataset", "game_dataset", "tasks.json")
    place.run("CGM_Lora", "--quick")
    return place


def test_a_quick_mixture_has_all_files_and_can_be_asked(quick, workspace, tmp_path):
    assert files_in(quick.results / "CGM_Lora") == files_in(workspace.results / "CGM_Lora")
    assert set(quick.summary()["method"]) == {"CGM_Lora"}
    load_from_disk(str(quick.root / "fire_dataset"))["test"][0]["image"].save(tmp_path / "photo.png")
    predict.main(parse(PredictConfig, [str(tmp_path / "photo.png"), "--root", str(quick.root), "--device", "cpu", "--output",
                                       str(tmp_path / "answers.csv")]))
    said, known = pd.read_csv(tmp_path / "answers.csv").iloc[0], quick.predictions("CGM_Lora", "Fire_Risk").iloc[0]
    assert [said[name] for name in ("Predicted Task", "Predicted Class")] == [
        known[name] for name in ("Predicted Task", "Predicted Class")]
    model = ContextGatedMOE.from_pretrained(quick.results / "CGM_Lora" / MODEL)
    assert set(model.without_adapter) == set(model.expert_names) == {"fire", "game"}


def test_an_expert_without_an_adapter_is_added_by_its_images_alone(three, workspace, tmp_path):
    place = workspace.copy(tmp_path / "root")
    three[0].copy(place.root, "third_dataset", "tasks.json")
    place.run("CGM_Lora", "--add_expert", "third")
    model = ContextGatedMOE.from_pretrained(place.results / "CGM_Lora_third" / "Models" / "fire_game_third_cgm_lora")
    assert list(model.without_adapter) == ["third"] and model.expert_names == ["fire", "game", "third"]
    assert len(pd.read_csv(place.results / "CGM_Lora_third" / "CGM_Lora_third.csv"))


def test_refuse_takes_that_share_of_the_pooled_validation_images(quick, tasks):
    model = ContextGatedMOE.from_pretrained(quick.results / "CGM_Lora" / MODEL)
    for share in (0.0, 0.25, 0.5):
        config = quick.config("CGM_Lora", "--quick", "--refuse", str(share))
        model.refuse_below = mixture.least_familiar(model, config, tasks)
        refused = np.concatenate([mixture.predict(model, data.validation, config)[0].refused for data in tasks])
        assert refused.mean() == pytest.approx(share, abs=1 / len(refused))
    with pytest.raises(UserError, match="--refuse"):
        MixtureConfig(refuse=1.0)


def test_the_base_in_predict_is_of_the_saved_commit_and_a_folder_that_is_gone_is_told(quick, tmp_path, monkeypatch):
    folder, asked = quick.results / "CGM_Lora" / MODEL, []
    stored = read_json(folder / "cgm_config.json", "")
    monkeypatch.setattr("common.models.load_backbone", lambda *given: asked.append(given) or 1 / 0)
    config = parse(PredictConfig, ["x", "--root", str(quick.root)])

    def saved(name, commit):
        monkeypatch.setattr("ContextGatedMOE.saving.read_config", lambda _: stored | {"base_model": name, "base_commit": commit})

    saved("a/b", "0123abc")
    with pytest.raises(ZeroDivisionError):
        predict.open_mixture(folder, config)
    assert asked[0][0] == "a/b" and asked[0][-1] == "0123abc"
    for name in ("some/folder", None):
        saved(name, None)
        with pytest.raises(UserError, match="which is not there; give --model") as told:
            predict.open_mixture(folder, config)
        assert "\n" not in str(told.value) and len(asked) == 1
