"""The trace of some steps, read back; and what a stage is traced under."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.profiler import ProfileData

from edgespeech.nn.transformer import EncoderLayer
from edgespeech.training.loop import LoopConfig
from tests.training import worker


def train(workdir, **settings):
    config = LoopConfig(save_every=1000, log_every=1, quiet=True, **settings)
    return worker.fit("stage", "plain", workdir, 6, config)


def traced(workdir):
    """The numbers of the steps in the trace, and how often the step's program has run in it."""
    (path,) = (workdir / "profile" / "stage").glob("plugins/profile/*/*.xplane.pb")
    steps, runs = [], set()
    for plane in ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if event.name == "train":
                    steps.append(stats["step_num"])
                if stats.get("hlo_module") == "jit_step":
                    runs.add(stats["run_id"])
    return steps, len(runs)


def test_the_trace_has_the_program_of_the_asked_steps(tmp_path):
    train(tmp_path, profile_steps=2, profile_from=3)
    assert traced(tmp_path) == ([3, 4], 2)


def test_a_stage_that_ends_early_has_its_trace(tmp_path):
    train(tmp_path, profile_steps=100, profile_from=4)
    assert traced(tmp_path) == ([4, 5], 2)


@pytest.mark.parametrize("remat", [False, True])
def test_off_unless_asked_and_layers_are_traced_as_asked(tmp_path, monkeypatch, remat):
    layer = EncoderLayer(4, 2, 4, norm_first=True, dropout_rate=0.0, rngs=nnx.Rngs(0))
    plain, programs = worker.plain, []

    def spy():
        loss, *rest = plain()

        def seen(*arguments):
            program = jax.make_jaxpr(lambda x: layer(x, jnp.array([2])))(jnp.ones((1, 2, 4)))
            programs.append(bool(re.search("remat|checkpoint", str(program))))
            return loss(*arguments)

        return seen, *rest

    monkeypatch.setitem(worker.MODELS, "plain", spy)
    train(tmp_path, remat=remat)
    assert programs
    assert set(programs) == {remat}
    assert not (tmp_path / "profile").exists()
