"""The wheel and the source distribution: what is in them, and that they work where nothing else of the project is."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("hessian", "hawq", "parallel")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, made from the source distribution, and that."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)], cwd=ROOT, check=True)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


def test_the_wheel_has_every_module_and_template(built):
    names = {name for name in zipfile.ZipFile(built[0]).namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert {"hessian/py.typed", "hessian/page.html.jinja", "hawq/report.html.jinja"} <= names


def test_the_source_has_what_the_tests_need(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "README.md", "tests/test_package.py"} <= names
    assert not any(".venv" in name or "__pycache__" in name for name in names)


def test_metadata(built):
    archive = zipfile.ZipFile(built[0])
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"all", "docs", "onnx", "test"} <= set(metadata.get_all("Provides-Extra"))
    version = metadata["Version"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {version}" in changes


def fresh(folder):
    venv.create(folder, with_pip=True)
    return folder / "bin"


def clean_environment():
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


@pytest.mark.nightly
def test_the_wheel_works_without_the_repository(built, tmp_path):
    """Its dependencies are those of this environment."""
    programs = fresh(tmp_path / "venv")
    pip = [programs / "python", "-m", "pip", "install", "--quiet", "--no-deps", built[0]]
    subprocess.run(pip, env=clean_environment(), check=True)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=True)
        return done.stdout

    where = run(programs / "python", "-c", "import hessian, hawq, parallel; print(hessian.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    assert json.loads(run(programs / "hessian-doctor", "--json"))["self_test"] is True
    planned = json.loads(run(programs / "parallel-plan", "alexnet", "--world-size", "8", "--batch-size", "64", "--json"))
    assert planned["best"]["seconds"] <= planned["pure_batch"]["seconds"]


@pytest.mark.nightly
def test_all_extras_can_be_installed_from_the_wheel(built, tmp_path):
    programs = fresh(tmp_path / "venv")
    wanted = f"hessianware[all] @ {built[0].as_uri()}"
    pip = [programs / "python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wanted]
    subprocess.run(pip, env=clean_environment(), check=True)
    doctor = subprocess.run([programs / "hessian-doctor", "--json"], cwd=tmp_path, env=clean_environment(), capture_output=True)
    assert doctor.returncode == 0
    assert all(extra["missing"] == [] for extra in json.loads(doctor.stdout)["extras"].values())


def test_no_file_is_large():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout: the files that belong to the project are not known")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert [path.name for path in files if path.exists() and path.stat().st_size > 1_000_000] == []
