"""Shared fixtures; a cache folder of the test run's own, so that nothing in the user's is touched."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import hessian
from tests.command_line import USER_NETWORKS

settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache"  # one for all of pytest-xdist's workers
    folder.mkdir(exist_ok=True)
    old = os.environ.get("HESSIANWARE_CACHE")
    os.environ["HESSIANWARE_CACHE"] = str(folder)
    yield folder
    if old is None:
        del os.environ["HESSIANWARE_CACHE"]
    else:
        os.environ["HESSIANWARE_CACHE"] = old


@pytest.fixture(scope="session")
def resnet20(cache: Path) -> hessian.Task:
    """The trained digits-resnet20; tests must not change it."""
    assert cache.is_dir()
    return hessian.load_task("digits-resnet20")


@pytest.fixture(scope="session")
def mobilenet(cache: Path) -> hessian.Task:
    """The trained digits-mobilenet; tests must not change it."""
    assert cache.is_dir()
    return hessian.load_task("digits-mobilenet")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a user with tasks of their own."""
    shutil.copy(USER_NETWORKS, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
