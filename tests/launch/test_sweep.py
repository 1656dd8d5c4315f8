"""Sweeps of a program that takes no time: what runs, what is kept, what a second turn leaves alone."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from edgespeech.errors import InputError
from launch.sweep.space import draws, folder_name, grid, parse_parameter, parse_space, read_rows
from launch.sweep.summary import as_numbers, by_settings, draw, write_table
from launch.sweep.trial import Trial, engine_command, read_metric
from tests.support.signals import hearing_ctrl_c
from tests.support.tiny import ROOT
from tests.support.waiting import PATIENCE, wait_for

# A program with the flags of an experiment; its WER is a function of the swept flags. It keeps a line of every start,
# fails where it is told to, and waits, telling when it is stopped, while WORKDIR/../../hold exists.
PROGRAM = """
import argparse, json, pathlib, signal, sys, time
parser = argparse.ArgumentParser(allow_abbrev=False)
for name, kind in (("workdir", str), ("width", int), ("rate", float), ("seed", int), ("fail", int), ("kind", str)):
    parser.add_argument("--" + name, type=kind, default=None)
parser.add_argument("--resume", action="store_true")
flags = parser.parse_args()
folder = pathlib.Path(flags.workdir)
root = folder.parent.parent
def stop(*_):
    (folder / "saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
with (folder / "starts.txt").open("a") as file:
    file.write("resumed\\n" if flags.resume else "started\\n")
while (root / "hold").exists():
    time.sleep(0.01)
if flags.fail is not None and flags.fail == flags.width and not (root / "mended").exists():
    print("line of the log")
    raise SystemExit("the disk is full")
wer = (flags.width or 0) / 100 + (flags.seed or 0) / 1000 + (flags.rate or 0)
(folder / "report.json").write_text(json.dumps({"hybrids": [{"wer": 9.0}, {"wer": wer}]}))
"""


@pytest.fixture
def sweep(tmp_path):
    """Runs a sweep of the program in tmp_path / "out"; the program is a module beside it."""
    (tmp_path / "counting.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}

    def command(*arguments):
        return [
            *(sys.executable, "-m", "launch.sweep", "--experiment=counting"),
            *("--workdir=out", *arguments),
        ]

    def run(*arguments):
        return subprocess.run(
            command(*arguments), cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=False, timeout=PATIENCE,
        )  # fmt: skip

    started = []

    def start(*arguments):
        (tmp_path / "out").mkdir(exist_ok=True)
        process = subprocess.Popen(
            hearing_ctrl_c(command(*arguments)),
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    run.start, run.out = start, tmp_path / "out"
    yield run
    (run.out / "hold").unlink(missing_ok=True)  # lets trials end that a failed test left behind
    for process in started:
        process.kill()
        process.wait()


def starts(folder):
    return {
        path.parent.name: len(path.read_text().splitlines())
        for path in folder.glob("trials/*/starts.txt")
    }


GRID = ["--sweep=width=4,8", "--sweep=seed=0..2"]


def test_grid_runs_every_setting_once_and_reports(sweep):
    done = sweep(*GRID, "--parallel=3")
    assert done.returncode == 0, done.stderr
    names = [f"width={width},seed={seed}" for width in (4, 8) for seed in (0, 1, 2)]
    assert sorted(starts(sweep.out)) == sorted(names)
    kept = json.loads((sweep.out / "sweep.json").read_text())
    assert [trial["name"] for trial in kept["trials"]] == names
    assert [trial["value"] for trial in kept["trials"]] == pytest.approx(
        [0.04, 0.041, 0.042, 0.08, 0.081, 0.082]
    )
    assert {trial["state"] for trial in kept["trials"]} == {"finished"}
    table = (sweep.out / "table.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert ["4", "0", "0.04", "finished"] in [line[:4] for line in lines]
    # Mean and standard deviation over three seeds that are 1e-3 apart.
    assert ["4", "3", "0.041", "0.001"] in lines
    assert ["8", "3", "0.081", "0.001"] in lines
    assert (sweep.out / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert done.stdout == "out/table.md, plot.png\n"


def test_a_second_turn_runs_what_is_new_and_what_failed(sweep):
    failing = [*GRID[:1], "--sweep=seed=0,1"]
    flags = ["--", "--fail=8"]
    first = sweep(*failing, *flags)
    assert first.returncode == 1
    trials = {t["name"]: t for t in json.loads((sweep.out / "sweep.json").read_text())["trials"]}
    # A failure does not end the sweep, and the end of its log is kept.
    assert [t["state"] for t in trials.values()] == ["finished"] * 2 + ["failed"] * 2
    failed = trials["width=8,seed=1"]
    assert (failed["status"], failed["value"]) == (1, None)
    assert failed["note"].splitlines()[-2:] == ["line of the log", "the disk is full"]
    assert "the disk is full" in (sweep.out / "table.md").read_text()
    (sweep.out / "mended").touch()
    second = sweep(*GRID, *flags)
    assert second.returncode == 0, second.stderr
    assert starts(sweep.out) == {
        **{f"width=4,seed={seed}": 1 for seed in range(3)},
        **{"width=8,seed=0": 2, "width=8,seed=1": 2, "width=8,seed=2": 1},
    }
    last = json.loads((sweep.out / "trials" / "width=8,seed=1" / "trial.json").read_text())
    assert (last["state"], last["note"]) == ("finished", "")


def test_ctrl_c_lets_the_trials_save_and_the_same_command_goes_on(sweep):
    process = sweep.start(*GRID, "--parallel=2", "--grace=600")
    sweep.out.joinpath("hold").touch()
    wait_for(lambda: len(starts(sweep.out)) == 2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130, said
    assert "the same command goes on from here" in said
    begun = [sweep.out / "trials" / f"width=4,seed={seed}" for seed in (0, 1)]
    assert all((folder / "saved").exists() for folder in begun)
    states = [t["state"] for t in json.loads((sweep.out / "sweep.json").read_text())["trials"]]
    assert states == ["interrupted"] * 2
    sweep.out.joinpath("hold").unlink()
    assert sweep(*GRID).returncode == 0
    assert sorted(starts(sweep.out).values()) == [1, 1, 1, 1, 2, 2]


def test_a_run_that_outlived_its_sweep_is_not_doubled(sweep):
    process = sweep.start(*GRID[:1])
    sweep.out.joinpath("hold").touch()
    wait_for(lambda: starts(sweep.out))
    process.kill()
    process.wait()
    again = sweep(*GRID[:1])
    assert again.returncode == 2
    assert "width=4: a run of an earlier sweep is still at it" in again.stderr
    sweep.out.joinpath("hold").unlink()
    wait_for(lambda: (sweep.out / "trials" / "width=4" / "report.json").exists())
    wait_for(lambda: sweep(*GRID[:1]).returncode == 0)


def test_rows_run_with_every_setting_of_the_grid(sweep, tmp_path):
    rows = {"default": {}, "wide": {"width": 8, "rate": 0.5}, "plain": {"kind": "x"}}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = ["--rows=rows.json", "--sweep=seed=0,2"]
    done = sweep(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out/table.md\n"
    kept = json.loads((sweep.out / "sweep.json").read_text())
    assert kept["rows"]["wide"] == {"width": "8", "rate": "0.5"}
    found = {trial["name"]: (trial["settings"], trial["value"]) for trial in kept["trials"]}
    assert list(found) == [f"{row},seed={seed}" for row in rows for seed in (0, 2)]
    settings, value = found["wide,seed=2"]
    assert settings == {"width": "8", "rate": "0.5", "seed": "2"}
    assert value == pytest.approx(0.08 + 0.5 + 0.002)

    # A row that is new runs alone; one that has changed is refused.
    (tmp_path / "rows.json").write_text(json.dumps(rows | {"narrow": {"width": 1}}))
    assert sweep(*command).returncode == 0
    assert set(starts(sweep.out).values()) == {1}
    assert len(starts(sweep.out)) == 8
    (tmp_path / "rows.json").write_text(json.dumps(rows | {"wide": {"width": 9}}))
    done = sweep(*command)
    assert done.returncode == 2
    assert "wide,seed=0 was run with width=8,rate=0.5,seed=0" in done.stderr


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ("[1]", [], 'give {"NAME": {"FLAG": value}}'),
        ("{", [], "rows.json cannot be read as JSON"),
        ('{"a b": {}}', [], "names a row 'a b'"),
        ('{"a": {"width": [1]}}', [], "'width' is [1]"),
        ('{"a": {"width": 1}}', ["--sweep=width=1,2"], "row a has --width, and --sweep has it"),
        ('{"a": {"width": 1}}', ["--random=1"], "leave out --random"),
        ('{"a": {"width": 1}}', ["--", "--width=2"], "--rows=width and every trial is given"),
    ],
)
def test_bad_rows(sweep, tmp_path, rows, arguments, message):
    (tmp_path / "rows.json").write_text(rows)
    done = sweep("--rows=rows.json", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(sweep.out.glob("trials/*"))


def test_another_program_or_other_flags_are_refused(sweep):
    assert sweep("--sweep=width=1").returncode == 0
    other = sweep("--sweep=width=1", "--", "--rate=1")
    assert other.returncode == 2
    assert "holds a sweep whose flags was [], and is ['--rate=1']: name another" in other.stderr


def test_a_metric_that_is_not_there_is_noted(sweep):
    assert sweep("--sweep=width=1", "--metric=hybrids.0.cer").returncode == 0
    (trial,) = json.loads((sweep.out / "sweep.json").read_text())["trials"]
    assert (trial["state"], trial["value"]) == ("finished", None)
    assert trial["note"] == "report.json has no number 'hybrids.0.cer' ('cer')"
    # Another metric needs no other run.
    assert sweep("--sweep=width=1", "--metric=hybrids.0.wer").returncode == 0
    (trial,) = json.loads((sweep.out / "sweep.json").read_text())["trials"]
    assert (trial["value"], trial["note"]) == (9.0, "")
    assert starts(sweep.out) == {"width=1": 1}


def test_optuna_finds_the_minimum_and_goes_on(sweep):
    optuna = pytest.importorskip("optuna")
    search = ["--sweep=rate=0.01..10:log", "--sweep=kind=a,b", "--search=optuna"]
    assert sweep(*search, "--trials=6").returncode == 0
    names = set(starts(sweep.out))
    assert len(names) == 6
    done = sweep(*search, "--trials=12", "--parallel=2")
    assert done.returncode == 0, done.stderr
    assert names < set(starts(sweep.out))
    assert set(starts(sweep.out).values()) == {1}
    trials = json.loads((sweep.out / "sweep.json").read_text())["trials"]
    assert len(trials) == 12
    for trial in trials:
        assert trial["value"] == pytest.approx(float(trial["settings"]["rate"]))
        assert 0.01 <= trial["value"] <= 10
    # The second turn does not propose the first one's again, and Optuna knows both.
    assert len({trial["value"] for trial in trials}) == 12
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{sweep.out}/optuna.db")
    assert sorted(study.best_trials[0].values) == [min(trial["value"] for trial in trials)]


def test_an_interrupted_search_begins_with_what_it_had_begun(sweep):
    pytest.importorskip("optuna")
    search = ["--sweep=rate=0.1..1", "--search=optuna", "--trials=3"]
    process = sweep.start(*search)
    sweep.out.joinpath("hold").touch()
    wait_for(lambda: starts(sweep.out))
    process.terminate()
    process.wait(PATIENCE)
    (begun,) = starts(sweep.out)
    sweep.out.joinpath("hold").unlink()
    assert sweep(*search).returncode == 0
    assert len(starts(sweep.out)) == 3
    assert starts(sweep.out)[begun] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "names []: give at least one flag"),
        (["--sweep=a=1", "--sweep=a=2"], "each once"),
        (["--sweep=a=0.1..1"], "a is a range of real numbers, which has no grid"),
        (["--sweep=a=1", "--trials=3"], "--trials belongs to --search=optuna"),
        (["--sweep=a=1", "--search=optuna"], "--search=optuna needs --trials=N"),
        (["--sweep=a=1,2", "--random=3"], "--random=3, but the grid has 2 settings"),
        (["--sweep=a=1", "--parallel=0"], "--parallel=0"),
        (["--sweep=rate=1", "--", "--rate=2"], "--sweep=rate and every trial is given --rate"),
        (["--sweep=workdir=x,y"], "every trial is given --workdir as well"),
        (["--sweep=a=1", "--random=-1"], "--random=-1"),
        (["--sweep=a=1", "--engine=tpu", "--parallel=2"], "--engine=tpu has one slice"),
    ],
)
def test_bad_flags(sweep, arguments, message):
    done = sweep(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(sweep.out.glob("trials/*"))


def test_parameters():
    assert parse_parameter("seed=0..2").choices == ("0", "1", "2")
    assert parse_parameter("x=-1..1").choices == ("-1", "0", "1")
    assert parse_parameter("--lpa.local=true,false").choices == ("true", "false")
    assert parse_parameter("lpa.local=true").flag == "lpa.local"
    assert parse_parameter("path=a=b,c").choices == ("a=b", "c")
    real = parse_parameter("rate=1e-4..0.01:log")
    assert (real.low, real.high, real.log, real.choices) == (1e-4, 1e-2, True, ())
    assert not parse_parameter("rate=0..0.5").log
    for wrong in ("seed", "=1", "seed=", "a=1,,2", "a=1,1", "a=2..1", "a=0..1:log", "a=0..9999999"):
        with pytest.raises(InputError, match=re.escape(f"--sweep={wrong}")):
            parse_parameter(wrong)


def test_values_of_rows_are_those_of_a_command_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(
        '{"a": {"lpa.local": false, "rate": 1e-4, "order": "mse", "steps": 3}, "b": {}}'
    )
    assert read_rows(path) == {
        "a": {"lpa.local": "false", "rate": "0.0001", "order": "mse", "steps": "3"},
        "b": {},
    }


def test_grid_order():
    assert grid(parse_space(["a=1,2", "b=x,y"])) == [
        *({"a": "1", "b": "x"}, {"a": "1", "b": "y"}),
        *({"a": "2", "b": "x"}, {"a": "2", "b": "y"}),
    ]


def test_draws_are_different_repeatable_and_grow():
    space = parse_space(["rate=1e-4..1e-2:log", "width=4,8", "drop=0.0..0.5"])
    some = draws(space, 40, seed=1)
    assert draws(space, 200, seed=1)[:40] == some
    assert draws(space, 40, seed=2) != some
    many = draws(space, 400, seed=0)
    assert len({tuple(settings.items()) for settings in many}) == 400
    rates = np.log10([float(settings["rate"]) for settings in many])
    drops = np.array([float(settings["drop"]) for settings in many])
    # Evenly spread: mean and standard deviation of a uniform distribution, within four standard errors.
    for values, low, high in ((rates, -4, -2), (drops, 0, 0.5)):
        assert low <= values.min() < values.max() <= high
        spread = (high - low) / 12**0.5
        assert abs(values.mean() - (low + high) / 2) < 4 * spread / 400**0.5
        assert values.std() == pytest.approx(spread, rel=0.15)
    assert 150 < sum(settings["width"] == "4" for settings in many) < 250
    whole = parse_space(["a=1..3", "b=1..3"])
    assert sorted(map(str, draws(whole, 9, 0))) == sorted(map(str, grid(whole)))
    assert draws(whole, 9, 0)[:4] == draws(whole, 4, 0)


def test_folder_names():
    assert folder_name({"lpa.local": "true", "rate": "1e-4"}) == "lpa.local=true,rate=1e-4"
    slash, colon = (folder_name({"teacher": f"a{sign}b"}) for sign in "/:")
    assert slash != colon
    assert re.fullmatch(r"teacher=a_b-[0-9a-f]{8}", slash)
    assert len(folder_name({"a": "b" * 500})) < 120
    assert folder_name({"a": "b" * 500}) != folder_name({"a": "b" * 501})


def test_metric_keys(tmp_path):
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"a": [{"b": 1}, {"b": 2.5}], "flag": True, "name": "x"}))
    assert read_metric(report, "a.-1.b") == 2.5
    assert read_metric(report, "a.0.b") == 1.0
    for key in ("a.2.b", "a.x", "b", "flag", "name", "a", "a.0.b.c"):
        with pytest.raises(InputError, match=f"has no number '{key}'"):
            read_metric(report, key)


def test_commands_of_the_engines(tmp_path):
    program = ["experiments.x", "--workdir=out", "--resume"]
    run = ["-m", *program]
    assert engine_command("local", [], tmp_path, program) == [sys.executable, *run]
    for engine, options, start, python in (
        ("local", ["--processes=2"], ["launch.local"], sys.executable),
        ("slurm", ["--nodes=2"], ["launch.slurm", "--wait"], sys.executable),
        ("gke", ["--image=i"], ["launch.gke", "--wait"], "python"),
        ("tpu", ["--name=pod"], ["launch.tpu", "run", "--wait"], "python"),
    ):
        command = engine_command(engine, options, tmp_path, program)
        assert command[: 2 + len(start)] == [sys.executable, "-m", *start]
        assert command[-(3 + len(run)) :] == [*options, "--", python, *run]
    # What the launchers themselves accept; the names differ between folders.
    first, second = (
        engine_command("slurm", [], tmp_path / name, program)[4:7] for name in ("a", "b")
    )
    assert first[0] != second[0]
    assert first[1:] == [f"--log_dir={tmp_path}/a", "--directive=--dependency=singleton"]
    for engine, options in (("slurm", []), ("gke", ["--image=i", "--gpu=nvidia-l4"])):
        command = engine_command(engine, [*options, "--dry_run"], tmp_path, program)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "--resume" in done.stdout


def test_a_table_has_the_best_first(tmp_path):
    trials = [
        Trial(name, {"kind": name}, "finished", 0, 1.0, value)
        for name, value in (("worst", 3.0), ("best", 1.0), ("middle", 2.0))
    ]
    trials.append(Trial("lost", {"kind": "lost"}, "failed", 1, 1.0, None, "boom"))
    for maximise, order in (
        (False, ["best", "middle", "worst", "lost"]),
        (True, ["worst", "middle", "best", "lost"]),
    ):
        write_table(tmp_path / "table.md", trials, "wer", maximise)
        lines = (tmp_path / "table.md").read_text().splitlines()
        assert [line.split("|")[1].strip() for line in lines[4:8]] == order
    assert by_settings(trials, ["kind"]) == {
        ("worst",): [3.0],
        ("best",): [1.0],
        ("middle",): [2.0],
    }
    assert not draw(tmp_path / "none.png", trials[3:], "wer")


def test_places_on_an_axis():
    assert as_numbers(["8", "1e1", "-2"]) == {"8": 8.0, "1e1": 10.0, "-2": -2.0}
    assert as_numbers(["8", "mean"]) == {"8": 0.0, "mean": 1.0}
    assert as_numbers(["1", "nan"]) == {"1": 0.0, "nan": 1.0}
