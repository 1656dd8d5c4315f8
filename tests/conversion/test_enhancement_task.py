"""The task of SepFormer: what is sealed, what is captured, its loss in NumPy, and a conversion that leaves the rest."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from edgespeech.conversion.distil import distil_objective
from edgespeech.conversion.enhancement_task import (
    EnhancementDistilConfig,
    EnhancementTask,
    EnhancementTeacher,
    seal_inter_chunk_layers,
)
from edgespeech.conversion.layers import mixer_layers
from edgespeech.conversion.mixers import lpa_factory
from edgespeech.conversion.run import Job, Progressive
from edgespeech.conversion.sweep import make_replacements
from edgespeech.data.batching import BatchConfig
from edgespeech.data.mixtures import MixtureConfig, MixtureSource
from edgespeech.data.noise import GeneratedNoise
from edgespeech.models.sepformer import SepFormer
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import LPA, LPAConfig
from edgespeech.ops.sisnr import si_snr_reference
from tests.support.modules import randomize
from tests.support.sepformer import TOY
from tests.support.tiny import QUIET, ToneCorpus, assert_same_bits

call = nnx.jit(lambda model, audio, lengths: model(audio, lengths))
SMALL_LPA = LPAConfig(aperiodic=2, periodic=1, positional=1, kernel_size=3, local_kernel_size=3)


@pytest.fixture(scope="module")
def source():
    corpus = ToneCorpus()
    batches = BatchConfig(batch_seconds=2.3, num_buckets=1)
    return MixtureSource(corpus, GeneratedNoise(corpus), MixtureConfig(), batches)


@pytest.fixture(scope="module")
def batch(source):
    """Four rows, two of them filler."""
    batch = next(b for b in (source.batch(step) for step in range(4)) if not b.weights.all())
    assert batch.weights.tolist() == [1, 1, 0, 0]
    return batch


def make(seed):
    return randomize(SepFormer(TOY, rngs=nnx.Rngs(seed)), seed, scale=0.2)


@pytest.fixture(scope="module")
def teacher():
    return EnhancementTeacher(make(0))


def test_only_intra_chunk_layers_are_found(teacher, batch):
    plain = make(0)
    assert len(mixer_layers(plain)) == 6
    sealed = seal_inter_chunk_layers(plain)
    assert [path[1:] for path in mixer_layers(sealed)] == [
        ("blocks", block, "intra", "layers", layer) for block in (0, 1) for layer in (0, 1)
    ]
    assert len(mixer_layers(plain)) == 6  # a copy was sealed
    sealed.mask_network.scan_layers = True
    np.testing.assert_allclose(
        call(sealed, batch.audio, batch.audio_lengths).estimates,
        call(plain, batch.audio, batch.audio_lengths).estimates,
        rtol=0,
        atol=1e-5,  # of up to 4
    )


def test_pairs_are_those_of_every_chunk(teacher, batch):
    pairs = teacher.pairs(batch)
    chunks = 2 * ((TOY.num_frames(batch.audio.shape[1]) + 10) // 20 + 1)
    assert pairs.x.shape == (4, 4 * chunks, 20, 8)
    lengths = np.asarray(pairs.lengths).reshape(4, chunks)
    for row in range(4):
        used = 2 * ((TOY.num_frames(int(batch.audio_lengths[row])) + 10) // 20 + 1)
        used *= int(batch.weights[row])
        assert lengths[row].tolist() == [20] * used + [0] * (chunks - used)
    first = teacher.plain.mask_network.blocks[0].intra.layers[0].mixer
    want = nnx.jit(lambda mixer, x, n: mixer(x, n))(first, pairs.x[0], pairs.lengths)
    counted = lengths.ravel() > 0
    np.testing.assert_allclose(np.asarray(pairs.y[0])[counted], want[counted], atol=1e-5)


def numpy_loss(estimates, targets, batch):
    """Mean negative SI-SNR of the rows that count and are not yet better than 30 dB."""
    losses = []
    for row in np.flatnonzero(batch.weights):
        length = batch.audio_lengths[row]
        value = -si_snr_reference(estimates[row, 0, :length], targets[row, 0, :length])
        if value > -30:
            losses.append(value)
    return np.mean(losses)


def test_loss_in_numpy(teacher, batch):
    """Teacher with attention, student with LPA in layers 1 and 3 (from 0); every term and their sum."""
    task, order = EnhancementTask(), (1, 3)
    config = EnhancementDistilConfig(
        steps_per_layer=4, si_snr=0.3, teacher=0.2, hidden=0.7, learning_rate=1e-3
    )
    replacements = make_replacements(teacher.model, lpa_factory(SMALL_LPA), seed=1)
    job = Job(None, None, 0, QUIET)
    path = Progressive("lpa", teacher, replacements, order, config, job)
    path._count = 2
    state = path.state()
    student = nnx.merge(path.graphdef, state)
    output = call(student, batch.audio, batch.audio_lengths)
    plain = call(teacher.plain, batch.audio, batch.audio_lengths)

    estimates, wanted = np.float64(output.estimates), np.float64(plain.estimates)
    si_snr = numpy_loss(estimates, np.float64(batch.targets), batch)
    to_teacher = numpy_loss(estimates, wanted, batch)
    lengths = [2 * ((TOY.num_frames(int(n)) + 10) // 20 + 1) for n in batch.audio_lengths]
    ratios = []
    for layer in order:
        ours, theirs = (
            np.concatenate(
                [
                    np.float64(o.hidden[layer]).reshape(4, -1, 20, 8)[row, : lengths[row]]
                    for row in np.flatnonzero(batch.weights)
                ]
            )
            for o in (output, plain)
        )
        ratios.append(np.mean((ours - theirs) ** 2) / (theirs.var() + 1e-6))

    objective = distil_objective(path._graphdef, task, order, config)
    params, lesson = path._unravel(path._state.params), teacher.lesson(batch, path._frozen)
    # Step 7 is the last one of the second window: both replaced, both hard.
    total, terms = jax.jit(lambda p, x: objective(p, x, None, 7))(params, lesson)
    assert set(terms) == {"si_snr", "teacher", "hidden"}
    assert terms["si_snr"] == pytest.approx(si_snr, abs=2e-3)
    assert terms["teacher"] == pytest.approx(to_teacher, abs=2e-3)
    assert terms["hidden"] == pytest.approx(np.mean(ratios), rel=1e-3)
    want = 0.3 * si_snr + 0.2 * to_teacher + 0.7 * np.mean(ratios)
    assert total == pytest.approx(want, rel=1e-3)


def test_a_student_equal_to_its_teacher_asks_nothing_more_of_it(teacher, batch):
    prediction = teacher.lesson(batch, nnx.State({})).teacher
    terms = EnhancementTask().terms(prediction, prediction, batch)
    assert terms["teacher"] == 0.0  # better than 30 dB
    assert np.abs(terms["si_snr"]) > 0.1
    assert prediction.lengths.tolist() == [
        20 * 2 * ((TOY.num_frames(int(n)) + 10) // 20 + 1) for n in batch.audio_lengths
    ]


def test_conversion_leaves_attention_across_chunks_alone(teacher, source, tmp_path):
    config = EnhancementDistilConfig(steps_per_layer=2, learning_rate=1e-2)
    replacements = make_replacements(teacher.model, lpa_factory(SMALL_LPA), seed=1)
    job = Job(tmp_path, source, 0, QUIET)
    path = Progressive("lpa", teacher, replacements, (2, 0), config, job)
    path.advance(2)
    hybrid = path.hybrid()
    mixers = [layer.mixer for layer in mixer_layers(hybrid).values()]
    assert [type(mixer) for mixer in mixers] == [LPA, SelfAttention, LPA, SelfAttention]
    before = teacher.model.mask_network
    for new, old in zip(hybrid.mask_network.blocks, before.blocks, strict=True):
        assert_same_bits(nnx.state(new.inter), nnx.state(old.inter))
        assert_same_bits(nnx.state(new.intra_norm), nnx.state(old.intra_norm))
    ffn = [block.intra.layers[0].ffn.expand.kernel[...] for block in hybrid.mask_network.blocks]
    old = [block.intra.layers[0].ffn.expand.kernel[...] for block in before.blocks]
    assert all(np.abs(a - b).max() > 1e-5 for a, b in zip(ffn, old, strict=True))


def test_settings():
    assert EnhancementDistilConfig().weights == {
        "kl": 0.0,
        "hidden": 1.0,
        "si_snr": 0.1,
        "teacher": 0.05,
    }
    with pytest.raises(ValueError, match=r"distil\.kl is 1\.0"):
        dataclasses.replace(EnhancementDistilConfig(), kl=1.0)
    with pytest.raises(ValueError, match=r"distil\.teacher is -1"):
        EnhancementDistilConfig(teacher=-1.0)
