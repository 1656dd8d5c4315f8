"""The report of an enhancement experiment: report.json for programs, report.md for people; `report` has WER's."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from edgespeech.evaluation.enhancement import OPTIONAL
from edgespeech.evaluation.report import DELTA, REPLACED, SCHEMA, SPLIT
from edgespeech.evaluation.report_text import (
    data_section,
    image_links,
    join,
    json_text,
    run_section,
    sweep_section,
    synthetic_mark,
    synthetic_warning,
    table,
    write_files,
)
from edgespeech.evaluation.schema import validate

_SCORES = {"si_snr": Real, "improvement": Real, "ci": (Real, Real), "pesq": Real, "stoi": Real}
_SYSTEM = {**_SCORES, "parameters": Integral}

ENHANCEMENT_SCHEMA = {
    **{key: SCHEMA[key] for key in ("title", "command", "date", "sweep", "order", "stages")},
    **{key: SCHEMA[key] for key in ("versions", "device", "seeds", "notes")},
    "data": {
        "kind": str,  # "synthetic", or the kind of the corpus
        "description": str,
        "noise": str,
        "snr_db": [Real],
        **dict.fromkeys(("train", "dev", "test"), SPLIT),
    },
    "missing": [str],  # packages: their scores are NaN
    "noisy": _SCORES,  # of the test set as it came
    "teacher": {**_SYSTEM, "steps": Integral, "config": object},
    "hybrids": [{**_SYSTEM, **REPLACED, **DELTA}],
    "controls": [{"name": str, **_SYSTEM, **REPLACED}],
}


def write_enhancement_report(workdir: Path, report: Mapping[str, Any]) -> None:
    """Write report.json and report.md into `workdir`; report.md links every PNG below it.

    A value that is not finite is null in the JSON and n/a, or "not installed", in the text.

    Raises:
        InputError: a key of `ENHANCEMENT_SCHEMA` is missing, or a value has another type.
    """
    validate(report, ENHANCEMENT_SCHEMA, "report")
    write_files(workdir, report, _render)


def _render(report: Mapping[str, Any], images: Sequence[Path]) -> str:
    data, teacher, missing = report["data"], report["teacher"], report["missing"]
    mark = synthetic_mark(data)

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
        return [row["replaced"], join(row["layers"]), *scores(row), f"{row['parameters']:,}"]

    header = ["replaced", "layers", "SI-SNR, dB", "SI-SNRi, dB", "95 % CI", "PESQ", "STOI"]
    header.append("parameters")
    deltas = [row["delta_vs_teacher"] for row in report["hybrids"]]
    blocks = [
        f"# Report of an enhancement experiment: {report['title']}",
        *synthetic_warning(data),
        f"Date: {report['date']}. Data: {data['kind']}, noise: {data['noise']}, at {join(data['snr_db'])} dB. Layers "
        "are the intra-chunk ones, numbered from 1. SI-SNRi is the improvement of SI-SNR over the noisy audio; scores "
        "are means over utterances, intervals 95 % bootstraps over them. The audio is in `audio/`.",
        *(
            [f"Not installed: {join(missing)}; `pip install 'edgespeech[enhancement]'`."]
            if missing
            else []
        ),
        f"```\n{report['command']}\n```",
        "## Scores",
        table(
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
        table(
            f"Controls on the same test set{mark}",
            ["control", *header],
            [[row["name"], *system(row)] for row in report["controls"]],
        ),
        *sweep_section(report, mark),
        *image_links(images, mark),
        *data_section(data, mark),
        *run_section(
            report,
            mark,
            [f"Teacher's config: `{json_text(teacher['config'])}`, {teacher['steps']:,} steps"],
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def _interval(ci: Sequence[float]) -> str:
    return f"[{ci[0]:.2f}, {ci[1]:.2f}]"
