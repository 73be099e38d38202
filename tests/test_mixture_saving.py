"""Tests of mixtures on disk and on the Hub, of the package, and of its README."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub import commit, folder_repo, serve
from mixture_models import BEIT, BERT, CLASSES, PLAIN, assert_equal, logits, refused
from safetensors.torch import load_file, save_file

import ContextGatedMOE as package
from ContextGatedMOE import ContextGatedMOE, MixtureError
from ContextGatedMOE.identity import fingerprint
from ContextGatedMOE.saving import _file_digest

PACKAGE = Path(package.__file__).parent
CONFIG, WEIGHTS, STATISTICS = "cgm_config.json", "cgm_model.safetensors", "cgm_statistics.safetensors"


def tensors_of(model: ContextGatedMOE) -> dict[str, torch.Tensor]:
    """All tensors of a mixture, the statistics too."""
    statistics = {f"{name} {layer} {key}": tensor for name, by_layer in model.statistics.items()
                  for layer, own in by_layer.items() for key, tensor in vars(own).items()}
    return model.state_dict() | statistics


def assert_same_mixture(actual: ContextGatedMOE, expected: ContextGatedMOE) -> None:
    """Bit for bit the same."""
    for name in ("expert_names", "classes", "labels", "columns", "same", "gate_hidden", "top_k", "refuse_below", "passes",
                 "fitted_passes", "shrinkage", "without_adapter"):
        assert getattr(actual, name) == getattr(expected, name)
    assert actual.router.start == expected.router.start and list(actual.gates()) == list(expected.gates())
    assert_equal(tensors_of(actual), tensors_of(expected))


def test_saved_and_loaded_is_bit_equal(tmp_path):
    same = [[("a", "x"), ("b", "x")]]
    for number, (case, model) in enumerate((
        (BEIT, BEIT.joint(fit=True, same=same, top_k=2)), (PLAIN, PLAIN.joint(fit=True)), (BERT, BERT.shared()),
        (PLAIN, ContextGatedMOE(PLAIN.build(), [])),
    )):
        model.refuse_below, folder = (0, 0.25, None, None)[number], tmp_path / f"{number}"
        model.save_pretrained(folder)
        loaded = ContextGatedMOE.from_pretrained(folder, case.build().train())
        assert_same_mixture(loaded, model)
        assert torch.equal(logits(loaded, case.batch(3)), logits(model, case.batch(3)))
        assert not any(module.training for module in loaded.modules())
        assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}
        loaded.save_pretrained(folder)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    stored, base = load_file(tmp_path / "0" / WEIGHTS), BEIT.build().state_dict()  # nothing of the base
    assert {name.rpartition(".")[2] for name in stored} == {
        "lora_A", "lora_B", "expert_weight", "expert_bias", "coefficient", "class_coefficient", "weight", "bias", "axes", "origin",
        "centres", "precision", "hidden_weight", "hidden_bias", "bucket", "sign", "expert_scale", "expert_prior"}
    assert not any(torch.equal(tensor, own) for tensor in stored.values() for own in base.values() if own.shape == tensor.shape)
    assert {name.split("/")[0] for name in load_file(tmp_path / "0" / STATISTICS)} == set(CLASSES)
    loaded = ContextGatedMOE.from_pretrained(tmp_path / "0", BEIT.build())  # it goes on as the one that was saved would
    model = BEIT.joint(fit=True, same=same, top_k=2)
    for one in (loaded, model):
        one.add_expert("d", BEIT.experts(["d"], (2,))[0], classes=["p", "q"], images=BEIT.labelled(3, 2))
    assert_equal(loaded.state_dict(), model.state_dict())
    PLAIN.shared().save_pretrained(tmp_path / "1")  # over one with statistics
    assert ContextGatedMOE.from_pretrained(tmp_path / "1", PLAIN.build()).statistics == {}


def test_opening_by_name_prints_nothing(tmp_path, capfd):
    base = BEIT.build()
    base.beit.save_pretrained(tmp_path / "base")  # a backbone without a head: the experts bring theirs
    base = type(base).from_pretrained(tmp_path / "base", num_labels=7).eval()
    model = ContextGatedMOE(base, BEIT.joint_experts(), CLASSES)
    model.save_pretrained(tmp_path / "saved")
    capfd.readouterr()
    loaded = ContextGatedMOE.from_pretrained(tmp_path / "saved")
    assert capfd.readouterr() == ("", "")
    assert torch.equal(logits(loaded, BEIT.batch(2)), logits(model, BEIT.batch(2)))
    half = ContextGatedMOE.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16, device_map="cpu")
    assert half.dtype == torch.bfloat16 and {one.dtype for one in half.gate_parameters()} == {torch.float32}


def base_in(*types: str, seed: int = 0, change: float = 0.0) -> torch.nn.Module:
    """A base in the first of these types, then the next; with one weight changed."""
    model = BEIT.build(seed)
    model.beit.layers[1].mlp.fc1.weight.data[3, 3] += change
    for name in types:
        model = model.to(getattr(torch, name))
    return model


def test_the_base_is_known_in_any_floating_point_type_and_no_other_is_taken(tmp_path):
    for kept, known in {
        "float32": [["float32"], ["bfloat16"], ["float16"]],
        "bfloat16": [["bfloat16", "float32"], ["float32"], ["bfloat16", "float16"]],
    }.items():
        ContextGatedMOE(base_in(kept), BEIT.joint_experts(), CLASSES).save_pretrained(tmp_path / kept)
        for types in known:
            loaded = ContextGatedMOE.from_pretrained(tmp_path / kept, base_in(*types))
            assert loaded.dtype == getattr(torch, types[-1])
        for other in (base_in("bfloat16", seed=1), *(base_in(name, change=1e-2) for name in known[0])):
            with refused(other, "is not the one .* was made for"):
                ContextGatedMOE.from_pretrained(tmp_path / kept, other)
        ContextGatedMOE.from_pretrained(tmp_path / kept, base_in(seed=1), check_base=False)
    rounded = base_in("bfloat16", "float32")
    with refused(rounded, "is not the one"):  # where the mixture was made on all digits
        ContextGatedMOE.from_pretrained(tmp_path / "float32", rounded)
    one, two = base_in(), base_in()
    two.classifier.reset_parameters()
    known = fingerprint(one, ["classifier"])
    assert known == fingerprint(two, ["classifier"]) == BEIT.joint().base_fingerprint() != fingerprint(one, [])


def test_a_base_that_cannot_be_found_is_refused(tmp_path):
    BEIT.build().save_pretrained(tmp_path / "base")
    ContextGatedMOE(type(BEIT.build()).from_pretrained(tmp_path / "base"), []).save_pretrained(tmp_path)
    whole = (tmp_path / CONFIG).read_text()
    for change in ({"base_class": "pipeline"}, {"base_model": "/no/folder"}, {"base_dtype": "float33"}, {"base_model": None}):
        (tmp_path / CONFIG).write_text(whole)
        edit(tmp_path, **change)
        with pytest.raises(MixtureError, match="cannot be loaded"):
            ContextGatedMOE.from_pretrained(tmp_path)


def test_a_base_is_found_from_anywhere_and_no_stranger_is_asked(tmp_path, monkeypatch):
    """A folder by its absolute path; a Hub name at its commit, here first; a path that is gone is no name on the Hub."""
    kind, asked = type(BEIT.build()), []
    monkeypatch.chdir(tmp_path)
    BEIT.build().save_pretrained("a/b")
    ContextGatedMOE(kind.from_pretrained("a/b"), []).save_pretrained("mixture")
    for elsewhere in (tmp_path, tmp_path / "a"):
        monkeypatch.chdir(elsewhere)
        ContextGatedMOE.from_pretrained(tmp_path / "mixture")
    base, original = kind.from_pretrained(tmp_path / "a" / "b"), kind.from_pretrained

    def from_hub(name: str, **options: object) -> torch.nn.Module:
        """What stands in for the Hub, with an empty cache."""
        asked.append((name, options["revision"], options.get("local_files_only", False)))
        if options.get("local_files_only"):
            raise OSError("it is not in the cache")
        return original(tmp_path / "a" / "b")

    monkeypatch.setattr(kind, "from_pretrained", from_hub)
    for name, commit, expected in (("a/b", None, ("a/b", "main", True)), ("a/b", "c0ffee", ("a/b", "c0ffee", False))):
        base.name_or_path, base.config._commit_hash = name, commit
        ContextGatedMOE(base, []).save_pretrained(tmp_path / "of_hub")
        asked.clear()
        with nullcontext() if commit else pytest.raises(MixtureError, match="the base model a/b of .* cannot be loaded"):
            ContextGatedMOE.from_pretrained(tmp_path / "of_hub")
        assert asked == [expected]
    asked.clear()
    with pytest.raises(MixtureError, match="cannot be loaded"):
        ContextGatedMOE.from_pretrained(tmp_path / "of_hub", local_files_only=True)
    assert asked == [("a/b", "c0ffee", True)]


def edit(folder: Path, **changes: object) -> None:
    """Change the configuration of a saved mixture."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def test_damaged_files_are_refused(tmp_path):
    source, folder = tmp_path / "whole", tmp_path / "damaged"
    PLAIN.joint(fit=True).save_pretrained(source)

    def assert_refused(damage: Callable[[], object], *messages: str) -> None:
        """In one line, the base left alone; the second time with the checksum of the damaged weights."""
        shutil.copytree(source, folder, dirs_exist_ok=True)
        damage()
        for message in messages or ("",):
            base = PLAIN.build()
            with refused(base, message or None):
                ContextGatedMOE.from_pretrained(folder, base)
            if len(messages) > 1:
                edit(folder, weights_sha256=_file_digest(folder / WEIGHTS))

    for name in (CONFIG, WEIGHTS, STATISTICS):
        assert_refused((folder / name).unlink, name)
    for text in ("[1]", '{"format": 2}', '{"format": 3}', '{"form'):
        assert_refused(partial((folder / CONFIG).write_text, text), CONFIG)
    tensors = load_file(source / WEIGHTS)
    for changed in (dict(list(tensors.items())[1:]), tensors | {"head.other": torch.ones(2)},
                    tensors | {"base.lora_A": torch.ones(3, 3)}):
        assert_refused(partial(save_file, changed, folder / WEIGHTS), "checksum", "does not hold together")
    for key, value in {
        "experts": ["z", "b", "c"], "classes": {"a": 1, "b": 2, "c": 3}, "heads": [], "ranks": {"base": [1]}, "same": ["x"],
        "gate_hidden": 9, "top_k": 0, "passes": 3, "start": "x", "gates": ["x"], "shrinkage": "x", "refuse_below": "x",
        "statistics_sha256": "x",
    }.items():
        assert_refused(partial(edit, folder, **{key: value}))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve({}) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        for name, value in (("ENDPOINT", address), ("HF_HUB_CACHE", str(tmp_path / "cache")),
                            ("HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield server


def test_a_mixture_goes_to_the_hub_and_comes_back(hub, tmp_path, monkeypatch):
    def upload_folder(api, repo_id, folder_path, **options):
        if repo_id in hub.repos:
            hub.earlier[repo_id, commit(hub.repos[repo_id])] = hub.repos[repo_id]
        hub.repos[repo_id] = folder_repo(Path(folder_path))
        return f"https://hub/{repo_id}/commit/{commit(hub.repos[repo_id])}"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *args, **options: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    first, second = BEIT.joint(fit=True), BEIT.joint()
    figures = {"accuracy on 800 test images": 0.95, "top | 1": "x"}
    address = first.push_to_hub("someone/mixture", figures=figures, made="Trained on a rainy day.", token="secret")
    second.push_to_hub("someone/mixture", token="secret")
    earlier = address.rpartition("/commit/")[2]
    options = dict(cache_dir=tmp_path / "cache", token="secret")
    hub.repos["someone/many"] = {f"inner/one/{name}": content for name, content in hub.repos["someone/mixture"].items()}
    hub.repos["someone/empty"] = {"README.md": b"x"}
    for name, more, expected in (("someone/mixture", {}, second), ("someone/mixture", {"revision": earlier}, first),
                                 ("someone/many", {"subfolder": "inner/one"}, second)):
        assert_same_mixture(ContextGatedMOE.from_pretrained(name, BEIT.build(), **more, **options), expected)
    for name, more, message in (
        ("someone/nothing", {}, "cannot be fetched"),
        ("someone/empty", {}, f"{CONFIG} is missing"),
        ("someone/mixture", {"revision": "nowhere"}, "cannot be fetched"),
        ("no such name", {}, "no such folder"),
    ):
        base = BEIT.build()
        with refused(base, message):
            ContextGatedMOE.from_pretrained(name, base, **more, **options)
    card = hub.earlier["someone/mixture", earlier]["README.md"].decode()
    for text in ("library_name: context-gated-moe", "| a | x, y | 24 |", "Trained on a rainy day.",
                 "| accuracy on 800 test images | 0.95 |", r"| top \| 1 | x |", 'from_pretrained("someone/mixture")'):
        assert text in card
    assert "Figures" not in second.model_card() and "have not been fitted" in second.model_card()


def test_the_package_is_installed_whole_and_the_example_of_its_readme_runs(tmp_path, monkeypatch, capsys):
    """Built with setuptools, unpacked alone in a folder; it needs nothing else of the project."""
    source = shutil.copytree(PACKAGE, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
           "--disable-pip-version-check", "--target", str(site), str(source)]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    installed = {file.name for file in (site / "ContextGatedMOE").glob("*.py")}
    assert installed == {file.name for file in PACKAGE.glob("*.py")}
    example, = re.findall(r"```python\n(.*?)```", (PACKAGE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for file in PACKAGE.glob("*.py"):
        assert not re.search(r"^\s*(from|import) common", file.read_text(encoding="utf-8"), re.M)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert int(re.search(r"(\d+) of 60 right", capsys.readouterr().out)[1]) >= 55
