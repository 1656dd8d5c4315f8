"""The report of a conversion experiment: report.json for programs, report.md for people.

The dict that `write_report` takes has the keys of `SCHEMA`. Rates (WER, CER, their intervals and
differences, padding waste) are fractions in the dict and percent in report.md. Layers are numbered
from 1 everywhere: `sweep[].layer`, `order[]`, `hybrids[].layers`, `controls[].layers`.

The rates of teacher, hybrids and controls are those of the first test split; those of further ones, if
there are any, stand beside them under `splits`, by name, the same names in every row and in `data`.
"""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from edgespeech.errors import InputError
from edgespeech.evaluation.report_text import (
    data_section,
    further_splits,
    image_links,
    interval,
    join,
    json_text,
    pairs,
    percent,
    points,
    run_section,
    sweep_section,
    synthetic_mark,
    synthetic_warning,
    table,
    write_files,
)
from edgespeech.evaluation.schema import Optional, validate

SPLIT = {"utterances": Integral, "hours": Real, "speakers": Integral}
_RATES = {"wer": Real, "ci": (Real, Real), "cer": Real}
DELTA = {"delta_vs_teacher": {"difference": Real, "ci": (Real, Real)}}
_SYSTEM = {**_RATES, "parameters": Integral, Optional("splits"): {str: _RATES}}
REPLACED = {"replaced": Integral, "layers": [Integral]}

# See `validate`; more keys than these are kept in the JSON.
SCHEMA = {
    "title": str,
    "command": str,
    "date": str,
    "data": {
        "kind": str,  # "synthetic", or the name of the corpus
        "description": str,
        "train": SPLIT,
        "dev": SPLIT,
        "test": {**SPLIT, Optional("name"): str},
        Optional("splits"): {str: SPLIT},  # further test splits
        "skipped": Mapping,  # reason: count
        "padding_waste": Real,  # padded frames / all frames
    },
    "teacher": {**_SYSTEM, "steps": Integral, "config": object},
    "sweep": [{"layer": Integral, "mse": Real, "relative_mse": Real, "variance": Real}],
    "order": [Integral],  # in which the layers are replaced: easiest first
    "hybrids": [{**_SYSTEM, **REPLACED, **DELTA, Optional("splits"): {str: {**_RATES, **DELTA}}}],
    "controls": [{"name": str, **_SYSTEM, **REPLACED}],
    "stages": [{"name": str, "seconds": Real}],
    "versions": Mapping,
    "device": {"platform": str, "kind": str, "count": Integral, "cpu": str, "cores": Integral},
    "seeds": object,
    "notes": [str],
}


def write_report(workdir: str | Path, report: Mapping[str, Any]) -> None:
    """Write report.json and report.md into `workdir`; report.md links every PNG below it.

    A value that is not finite is null in the JSON and n/a in the text.

    Raises:
        InputError: a key of `SCHEMA` is missing, a value has another type, a layer number is
            below 1, or two rows have other test splits.
    """
    validate(report, SCHEMA, "report")
    _validate_layers(report)
    _validate_splits(report)
    write_files(workdir, report, _render)


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
    names = set(further_splits(report["data"]))
    for key in ("teacher", "hybrids", "controls"):
        for row in [report[key]] if key == "teacher" else report[key]:
            if set(further_splits(row)) != names:
                raise InputError(
                    f"report[{key!r}] has the further test splits {join(further_splits(row))}: "
                    f"give those of report['data'], {join(names)}"
                )


def _render(report: Mapping[str, Any], images: Sequence[Path]) -> str:
    data, teacher = report["data"], report["teacher"]
    mark = synthetic_mark(data)
    further = list(further_splits(data))
    system = ["replaced", "layers", "WER", "95 % CI", "CER", "parameters"]
    system += [title for name in further for title in (f"WER, {name}", f"95 % CI, {name}")]
    first = data["test"].get("name", "test")
    deltas = [
        [points(d["difference"]), interval(d["ci"], points)]
        for d in (row["delta_vs_teacher"] for row in report["hybrids"])
    ]
    blocks = [
        f"# Report of a conversion experiment: {report['title']}",
        *synthetic_warning(data),
        f"Date: {report['date']}. Data: {data['kind']}. Layers are numbered from 1. Intervals are "
        "95 % bootstraps over utterances; differences are in percentage points.",
        f"```\n{report['command']}\n```",
        "## Word error rate",
        f"Teacher{mark}: WER **{percent(teacher['wer'])}**, 95 % CI {interval(teacher['ci'])}, "
        f"CER {percent(teacher['cer'])}, {teacher['parameters']:,} parameters, "
        f"{teacher['steps']:,} steps.",
        *(
            [f"What names no split is of {first}; further ones: {join(further)}."]
            if further
            else []
        ),
        table(
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
        table(
            f"Controls on the same test set{mark}",
            ["control", *system],
            [[row["name"], *_system(row, further)] for row in report["controls"]],
        ),
        *sweep_section(report, mark),
        *image_links(images, mark),
        *data_section(data, mark),
        f"Skipped: {pairs(data['skipped'])}. Padding: {percent(data['padding_waste'])} of the frames.",
        *run_section(report, mark, [f"Teacher's config: `{json_text(teacher['config'])}`"]),
    ]
    return "\n\n".join(blocks) + "\n"


def _system(row: Mapping[str, Any], further: Sequence[str]) -> list[Any]:
    return [row["replaced"], join(row["layers"]), *_rates(row, further)]


def _rates(row: Mapping[str, Any], further: Sequence[str]) -> list[str]:
    rates = [percent(row["wer"]), interval(row["ci"]), percent(row["cer"])]
    rates.append(f"{row['parameters']:,}")
    for name in further:
        rates += [percent(row["splits"][name]["wer"]), interval(row["splits"][name]["ci"])]
    return rates
