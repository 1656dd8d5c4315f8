"""Run a program as several processes on this machine.

Command     python -m launch.local --processes=2 --devices_per_process=2 -- \\
                python -m experiments.lpa_librispeech --workdir=runs/two
Hardware    CPU; every process has so many virtual devices. It is for trying out what is to run on several hosts: one
            process uses all devices of a machine by itself, and faster.
Expect      the output of every process, each line with the number of its process; the exit status is the first that is
            not 0. SIGTERM and Ctrl-C are handed on, and stop the run with its last step saved.

The program gets --coordinator, --num_processes and --process_id, as every program that trains takes.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence


def free_port() -> int:
    """A port on which nobody listens at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: Sequence[str], processes: int, devices: int) -> list[subprocess.Popen]:
    """Starts the processes, each with a session of its own: a Ctrl-C of the terminal reaches this program alone."""
    coordinator = f"127.0.0.1:{free_port()}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONUNBUFFERED": "1",
    }
    return [
        subprocess.Popen(
            [
                *command,
                f"--coordinator={coordinator}",
                f"--num_processes={processes}",
                f"--process_id={index}",
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for index in range(processes)
    ]


def copy_lines(index: int, process: subprocess.Popen) -> None:
    """Copies what a process prints, line by line, with its number in front."""
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.buffer.write(b"[%d] " % index + line.rstrip(b"\n") + b"\n")
        sys.stdout.buffer.flush()


def exit_status(code: int) -> int:
    """The status of a process as a shell has it: 128 and the signal's number for one that was killed."""
    return code if code >= 0 else 128 - code


def run(command: Sequence[str], processes: int, devices: int, grace: float) -> int:
    """Runs the program to its end and returns the first exit status that is not 0, or 0.

    Args:
        command: the program and its arguments.
        processes: how many.
        devices: virtual devices of each.
        grace: seconds that the others get when one has failed, and then again before they are killed.
    """
    children = start(command, processes, devices)
    printers = [
        threading.Thread(target=copy_lines, args=pair, daemon=True) for pair in enumerate(children)
    ]

    def tell(number: int, frame=None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    status = 0
    failed_at: float | None = None
    steps = iter((signal.SIGTERM, signal.SIGKILL))
    try:
        for printer in printers:
            printer.start()
        while any(child.poll() is None for child in children):
            failed = [i for i, child in enumerate(children) if child.poll()]
            if failed and failed_at is None:
                status, failed_at = exit_status(children[failed[0]].returncode), time.monotonic()
                print(
                    f"process {failed[0]} of {processes} ended with status {status}",
                    file=sys.stderr,
                    flush=True,
                )
            if failed_at is not None and time.monotonic() > failed_at + grace:
                failed_at = time.monotonic()
                tell(next(steps, signal.SIGKILL))
            time.sleep(0.1)
    finally:
        tell(signal.SIGKILL)
        for printer in printers:
            printer.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    return status or next((exit_status(c.returncode) for c in children if c.returncode), 0)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.local", description="Several processes on this machine."
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices_per_process", type=int, default=1)
    parser.add_argument(
        "--grace_seconds",
        type=float,
        default=30.0,
        help="time that the others get to end by themselves when one has failed",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("no command: write -- python -m experiments.X --flags")
    for name in ("processes", "devices_per_process"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}={getattr(arguments, name)}: give at least 1")
    sys.exit(
        run(command, arguments.processes, arguments.devices_per_process, arguments.grace_seconds)
    )


if __name__ == "__main__":
    main()
