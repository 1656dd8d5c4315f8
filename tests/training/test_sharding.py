"""Data parallelism: as many devices as there may be, the same training."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from edgespeech.training.metrics import read_metrics
from edgespeech.training.sharding import data_mesh, replicate, shard_rows
from tests.support.tiny import ROOT, tiny_model
from tests.support.train_tiny import run

STEPS = 4


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """Metrics and parameters of a run on one device."""
    assert jax.local_device_count() == 1
    workdir = tmp_path_factory.mktemp("one")
    state = run(workdir, STEPS)
    return read_metrics(workdir / "metrics" / "teacher.jsonl"), np.asarray(state.params)


def by_name(vector):
    _, params = nnx.split(tiny_model())
    _, unravel = ravel_pytree(params)
    flat = nnx.to_flat_state(unravel(jnp.asarray(vector)))
    return {".".join(map(str, path)): np.asarray(value[...]) for path, value in flat}


@pytest.mark.parametrize("devices", [2, 4])
def test_loss_curve_of_several_devices(one_device, tmp_path, devices):
    command = [sys.executable, "-m", "tests.support.train_tiny", str(tmp_path)]
    command += ["--steps", str(STEPS), "--devices", str(devices)]
    subprocess.run(command, check=True, cwd=ROOT)
    metrics, params = one_device
    found = read_metrics(tmp_path / "metrics" / "teacher.jsonl")
    assert [row["step"] for row in found] == [row["step"] for row in metrics]
    for name in ("loss", "ctc", "ctc_intermediate", "gradient_norm"):
        np.testing.assert_allclose(
            [row[name] for row in found], [row[name] for row in metrics], rtol=1e-5, atol=0
        )
    with np.load(tmp_path / "state.npz") as saved:
        here, there = by_name(params), by_name(saved["leaf1"])
    for name in here:
        # Softmax does not see the keys' bias: its gradient is rounding alone, which Adam scales to full size.
        if "k_proj.bias" not in name:
            np.testing.assert_allclose(there[name], here[name], rtol=0, atol=1e-5, err_msg=name)


def test_layout_on_one_device():
    mesh = data_mesh()
    assert mesh.axis_names == ("data",)
    rows = shard_rows({"x": np.arange(6).reshape(2, 3)}, mesh)
    whole = replicate({"x": np.arange(3)}, mesh)
    assert rows["x"].sharding.spec == jax.sharding.PartitionSpec("data")
    assert whole["x"].sharding.is_fully_replicated
    np.testing.assert_array_equal(rows["x"], np.arange(6).reshape(2, 3))
