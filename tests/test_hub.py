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
from hub import FIRE_CLASSES, FIRE_RISK, GAME_CLASSES, GAMEPLAY_IMAGES, colour, dataset_repo, noisy_png
from image_sources import PER_CLASS, SCRIPT, all_identities, left_in, opened, prepared, write_folders
from pipeline import hashes

from common.data.hub import CONNECTIONS, DIGEST_BYTES

pytest_plugins = ["warm_process"]


def done(outcome):
    """What a run that went well printed."""
    assert (outcome.status, outcome.errors) == (0, "")
    return outcome.output


def assert_refused(outcome, *parts):
    """One line on stderr that names all these."""
    assert outcome.status == 2 and len(outcome.errors.splitlines()) == 1, outcome.errors
    assert all(part in outcome.errors for part in parts), outcome.errors


@pytest.fixture(scope="module")
def repos():
    return {FIRE_RISK: dataset_repo(FIRE_CLASSES, PER_CLASS, 3), GAMEPLAY_IMAGES: dataset_repo(GAME_CLASSES, PER_CLASS, 2)}


def test_images_from_the_hub_are_fetched_once_whatever_faults_pass(hub, repos, warm_process, tmp_path):
    """Three splits, 60/20/20 of each class and shuffled, as plain `datasets` opens them; a local copy gives the same."""
    def run(folder):
        return done(warm_process.run(SCRIPT, "--root", tmp_path / folder, "--images_per_class", 10))

    hub.repos, hub.server_errors = repos, 2
    hub.cuts["data/train-00001-of-00003.parquet"] = 1
    run("root")
    assert hub.server_errors == sum(hub.cuts.values()) == 0
    for key, classes in (("fire", FIRE_CLASSES), ("game", GAME_CLASSES)):
        data = opened(tmp_path / "root", key)
        assert list(data) == ["train", "validation", "test"]
        assert len(all_identities(tmp_path / "root", key, classes)) == 40
        assert [Counter(split["label"]) for split in data.values()] == [dict.fromkeys(range(4), n) for n in (6, 2, 2)]
        for split in data.values():
            assert split.features["image"] == Image() and isinstance(split.features["label"], ClassLabel)
            assert split.column_names == ["image", "label"] and split.features["label"].names == classes[:4]
        labels = list(data["train"]["label"])
        assert labels not in (sorted(labels), sorted(labels, reverse=True))
    manifest = json.loads((tmp_path / "root/fire_dataset/manifest.json").read_text())
    assert prepared(tmp_path / "local", write_folders(tmp_path / "images"))["fingerprint"] == manifest["fingerprint"]
    hub.repos = {name: {path: repo[path] for path in repo if path != "README.md"} for name, repo in repos.items()}
    run("no card")
    assert hashes(tmp_path / "root") == hashes(tmp_path / "no card")
    hub.repos, before = repos, hub.parquet_bytes
    printed = run("second")
    assert printed.count(": fetched 0 of ") == 2 and "were here from before" in printed and hub.parquet_bytes == before > 0
    hub.requests.clear()
    run("root")
    assert hub.requests == []


def test_an_own_task_from_the_hub_keeps_its_split(hub, warm_process, tmp_path):
    """All classes and images of the splits train and test; one of another name is left out, which is printed."""
    file = "data/train-00000-of-00001.parquet"
    train, test = (dataset_repo(["a", "b", "c"], counts, 1)[file] for counts in (8, [2, 3, 1]))
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(
        f"  - split: {name}\n    path: data/{name}-*\n" for name in ("train", "test", "spare")) + "---\n"
    hub.repos = {"datasets/someone/letters": {
        "data/train-0.parquet": train, "data/test-0.parquet": test, "data/spare-0.parquet": test, "README.md": card.encode()}}
    printed = done(warm_process.run(SCRIPT, "--root", tmp_path, "--task", "letters=hub:someone/letters"))
    manifest = json.loads((tmp_path / "letters_dataset/manifest.json").read_text())
    assert "6 images are in no split called train, validation, test and are left out" in printed
    assert manifest["images"] == {"train": 18, "validation": 6, "test": 6}
    assert (manifest["own_splits"], manifest["classes"]) == (["train", "test"], ["a", "b", "c"])
    hub.repos = {}
    again = warm_process.run(SCRIPT, "--root", tmp_path / "other", "--task", "letters=hub:someone/letters")
    assert_refused(again, "no dataset someone/letters that you may read; give a local copy: --task")


@pytest.mark.parametrize("fault", [{"gated": {FIRE_RISK}}, {"server_errors": 10**6}, {"most_bytes": 0}, {"damaged": True}, None])
def test_a_hub_that_fails_is_one_line_with_the_way_out(hub, repos, warm_process, tmp_path, fault):
    """Exit status 2, one line that names --demo and --fire_source, and nothing written."""
    hub.repos = dict(repos)
    if fault is None:
        hub.shutdown()
        hub.server_close()
    elif fault.get("damaged"):
        hub.repos[FIRE_RISK] = {path: content[:-30] for path, content in repos[FIRE_RISK].items()}
    else:
        vars(hub).update(fault)
    assert_refused(warm_process.run(SCRIPT, "--root", tmp_path), "blanchon/FireRisk", "--demo", "--fire_source")
    assert left_in(tmp_path) == []


FIRE_RISK_COUNTS = [63, 107, 86, 180, 31, 218, 19]  # FireRisk's 6296, 10705, 8617, 17959, 3081, 21757, 1916, by 100
CHOSEN = 10  # of each class, as 1,000 there


@pytest.fixture(scope="module")
def fire_risk():
    """FireRisk in small: 24 files, sorted by label, in row groups of 5 rows."""
    return dataset_repo(FIRE_CLASSES, FIRE_RISK_COUNTS, 24, 5, noisy_png)


@pytest.fixture
def fetch(hub, warm_process, fire_risk, tmp_path):
    """Prepare fire risk from the hub, and the other task from here; arguments go to the process."""
    hub.repos = {FIRE_RISK: fire_risk}
    games = write_folders(tmp_path / "games", per_class=CHOSEN)
    return lambda folder, *flags, **how: warm_process.run(
        SCRIPT, "--root", tmp_path / folder, "--game_source", games, "--images_per_class", CHOSEN, *flags, **how)


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
    rows = [row for split in opened(root).values() for row in split]
    found = [(row["label"], row["image"].getpixel((0, 0))) for row in rows]
    assert all(corner == colour(label, corner[1]) for label, corner in found)
    return [f"{label}_{corner[1]}.png" for label, corner in found]


def pieces(warm_process):
    return {path: path.read_bytes() for path in (warm_process.cache / "assets").rglob("*-*") if path.is_file()}


def test_only_the_row_groups_that_hold_chosen_rows_are_fetched(hub, fetch, fire_risk, tmp_path):
    """At most 1.3 times their bytes, 35 % of the dataset, in row groups of any size; what that means is printed, and a choice."""
    for name, repo in (("small", fire_risk), ("large", dataset_repo(FIRE_CLASSES, FIRE_RISK_COUNTS, 24, None, noisy_png))):
        hub.repos = {FIRE_RISK: repo}
        hub.served.clear()
        printed = done(fetch(name))
        taken = noisy_identities(tmp_path / name)
        assert Counter(image[0] for image in taken) == dict.fromkeys("0123", CHOSEN) and len(set(taken)) == 4 * CHOSEN
        total = sum(len(content) for path, content in repo.items() if path.endswith(".parquet"))
        groups = list(row_groups(repo))
        used = [size for images, size in groups if images & set(taken)]
        in_all = sum(any(image[0] in "0123" for image in images) for images, _ in groups)
        assert hub.parquet_bytes <= min(1.3 * sum(used), 0.35 * total)
        for part in (f": fetched {hub.parquet_bytes:,} of {total:,} bytes", "--hub_choice uniform",
                     f"from {len(used)} of the {in_all} row groups of the Hub's files"):
            assert part in printed
    assert "--hub_choice" not in done(fetch("uniform", "--hub_choice", "uniform"))
    taken = set(noisy_identities(tmp_path / "uniform"))  # from every file of the four classes
    assert all(images & taken for images, _ in groups[: sum(FIRE_RISK_COUNTS[:4]) * 24 // sum(FIRE_RISK_COUNTS)])


def test_what_was_fetched_is_kept_and_gone_on_from(hub, fetch, fire_risk, warm_process, tmp_path):
    """Killed, given up on by the Hub, timed out, the disk full, pieces damaged: only what is not there whole is fetched."""
    done(fetch("whole"))
    every, whole = pieces(warm_process), hub.parquet_bytes
    hub.served.clear()
    shutil.rmtree(warm_process.cache)
    assert fetch("root", kill_at=("os.replace", 50)).status == -signal.SIGKILL
    assert 0 < hub.parquet_bytes < whole
    hub.most_bytes = hub.parquet_bytes + 1
    assert_refused(fetch("root"), "run the same command again")
    before = pieces(warm_process)
    hub.most_bytes = math.inf
    late = ("huggingface_hub.HfFileSystemFile.url", 3, "TimeoutError", errno.ETIMEDOUT, "timed out")
    assert_refused(fetch("root", kill_at=late), "goes on from here")
    assert before and before.items() <= pieces(warm_process).items()
    done(fetch("root"))
    assert whole <= hub.parquet_bytes <= whole + 2 * CONNECTIONS * max(size for _, size in row_groups(fire_risk))
    cut, other = min(every), max(every, key=lambda path: len(every[path]))
    cut.write_bytes(every[cut][:-1])
    other.write_bytes(bytes(len(every[other])))
    hub.served.clear()
    done(fetch("mended"))
    assert hub.parquet_bytes == sum(len(every[path]) - DIGEST_BYTES for path in (cut, other))
    assert pieces(warm_process) == every
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "root") == hashes(tmp_path / "mended")
    shutil.rmtree(warm_process.cache)
    full = fetch("full", kill_at=("os.replace", 50, "OSError", errno.ENOSPC, "no space left"))
    assert_refused(full, "no space left", "HF_HOME")
    assert len(pieces(warm_process)) > 40
