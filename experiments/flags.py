"""Command-line flags made from the frozen configuration classes.

`ml_collections.config_flags` binds a dataclass too, but its `--help` shows one line for the whole of it. Here every
field is a flag of its own, typed, and its help is the field's entry in the docstring, unit and all.
"""

import dataclasses
import re
import types
import typing
from typing import Any, TypeVar

from absl import flags

from edgespeech.errors import InputError

FLAGS = flags.FLAGS
# The flags defined here belong to the program that asks for them, and show in its --help.
flags.disclaim_key_flags()
Config = TypeVar("Config")


def attribute_docs(cls: type) -> dict[str, str]:
    """The entries of the `Attributes:` sections of a class and its bases, each on one line."""
    docs = {}
    for part in reversed(cls.__mro__):
        text = (part.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", text, re.MULTILINE)
        docs |= {name: " ".join(body.split()) for name, body in entries}
    return docs


def define_config(prefix: str, default: Any, skip: tuple[str, ...] = ()) -> None:
    """Defines `--PREFIX.FIELD` for every field of a configuration, those of nested ones included.

    A flag that is not given is None, so that another default (a preset's) can take its place.

    Args:
        prefix: before the dot.
        default: an instance; its values are named in the help.
        skip: fields that get no flag, because the program sets them.
    """
    docs = attribute_docs(type(default))
    hints = typing.get_type_hints(type(default))
    for field in dataclasses.fields(default):
        value, name = getattr(default, field.name), f"{prefix}.{field.name}"
        if field.name in skip:
            continue
        if dataclasses.is_dataclass(value):
            define_config(name, value)
            continue
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        text = f"{docs[field.name]} (default: {shown})"
        hint = hints[field.name]
        if typing.get_origin(hint) is typing.Literal:
            flags.DEFINE_enum(name, None, list(typing.get_args(hint)), text)
        elif hint is bool:
            flags.DEFINE_bool(name, None, text)
        elif hint is int:
            flags.DEFINE_integer(name, None, text)
        elif hint is float:
            flags.DEFINE_float(name, None, text)
        elif hint is str:
            flags.DEFINE_string(name, None, text)
        elif typing.get_origin(hint) in (tuple, types.GenericAlias):
            flags.DEFINE_list(name, None, text)
        else:
            raise TypeError(f"--{name}: no flag for a field of type {hint}")


def read_config(prefix: str, default: Config) -> Config:
    """The configuration with the values of the flags that were given.

    Raises:
        InputError: a value is out of range.
    """
    hints = typing.get_type_hints(type(default))
    given: dict[str, Any] = {}
    for field in dataclasses.fields(default):  # type: ignore[arg-type]
        name, value = f"{prefix}.{field.name}", getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            given[field.name] = read_config(name, value)
        elif name in FLAGS and FLAGS[name].value is not None:
            value = FLAGS[name].value
            if typing.get_origin(hints[field.name]) is tuple:
                kind = typing.get_args(hints[field.name])[0]
                value = tuple(_number(name, kind, text) for text in FLAGS[name].value or ())
            given[field.name] = value
    try:
        return dataclasses.replace(default, **given)  # type: ignore[type-var]
    except ValueError as error:
        raise InputError(f"--{prefix}.*: {error}") from error


def _number(name: str, kind: type, text: str):
    try:
        return kind(text)
    except ValueError:
        raise InputError(
            f"--{name} holds {text!r}: give {kind.__name__} values parted by commas"
        ) from None


def int_list(name: str, low: int, high: int) -> tuple[int, ...]:
    """The distinct integers of a list flag, ascending.

    Raises:
        InputError: one is not an integer in [low, high].
    """
    values = tuple(sorted({_number(name, int, text) for text in FLAGS[name].value or []}))
    for value in values:
        if not low <= value <= high:
            raise InputError(f"--{name} holds {value}: give values from {low} to {high}")
    return values
