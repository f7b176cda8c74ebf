"""A script's options and those of `accelerate launch` in one command line, as TRL's commands have them."""

import difflib
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.launch import launch_command_parser
from trl import TrlParser

from trl_vlm.scripts.quiet import silence

CONFIG_OPTION = "--accelerate_config"


def launch_options(module: str, arguments: Sequence[str], prog: str | None = None) -> Namespace:
    """The options of `accelerate launch` that run a script.

    Args:
        module: The script: a module with `make_parser`.
        arguments: Options of the script, of `accelerate launch`, and `--accelerate_config`, in any order.
        prog: What the help calls the program.

    Raises:
        ValueError: An option that neither knows, or an unknown accelerate configuration.
    """
    parser = import_module(module).make_parser(prog=prog)
    *_, from_file, others = read_options(parser, arguments)
    script = without(arguments, others)
    # `quiet`: the script says what went wrong, and a traceback of its launcher adds nothing.
    words = [*launcher_words([*from_file, *others]), "--quiet", "--module", module, *script]
    options, unknown = launch_command_parser().parse_known_args(words)
    if options.training_script != module:  # a word that stands alone takes the script's place
        unknown.append(options.training_script)
    if unknown:
        raise ValueError(about_unknown(unknown, parser))
    return options


def read_options(parser: TrlParser, arguments: Sequence[str]) -> tuple[Any, ...]:
    """One object for each of the parser's classes, then what it does not know of the files and of the flags.

    TRL's parser reads one file of `--config`; this reads any number, by path or by the name of a recipe, and a later
    one wins.
    """
    silence()  # whatever was done to the filters of warnings since
    rest, unknown = with_files(parser, arguments)
    *parts, from_file, others = parser.parse_args_and_config(
        rest, return_remaining_strings=True, separate_remaining_strings=True
    )
    return *parts, [*unknown, *from_file], others


def with_files(parser: TrlParser, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sets the parser's defaults by all files of `--config` but the last; a later file wins over an earlier one.

    Returns:
        The arguments without these files, and the options in them that the parser does not know.

    Raises:
        ValueError: A file holds no mapping, or its name is missing, or there is no such file.
    """
    rest, unknown = [], []
    for word in arguments:  # argparse would take `--config=` for the beginning of the launcher's `--config_file`
        rest += ["--config", word.removeprefix("--config=")] if word.startswith("--config=") else [word]
    if rest[-1:] == ["--config"]:
        raise ValueError("`--config` is the last word; the name of a file is missing behind it.")
    rest = [
        str(recipe_file(word)) if before == "--config" else word
        for before, word in zip(["", *rest], rest, strict=False)
    ]
    while rest.count("--config") > 1:
        place = rest.index("--config")
        path = Path(rest[place + 1])
        del rest[place : place + 2]
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(options, dict):
            raise ValueError(f"{path} must hold a YAML mapping, options and their values; it holds {options!r}.")
        os.environ.update({name: str(value) for name, value in options.pop("env", {}).items()})
        unknown += parser.set_defaults_with_config(**options)
    return rest, unknown


def refuse_unknown(parser: TrlParser, from_file: Sequence[str], others: Sequence[str]) -> None:
    """Refuses options that a script does not know, except those of the launcher in the file of `--config`.

    Raises:
        ValueError: The message names the options that are spelled alike.
    """
    unknown = list(others)
    if from_file:
        unknown += launch_command_parser().parse_known_args([*launcher_words(from_file), "script"])[1]
    if unknown:
        raise ValueError(about_unknown(unknown, parser))


def launcher_words(words: Sequence[str]) -> list[str]:
    """The words with `--config_file` and a path in place of `--accelerate_config` and a name or a path.

    Raises:
        ValueError: There is no such file, and no configuration of that name.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(CONFIG_OPTION, CONFIG_OPTION.replace("_", "-"))
    options, others = parser.parse_known_args(words)
    if options.accelerate_config is None:
        return others
    return ["--config_file", str(config_file(options.accelerate_config)), *others]


def config_file(name: str) -> Path:
    """The path of an accelerate configuration: a file, or one that comes with this package, by its name.

    Raises:
        ValueError: It is neither.
    """
    return _file_or_ours(name, CONFIG_OPTION, "accelerate_configs", "*.yaml")


def recipe_file(name: str) -> Path:
    """The path of a file of options: a file, or a recipe that comes with this package, by its name.

    Raises:
        ValueError: It is neither.
    """
    return _file_or_ours(name, "--config", "recipes", "*/*.yaml")


def _file_or_ours(name: str, option: str, folder: str, pattern: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    ours = {path.stem: path for path in Path(str(files("trl_vlm") / folder)).glob(pattern)}
    if name not in ours:
        raise ValueError(f"{option} {name} is neither a file nor one of {', '.join(sorted(ours))}.")
    return ours[name]


def without(words: Sequence[str], removed: Sequence[str]) -> list[str]:
    """The words without those of an ordered subsequence."""
    rest = list(removed)
    kept = []
    for word in words:
        if rest and word == rest[0]:
            del rest[0]
        else:
            kept.append(word)
    return kept


def about_unknown(words: Sequence[str], parser: ArgumentParser) -> str:
    """A message about unknown options, with the parser's options that are spelled alike.

    Args:
        words: The options, with their values.
        parser: Knows the options that may be meant.
    """
    known = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    names = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
    sentences = []
    for name in dict.fromkeys(names) or words:
        close = difflib.get_close_matches(name, [option for option in known if "-" not in option], n=3, cutoff=0.5)
        meant = f" Did you mean {' or '.join('--' + option for option in close)}?" if close else ""
        sentences.append(f"There is no option {'--' if name in names else ''}{name}.{meant}")
    return " ".join([*sentences, "`--help` lists all options."])
