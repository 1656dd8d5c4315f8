"""The report of an enhancement experiment: report.json for programs, report.md for people; `report` has WER's."""

import json
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from edgespeech.evaluation.enhancement import OPTIONAL
from edgespeech.evaluation.report import (
    _SPLIT,
    SCHEMA,
    _device,
    _duration,
    _join,
    _json,
    _number,
    _pairs,
    _plain,
    _table,
    _validate,
)

_SCORES = {"si_snr": Real, "improvement": Real, "ci": (Real, Real), "pesq": Real, "stoi": Real}
_SYSTEM = {**_SCORES, "parameters": Integral}
_REPLACED = {"replaced": Integral, "layers": [Integral]}

ENHANCEMENT_SCHEMA = {
    **{key: SCHEMA[key] for key in ("title", "command", "date", "sweep", "order", "stages")},
    **{key: SCHEMA[key] for key in ("versions", "device", "seeds", "notes")},
    "data": {
        "kind": str,  # "synthetic", or the kind of the corpus
        "description": str,
        "noise": str,
        "snr_db": [Real],
        **dict.fromkeys(("train", "dev", "test"), _SPLIT),
    },
    "missing": [str],  # packages: their scores are NaN
    "noisy": _SCORES,  # of the test set as it came
    "teacher": {**_SYSTEM, "steps": Integral, "config": object},
    "hybrids": [
        {**_SYSTEM, **_REPLACED, "delta_vs_teacher": {"difference": Real, "ci": (Real, Real)}}
    ],
    "controls": [{"name": str, **_SYSTEM, **_REPLACED}],
}


def write_enhancement_report(workdir: Path, report: Mapping[str, Any]) -> None:
    """Write report.json and report.md into `workdir`; report.md links every PNG below it.

    A value that is not finite is null in the JSON and n/a, or "not installed", in the text.

    Raises:
        InputError: a key of `ENHANCEMENT_SCHEMA` is missing, or a value has another type.
    """
    _validate(report, ENHANCEMENT_SCHEMA, "report")
    text = json.dumps(_plain(report), indent=2, ensure_ascii=False, allow_nan=False)
    (workdir / "report.json").write_text(text + "\n", encoding="utf-8")
    images = [path.relative_to(workdir) for path in sorted(workdir.rglob("*.png"))]
    (workdir / "report.md").write_text(_render(report, images), encoding="utf-8")


def _render(report: Mapping[str, Any], images: Sequence[Path]) -> str:
    data, teacher, missing = report["data"], report["teacher"], report["missing"]
    mark = " (synthetic data)" if data["kind"] == "synthetic" else ""

    def score(row: Mapping[str, Any], metric: str, form: str) -> str:
        if OPTIONAL[metric] in missing:
            return "not installed"
        return format(row[metric], form) if row[metric] == row[metric] else "n/a"

    def scores(row: Mapping[str, Any]) -> list[str]:
        improvement = f"{row['improvement']:.2f}"
        return [
            *(f"{row['si_snr']:.2f}", improvement, _interval(row["ci"])),
            *(score(row, "pesq", ".2f"), score(row, "stoi", ".3f")),
        ]

    def system(row: Mapping[str, Any]) -> list[Any]:
        return [row["replaced"], _join(row["layers"]), *scores(row), f"{row['parameters']:,}"]

    header = ["replaced", "layers", "SI-SNR, dB", "SI-SNRi, dB", "95 % CI", "PESQ", "STOI"]
    header.append("parameters")
    deltas = [row["delta_vs_teacher"] for row in report["hybrids"]]
    blocks = [
        f"# Report of an enhancement experiment: {report['title']}",
        *(
            [
                f"**Synthetic data: {data['description']}.** The numbers compare systems on this data only and are no "
                "result on recorded speech."
            ]
            if mark
            else []
        ),
        f"Date: {report['date']}. Data: {data['kind']}, noise: {data['noise']}, at {_join(data['snr_db'])} dB. Layers "
        "are the intra-chunk ones, numbered from 1. SI-SNRi is the improvement of SI-SNR over the noisy audio; scores "
        "are means over utterances, intervals 95 % bootstraps over them. The audio is in `audio/`.",
        *(
            [f"Not installed: {_join(missing)}; `pip install 'edgespeech[enhancement]'`."]
            if missing
            else []
        ),
        f"```\n{report['command']}\n```",
        "## Scores",
        _table(
            f"Scores for every number of replaced layers{mark}",
            [*header, "SI-SNRi - teacher", "95 % CI of the difference"],
            [
                ["", "none (noisy audio)", *scores(report["noisy"]), "", "", ""],
                ["0", "none (teacher)", *scores(teacher), f"{teacher['parameters']:,}", "", ""],
                *(
                    [*system(row), f"{delta['difference']:+.2f}", _interval(delta["ci"])]
                    for row, delta in zip(report["hybrids"], deltas, strict=True)
                ),
            ],
        ),
        _table(
            f"Controls on the same test set{mark}",
            ["control", *header],
            [[row["name"], *system(row)] for row in report["controls"]],
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
                [
                    *(split, f"{data[split]['utterances']:,}", f"{data[split]['hours']:.2f}"),
                    f"{data[split]['speakers']:,}",
                ]
                for split in ("train", "dev", "test")
            ],
        ),
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
                f"- Teacher's config: `{_json(teacher['config'])}`, {teacher['steps']:,} steps",
                *(f"- {note}" for note in report["notes"]),
            ]
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def _interval(ci: Sequence[float]) -> str:
    return f"[{ci[0]:.2f}, {ci[1]:.2f}]"
