"""What is swept: flags with their values, the grid of them, and draws from them."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgespeech.errors import InputError

Settings = dict[str, str]  # value by flag, as both stand on the command line
_MOST = 100_000  # settings of a grid
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


@dataclass(frozen=True)
class Parameter:
    """A flag and its values: some to choose from, or a range of real numbers.

    Attributes:
        flag: its name, without dashes.
        choices: values, where they can be counted.
        low: least number of a range.
        high: largest.
        log: drawn evenly on a logarithmic scale.
    """

    flag: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False


def parse_parameter(text: str) -> Parameter:
    """A parameter from FLAG=A,B,C or FLAG=FIRST..LAST (integers, both included) or FLAG=0.1..0.5[:log] (reals).

    Raises:
        InputError: no such form, a value twice, or an empty range.
    """
    flag, equals, values = text.partition("=")
    flag = flag.lstrip("-")
    if not re.fullmatch(r"[\w.]+", flag) or not equals or not values:
        raise InputError(f"--sweep={text}: give FLAG=A,B,C or FLAG=FIRST..LAST")
    span = re.fullmatch(rf"({_NUMBER})\.\.({_NUMBER})(:log)?", values)
    if not span:
        choices = tuple(values.split(","))
        if not all(choices) or len(set(choices)) < len(choices):
            raise InputError(f"--sweep={text} has an empty value, or one twice: give each once")
        return Parameter(flag, choices)
    low, high, log = span.groups()
    if float(low) >= float(high):
        raise InputError(f"--sweep={text}: the range is empty, {low} is not below {high}")
    if log is None and all(re.fullmatch(r"[-+]?\d+", end) for end in (low, high)):
        if int(high) - int(low) >= _MOST:
            raise InputError(f"--sweep={text} has more than {_MOST} values: give fewer")
        return Parameter(flag, tuple(str(n) for n in range(int(low), int(high) + 1)))
    if log and float(low) <= 0:
        raise InputError(f"--sweep={text}: a logarithmic range lies above 0, {low} does not")
    return Parameter(flag, (), float(low), float(high), log is not None)


def parse_space(texts: Sequence[str]) -> tuple[Parameter, ...]:
    """All parameters of a sweep.

    Raises:
        InputError: none, one flag twice, or see `parse_parameter`.
    """
    space = tuple(map(parse_parameter, texts))
    flags = [parameter.flag for parameter in space]
    if not flags or len(set(flags)) < len(flags):
        raise InputError(f"--sweep names {flags}: give at least one flag, and each once")
    return space


def grid(space: Sequence[Parameter]) -> list[Settings]:
    """Every combination, that of the last parameter changing fastest.

    Raises:
        InputError: a range of reals has no grid; or there are too many combinations.
    """
    for parameter in space:
        if not parameter.choices:
            raise InputError(
                f"--sweep={parameter.flag} is a range of real numbers, which has no grid: give values parted by "
                "commas, or add --random=N or --search=optuna"
            )
    size = math.prod(len(parameter.choices) for parameter in space)
    if size > _MOST:
        raise InputError(f"the grid has {size} settings, the limit is {_MOST}: add --random=N")
    flags = [parameter.flag for parameter in space]
    products = itertools.product(*(parameter.choices for parameter in space))
    return [dict(zip(flags, values, strict=True)) for values in products]


def draws(space: Sequence[Parameter], count: int, seed: int) -> list[Settings]:
    """So many different settings at random; more of them begin with the same ones.

    Raises:
        InputError: the grid has fewer settings.
    """
    if all(parameter.choices for parameter in space):
        whole = grid(space)
        if count > len(whole):
            raise InputError(
                f"--random={count}, but the grid has {len(whole)} settings: leave --random out"
            )
        order = np.argsort(np.random.default_rng(seed).random(len(whole)), kind="stable")
        return [whole[i] for i in order[:count]]
    found: list[Settings] = []
    for number in itertools.count():
        random = np.random.default_rng([seed, number])
        settings = {p.flag: _draw(p, float(random.random())) for p in space}
        if settings not in found:
            found.append(settings)
        if len(found) == count:
            break
        if number > 100 * count:
            raise InputError(
                f"--random={count}: only {len(found)} different settings turned up; give a smaller number"
            )
    return found


def read_rows(path: Path) -> dict[str, Settings]:
    """Named settings: a JSON object of names with their flags, `{"wide": {"model.width": 64, "lpa.local": false}}`.

    Raises:
        InputError: no such file or form, or a name that is no file name.
    """
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--rows={path} cannot be read as JSON: {error}") from error
    if (
        not isinstance(rows, dict)
        or not rows
        or not all(isinstance(r, dict) for r in rows.values())
    ):
        raise InputError(f'--rows={path}: give {{"NAME": {{"FLAG": value}}}}')
    for name, flags in rows.items():
        if not re.fullmatch(r"[\w.+-]+", name):
            raise InputError(f"--rows={path} names a row {name!r}: give letters, digits, _ . + -")
        for flag, value in flags.items():
            if not re.fullmatch(r"[\w.]+", flag) or not isinstance(value, str | int | float):
                raise InputError(
                    f"--rows={path}, row {name}: {flag!r} is {value!r}; give FLAG: value"
                )
    return {
        name: {flag: _flag_text(value) for flag, value in flags.items()}
        for name, flags in rows.items()
    }


def _flag_text(value: str | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _draw(parameter: Parameter, fraction: float) -> str:
    """The value at a fraction in [0, 1) of the parameter's range."""
    if parameter.choices:
        return parameter.choices[int(fraction * len(parameter.choices))]
    low, high = parameter.low, parameter.high
    if parameter.log:
        return real_text(low * (high / low) ** fraction)
    return real_text(low + (high - low) * fraction)


def real_text(value: float) -> str:
    """A drawn number as it goes on the command line: four digits, so that folders have readable names."""
    return f"{value:.4g}"


def folder_name(settings: Settings) -> str:
    """A file name for settings: different for different ones, and readable where it can be."""
    text = ",".join(f"{flag}={value}" for flag, value in settings.items())
    name = re.sub(r"[^\w.,=+-]", "_", text)
    if name == text and len(name) <= 120:
        return name
    return f"{name[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
