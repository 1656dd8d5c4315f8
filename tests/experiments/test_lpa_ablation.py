"""The rows of an ablation spend the same, and its table is worked out by hand."""

import dataclasses
import json
import random

import numpy as np
import pytest

from edgespeech.conversion.ctc_task import CTCDistilConfig
from edgespeech.conversion.seq2seq_task import Seq2SeqDistilConfig
from edgespeech.errors import InputError
from edgespeech.evaluation.wer import bootstrap_interval
from edgespeech.nn.lpa import LPAConfig
from experiments.ablation_table import mean_over_seeds, read_sweep, write_tables
from experiments.lpa_ablation import PLANS, chosen_rows, planned_rows

DISTIL = {"moonshine": Seq2SeqDistilConfig, "ctc": CTCDistilConfig}
STEPS, SWEEP_STEPS, REPLACED = 50, 30, (4, 8)


def rows_of(plan):
    return planned_rows(PLANS[plan], STEPS, SWEEP_STEPS, REPLACED, "all", window=8, hours=5.0)


@pytest.mark.parametrize("plan", PLANS)
def test_every_row_is_a_setting_of_the_program_and_has_the_same_budget(plan):
    assert PLANS[plan].steps_per_layer == DISTIL[plan]().steps_per_layer
    settings = []
    for name, row in rows_of(plan).items():
        parts = {
            prefix: {k.partition(".")[2]: v for k, v in row.items() if k.startswith(f"{prefix}.")}
            for prefix in ("lpa", "distil")
        }
        octaves = {"octaves": PLANS[plan].windows}
        lpa, distil = LPAConfig(**octaves | parts["lpa"]), DISTIL[plan](**parts["distil"])
        assert row["sweep_steps"] + distil.num_steps(8, 8) == 30 + 8 * 50, name
        others = {k: v for k, v in row.items() if "." not in k}
        settings.append((lpa, distil, others))
        # One thing at a time: the numbers of pulses may change together.
        default = settings[0]
        lpa_changes = changed(lpa, default[0])
        assert len(lpa_changes - {"aperiodic", "runs", "periodic", "positional"}) <= 1, name
        steps = {"steps_per_layer", "joint_steps"}
        kinds = [bool(lpa_changes), bool(changed(distil, default[1]))]
        kinds.append(
            any(others[k] != default[2].get(k) for k in others.keys() - {"controls", "window"})
        )
        assert len(changed(distil, default[1]) - steps) <= 1
        assert sum(kinds) == (name != "default"), name
    assert len({str(one) for one in settings}) == len(settings)
    assert settings[0][2]["controls"] == "all"
    assert {one[2]["controls"] for one in settings[1:]} == {"none"}


def changed(config, other):
    names = (field.name for field in dataclasses.fields(config))
    return {name for name in names if getattr(config, name) != getattr(other, name)}


def test_chosen_rows():
    rows = rows_of("ctc")
    assert chosen_rows(rows, ["all"]) == rows
    assert list(chosen_rows(rows, ["default", "runs"])) == ["default", "runs"]
    with pytest.raises(InputError, match="--rows holds 'walks': choose 'all'"):
        chosen_rows(rows, ["default", "walks"])
    with pytest.raises(InputError, match="lacks default"):
        chosen_rows(rows, ["runs"])


WORDS = np.array([5, 10, 8, 7])
TEACHER = [0, 1, 0, 1]
ERRORS = {  # of the four utterances, by row, replaced layers and seed
    ("default", 2): {0: [1, 1, 0, 1], 1: [0, 1, 2, 1]},
    ("default", 4): {0: [2, 3, 0, 1], 1: [2, 1, 4, 1]},
    ("runs", 2): {0: [1, 2, 1, 1], 1: [0, 1, 3, 2]},
    ("runs", 4): {0: [5, 3, 1, 1], 1: [3, 3, 3, 3]},
    ("control", 4): {0: [5, 9, 1, 1], 1: [5, 9, 3, 3]},
}


def write_lines(folder, name, errors, words=WORDS):
    lines = [
        json.dumps({"id": f"u{i}", "errors": e, "words": int(w)})
        for i, (e, w) in enumerate(zip(errors, words, strict=True))
    ]
    # Any order: utterances are matched by id.
    random.Random(f"{folder} {name}").shuffle(lines)
    (folder / "hypotheses" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def report_row(errors, count, updates):
    return {
        "replaced": count,
        "layers": list(range(1, count + 1)),
        "wer": sum(errors) / int(WORDS.sum()),
        "parameters": 900,
        "trained_parameters": 100 * count,
        "updates": updates,
    }


@pytest.fixture
def sweep(tmp_path):
    """What a sweep of two rows and two seeds leaves, with a row that failed."""
    trials = [{"name": "lost,seed=0", "state": "failed"}]
    split = {"utterances": 4, "hours": 0.1, "speakers": 2}
    for name, updates in (("default", 600), ("runs", 500)):
        for seed in (0, 1):
            trials.append({"name": f"{name},seed={seed}", "state": "finished"})
            folder = tmp_path / "trials" / f"{name},seed={seed}"
            (folder / "hypotheses").mkdir(parents=True)
            write_lines(folder, "teacher", TEACHER)
            hybrids = [report_row(ERRORS[name, k][seed], k, updates) for k in (2, 4)]
            for k in (2, 4):
                write_lines(folder, f"lpa_{k}", ERRORS[name, k][seed])
            controls = []
            if name == "default":
                errors = ERRORS["control", 4][seed]
                controls = [{"name": "removed"} | report_row(errors, 4, updates)]
                write_lines(folder, "control_removed", errors)
            report = {
                "seeds": {"seed": seed},
                "date": "2026-01-02",
                "command": f"python -m x --row={name} --seed={seed}",
                "data": {"kind": "folder", "description": "read speech", "train": split}
                | {"dev": split, "test": {"name": "dev-mini", **split}},
                "teacher": {"wer": 2 / 30, "parameters": 1000},
                "hybrids": hybrids,
                "controls": controls,
                "device": {"count": 1, "kind": "cpu", "platform": "cpu", "cores": 2, "cpu": "a"},
                "versions": {"jax": "0.10.2"},
            }
            (folder / "report.json").write_text(json.dumps(report))
    (tmp_path / "sweep.json").write_text(json.dumps({"trials": trials}))
    return tmp_path


def test_table_by_hand(sweep):
    write_tables(sweep)
    content = json.loads((sweep / "ablation.json").read_text())
    rows = {(row["name"], row["replaced"]): row for row in content["rows"]}
    first = [("default", 2), ("runs", 2), ("default", 4)]
    assert list(rows) == [*first, ("control: removed", 4), ("runs", 4)]
    errors = ERRORS | {("control: removed", 4): ERRORS["control", 4]}
    for (name, count), row in rows.items():
        both = np.array(list(errors[name, count].values()))
        default = np.array(list(ERRORS["default", count].values()))
        assert row["wer"] == pytest.approx(both.sum() / 60)
        assert row["seed_wers"] == pytest.approx(both.sum(1) / 30)
        assert row["standard_deviation"] == pytest.approx(np.std(both.sum(1) / 30, ddof=1))
        assert row["ci"] == pytest.approx(bootstrap_interval(both.sum(0), 2 * WORDS))
        extra = both.sum(0) - 2 * np.array(TEACHER)
        assert row["vs_teacher"]["value"] == pytest.approx(extra.sum() / 60)
        assert row["vs_teacher"]["ci"] == pytest.approx(bootstrap_interval(extra, 2 * WORDS))
        if name == "default":
            assert row["vs_default"] is None
        else:
            extra = (both - default).sum(0)
            assert row["vs_default"]["value"] == pytest.approx(extra.sum() / 60)
            assert row["vs_default"]["ci"] == pytest.approx(bootstrap_interval(extra, 2 * WORDS))
        assert row["trained_parameters"] == 100 * count
    assert content["teacher"]["wer"] == pytest.approx(2 / 30)
    assert content["missing"] == {"lost": "failed"}
    assert rows["runs", 4]["command"] == "python -m x --row=runs --seed=0"
    assert rows["control: removed", 4]["command"] is None

    text = (sweep / "ablation.md").read_text()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    (line,) = [row for row in cells if row and row[0] == "runs" and row[1] == "36.67 %"]
    # (10 + 12 - 6 - 8) / 60 above the default, (22 - 4) / 60 above the teacher; 2 errors in 30 words between the seeds.
    assert (line[3], line[4], line[6]) == ("4.71 (2)", "+13.33", "+30.00")
    assert "Not at the default's 600 updates: runs." in text
    assert "Without a finished run: lost failed." in text
    assert "# runs\npython -m x --row=runs --seed=0" in text
    assert "test (dev-mini)" in text


def test_seeds_are_paired(sweep):
    found = read_sweep(sweep)
    runs, default = found.models[4, "runs"], found.models[4, "default"]
    only = mean_over_seeds(runs, {1: default[1]})
    assert only["seeds"] == [1]
    assert only["value"] == pytest.approx((12 - 8) / 30)
    with pytest.raises(InputError, match="no seed in common"):
        mean_over_seeds({0: runs[0]}, {1: default[1]})
    other = default[0]._replace(words=default[0].words + 1)
    with pytest.raises(InputError, match="scored on different utterances"):
        mean_over_seeds(runs, {0: other})


def test_nothing_to_compare(sweep, tmp_path_factory):
    with pytest.raises(InputError, match=r"holds no sweep\.json: add --plan"):
        read_sweep(tmp_path_factory.mktemp("empty"))
    trials = [{"name": "runs,seed=0", "state": "finished"}]
    (sweep / "sweep.json").write_text(json.dumps({"trials": trials}))
    with pytest.raises(InputError, match="no finished row 'default'"):
        read_sweep(sweep)
