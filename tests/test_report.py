"""Tests of Results/index.html: what is on it, that it needs nothing else, and that it costs no results."""

import base64
import re
from html.parser import HTMLParser

import pandas as pd

from common.errors import UserError
from common.results import report
from common.results.report import write_report


class Page(HTMLParser):
    """A parsed page: its elements with their attributes, and its text."""

    def __init__(self, place):
        super().__init__()
        self.elements, self.text = [], ""
        self.source = (place.results / "index.html").read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        """The attributes of all elements of this kind."""
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_shows_all_results_and_needs_nothing_but_itself(workspace):
    """Every picture of the tasks as it is on disk, with a text of its own, and each accuracy of the summary."""
    page = Page(workspace)
    assert not page.all("script")
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "style"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    assert not re.search(r"url\(|@import|https?://", re.sub(r'"data:[^"]*"', "", page.source))
    embedded = {base64.b64decode(attributes["src"].partition(",")[2]) for attributes in page.all("img")}
    pictures = [path for path in workspace.results.glob("*/*.png") if path.parent.name != "Benchmark_Data"]
    assert len(pictures) == 20 and {path.read_bytes() for path in pictures} <= embedded
    texts = [attributes["alt"] for attributes in page.all("img")]
    assert all(texts) and len(set(texts)) == len(texts)
    for row in workspace.summary().itertuples():
        assert f"{row.accuracy:.1%}" in page.text and f"{row.accuracy_low:.1%} to {row.accuracy_high:.1%}" in page.text
    assert "nan" not in page.text


def test_the_page_shows_what_the_mixture_got_wrong_and_was_least_sure_of(mutable, tasks):
    """An answer is wrong if it is refused or the same class of another task, too; the surest wrong answers come first."""
    for data in tasks:
        key, name, path = data.task.key, data.task.name, mutable.results / f"CGM_Lora/CGM_Lora_{data.task.title}.csv"
        table = pd.read_csv(path, keep_default_na=False)
        table["Predicted Task"] = [key, *["fire", "game"] * 3, "none"]
        table["Predicted Class"] = [*table["Actual Class"][:-1], "none"]
        table.to_csv(path, index=False)
        write_report(mutable.results, tasks, demo=True)
        page = Page(mutable)
        sure = table.filter(regex="^Probability ").max(axis=1)
        wrong = table["Predicted Task"] != key
        said = [*(table["Predicted Task"] + ": " + table["Predicted Class"])[:-1], "none"]
        expected = [f"{name}, test image {index}: {table['Actual Class'][index]}; the mixture said {said[index]}"
                    for index in (*sure[wrong].sort_values(ascending=False).index, *sure[~wrong].sort_values().index)]
        assert len(table) == 8 and f"Wrong: {wrong.sum()} of 8" in page.text
        assert [attributes["alt"] for attributes in page.all("img") if f"{name}, test image" in attributes["alt"]] == expected


def test_the_page_is_the_same_when_it_is_made_again_and_names_are_text(workspace, mutable, tasks, monkeypatch):
    write_report(mutable.results, tasks, demo=True)
    page = Page(mutable)
    assert page.source == Page(workspace).source
    assert str(workspace.root) not in page.source and workspace.model not in page.source
    monkeypatch.setattr(tasks[0], "classes", ['<script>alert("x")</script>', "a&amp;b", "'\"", "{{ 7 * 7 }}"])
    compared = pd.DataFrame({"method": ["mixture", "<i>TIES</i>"], "task": "All", "accuracy": [0.5, 0.25], "spread": [None, 1]})
    compared.to_csv(mutable.results / "CGM_Lora/CGM_Lora_Comparison.csv", index=False)
    write_report(mutable.results, tasks, demo=False)
    other = Page(mutable)
    assert '<script>alert("x")</script>, a&amp;b, \'", {{ 7 * 7 }}' in other.text and "<i>TIES</i>" in other.text
    assert not other.all("script") and not other.all("i") and "nan" not in other.text and "This is the demo" not in other.text


def test_a_page_that_cannot_be_written_loses_no_results(mutable, tasks, monkeypatch, capsys):
    """One line tells so, the script succeeds, and no page of other results stays."""
    (mutable.results / "Finetune" / "config.json").write_text("{")
    mutable.run("Benchmark", "--overwrite")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "index.html cannot be written" in said and "no result is lost" in said
    assert (mutable.results / "Benchmark/config.json").exists() and not (mutable.results / "index.html").exists()
    monkeypatch.setattr(report, "writing", lambda path: (_ for _ in ()).throw(UserError(f"{path}: no space")))
    write_report(mutable.results, tasks, demo=True)
    assert "index.html" in capsys.readouterr().err
