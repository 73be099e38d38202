"""Tests of Results/index.html: what is on it, that it needs nothing else, and that it costs no results."""

import base64
import itertools
import re
import shutil
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from joint import joint_predictions
from PIL import Image

from common.errors import UserError
from common.results import report
from common.results.folder import Results
from common.results.report import write_report

VOID = {"meta", "link", "img", "input", "br", "line", "rect"}


class Page(HTMLParser):
    """A parsed page: its elements with their attributes, headings, texts by element, and whether all tags are closed."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.headings, self.text, self.open = [], [], "", []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)

    def all(self, tag):
        """The attributes of all elements of this kind."""
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def place(tmp_path_factory, workspace, tasks):
    """The workspace with made-up results of a mixture, among them some that were refused, and a comparison."""
    made = workspace.copy(tmp_path_factory.mktemp("page") / "root")
    shutil.rmtree(made.results / "CGM_Lora")
    with Results(made.config("CGM_Lora"), "CGM_Lora", "CGM_Lora") as results:
        results.finished(tasks, experts={"fire": "a", "game": "b"})
        said = [joint_predictions(tasks, data, refused=0.3, seed=1) for data in tasks]
        rows = results.write_joint_test(tasks, said, "CGM_Lora", "Context-gated mixture", trainable=1234)
        columns = ["epoch", "training_loss", "validation_loss", "training_accuracy", "validation_accuracy", "chosen"]
        results.write_history(pd.DataFrame([[0, np.nan, 1, np.nan, 0.5, 1]], columns=columns), "CGM_Lora", "All tasks")
        results.write_table("CGM_Lora_Comparison.csv", pd.DataFrame(
            {"method": ["mixture", "<i>TIES</i>"], "task": "All", "accuracy": [0.5, 0.25], "spread": [np.nan, 0.01]}))
        shutil.copy(results.folder / "CGM_Lora_Losses.png", results.folder / "CGM_Lora_Routing.png")
        results.finish(rows)
    return made


@pytest.fixture(scope="module")
def page(place):
    """The page of it."""
    return Page(place.results / "index.html")


def test_the_page_needs_nothing_but_itself(page):
    assert not page.open and not page.all("script")
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "style"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    assert not re.search(r"url\(|@import|https?://", re.sub(r'"data:[^"]*"', "", page.source))
    targets = {attributes["href"][1:] for attributes in page.all("a")}
    assert targets == {attributes["id"] for attributes in page.all("h2")}


def test_every_plot_opens_in_full_size_by_a_click_or_the_keyboard(page):
    plots = [attributes for attributes in page.all("img") if attributes["src"].startswith("data:image/png")]
    boxes = page.all("input")
    assert len(boxes) == len(plots) > 8 and all(box["type"] == "checkbox" and box["aria-label"] for box in boxes)
    assert ".plot input:checked" in page.source


def test_the_page_is_in_order_for_those_who_do_not_see_it(page):
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1 and all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(text.strip() for _, text in page.headings)
    pictures = page.all("img") + [attributes for attributes in page.all("svg") if attributes["role"] == "img"]
    texts = [attributes.get("alt") or attributes.get("aria-label") for attributes in pictures]
    assert all(texts) and len(set(texts)) == len(texts)
    assert len(page.all("figcaption")) == len(page.all("figure")) == len(pictures)
    assert len(page.all("caption")) == len(page.all("table")) > 4
    assert page.all("html") == [{"lang": "en"}] and "prefers-color-scheme: dark" in page.source
    assert page.all("meta")[1]["content"].startswith("width=device-width")


def test_the_page_shows_all_results(page, place):
    """Every picture of the tasks as it is on disk, each accuracy of the summary, and the comparison."""
    embedded = {base64.b64decode(attributes["src"].partition(",")[2]) for attributes in page.all("img")}
    pictures = [path for path in place.results.glob("*/*.png") if path.parent.name != "Benchmark_Data"]
    assert len(pictures) == 20 and {path.read_bytes() for path in pictures} <= embedded
    for attributes in page.all("img"):
        with Image.open(BytesIO(base64.b64decode(attributes["src"].partition(",")[2]))) as image:
            assert image.size == (int(attributes["width"]), int(attributes["height"]))
    for row in place.summary().itertuples():
        assert f"{row.accuracy:.1%}" in page.text and f"{row.accuracy_low:.1%} to {row.accuracy_high:.1%}" in page.text
    bars = [float(attributes["width"][:-1]) for attributes in page.all("rect")]
    assert sorted(bars) == pytest.approx(sorted(100 * place.summary()["accuracy"]), abs=1e-6)
    assert "<i>TIES</i>" in page.text and not page.all("i") and "nan" not in page.text


def test_the_page_shows_what_the_mixture_got_wrong_and_was_least_sure_of(place, tasks, tmp_path):
    """An answer is wrong if it is the same class of another task, too; the surest wrong answers come first."""
    moved = place.copy(tmp_path / "root")
    path = moved.results / "CGM_Lora/CGM_Lora_Game.csv"
    table = pd.read_csv(path, keep_default_na=False)
    right = table.index[(table["Predicted Task"] == "game") & (table["Predicted Class"] == table["Actual Class"])]
    table.loc[right[0], "Predicted Task"] = "fire"
    table.to_csv(path, index=False)
    write_report(moved.results, tasks, demo=True)
    page = Page(moved.results / "index.html")
    for data in tasks:
        key, name = data.task.key, data.task.name
        table = pd.read_csv(moved.results / f"CGM_Lora/CGM_Lora_{data.task.title}.csv", keep_default_na=False)
        table["sure"] = table.filter(regex="^Probability ").max(axis=1)
        wrong = (table["Predicted Task"] != key) | (table["Predicted Class"] != table["Actual Class"])
        said = table["Predicted Task"] + ": " + table["Predicted Class"]
        said = said.where(table["Predicted Task"] != "none", "none")
        order = [*table[wrong].sort_values("sure", ascending=False).index, *table[~wrong].sort_values("sure").index]
        expected = [f"{name}, test image {index}: {table['Actual Class'][index]}; the mixture said {said[index]}"
                    for index in order]  # all eight, as up to sixteen of each kind would be shown
        assert 0 < wrong.sum() < len(table) and f"Wrong: {wrong.sum()} of {len(table)}" in page.text
        assert [attributes["alt"] for attributes in page.all("img") if "test image" in attributes["alt"]
                and attributes["alt"].startswith(name)] == expected


def test_the_page_is_the_same_when_it_is_made_again_and_names_are_text(page, place, tasks, monkeypatch):
    path = place.results / "index.html"
    write_report(place.results, tasks, demo=True)
    assert path.read_text(encoding="utf-8") == page.source
    assert str(place.root) not in page.source and place.model not in page.source
    monkeypatch.setattr(tasks[0], "classes", ['<script>alert("x")</script>', "a&amp;b", "'\"", "{{ 7 * 7 }}"])
    write_report(place.results, tasks, demo=False)
    other = Page(path)
    path.write_text(page.source, encoding="utf-8")
    assert '<script>alert("x")</script>, a&amp;b, \'", {{ 7 * 7 }}' in other.text and not other.all("script")
    assert "This is the demo" not in other.text


def test_a_page_that_cannot_be_written_loses_no_results(place, tasks, tmp_path, monkeypatch, capsys):
    """One line tells so, the script succeeds, and no page of other results stays."""
    moved = place.copy(tmp_path / "root")
    (moved.results / "Benchmark" / "config.json").write_text("{")
    with Results(moved.config("CGM_Lora"), "CGM_Lora", "CGM_Lora") as results:
        assert results.finished(tasks, experts={"fire": "a", "game": "b"})
        results.write_table("more.csv", pd.DataFrame({"a": [1]}))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "index.html cannot be written" in said and "no result is lost" in said
    assert (moved.results / "CGM_Lora/more.csv").exists() and not (moved.results / "index.html").exists()
    monkeypatch.setattr(report, "writing", lambda path: (_ for _ in ()).throw(UserError(f"{path}: no space")))
    write_report(moved.results, tasks, demo=True)
    assert "index.html" in capsys.readouterr().err
