"""Submits a program to SLURM.

    python -m launch.slurm --nodes=2 --gpus_per_node=8 --directive=--partition=gpu -- \\
        python -m experiments.lpa_librispeech --workdir=runs/base --resume ...

renders a batch script and hands it to sbatch; --dry_run prints it. Before its time limit, and before a preemption where
the cluster announces one (SlurmctldParameters=preempt_send_user_signal), the job saves, goes back into the queue and
resumes.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from edgespeech.errors import InputError
from launch import job
from launch.slurm.script import SlurmJob, render

ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"),
    *("DEADLINE", "PREEMPTED"),
}
POLL_SECONDS = 10.0  # SLURM forgets a job 300 seconds after its end


def status_of(job_id: str) -> int | None:
    """Exit status of a job, None while it waits or runs.

    Raises:
        InputError: SLURM does not know the job.
    """
    done = job.call(["scontrol", "show", "job", "--oneliner", job_id], check=False)
    if done.returncode:
        if "Invalid job id" in done.stderr:
            raise InputError(f"SLURM has forgotten job {job_id}: look at its log")
        return None  # the controller is away: it comes back
    fields = dict(re.findall(r"(?:^|\s)(JobState|ExitCode)=(\S+)", done.stdout))
    if fields.get("JobState") not in ENDED:
        return None
    code, _, signal = fields["ExitCode"].partition(":")
    return int(code) or (
        128 + int(signal) if int(signal) else int(fields["JobState"] != "COMPLETED")
    )


def submit(script: str) -> str:
    """The id of the job that sbatch makes of a script."""
    return job.call(["sbatch", "--parsable"], stdin=script).stdout.strip().partition(";")[0]


def run(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.slurm", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    default = SlurmJob([])
    add = parser.add_argument
    add("--name", default=default.name, help="of job and log (default: %(default)s)")
    add("--nodes", type=int, default=1, help="(default: 1)")
    add("--gpus_per_node", type=int, default=0, help="one task each; 0: one task a node")
    add("--cpus_per_task", type=int, default=default.cpus_per_task, help="(default: %(default)s)")
    add("--time", default=default.time, help="limit of one turn (default: %(default)s)")
    add("--grace", type=int, default=default.grace, help="s to save in (default: %(default)s)")
    add("--log_dir", default=default.log_dir, help="folder of the log (default: %(default)s)")
    add("--setup", default="", help="shell line before the command, such as 'module load cuda'")
    add("--directive", action="append", default=[], help="option of sbatch, as often as needed")
    add("--once", action="store_true", help="not into the queue again, whatever ends it")
    add("--dry_run", action="store_true", help="print the script and submit nothing")
    add("--wait", action="store_true", help="until the job ends; Ctrl-C or SIGTERM cancels it")
    options, command = job.parse(parser, arguments)
    job.require_command(command, resumed_by=None if options.once else "SLURM")
    script = render(
        SlurmJob(
            command,
            options.name,
            options.nodes,
            options.gpus_per_node,
            options.cpus_per_task,
            options.time,
            options.grace,
            options.log_dir,
            os.getcwd(),
            options.setup,
            options.directive,
            not options.once,
        )
    )
    if options.dry_run:
        print(script, end="")
        return 0
    # SLURM does not make the folder of a log, and drops the log instead.
    Path(options.log_dir).mkdir(parents=True, exist_ok=True)
    job_id = submit(script)
    log = Path(options.log_dir) / f"{options.name}-{job_id}.log"
    print(f"job {job_id}: `{shlex.join(command)}`, log {log}", file=sys.stderr, flush=True)
    if not options.wait:
        return 0
    status = job.wait(
        lambda: status_of(job_id), lambda: job.call(["scancel", job_id]), POLL_SECONDS
    )
    if log.exists():
        print("\n".join(log.read_text(errors="replace").splitlines()[-20:]))
    return status


if __name__ == "__main__":
    job.main(run)
