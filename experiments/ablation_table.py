"""The table of an ablation: what launch.sweep has finished, compared with the default row and the teacher."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgespeech.data.corpus import write_atomically
from edgespeech.errors import InputError
from edgespeech.evaluation.report_text import (
    data_section,
    device_text,
    interval,
    join,
    pairs,
    percent,
    plain,
    points,
    synthetic_mark,
    synthetic_warning,
    table,
)
from edgespeech.evaluation.wer import bootstrap_interval

DEFAULT = "default"  # the row that the others are compared with


class Run(NamedTuple):
    """One model of one run.

    Attributes:
        row: of the run's report.
        errors: word errors of every test utterance, in the order of their ids.
        words: of its references.
    """

    row: Mapping[str, Any]
    errors: np.ndarray
    words: np.ndarray


Models = dict[tuple[int, str], dict[int, Run]]  # (replaced layers, name): seed: run


class Found(NamedTuple):
    """What the finished runs of a sweep hold.

    Attributes:
        reports: of the runs, by row and seed.
        models: hybrids under their row's name, controls under their own.
        teachers: the teacher's runs by seed, which are all alike.
        missing: rows without a finished run, with their states.
    """

    reports: dict[tuple[str, int], dict]
    models: Models
    teachers: dict[int, Run]
    missing: dict[str, str]


def read_sweep(workdir: Path) -> Found:
    """Everything that launch.sweep has finished in a folder.

    Raises:
        InputError: there is no sweep, or no finished default row.
    """
    try:
        sweep = json.loads((workdir / "sweep.json").read_text())
    except FileNotFoundError:
        raise InputError(
            f"{workdir} holds no sweep.json: add --plan to write rows, and run them with launch.sweep"
        ) from None
    reports: dict[tuple[str, int], dict] = {}
    models: Models = {}
    teachers: dict[int, Run] = {}
    states: dict[str, str] = {}
    for trial in sweep["trials"]:
        name = trial["name"].split(",")[0]
        if trial["state"] != "finished":
            states[name] = trial["state"]
            continue
        folder = workdir / "trials" / trial["name"]
        report = json.loads((folder / "report.json").read_text())
        seed = report["seeds"]["seed"]
        reports[name, seed] = report
        teachers[seed] = _read_run(folder, "teacher", report["teacher"])
        for row in report["hybrids"]:
            key = row["replaced"], name
            models.setdefault(key, {})[seed] = _read_run(folder, f"lpa_{row['replaced']}", row)
        for row in report["controls"]:
            control = f"control: {row['name']}" + ("" if name == DEFAULT else f" ({name})")
            key = row["replaced"], control
            models.setdefault(key, {})[seed] = _read_run(folder, f"control_{row['name']}", row)
    if not any(name == DEFAULT for name, _ in reports):
        raise InputError(f"{workdir} has no finished row {DEFAULT!r} to compare the others with")
    done = {name for name, _ in reports}
    missing = {name: state for name, state in states.items() if name not in done}
    return Found(reports, models, teachers, missing)


def _read_run(folder: Path, name: str, row: Mapping[str, Any]) -> Run:
    lines = (folder / "hypotheses" / f"{name}.jsonl").read_text().splitlines()
    rows = sorted((json.loads(line) for line in lines), key=lambda line: line["id"])
    errors, words = (np.array([line[key] for line in rows]) for key in ("errors", "words"))
    return Run(row, errors, words)


def mean_over_seeds(runs: Mapping[int, Run], others: Mapping[int, Run] | None = None) -> dict:
    """WER over all seeds of a model, or how much it is above another's, with an interval.

        sum_s sum_i (errors_si - other_si) / sum_s sum_i words_i

    The bootstrap draws utterances, each with its errors of all seeds: the interval says what another test set of this
    kind might give, and not what other seeds might.

    Args:
        runs: by seed.
        others: of the other model, which are paired by seed; None: there is no other.

    Raises:
        InputError: the runs have not been scored on the same utterances, or no seed is in both.
    """
    seeds = sorted(runs.keys() & (runs if others is None else others).keys())
    if not seeds:
        raise InputError("two rows have no seed in common: run both with the same seeds")
    words = runs[seeds[0]].words
    used = [model[seed] for model in (runs, others or {}) for seed in seeds if seed in model]
    if any(not np.array_equal(one.words, words) for one in used):
        raise InputError(
            "the rows were scored on different utterances: give all the same test set; synthetic voices change with "
            "the seed, so run those with one seed"
        )
    errors = np.sum([runs[seed].errors for seed in seeds], axis=0)
    if others is not None:
        errors = errors - np.sum([others[seed].errors for seed in seeds], axis=0)
    words = len(seeds) * words
    return {
        "value": int(errors.sum()) / int(words.sum()),
        "ci": list(bootstrap_interval(errors, words)),
        "seeds": seeds,
    }


def ablation(found: Found) -> dict[str, Any]:
    """The content of ablation.json."""
    base = next(report for (name, _), report in found.reports.items() if name == DEFAULT)
    rows = []
    for (count, name), runs in sorted(found.models.items(), key=lambda item: item[0][0]):
        default = found.models.get((count, DEFAULT))
        whole = mean_over_seeds(runs)
        first = runs[whole["seeds"][0]].row
        wers = [runs[seed].row["wer"] for seed in whole["seeds"]]
        own = next((r for (row, _), r in found.reports.items() if row == name), None)
        rows.append(
            {
                "name": name,
                "replaced": count,
                "layers": {seed: runs[seed].row["layers"] for seed in whole["seeds"]},
                "wer": whole["value"],
                "ci": whole["ci"],
                "seeds": whole["seeds"],
                "seed_wers": wers,
                "standard_deviation": statistics.stdev(wers) if len(wers) > 1 else None,
                "vs_default": None
                if default is None or name == DEFAULT
                else mean_over_seeds(runs, default),
                "vs_teacher": mean_over_seeds(runs, found.teachers),
                "updates": first["updates"],
                "trained_parameters": first["trained_parameters"],
                "parameters": first["parameters"],
                "command": own["command"] if own else None,
            }
        )
    teacher = mean_over_seeds(found.teachers)
    reports = found.reports.values()
    return {
        "data": base["data"],
        "teacher": {"wer": teacher["value"], "ci": teacher["ci"]}
        | {"parameters": base["teacher"]["parameters"]},
        "rows": rows,
        "missing": found.missing,
        "dates": sorted({report["date"] for report in reports}),
        "devices": sorted({device_text(report["device"]) for report in reports}),
        "versions": sorted({pairs(report["versions"]) for report in reports}),
    }


def write_tables(workdir: Path) -> Path:
    """Writes ablation.json and ablation.md, and returns the path of the latter."""
    content = plain(ablation(read_sweep(workdir)))
    files = {
        "ablation.json": json.dumps(content, indent=2, ensure_ascii=False) + "\n",
        "ablation.md": render(content),
    }
    for name, text in files.items():
        write_atomically(workdir / name, lambda file, text=text: file.write(text.encode()))
    return workdir / "ablation.md"


def render(content: Mapping[str, Any]) -> str:
    """The text of ablation.md."""
    data, teacher, rows = content["data"], content["teacher"], content["rows"]
    mark = synthetic_mark(data)
    header = ["row", "WER", "95 % CI", "SD over seeds", "- default", "95 % CI", "- teacher"]
    header += ["95 % CI", "trained parameters", "updates"]
    blocks = [
        "# Ablation of LPA",
        *synthetic_warning(data),
        f"Date: {join(content['dates'])}. Each row changes one thing of the row `{DEFAULT}`; controls are other mixers "
        "in LPA's place, in the same layers with the same updates. Differences are in percentage points, paired by "
        "utterance and seed. Intervals are 95 % bootstraps over utterances of the mean over seeds: they do not say "
        "what other seeds would give; the standard deviation (SD) over seeds does.",
        f"Teacher{mark}: WER **{percent(teacher['wer'])}**, 95 % CI {interval(teacher['ci'])}, "
        f"{teacher['parameters']:,} parameters.",
    ]
    for count in sorted({row["replaced"] for row in rows}):
        group = [row for row in rows if row["replaced"] == count]
        blocks += [
            f"## {count} layers replaced",
            table(f"WER with {count} layers replaced{mark}", header, [_line(row) for row in group]),
        ]
        budget = next((row["updates"] for row in group if row["name"] == DEFAULT), None)
        unequal = [row["name"] for row in group if budget and row["updates"] != budget]
        if unequal:
            blocks.append(f"Not at the default's {budget:,} updates: {join(unequal)}.")
    if content["missing"]:
        blocks.append(f"Without a finished run: {pairs(content['missing'])}.")
    commands = {row["name"]: row["command"] for row in rows if row["command"]}
    blocks += [
        *data_section(data, mark),
        "## Run",
        "\n".join(
            [f"- Device: {device}" for device in content["devices"]]
            + [f"- Versions: {versions}" for versions in content["versions"]]
        ),
        "The command of each row, first seed:",
        "```\n" + "\n\n".join(f"# {name}\n{line}" for name, line in commands.items()) + "\n```",
    ]
    return "\n\n".join(blocks) + "\n"


def _line(row: Mapping[str, Any]) -> list[str]:
    def difference(part: Mapping[str, Any] | None) -> list[str]:
        return ["", ""] if part is None else [points(part["value"]), interval(part["ci"], points)]

    deviation, seeds = row["standard_deviation"], row["seeds"]
    return [
        row["name"],
        percent(row["wer"]),
        interval(row["ci"]),
        "one seed" if deviation is None else f"{100 * deviation:.2f} ({len(seeds)})",
        *difference(row["vs_default"]),
        *difference(row["vs_teacher"]),
        f"{row['trained_parameters']:,}",
        f"{row['updates']:,}",
    ]
