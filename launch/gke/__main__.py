"""Runs a program on Google Kubernetes Engine as a JobSet.

    python -m launch.gke --image=IMAGE --gpu=nvidia-h100-80gb --gpus_per_node=8 --nodes=2 --volume=CLAIM:/runs -- \\
        python -m experiments.lpa_librispeech --workdir=/runs/base --resume ...
    python -m launch.gke --image=IMAGE --tpu=tpu-v5-lite-podslice --topology=4x8 ... -- COMMAND

hands the manifest to kubectl; --dry_run prints it. A pod that fails or is preempted makes all start anew, and resume.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import yaml

from edgespeech.errors import InputError
from launch import job
from launch.gke.manifest import TPUS, GkeJob, gpu_pool, jobset, tpu_pool

POLL_SECONDS = 15.0


def status_of(name: str, namespace: str) -> int | None:
    """0 or 1 when the JobSet has completed or failed, None before."""
    got = job.call(["kubectl", "get", "jobset", name, "--namespace", namespace, "-o", "json"])
    conditions = json.loads(got.stdout).get("status", {}).get("conditions", [])
    reached = {c["type"] for c in conditions if c["status"] == "True"}
    return 0 if "Completed" in reached else 1 if "Failed" in reached else None


def read_volumes(entries: Sequence[str]) -> dict[str, str]:
    """Claims by path, from CLAIM:/PATH.

    Raises:
        InputError: an entry is not of that form, or a path comes twice.
    """
    volumes: dict[str, str] = {}
    for entry in entries:
        claim, colon, path = entry.partition(":")
        if not (claim and colon and path) or path in volumes:
            raise InputError(f"--volume={entry}: give CLAIM:/PATH, every path once")
        volumes[path] = claim
    return volumes


def run(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.gke", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--name", default="edgespeech", help="of the JobSet (default: %(default)s)")
    add("--namespace", default="default", help="(default: %(default)s)")
    add("--image", required=True, help="container image, see Containerfile")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--gpu", help="kind of GPU, such as nvidia-h100-80gb")
    kind.add_argument("--tpu", help=f"kind of slice: {', '.join(TPUS)}")
    add("--gpus_per_node", type=int, default=8, help="(default: 8)")
    add("--nodes", type=int, default=1, help="with --gpu (default: 1)")
    add("--topology", default="", help="with --tpu: chips along each axis, such as 4x8")
    add("--volume", action="append", default=[], metavar="CLAIM:/PATH", help="what outlives a pod")
    add("--spot", action="store_true", help="on nodes that may be taken away")
    add("--max_restarts", type=int, default=100, help="after failures (default: 100)")
    add("--grace", type=int, default=120, help="seconds to save in (default: 120)")
    add("--dry_run", action="store_true", help="print the manifest and start nothing")
    add("--wait", action="store_true", help="until the job ends; Ctrl-C or SIGTERM deletes it")
    options, command = job.parse(parser, arguments)
    job.require_command(command, resumed_by="the JobSet" if options.max_restarts else None)
    if options.tpu:
        pool = tpu_pool(options.tpu, options.topology)
    else:
        pool = gpu_pool(options.gpu, options.gpus_per_node, options.nodes)
    manifest = yaml.safe_dump(
        jobset(
            GkeJob(
                command,
                options.image,
                pool,
                options.name,
                read_volumes(options.volume),
                options.spot,
                options.max_restarts,
                options.grace,
            )
        ),
        sort_keys=False,
    )
    if options.dry_run:
        print(manifest, end="")
        return 0
    where = ["--namespace", options.namespace]
    job.call(["kubectl", "apply", *where, "-f", "-"], stdin=manifest)
    print(f"JobSet {options.name}: {pool.nodes} pods", file=sys.stderr, flush=True)
    if not options.wait:
        return 0
    status = job.wait(
        lambda: status_of(options.name, options.namespace),
        lambda: job.call(["kubectl", "delete", "jobset", options.name, *where]),
        POLL_SECONDS,
    )
    first = f"job/{options.name}-workers-0"
    print(job.call(["kubectl", "logs", first, "--tail=20", *where], check=False).stdout, end="")
    return status


if __name__ == "__main__":
    job.main(run)
