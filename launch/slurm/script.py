"""The batch script of a SLURM job that survives preemption and its own time limit."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template

from edgespeech.errors import InputError

# The warning is a USR1 to this shell. It must not be a TERM: that is what `scancel JOB` sends as well, and a job that
# was cancelled must not come back. `scancel --signal` reaches the tasks and not this shell; a TERM to srun would not
# do, for srun answers it by killing them.
#
# The status comes through a pipe and not from `wait`: a signal that arrives as srun ends makes bash's `wait` lose the
# status for good (seen with 5.2), while `read` runs the trap and reads on (from 4.3).
_SCRIPT = Template("""\
#!/bin/bash
$directives

cd -- $folder || exit 1
$setup
# Cancelled, or preempted without a warning: SLURM tells the tasks itself, and this shell waits for them.
trap : TERM
# Warned, before the time limit or a preemption: the tasks save and exit with 0; then the job goes back into the queue,
# and its next turn resumes.
warned=false
warn() {
  trap '' USR1
  warned=true
  scancel --signal=TERM "$$SLURM_JOB_ID"
}
trap warn USR1

exec 3>&1
read -r status < <(trap : TERM; srun --kill-on-bad-exit=1 $command >&3; echo "$$?")
status=$${status:-1}
if $$warned && [ "$$status" -eq 0 ] && $requeue; then scontrol requeue "$$SLURM_JOB_ID"; fi
exit "$$status"
""")


@dataclass(frozen=True)
class SlurmJob:
    """What a job asks SLURM for.

    Attributes:
        command: runs in every task; the program finds the other tasks by SLURM's variables.
        name: of the job, and of its log.
        nodes: at least 1.
        gpus_per_node: one task a GPU; with 0, one task a node.
        cpus_per_task: cores.
        time: limit of one turn, as SLURM writes it: MINUTES, HOURS:MINUTES:SECONDS, DAYS-HOURS.
        grace: seconds between the warning and the end.
        log_dir: folder of the log, `NAME-JOBID.log`, which a requeued job appends to.
        folder: where the command runs.
        setup: shell lines before the command, such as `module load cuda`.
        directives: further options of sbatch, such as `--partition=gpu`.
        requeue: into the queue again after a warning, a preemption or a node's failure; off, a warned job just ends.

    Raises:
        InputError: a value that SLURM would not take, or would take for something else.
    """

    command: Sequence[str]
    name: str = "edgespeech"
    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 8
    time: str = "24:00:00"
    grace: int = 120
    log_dir: str = "runs/slurm"
    folder: str = "."
    setup: str = ""
    directives: Sequence[str] = ()
    requeue: bool = True

    def __post_init__(self):
        for field, least in (("nodes", 1), ("gpus_per_node", 0), ("cpus_per_task", 1)):
            if getattr(self, field) < least:
                raise InputError(f"--{field}={getattr(self, field)}: it must be at least {least}")
        # sbatch takes 0 to 65535 seconds, and warns up to a minute late.
        if not 60 <= self.grace <= 65535:
            raise InputError(f"--grace={self.grace}: give 60 to 65535 seconds")
        if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", self.time):
            raise InputError(f"--time={self.time}: give HOURS:MINUTES:SECONDS or DAYS-HOURS")
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise InputError(f"--name={self.name}: use letters, digits, '_', '-' and '.'")
        for directive in self.directives:
            if not directive.startswith("--") or "\n" in directive:
                raise InputError(
                    f"--directive={directive}: give an option of sbatch, such as --partition=gpu"
                )


def render(job: SlurmJob) -> str:
    """The batch script."""
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={max(1, job.gpus_per_node)}",
        *([f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []),
        f"--cpus-per-task={job.cpus_per_task}",
        f"--time={job.time}",
        f"--output={job.log_dir}/%x-%j.log",
        "--open-mode=append",
        "--requeue" if job.requeue else "--no-requeue",
        f"--signal=B:USR1@{job.grace}",
        *job.directives,
    ]
    return _SCRIPT.substitute(
        directives="\n".join(f"#SBATCH {option}" for option in options),
        folder=shlex.quote(job.folder),
        setup=job.setup,
        command=shlex.join(job.command),
        requeue=str(job.requeue).lower(),
    )
