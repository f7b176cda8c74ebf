"""The lower bounds are one set: those of the package, of pyproject.toml, and of what `make test-lowest` installs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from trl_vlm import requirements

ROOT = Path(__file__).parents[1]
FAKED = """
import importlib.metadata
real = importlib.metadata.version
importlib.metadata.version = lambda name: {versions}.get(name) or real(name)
import trl_vlm
"""


def bounds(lines):
    """The lower bound of each requirement that has one, by name."""
    found = {}
    for requirement in map(Requirement, lines):
        lowest = [bound.version for bound in requirement.specifier if bound.operator in (">=", "==")]
        if lowest:
            (found[requirement.name],) = lowest
    return found


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return bounds(line for line in lines if line and not line.startswith("#"))


def import_with(**versions):
    code = FAKED.format(versions=versions)
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT)


def test_the_package_asks_for_the_releases_that_pyproject_asks_for():
    assert bounds(project()["dependencies"]) == requirements.OLDEST


def test_the_tested_releases_and_those_of_extras_are_the_ones_that_are_pinned():
    tested = pins("constraints.txt")
    assert {name: tested[name] for name in requirements.OLDEST | requirements.EXTRAS} == requirements.TESTED
    wanted = bounds(line for lines in project()["optional-dependencies"].values() for line in lines)
    assert {name: wanted[name] for name in requirements.EXTRAS} == requirements.EXTRAS


def test_the_lowest_set_is_that_of_the_lower_bounds():
    extras = project()["optional-dependencies"]
    wanted = bounds([*project()["dependencies"], *(line for name in extras if name != "dev" for line in extras[name])])
    lowest = pins("constraints-lowest.txt")
    assert set(wanted) <= set(lowest)
    # Of torch there is one build for CPUs here.
    unequal = {name for name, bound in wanted.items() if Version(lowest[name]) != Version(bound)}
    assert unequal == {"torch"}
    assert lowest["torch"] == pins("constraints.txt")["torch"]


@pytest.mark.parametrize(("package", "version"), [("transformers", "5.16.1"), ("trl", "1.12.0")])
def test_an_import_beside_a_release_that_is_too_old_says_what_is_needed(package, version):
    needed = f"{package}>={requirements.OLDEST[package]}"
    run = import_with(**{package: version})
    assert run.returncode == 1
    remedy = f"Run `pip install --upgrade '{needed}'`."
    assert f"ImportError: trl_vlm needs {needed}; installed: {package} {version}. {remedy}" in run.stderr


def test_all_releases_that_are_too_old_are_named_at_once(monkeypatch):
    monkeypatch.setattr(requirements, "version", {"a": "1.9", "b": "0.3", "c": "7"}.__getitem__)
    with pytest.raises(ImportError, match=re.escape("a>=1.10 and b>=0.4; installed: a 1.9, b 0.3. Run")):
        requirements.check_installed({"a": "1.10", "b": "0.4", "c": "7.0.0"})


@pytest.mark.parametrize("version", ["5.22", "5.22.0.dev0", "5.22.0+local", "5.30.1"])
def test_the_oldest_release_its_builds_and_later_ones_will_do(monkeypatch, version):
    monkeypatch.setattr(requirements, "version", lambda package: version)
    requirements.check_installed({"transformers": "5.22.0"})


def test_a_package_without_metadata_is_left_to_its_own_import():
    requirements.check_installed({"a-package-that-nobody-has": "1"})
