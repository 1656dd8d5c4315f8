"""What the latency program prints."""

from collections.abc import Sequence
from typing import Any

from edgespeech.evaluation.latency import OURS, real_time_factor
from edgespeech.evaluation.latency_peers import PEERS


def render(result: dict, notes: Sequence[str]) -> str:
    """The tables for the terminal."""
    rows, found, machine = result["results"], result["ratios"], result["device"]
    peers = [name for name in PEERS if found.get(f"vs_{name}")]
    blocks = [
        f"Latency of {rows[0]['model']}: batch 1, float32, {result['threads']} threads, {machine['cpu']}, "
        f"jax {result['versions']['jax']}, {result['date']}",
        table(
            "Time and memory (median of the rounds, IQR = interquartile range, RTF = time / duration)",
            ["implementation", "replaced", "seconds", "median ms", "IQR ms", "RTF", "peak MB"],
            [
                [
                    *(row["implementation"], row["replaced"], f"{row['seconds']:g}"),
                    *(f"{row['median_ms']:.1f}", f"{row['spread_ms']:.1f}"),
                    f"{real_time_factor(row['median_ms'], row['seconds']):.4f}",
                    "n/a" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
                ]
                for row in rows
            ],
        ),
        per_second_table(rows),
        *([parts_table(rows)] if rows[0]["parts_ms"] else []),
        table(
            f"Like for like: {OURS} with 0 layers replaced over {OURS} with N, and the Amdahl bound from the parts",
            ["replaced", "seconds", "times faster", "bound", "share of the bound"],
            [
                [count, s, f"{ratio:.2f}", *bound_cells(ratio, found["amdahl_bound"], s, count)]
                for s, by_count in found["like_for_like"].items()
                for count, ratio in by_count.items()
            ],
        ),
        table(
            f"Against other implementations, whose framework and kernels differ: theirs over {OURS}",
            ["replaced", "seconds", *peers],
            [
                [count, s, *(f"{found[f'vs_{name}'][s][count]:.2f}" for name in peers)]
                for s in (found[f"vs_{peers[0]}"] if peers else ())
                for count in found[f"vs_{peers[0]}"][s]
            ],
        ),
        *(f"note: {note}" for note in notes),
    ]
    return "\n\n".join(blocks)


def render_exits(result: dict) -> str:
    """The tables of a model with exits for the terminal."""
    machine = result["device"]
    return "\n\n".join(
        [
            f"Exits of {result['exits'][0]['model']}: batch 1, float32, rule {result['rule']}, "
            f"{result['threads']} threads, {machine['cpu']}, jax {result['versions']['jax']}, {result['date']}",
            table(
                "Segment by segment up to an exit, the same as one program, and the sum of the parts on the way",
                [
                    *("seconds", "exit", "ms", "one program, ms", "parts, ms", "ms / parts"),
                    *("of whole", "looking ahead, ms", "MACs it wastes"),
                ],
                [
                    [
                        *(f"{row['seconds']:g}", row["exit"], f"{row['median_ms']:.1f}"),
                        *(f"{row['single_ms']:.1f}", f"{row['parts_ms']:.1f}"),
                        f"{row['overhead']:.3f}",
                        f"{row['median_ms'] / row['whole_ms']:.1%}",
                        *(f"{row['lookahead_ms']:.1f}", f"{row['lookahead_waste']:.1%}"),
                    ]
                    for row in result["exits"]
                ],
            ),
            table(
                "Full depth segment by segment over the whole model as one program, without and with the rule's scores",
                ["seconds", "over whole", "over scored", "ahead / whole", "ahead / scored"],
                [
                    [s, *(f"{ratio:.3f}" for ratio in ratios.values())]
                    for s, ratios in result["full_depth"].items()
                ],
            ),
            table(
                "Blocks with a branch: layers and branch alone, and both (hidden: share of the branch's time)",
                [
                    "seconds",
                    "exit",
                    "layers",
                    "branch",
                    "sequential",
                    "hidden",
                    "batched",
                    "sharded",
                ],
                [
                    [
                        *(f"{row['seconds']:g}", row["exit"], f"{row['layers_ms']:.2f}"),
                        *(f"{row['branch_ms']:.2f}", f"{row['sequential_ms']:.2f}"),
                        *(f"{row['hidden']:.0%}", f"{row['batched_ms']:.2f}"),
                        "1 device" if row["sharded_ms"] is None else f"{row['sharded_ms']:.2f}",
                    ]
                    for row in result["branches"]
                ],
            ),
        ]
    )


def render_streams(result: dict) -> str:
    """The table of a streaming model for the terminal."""
    machine, rows = result["device"], result["streaming"]
    return "\n\n".join(
        [
            f"Streaming of {rows[0]['model']}: {rows[0]['streams']} streams, chunks of {rows[0]['chunk_seconds']:g} s, "
            f"float32, {result['threads']} threads, {machine['cpu']}, jax {result['versions']['jax']}, "
            f"{result['date']}",
            table(
                "Time of a chunk (IQR = interquartile range), longest wait for a word, memory of a stream",
                [
                    "mixer",
                    "parameters",
                    "ms",
                    "IQR ms",
                    "slowest ms",
                    "RTF",
                    "wait, s",
                    "state, kB",
                ],
                [
                    [
                        *(row["mixer"], f"{row['parameters']:,}", f"{row['median_ms']:.1f}"),
                        *(f"{row['spread_ms']:.1f}", f"{row['slowest_ms']:.1f}"),
                        f"{row['real_time_factor']:.4f}",
                        *(f"{row['wait_seconds']:.2f}", f"{row['state_bytes'] / 1e3:.0f}"),
                    ]
                    for row in rows
                ],
            ),
        ]
    )


def bound_cells(ratio: float, bounds: dict, seconds: str, count: str) -> list[str]:
    """The bound and the share of it that a ratio reaches."""
    if not bounds:
        return ["n/a", "n/a"]
    bound = bounds[seconds][count]
    return [f"{bound:.2f}", f"{ratio / bound:.1%}"]


def per_second_table(rows: Sequence[dict]) -> str:
    """A model that is linear in the length has the same number in every column."""
    lengths = sorted({row["seconds"] for row in rows})
    per_second = {
        (row["implementation"], row["replaced"], row["seconds"]): row["median_ms"] / row["seconds"]
        for row in rows
    }
    return table(
        "Milliseconds per second of audio, by length",
        ["implementation", "replaced", *(f"{s:g} s" for s in lengths)],
        [
            [*model, *(f"{per_second[(*model, s)]:.2f}" for s in lengths)]
            for model in dict.fromkeys(name[:2] for name in per_second)
        ],
    )


def parts_table(rows: Sequence[dict]) -> str:
    """Milliseconds per part, and how much of the whole model's time the parts explain."""
    ours = [row for row in rows if row["implementation"] == OURS]
    parts = list(ours[0]["parts_ms"])
    return table(
        f"Parts of {OURS} in ms, each compiled and timed on its own",
        ["replaced", "seconds", *parts, "sum / whole"],
        [
            [
                *(row["replaced"], f"{row['seconds']:g}"),
                *(f"{row['parts_ms'][part]:.1f}" for part in parts),
                f"{sum(row['parts_ms'].values()) / row['median_ms']:.1%}",
            ]
            for row in ours
        ],
    )


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A title and columns aligned to the right."""
    if not rows:
        return f"{title}: none"
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )
    return "\n".join([title, *lines])
