"""The parts that every report.md is made of, and how report.json and report.md are written."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

Render = Callable[[Mapping[str, Any], Sequence[Path]], str]


def write_files(workdir: str | Path, report: Mapping[str, Any], render: Render) -> None:
    """Writes report.json and report.md; a value that is not finite is null in the JSON.

    Args:
        workdir: made when missing.
        report: JSON but for NumPy scalars, tuples and what becomes a string.
        render: report and the PNGs below workdir, relative to it, to the text.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(report), indent=2, ensure_ascii=False, allow_nan=False)
    (workdir / "report.json").write_text(text + "\n", encoding="utf-8")
    images = [path.relative_to(workdir) for path in sorted(workdir.rglob("*.png"))]
    (workdir / "report.md").write_text(render(report, images), encoding="utf-8")


def plain(value: Any) -> Any:
    """Copy with Python's own types: NumPy scalars and tuples converted, not finite to None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)  # such as a dtype, a path or an enum in a config


def synthetic_mark(data: Mapping[str, Any]) -> str:
    """What stands beside every number on synthetic data."""
    return " (synthetic data)" if data["kind"] == "synthetic" else ""


def synthetic_warning(data: Mapping[str, Any]) -> list[str]:
    """The paragraph about synthetic data, where it is."""
    if data["kind"] != "synthetic":
        return []
    return [
        f"**Synthetic data: {data['description'].rstrip('.')}.** The numbers compare systems on this data only and are "
        "no result on recorded speech."
    ]


def image_links(images: Sequence[Path], mark: str) -> list[str]:
    """A paragraph for each picture."""
    return [f"![{path.stem.replace('_', ' ')}{mark}]({path.as_posix()})" for path in images]


def sweep_section(report: Mapping[str, Any], mark: str) -> list[str]:
    """The errors of the sweep, and the order that they give."""
    keys = ("mse", "relative_mse", "variance")
    return [
        "## Sweep",
        table(
            f"Each layer replaced on its own{mark}: masked MSE to the attention output, and that MSE / variance of the "
            "output",
            ["layer", "MSE", "MSE / variance", "variance"],
            [[row["layer"], *(number(row[key]) for key in keys)] for row in report["sweep"]],
        ),
        f"Order of replacement: {join(report['order'])}.",
    ]


def data_section(data: Mapping[str, Any], mark: str) -> list[str]:
    """What the data is, and the size of every split."""
    test, further = data["test"], further_splits(data)
    first = f"test ({test['name']})" if "name" in test else "test"
    named = [("train", data["train"]), ("dev", data["dev"]), (first, test)]
    named += [(f"test ({name})", facts) for name, facts in further.items()]
    rows = [
        [name, f"{f['utterances']:,}", f"{f['hours']:.2f}", f"{f['speakers']:,}"]
        for name, f in named
    ]
    return [
        "## Data",
        data["description"],
        table(f"Splits{mark}", ["split", "utterances", "hours", "speakers"], rows),
    ]


def run_section(report: Mapping[str, Any], mark: str, configs: Sequence[str]) -> list[str]:
    """Time per stage, device, versions, seeds, configurations and notes."""
    stages = report["stages"]
    rows = [[row["name"], duration(row["seconds"])] for row in stages]
    rows.append(["all", duration(sum(row["seconds"] for row in stages))])
    facts = [
        f"Device: {device_text(report['device'])}",
        f"Versions: {pairs(report['versions'])}",
        f"Seeds: {json_text(report['seeds'])}",
        *configs,
        *report["notes"],
    ]
    return [
        "## Run",
        table(f"Time per stage{mark}", ["stage", "time"], rows),
        "\n".join(f"- {fact}" for fact in facts),
    ]


def further_splits(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Test splits after the first, by name."""
    return part.get("splits", {})


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table with its caption."""
    if not rows:
        return f"*{caption}*: none."
    lines = [header, ["---"] * len(header), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return f"*{caption}*\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in cells)


def percent(fraction: float) -> str:
    """A fraction in percent."""
    return f"{100 * fraction:.2f} %" if math.isfinite(fraction) else "n/a"


def points(fraction: float) -> str:
    """A difference of fractions in percentage points, with its sign."""
    return f"{100 * fraction:+.2f}" if math.isfinite(fraction) else "n/a"


def interval(ci: Sequence[float], show=percent) -> str:
    """Both ends of an interval, each as `show` writes it."""
    return f"[{show(ci[0])}, {show(ci[1])}]"


def number(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}" if math.isfinite(value) else "n/a"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def join(items: Iterable[Any]) -> str:
    """A list with commas; `none` when it is empty."""
    return ", ".join(map(str, items)) or "none"


def pairs(mapping: Mapping[str, Any]) -> str:
    """Keys with their values, with commas."""
    return join(f"{key} {value}" for key, value in mapping.items())


def json_text(value: Any) -> str:
    """A value as JSON in one line."""
    return json.dumps(plain(value), ensure_ascii=False)


def device_text(row: Mapping[str, Any]) -> str:
    """What `machine.device` found, in words."""
    return (
        f"{row['count']} x {row['kind']} ({row['platform']}), {row['cores']} cores of {row['cpu']}"
    )
