"""Pulses of tiny hybrids against boundaries, beside the same worked out one utterance at a time."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.conversion.capture import capture
from edgespeech.data.folder import FolderCorpus
from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.evaluation.boundaries import (
    agreement,
    align,
    boundaries,
    even_agreement,
    pulse_edges,
    pulse_widths,
    token_spans,
)
from edgespeech.interop.pretrained import save_pretrained
from edgespeech.models.moonshine import Moonshine
from edgespeech.nn.lpa import LPA, LPAConfig, harden
from edgespeech.ops.ctc import ctc_log_probs
from tests.support.apart import run_apart
from tests.support.modules import randomize
from tests.support.moonshine import tiny_moonshine
from tests.support.moonshine_conversion import letters
from tests.support.programs import write_tones
from tests.support.tiny import tiny_model

PULSES = LPAConfig(3, 1, 2, 1, kernel_size=3, local_kernel_size=3, max_period=16.0)
LAYER = 2  # of two or three, the one that is replaced


def hybrid_of(model):
    """The model with gates that content moves in one layer."""
    mixer = LPA.from_attention(model.layers[LAYER - 1].mixer, PULSES, rngs=nnx.Rngs(1))
    model.layers[LAYER - 1].mixer = randomize(mixer, 5, 0.5)
    return harden(model)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Runs of one process: both kinds of hybrid, and what is refused."""
    root = tmp_path_factory.mktemp("boundaries")
    data = write_tones(root / "data")
    models = {
        "ctc": (hybrid_of(tiny_model(conv_strides=2)), CharTokenizer()),
        "moonshine": (hybrid_of(tiny_moonshine(scale=0.5)), letters()),
        "plain": (tiny_model(conv_strides=2), CharTokenizer()),
        "aligner": (tiny_model(seed=3, conv_strides=2), CharTokenizer()),
    }
    for name, (model, tokenizer) in models.items():
        save_pretrained(root / name, model, tokenizer, {})
    common = [f"--data_dir={data}", f"--cache_dir={root / 'cache'}", "--quiet"]
    runs = [
        [
            f"--checkpoint={root / name}",
            f"--aligner={root / aligner}",
            f"--output={root / 'out' / name}",
        ]
        for name, aligner in (
            ("ctc", "aligner"),
            ("moonshine", "aligner"),
            ("plain", "aligner"),
            ("ctc", "moonshine"),
        )
    ]
    runs[1].append("--utterances=3")
    outcomes = run_apart("experiments.boundaries", [common + run for run in runs])
    return root, models, outcomes


@functools.partial(jax.jit, static_argnums=0)
def log_probs_of(graphdef, state, *batch):
    return ctc_log_probs(nnx.merge(graphdef, state)(*batch).logits)


@functools.partial(jax.jit, static_argnums=0)
def gates_of(graphdef, state, *batch):
    """Gates of the replaced layer, and the frames."""
    model = nnx.merge(graphdef, state)
    call = Moonshine.encode if isinstance(model, Moonshine) else None
    _, calls = capture(model, *batch, call=call)
    x, lengths = calls[LAYER - 1].x, calls[LAYER - 1].lengths
    return model.layers[LAYER - 1].mixer.gates(x, lengths), x.shape[1]


def alone(model, aligner, audio, text):
    """Boundaries of words and tokens, frames, and gates by kind, of one utterance without padding."""
    batch = jnp.asarray(audio[None]), jnp.asarray([len(audio)])
    target = CharTokenizer().encode(text)
    alignment = align(np.asarray(log_probs_of(*nnx.split(aligner), *batch))[0], target)
    spans = token_spans(alignment) * 0.04
    space = int(np.flatnonzero(target == 1)[0])  # the texts have two words
    words = np.array([[spans[0, 0], spans[space - 1, 1]], [spans[space + 1, 0], spans[-1, 1]]])
    gates, frames = gates_of(*nnx.split(model), *batch)
    return {
        "words": boundaries(words),
        "tokens": boundaries(spans),
        "frames": int(frames),
        **{kind: np.asarray(gates[kind])[0].astype(bool) for kind in ("aperiodic", "runs")},
    }


@pytest.mark.parametrize(("name", "seconds", "rows"), [("ctc", 0.04, 4), ("moonshine", 0.024, 3)])
def test_report_is_that_of_every_utterance_alone(outcome, name, seconds, rows):
    root, models, outcomes = outcome
    status = outcomes[list(models).index(name)]
    assert status["status"] == 0, status["stderr"]
    report = json.loads((root / "out" / name / "report.json").read_text())
    corpus = FolderCorpus(root / "data", "test", cache_dir=root / "cache")
    chosen = np.linspace(0, 3, rows).round().astype(int)
    found = [
        alone(models[name][0], models["aligner"][0], corpus.audio(i), corpus.utterances[i].text)
        for i in chosen
    ]
    assert report["data"]["utterances"] == rows
    assert report["checkpoint"]["frame_seconds"] == seconds
    assert report["boundaries"] == {
        kind: sum(len(u[kind]) for u in found) for kind in ("words", "tokens")
    }
    keys = [(row["layer"], row["kind"], row["head"]) for row in report["edges"]]
    assert sorted(keys, key=str) == sorted(
        [(LAYER, kind, head) for kind in ("aperiodic", "runs") for head in (None, 1, 2)], key=str
    )
    for row in report["edges"]:
        gates = [u[row["kind"]] for u in found]
        if row["head"]:
            gates = [gate[row["head"] - 1 : row["head"]] for gate in gates]
        edges = [pulse_edges(gate.reshape(-1, gate.shape[-1])) for gate in gates]
        assert row["edges"] == sum(map(len, edges))
        times = [seconds * e for e in edges]
        for kind in ("words", "tokens"):
            references = [u[kind] for u in found]
            for tolerance, parts in row[kind].items():
                expected = agreement(references, times, float(tolerance))
                assert list(parts["pulses"].values()) == pytest.approx(list(expected))
                even = even_agreement(
                    references,
                    [len(e) for e in edges],
                    [u["frames"] for u in found],
                    seconds,
                    float(tolerance),
                )
                assert list(parts["even"].values()) == pytest.approx(list(even))
                assert 0 <= parts["random"]["f1"] <= 1
    assert [row["kind"] for row in report["widths"]] == ["aperiodic", "runs"]
    for row in report["widths"]:
        gates = [u[row["kind"]] for u in found]
        widths = np.concatenate([pulse_widths(g.reshape(-1, g.shape[-1])) for g in gates])
        assert row["pulses"] == len(widths)
        assert row["p50"] == pytest.approx(np.median(widths) * seconds)
    assert report["edges"][0]["edges"] > 0


def test_periods_are_those_of_the_mixer(outcome):
    root, models, _ = outcome
    report = json.loads((root / "out" / "ctc" / "report.json").read_text())
    (row,) = report["periods"]
    lpa = models["ctc"][0].layers[LAYER - 1].mixer
    alpha = np.abs(np.asarray(lpa.alpha[...]))
    # After 3 rectangles and a run come the two periodic pulses of each of the two heads.
    shares = alpha[:, 4:6] / alpha.sum()
    assert row["layer"] == LAYER
    assert row["share"] == pytest.approx(shares.sum(), rel=1e-5)
    assert [p["share"] for p in row["pulses"]] == pytest.approx(np.sort(shares.ravel())[::-1])
    # Log-spaced from 2 to 16 frames of 40 ms, neighbours in different heads.
    periods = sorted(p["seconds"] for p in row["pulses"])
    assert periods == pytest.approx([0.08, 0.16, 0.32, 0.64])
    duty = 1 / (1 + np.exp(-np.asarray(lpa.duty_logit[...], float)))
    first = row["pulses"][0]
    place = np.unravel_index(np.argmax(shares), shares.shape)
    assert first["duty"] == pytest.approx(duty[place])
    assert first["seconds"] == pytest.approx(np.array([[0.08, 0.32], [0.16, 0.64]])[place])


def test_text_and_pictures(outcome):
    root, _, _ = outcome
    folder = root / "out" / "ctc"
    text = (folder / "report.md").read_text()
    report = json.loads((folder / "report.json").read_text())
    together = next(r for r in report["edges"] if r["head"] is None and r["kind"] == "runs")
    part = together["words"]["0.04"]
    shown = " ".join(
        [
            f"**{100 * part['pulses']['f1']:.1f}**",
            f"({100 * part['random']['f1']:.1f}, {100 * part['even']['f1']:.1f})",
        ]
    )
    assert shown in text
    (picture,) = (folder / "plots").iterdir()
    assert picture.name.endswith(f"_layer{LAYER:02d}.png")
    assert f"plots/{picture.name}" in text


def test_what_is_refused(outcome):
    *_, plain, aligner = outcome[2]
    assert plain["status"] == aligner["status"] == 2
    assert "has no LPA with rectangles or runs" in plain["stderr"]
    assert "is a Moonshine: give a model with a CTC head" in aligner["stderr"]
