"""The table of pulses and boundaries: report.json for programs, report.md for people.

Times are in seconds in the JSON and in milliseconds in the text. Layers and heads are numbered from 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgespeech.evaluation.boundaries import (
    DRAWS,
    agreement,
    even_agreement,
    pulse_edges,
    random_agreement,
)
from edgespeech.evaluation.report_text import (
    device_text,
    image_links,
    pairs,
    percent,
    synthetic_mark,
    synthetic_warning,
    table,
    write_files,
)
from edgespeech.inference.words import Word

TOLERANCES = (0.02, 0.04, 0.08)  # seconds
_RANKED = ("words", "0.04")  # by what heads are ranked


class Heard(NamedTuple):
    """One utterance.

    Attributes:
        index: its row in the corpus.
        words: of the alignment.
        boundaries: of `words` and of `tokens`, seconds, ascending.
        frames: of the hybrid.
        gates: boolean `[h p n]` by layer and kind of pulse.
    """

    index: int
    words: list[Word]
    boundaries: dict[str, np.ndarray]
    frames: int
    gates: dict[tuple[int, str], np.ndarray]


def edge_rows(utterances: Sequence[Heard], frame_seconds: float) -> list[dict[str, Any]]:
    """The agreement of edges with boundaries for every layer and kind of pulse: all heads together, then each head.

    A row has `layer`, `kind`, `head` (None: all), `edges` and, for `words` and `tokens` and each of `TOLERANCES`,
    precision, recall and F1 beside those of the two baselines.
    """
    rows = []
    for layer, kind in utterances[0].gates:
        gates = [u.gates[layer, kind] for u in utterances]
        heads = [None, *range(len(gates[0]))]
        for head in heads:
            chosen = [g.reshape(-1, g.shape[-1]) if head is None else g[head] for g in gates]
            edges = [pulse_edges(g) for g in chosen]
            rows.append(
                {
                    "layer": layer,
                    "kind": kind,
                    "head": None if head is None else head + 1,
                    "edges": sum(map(len, edges)),
                    **dict(_agreements(utterances, edges, frame_seconds)),
                }
            )
    return rows


def _agreements(
    utterances: Sequence[Heard], edges: Sequence[np.ndarray], frame_seconds: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    found = [frame_seconds * e for e in edges]
    baseline = [len(e) for e in edges], [u.frames for u in utterances], frame_seconds
    for kind in ("words", "tokens"):
        references = [u.boundaries[kind] for u in utterances]
        yield (
            kind,
            {
                f"{tolerance:g}": {
                    "pulses": agreement(references, found, tolerance)._asdict(),
                    "random": random_agreement(references, *baseline, tolerance)._asdict(),
                    "even": even_agreement(references, *baseline, tolerance)._asdict(),
                }
                for tolerance in TOLERANCES
            },
        )


def gain(row: Mapping[str, Any]) -> float:
    """F1 above that of random edges, against words at 40 ms: by this the best head of a layer is found."""
    kind, tolerance = _RANKED
    return row[kind][tolerance]["pulses"]["f1"] - row[kind][tolerance]["random"]["f1"]


def write_boundary_report(folder: str | Path, report: Mapping[str, Any]) -> None:
    """Writes report.json and report.md into a folder; report.md links every PNG below it.

    Args:
        folder: made when missing.
        report: title, command, date, checkpoint and aligner (path, frame_seconds), data (kind, description, split,
            sizes), skipped, boundaries (number of each kind), edges (see `edge_rows`), widths, periods, versions,
            device.
    """
    write_files(folder, report, _render)


def _render(report: Mapping[str, Any], images: Sequence[Path]) -> str:
    data, hours = report["data"], report["data"]["hours"]
    mark = synthetic_mark(data)
    counts = report["boundaries"]
    frames = {part: 1000 * report[part]["frame_seconds"] for part in ("checkpoint", "aligner")}
    blocks = [
        f"# Pulses and boundaries: {report['title']}",
        *synthetic_warning(data),
        f"Date: {report['date']}. {data['utterances']} utterances of {data['split']}, {60 * hours:.1f} min: "
        f"{counts['words']:,} word and {counts['tokens']:,} token boundaries by forced alignment with "
        f"{report['aligner']['path']} (frames of {frames['aligner']:g} ms); the hybrid's frames are "
        f"{frames['checkpoint']:g} ms. F1 in percent at three tolerances, and in brackets that of as many edges in "
        f"random places (mean of {DRAWS} draws) and at equal distances. An edge pairs with one boundary at most. The "
        "best head is the one furthest above random on words at 40 ms, chosen on this very data: its figure is a "
        "little high.",
        f"```\n{report['command']}\n```",
    ]
    for kind in ("words", "tokens"):
        header = ["layer", "pulses", "heads", "edges a second"]
        header += [f"F1 at {1000 * tolerance:g} ms" for tolerance in report["tolerances"]]
        blocks += [
            f"## Boundaries of {kind}",
            table(
                f"F1 of pulse edges against {kind}{mark}: pulses (random, even)",
                header,
                [_line(row, kind, hours) for row in _shown(report["edges"])],
            ),
        ]
    blocks += [
        "## Widths",
        table(
            f"Length of a pulse, ms{mark}",
            ["layer", "pulses", "number", "10 %", "median", "90 %"],
            [
                [row["layer"], row["kind"], f"{row['pulses']:,}"]
                + [f"{1000 * row[share]:.0f}" for share in ("p10", "p50", "p90")]
                for row in report["widths"]
            ],
        ),
        "## Periods",
        "Periods are set when a mixer is made, log-spaced; what is learned is how much of each period is open (duty), "
        "where it begins, and the weight alpha. The share is of the sum of |alpha| over all pulses of the layer.",
        table(
            "The three periodic pulses of the largest weight in each layer",
            ["layer", "share of all periodic pulses", "period, ms: duty, share"],
            [
                [
                    row["layer"],
                    percent(row["share"]),
                    "; ".join(
                        f"{1000 * p['seconds']:.0f}: {p['duty']:.2f}, {percent(p['share'])}"
                        for p in row["pulses"][:3]
                    ),
                ]
                for row in report["periods"]
            ],
        ),
        *image_links(images, mark),
        "## Run",
        f"- Device: {device_text(report['device'])}\n- Versions: {pairs(report['versions'])}\n"
        f"- Skipped: {pairs(report['skipped'])}",
    ]
    return "\n\n".join(blocks) + "\n"


def _shown(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """All heads together of every layer and kind, and after them the best head."""
    for together in (row for row in rows if row["head"] is None):
        same = (together["layer"], together["kind"])
        heads = [r for r in rows if (r["layer"], r["kind"]) == same and r["head"] is not None]
        yield together
        yield max(heads, key=gain)


def _line(row: Mapping[str, Any], kind: str, hours: float) -> list[str]:
    cells = [
        " ".join(
            [
                f"**{100 * part['pulses']['f1']:.1f}**",
                f"({100 * part['random']['f1']:.1f}, {100 * part['even']['f1']:.1f})",
            ]
        )
        for part in row[kind].values()
    ]
    heads = "all" if row["head"] is None else f"best: {row['head']}"
    return [str(row["layer"]), row["kind"], heads, f"{row['edges'] / (3600 * hours):.1f}", *cells]
