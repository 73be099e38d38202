"""Tests of the benchmarks: each kind runs, and measures what it says; none looks at a time."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from image_sources import write_folders
from PIL import Image
from pipeline import Workspace, tiny_beit

from common import predict
from common.cli.flags import BenchmarkConfig, PredictConfig
from common.cli.parser import parse
from common.comparison.features import HEAD_INPUT, backbone_features
from common.data.tensors import ImageSet
from common.training.blocks import block_names
from ContextGatedMOE import Expert
from tests.bench import accuracy, data, depths, preparation, samples, start
from tests.bench.__main__ import BENCHMARKS, WHOLE, main
from tests.bench.measure import LIMIT, Case, Ratio, Settings, forward_flops, measure
from tests.bench.scripts import PROJECT
from tests.bench.serving import EVERYWHERE, LOOP, MIXED, SWITCHED, TOP_1, Served
from tests.bench.setups import dinov2_small, experts, images, mixture, twin
from tests.bench.xlora import XLora

pytest_plugins = ["warm_process"]

# One of each kind; the others are these at another size.
KINDS = ["lora", "mixture_training", "parts", "evaluation_batch"]


@pytest.fixture(scope="module")
def workspace(workspace, tmp_path_factory):
    """A copy of the workspace: benchmarks keep images beside the data as other image processors make them."""
    return workspace.copy(tmp_path_factory.mktemp("bench_root"))


def test_a_benchmark_writes_its_times_its_ratios_and_a_picture(tmp_path, capsys):
    main(["--quick", "--device", "cpu", "--output", str(tmp_path), *KINDS])
    for name in KINDS:
        times = pd.read_csv(tmp_path / f"{name}.csv")
        assert (times["benchmark"] == name).all() and times["case"].is_unique and (times["rounds"] == 1).all()
        assert times["seconds"].between(times["seconds_low"], times["seconds_high"]).all()
        numbers = times[["seconds_low", "images", "images_per_second", "gflop", "gemm_gflop_per_second", "of_the_limit"]]
        assert (numbers > 0).all(axis=None)
        if (tmp_path / f"{name}_ratios.csv").stat().st_size > 1:
            ratios = pd.read_csv(tmp_path / f"{name}_ratios.csv")
            assert (ratios["low"] > 0).all() and ratios["ratio"].between(ratios["low"], ratios["high"]).all()
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 200
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in [*BENCHMARKS, *WHOLE])


def test_the_fewest_images_of_each_class_are_among_the_more(tmp_path, workspace, monkeypatch):
    """Both methods see the same images."""
    seen, fit = [], samples.fitted
    monkeypatch.setattr(samples, "COUNTS", (1, 3, None))
    monkeypatch.setattr(samples, "fitted", lambda few, drawn: seen.append((few, drawn)) or fit(few, drawn))
    main(["--device", "cpu", "--root", str(workspace.root), "--output", str(tmp_path), "samples", "--seeds", "4"])
    table = pd.read_csv(tmp_path / "samples.csv")
    assert list(table["images_a_class"]) == ["1", "1", "3", "3", "all", "all"] and (tmp_path / "samples.png").exists()
    assert table[["accuracy", "right_task", "accuracy_told_task"]].stack().between(0, 1).all()
    for (few, drawn), count in zip(seen, (1, 3, 6), strict=True):
        assert np.array_equal(np.bincount(few.train_answers.labels), [count] * 8) and len(few.train) == len(drawn) == 8 * count
        assert all(len(values) == len(drawn) for values in few.features.train.values())
    assert set(seen[0][1]) < set(seen[1][1]) < set(seen[2][1]) == set(range(48))


def test_right_task_and_joint_accuracy_are_told_at_every_depth_of_the_backbone(tmp_path, backbone, capsys):
    """Of two tasks of two classes each; and what is said of a table, by hand."""
    root = tmp_path / "root"
    made = Workspace(root, backbone)
    source = write_folders(tmp_path / "images", list("abcd"), 10)
    made.run("Data_Preparation", "--task", f"one={source}", "--task", f"two={source}",
             "--classes", "one=a,b", "--classes", "two=c,d")
    main(["--device", "cpu", "--root", str(root), "--model", backbone, "--output", str(tmp_path / "out"), "depths"])
    table = pd.read_csv(tmp_path / "out" / "depths.csv")
    assert list(table["depth"]) == ["0", "1", "2", HEAD_INPUT] and list(table["features"]) == [96, 96, 96, 32]
    shares = table[[column for column in table if "right_task" in column or "accuracy" in column]]
    assert shares.shape == (4, 6) and shares.stack().between(0, 1).all()
    assert (table["accuracy"] <= table[["right_task", "accuracy_told_task"]].min(axis=1) + 1e-9).all()
    assert depths.found(table) in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "depths.png") as picture:
        assert min(picture.size) > 200
    table["validation_right_task"], table["validation_accuracy"] = [0.5, 0.992, 0.996, 0.9], [0.5, 0.7, 0.8, 0.9]
    assert depths.places(table) == (1, 3)
    assert all(part in depths.found(table) for part in ("from the depth behind block 1 (", f"is best on {HEAD_INPUT} ("))


def test_features_before_the_first_block_are_of_what_enters_it():
    """And those behind a block are of what leaves it: a second one that adds nothing leaves them as they are."""
    body, images = tiny_beit(0).eval(), ImageSet(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long))
    body.classifier = torch.nn.Identity()
    second = body.get_submodule(block_names(body)[1])
    with torch.no_grad():
        second.lambda_1.zero_(), second.lambda_2.zero_()
    found = backbone_features(body, images, images, images, parse(BenchmarkConfig, ["--device", "cpu"]), range(3)).test
    assert list(found) == [0, 1, 2, HEAD_INPUT]
    assert np.allclose(found[1], found[2], atol=1e-6) and not np.allclose(found[0], found[1], atol=1e-3)


def test_cases_take_turns(tmp_path):
    calls, settings = [], Settings(torch.device("cpu"), 3, True, tmp_path)
    cases = [Case(name, lambda name=name: calls.append(name), 2, 1e6, "fp32") for name in "ab"]
    times, ratios = measure("turns", cases, [Ratio("a / b", "a", "b"), Ratio("limit / a", LIMIT, "a", factor=2)], settings)
    assert calls == list("ab") * 4  # the first round warms up
    assert list(times["case"]) == ["a", "b"] and list(times["rounds"]) == [3, 3]
    assert list(ratios["what"]) == ["a / b", "limit / a"]


def test_operations_are_those_of_the_matrix_products_of_all_experts_and_gates():
    """By hand: 16 patches and the class token, two blocks of width 32; three experts of rank 16, in each of the blocks
    products with A and B and a gate, at last the heads."""
    base, tokens, experts_in_all, rank, hidden = tiny_beit(0, num_labels=4), 17, 3, 3 * 16, 128
    image = torch.randn(3, 32, 32)
    linear = 2 * tokens * (4 * 32 * 32 + 2 * 32 * 64)
    attention = 2 * 2 * tokens * tokens * 32
    patches, head = 2 * 16 * 32 * (3 * 8 * 8), 2 * 32 * 4
    assert forward_flops(base, image) == 2 * (linear + attention) + patches + head
    widths = [(32, 32)] * 4 + [(32, 64), (64, 32)]
    updates = sum(2 * tokens * rank * (wide + out) for wide, out in widths)
    pooled = 2 * tokens * ((3 + 4) * 32 + hidden)  # first token, mean, deviation and four parts, the mean of the hidden units
    scores = 2 * 2 * (7 * 32 + hidden) * experts_in_all  # for the experts and within each
    gate = 2 * tokens * 32 * hidden + pooled + scores
    added = forward_flops(mixture(base, experts_in_all), image) - forward_flops(base, image)
    assert added == 2 * (updates + gate) + (experts_in_all - 1) * head


def test_the_xlora_loop_over_equal_experts_is_that_one_adapter():
    base, images = tiny_beit(0, num_labels=4).eval(), torch.randn(3, 3, 32, 32)
    updates = experts(base, 1)[0].updates
    loop, plain = XLora(twin(base), [Expert(name, updates) for name in "ab"]), base(images).logits
    torch.nn.init.normal_(loop.weigh.weight)
    with torch.no_grad():
        found = loop(images).logits
        for name, (down, up) in updates.items():
            base.get_submodule(name).weight += up @ down
    assert torch.allclose(found, base(images).logits, atol=1e-5) and not torch.allclose(found, plain, atol=1e-3)
    loop(images).logits.sum().backward()  # and only its weighing learns
    assert {name for name, parameter in loop.named_parameters() if parameter.grad is not None} == {"weigh.weight", "weigh.bias"}


def test_every_way_to_serve_experts_gives_each_image_the_answer_of_the_one_it_wants(tmp_path):
    settings = Settings(torch.device("cpu"), 1, True, tmp_path)
    plain = dinov2_small(settings, num_labels=3)
    made = experts(plain, 4)
    for expert in made:  # so large that no two agree
        expert.updates = {name: (down, 20 * up) for name, (down, up) in expert.updates.items()}
    inputs = images(settings, 6, plain)[0]
    served = Served(plain, made, inputs, settings, {LOOP: "not the same"})
    told = served.runs[MIXED]().log_softmax(-1)
    assert torch.allclose(served.runs[SWITCHED]().log_softmax(-1), told, atol=1e-4)
    own = torch.stack([row.view(4, 3)[number] for row, number in zip(served.runs[EVERYWHERE](), served.wanted, strict=True)])
    assert torch.allclose(own.log_softmax(-1), told, atol=1e-4) and not torch.allclose(told[1:], told[:-1], atol=1e-2)
    assert torch.equal(served.runs[TOP_1]().view(6, 4, 3).logsumexp(-1).argmax(1), served.wanted)
    assert served.mib[MIXED] == pytest.approx(4 * sum(a.nbytes + b.nbytes for a, b in made[0].updates.values()) / 2**20, rel=0.1)


def test_tables_of_serving_gates_and_their_statistics(tmp_path, workspace):
    flags = ["--quick", "--device", "cpu", "--root", str(workspace.root), "--model", workspace.model, "--output", str(tmp_path)]
    main([*flags, "gates"])
    assert list(pd.read_csv(tmp_path / "gates_ratios.csv")["wanted"].fillna("")) == ["<= 2.5", "", "<= 1.5", ""]
    assert pd.read_csv(tmp_path / "gates.csv")["images"].eq(sum(
        len(data.train) + len(data.validation) for data in workspace.tasks())).all()
    main(["--quick", "--device", "cpu", "--output", str(tmp_path), "serving", "statistics", "--experts", "2"])
    table = pd.read_csv(tmp_path / "serving.csv")
    assert list(table["experts"]) == [2] * 14 and table["method"].nunique() == 7 and (table["images_per_second"] > 0).all()
    assert (table.loc[table["method"] == MIXED, "over_adapter_names"] == 1).all() and (tmp_path / "serving.png").exists()
    kept = pd.read_csv(tmp_path / "statistics.csv").iloc[0]  # ten means, and the upper half of a matrix, of each gate at most
    most = kept["gates"] * 4 * (10 * (1 + kept["features"]) + kept["features"] * (kept["features"] + 1) / 2) / 2**20
    assert 0.5 * most < kept["mib_in_memory"] <= most and kept["mib_on_disk"] == pytest.approx(kept["mib_in_memory"], rel=0.05)


def test_time_to_accuracy_ends_where_the_accuracy_of_the_other_is_reached(tmp_path, workspace, monkeypatch):
    """A fifth of a second for each epoch of both; nothing of theirs is better than ours."""
    monkeypatch.setattr(accuracy, "_trainer", lambda *_: [(0.2, 0.25), (0.4, 0.75), (0.6, 0.5)])
    monkeypatch.setattr(accuracy, "_ours", lambda *_: [(0.1, 0.25), (0.3, 0.5), (0.5, 0.75)])
    main(["--device", "cpu", "--root", str(workspace.root), "--output", str(tmp_path), "time_to_accuracy"])
    table = pd.read_csv(tmp_path / "time_to_accuracy.csv")
    assert np.allclose(table[["accuracy", "our_seconds_until", "trainer_seconds_until", "ratio"]], [0.5, 0.3, 0.4, 2.0])
    monkeypatch.setattr(accuracy, "_ours", lambda *_: [(0.1, 0.25)])
    main(["--device", "cpu", "--root", str(workspace.root), "--output", str(tmp_path), "time_to_accuracy"])
    assert pd.read_csv(tmp_path / "time_to_accuracy.csv")["ratio"].isna().all()


def test_start_is_that_of_predict_on_a_saved_mixture_of_the_demo(tmp_path, workspace, monkeypatch, capsys):
    def seconds_of(command, name):
        if "common.predict" not in command:
            return 2.0
        predict.main(parse(PredictConfig, [str(part) for part in command[3:]]))
        return 3.0

    monkeypatch.setattr(start, "seconds_of", seconds_of)
    main(["--quick", "--device", "cpu", "--root", str(workspace.root), "--output", str(tmp_path), "start"])
    table = pd.read_csv(tmp_path / "start.csv").set_index("what")
    assert table["over_imports"].to_dict() == {start.IMPORTS: 1, **dict.fromkeys([*start.COMMANDS][1:], 1), "predict, one image": 1.5}
    assert capsys.readouterr().out.count("one_fire.png") == 2  # the first warms up


def test_a_saved_mixture_needs_no_peft():
    """Which takes long to import."""
    code = "import sys, common.models, ContextGatedMOE.saving; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_data_are_prepared_and_stored_in_processes_of_their_own(tmp_path, monkeypatch, warm_process):
    """Here in a fork of one that has the libraries already; a process whose memory is told only sleeps."""
    def run(command, **_):
        ended = warm_process.run("tests/bench/data.py", *command[3:])
        return SimpleNamespace(returncode=ended.status, stdout=ended.output, stderr=ended.errors)

    start = subprocess.Popen
    monkeypatch.setattr(data, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(preparation.subprocess, "Popen", lambda command, **how: (
        preparation.main(*command[3:]), start(["sleep", "0.1"], **how))[1])
    main(["--quick", "--output", str(tmp_path), "duplicates", "stored", "preparation"])
    duplicates, stored, prepared = (pd.read_csv(tmp_path / f"{name}.csv").iloc[0]
                                    for name in ("duplicates", "stored", "preparation"))
    assert (duplicates["hashes"], duplicates["groups"]) == (500, 375) and duplicates["seconds"] > 0
    assert stored["gb"] == pytest.approx(200 * 3 * 64 * 64 / 1e9, rel=1e-2)
    assert 0 < stored["low"] <= stored["speed_of_memory"] <= stored["high"]
    assert (prepared["images"], prepared["width"], prepared["height"]) == (40, 640, 360) and prepared["mib_of_images"] > 1
    assert prepared["images_per_second"] == pytest.approx(40 / prepared["seconds"], rel=1e-3)
    assert prepared["cores"] > 0 and prepared["peak_memory_mib"] > 0
