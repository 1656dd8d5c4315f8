"""The report of an experiment on exits: report.json for programs, report.md for people.

Rates and costs are fractions in the JSON and percent in the text. Exits and layers are numbered from 1.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgespeech.evaluation.report_text import (
    data_section,
    further_splits,
    image_links,
    interval,
    json_text,
    pairs,
    percent,
    points,
    run_section,
    synthetic_mark,
    synthetic_warning,
    table,
    write_files,
)


def write_exit_report(workdir: str | Path, report: Mapping[str, Any]) -> None:
    """Write report.json and report.md into `workdir`; report.md links every PNG below it.

    Args:
        workdir: exists.
        report: title, command, date, data (as of `asr.data_facts`), models (name, structure, parameters, steps, config,
            and what `exit_curves.analyse` gives, with `ci`, `cer` and further `splits` in every exit), differences (of
            the models from the first one, by exit), stages, versions, device, seeds, notes.
    """
    write_files(workdir, report, _render)


def _render(report: Mapping[str, Any], images: Sequence[Path]) -> str:
    data = report["data"]
    mark = synthetic_mark(data)
    first = data["test"]["name"]
    blocks = [
        f"# Report of an experiment on exits: {report['title']}",
        *synthetic_warning(data),
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
        "(fixed - rule) / (fixed - oracle). For the best fixed exit on dev: in WER at its compute, and in compute at "
        "its WER; over all budgets: in WER, numerator and denominator each summed over the compute of every fixed "
        "exit. The oracle knows the references and spends no more (no WER higher) than the fixed exit.",
        *(_gaps(model, mark) for model in report["models"]),
        *image_links(images, mark),
        *data_section(data, mark),
        f"Skipped: {pairs(data['skipped'])}. Padding: {percent(data['padding_waste'])} of the frames.",
        *run_section(
            report, mark, [f"{m['name']}: `{json_text(m['config'])}`" for m in report["models"]]
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def _exits(model: Mapping[str, Any], mark: str) -> str:
    further = list(further_splits(model["exits"][0]))
    header = ["exit", "layer", "WER", "95 % CI", "CER"]
    header += [title for name in further for title in (f"WER, {name}", f"95 % CI, {name}")]
    rows = []
    for row in model["exits"]:
        cells = [row["exit"], row["layer"], percent(row["wer"]), interval(row["ci"])]
        cells.append(percent(row["cer"]))
        for name in further:
            cells += [percent(row["splits"][name]["wer"]), interval(row["splits"][name]["ci"])]
        rows.append([*cells, _million(row), percent(row["cost"])])
    caption = (
        f"{model['name']} ({model['structure']}), {model['parameters']:,} parameters, "
        f"{model['steps']:,} steps{mark}"
    )
    return table(caption, [*header, "million MAC/s of audio", "of the last exit's"], rows)


def _differences(report: Mapping[str, Any], mark: str) -> str:
    return table(
        f"WER less that of {report['models'][0]['name']}, same exit{mark}",
        ["model", "exit", "difference", "95 % CI"],
        [
            [row["model"], row["exit"], points(row["difference"]), interval(row["ci"], points)]
            for row in report["differences"]
        ],
    )


def _rules(model: Mapping[str, Any], mark: str) -> str:
    rows = []
    for exit in model["exits"]:
        cells = [exit["exit"], f"{percent(exit['cost'])}", percent(exit["wer"])]
        for curve in model["curves"].values():
            row = next(row for row in curve if row["budget"] == exit["dev_cost"])
            cells.append(f"{percent(row['wer'])} at {percent(row['cost'])}")
        within = [row for row in model["oracle"] if row["cost"] <= exit["cost"] + 1e-12]
        best = min(within, key=lambda row: (row["wer"], row["cost"]))
        cells.append(f"{percent(best['wer'])} at {percent(best['cost'])}")
        rows.append(cells)
    header = ["exit", "compute", "fixed", *(rule.replace("_", " ") for rule in model["curves"])]
    return table(f"{model['name']}: WER within a budget{mark}", [*header, "oracle"], rows)


def _gaps(model: Mapping[str, Any], mark: str) -> str:
    fixed = model["exits"][model["best_fixed"] - 1]
    rows = []
    for rule, gap in model["gaps"].items():
        wer, cost = gap["equal_compute"], gap["equal_wer"]
        rows.append(
            [
                rule.replace("_", " "),
                f"{percent(wer['wer'])} at {percent(wer['cost'])}",
                f"{points(wer['difference'])} {interval(wer['ci'], points)}",
                _share(wer["closed"]),
                _share(gap["all_budgets"]["closed"]),
                *(
                    [f"{percent(cost['wer'])} at {percent(cost['cost'])}", _share(cost["closed"])]
                    if cost
                    else ["out of reach on dev", ""]
                ),
            ]
        )
    caption = (
        f"{model['name']}: best fixed exit {fixed['exit']}, WER {percent(fixed['wer'])} at "
        f"{percent(fixed['cost'])} of the compute{mark}"
    )
    header = ["rule", "at its compute", "WER - fixed", "WER gap closed", "over all budgets"]
    closed = {rule: gap["equal_compute"]["closed"] for rule, gap in model["gaps"].items()}
    halves = [rule.replace("_", " ") for rule, share in closed.items() if (share or 0.0) >= 0.5]
    verdict = f"At least half of the WER gap at its compute is closed by: {', '.join(halves) or 'no rule'}."
    if None in closed.values():  # of the oracle and the fixed exit: the same for all rules
        verdict = "There is no WER gap at its compute."
    return f"{table(caption, [*header, 'at its WER', 'compute gap closed'], rows)}\n\n{verdict}"


def _million(row: Mapping[str, Any]) -> str:
    return f"{row['macs_per_second'] / 1e6:.1f}"


def _share(value: float | None) -> str:
    return "no gap" if value is None else f"{100 * value:.0f} %"
