"""JobSet manifests (https://jobset.sigs.k8s.io, v1alpha2) for GPU nodes and for one TPU slice."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgespeech.errors import InputError

PORT = 8476  # of the coordinator, the first pod
# A program that is told to stop saves and exits with 0, which Kubernetes would take for the end of the job: the pod
# that was told exits with 143 instead, and the JobSet starts all pods anew. A variable for $! would be set too late for
# a signal that comes as the program starts.
_RUN = """\
trap 'trap "" TERM; kill -TERM "$!"; wait "$!"; exit 143' TERM
"$@" &
wait "$!"
"""
# Axes of a slice's topology, by the name that GKE gives the kind of slice.
TPUS = {
    "tpu-v4-podslice": 3,
    "tpu-v5-lite-podslice": 2,
    "tpu-v5p-slice": 3,
    "tpu-v6e-slice": 2,
}


@dataclass(frozen=True)
class Pool:
    """The nodes that a job runs on.

    Attributes:
        selector: labels of the nodes.
        resource: what a pod is given, `nvidia.com/gpu` or `google.com/tpu`.
        per_node: how many of it.
        nodes: pods, one a node.
    """

    selector: dict[str, str]
    resource: str
    per_node: int
    nodes: int


def gpu_pool(kind: str, per_node: int, nodes: int) -> Pool:
    """Nodes with GPUs; `kind` is GKE's name, such as `nvidia-h100-80gb`.

    Raises:
        InputError: a number below 1.
    """
    for name, value in (("gpus_per_node", per_node), ("nodes", nodes)):
        if value < 1:
            raise InputError(f"--{name}={value}: it must be at least 1")
    return Pool({"cloud.google.com/gke-accelerator": kind}, "nvidia.com/gpu", per_node, nodes)


def tpu_pool(kind: str, topology: str) -> Pool:
    """All hosts of one slice.

    A host has four chips; slices of up to eight chips of the kinds with a flat topology are one host.

    Raises:
        InputError: an unknown kind, or a topology that it does not have.
    """
    if kind not in TPUS:
        raise InputError(f"--tpu={kind}: choose from {', '.join(TPUS)}")
    axes, shape = TPUS[kind], "x".join("N" * TPUS[kind])
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", topology) or topology.count("x") != axes - 1:
        raise InputError(f"--topology={topology}: {kind} takes {shape}, the chips along each axis")
    chips = math.prod(map(int, topology.split("x")))
    per_host = chips if axes == 2 and chips in (1, 4, 8) else 4
    if chips % per_host:
        raise InputError(f"--topology={topology} has {chips} chips: give a multiple of 4")
    selector = {
        "cloud.google.com/gke-tpu-accelerator": kind,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    return Pool(selector, "google.com/tpu", per_host, chips // per_host)


@dataclass(frozen=True)
class GkeJob:
    """A program on a pool of nodes.

    Attributes:
        command: runs in every pod.
        image: container image, see Containerfile.
        pool: the nodes.
        name: of the JobSet; of its pods' host names too, which must not exceed 63 characters.
        volumes: persistent volume claims by the path where they appear, such as `{"/runs": "edgespeech"}`.
        spot: on nodes that may be taken away.
        max_restarts: of the whole JobSet, after a failure or a preemption.
        grace: seconds to save in when a pod is told to stop. Spot nodes give about 15 whatever it says.

    Raises:
        InputError: a name that Kubernetes refuses, or a number out of range.
    """

    command: Sequence[str]
    image: str
    pool: Pool
    name: str = "edgespeech"
    volumes: dict[str, str] = field(default_factory=dict)
    spot: bool = False
    max_restarts: int = 100
    grace: int = 120

    def __post_init__(self):
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise InputError(
                f"--name={self.name}: use up to 40 lower-case letters, digits and '-', a letter first"
            )
        if not self.image:
            raise InputError("--image is empty: name the image that Containerfile was built to")
        for name, value in (("max_restarts", self.max_restarts), ("grace", self.grace)):
            if value < 0:
                raise InputError(f"--{name}={value}: it must be at least 0")
        for path in self.volumes:
            if not path.startswith("/"):
                raise InputError(f"--volume: {path!r} is no absolute path: give CLAIM:/PATH")


def jobset(job: GkeJob) -> dict[str, Any]:
    """The manifest, as plain data."""
    pool = job.pool
    # TPU hosts find each other by what GKE tells them. GPU nodes are told here, and their own number by Kubernetes.
    environment = []
    if pool.resource != "google.com/tpu" and pool.nodes > 1:
        first = f"{job.name}-workers-0-0.{job.name}:{PORT}"
        environment = [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": first},
            {"name": "JAX_NUM_PROCESSES", "value": str(pool.nodes)},
        ]
    mounts = [{"name": "memory", "mountPath": "/dev/shm"}]  # 64 MB otherwise: NCCL needs more
    volumes: list[dict[str, Any]] = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]
    for number, (path, claim) in enumerate(job.volumes.items()):
        mounts.append({"name": f"volume-{number}", "mountPath": path})
        source = {"persistentVolumeClaim": {"claimName": claim}}
        volumes.append({"name": f"volume-{number}", **source})
    container = {
        "name": "main",
        "image": job.image,
        "command": ["bash", "-c", _RUN, "run"],
        "args": [argument.replace("$(", "$$(") for argument in job.command],
        "env": environment,
        "ports": [{"containerPort": PORT}],
        "resources": {"limits": {pool.resource: pool.per_node}},
        "volumeMounts": mounts,
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace,
        "nodeSelector": pool.selector | ({"cloud.google.com/gke-spot": "true"} if job.spot else {}),
        "containers": [container],
        "volumes": volumes,
    }
    workers = {
        "parallelism": pool.nodes,
        "completions": pool.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one pod alone cannot go on: the JobSet starts all anew
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name},
        "spec": {
            "failurePolicy": {"maxRestarts": job.max_restarts},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [{"name": "workers", "replicas": 1, "template": {"spec": workers}}],
        },
    }
