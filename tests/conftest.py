"""Fixtures of the whole test set: tiny backbones on disk, and one workspace in which all six scripts have run."""

import os
from contextlib import redirect_stdout
from io import StringIO

import pytest

from common.cli.run import set_up_libraries

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads than one only wait for each other on models this small
set_up_libraries()

from image_sources import write_folders  # noqa: E402
from pipeline import Workspace, save_tiny_backbone  # noqa: E402

from common.cli.flags import SCRIPTS  # noqa: E402
from common.comparison import method_comparison  # noqa: E402
from common.comparison.score import Comparison  # noqa: E402


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """Name of a tiny random BEiT in the Hugging Face layout."""
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"), seed=0)


@pytest.fixture(scope="session")
def other_backbone(tmp_path_factory):
    """Name of another one, of the same shape but other weights."""
    return save_tiny_backbone(tmp_path_factory.mktemp("other_backbone"), seed=1)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, backbone):
    """Where all six scripts have run once. Tests look at it and leave it as it is."""
    made = Workspace(tmp_path_factory.mktemp("workspace"), backbone, pictures=True)
    for script in SCRIPTS:
        made.run(script)
    return made


@pytest.fixture(scope="session")
def three(workspace, tmp_path_factory):
    """A copy of the workspace with a third task and the comparison by two seeds, which failed at its end and was run again; and
    what that printed. Tests look at it and leave it as it is."""
    made = workspace.copy(tmp_path_factory.mktemp("three") / "root")
    made.run("Data_Preparation", "--task", f"third={write_folders(made.root.parent / 'third', list('abcd'), 10)}")
    for script in list(SCRIPTS)[1:-1]:
        made.run(script)
    with pytest.MonkeyPatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(Comparison, "table", lambda *_: 1 / 0)
        trained = [method for method in method_comparison.METHODS if method.group == method_comparison.TOGETHER]
        broken.setattr(method_comparison, "METHODS", trained)
        made.run("CGM_Lora", "--compare", "--seeds", "2")
    made.pictures = True
    with redirect_stdout(StringIO()) as printed:
        made.run("CGM_Lora", "--compare", "--seeds", "2")
    return made, printed.getvalue()


@pytest.fixture(scope="session")
def tasks(workspace):
    """The workspace's prepared data, one entry per task."""
    return workspace.tasks()


@pytest.fixture
def mutable(workspace, tmp_path):
    """A copy of the workspace that a test may change."""
    return workspace.copy(tmp_path / "root")
