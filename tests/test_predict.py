"""Tests of `python -m common.predict`: a finished mixture asked about image files."""

import pandas as pd
import pytest
from datasets import load_from_disk
from PIL import Image

from common import predict
from common.cli.flags import PredictConfig
from common.cli.parser import parse
from common.errors import UserError


def ask(workspace, output, *asked):
    """Run the command on a workspace; return the table it writes."""
    flags = ["--root", str(workspace.root), "--device", "cpu", "--output", str(output)]
    predict.main(parse(PredictConfig, [*map(str, asked), *flags]))
    return pd.read_csv(output)


def test_the_answers_are_those_of_the_mixtures_own_results_and_a_damaged_image_is_named(workspace, tmp_path, capsys):
    photos, output = tmp_path / "photos", tmp_path / "answers.csv"
    photos.mkdir()
    for number, row in enumerate(load_from_disk(str(workspace.root / "fire_dataset"))["test"]):
        row["image"].save(photos / f"{number:03}.png")
    answers, known = ask(workspace, output, photos), workspace.predictions("CGM_Lora", "Fire_Risk")
    for column in ("Predicted Task", "Predicted Class"):
        assert list(answers[column]) == list(known[column])
    known["Probability"] = known.filter(like="Probability ").max(axis=1)
    for column in ("Probability", "Gate fire", "Gate game", "Familiarity"):
        assert (answers[column] - known[column]).abs().max() < 1e-4
    shares = answers.filter(like="Probability").to_numpy()
    assert (shares[:, :-1] >= shares[:, 1:]).all()
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(answers)
    (photos / "001.png").write_bytes((photos / "001.png").read_bytes()[:100])
    with pytest.raises(UserError, match=f"1 of {len(answers)} images could not be read"):
        ask(workspace, output, photos)
    told = capsys.readouterr()  # a line of column names, and one an image that can be read
    assert "001.png" in told.err and len(told.out.splitlines()) == len(answers)


def test_any_image_that_can_be_prepared_can_be_asked_about(workspace, tmp_path):
    square = Image.new("RGB", (50, 40), (200, 30, 30))
    kinds = {"grey.png": square.convert("L"), "seen_through.png": square.convert("RGBA"),
             "deep.png": Image.new("I;16", (50, 40), 900), "palette.gif": square.convert("P"),
             "print.jpg": square.convert("CMYK")}
    for name, image in kinds.items():
        image.save(tmp_path / name)
    answers = ask(workspace, tmp_path / "answers.csv", *(tmp_path / name for name in kinds))
    assert len(answers) == len(kinds)


def test_what_cannot_be_asked_is_one_line(workspace, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    for name, root, said in (
        ("nothing.png", workspace.root, "there is no"), ("empty", workspace.root, "holds no images"),
        ("notes.txt", workspace.root, "1 of 1 images could not be read"),
        ("notes.txt", tmp_path, "no finished mixture.*CGM_Lora.py"),
    ):
        with pytest.raises(UserError, match=said):
            predict.main(parse(PredictConfig, [str(tmp_path / name), "--root", str(root), "--device", "cpu"]))
