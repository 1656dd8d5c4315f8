"""Kill a training program at random, again and again, and see that what it computes stays the same to the last bit.

Command     python -m launch.soak --kills=20 --workdir=runs/soak -- \\
                python -m experiments.lpa_librispeech --workdir={workdir} --resume --quiet
Hardware    that of the program; the command may be one of launch.local as well
Time        the program's, about once for every five kills, and its start for each
Expect      "20 kills: ... the same", and exit status 0

The program runs once undisturbed, in WORKDIR/whole. Then it runs in WORKDIR/broken, where it is killed (SIGKILL, or a
quarter of the times SIGTERM, after which it must end with 0) and started again; {workdir} in the command is the folder.
Compared are the fingerprints of the newest checkpoint of every stage, and all files of weights and of hypotheses.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

POLL_SECONDS = 0.005


def results(workdir: Path) -> dict[str, str]:
    """What must be the same, by name: see above."""
    found = {}
    for stage in workdir.glob("checkpoints/*"):
        steps = [path for path in stage.iterdir() if path.name.isdigit()]
        if steps and not stage.name.endswith(".damaged"):
            newest = max(steps, key=lambda path: int(path.name))
            [position] = newest.glob("position/metadata")
            fingerprints = json.loads(position.read_text())["fingerprints"]
            found[f"checkpoint {stage.name}"] = f"step {newest.name}, fingerprints {fingerprints}"
    for pattern in ("**/*.safetensors", "hypotheses/*.jsonl"):
        for path in workdir.glob(pattern):
            found[str(path.relative_to(workdir))] = path.read_bytes().hex()
    return found


def lines_written(workdir: Path) -> int:
    """Rows of metrics of all stages."""
    return sum(path.read_bytes().count(b"\n") for path in workdir.glob("metrics/*.jsonl"))


def start(command: Sequence[str], workdir: Path) -> subprocess.Popen:
    """Starts the program in a folder; what it prints goes on at the end of FOLDER.log."""
    with workdir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [part.replace("{workdir}", str(workdir)) for part in command], stdout=log, stderr=log
        )


def finish(command: Sequence[str], workdir: Path) -> None:
    """Runs the program to its end.

    Raises:
        SystemExit: it ends with an error.
    """
    status = start(command, workdir).wait()
    if status:
        sys.exit(f"the program ended with status {status}: see {workdir.with_suffix('.log')}")


def disturb(command: Sequence[str], workdir: Path, random_: random.Random, rows: int) -> str | None:
    """Starts the program and ends it after up to so many rows of metrics; None if it came to its end.

    Raises:
        SystemExit: it ended with an error, or with one after SIGTERM.
    """
    goal = lines_written(workdir) + random_.randint(0, rows)
    number = random_.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    process = start(command, workdir)
    while process.poll() is None and lines_written(workdir) < goal:
        time.sleep(POLL_SECONDS)
    time.sleep(random_.uniform(0.0, 0.5))
    if process.poll() is None:
        process.send_signal(number)
    status = process.wait()
    if status == -signal.SIGKILL:
        return "SIGKILL"
    if status:
        sys.exit(f"the program ended with status {status}: see {workdir.with_suffix('.log')}")
    return "SIGTERM" if number == signal.SIGTERM else None


def soak(command: Sequence[str], workdir: Path, kills: int, seed: int, rows: int) -> str:
    """Runs the whole of it; returns what happened, in a sentence.

    Args:
        command: the program; `{workdir}` in it is replaced.
        workdir: has the folders `whole` and `broken`.
        kills: at least so many.
        seed: of the times.
        rows: of metrics, at most, from a start to its kill.

    Raises:
        SystemExit: a result differs, or the program fails.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    whole, broken = workdir / "whole", workdir / "broken"
    finish(command, whole)
    expected = results(whole)
    if not expected:
        sys.exit(f"{whole} holds no checkpoints: give the program --workdir={{workdir}}")
    random_ = random.Random(seed)
    count, rounds = 0, 0
    while count < kills:
        rounds += 1
        shutil.rmtree(broken, ignore_errors=True)
        while count < kills and (how := disturb(command, broken, random_, rows)):
            count += 1
            print(f"kill {count}, {how}, after {lines_written(broken)} rows", flush=True)
        finish(command, broken)
        found = results(broken)
        differing = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        if differing:
            sys.exit(f"after {count} kills these differ: {', '.join(differing)}")
    return f"{count} kills in {rounds} runs: {len(expected)} results, all the same"


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.soak", description="Kill a program and resume it, at random."
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=10, help="of metrics, at most, before a kill")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not any("{workdir}" in part for part in command):
        parser.error("write -- COMMAND, with {workdir} where its folder goes")
    print(soak(command, arguments.workdir, arguments.kills, arguments.seed, arguments.rows))


if __name__ == "__main__":
    main()
