"""Several processes, one program: how each learns its place among them, and where they leave word for each other.

Every process runs the whole program. Training is one computation over the devices of all; everything else, evaluation
too, each process does for itself and comes to the same result.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

# Private to JAX, and what Orbax uses: the coordinator's table of keys is nowhere public.
from jax._src import distributed as jax_distributed

from edgespeech.errors import InputError

WAIT_MINUTES = 30.0  # for the slowest process, at a place that all must reach


@dataclass(frozen=True)
class Place:
    """Where one process stands among all of a run.

    Attributes:
        coordinator: `HOST:PORT` at which process 0 listens and all others can reach it.
        num_processes: of the run.
        process_id: of this one, from 0.
        one_device: this process has one accelerator of its host, by its number on the host; None has all of them.

    Raises:
        InputError: no such place.
    """

    coordinator: str
    num_processes: int
    process_id: int
    one_device: int | None = None

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise InputError(
                f"the coordinator is {self.coordinator!r}: give HOST:PORT of process 0, such as node1:8476"
            )
        if not 0 <= self.process_id < self.num_processes:
            raise InputError(
                f"process {self.process_id} of {self.num_processes}: give a process_id from 0 to num_processes - 1"
            )


class TPUPod:
    """The hosts of a TPU slice: JAX asks the machine itself for their places."""


def find_place(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Place | TPUPod | None:
    """The place that the settings give, or else the environment; None for a process that is alone.

    The environment is that of a task of SLURM's `srun`, of a pod of a Kubernetes job (`JOB_COMPLETION_INDEX`, beside
    `JAX_COORDINATOR_ADDRESS` and `JAX_NUM_PROCESSES`), or of a TPU host.

    Args:
        coordinator: `HOST:PORT` of process 0.
        num_processes: of the run.
        process_id: of this one, from 0.
        environment: variables of the process.

    Raises:
        InputError: some of the settings without the others, or values that do not go together.
    """
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if num_processes == 1 and len(missing) < 3:
        return None
    if not missing:
        assert coordinator is not None
        assert num_processes is not None
        assert process_id is not None
        return Place(coordinator, num_processes, process_id)
    if len(missing) < 3:
        raise InputError(
            f"{', '.join('--' + name for name in given if name not in missing)} without "
            f"{', '.join('--' + name for name in missing)}: give all three, or none to ask SLURM, Kubernetes or the TPU"
        )
    for find in (_slurm, _kubernetes):
        place = find(environment)
        if place is not None:
            return place if place.num_processes > 1 else None
    return TPUPod() if _on_tpu_host(environment) else None


def _slurm(environment: Mapping[str, str]) -> Place | None:
    # srun sets these for its tasks; a batch script has SLURM_NTASKS as well and is alone all the same.
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    if not all(name in environment for name in names):
        return None
    tasks, task, nodes, job = (environment[name] for name in names)
    # The port is the same on all hosts without their talking, and differs between the jobs on one.
    port = 61440 + int(job) % 4096
    several_per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0] != "1"
    one_device = int(environment.get("SLURM_LOCALID", "0")) if several_per_node else None
    return Place(f"{_first_node(nodes)}:{port}", int(tasks), int(task), one_device)


def _first_node(nodes: str) -> str:
    """The first of SLURM's list: `n07` of `n07,n09`, of `n[07-09,12]` and of `n[07,12],m1`."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    return head + rest.replace(",", "-").replace("]", "-").split("-")[0]


def _kubernetes(environment: Mapping[str, str]) -> Place | None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX")
    missing = [name for name in names if name not in environment]
    # Each pod of an indexed job has its number, also where it is alone.
    if not {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"} & environment.keys():
        return None
    if missing:
        raise InputError(
            f"the environment has {', '.join(n for n in names if n not in missing)} without {', '.join(missing)}: "
            "set all of them, and make the job an indexed one"
        )
    address, count, index = (environment[name] for name in names)
    return Place(address, int(count), int(index))


def _on_tpu_host(environment: Mapping[str, str]) -> bool:
    if find_spec("libtpu") is None or environment.get("JAX_PLATFORMS", "tpu") != "tpu":
        return False
    hosts = environment.get("TPU_WORKER_HOSTNAMES")
    if hosts is not None:
        return len(hosts.split(",")) > 1
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def start(place: Place | TPUPod, heartbeat_seconds: float) -> None:
    """Joins the other processes; call it before anything is computed.

    Args:
        place: see `find_place`.
        heartbeat_seconds: silence after which a process counts as dead. JAX waits three times as long: `Peers` is to
            find it first, and says more.
    """
    # Whoever is told to stop tells the others by way of `Stopper`, in evaluation too.
    jax.config.update("jax_enable_preemption_service", False)
    settings: dict[str, Any] = {
        "heartbeat_timeout_seconds": max(10, int(3 * heartbeat_seconds)),
        # The last one may still draw plots.
        "shutdown_timeout_seconds": int(60 * WAIT_MINUTES),
    }
    if isinstance(place, Place):
        # The environment has been asked already.
        settings |= {"cluster_detection_method": "deactivate"}
        settings |= {"coordinator_address": place.coordinator}
        settings |= {"num_processes": place.num_processes, "process_id": place.process_id}
        settings |= {"local_device_ids": place.one_device}
    jax.distributed.initialize(**settings)


def client() -> Any:
    """The line to the coordinator, process 0; None for a process that is alone."""
    return jax_distributed.global_state.client


class Board:
    """A table that all processes read and write; of a process that is alone, its own."""

    def __init__(self):
        self._own: dict[str, str] = {}

    def put(self, key: str, value: str) -> None:
        """Writes an entry over what is there."""
        if client() is None:
            self._own[key] = value
        else:
            client().key_value_set(f"edgespeech/{key}", value, allow_overwrite=True)

    def read(self, folder: str) -> dict[str, str]:
        """The entries `FOLDER/NAME` by their names."""
        entries = self._own.items()
        if client() is not None:
            entries = client().key_value_dir_get(f"edgespeech/{folder}/")
        found = {tuple(key.split("/")[-2:]): value for key, value in entries}
        return {name: value for (where, name), value in found.items() if where == folder}


def barrier(name: str) -> None:
    """Waits until all processes are here; a name is used once. A process that is alone goes on."""
    if client() is not None:
        client().wait_at_barrier(f"edgespeech/{name}", int(WAIT_MINUTES * 60_000))


def require_same(name: str, value: str) -> None:
    """Refuses to go on where a process differs from process 0; a name is used once.

    Raises:
        InputError: the value is another than that of process 0.
    """
    if client() is None:
        return
    key = f"edgespeech/same/{name}"
    if jax.process_index() == 0:
        client().key_value_set(key, value)
    first = client().blocking_key_value_get(key, int(WAIT_MINUTES * 60_000))
    if first != value:
        raise InputError(
            f"process {jax.process_index()} differs from process 0 in {name}: {value} and {first}; "
            "give all processes the same command, code, data and kind of machine"
        )
