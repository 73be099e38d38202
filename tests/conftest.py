"""Fixtures of the whole test set: tiny backbones on disk, and one workspace in which all six scripts have run."""

import os

import pytest

from common.cli.run import set_up_libraries

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads than one only wait for each other on models this small
set_up_libraries()

from pipeline import Workspace, save_tiny_backbone  # noqa: E402

from common.cli.flags import SCRIPTS  # noqa: E402


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
def tasks(workspace):
    """The workspace's prepared data, one entry per task."""
    return workspace.tasks()


@pytest.fixture
def mutable(workspace, tmp_path):
    """A copy of the workspace that a test may change."""
    return workspace.copy(tmp_path / "root")
