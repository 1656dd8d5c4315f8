"""GKE: the manifest against the fields of the JobSet API that it uses, and the program against a stand-in kubectl."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import yaml

from edgespeech.errors import InputError
from launch.gke import __main__ as program
from launch.gke.manifest import GkeJob, gpu_pool, jobset, tpu_pool
from tests.support.tiny import ROOT
from tests.support.waiting import PATIENCE, wait_for

# The part of jobset.x-k8s.io/v1alpha2, batch/v1 and core/v1 that is used here, written down from their references. A
# key with "?" may be absent, and no key that is not named may be there; a list has items of one kind.
LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
CONTAINER = {
    "name": LABEL,
    "image": r"\S+",
    "command": [str],
    "args": [str],
    "env": [{"name": r"[A-Z_]+", "value": str}],
    "ports": [{"containerPort": range(1, 65536)}],
    "resources": {"limits": {"nvidia.com/gpu?": range(1, 17), "google.com/tpu?": range(1, 9)}},
    "volumeMounts": [{"name": LABEL, "mountPath": r"/\S*"}],
}
POD = {
    "restartPolicy": "Never|OnFailure",  # a job's pod must not be restarted forever
    "terminationGracePeriodSeconds": range(100_000),
    "nodeSelector": {
        "cloud.google.com/gke-accelerator?": r"nvidia-[a-z0-9-]+",
        "cloud.google.com/gke-tpu-accelerator?": r"tpu-[a-z0-9-]+",
        "cloud.google.com/gke-tpu-topology?": r"\d+(x\d+)+",
        "cloud.google.com/gke-spot?": "true",
    },
    "containers": [CONTAINER],
    "volumes": [
        {
            "name": LABEL,
            "emptyDir?": {"medium": "Memory"},
            "persistentVolumeClaim?": {"claimName": LABEL},
        }
    ],
}
JOB = {
    "parallelism": range(1, 10_000),
    "completions": range(1, 10_000),
    "completionMode": "Indexed",
    "backoffLimit": range(100),
    "template": {"spec": POD},
}
SCHEMA = {
    "apiVersion": r"jobset\.x-k8s\.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": LABEL},
    "spec": {
        "failurePolicy": {"maxRestarts": range(10_000)},
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
        "replicatedJobs": [
            {"name": LABEL, "replicas": range(1, 1000), "template": {"spec": JOB}},
        ],
    },
}


def validate(value, schema, path="manifest"):
    if isinstance(schema, dict):
        assert isinstance(value, dict), path
        known = {key.removesuffix("?") for key in schema}
        assert value.keys() <= known, f"{path} has {value.keys() - known}"
        for key, inner in schema.items():
            if not key.endswith("?") or key[:-1] in value:
                name = key.removesuffix("?")
                assert name in value, f"{path} lacks {name}"
                validate(value[name], inner, f"{path}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), path
        for item in value:
            validate(item, schema[0], f"{path}[]")
    elif isinstance(schema, type):
        assert type(value) is schema, path
    elif isinstance(schema, range):
        assert type(value) is int, path
        assert value in schema, path
    else:
        assert isinstance(value, str), path
        assert re.fullmatch(schema, value), f"{path} is {value!r}"


def parts(manifest):
    """Job, pod and container."""
    (replicated,) = manifest["spec"]["replicatedJobs"]
    work = replicated["template"]["spec"]
    pod = work["template"]["spec"]
    return work, pod, pod["containers"][0]


GPU = gpu_pool("nvidia-h100-80gb", 8, 2)
COMMAND = ["python", "-m", "experiments.x", "--text=$(HOME) $x"]


@pytest.mark.parametrize(
    "pool", [GPU, gpu_pool("nvidia-l4", 1, 1), tpu_pool("tpu-v5-lite-podslice", "4x8")]
)
def test_manifest_fits_the_schema(pool):
    job = GkeJob(COMMAND, "image:1", pool, volumes={"/runs": "claim", "/data": "b"}, spot=True)
    manifest = yaml.safe_load(yaml.safe_dump(jobset(job)))
    assert manifest == jobset(job)
    validate(manifest, SCHEMA)
    work, pod, container = parts(manifest)
    # What the API server would refuse, beyond the types.
    assert work["completions"] == work["parallelism"] == pool.nodes
    (resource,) = container["resources"]["limits"]
    assert any("accelerator" in label for label in pod["nodeSelector"])
    assert ("tpu" in resource) == any("tpu" in label for label in pod["nodeSelector"])
    volumes = [volume["name"] for volume in pod["volumes"]]
    assert volumes == [mount["name"] for mount in container["volumeMounts"]]
    assert len(set(volumes)) == len(volumes) == 3
    for volume in pod["volumes"]:
        assert len(volume) == 2, "a volume has one source"
    hosts = f"{manifest['metadata']['name']}-workers-0-{pool.nodes - 1}"
    assert len(hosts) <= 63


def test_gpu_pods_know_the_first_one_and_their_number():
    _, pod, container = parts(jobset(GkeJob(COMMAND, "i", GPU, "pulses")))
    assert container["env"] == [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": "pulses-workers-0-0.pulses:8476"},
        {"name": "JAX_NUM_PROCESSES", "value": "2"},
    ]
    assert container["ports"] == [{"containerPort": 8476}]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    alone = jobset(GkeJob(COMMAND, "i", gpu_pool("nvidia-l4", 1, 1)))
    assert parts(alone)[2]["env"] == []


def test_kubernetes_leaves_the_command_as_it_is():
    _, _, container = parts(jobset(GkeJob(COMMAND, "i", GPU)))
    # $(NAME) is replaced by Kubernetes, $$(NAME) becomes $(NAME).
    assert container["args"][-1] == "--text=$$(HOME) $x"
    assert not any("$(" in text for text in container["command"])


@pytest.mark.parametrize(
    ("kind", "topology", "per_host", "hosts"),
    [
        ("tpu-v5-lite-podslice", "1x1", 1, 1),
        ("tpu-v5-lite-podslice", "2x4", 8, 1),
        ("tpu-v5-lite-podslice", "4x4", 4, 4),
        ("tpu-v6e-slice", "16x16", 4, 64),
        ("tpu-v4-podslice", "2x2x1", 4, 1),
        ("tpu-v5p-slice", "4x4x8", 4, 32),
    ],
)
def test_hosts_of_a_slice(kind, topology, per_host, hosts):
    pool = tpu_pool(kind, topology)
    assert (pool.per_node, pool.nodes, pool.resource) == (per_host, hosts, "google.com/tpu")


def test_bad_settings():
    for wrong, message in (
        (lambda: tpu_pool("tpu-v9", "2x2"), "--tpu=tpu-v9: choose from tpu-v4-podslice"),
        (lambda: tpu_pool("tpu-v5p-slice", "4x4"), "--topology=4x4: tpu-v5p-slice takes NxNxN"),
        (lambda: tpu_pool("tpu-v6e-slice", ""), "takes NxN"),
        (lambda: tpu_pool("tpu-v6e-slice", "1x3"), "3 chips: give a multiple of 4"),
        (lambda: gpu_pool("nvidia-l4", 0, 1), "--gpus_per_node=0"),
        (lambda: gpu_pool("nvidia-l4", 1, 0), "--nodes=0"),
        (lambda: GkeJob([], "i", GPU, "Pulses"), "--name=Pulses"),
        (lambda: GkeJob([], "i", GPU, "a" * 41), "up to 40"),
        (lambda: GkeJob([], "", GPU), "--image is empty"),
        (lambda: GkeJob([], "i", GPU, grace=-1), "--grace=-1"),
        (lambda: GkeJob([], "i", GPU, volumes={"runs": "c"}), "'runs' is no absolute path"),
        (lambda: program.read_volumes(["claim"]), "--volume=claim: give CLAIM:/PATH"),
        (lambda: program.read_volumes(["a:/x", "b:/x"]), "every path once"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            wrong()


@pytest.mark.parametrize(
    ("body", "told", "status"),
    [
        ("exit 0", False, 0),
        ("exit 4", False, 4),
        # Saved and done with 0, but told to stop: the JobSet must not take it for the end.
        ("trap 'touch saved; exit 0' TERM; touch ready; while :; do sleep 0.02; done", True, 143),
    ],
)
def test_a_pod_that_was_told_to_stop_does_not_count_as_done(tmp_path, body, told, status):
    command = parts(jobset(GkeJob([], "i", GPU)))[2]["command"]
    process = subprocess.Popen([*command, "bash", "-c", body], cwd=tmp_path)
    if told:
        wait_for((tmp_path / "ready").exists)
        process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == status
    assert (tmp_path / "saved").exists() == told


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """A stand-in that keeps its arguments and what it was given, and says that the JobSet is as `state` says."""
    path = tmp_path / "bin" / "kubectl"
    path.parent.mkdir()
    path.write_text(
        f"""#!/bin/bash
echo "$*" >> {tmp_path}/calls.txt
case "$1" in
  apply) cat > {tmp_path}/applied.yaml ;;
  get) cat {tmp_path}/state.json ;;
  logs) echo 'the end' ;;
esac
"""
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    (tmp_path / "state.json").write_text("{}")
    return tmp_path


ARGUMENTS = ["--image=i:1", "--gpu=nvidia-l4", "--gpus_per_node=1", "--nodes=3", "--name=try"]


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "launch.gke", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_applies_what_dry_run_prints(kubectl):
    command = ["--", "python", "-m", "experiments.x", "--resume"]
    printed = start(*ARGUMENTS, "--volume=claim:/runs", "--dry_run", *command).communicate()[0]
    assert not (kubectl / "calls.txt").exists()
    validate(yaml.safe_load(printed), SCHEMA)
    applied = start(*ARGUMENTS, "--volume=claim:/runs", *command)
    _, said = applied.communicate()
    assert applied.returncode == 0, said
    assert said == "JobSet try: 3 pods\n"
    assert (kubectl / "applied.yaml").read_text() == printed
    assert (kubectl / "calls.txt").read_text() == "apply --namespace default -f -\n"


def test_bad_command_lines():
    for arguments, message in (
        (["--", "x"], "the command lacks --resume, and the JobSet starts it anew"),
        ([], "no command"),
        (["--volume=x", "--", "x", "--resume"], "--volume=x"),
    ):
        process = start(*ARGUMENTS, *arguments)
        assert message in process.communicate()[1]
        assert process.returncode == 2


@pytest.mark.parametrize(
    ("conditions", "status"),
    [
        ([], None),
        ([{"type": "Completed", "status": "True"}], 0),
        ([{"type": "Completed", "status": "False"}, {"type": "Failed", "status": "True"}], 1),
        ([{"type": "StartupPolicyCompleted", "status": "True"}], None),
    ],
)
def test_status_of_a_jobset(kubectl, conditions, status):
    (kubectl / "state.json").write_text(json.dumps({"status": {"conditions": conditions}}))
    assert program.status_of("try", "lab") == status
    assert (kubectl / "calls.txt").read_text() == "get jobset try --namespace lab -o json\n"


def test_waiting_ends_with_the_job_and_shows_the_end_of_its_log(kubectl):
    failed = {"status": {"conditions": [{"type": "Failed", "status": "True"}]}}
    (kubectl / "state.json").write_text(json.dumps(failed))
    process = start(*ARGUMENTS, "--wait", "--", "x", "--resume")
    assert process.communicate(timeout=PATIENCE)[0] == "the end\n"
    assert process.returncode == 1
    last = (kubectl / "calls.txt").read_text().splitlines()[-1]
    assert last == "logs job/try-workers-0 --tail=20 --namespace default"


def test_waiting_deletes_the_jobset_when_interrupted(kubectl):
    process = start(*ARGUMENTS, "--wait", "--", "x", "--resume")
    calls = kubectl / "calls.txt"
    wait_for(lambda: calls.exists() and "get" in calls.read_text())
    process.terminate()
    assert process.communicate(timeout=PATIENCE)[1].endswith("interrupted\n")
    assert process.returncode == 130
    assert calls.read_text().splitlines()[-1] == "delete jobset try --namespace default"
