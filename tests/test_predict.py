"""Tests of `python -m common.predict`: a finished mixture asked about image files."""

import pandas as pd
import pytest
from datasets import load_from_disk
from PIL import Image

from common import predict
from common.cli.flags import PredictConfig
from common.cli.parser import parse
from common.errors import UserError


def ask(workspace, *more):
    """Run the command on a workspace; return the table it writes."""
    output = workspace.root / "answers.csv"
    flags = ["--root", str(workspace.root), "--device", "cpu", "--output", str(output)]
    try:
        predict.main(parse(PredictConfig, [*map(str, more), *flags]))
    finally:
        table = pd.read_csv(output) if output.exists() else None
        output.unlink(missing_ok=True)
    return table


@pytest.fixture
def photos(workspace, tmp_path):
    """The test images of the first task as files in a folder, in order."""
    for number, row in enumerate(load_from_disk(str(workspace.root / "fire_dataset"))["test"]):
        row["image"].save(tmp_path / f"{number:03}.png")
    return tmp_path


def test_the_answers_are_those_of_the_mixtures_own_results(workspace, photos, capsys):
    answers, known = ask(workspace, photos), workspace.predictions("CGM_Lora", "Fire_Risk")
    for column in ("Predicted Task", "Predicted Class"):
        assert list(answers[column]) == list(known[column])
    best = known.filter(like="Probability ").max(axis=1)
    assert (answers["Probability"] - best).abs().max() < 1e-4
    for column in ("Gate fire", "Gate game", "Familiarity"):
        assert (answers[column] - known[column]).abs().max() < 1e-4
    shares = answers.filter(like="Probability").to_numpy()
    assert (shares[:, :-1] >= shares[:, 1:]).all()
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(answers)


def test_a_damaged_image_is_named_and_the_others_go_on(workspace, photos, capsys):
    whole = len(list(photos.iterdir()))
    (photos / "001.png").write_bytes((photos / "001.png").read_bytes()[:100])
    with pytest.raises(UserError, match=f"1 of {whole} images could not be read"):
        ask(workspace, photos)
    told = capsys.readouterr()
    assert "001.png" in told.err and len(told.out.splitlines()) == whole  # a line of column names, and one an image


def test_any_image_that_can_be_prepared_can_be_asked_about(workspace, tmp_path):
    square = Image.new("RGB", (50, 40), (200, 30, 30))
    kinds = {"grey.png": square.convert("L"), "seen_through.png": square.convert("RGBA"),
             "deep.png": Image.new("I;16", (50, 40), 900), "palette.gif": square.convert("P"),
             "print.jpg": square.convert("CMYK")}
    for name, image in kinds.items():
        image.save(tmp_path / name)
    assert len(ask(workspace, *(tmp_path / name for name in kinds))) == len(kinds)


def test_what_cannot_be_asked_is_one_line(workspace, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    for asked, said in (
        ([tmp_path / "nothing.png"], "there is no"), ([tmp_path / "empty"], "holds no images"),
        ([tmp_path / "notes.txt"], "1 of 1 images could not be read"),
    ):
        with pytest.raises(UserError, match=said):
            ask(workspace, *asked)
    with pytest.raises(UserError, match="no finished mixture.*CGM_Lora.py"):
        predict.main(parse(PredictConfig, [str(tmp_path / "notes.txt"), "--root", str(tmp_path)]))
