"""Where a process stands, from settings and from the environments of SLURM, Kubernetes and TPU hosts."""

import importlib.machinery

import pytest

from edgespeech.errors import InputError
from edgespeech.training import distributed
from edgespeech.training.distributed import Board, Place, TPUPod, barrier, find_place, require_same

SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
POD = {
    "JAX_COORDINATOR_ADDRESS": "edge-workers-0-0.edge:8476",
    "JAX_NUM_PROCESSES": "8",
    "JOB_COMPLETION_INDEX": "5",
}


def test_settings_come_before_the_environment():
    assert find_place("node1:8476", 4, 3, SLURM) == Place("node1:8476", 4, 3)
    assert find_place("[::1]:80", 2, 0, {}) == Place("[::1]:80", 2, 0)


@pytest.mark.parametrize("environment", [{}, {"JOB_COMPLETION_INDEX": "0", "SLURM_NTASKS": "4"}])
def test_alone(environment):
    assert find_place(environment=environment) is None


def test_one_process_needs_no_other():
    assert find_place(None, 1, None, {}) is None
    assert find_place("node1:8476", 1, 0, {}) is None
    assert (
        find_place(environment=SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    )
    one = {"JAX_NUM_PROCESSES": "1", "JOB_COMPLETION_INDEX": "0"}
    assert find_place(environment=POD | one) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a:1", None, None), "--coordinator without --num_processes, --process_id: give all"),
        (("a:1", 2, None), "--coordinator, --num_processes without --process_id"),
        ((None, None, 0), "--process_id without --coordinator, --num_processes"),
        (("node1", 2, 0), "the coordinator is 'node1': give HOST:PORT"),
        ((":8476", 2, 0), "the coordinator is ':8476'"),
        (("a:99999", 2, 0), "the coordinator is 'a:99999'"),
        (("a:b", 2, 0), "the coordinator is 'a:b'"),
        (("a:1", 2, 2), "process 2 of 2: give a process_id from 0"),
    ],
)
def test_half_given_or_wrong(given, message):
    with pytest.raises(InputError, match=message):
        find_place(*given, environment={})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n07", "n07"),
        ("n07,n09", "n07"),
        ("gpu[07-09,12]", "gpu07"),
        ("gpu[7,12],m1", "gpu7"),
        ("gpu[12]", "gpu12"),
        ("a1,gpu[07-09]", "a1"),
    ],
)
def test_slurm(nodes, first):
    port = 61440 + 70001 % 4096
    found = find_place(environment=SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert found == Place(f"{first}:{port}", 4, 2)


def test_slurm_with_a_task_for_every_accelerator():
    several = {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"}
    found = find_place(environment=SLURM | several)
    assert isinstance(found, Place)
    assert found.one_device == 1


def test_kubernetes():
    assert find_place(environment=POD) == Place("edge-workers-0-0.edge:8476", 8, 5)
    for name in POD:
        if name != "JOB_COMPLETION_INDEX":
            half = {key: value for key, value in POD.items() if key != name}
            with pytest.raises(InputError, match=f"without {name}: set all"):
                find_place(environment=half)
    half = {key: value for key, value in POD.items() if key != "JOB_COMPLETION_INDEX"}
    with pytest.raises(InputError, match="make the job an indexed one"):
        find_place(environment=half)


def test_tpu(monkeypatch):
    spec = importlib.machinery.ModuleSpec("libtpu", None)
    monkeypatch.setattr(distributed, "find_spec", lambda name: spec)
    assert isinstance(find_place(environment={"TPU_WORKER_HOSTNAMES": "a,b"}), TPUPod)
    assert find_place(environment={"TPU_WORKER_HOSTNAMES": "a"}) is None
    assert find_place(environment={"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}) is None


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (
            Place("node1:8476", 4, 3),
            {
                "coordinator_address": "node1:8476",
                "num_processes": 4,
                "process_id": 3,
                "local_device_ids": None,
                "cluster_detection_method": "deactivate",
            },
        ),
        (TPUPod(), {}),
    ],
)
def test_what_jax_is_told(monkeypatch, place, expected):
    told = {}
    monkeypatch.setattr(
        distributed.jax.distributed, "initialize", lambda **given: told.update(given)
    )
    monkeypatch.setattr(distributed.jax.config, "update", lambda *given: None)
    distributed.start(place, heartbeat_seconds=20.0)
    assert told.pop("heartbeat_timeout_seconds") == 60
    assert told.pop("shutdown_timeout_seconds") >= 60
    assert told == expected


class Line:
    """The coordinator's table, as far as it is used."""

    def __init__(self):
        self.table = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.table
        self.table[key] = value

    def blocking_key_value_get(self, key, timeout):
        return self.table[key]

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.table.items() if key.startswith(folder)]


def test_a_process_that_differs_is_refused(monkeypatch):
    line = Line()
    monkeypatch.setattr(distributed, "client", lambda: line)
    monkeypatch.setattr(distributed.jax, "process_index", lambda: 0)
    require_same("the order of layers", "[3, 1]")
    monkeypatch.setattr(distributed.jax, "process_index", lambda: 1)
    require_same("the order of layers", "[3, 1]")
    message = r"process 1 differs from process 0 in the order of layers: \[1, 3\] and \[3, 1\]"
    with pytest.raises(InputError, match=message):
        require_same("the order of layers", "[1, 3]")


def test_a_board_of_several(monkeypatch):
    line = Line()
    monkeypatch.setattr(distributed, "client", lambda: line)
    Board().put("peers/0", "a")
    Board().put("peers/0", "b")
    Board().put("peers/1", "c")
    Board().put("peersons/1", "d")
    assert Board().read("peers") == {"0": "b", "1": "c"}


def test_alone_there_is_nobody_to_wait_for():
    barrier("here")
    require_same("settings", "a")
    board = Board()
    board.put("peers/0", "a")
    board.put("peers/0", "b")
    board.put("stop/asked", "c")
    assert board.read("peers") == {"0": "b"}
    assert board.read("stop") == {"asked": "c"}
    assert board.read("nothing") == {}
