"""Conversion of an encoder-decoder: the loss against numpy, what learns, and a whole path with its resumption."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.conversion.capture import capture
from edgespeech.conversion.distil import apply_windows, distil_objective, trainable, windows
from edgespeech.conversion.layers import mixer_layers
from edgespeech.conversion.mixers import CONTROLS, control_factory, lpa_factory
from edgespeech.conversion.run import Job, Progressive, Teacher, run_sweep
from edgespeech.conversion.seq2seq_task import Seq2SeqDistilConfig, Seq2SeqTask
from edgespeech.conversion.sweep import make_replacements
from edgespeech.conversion.switch import install_switches
from edgespeech.data.batching import Batch
from edgespeech.nn.lpa import LPA, LPAConfig
from edgespeech.nn.rotary import RotarySelfAttention
from edgespeech.ops.attention import attention_reference
from edgespeech.training.metrics import read_metrics
from tests.support.moonshine import call, forward, speech, tiny_moonshine
from tests.support.moonshine_conversion import noise_source
from tests.support.tiny import QUIET, assert_same_bits

SMALL_LPA = LPAConfig(aperiodic=2, periodic=1, positional=1, kernel_size=3, local_kernel_size=3)
TASK = Seq2SeqTask(bos_id=1, eos_id=2)
CONFIG = Seq2SeqDistilConfig(
    steps_per_layer=10, learning_rate=1e-2, cross_entropy=0.7, kl=0.4, hidden=0.3
)
LENGTHS = (4000, 2600, 4000)
TEXTS = ([4, 5, 6, 5], [7], [])  # the last row is filler


def make_batch():
    audio, lengths = speech(LENGTHS, seed=2)
    targets = np.zeros((3, 4), np.int32)
    for row, text in enumerate(TEXTS):
        targets[row, : len(text)] = text
    counts = np.asarray([len(text) for text in TEXTS], np.int32)
    weights = np.asarray([1, 1, 0], np.float32)
    return Batch(audio, lengths, targets, counts, weights, np.asarray([0, 1, -1], np.int32))


class Setup:
    """A teacher, a student with switches in its encoder, one lesson."""

    def __init__(self):
        self.teacher = Teacher(tiny_moonshine(seed=3, scale=0.3), TASK)
        self.student = nnx.clone(self.teacher.model)
        replacements = make_replacements(self.teacher.model, lpa_factory(SMALL_LPA), 1)
        install_switches(self.student, replacements)
        self.graphdef, self.params, self.frozen = nnx.split(
            self.student, trainable(self.student), ...
        )
        self.batch = make_batch()
        self.lesson = self.teacher.lesson(self.batch, self.frozen)


@pytest.fixture(scope="module")
def setup():
    return Setup()


@functools.cache
def jitted_loss(graphdef, order):
    return jax.jit(distil_objective(graphdef, TASK, order, CONFIG))


def test_labels_end_and_the_decoder_sees_them_shifted():
    labels, lengths = TASK.labels(make_batch())
    np.testing.assert_array_equal(labels, [[4, 5, 6, 5, 2], [7, 2, 0, 0, 0], [2, 0, 0, 0, 0]])
    np.testing.assert_array_equal(lengths, [5, 2, 1])


def test_only_encoder_layers_have_a_mixer():
    assert list(mixer_layers(tiny_moonshine())) == [("layers", 0), ("layers", 1)]


def test_the_decoder_is_frozen(setup):
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(setup.params)}
    assert all(name.startswith("layers.") for name in names)
    assert {"layers.1.ffn.expand.kernel", "layers.0.mixer.replacement.alpha"} <= names


def test_captured_pairs_are_those_of_the_encoder(setup):
    batch, model = setup.batch, setup.teacher.model
    pairs = setup.teacher.pairs(batch)
    _, calls = capture(model, batch, call=lambda m, b: m.encode(b.audio, b.audio_lengths))
    assert pairs.x.shape[0] == len(calls) == 2
    np.testing.assert_array_equal(pairs.lengths, np.asarray(calls[0].lengths) * batch.weights)
    for row in (0, 1):
        n = int(pairs.lengths[row])
        for layer, seen in enumerate(calls):
            np.testing.assert_allclose(pairs.y[layer, row, :n], seen.y[row, :n], atol=1e-5)


predict = jax.jit(
    lambda graphdef, state, batch: TASK.forward(nnx.merge(graphdef, state), batch),
    static_argnums=0,
)


def log_probs(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("step", [0, 7, 12, 18])
def test_loss_equals_numpy(setup, step):
    """The teacher from its equations in NumPy, the student from the plain assignment of hybrids by hand."""
    order, batch = (1, 0), setup.batch
    total, metrics = jitted_loss(setup.graphdef, order)(
        setup.params, setup.lesson, None, jnp.asarray(step)
    )
    student = nnx.clone(setup.student)
    apply_windows(student, windows(order, 2, jnp.asarray(step), CONFIG))
    kl, cross_entropy, hidden = [], [], {layer: ([], []) for layer in (0, 1)}
    for row in (0, 1):
        labels = [*TEXTS[row], 2]
        tokens = np.asarray([1, *TEXTS[row]])
        audio = batch.audio[row, : LENGTHS[row]]
        theirs, _, _, logits = forward(setup.teacher.model, np.float64(audio), tokens)
        n = np.asarray([len(audio)]), np.asarray([len(tokens)])
        output = call(*nnx.split(student), audio[None], n[0], tokens[None], n[1])
        t, s = log_probs(logits), log_probs(output.logits[0])
        kl.append(np.mean((np.exp(t) * (t - s)).sum(-1)))
        cross_entropy.append(np.mean([-s[i, label] for i, label in enumerate(labels)]))
        for layer in (0, 1):
            hidden[layer][0].append(np.asarray(output.hidden[layer][0], np.float64))
            hidden[layer][1].append(theirs[layer])
    relative = []
    for layer in order[: 1 + step // 10]:
        ours, wanted = (np.concatenate(part) for part in hidden[layer])
        relative.append(np.mean((ours - wanted) ** 2) / wanted.var())
    np.testing.assert_allclose(metrics["cross_entropy"], np.mean(cross_entropy), rtol=1e-4)
    np.testing.assert_allclose(metrics["kl"], np.mean(kl), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(metrics["hidden"], np.mean(relative), rtol=1e-3)
    wanted = 0.7 * np.mean(cross_entropy) + 0.4 * np.mean(kl) + 0.3 * np.mean(relative)
    np.testing.assert_allclose(total, wanted, rtol=1e-4)


def test_nothing_replaced_costs_nothing_but_cross_entropy(setup):
    total, metrics = jitted_loss(setup.graphdef, ())(
        setup.params, setup.lesson, None, jnp.asarray(17)
    )
    assert abs(float(metrics["kl"])) < 1e-6
    assert float(metrics["hidden"]) == 0.0
    np.testing.assert_allclose(total, 0.7 * metrics["cross_entropy"], rtol=1e-5)


def test_padding_and_filler_count_nowhere(setup):
    batch = setup.batch
    audio, targets = batch.audio.copy(), batch.targets.copy()
    audio[1, LENGTHS[1] :] = 0.7
    audio[2] = 0.3 * np.random.default_rng(0).normal(size=audio.shape[1])
    targets[1, 1:], targets[2] = 9, 8
    other = setup.teacher.lesson(batch._replace(audio=audio, targets=targets), setup.frozen)
    loss = jitted_loss(setup.graphdef, (1, 0))
    for found, expected in zip(
        jax.tree.leaves(loss(setup.params, other, None, jnp.asarray(12))),
        jax.tree.leaves(loss(setup.params, setup.lesson, None, jnp.asarray(12))),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- mixers in the place of rotary attention


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_takes_rotary_attentions_place(name):
    attention = RotarySelfAttention(16, 2, 6, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 9, 16)).astype(np.float32)
    lengths = np.asarray([9, 5])
    mixer = control_factory(name, window=2)(attention, nnx.Rngs(1))
    y = np.asarray(mixer(x, lengths))
    assert np.isfinite(y).all()
    if isinstance(mixer, LPA):
        for projection in ("v_proj", "out_proj"):
            ours, theirs = getattr(mixer, projection), getattr(attention, projection)
            np.testing.assert_array_equal(ours.kernel[...], theirs.kernel[...])
            np.testing.assert_array_equal(ours.bias[...], np.zeros(16))
            pointers = [a[...].unsafe_buffer_pointer() for a in (ours.kernel, theirs.kernel)]
            assert pointers[0] != pointers[1]
    spoiled = x.copy()
    spoiled[1, 5:] = np.nan
    np.testing.assert_allclose(np.asarray(mixer(spoiled, lengths))[1, :5], y[1, :5], atol=1e-6)


@pytest.mark.parametrize("window", [1, 3, 30])
def test_sliding_window_keeps_the_positions(window):
    attention = RotarySelfAttention(16, 2, 6, rngs=nnx.Rngs(0))
    mixer = control_factory("sliding_window", window)(attention, nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (2, 12, 16))
    lengths = jnp.asarray([12, 7])
    i = jnp.arange(12)
    valid = i[None] < lengths[:, None]
    x = jnp.where(valid[..., None], x, 0.0)
    band = jnp.abs(i[:, None] - i) <= window
    q, (k, v) = attention._project(x, i)
    mask = (band & valid[:, None, :])[:, None]
    wanted = attention.out_proj(attention_reference(q, k, v, mask).reshape(x.shape))
    found = mixer(x, lengths)
    for row, length in enumerate((12, 7)):
        np.testing.assert_allclose(found[row, :length], wanted[row, :length], atol=2e-6)
    # Without its positions the attention is another one.
    bare = attention_reference(
        *(
            p(x).reshape(2, 12, 2, 8)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        ),
        mask,
    )
    assert np.abs(attention.out_proj(bare.reshape(x.shape)) - wanted)[0].max() > 1e-3


# --- a whole path


@pytest.fixture(scope="module")
def unbroken(setup, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    path = progressive(setup.teacher, workdir)
    path.advance(1)
    path.advance(2)
    return path, workdir


def progressive(teacher, workdir):
    job = Job(workdir, noise_source(), seed=2, loop=QUIET)
    heldout = [teacher.pairs(batch) for batch in job.source.eval_batches()]
    mixers, _ = run_sweep("lpa", teacher, lpa_factory(SMALL_LPA), 4, heldout, job)
    config = Seq2SeqDistilConfig(steps_per_layer=20, learning_rate=1e-2)
    return Progressive("lpa", teacher, mixers, (1, 0), config, job)


def test_the_student_learns(unbroken):
    rows = read_metrics(unbroken[1] / "metrics" / "convert_lpa.jsonl")
    assert [row["step"] for row in rows] == list(range(40))
    for name in ("loss", "cross_entropy"):
        values = np.asarray([row[name] for row in rows])
        assert values[-8:].mean() < 0.9 * values[:8].mean(), name


def test_hybrid_equals_the_program_with_switches(setup, unbroken):
    path, _ = unbroken
    batch = setup.batch
    hybrid = path.hybrid()
    through, alone, plain = (
        predict(*split, batch)
        for split in (
            (path.graphdef, path.state()),
            nnx.split(hybrid),
            nnx.split(setup.teacher.model),
        )
    )
    assert [type(layer.mixer) for layer in hybrid.layers] == [LPA, LPA]
    np.testing.assert_allclose(alone.logits[:2, :2], through.logits[:2, :2], atol=1e-4)
    assert np.abs(alone.logits[:2, :2] - plain.logits[:2, :2]).max() > 1e-2
    for part in ("decoder_layers", "front_end", "norm", "decoder_norm", "embedding"):
        assert_same_bits(nnx.state(hybrid)[part], nnx.state(setup.teacher.model)[part])


def test_interrupted_then_resumed(setup, unbroken, tmp_path, monkeypatch):
    calls = []

    def failing(self, batch, frozen, lesson=Teacher.lesson):
        calls.append(1)
        if len(calls) > 25:
            raise KeyboardInterrupt
        return lesson(self, batch, frozen)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "lesson", failing)
        path = progressive(setup.teacher, tmp_path)
        with pytest.raises(KeyboardInterrupt):
            path.advance(2)
    resumed = progressive(setup.teacher, tmp_path)
    resumed.advance(2)
    assert_same_bits(resumed.state(), unbroken[0].state())


@pytest.mark.parametrize(("name", "value"), [("cross_entropy", -1.0), ("kl", -0.5)])
def test_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"distil.{name} is {value}"):
        Seq2SeqDistilConfig(**{name: value})
