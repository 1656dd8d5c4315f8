"""Two processes of two devices train as one of four does; and whatever happens to one of them, none hangs."""

import re
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from edgespeech.training.metrics import read_metrics
from edgespeech.training.peers import LOST
from tests.support.tiny import assert_same_bits, tiny_model
from tests.training.processes import Processes, leaves, run
from tests.training.worker import CTC_LAYERS

MODELS = ("ctc", "ctc.fsdp2", "ctc.model2", "splitformer", "sepformer", "edge")
STEPS = 4
UNENDING = ("--slow=0.3", "--steps=100000")
CONVERSION = ("sweep_lpa", "convert_lpa")  # the stages of Moonshine's


def metrics(workdir, job):
    return read_metrics(workdir / "metrics" / f"{job}.jsonl")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process of four devices, everything replicated."""
    jobs = [job for job in MODELS if "." not in job]
    jobs += ["moonshine", "plain"]
    return run(tmp_path_factory.mktemp("one"), ",".join(jobs), count=1, devices=4)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes of two devices."""
    jobs = (*MODELS, "moonshine", "plain", "plain.fsdp2")
    return run(tmp_path_factory.mktemp("two"), ",".join(jobs))


@pytest.mark.parametrize("job", MODELS + CONVERSION)
def test_losses_are_those_of_one_process(one, two, job):
    expected, found = metrics(one, job.split(".")[0]), metrics(two, job)
    assert [row["step"] for row in found] == list(range(3 if job in CONVERSION else STEPS))
    for name in expected[0]:
        np.testing.assert_allclose(
            [row[name] for row in found],
            [row[name] for row in expected],
            rtol=2e-5,
            atol=1e-7,
            err_msg=name,
        )


def by_name(vector):
    _, params = nnx.split(tiny_model(num_layers=CTC_LAYERS))
    _, unravel = ravel_pytree(params)
    flat = nnx.to_flat_state(unravel(jnp.asarray(vector)))
    return {".".join(map(str, path)): np.asarray(value[...]) for path, value in flat}


@pytest.mark.parametrize("job", ["ctc", "ctc.fsdp2", "ctc.model2"])
def test_parameters_are_those_of_one_process(one, two, job):
    for index in (1, 2):
        here, there = by_name(leaves(one, "ctc")[index]), by_name(leaves(two, job)[index])
        for name in here:
            # Softmax does not see the keys' bias: its gradient is rounding alone, which Adam scales to full size.
            if "k_proj.bias" not in name:
                np.testing.assert_allclose(there[name], here[name], rtol=0, atol=2e-5, err_msg=name)


def test_only_the_first_process_writes(two):
    names = {path.name for path in two.iterdir()}
    folders = {"checkpoints", "metrics", "timing", "tensorboard", "skipped"}
    assert {name for name in names if "." not in name} <= folders
    assert len(metrics(two, "ctc")) == STEPS
    rows = read_metrics(two / "timing" / "ctc.jsonl")
    # Of all processes: 6 utterances of 0.375 and 0.5 s in two steps, at one of two speeds.
    assert all(row["utterances_per_second"] > 0 for row in rows)


@pytest.mark.parametrize(("count", "devices"), [(1, 4), (1, 2), (1, 1)])
def test_another_number_of_processes_goes_on(one, two, tmp_path, count, devices):
    """The checkpoint of step 3 of two processes, its 13 parameters cut in two, finished by others."""
    saved = two / "checkpoints" / "plain.fsdp2" / "3"
    shutil.copytree(saved, tmp_path / "checkpoints" / "plain" / "3")
    run(tmp_path, "plain", count=count, devices=devices)
    [row] = metrics(tmp_path, "plain")
    expected = metrics(one, "plain")[3]
    for name in ("loss", "gradient_norm"):
        assert row[name] == pytest.approx(expected[name], rel=2e-5)


def steps_done(workdir):
    path = workdir / "metrics" / "plain.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_one_is_told_to_stop_and_all_stop_at_one_step(two, tmp_path):
    flags = ("--slow=4", "--save_every=1000")
    processes = Processes(tmp_path, "plain", *flags)
    processes.wait_until(lambda: steps_done(tmp_path) >= 1)
    processes.processes[1].send_signal(signal.SIGTERM)
    assert processes.end() == [0, 0], processes.everything()
    done = steps_done(tmp_path)
    assert 0 < done < STEPS
    assert [p.name for p in (tmp_path / "checkpoints" / "plain").iterdir()] == [str(done)]
    run(tmp_path, "plain")
    assert metrics(tmp_path, "plain") == metrics(two, "plain")
    assert_same_bits(leaves(tmp_path, "plain"), leaves(two, "plain"))


def test_told_to_stop_outside_of_training(tmp_path):
    processes = Processes(tmp_path, "plain", "--idle=300")
    processes.wait_until(lambda: all("ready" in processes.output(i) for i in range(2)))
    processes.processes[0].send_signal(signal.SIGTERM)
    assert processes.end() == [0, 0], processes.everything()
    assert steps_done(tmp_path) == 0


def test_one_is_killed_and_the_other_stops_and_names_it(tmp_path):
    processes = Processes(tmp_path, "plain", *UNENDING, "--heartbeat_seconds=5")
    processes.wait_until(lambda: steps_done(tmp_path) >= 1)
    processes.processes[1].kill()
    assert processes.end() == [LOST, -signal.SIGKILL], processes.everything()
    assert re.search(r"process 1 of 2 \(on .+\) has given no sign of life", processes.output(0))


def test_the_coordinator_is_killed_and_the_other_does_not_hang(tmp_path):
    processes = Processes(tmp_path, "plain", *UNENDING)
    processes.wait_until(lambda: steps_done(tmp_path) >= 1)
    processes.processes[0].kill()
    # JAX ends the process itself, at once, with what it has to say.
    assert processes.end() == [-signal.SIGKILL, -signal.SIGABRT], processes.everything()
    assert "the leader task was preempted/died" in processes.output(1)


def test_one_fails_and_the_other_says_why(tmp_path):
    processes = Processes(tmp_path, "plain", *UNENDING)
    processes.wait_until(lambda: steps_done(tmp_path) >= 1)
    processes.processes[1].send_signal(signal.SIGUSR1)
    assert processes.end() == [1, 1], processes.everything()
    assert "process 1 of 2" in processes.output(0)
    assert "the disk is gone" in processes.output(0)
