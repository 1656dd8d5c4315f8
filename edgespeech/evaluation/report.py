"""The report of a conversion experiment: report.json for programs, report.md for people.

The dict that `write_report` takes has the keys of `SCHEMA`. Rates (WER, CER, their intervals and
differences, padding waste) are fractions in the dict and percent in report.md. Layers are numbered
from 1 everywhere: `sweep[].layer`, `order[]`, `hybrids[].layers`, `controls[].layers`.

The rates of teacher, hybrids and controls are those of the first test split; those of further ones, if
there are any, stand beside them under `splits`, by name, the same names in every row and in `data`.
"""

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from edgespeech import __version__
from edgespeech.errors import InputError


class _Optional(str):
    """A key of a schema that a mapping may lack."""


_SPLIT = {"utterances": Integral, "hours": Real, "speakers": Integral}
_SPLIT_FORMATS = {"utterances": ",", "hours": ".2f", "speakers": ","}
_RATES = {"wer": Real, "ci": (Real, Real), "cer": Real}
_DELTA = {"delta_vs_teacher": {"difference": Real, "ci": (Real, Real)}}
_SYSTEM = {**_RATES, "parameters": Integral, _Optional("splits"): {str: _RATES}}
_REPLACED = {"replaced": Integral, "layers": [Integral]}

# A dict names the keys that a mapping must have, or with `str` as its only key the type of every
# value; a list of one gives the type of every item, a tuple the types of a fixed sequence; `object` is
# any JSON value. More keys than these are kept in the JSON.
SCHEMA = {
    "title": str,
    "command": str,
    "date": str,
    "data": {
        "kind": str,  # "synthetic", or the name of the corpus
        "description": str,
        "train": _SPLIT,
        "dev": _SPLIT,
        "test": {**_SPLIT, _Optional("name"): str},
        _Optional("splits"): {str: _SPLIT},  # further test splits
        "skipped": Mapping,  # reason: count
        "padding_waste": Real,  # padded frames / all frames
    },
    "teacher": {**_SYSTEM, "steps": Integral, "config": object},
    "sweep": [{"layer": Integral, "mse": Real, "relative_mse": Real, "variance": Real}],
    "order": [Integral],  # in which the layers are replaced: easiest first
    "hybrids": [
        {**_SYSTEM, **_REPLACED, **_DELTA, _Optional("splits"): {str: {**_RATES, **_DELTA}}}
    ],
    "controls": [{"name": str, **_SYSTEM, **_REPLACED}],
    "stages": [{"name": str, "seconds": Real}],
    "versions": Mapping,
    "device": {"platform": str, "kind": str, "count": Integral, "cpu": str, "cores": Integral},
    "seeds": object,
    "notes": [str],
}

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write_report(workdir: str | Path, report: Mapping[str, Any]) -> None:
    """Write report.json and report.md into `workdir`; report.md links every PNG below it.

    A value that is not finite is null in the JSON and n/a in the text.

    Raises:
        InputError: a key of `SCHEMA` is missing, a value has another type, a layer number is
            below 1, or two rows have other test splits.
    """
    _validate(report, SCHEMA, "report")
    _validate_layers(report)
    _validate_splits(report)
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(report), indent=2, ensure_ascii=False, allow_nan=False)
    (workdir / "report.json").write_text(text + "\n", encoding="utf-8")
    images = [path.relative_to(workdir) for path in sorted(workdir.rglob("*.png"))]
    (workdir / "report.md").write_text(_render(report, images), encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, "not installed" if absent."""
    found = {"edgespeech": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def device() -> dict[str, Any]:
    """Describe the accelerators that JAX sees and the CPU cores that this process may use."""
    import jax  # here, so that reading a report needs no accelerator

    devices = jax.devices()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "cpu": _cpu_model(),
        "cores": cores,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _validate(value: Any, schema: Any, name: str) -> None:
    if isinstance(schema, dict):
        _require(value, Mapping, name)
        if set(schema) == {str}:
            schema = dict.fromkeys(value, schema[str])
        for key, part in schema.items():
            if key not in value:
                if isinstance(key, _Optional):
                    continue
                raise InputError(f"{name} lacks {key!r}: give {', '.join(schema)}")
            _validate(value[key], part, f"{name}[{key!r}]")
    elif isinstance(schema, list | tuple):
        _require(value, Sequence, name)
        if isinstance(schema, list):
            schema = schema * len(value)
        elif len(value) != len(schema):
            raise InputError(f"{name} has {len(value)} items: give {len(schema)}")
        for index, (item, part) in enumerate(zip(value, schema, strict=True)):
            _validate(item, part, f"{name}[{index}]")
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


def _validate_layers(report: Mapping[str, Any]) -> None:
    groups = [
        ("sweep", [row["layer"] for row in report["sweep"]]),
        ("order", report["order"]),
        *((key, row["layers"]) for key in ("hybrids", "controls") for row in report[key]),
    ]
    for name, layers in groups:
        if any(layer < 1 for layer in layers):
            raise InputError(f"report[{name!r}] has layer {min(layers)}: number layers from 1")


def _validate_splits(report: Mapping[str, Any]) -> None:
    names = set(_further(report["data"]))
    for key in ("teacher", "hybrids", "controls"):
        for row in [report[key]] if key == "teacher" else report[key]:
            if set(_further(row)) != names:
                raise InputError(
                    f"report[{key!r}] has the further test splits {_join(_further(row))}: "
                    f"give those of report['data'], {_join(names)}"
                )


def _further(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Test splits after the first, by name."""
    return part.get("splits", {})


def _plain(value: Any) -> Any:
    """Copy with Python's own types: NumPy scalars and tuples converted, not finite to None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)  # such as a dtype, a path or an enum in a config


def _render(report: Mapping[str, Any], images: Iterable[Path]) -> str:
    data, teacher = report["data"], report["teacher"]
    synthetic = data["kind"] == "synthetic"
    mark = " (synthetic data)" if synthetic else ""
    warning = (
        f"**Synthetic data: {data['description'].rstrip('.')}.** The numbers compare systems on "
        "this data only and are no result on recorded speech."
    )
    further = list(_further(data))
    system = ["replaced", "layers", "WER", "95 % CI", "CER", "parameters"]
    system += [title for name in further for title in (f"WER, {name}", f"95 % CI, {name}")]
    first = data["test"].get("name", "test")
    deltas = [
        [_points(d["difference"]), _interval(d["ci"], _points)]
        for d in (row["delta_vs_teacher"] for row in report["hybrids"])
    ]
    blocks = [
        f"# Report of a conversion experiment: {report['title']}",
        *([warning] if synthetic else []),
        f"Date: {report['date']}. Data: {data['kind']}. Layers are numbered from 1. Intervals are "
        "95 % bootstraps over utterances; differences are in percentage points.",
        f"```\n{report['command']}\n```",
        "## Word error rate",
        f"Teacher{mark}: WER **{_percent(teacher['wer'])}**, 95 % CI {_interval(teacher['ci'])}, "
        f"CER {_percent(teacher['cer'])}, {teacher['parameters']:,} parameters, "
        f"{teacher['steps']:,} steps.",
        *(
            [f"What names no split is of {first}; further ones: {_join(further)}."]
            if further
            else []
        ),
        _table(
            f"WER for every number of replaced layers{mark}",
            [*system, "WER - teacher", "95 % CI of the difference"],
            [
                ["0", "none (teacher)", *_rates(teacher, further), "", ""],
                *(
                    [*_system(row, further), *delta]
                    for row, delta in zip(report["hybrids"], deltas, strict=True)
                ),
            ],
        ),
        _table(
            f"Controls on the same test set{mark}",
            ["control", *system],
            [[row["name"], *_system(row, further)] for row in report["controls"]],
        ),
        "## Sweep",
        _table(
            f"Each layer replaced on its own{mark}: masked MSE to the attention output, and that "
            "MSE / variance of the output",
            ["layer", "MSE", "MSE / variance", "variance"],
            [
                [row["layer"], *(_number(row[k]) for k in ("mse", "relative_mse", "variance"))]
                for row in report["sweep"]
            ],
        ),
        f"Order of replacement: {_join(report['order'])}.",
        *(f"![{path.stem.replace('_', ' ')}{mark}]({path.as_posix()})" for path in images),
        "## Data",
        data["description"],
        _table(
            f"Splits{mark}",
            ["split", "utterances", "hours", "speakers"],
            [
                [name, *(f"{facts[k]:{form}}" for k, form in _SPLIT_FORMATS.items())]
                for name, facts in (
                    *((name, data[name]) for name in ("train", "dev")),
                    (f"test ({first})" if further else "test", data["test"]),
                    *((f"test ({name})", facts) for name, facts in _further(data).items()),
                )
            ],
        ),
        f"Skipped: {_pairs(data['skipped'])}. Padding: {_percent(data['padding_waste'])} of the "
        "frames.",
        "## Run",
        _table(
            f"Time per stage{mark}",
            ["stage", "time"],
            [
                *([row["name"], _duration(row["seconds"])] for row in report["stages"]),
                ["all", _duration(sum(row["seconds"] for row in report["stages"]))],
            ],
        ),
        "\n".join(
            [
                f"- Device: {_device(report['device'])}",
                f"- Versions: {_pairs(report['versions'])}",
                f"- Seeds: {_json(report['seeds'])}",
                f"- Teacher's config: `{_json(teacher['config'])}`",
                *(f"- {note}" for note in report["notes"]),
            ]
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def _table(caption: str, header: list[str], rows: list[list[Any]]) -> str:
    if not rows:
        return f"*{caption}*: none."
    lines = [header, ["---"] * len(header), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return f"*{caption}*\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _system(row: Mapping[str, Any], further: Sequence[str]) -> list[Any]:
    return [row["replaced"], _join(row["layers"]), *_rates(row, further)]


def _rates(row: Mapping[str, Any], further: Sequence[str]) -> list[str]:
    rates = [_percent(row["wer"]), _interval(row["ci"]), _percent(row["cer"])]
    rates.append(f"{row['parameters']:,}")
    for name in further:
        rates += [_percent(row["splits"][name]["wer"]), _interval(row["splits"][name]["ci"])]
    return rates


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %" if math.isfinite(fraction) else "n/a"


def _points(fraction: float) -> str:
    return f"{100 * fraction:+.2f}" if math.isfinite(fraction) else "n/a"


def _interval(ci: Sequence[float], show=_percent) -> str:
    return f"[{show(ci[0])}, {show(ci[1])}]"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "n/a"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _join(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items)) or "none"


def _pairs(mapping: Mapping[str, Any]) -> str:
    return _join(f"{key} {value}" for key, value in mapping.items())


def _json(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False)


def _device(row: Mapping[str, Any]) -> str:
    return (
        f"{row['count']} x {row['kind']} ({row['platform']}), {row['cores']} cores of {row['cpu']}"
    )
