"""Runs a program once for every setting of some flags, and compares the results.

    python -m launch.sweep --experiment=experiments.lpa_librispeech --workdir=runs/pulses \\
        --sweep=lpa.aperiodic=4,8,16 --sweep=seed=0..2 [-- FLAGS OF ALL TRIALS]

--sweep takes FLAG=A,B,C, FLAG=FIRST..LAST (integers), and for --random and --search FLAG=0.1..0.5 (reals), with :log
drawn on a logarithmic scale. --rows=FILE has named settings of several flags each, {"NAME": {"FLAG": value}}, and each
row runs with every setting of --sweep. Every trial has a folder in WORKDIR/trials, the program's --workdir, with its
trial.log. WORKDIR gets sweep.json, table.md and, without --rows, plot.png. Ctrl-C makes the trials save and end; the
same command goes on: it leaves finished trials alone and starts failed ones again. More values, or more trials, may be
asked for then.

Engines: local (on this machine), slurm, gke, tpu; --engine_flags goes to launch.ENGINE, and for local, where it is
given, to launch.local. The folder must be one that this machine and the job both see; tpu copies it back.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from edgespeech.data.corpus import write_atomically
from edgespeech.errors import InputError
from launch import job
from launch.sweep.search import Listed, OptunaSearch, Source, trials_of, trials_of_rows
from launch.sweep.space import draws, folder_name, grid, parse_space, read_rows
from launch.sweep.summary import draw, write_table
from launch.sweep.trial import ENGINES, Process, Trial, engine_command, load_trial, score

POLL_SECONDS = 0.2


class Sweep:
    """The trials of a folder.

    Args:
        workdir: of the sweep.
        experiment: module of the program.
        flags: those of all trials.
        options: the command line.

    Raises:
        InputError: the folder holds a sweep of another program, or with other flags.
    """

    def __init__(
        self, workdir: Path, experiment: str, flags: Sequence[str], options: argparse.Namespace
    ):
        self.workdir, self._experiment, self._flags = workdir, experiment, list(flags)
        self._options = options
        self.trials: dict[str, Trial] = {}
        self._running: list[Process] = []
        try:
            known = json.loads((workdir / "sweep.json").read_text())
        except FileNotFoundError:
            return
        for name, now in (("experiment", experiment), ("flags", self._flags)):
            if known[name] != now:
                raise InputError(
                    f"--workdir={workdir} holds a sweep whose {name} was {known[name]}, and is {now}: "
                    "name another folder"
                )
        for row in known["trials"]:
            self.trials[row["name"]] = Trial(**row)

    def run(self, source: Source) -> None:
        """Runs all trials of the source, `--parallel` at a time; ends them when it is interrupted."""
        try:
            while True:
                while len(self._running) < self._options.parallel and (trial := source.ask()):
                    self._begin(trial, source)
                if not self._running:
                    return
                time.sleep(POLL_SECONDS)
                for process in [p for p in self._running if p.has_ended(self._options.metric)]:
                    self._running.remove(process)
                    self._done(process.trial, source)
        finally:
            for process in self._running:
                process.ask_to_end()
            deadline = time.monotonic() + self._options.grace
            for process in self._running:
                process.end(deadline)
            self.save()

    def save(self) -> None:
        """Writes sweep.json."""
        content = {
            "experiment": self._experiment,
            "flags": self._flags,
            "sweep": self._options.sweep,
            "rows": self._options.rows,
            "metric": self._options.metric,
            "trials": [asdict(trial) for trial in self.trials.values()],
        }
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(self.workdir / "sweep.json", lambda file: file.write(text.encode()))

    def _begin(self, trial: Trial, source: Source) -> None:
        folder = self.workdir / "trials" / trial.name
        left = load_trial(folder)
        if left and left.settings != trial.settings:
            raise InputError(
                f"{folder} was run with {folder_name(left.settings)}, and is asked for with "
                f"{folder_name(trial.settings)}: give the row another name"
            )
        if left and left.state == "finished":
            score(left, folder, self._options.metric)  # which may be another one today
            self._done(left, source)
            return
        program = [
            self._experiment,
            f"--workdir={folder}",
            "--resume",
            *(f"--{flag}={value}" for flag, value in trial.settings.items()),
            *self._flags,
        ]
        options = shlex.split(self._options.engine_flags)
        command = engine_command(self._options.engine, options, folder, program)
        self.trials[trial.name] = trial
        self._running.append(Process(trial, folder, command))
        print(f"{trial.name}: started", file=sys.stderr, flush=True)
        self.save()

    def _done(self, trial: Trial, source: Source) -> None:
        self.trials[trial.name] = trial
        source.tell(trial)
        value = "" if trial.value is None else f", {self._options.metric} = {trial.value:.6g}"
        print(f"{trial.name}: {trial.state}{value}", file=sys.stderr, flush=True)
        self.save()


def make_source(options: argparse.Namespace) -> Source:
    """What the flags ask for.

    Raises:
        InputError: flags that do not go together, or see `space`.
    """
    if options.rows:
        if options.random or options.search or options.trials:
            raise InputError("--rows runs every row: leave out --random, --search and --trials")
        settings = grid(parse_space(options.sweep)) if options.sweep else [{}]
        return Listed(trials_of_rows(options.rows, settings))
    space = parse_space(options.sweep)
    if options.search:
        if options.random or not options.trials:
            raise InputError("--search=optuna needs --trials=N, and no --random")
        path = Path(options.workdir) / "optuna.db"
        return OptunaSearch(space, options.trials, path, options.seed, options.maximise)
    if options.trials:
        raise InputError("--trials belongs to --search=optuna; --random=N draws N settings")
    some = draws(space, options.random, options.seed) if options.random else grid(space)
    return Listed(trials_of(some))


def run(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.sweep", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--experiment", required=True, help="module, such as experiments.lpa_librispeech")
    add("--workdir", required=True, help="folder of the sweep")
    add("--sweep", action="append", default=[], help="FLAG=VALUES, once for every flag")
    add("--rows", help="JSON file of named settings, each with every setting of --sweep")
    add("--random", type=int, default=0, help="draw so many settings instead of the grid")
    add("--search", choices=["optuna"], help="let Optuna propose settings (extra `sweep`)")
    add("--trials", type=int, default=0, help="with --search: trials in all")
    add("--seed", type=int, default=0, help="of draws and proposals, not of the trials")
    add("--metric", default="hybrids.-1.wer", help="key in report.json (default: %(default)s)")
    add("--maximise", action="store_true", help="more of the metric is better")
    add("--engine", choices=ENGINES, default="local", help="(default: local)")
    add("--engine_flags", default="", help="for the engine's launcher, as one argument")
    add("--parallel", type=int, default=1, help="trials at a time (default: 1)")
    add("--grace", type=float, default=60.0, help="seconds to save in after Ctrl-C (default: 60)")
    options, flags = job.parse(parser, arguments)
    if options.parallel < 1:
        raise InputError(f"--parallel={options.parallel}: it must be at least 1")
    if options.engine == "tpu" and options.parallel > 1:
        raise InputError("--engine=tpu has one slice, which runs one trial at a time: --parallel=1")
    for name in ("random", "trials", "seed"):
        if getattr(options, name) < 0:
            raise InputError(f"--{name}={getattr(options, name)}: it must be at least 0")
    fixed = {flag.split("=")[0].lstrip("-") for flag in flags}
    swept = {text.split("=")[0].lstrip("-") for text in options.sweep}
    options.rows = read_rows(Path(options.rows)) if options.rows else {}
    swept |= {flag for row in options.rows.values() for flag in row}
    given = "rows" if options.rows else "sweep"
    for name in sorted(swept & (fixed | {"workdir", "resume"})):
        raise InputError(
            f"--{given}={name} and every trial is given --{name} as well: give it once"
        )
    workdir = Path(options.workdir)
    sweep = Sweep(workdir, options.experiment, flags, options)
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        sweep.run(make_source(options))
    except KeyboardInterrupt:
        print("the same command goes on from here", file=sys.stderr)
        raise
    trials = list(sweep.trials.values())
    write_table(workdir / "table.md", trials, options.metric, options.maximise)
    # Rows differ in different flags: a picture over each of them would say nothing.
    has_plot = not options.rows and draw(workdir / "plot.png", trials, options.metric)
    print(f"{workdir / 'table.md'}{', plot.png' if has_plot else ''}")
    return 1 if any(trial.state == "failed" for trial in trials) else 0


if __name__ == "__main__":
    job.main(run)
