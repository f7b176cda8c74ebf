"""Every command line of the documentation and of docstrings is read by the program that it is for; nothing runs."""

import argparse
import ast
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from accelerate.commands.launch import launch_command_parser

from trl_vlm.cli.main import parser

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "recipes" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
RECIPES = sorted((ROOT / "examples" / "recipes").rglob("*.yaml"))
SOURCES = [path for name in ("trl_vlm", "examples", "benchmarks") for path in sorted((ROOT / name).rglob("*.py"))]
LAUNCHERS = ("trl-vlm ", "accelerate launch ", "python -m ", "python examples/", "python benchmarks/")
SCRIPTS = ("examples/", "trl_vlm.", "benchmarks.")
# What an option that a sentence leaves out may be.
VALUES = {"--for": "dpo", "--from": "rlhf-v"}


class Command(NamedTuple):
    """A command line: where it stands, its words, and whether it is a whole one or a part in a sentence."""

    where: str
    text: str
    is_whole: bool


class Parsed(BaseException):
    """A program has read its options."""


def blocks(text: str) -> Iterator[tuple[str, bool]]:
    """The command lines of a text, continued lines joined: lines of their own, and `code` within sentences."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        if line.strip().startswith(LAUNCHERS):
            yield line.strip(), True
    for code in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", joined, flags=re.DOTALL | re.MULTILINE)):
        if code.startswith(LAUNCHERS):
            yield " ".join(code.split()), False


def docstrings(path: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text


@cache
def commands() -> list[Command]:
    texts = [(path, path.read_text(encoding="utf-8")) for path in PAGES]
    texts += [(path, re.sub(r"^# ?", "", path.read_text(encoding="utf-8"), flags=re.M)) for path in RECIPES]
    texts += [(path, text) for path in SOURCES for text in docstrings(path)]
    found = dict.fromkeys(
        Command(str(path.relative_to(ROOT)), text, is_whole)
        for path, content in texts
        for text, is_whole in blocks(content)
        if "..." not in text
    )
    return list(found)


def ours(command: Command) -> list[str] | None:
    """The words behind `trl-vlm`, however it is started; None for other programs."""
    words = shlex.split(command.text, comments=True)
    if words[0] == "trl-vlm":
        return words[1:]
    program = script_of(words)
    return program[1:] if program[0] in ("trl_vlm.cli", "trl_vlm.cli.main") else None


def script_of(words: list[str]) -> list[str]:
    """The script or module that a launcher starts, and its arguments."""
    if words[0] == "python":
        return words[2:] if words[1] == "-m" else words[1:]
    options = launch_command_parser().parse_args(words[2:])
    if options.config_file is not None:
        assert (ROOT / options.config_file).is_file(), f"there is no {options.config_file}"
    return [options.training_script, *options.training_script_args]


def read(words: list[str], is_whole: bool, capsys) -> argparse.Namespace:
    """What `trl-vlm` makes of the words; options that a part of a command leaves out are filled in."""
    for _ in range(4):
        try:
            return parser().parse_args(words)
        except SystemExit:
            error = capsys.readouterr().err
            missing = re.search(r"arguments are required: (.*)|one of the arguments (--input|--output)", error)
            if is_whole or missing is None:
                raise AssertionError(error) from None
            names = re.findall(r"--[\w-]+", missing[0])
            places = [name for name in (missing[1] or "").split(", ") if name and not name.startswith("-")]
            words = [
                *words,
                *("x" for _ in places),
                *(word for name in names for word in (name, VALUES.get(name, "x"))),
            ]
    raise AssertionError(f"{words} cannot be completed")


def test_the_documentation_is_full_of_commands():
    assert len(commands()) > 40
    assert sum(ours(command) is not None for command in commands()) > 15
    assert {command.is_whole for command in commands()} == {True, False}


@pytest.mark.parametrize("command", [c for c in commands() if ours(c)], ids=lambda command: command.text[:60])
def test_a_documented_command_of_ours_is_understood(command, capsys):
    for words in alternatives(ours(command)):
        if words in (["pairs"], ["estimate"]):
            continue  # named in a sentence, without a method
        read(words, command.is_whole, capsys)


def alternatives(words: list[str]) -> Iterator[list[str]]:
    """Several commands for `pairs bdhs|povid`."""
    several = [word.split("|") for word in words]
    yield from ([choice if choice in group else group[0] for group in several] for choice in max(several, key=len))


def scripts() -> list[Command]:
    """Commands of programs in this repository that have options of their own."""
    others = [command for command in commands() if ours(command) is None and "--help" not in command.text]
    return [other for other in others if script_of(shlex.split(other.text, comments=True))[0].startswith(SCRIPTS)]


@pytest.mark.parametrize("command", scripts(), ids=lambda command: command.text[:60])
def test_the_options_of_a_documented_script_are_its_own(command, monkeypatch):
    """The script is started up to the point at which it has read its options."""
    script, *given = script_of(shlex.split(command.text, comments=True))
    if "--config" in given:  # a file of the reader's own
        place = given.index("--config")
        del given[place : place + 2]
    read_options = argparse.ArgumentParser.parse_known_args

    def read_and_stop(self, args=None, namespace=None):
        _, unknown = read_options(self, args, namespace)
        assert not unknown, f"{command.where}: {command.text}: unknown {unknown}"
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", read_and_stop)
    monkeypatch.setattr(sys, "argv", [script, *given])
    monkeypatch.syspath_prepend(ROOT / "examples")
    with pytest.raises(Parsed, match="^$"):
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=False)


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    files = [*PAGES, ROOT / "tests" / "README.md", ROOT / ".ci" / "run"]
    named = {name for path in files for name in re.findall(r"(?:^|`)make ([\w-]+)", path.read_text(), re.MULTILINE)}
    assert named >= {"demo", "test", "quick", "check"}
    assert named <= targets
