"""Timing against a clock of our own, ratios against hand-made tables, parts and peers against the whole model."""

import functools
import json
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.evaluation import latency
from edgespeech.evaluation.latency import (
    OURS,
    Timing,
    amdahl_bound,
    interleave,
    limit_threads,
    peak_memory_mb,
    ratios,
    real_time_factor,
    sum_parts,
    summarise,
)
from edgespeech.evaluation.latency_models import TimedWav2Vec2, prepare_forward, prepare_parts
from edgespeech.evaluation.latency_peers import (
    PEERS,
    find_peers,
    load_onnxruntime,
    load_transformers,
    random_transformers_model,
)
from edgespeech.models.sepformer import SepFormerConfig
from edgespeech.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config, count_parameters
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import LPA
from edgespeech.nn.lpa_config import LPAConfig
from tests.support.modules import randomize
from tests.support.tiny import tiny_config

SMALL_LPA = LPAConfig(aperiodic=2, periodic=1, positional=1, kernel_size=3, local_kernel_size=3)
WAVEFORM = Wav2Vec2Config(
    width=16,
    num_layers=3,
    num_heads=2,
    ffn_width=24,
    front_channels=8,
    position_kernel=8,
    position_groups=2,
)


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0.02, 0.1, (1, samples)).astype(np.float32)


class FakeMachine:
    """A clock that stands still but for the calls made here, and their log."""

    def __init__(self):
        self.now = 100.0
        self.log = []

    def clock(self) -> float:
        return self.now

    def contender(self, name, durations, waiting=0.0):
        """A call whose result takes `waiting` seconds more to be ready."""
        machine, remaining = self, iter(durations)

        class Result:
            def block_until_ready(self):
                machine.log.append(f"wait {name}")
                machine.now += waiting
                return self

        def call():
            machine.log.append(name)
            machine.now += next(remaining)
            return Result()

        return call


def test_contenders_take_turns_and_the_warm_up_does_not_count():
    machine = FakeMachine()
    contenders = {
        "a": machine.contender("a", [9.0, 0.001, 0.003, 0.002]),
        "b": machine.contender("b", [9.0, 0.010, 0.040, 0.020]),
    }
    timings = interleave(contenders, repeats=3, clock=machine.clock)
    assert machine.log == ["a", "wait a", "b", "wait b"] * 4
    assert timings["a"] == pytest.approx(Timing(2.0, 1.0))
    assert timings["b"] == pytest.approx(Timing(20.0, 15.0))


def test_the_clock_runs_until_the_result_is_ready():
    machine = FakeMachine()
    call = machine.contender("a", [0.001] * 3, waiting=0.5)
    assert interleave({"a": call}, 2, clock=machine.clock)["a"].median_ms == pytest.approx(501.0)


def test_more_warm_up():
    machine = FakeMachine()
    call = machine.contender("a", [5.0, 4.0, 0.25])
    assert interleave({"a": call}, 1, warmup=2, clock=machine.clock)["a"] == (250.0, 0.0)


def test_a_median_needs_repeats():
    with pytest.raises(InputError, match="repeats is 0: a median needs at least 1"):
        interleave({}, 0)


def test_median_and_interquartile_range():
    assert summarise([0.010, 0.001, 0.004, 0.003, 0.002]) == pytest.approx(Timing(3.0, 2.0))
    # Four samples: the quartiles lie between two of them.
    assert summarise([0.001, 0.002, 0.003, 0.004]) == pytest.approx(Timing(2.5, 1.5))
    assert summarise([0.007]) == pytest.approx(Timing(7.0, 0.0))


def test_real_time_factor():
    assert real_time_factor(2500.0, 10.0) == 0.25


def test_amdahl_bound():
    # 100 ms, 8 of 12 mixers of 6 ms give way to mixers of 1 ms.
    assert amdahl_bound(100.0, 8 * 6.0, 8 * 1.0) == pytest.approx(100 / 60)
    assert amdahl_bound(100.0, 48.0, 48.0) == 1.0
    # A share p made s times faster: 1 / (1 - p + p / s).
    p, s = 0.48, 6.0
    assert amdahl_bound(100.0, 48.0, 8.0) == pytest.approx(1 / (1 - p + p / s))


def row(implementation, replaced, seconds, median_ms, mixers=None):
    parts = {} if mixers is None else {"front_end": 5.0, "mixers": mixers}
    return {
        "implementation": implementation,
        "replaced": replaced,
        "seconds": seconds,
        "median_ms": median_ms,
        "parts_ms": parts,
    }


def test_ratios():
    rows = [
        row(OURS, 0, 10.0, 100.0, 60.0),
        row(OURS, 8, 10.0, 50.0, 20.0),
        row("eager", 0, 10.0, 300.0),
        row(OURS, 0, 2.5, 30.0, 10.0),
        row(OURS, 8, 2.5, 24.0, 4.0),
    ]
    assert ratios(rows, ["eager", "sdpa"]) == {
        "like_for_like": {"10": {"8": 2.0}, "2.5": {"8": 1.25}},
        "amdahl_bound": {
            "10": {"8": 65 / 25},
            "2.5": {"8": 15 / 9},
        },  # of the parts, 5 ms and mixers
        "vs_eager": {"10": {"0": 3.0, "8": 6.0}},
        "vs_sdpa": {},
    }


def test_ratios_without_parts_have_no_bound():
    found = ratios([row(OURS, 0, 1.0, 4.0), row(OURS, 1, 1.0, 2.0)], [])
    assert found == {"like_for_like": {"1": {"1": 2.0}}, "amdahl_bound": {}}


def test_uses_of_parts_add_up():
    timings = {"attention": Timing(5.0, 1.0), "lpa": Timing(1.0, 1.0), "head": Timing(3.0, 0.0)}
    uses = [("mixers", "attention"), ("mixers", "lpa"), ("mixers", "attention"), ("head", "head")]
    assert sum_parts(uses, timings) == {"mixers": 11.0, "head": 3.0}


@pytest.mark.parametrize(
    "config", [WAVEFORM, tiny_config(num_layers=3)], ids=["norm last", "norm first"]
)
def test_parts_make_up_the_model(config):
    """Composed, they give the model's logits, although one compiled part serves all layers like it."""
    timed = TimedWav2Vec2(config, SMALL_LPA)
    model = randomize(timed.build((0, 2)))
    assert [type(layer.mixer) for layer in model.layers] == [LPA, SelfAttention, LPA]
    audio = noise(4_000)
    arrays = jnp.asarray(audio), jnp.asarray([4_000])
    want = nnx.jit(lambda model, *arrays: model(*arrays).logits)(model, *arrays)
    assert np.std(want) > 0.1
    calls, outputs = {}, []

    class Recorder(TimedWav2Vec2):
        def run_parts(self, model, audio, lengths, run):
            outputs.append(super().run_parts(model, audio, lengths, run))
            return outputs[0]

    uses = prepare_parts(Recorder(config, SMALL_LPA), model, audio, calls)
    np.testing.assert_allclose(outputs[0], want, atol=1e-5, rtol=0)
    ffn = 6 if config.norm_first else 3
    counts = Counter(part for part, _ in uses)
    assert counts == {
        "front_end": 1,
        "projection_positions": 1,
        "mixers": 3,
        "ffn": ffn,
        "head": 1,
    }
    # Each is compiled once: attention and LPA, and what surrounds them once for both.
    assert {key for _, key in uses} == set(calls)
    assert len(calls) == (7 if config.norm_first else 6)
    mixers = [key for part, key in uses if part == "mixers"]
    assert mixers[0] == mixers[2] != mixers[1]
    # All-attention at the same length needs no part that is not there; another length does.
    assert {key for _, key in prepare_parts(timed, timed.build(()), audio, calls)} < set(calls)
    # A call runs its part on what the model gave it, and the whole model's call all of it.
    np.testing.assert_array_equal(calls[uses[-1][1]](), outputs[0])
    np.testing.assert_allclose(prepare_forward(timed, model, audio)(), want, atol=1e-5, rtol=0)


def test_the_model_under_test():
    timed = TimedWav2Vec2(WAVEFORM, SMALL_LPA)
    model = timed.build((1,))
    mixer = model.layers[1].mixer
    assert mixer.inference
    assert mixer.config == SMALL_LPA
    assert (timed.num_layers, timed.num_frames(4_000)) == (3, 12)
    like = nnx.eval_shape(lambda: Wav2Vec2(WAVEFORM, rngs=nnx.Rngs(0)))
    assert count_parameters(timed.build(())) == count_parameters(like)
    values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(nnx.state(model))])
    assert np.std(values) == pytest.approx(0.02, rel=0.05)


def load_ones(waste_mb: int, need_mb: int):
    """Building takes `waste_mb` and gives them back; a call takes `need_mb`."""
    np.ones(waste_mb * 125_000)
    return lambda audio: lambda: np.ones(need_mb * 125_000)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's VmHWM")
def test_peak_memory_counts_the_call_alone():
    # Neither what building took nor the size of this process is in it: ru_maxrss of the child has both.
    parent = np.ones(80_000_000)
    found = peak_memory_mb(functools.partial(load_ones, 500, 150), np.zeros((1, 8), np.float32))
    assert parent[0] == 1.0
    assert 149.0 < found < 165.0


def test_peak_memory_without_proc_is_the_growth_of_maxrss(monkeypatch):
    levels = iter([1000, 1000 + 2048])

    class Usage:
        @property
        def ru_maxrss(self):
            return next(levels)

    monkeypatch.setattr(latency, "Path", lambda path: Path("/nowhere") / path.lstrip("/"))
    monkeypatch.setattr(latency.resource, "getrusage", lambda _: Usage())
    monkeypatch.setattr(sys, "platform", "freebsd")
    assert latency._first_call_mb(lambda: lambda audio: lambda: audio, noise(8)) == pytest.approx(
        2.097152
    )


@pytest.mark.skipif(not hasattr(latency.os, "sched_setaffinity"), reason="needs Linux")
def test_threads_are_cores(monkeypatch):
    bound = []
    monkeypatch.setattr(latency.os, "sched_getaffinity", lambda _: {5, 2, 7})
    monkeypatch.setattr(latency.os, "sched_setaffinity", lambda _, cores: bound.append(cores))
    assert limit_threads(None) == 3
    assert bound == []
    assert limit_threads(2) == 2
    assert bound == [[2, 5]]
    for threads in (0, 4):
        with pytest.raises(InputError, match=f"{threads} threads: give 1 to 3"):
            limit_threads(threads)
    monkeypatch.delattr(latency.os, "sched_setaffinity")
    with pytest.raises(InputError, match="cannot bind a process to cores; leave the limit out"):
        limit_threads(2)


def test_peers_that_cannot_run_say_why(monkeypatch):
    found, notes = find_peers(tiny_config(), 1)
    assert found == {}
    names = [name for name in PEERS if name != "speechbrain"]
    assert [note.split(" is absent: ")[0] for note in notes] == names
    assert all("waveform front end" in note for note in notes)

    def is_installed(package):
        return None if package in ("onnx", "onnxruntime") else object()

    monkeypatch.setattr("importlib.util.find_spec", is_installed)
    found, notes = find_peers(WAVEFORM, 1)
    assert list(found) == ["transformers_eager", "transformers_sdpa"]
    assert notes == ["onnxruntime is absent: install onnx, onnxruntime"]
    found, notes = find_peers(SepFormerConfig.tiny(), 1)
    assert list(found) == ["speechbrain"]
    assert notes == []


@pytest.fixture(scope="module")
def same_weights(tmp_path_factory):
    """Our model with the peers' weights: its logits at two lengths."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from edgespeech.interop.hf_wav2vec2 import load_hf_wav2vec2
    from tests.golden.make_hf_wav2vec2 import TOKENS

    folder = tmp_path_factory.mktemp("peer")
    random_transformers_model(WAVEFORM, "eager").save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
    model = load_hf_wav2vec2(folder).model
    # Ours scales the waveform itself and upstream's processor does it ahead of the model: here it is scaled already.
    waves = [noise(samples) for samples in (4_000, 9_999)]
    audio = [(wave - wave.mean()) / wave.std() for wave in waves]
    logits = [
        nnx.jit(lambda model, x: model(x, jnp.asarray([x.shape[1]])).logits)(model, x)
        for x in audio
    ]
    return audio, logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_computes_the_same_model(same_weights, attention):
    prepare = load_transformers(WAVEFORM, 1, attention)
    for audio, want in zip(*same_weights, strict=True):
        got = prepare(audio)()
        assert not got.requires_grad
        np.testing.assert_allclose(got.numpy(), want, atol=1e-5, rtol=0)
    model = random_transformers_model(WAVEFORM, attention)
    assert model.config._attn_implementation == attention


def test_onnxruntime_computes_the_same_model(same_weights):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    prepare = load_onnxruntime(WAVEFORM, 1)
    for audio, want in zip(*same_weights, strict=True):
        np.testing.assert_allclose(prepare(audio)(), want, atol=1e-5, rtol=0)
