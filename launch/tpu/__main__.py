"""Creates a TPU VM pod slice, runs a program on all its hosts, watches it, and gives the slice back.

    python -m launch.tpu create --name=pod --zone=us-central1-a --accelerator=v5litepod-64 --spot
    python -m launch.tpu run    --name=pod --zone=us-central1-a -- python -m experiments.X --resume ...
    python -m launch.tpu watch  --name=pod --zone=us-central1-a [--accelerator=... --spot -- COMMAND]
    python -m launch.tpu delete --name=pod --zone=us-central1-a

--dry_run prints the gcloud commands. `run` copies this repository to every host; give it again after a change. With
--accelerator and the command, `watch` creates a slice anew that was taken away, and the program resumes: its workdir
must lie on storage that outlives the slice (mount it with --setup).
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from edgespeech.errors import InputError
from launch import job
from launch.tpu.slice import IMAGES, Slice

POLL_SECONDS = 30.0
GONE = {"", "PREEMPTED", "TERMINATED", "STOPPED", "DELETING"}


def watch(pod: Slice, options: argparse.Namespace, command: Sequence[str]) -> int:
    """Waits for the job; returns its exit status. Ctrl-C or SIGTERM ends a job that this call started."""

    def poll() -> int | None:
        state = pod.state()
        if state in GONE:
            if not (command and options.accelerator):
                raise InputError(
                    f"slice {pod.name} is {state.lower() or 'not there'}: `watch` with --accelerator and the command "
                    "after -- creates it anew, if the workdir outlives it"
                )
            print(
                f"slice {pod.name} is {state or 'gone'}: another one", file=sys.stderr, flush=True
            )
            if state:
                pod.delete()
            pod.create(options.accelerator, options.image, options.spot)
            pod.start(command, options.setup)
            return None
        status = pod.exit_status() if state == "READY" else None
        if status is not None:
            print(pod.log_tail(), end="", flush=True)
            if options.fetch:
                pod.fetch(options.fetch)
        return status

    return job.wait(poll, pod.stop if command else lambda: None, POLL_SECONDS)


def run(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.tpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("verb", choices=["create", "run", "watch", "delete"])
    add("--name", required=True, help="of the slice")
    add("--zone", required=True, help="where it is")
    add("--project", default="", help="(default: gcloud's own)")
    add("--accelerator", default="", help=f"type and size: {', '.join(s + 'N' for s in IMAGES)}")
    add("--image", default="", help="software of the hosts (default: what suits the type)")
    add("--spot", action="store_true", help="cheaper, and may be taken away")
    add("--setup", default="", help="run: shell line that comes first on every host")
    add("--wait", action="store_true", help="run: until the job ends, as `watch` does")
    add("--fetch", default="", help="watch, run --wait: folder to copy back when the job has ended")
    add("--dry_run", action="store_true", help="print the gcloud commands and run none")
    options, command = job.parse(parser, arguments)
    pod = Slice(options.name, options.zone, options.project, options.dry_run)
    if options.verb == "delete":
        pod.delete()
    if options.verb == "create":
        if not options.accelerator:
            raise InputError("create: give --accelerator, such as v5litepod-64")
        pod.create(options.accelerator, options.image, options.spot)
    if options.verb == "run":
        job.require_command(command, resumed_by="--wait" if options.accelerator else None)
        pod.start(command, options.setup)
        print(f"slice {pod.name}: `{shlex.join(command)}`", file=sys.stderr, flush=True)
    if options.verb == "watch" and command:
        job.require_command(command, resumed_by="`watch`")
    if options.verb == "watch" or (options.verb == "run" and options.wait):
        if pod.dry_run:
            pod.state()
            pod.exit_status()
            pod.log_tail()
            return 0
        return watch(pod, options, command)
    return 0


if __name__ == "__main__":
    job.main(run)
