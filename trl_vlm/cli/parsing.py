"""Parsers that import a command's code when the command is used, and options made of the fields of dataclasses."""

import argparse
from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

_Made = TypeVar("_Made")
NONE = "none"  # the word for None on a command line


class CommandParser(argparse.ArgumentParser):
    """A parser whose options are added when it is first used, so that no command pays for the imports of another.

    Args:
        add: Adds the options to the parser.
        read: Reads all words in place of this parser: called with the parser, the words, and the options to fill in.
        settings: As in `argparse.ArgumentParser`.
    """

    def __init__(
        self,
        *,
        add: Callable[["CommandParser"], None] | None = None,
        read: Callable[["CommandParser", Sequence[str], argparse.Namespace], None] | None = None,
        **settings: Any,
    ):
        super().__init__(**settings)
        self._add_options, self._read = add, read
        self._words: dict[str, CommandParser] = {}

    def add_word(self, name: str, help: str, add: Callable[["CommandParser"], None]) -> None:
        """Adds a command of its own that is meant where `name` is the first argument, beside the bare one.

        Args:
            name: The word. A folder of this name is still reached as `./name`.
            help: What the command does.
            add: Adds its options.
        """
        description = f"{help[0].upper()}{help[1:]}."
        self._words[name] = CommandParser(prog=f"{self.prog} {name}", description=description, add=add)
        self.add_argument_group(f"{self.prog} {name}", f"{help}; see `{self.prog} {name} --help`")

    def complete(self) -> "CommandParser":
        """The parser with its options."""
        add, self._add_options = self._add_options, None
        if add is not None:
            add(self)
        return self

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As in `argparse`."""
        namespace = namespace or argparse.Namespace()
        if self._read is not None:
            self._read(self, args or (), namespace)
            return namespace, []
        self.complete()
        if args and args[0] in self._words:
            return self._words[args[0]].parse_known_args(args[1:], namespace)
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        """As in `argparse`."""
        self.complete()
        return super().format_help()


def add_fields(parser: CommandParser, owner: type, old_flags: Mapping[str, str] | None = None) -> None:
    """Adds an option for each field of a dataclass: its type, its default, its help.

    A field whose value is made of its own options (metadata "options": a dataclass with a method `make`) is replaced
    by those options. The metadata "flag" names the option if it is not named like the field.

    Args:
        parser: The parser to add to.
        owner: The dataclass.
        old_flags: Earlier names of options, understood and not shown: name of the option -> earlier flag.
    """
    group = parser.add_argument_group(f"options of {owner.__name__}")
    types = get_type_hints(owner)
    for field in _init_fields(owner):
        if "options" in field.metadata:
            add_fields(parser, field.metadata["options"], old_flags)
            continue
        flag = flag_of(field)
        settings = {"dest": flag, **_value_settings(types[field.name], field.metadata.get("choices"))}
        option = group.add_argument(f"--{flag.replace('_', '-')}", **settings)
        option.required, option.default = field.default is MISSING, None if field.default is MISSING else field.default
        option.help = _help(field)
        if old_flags and flag in old_flags:
            group.add_argument(old_flags[flag], default=SUPPRESS, help=SUPPRESS, **settings)


def made_of(owner: type[_Made], options: argparse.Namespace) -> _Made:
    """An object of a dataclass, made of the options that `add_fields` added for it."""
    values = {}
    for field in _init_fields(owner):
        nested = field.metadata.get("options")
        value = made_of(nested, options).make() if nested else getattr(options, flag_of(field))
        values[field.name] = value
    return owner(**values)


def nested_options(owner: type, options: argparse.Namespace) -> Iterator[Any]:
    """The options, as objects, of which fields of a dataclass are made (metadata "options")."""
    for field in _init_fields(owner):
        if "options" in field.metadata:
            yield made_of(field.metadata["options"], options)


def settings_of(owner: type, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """The options of a dataclass that determine its results, with their values; those without a value are left out."""
    irrelevant = getattr(owner, "not_about_answers", ())
    for field in _init_fields(owner):
        if "options" in field.metadata:
            yield from settings_of(field.metadata["options"], options)
        elif field.name not in irrelevant and getattr(options, flag_of(field)) is not None:
            yield flag_of(field), getattr(options, flag_of(field))


def flag_of(field: Field) -> str:
    """The name of a field's option, with underscores."""
    return field.metadata.get("flag", field.name)


def _init_fields(owner: type) -> list[Field]:
    return [field for field in fields(owner) if field.init]


def _help(field: Field) -> str:
    text = field.metadata["help"].replace("%", "%%").rstrip(".")
    if field.default is MISSING or field.default is None or field.default is False:
        return text
    return f"{text} (default: {'yes' if field.default is True else field.default})"


def _value_settings(kind: Any, choices: tuple[str, ...] | None) -> dict[str, Any]:
    """What `add_argument` needs for a value of this type."""
    members = get_args(kind) if get_origin(kind) is not Literal else ()
    may_be_none = NoneType in members
    # Of several types (a path as text or as an object, a dictionary or its JSON), a command line holds text.
    kinds = [member for member in members if member is not NoneType] or [kind]
    kind = str if str in kinds else kinds[0]
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    settings: dict[str, Any] = {"type": _or_none(kind) if may_be_none else kind}
    return {**settings, "choices": choices} if choices else settings


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Reads a value, or None from the word "none"."""

    def read(text: str) -> Any:
        return None if text == NONE else kind(text)

    read.__name__ = getattr(kind, "__name__", "value")  # what argparse calls a value that cannot be read
    return read
