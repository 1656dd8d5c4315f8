"""The arithmetic of docs/scaling.md in closed form, and the page against it."""

import jax.numpy as jnp
import pytest
from flax import nnx

from edgespeech.evaluation.macs import count_macs
from edgespeech.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config, count_parameters
from launch import scaling
from launch.scaling import H100, TPU_V5E, Chip, Model, all_reduce, epoch_seconds, training_step
from tests.support.tiny import ROOT, tiny_config


def listen(model, batch):
    return model(batch.audio, batch.audio_lengths)


# One of everything a second, but hosts with 10 cores.
ROUND = Chip("round", 1.0, 1.0, None, 0.0, 2, 10)


def test_ring_within_one_island():
    # 4 chips, each sends 3 parts of a quarter, twice.
    assert all_reduce(8.0, ROUND, 4) == pytest.approx(2 * 3 * 8 / 4)
    assert all_reduce(8.0, ROUND, 1) == 0


def test_ring_over_islands():
    chip = ROUND._replace(island=4, link=2.0, network=0.5)
    # Within: 3 parts of 4 bytes, twice, at 2 a second. Between 3 islands: each chip's 4 bytes, 2 parts of 3, twice.
    within, between = 2 * 3 * 4 / 2, 2 * 2 * (4 / 3) / 0.5
    assert all_reduce(16.0, chip, 12) == pytest.approx(within + between)
    assert all_reduce(16.0, chip, 4) == pytest.approx(within)


@pytest.fixture
def round_numbers(monkeypatch):
    for name, value in (
        *(("HOURS", 1.0), ("ROW_SECONDS", 10.0), ("BATCH_SECONDS", 36.0), ("DATA_RATE", 2.0)),
        *(("UTILISATION", 0.5), ("STORAGE_RATE", 4.0), ("SAVE_EVERY", 5)),
    ):
        monkeypatch.setattr(scaling, name, value)


def test_a_step(round_numbers):
    # 36 s are 3.6 utterances of 5 MACs, each three times, two operations each: 108; two chips at half of 3 a second.
    step = training_step(Model("m", 1, 5), ROUND._replace(flops=3.0), 2)
    assert step.steps == 100
    assert step.compute == pytest.approx(36.0)
    assert step.collective == pytest.approx(4.0)  # 2 (1 / 2) 4 bytes
    # One host decodes 36 s in 40 s at 2 a core-second.
    assert step.cores == pytest.approx(36 / 40 / 2)
    assert step.write == pytest.approx(16 / 4)
    assert step.between == pytest.approx(5 * 40)
    assert step.limit == "compute"
    assert epoch_seconds(step, ROUND) == pytest.approx(4000)


def test_a_chip_has_an_utterance_at_least(round_numbers):
    step = training_step(Model("m", 1, 5), ROUND, 8)
    assert (step.batch_seconds, step.steps) == (80.0, 45)


def test_what_is_in_the_way(round_numbers):
    fast = ROUND._replace(flops=1e6, link=1e6)
    data = training_step(Model("m", 1, 5), fast, 2)
    assert data.limit == "data"
    # An epoch then takes as long as its host takes to decode it: 1 h at 2 a core-second with 10 cores.
    assert epoch_seconds(data, fast) == pytest.approx(3600 / 20)
    gradients = training_step(Model("m", 100, 5), ROUND._replace(flops=50.0), 2)
    assert gradients.limit == "collectives"
    storage = training_step(Model("m", 4000, 5), ROUND._replace(flops=10.0, link=1e4), 2)
    assert storage.limit == "checkpoints"
    # 100 steps hold 20 checkpoints of 16,000 s.
    assert epoch_seconds(storage, ROUND) == pytest.approx(20 * 16_000)


def test_published_rates():
    assert (TPU_V5E.flops, TPU_V5E.link) == (197e12, 200e9)
    assert (H100.flops, H100.link, H100.network) == (989e12, 450e9, 50e9)
    assert pytest.approx(12.3, abs=0.005) == scaling.ROW_SECONDS


def test_a_traced_model_has_the_parameters_and_work_of_a_real_one():
    config = tiny_config()
    model = Wav2Vec2(config, rngs=nnx.Rngs(0))

    traced = scaling.trace("tiny", lambda: Wav2Vec2(config, rngs=nnx.Rngs(0)), listen)
    assert traced.parameters == count_parameters(model)
    samples = round(scaling.ROW_SECONDS * 16_000)
    audio, lengths = jnp.zeros((1, samples)), jnp.array([samples])
    assert traced.macs == count_macs(model, audio, lengths).total()


def test_the_page_has_what_the_script_prints():
    """Every row of two of the models; the others take long to trace."""
    page = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    made = {
        "wav2vec2 small": lambda: Wav2Vec2(Wav2Vec2Config.small(), rngs=nnx.Rngs(0)),
        "wav2vec2 base": lambda: Wav2Vec2(Wav2Vec2Config.base(), rngs=nnx.Rngs(0)),
    }
    traced = [scaling.trace(name, build, listen) for name, build in made.items()]
    assert traced[1].parameters == 94_396_320
    lines = [line for line in scaling.render(traced).splitlines() if line]
    assert len(lines) == 3 * 3 + 2 + 2 * 6
    missing = [line for line in lines if line not in page]
    assert not missing
