"""SLURM: the script against bash and a stand-in cluster, and against SLURM itself where it is set up."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from edgespeech.errors import InputError
from launch.slurm import __main__ as program
from launch.slurm.script import SlurmJob, render
from tests.support.tiny import ROOT
from tests.support.waiting import PATIENCE, wait_for

PYTHON = sys.executable
# A program that counts to 1000, saves when it is told to stop, and goes on from there.
COUNTER = """
import pathlib, signal, sys, time
path, last = pathlib.Path(sys.argv[1]), int(sys.argv[2])
count = int(path.read_text()) if path.exists() else 0
def save(*_):
    path.write_text(str(count))
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("from", count, flush=True)
while count < last:
    time.sleep(0.02)
    count += 1
path.write_text(str(count))
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder of stand-ins at the head of the PATH; each call is a line of calls.txt."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def add(name, body):
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/calls.txt\n{body}\n')
        path.chmod(0o755)

    add.calls = lambda: (tmp_path / "calls.txt").read_text().splitlines()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return add


def directives(script):
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH" in line]


def test_script_asks_for_what_the_job_needs(tmp_path):
    script = render(
        SlurmJob(
            ["python", "-m", "experiments.x", "--text=it's $HOME"],
            name="try",
            nodes=2,
            gpus_per_node=8,
            time="2-12:00:00",
            directives=["--partition=gpu"],
        )
    )
    assert directives(script) == [
        *("--job-name=try", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8"),
        *("--cpus-per-task=8", "--time=2-12:00:00", "--output=runs/slurm/%x-%j.log"),
        *("--open-mode=append", "--requeue", "--signal=B:USR1@120", "--partition=gpu"),
    ]
    # sbatch reads its options up to the first command.
    lines = script.splitlines()
    assert all(line.startswith("#") for line in lines[: len(directives(script)) + 1])
    assert (
        "srun --kill-on-bad-exit=1 python -m experiments.x '--text=it'\"'\"'s $HOME' >&3; "
        in script
    )
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_a_job_that_must_not_come_back():
    options = directives(render(SlurmJob(["true"], requeue=False)))
    assert "--no-requeue" in options
    assert "--requeue" not in options


def test_one_task_a_node_without_gpus():
    asked = directives(render(SlurmJob(["true"], nodes=3)))
    assert "--ntasks-per-node=1" in asked
    assert not any("gpus" in option for option in asked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nodes": 0}, "--nodes=0: it must be at least 1"),
        ({"gpus_per_node": -1}, "--gpus_per_node=-1"),
        ({"grace": 30}, "--grace=30: give 60 to 65535"),
        ({"time": "soon"}, "--time=soon"),
        ({"name": "a b"}, "--name=a b"),
        ({"directives": ["partition=gpu"]}, "--directive=partition=gpu"),
        ({"directives": ["--a\nrm"]}, "give an option of sbatch"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        SlurmJob(["true"], **settings)


def start(script, tmp_path):
    path = tmp_path / "job.sh"
    path.write_text(script)
    environment = os.environ | {"SLURM_JOB_ID": "7"}
    return subprocess.Popen(["bash", str(path)], env=environment)


def wait_for_text(path, text=""):
    wait_for(lambda: path.exists() and text in path.read_text(), lambda: f"{path}: no {text!r}")


# srun puts its own process id where the stand-in for scancel finds it.
SRUN = 'shift; echo $BASHPID > "$(dirname "$0")/step"; exec "$@"'
SCANCEL = 'kill -TERM "$(cat "$(dirname "$0")/step")"'


@pytest.mark.parametrize("ending", ["alone", "warned", "failing", "once", "cancelled"])
def test_a_warned_job_saves_and_is_queued_again(tools, tmp_path, ending):
    tools("srun", SRUN)
    tools("scancel", SCANCEL)
    tools("scontrol", "")
    program = COUNTER if ending != "failing" else COUNTER.replace("sys.exit(0)", "sys.exit(3)")
    saved, last = tmp_path / "saved", "3" if ending == "alone" else "100000"
    command = ["bash", "-c", 'exec "$@" > out', "x", PYTHON, "-c", program, str(saved), last]
    job = SlurmJob(command, folder=str(tmp_path), requeue=ending != "once")
    process = start(render(job), tmp_path)
    wait_for_text(tmp_path / "out", "from 0")
    if ending == "alone":
        assert process.wait(PATIENCE) == 0
        assert saved.read_text() == "3"
        assert not any("scontrol" in call for call in tools.calls())
        return
    if ending == "cancelled":  # SLURM tells the tasks, and the shell
        os.kill(int((tmp_path / "bin" / "step").read_text()), signal.SIGTERM)
        process.terminate()
    else:
        process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE) == (3 if ending == "failing" else 0)
    assert ("scancel --signal=TERM 7" in tools.calls()) == (ending != "cancelled")
    # What failed would fail again, and what was cancelled is not wanted.
    assert ("scontrol requeue 7" in tools.calls()) == (ending == "warned")
    assert ending == "failing" or saved.exists()


def test_a_signal_as_the_tasks_end_does_not_lose_their_status(tools, tmp_path):
    tools("srun", SRUN)
    task = 'trap "exit 7" TERM; touch out; while :; do sleep 0.01; done'
    script = render(SlurmJob(["bash", "-c", task], folder=str(tmp_path)))
    for milliseconds in range(20):
        (tmp_path / "out").unlink(missing_ok=True)
        process = start(script, tmp_path)
        wait_for_text(tmp_path / "out")
        os.kill(int((tmp_path / "bin" / "step").read_text()), signal.SIGTERM)
        time.sleep(milliseconds / 1000)
        process.terminate()
        assert process.wait(PATIENCE) == 7


def run(arguments, **options):
    return subprocess.run(
        [PYTHON, "-m", "launch.slurm", *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=PATIENCE, **options,
    )  # fmt: skip


def test_submits_the_script_that_dry_run_prints(tools, tmp_path):
    tools("sbatch", f'cat > {tmp_path}/script; echo "41;cluster"')
    arguments = [f"--log_dir={tmp_path}/logs", "--", "python", "-m", "experiments.x", "--resume"]
    printed = run(["--dry_run", *arguments])
    assert printed.returncode == 0
    assert not (tmp_path / "logs").exists()
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "script").read_text() == printed.stdout
    assert f"cd -- {ROOT} ||" in printed.stdout
    assert tools.calls() == ["sbatch --parsable"]
    assert "job 41: `python -m experiments.x --resume`" in done.stderr
    assert (tmp_path / "logs").is_dir()


def test_bad_command_lines(tmp_path):
    assert "no command" in run([]).stderr
    lacking = run(["--", "python", "-m", "experiments.x"])
    assert lacking.returncode == 2
    assert "lacks --resume" in lacking.stderr
    absent = run([f"--log_dir={tmp_path}", "--", "x", "--resume"], env={"PATH": "/", "HOME": "/"})
    assert absent.returncode == 2
    assert "sbatch is not on the PATH" in absent.stderr


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("JobId=4 JobState=PENDING Reason=Priority ExitCode=0:0", None),
        ("JobId=4 JobState=RUNNING ExitCode=0:0", None),
        ("JobId=4 JobState=COMPLETING ExitCode=0:0", None),
        ("JobId=4 JobState=COMPLETED DerivedExitCode=5:0 ExitCode=0:0", 0),
        ("JobId=4 JobState=FAILED ExitCode=3:0", 3),
        ("JobId=4 JobState=CANCELLED ExitCode=0:15", 143),
        ("JobId=4 JobState=TIMEOUT ExitCode=0:0", 1),
    ],
)
def test_status_of_a_job(tools, said, status):
    tools("scontrol", f"echo '{said}'")
    assert program.status_of("4") == status
    assert tools.calls() == ["scontrol show job --oneliner 4"]


def test_status_when_the_controller_is_away_or_has_forgotten(tools):
    tools("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert program.status_of("4") is None
    tools("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    with pytest.raises(InputError, match="forgotten job 4"):
        program.status_of("4")


def test_waiting_cancels_the_job_when_interrupted(tools, tmp_path):
    tools("sbatch", "cat > /dev/null; echo 41")
    tools("scontrol", "echo JobState=RUNNING ExitCode=0:0")
    tools("scancel", "")
    arguments = [f"--log_dir={tmp_path}", "--wait", "--", "x", "--resume"]
    process = subprocess.Popen(
        [PYTHON, "-m", "launch.slurm", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    wait_for_text(tmp_path / "calls.txt", "scontrol")
    process.terminate()
    assert process.communicate(timeout=PATIENCE)[1].endswith("interrupted\n")
    assert process.returncode == 130
    assert tools.calls()[-1] == "scancel 41"


def test_a_real_node_runs_a_job_and_gives_its_status(tmp_path):
    if not shutil.which("sinfo"):
        pytest.skip("no SLURM: launch/slurm/setup_one_node.sh sets one up")
    up = subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=PATIENCE, check=False)
    if up.returncode:
        pytest.skip("SLURM is not running: launch/slurm/setup_one_node.sh starts it")
    code = "import os; print('task', os.environ['SLURM_PROCID']); raise SystemExit(5)"
    done = run(
        [
            *("--wait", "--cpus_per_task=1", "--time=2", f"--log_dir={tmp_path}", "--"),
            *(PYTHON, "-c", code, "--resume"),
        ]
    )
    assert done.returncode == 5, done.stderr
    (log,) = tmp_path.glob("*.log")
    assert "task 0" in log.read_text()
    assert "task 0" in done.stdout
