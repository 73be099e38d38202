"""Tests of `python -m common.predict`: a finished mixture asked about image files."""

import os
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest
from datasets import load_from_disk
from PIL import Image
from pipeline import REPOSITORY, files_in, hashes

from common import predict
from common.cli.flags import PredictConfig
from common.cli.parser import parse
from common.errors import UserError
from common.files import read_json, write_json


def flags_of(workspace, output, *asked):
    """The command's flags on a workspace."""
    return [*map(str, asked), "--root", str(workspace.root), "--device", "cpu", "--output", str(output)]


def ask(workspace, output, *asked):
    """Run the command on a workspace; return the table it writes."""
    predict.main(parse(PredictConfig, flags_of(workspace, output, *asked)))
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


def test_grey_of_more_than_8_bits_is_read_as_the_tasks_images_were(mutable, tmp_path, capsys):
    path = mutable.root / "fire_dataset" / "manifest.json"
    write_json(path, read_json(path, "") | {"grey_levels": [0, 65535]})
    mutable.run("CGM_Lora", "--overwrite")
    Image.new("I;16", (40, 40), 51 * 257).save(tmp_path / "deep.png")
    Image.new("L", (40, 40), 51).save(tmp_path / "grey.png")
    answers = ask(mutable, tmp_path / "answers.csv", tmp_path / "deep.png", tmp_path / "grey.png")
    assert list(answers.iloc[0])[1:] == list(answers.iloc[1])[1:] and capsys.readouterr().err == ""
    Image.fromarray(np.full((40, 40), 1e6, dtype=np.float32)).save(tmp_path / "float.tiff")
    ask(mutable, tmp_path / "answers.csv", tmp_path / "float.tiff")
    assert "float.tiff: its grey levels, 0 to 1e+06, are cut off at" in capsys.readouterr().err


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


@pytest.fixture
def photos(tmp_path):
    """A folder of more images than are answered at once."""
    (tmp_path / "photos").mkdir()
    for number in range(predict.BATCH + 1):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / "photos" / f"{number:02}.png")
    return tmp_path / "photos"


def test_nothing_but_answers_of_this_command_is_replaced(workspace, photos, tmp_path):
    """A FIFO and a link are written into."""
    photo, empty = photos / "00.png", tmp_path / "empty.png"
    (tmp_path / "notes.csv").write_text("Image,Mine\n")
    empty.touch()
    before = hashes(tmp_path)
    for output, said in ((photos, "is a folder"), (photo, "is one of the images"), (photos / "01.png", "did not write"),
                         (tmp_path / "notes.csv", "did not write"), (empty, "is one of the images"),
                         (workspace.results / "CGM_Lora" / "CGM_Lora_Game.csv", "did not write")):
        with pytest.raises(UserError, match=f"^--output .* {said}.*; choose another name$"):
            ask(workspace, output, photo, empty)
    assert hashes(tmp_path) == before
    (tmp_path / "link").symlink_to("answers.csv")
    for _ in range(2):
        assert len(ask(workspace, tmp_path / "link", photo)) == 1
    assert (tmp_path / "link").is_symlink() and files_in(tmp_path) - set(before) == {"link", "answers.csv"}
    os.mkfifo(tmp_path / "fifo")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_text()), daemon=True)
    reader.start()
    predict.main(parse(PredictConfig, flags_of(workspace, tmp_path / "fifo", photo)))
    reader.join()
    assert read == [(tmp_path / "answers.csv").read_text()] and (tmp_path / "fifo").is_fifo()


def test_every_answer_that_was_told_is_in_the_table_however_the_command_ends(workspace, photos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(predict, "as_line", lambda row, _: 1 / (row["Image"] != str(photos / f"{predict.BATCH}.png")))
        with pytest.raises(ZeroDivisionError):
            ask(workspace, tmp_path / "answers.csv", photos)
    assert len(pd.read_csv(tmp_path / "answers.csv")) == predict.BATCH + 1


def test_stdout_as_output_has_the_table_alone(workspace, photos, tmp_path):
    command = [sys.executable, "-m", "common.predict", *flags_of(workspace, "/dev/stdout", photos)]
    with open(tmp_path / "answers.csv", "w") as file:
        subprocess.run(command, stdout=file, cwd=REPOSITORY, check=True)
    assert list(pd.read_csv(tmp_path / "answers.csv")["Image"]) == [str(path) for path in sorted(photos.iterdir())]
