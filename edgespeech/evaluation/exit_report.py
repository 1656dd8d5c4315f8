"""The report of an experiment on exits: report.json for programs, report.md for people.

Rates and costs are fractions in the JSON and percent in the text. Exits and layers are numbered from 1.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgespeech.evaluation.report import (
    _SPLIT_FORMATS,
    _device,
    _duration,
    _further,
    _interval,
    _json,
    _pairs,
    _percent,
    _plain,
    _points,
    _table,
)


def write_exit_report(workdir: str | Path, report: Mapping[str, Any]) -> None:
    """Write report.json and report.md into `workdir`; report.md links every PNG below it.

    Args:
        workdir: exists.
        report: title, command, date, data (as of `asr.data_facts`), models (name, placement, parameters, steps, config,
            and what `exit_curves.analyse` gives, with `ci`, `cer` and further `splits` in every exit), differences (of
            the models from the first one, by exit), stages, versions, device, seeds, notes.
    """
    workdir = Path(workdir)
    text = json.dumps(_plain(report), indent=2, ensure_ascii=False, allow_nan=False)
    (workdir / "report.json").write_text(text + "\n", encoding="utf-8")
    images = [path.relative_to(workdir) for path in sorted(workdir.rglob("*.png"))]
    (workdir / "report.md").write_text(_render(report, images), encoding="utf-8")


def _render(report: Mapping[str, Any], images: Sequence[Path]) -> str:
    data = report["data"]
    synthetic = data["kind"] == "synthetic"
    mark = " (synthetic data)" if synthetic else ""
    first = data["test"]["name"]
    blocks = [
        f"# Report of an experiment on exits: {report['title']}",
        *(
            [
                f"**Synthetic data: {data['description'].rstrip('.')}.** The numbers compare systems on this data only "
                "and are no result on recorded speech."
            ]
            if synthetic
            else []
        ),
        f"Date: {report['date']}. Data: {data['kind']}. Exits and layers are numbered from 1. Intervals are 95 % "
        "bootstraps over utterances; differences are in percentage points. Thresholds and predictors are chosen on "
        f"dev; what names no split is of {first}.",
        f"```\n{report['command']}\n```",
        "## Word error rate of every exit",
        *(_exits(model, mark) for model in report["models"]),
        *([_differences(report, mark)] if report["differences"] else []),
        "## Exit rules at equal compute",
        "Compute is in multiply-accumulates: matrix products and convolutions of the encoder and of every head on the "
        "way, a branch counted as if it ran after the layers beside it. What a rule costs is not in it; the beam "
        "search of `posterior` is the only one that costs more than sums over frames. Each rule is tuned on dev to the "
        "lowest WER within the compute of the fixed exit of its row; on test it may take a little more or less, which "
        "is the second number of a cell. A fixed exit is what a budget of that compute takes.",
        *(_rules(model, mark) for model in report["models"]),
        "## How much of the gap to the oracle is closed",
        "From the best fixed exit on dev, (fixed - rule) / (fixed - oracle): in WER at its compute, and in compute at "
        "its WER. The oracle knows the references and spends no more (no WER higher) than the fixed exit.",
        *(_gaps(model, mark) for model in report["models"]),
        *(f"![{path.stem.replace('_', ' ')}{mark}]({path.as_posix()})" for path in images),
        "## Data",
        data["description"],
        _table(
            f"Splits{mark}",
            ["split", "utterances", "hours", "speakers"],
            [
                [name, *(f"{facts[key]:{form}}" for key, form in _SPLIT_FORMATS.items())]
                for name, facts in (
                    ("train", data["train"]),
                    ("dev", data["dev"]),
                    (f"test ({first})", data["test"]),
                    *((f"test ({name})", facts) for name, facts in _further(data).items()),
                )
            ],
        ),
        f"Skipped: {_pairs(data['skipped'])}. Padding: {_percent(data['padding_waste'])} of the frames.",
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
                *(f"- {model['name']}: `{_json(model['config'])}`" for model in report["models"]),
                *(f"- {note}" for note in report["notes"]),
            ]
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def _exits(model: Mapping[str, Any], mark: str) -> str:
    further = list(_further(model["exits"][0]))
    header = ["exit", "layer", "WER", "95 % CI", "CER"]
    header += [title for name in further for title in (f"WER, {name}", f"95 % CI, {name}")]
    rows = []
    for row in model["exits"]:
        cells = [row["exit"], row["layer"], _percent(row["wer"]), _interval(row["ci"])]
        cells.append(_percent(row["cer"]))
        for name in further:
            cells += [_percent(row["splits"][name]["wer"]), _interval(row["splits"][name]["ci"])]
        rows.append([*cells, _million(row), _percent(row["cost"])])
    caption = (
        f"{model['name']} (branches: {model['placement']}), {model['parameters']:,} parameters, "
        f"{model['steps']:,} steps{mark}"
    )
    return _table(caption, [*header, "million MAC/s of audio", "of the last exit's"], rows)


def _differences(report: Mapping[str, Any], mark: str) -> str:
    return _table(
        f"WER less that of {report['models'][0]['name']}, same exit{mark}",
        ["model", "exit", "difference", "95 % CI"],
        [
            [row["model"], row["exit"], _points(row["difference"]), _interval(row["ci"], _points)]
            for row in report["differences"]
        ],
    )


def _rules(model: Mapping[str, Any], mark: str) -> str:
    rows = []
    for exit in model["exits"]:
        cells = [exit["exit"], f"{_percent(exit['cost'])}", _percent(exit["wer"])]
        for curve in model["curves"].values():
            row = next(row for row in curve if row["budget"] == exit["dev_cost"])
            cells.append(f"{_percent(row['wer'])} at {_percent(row['cost'])}")
        within = [row for row in model["oracle"] if row["cost"] <= exit["cost"] + 1e-12]
        best = min(within, key=lambda row: (row["wer"], row["cost"]))
        cells.append(f"{_percent(best['wer'])} at {_percent(best['cost'])}")
        rows.append(cells)
    header = ["exit", "compute", "fixed", *(rule.replace("_", " ") for rule in model["curves"])]
    return _table(f"{model['name']}: WER within a budget{mark}", [*header, "oracle"], rows)


def _gaps(model: Mapping[str, Any], mark: str) -> str:
    fixed = model["exits"][model["best_fixed"] - 1]
    rows = []
    for rule, gap in model["gaps"].items():
        wer, cost = gap["equal_compute"], gap["equal_wer"]
        rows.append(
            [
                rule.replace("_", " "),
                f"{_percent(wer['wer'])} at {_percent(wer['cost'])}",
                f"{_points(wer['difference'])} {_interval(wer['ci'], _points)}",
                _share(wer["closed"]),
                *(
                    [f"{_percent(cost['wer'])} at {_percent(cost['cost'])}", _share(cost["closed"])]
                    if cost
                    else ["out of reach on dev", ""]
                ),
            ]
        )
    caption = (
        f"{model['name']}: best fixed exit {fixed['exit']}, WER {_percent(fixed['wer'])} at "
        f"{_percent(fixed['cost'])} of the compute{mark}"
    )
    header = ["rule", "at its compute", "WER - fixed", "WER gap closed"]
    return _table(caption, [*header, "at its WER", "compute gap closed"], rows)


def _million(row: Mapping[str, Any]) -> str:
    return f"{row['macs_per_second'] / 1e6:.1f}"


def _share(value: float | None) -> str:
    return "no gap" if value is None else f"{100 * value:.0f} %"
