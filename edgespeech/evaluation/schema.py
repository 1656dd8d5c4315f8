"""Schemas of reports: plain Python values that say what a nested mapping must hold."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from edgespeech.errors import InputError


class Optional(str):
    """A key of a schema that a mapping may lack."""


def validate(value: Any, schema: Any, name: str) -> None:
    """Checks a value against a schema.

    A dict names the keys that a mapping must have (an `Optional` one may be missing), or with `str` as its only key the
    type of every value; a list of one gives the type of every item, a tuple the types of a fixed sequence; `object` is
    any JSON value. A mapping may have more keys than these.

    Raises:
        InputError: it does not fit; the message names the part.
    """
    if isinstance(schema, dict):
        _require(value, Mapping, name)
        if set(schema) == {str}:
            schema = dict.fromkeys(value, schema[str])
        for key, part in schema.items():
            if key not in value:
                if isinstance(key, Optional):
                    continue
                raise InputError(f"{name} lacks {key!r}: give {', '.join(schema)}")
            validate(value[key], part, f"{name}[{key!r}]")
    elif isinstance(schema, list | tuple):
        _require(value, Sequence, name)
        if isinstance(schema, list):
            schema = schema * len(value)
        elif len(value) != len(schema):
            raise InputError(f"{name} has {len(value)} items: give {len(schema)}")
        for index, (item, part) in enumerate(zip(value, schema, strict=True)):
            validate(item, part, f"{name}[{index}]")
    else:
        _require(value, schema, name)


def _require(value: Any, kind: type, name: str) -> None:
    # bool is an Integral and str a Sequence, which no field of the report means.
    if isinstance(value, bool | str) and kind in (Integral, Real, Sequence):
        matches = False
    else:
        matches = isinstance(value, kind)
    if not matches:
        raise InputError(f"{name} is {value!r}: give a value of type {kind.__name__}")
