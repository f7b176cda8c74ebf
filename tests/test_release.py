"""What a release consists of: one version, a README for an index, workflows that run what is there."""

import re
import runpy
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def for_an_index(text, repository):
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["for_an_index"](text, repository)


def test_the_version_stands_in_one_place():
    about = project()
    assert "version" in about["project"]["dynamic"] and "version" not in about["project"]
    assert about["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "trl_vlm.__version__"}


def test_no_link_of_the_readme_is_dead_on_an_index_while_the_project_has_no_address():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\]\((?!https?:|#)", readme)
    shown = for_an_index(readme, None)
    assert not re.search(r"\]\((?!https?:|#)", shown)
    assert "docs/fact_rlhf.md" in shown  # the words of a link stay
    assert "(https://github.com/huggingface/trl)" in shown


def test_links_of_the_readme_become_absolute_once_it_has_one():
    shown = for_an_index("See [a](docs/a.md#b), ![c](docs/c.svg), [d](https://e.org), [f](#g).", "https://h.org/i/")
    assert shown == (
        "See [a](https://h.org/i/blob/main/docs/a.md#b), ![c](https://h.org/i/raw/main/docs/c.svg), "
        "[d](https://e.org), [f](#g)."
    )


def test_the_scheduled_job_runs_contracts_that_exist():
    upstream = runpy.run_path(str(ROOT / ".ci" / "upstream.py"), run_name="upstream")
    for path in upstream["CONTRACTS"]:
        assert (ROOT / path).is_file(), path
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "upstream.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["contracts"]
    assert set(job["strategy"]["matrix"]["newest"]) == {*upstream["PACKAGES"], upstream["ALL"]}
    assert any(step.get("run", "").startswith("python .ci/upstream.py") for step in job["steps"])
    assert workflow[True]["schedule"]  # YAML reads the key `on` as true


def test_the_scheduled_job_leaves_the_newest_package_free_and_pins_the_others():
    upstream = runpy.run_path(str(ROOT / ".ci" / "upstream.py"), run_name="upstream")
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    kept = upstream["constraints"](text, ["trl"])
    left_out = set(text.splitlines()) - set(kept.splitlines())
    assert [line.partition("==")[0] for line in left_out] == ["trl"]


def test_the_scheduled_job_names_what_broke_and_what_broke_it(tmp_path, capsys):
    upstream = runpy.run_path(str(ROOT / ".ci" / "upstream.py"), run_name="upstream")
    names = upstream["main"].__globals__
    names["install"] = lambda folder, newest: Path(sys.executable)
    names["releases"] = lambda python, packages: f"{packages[0]} 9.9"
    reason = "the keyword of the trainer's forward pass is called otherwise now, " * 2
    (tmp_path / "test_contract.py").write_text(f"def test_a_seam():\n    raise LookupError({reason!r})\n")
    names["CONTRACTS"] = (str(tmp_path / "test_contract.py"), "-o", "addopts=", "--rootdir", str(tmp_path))
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--families')\n")
    names["ROOT"] = tmp_path
    assert upstream["main"](["trl"]) == 1
    said = capsys.readouterr().out
    assert "trl 9.9: 1 contract broke" in said and "test_a_seam" in said and reason.strip() in said
    (tmp_path / "test_contract.py").write_text("def test_a_seam():\n    pass\n")
    assert upstream["main"](["peft"]) == 0
    assert capsys.readouterr().out.endswith("peft 9.9: every contract holds\n")
    (tmp_path / "test_contract.py").unlink()
    assert upstream["main"](["peft"]) == 1
    assert "pytest could not run them" in capsys.readouterr().out


def test_the_classifiers_name_every_python_that_is_supported():
    about = project()["project"]
    named = [line.rpartition(" ")[2] for line in about["classifiers"] if "Python :: 3." in line]
    assert named[0] == about["requires-python"].removeprefix(">=")
    first, last = (int(version.partition(".")[2]) for version in (named[0], named[-1]))
    assert named == [f"3.{minor}" for minor in range(first, last + 1)]
