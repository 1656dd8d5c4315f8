"""Data parallelism: as many devices as there may be, the same training; and what lies where."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from edgespeech.errors import InputError
from edgespeech.training.metrics import read_metrics
from edgespeech.training.sharding import Layout, make_mesh, row_shards, shard_rows
from tests.support.tiny import ROOT, assert_same_bits, tiny_model
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
    mesh = make_mesh()
    assert mesh.axis_names == ("data", "fsdp", "model")
    assert row_shards(mesh) == 1
    rows = shard_rows({"x": np.arange(6).reshape(2, 3)}, mesh)
    assert rows["x"].sharding.spec == jax.sharding.PartitionSpec(("data", "fsdp"))
    np.testing.assert_array_equal(rows["x"], np.arange(6).reshape(2, 3))


def test_what_does_not_divide_the_devices_is_refused():
    with pytest.raises(InputError, match="--fsdp=2: give a divisor of 1"):
        make_mesh(fsdp=2)
    with pytest.raises(InputError, match="--model_parallel=2: give a divisor of 1"):
        make_mesh(model_parallel=2)


@pytest.mark.parametrize("donate", [True, False])
def test_a_state_comes_back_whole_and_its_own(donate):
    state = {"vector": jnp.arange(5.0), "count": jnp.asarray(3), "none": None}
    layout = Layout(make_mesh(), state, 5)
    placed = layout.place(state)

    def function(s, batch, key):
        return s | {"vector": s["vector"] * batch}, {"sum": batch}

    step = layout.jit(function, donate)
    compiled = layout.compiler(function, donate)(placed, jnp.asarray(2.0), layout.key(0))
    shared = compiled.memory_analysis().alias_size_in_bytes
    assert shared == (4 * (5 + 1) if donate else 0)
    after, metrics = step(placed, jnp.asarray(2.0), layout.key(0))
    assert_same_bits(layout.whole(after), state | {"vector": jnp.arange(5.0) * 2})
    assert float(metrics["sum"]) == 2.0
    assert placed["vector"].is_deleted() == donate
    np.testing.assert_array_equal(state["vector"], np.arange(5.0))


CUT = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from edgespeech.training.sharding import Layout, gather, make_mesh, scatter, shard_rows, split_columns
from edgespeech.training.fingerprint import fingerprint
state = {"vector": jnp.arange(1.0, 11.0), "count": jnp.asarray(3)}
mesh = make_mesh(fsdp=4)
layout = Layout(mesh, state, 10)
placed = layout.place(state)
assert placed["vector"].shape == (12,)
assert {s.data.shape for s in placed["vector"].addressable_shards} == {(3,)}
assert placed["count"].sharding.is_fully_replicated
def step(s, batch, key):
    vector = gather(s["vector"])
    assert vector.shape == (10,)
    return s | {"vector": scatter(vector * jnp.sum(batch))}, {"mean": jnp.mean(vector)}
rows = shard_rows(np.ones((4, 2), np.float32), mesh)
assert {s.data.shape for s in rows.addressable_shards} == {(1, 2)}
arguments = (placed, rows, layout.key(0))
after, metrics = layout.compiler(step)(*arguments)(*arguments)
assert {s.data.shape for s in after["vector"].addressable_shards} == {(3,)}
np.testing.assert_array_equal(layout.whole(after)["vector"], 8 * np.arange(1.0, 11.0))
np.testing.assert_array_equal(np.asarray(after["vector"])[10:], 0)
assert fingerprint([after["vector"]]) == fingerprint([jnp.asarray(8 * np.arange(1.0, 11.0), jnp.float32)])
mesh = make_mesh(fsdp=2, model_parallel=2)
assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "model": 2}
with jax.set_mesh(mesh):
    split = jax.jit(split_columns)({"w": jnp.ones((3, 4)), "odd": jnp.ones((3, 5)), "b": jnp.ones(4)})
shapes = {name: leaf.addressable_shards[0].data.shape for name, leaf in split.items()}
assert shapes == {"w": (3, 2), "odd": (3, 5), "b": (4,)}, shapes
"""


def test_where_the_parts_lie_on_four_devices():
    subprocess.run([sys.executable, "-c", CUT], check=True, cwd=ROOT)
