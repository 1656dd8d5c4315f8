"""The report of an experiment on the edge Conformer: report.json for programs, report.md for people.

Rates are fractions in the JSON and percent in the text. Chunks are in frames of 40 ms; a size of None is full context.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgespeech.evaluation.report_text import (
    data_section,
    image_links,
    interval,
    json_text,
    number,
    pairs,
    percent,
    points,
    run_section,
    synthetic_mark,
    synthetic_warning,
    table,
    write_files,
)


def write_edge_report(workdir: str | Path, report: Mapping[str, Any]) -> None:
    """Write report.json and report.md into `workdir`; report.md links every PNG below it.

    Args:
        workdir: exists.
        report: title, command, date, data (as of `asr.data_facts`), matrix (rows with size, left, wer, ci), streaming
            (wer of both, different, utterances, chunk, left), float16 (the same), models (name, parameters,
            macs_per_second, state_bytes, real_time_factor, wer, ci, difference and its interval from the first,
            config), stages, versions, device, seeds, notes.
    """
    write_files(workdir, report, _render)


def _render(report: Mapping[str, Any], images: Sequence[Path]) -> str:
    data, models = report["data"], report["models"]
    mark = synthetic_mark(data)
    blocks = [
        f"# Report of an experiment on the edge Conformer: {report['title']}",
        *synthetic_warning(data),
        f"Date: {report['date']}. Data: {data['kind']}. Chunks are in frames of 40 ms. Intervals are 95 % bootstraps "
        f"over utterances. All is of {data['test']['name']}.",
        f"```\n{report['command']}\n```",
        "## One model, every latency",
        "Trained with chunk size and left context drawn anew at every step. A column's left context is in chunks.",
        _matrix(report["matrix"], mark),
        "## The same parameters, run otherwise",
        _pairs_table(report, mark),
        "## Models at equal settings",
        f"Streaming in chunks of {report['streaming']['chunk']} frames, {report['streaming']['left']} chunks of left "
        "context; real-time factor of one stream with its host work, on the device below.",
        _models(models, mark),
        *image_links(images, mark),
        *data_section(data, mark),
        f"Skipped: {pairs(data['skipped'])}. Padding: {percent(data['padding_waste'])} of the frames.",
        *run_section(report, mark, [f"{m['name']}: `{json_text(m['config'])}`" for m in models]),
    ]
    return "\n\n".join(blocks) + "\n"


def _matrix(rows: Sequence[Mapping[str, Any]], mark: str) -> str:
    limited = [row for row in rows if row["size"] is not None]
    lefts = sorted({row["left"] for row in limited})
    cells = {(row["size"], row["left"]): row for row in limited}

    def cell(row: Mapping[str, Any]) -> str:
        return f"{percent(row['wer'])} {interval(row['ci'])}"

    lines = [
        [size, *(cell(cells[size, left]) for left in lefts)]
        for size in sorted({row["size"] for row in limited})
    ]
    lines += [
        ["full context", cell(row), *[""] * (len(lefts) - 1)] for row in rows if row["size"] is None
    ]
    return table(f"WER by chunk size and left context{mark}", ["chunk", *map(str, lefts)], lines)


def _pairs_table(report: Mapping[str, Any], mark: str) -> str:
    names = {"streaming": "whole against streamed", "float16": "float32 against float16"}
    rows = [
        [
            text,
            *map(percent, report[key]["wer"]),
            f"{report[key]['different']} of {report[key]['utterances']}",
        ]
        for key, text in names.items()
    ]
    header = ["", "WER of the one", "WER of the other", "texts that differ"]
    return table(f"Equal parameters, equal mask{mark}", header, rows)


def _models(models: Sequence[Mapping[str, Any]], mark: str) -> str:
    header = [
        "model",
        "WER",
        "95 % CI",
        "difference",
        "95 % CI",
        "parameters",
        "MMAC/s",
        "state, kB",
        "real-time factor",
    ]
    rows = [
        [
            m["name"],
            percent(m["wer"]),
            interval(m["ci"]),
            points(m["difference"]),
            interval(m["difference_ci"], points),
            f"{m['parameters']:,}",
            f"{m['macs_per_second'] / 1e6:.0f}",
            f"{m['state_bytes'] / 1e3:.1f}",
            number(m["real_time_factor"]),
        ]
        for m in models
    ]
    return table(f"Differences from {models[0]['name']} in percentage points{mark}", header, rows)
