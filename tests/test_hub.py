"""Tests of datasets on the Hub: right images, no more bytes than needed, each once, and a cache that keeps what it has."""

import errno
import io
import json
import math
import shutil
import signal
from collections import Counter

import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Image
from hub import FIRE_CLASSES, FIRE_RISK, GAME_CLASSES, GAMEPLAY_IMAGES, colour, dataset_repo, noisy_png, serve
from image_sources import PER_CLASS, SCRIPT, all_identities, left_in, opened, prepared, write_folders
from pipeline import hashes

from common.data.hub import CONNECTIONS, DIGEST_BYTES

pytest_plugins = ["warm_process"]

CLASSES = {"fire": FIRE_CLASSES, "game": GAME_CLASSES}


@pytest.fixture(scope="module")
def repos():
    return {FIRE_RISK: dataset_repo(FIRE_CLASSES, PER_CLASS, 3), GAMEPLAY_IMAGES: dataset_repo(GAME_CLASSES, PER_CLASS, 2)}


@pytest.fixture(scope="module")
def from_hub(tmp_path_factory, repos, warm_process):
    """Root folder of data prepared from the Hub, 10 images a class."""
    root = tmp_path_factory.mktemp("from_hub") / "root"
    with serve(repos, warm_process.port):
        outcome = warm_process.run(SCRIPT, "--root", root, "--images_per_class", 10)
    assert (outcome.status, outcome.errors) == (0, "")
    return root


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


def test_images_from_the_hub(from_hub, root, tmp_path):
    """Three splits, 60/20/20 of each class and shuffled, as plain `datasets` opens them; a local copy gives the same."""
    for key, classes in CLASSES.items():
        data = opened(from_hub, key)
        assert list(data) == ["train", "validation", "test"]
        assert len(all_identities(from_hub, key, classes)) == 40
        assert [Counter(split["label"]) for split in data.values()] == [dict.fromkeys(range(4), n) for n in (6, 2, 2)]
        for split in data.values():
            assert split.features["image"] == Image() and isinstance(split.features["label"], ClassLabel)
            assert split.column_names == ["image", "label"] and split.features["label"].names == classes[:4]
            assert {(image.mode, image.size) for image in split["image"]} == {("RGB", (8, 8))}
        labels = list(data["train"]["label"])
        assert labels not in (sorted(labels), sorted(labels, reverse=True))
    manifest = json.loads((from_hub / "fire_dataset/manifest.json").read_text())
    assert prepared(root, write_folders(tmp_path / "images"))["fingerprint"] == manifest["fingerprint"]


def test_an_own_task_from_the_hub_keeps_its_split(hub, warm_process, root):
    """All classes and images of the splits train and test; one of another name is left out and told of."""
    file = "data/train-00000-of-00001.parquet"
    train, test = (dataset_repo(["a", "b", "c"], counts, 1)[file] for counts in (8, [2, 3, 1]))
    hub.repos = {"datasets/someone/letters": {
        "data/train-0.parquet": train, "data/test-0.parquet": test, "data/spare-0.parquet": test,
        "README.md": b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n"
                     b"  - split: test\n    path: data/test-*\n  - split: spare\n    path: data/spare-*\n---\n",
    }}
    outcome = warm_process.run(SCRIPT, "--root", root, "--task", "letters=hub:someone/letters")
    assert (outcome.status, outcome.errors) == (0, "") and "its splits spare are left out" in outcome.output
    manifest = json.loads((root / "letters_dataset/manifest.json").read_text())
    assert (manifest["own_splits"], manifest["classes"]) == (["train", "test"], ["a", "b", "c"])
    assert manifest["images"] == {"train": 18, "validation": 6, "test": 6}
    hub.repos = {}
    again = warm_process.run(SCRIPT, "--root", root / "other", "--task", "letters=hub:someone/letters")
    assert again.status == 2 and "no dataset someone/letters that you may read; give a local copy: --task" in again.errors


def test_what_was_fetched_once_is_not_fetched_again(hub, from_hub, repos, warm_process, tmp_path):
    """Finished data ask the Hub for nothing; data for another root come from what the first run fetched."""
    before = hashes(from_hub)
    assert warm_process.run(SCRIPT, "--root", from_hub, "--images_per_class", 10).status == 0
    assert hub.requests == [] and hashes(from_hub) == before
    hub.repos = repos
    assert warm_process.run(SCRIPT, "--root", tmp_path / "first", "--images_per_class", 10).status == 0
    before = hub.parquet_bytes
    again = warm_process.run(SCRIPT, "--root", tmp_path / "second", "--images_per_class", 10)
    assert again.status == 0 and before == hub.parquet_bytes > 0
    assert again.output.count(": fetched 0 of ") == 2 and "were here from before" in again.output


def test_faults_that_pass_do_no_harm(hub, from_hub, repos, warm_process, root):
    """After two server errors and a download that broke off the data are the same; so they are without a card."""
    hub.repos, hub.server_errors = repos, 2
    hub.cuts["data/train-00001-of-00003.parquet"] = 1
    assert warm_process.run(SCRIPT, "--root", root, "--images_per_class", 10).status == 0
    assert hub.server_errors == sum(hub.cuts.values()) == 0
    assert hashes(root) == hashes(from_hub)
    hub.repos = {name: {path: repo[path] for path in repo if path != "README.md"} for name, repo in repos.items()}
    assert warm_process.run(SCRIPT, "--root", root / "bare", "--images_per_class", 10).status == 0
    assert hashes(root / "bare") == hashes(from_hub)


@pytest.mark.parametrize("fault", ["gated", "server errors", "broken off", "damaged", "closed"])
def test_a_hub_that_fails_is_one_line_with_the_way_out(repos, warm_process, request, root, fault):
    """Exit status 2, one line that names --demo and --fire_source, and nothing written."""
    if fault != "closed":
        hub = request.getfixturevalue("hub")
        hub.repos = {} if fault == "unknown" else dict(repos)
        hub.gated = {FIRE_RISK} if fault == "gated" else set()
        hub.server_errors = 10**6 if fault == "server errors" else 0
        if fault == "broken off":
            hub.cuts = Counter(dict.fromkeys(repos[FIRE_RISK], 10**6))
        if fault == "damaged":
            hub.repos[FIRE_RISK] = {path: content[:-30] for path, content in repos[FIRE_RISK].items()}
    outcome = warm_process.run(SCRIPT, "--root", root)
    assert outcome.status == 2 and len(outcome.errors.splitlines()) == 1, outcome.errors
    assert all(part in outcome.errors for part in ("blanchon/FireRisk", "--demo", "--fire_source"))
    assert left_in(root) == []


FIRE_RISK_COUNTS = [126, 214, 172, 359, 62, 435, 38]  # FireRisk's 6296, 10705, 8617, 17959, 3081, 21757, 1916, by 50
CHOSEN = 20  # of each class, as 1,000 there


@pytest.fixture(scope="module")
def fire_risk():
    """FireRisk in small: 24 files, sorted by label, in row groups of 10 rows."""
    return dataset_repo(FIRE_CLASSES, FIRE_RISK_COUNTS, 24, 10, noisy_png)


@pytest.fixture
def fetch(hub, warm_process, fire_risk, tmp_path):
    """Prepare fire risk from the hub, and the other task from here; arguments go to the process."""
    hub.repos = {FIRE_RISK: fire_risk}
    games = write_folders(tmp_path / "games", per_class=CHOSEN)
    return lambda root, *flags, **how: warm_process.run(
        SCRIPT, "--root", root, "--game_source", games, "--images_per_class", CHOSEN, *flags, **how)


def row_groups(repo):
    """Of every row group of a repository: the images in it, by name, and its bytes."""
    for path, content in repo.items():
        if path.endswith(".parquet"):
            file = pq.ParquetFile(io.BytesIO(content))
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                size = sum(group.column(column).total_compressed_size for column in range(group.num_columns))
                yield {row["path"] for row in file.read_row_group(number)["image"].to_pylist()}, size


def noisy_identities(root):
    """Which images of FireRisk in small were taken, by name; each must be of the class its label names."""
    found = []
    for split in opened(root).values():
        for image, label in zip(split["image"], split["label"], strict=True):
            index = image.getpixel((0, 0))[1] + 256 * image.getpixel((0, 1))[0]
            assert image.getpixel((0, 0)) == colour(label, index % 256)
            found.append(f"{label}_{index}.png")
    return found


def pieces(warm_process):
    files = (path for path in (warm_process.cache / "assets").rglob("*-*") if path.is_file())
    return {path: path.read_bytes() for path in files}


def test_only_the_row_groups_that_hold_chosen_rows_are_fetched(hub, fetch, fire_risk, tmp_path):
    """At most 1.3 times their bytes, 35 % of the dataset, in row groups of any size; what that means is told, and a choice."""
    for number, repo in enumerate((fire_risk, dataset_repo(FIRE_CLASSES, FIRE_RISK_COUNTS, 24, None, noisy_png))):
        hub.repos = {FIRE_RISK: repo}
        hub.served.clear()
        outcome = fetch(tmp_path / str(number))
        assert (outcome.status, outcome.errors) == (0, "")
        taken = noisy_identities(tmp_path / str(number))
        assert Counter(name[0] for name in taken) == dict.fromkeys("0123", CHOSEN) and len(set(taken)) == 4 * CHOSEN
        total = sum(len(content) for path, content in repo.items() if path.endswith(".parquet"))
        groups = [(names & set(taken), size) for names, size in row_groups(repo)]
        assert hub.parquet_bytes <= min(1.3 * sum(size for names, size in groups if names), 0.35 * total)
        assert f": fetched {hub.parquet_bytes:,} of {total:,} bytes" in outcome.output
        used = sum(bool(names) for names, _ in groups)
        there = sum(any(name[0] in "0123" for name in names) for names, _ in row_groups(repo))
        assert f"from {used} of the {there} row groups of the Hub's files" in outcome.output
        assert "--hub_choice uniform" in outcome.output
    outcome = fetch(tmp_path / "uniform", "--hub_choice", "uniform")
    assert outcome.status == 0 and "--hub_choice" not in outcome.output
    spread = [len(names & set(noisy_identities(tmp_path / "uniform"))) for names, _ in row_groups(repo)]
    assert all(spread[: sum(FIRE_RISK_COUNTS[:4]) * 24 // sum(FIRE_RISK_COUNTS)])  # from every file of the four classes


def test_an_interrupted_fetch_goes_on(hub, fetch, fire_risk, warm_process, tmp_path):
    """Killed, then given up on by the Hub: what had arrived is not fetched again, and the data are the same."""
    assert fetch(tmp_path / "whole").status == 0
    whole = hub.parquet_bytes
    hub.served.clear()
    shutil.rmtree(warm_process.cache)
    assert fetch(tmp_path / "root", kill_at=("os.replace", 50)).status == -signal.SIGKILL
    assert 0 < hub.parquet_bytes < whole
    hub.most_bytes = hub.parquet_bytes + 1
    outcome = fetch(tmp_path / "root")
    assert outcome.status == 2 and len(outcome.errors.splitlines()) == 1 and "run the same command again" in outcome.errors
    hub.most_bytes = math.inf
    assert fetch(tmp_path / "root").status == 0
    assert whole <= hub.parquet_bytes <= whole + 2 * CONNECTIONS * max(size for _, size in row_groups(fire_risk))
    assert hashes(tmp_path / "root") == hashes(tmp_path / "whole")


def test_no_fault_but_damage_deletes_what_was_fetched(hub, fetch, warm_process, tmp_path):
    """A time-out, a full disk: the cache is as it was, and is gone on from."""
    hub.most_bytes = 300_000
    assert fetch(tmp_path / "root").status == 2
    before = pieces(warm_process)
    assert before
    hub.most_bytes = math.inf
    slow = ("huggingface_hub.HfFileSystem.open", 3, "TimeoutError", errno.ETIMEDOUT, "timed out")
    outcome = fetch(tmp_path / "root", kill_at=slow)
    assert outcome.status == 2 and "goes on from here" in outcome.errors, outcome.errors
    assert before.items() <= pieces(warm_process).items()
    shutil.rmtree(warm_process.cache)
    outcome = fetch(tmp_path / "root", kill_at=("os.replace", 50, "OSError", errno.ENOSPC, "no space left"))
    assert outcome.status == 2 and "no space left" in outcome.errors and "HF_HOME" in outcome.errors
    assert len(pieces(warm_process)) > 40


def test_only_damaged_pieces_are_fetched_anew(hub, fetch, warm_process, tmp_path):
    """And at once: a checksum tells, whether they end early or hold other bytes."""
    assert fetch(tmp_path / "first").status == 0
    there = pieces(warm_process)
    cut, other = min(there), max(there, key=lambda path: len(there[path]))
    cut.write_bytes(there[cut][:-1])
    other.write_bytes(bytes(len(there[other])))
    hub.served.clear()
    assert fetch(tmp_path / "second").status == 0 and hashes(tmp_path / "second") == hashes(tmp_path / "first")
    assert hub.parquet_bytes == sum(len(there[path]) - DIGEST_BYTES for path in (cut, other))
    assert pieces(warm_process) == there
