"""Every command of a script in the docs, the README and the docstrings has options that the script knows."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "trl_vlm" / "scripts").glob("*.py")]
SCRIPTS = ("sft", "reward", "dpo", "ppo", "grpo", "rloo", "bdhs", "online_dpo")


def commands():
    """Name of the script and its arguments, where any are given."""
    for place in PLACES:
        text = re.sub(r"\\\n\s*", "", place.read_text(encoding="utf-8"))
        for script, rest in re.findall(r"-m trl_vlm\.scripts\.(\w+) (--.*)", text):
            yield script, shlex.split(rest, comments=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_of_a_script_parse(script):
    found = [arguments for name, arguments in commands() if name == script]
    assert found, f"no command shows {script}"
    for arguments in found:
        _, unknown = import_module(f"trl_vlm.scripts.{script}").make_parser().parse_known_args(arguments)
        assert not unknown
