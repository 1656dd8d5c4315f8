"""Starts `tests.training.worker` as one or several processes, and waits for them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from launch.local import free_port
from tests.support.tiny import ROOT
from tests.support.waiting import PATIENCE, wait_for

# Almost all of the time goes into compiling, which takes half as long without optimisation; all runs that are compared
# are compiled alike.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


class Processes:
    """Workers of one run; what they print is in `WORKDIR/output_I.txt`."""

    def __init__(self, workdir: Path, jobs: str, *flags: str, count: int = 2, devices: int = 2):
        workdir.mkdir(exist_ok=True)
        self.outputs = [workdir / f"output_{i}.txt" for i in range(count)]
        command = [sys.executable, "-m", "tests.training.worker", str(workdir), jobs, *flags]
        command.append(f"--devices={devices}")
        if count > 1:
            command += [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
        environment = os.environ | {"XLA_FLAGS": FAST_COMPILE}
        self.processes = []
        for index, output in enumerate(self.outputs):
            own = [f"--process_id={index}"] if count > 1 else []
            with output.open("wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *own], stdout=file, stderr=file, cwd=ROOT, env=environment
                    )
                )

    def output(self, index: int) -> str:
        """What a process has printed so far."""
        return self.outputs[index].read_text(errors="replace")

    def wait_until(self, happened) -> None:
        """Waits for a condition while all processes live."""

        def happened_while_all_live():
            if happened():
                return True
            assert all(p.poll() is None for p in self.processes), self.everything()
            return False

        wait_for(happened_while_all_live, self.everything)

    def end(self) -> list[int]:
        """The exit statuses; a process that does not end is killed."""
        deadline = time.monotonic() + PATIENCE
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def everything(self) -> str:
        """What all have printed, for a message."""
        return "\n".join(f"[{i}] {self.output(i)[-3000:]}" for i in range(len(self.outputs)))


def run(workdir: Path, jobs: str, *flags: str, count: int = 2, devices: int = 2) -> Path:
    """Runs workers to their end, which must be a good one."""
    processes = Processes(workdir, jobs, *flags, count=count, devices=devices)
    assert processes.end() == [0] * count, processes.everything()
    return workdir


def leaves(workdir: Path, job: str) -> list[np.ndarray]:
    """The arrays of the state after a job, in the tree's order: step, parameters, average, ..."""
    with np.load(workdir / f"{job}.npz") as saved:
        return [saved[f"leaf{i}"] for i in range(len(saved))]
