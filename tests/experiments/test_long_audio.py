"""Long recordings of tones through tiny models, in a process of its own: its flags are those of another program."""

import functools
import json

import jax
import jax.numpy as jnp
import jiwer
import numpy as np
import pytest
from flax import nnx

from edgespeech.data.folder import FolderCorpus
from edgespeech.data.tokenizer import CharTokenizer, ctc_collapse
from edgespeech.evaluation.long_recordings import Joined
from edgespeech.evaluation.plain_text import plain_text
from edgespeech.inference.long_audio import LongAudio
from edgespeech.inference.transcribe import Transcriber
from edgespeech.interop.pretrained import save_pretrained
from edgespeech.models.sepformer import SepFormer, SepFormerConfig
from tests.support.apart import run_apart
from tests.support.moonshine_conversion import letters, talkative_moonshine
from tests.support.tiny import ToneCorpus, tiny_model, write_librispeech


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    root = tmp_path_factory.mktemp("long")
    write_librispeech(root / "data", "test", ToneCorpus(10, 2, "test"))
    models = {
        "first": (tiny_model(seed=4), CharTokenizer()),
        "second": (tiny_model(seed=5), CharTokenizer()),
        "moonshine": (talkative_moonshine(), letters()),
    }
    for name, (model, tokenizer) in models.items():
        save_pretrained(root / name, model, tokenizer, {})
    save_pretrained(
        root / "enhancer", SepFormer(SepFormerConfig.tiny(), rngs=nnx.Rngs(0)), None, {}
    )
    common = [f"--data_dir={root / 'data'}", f"--cache_dir={root / 'cache'}"]
    common += ["--segment_seconds=0.8", "--overlap_seconds=0.2"]
    runs = [
        [
            f"--checkpoints={root / 'first'},{root / 'second'}",
            f"--output={root / 'ctc'}",
            "--seconds=1.1,2",
        ],
        [f"--checkpoints={root / 'moonshine'}", f"--output={root / 'seq'}", "--seconds=1.1"],
        [f"--checkpoints={root / 'enhancer'}", f"--output={root / 'none'}", "--seconds=1.1"],
        [f"--checkpoints={root / 'first'}", f"--output={root / 'none'}", "--seconds=0"],
        [f"--checkpoints={root / 'first'}", f"--output={root / 'none'}", "--seconds=60"],
    ]
    outcomes = run_apart("experiments.long_audio", [common + run for run in runs])
    return root, models, outcomes


def joined(root, seconds):
    return Joined(FolderCorpus(root / "data", "test", cache_dir=root / "cache"), seconds)


@functools.partial(jax.jit, static_argnums=0)
def best_tokens(graphdef, state, audio, lengths):
    output = nnx.merge(graphdef, state)(audio, lengths)
    return jnp.argmax(output.logits, -1), output.lengths


def greedy(model, audio):
    """The text of a recording alone, with more padding than any here, which changes nothing."""
    padded = np.zeros((1, 40_000), np.float32)
    padded[0, : len(audio)] = audio
    tokens, lengths = best_tokens(*nnx.split(model), padded, np.array([len(audio)]))
    return CharTokenizer().decode(ctc_collapse(np.asarray(tokens)[0, : int(lengths[0])]))


def test_a_pass_over_the_whole_and_segments(outcome):
    root, models, outcomes = outcome
    assert outcomes[0]["status"] == 0, outcomes[0]["stderr"]
    report = json.loads((root / "ctc" / "report.json").read_text())
    assert report["recordings"].keys() == {"1.1", "2"}
    rows = {(row["model"], row["seconds"], row["way"]): row for row in report["rows"]}
    assert len(rows) == 2 * 2 * 2
    for seconds in (1.1, 2.0):
        corpus = joined(root, seconds)
        assert report["recordings"][f"{seconds:g}"]["utterances"] == len(corpus) > 1
        audio = [corpus.audio(i) for i in range(len(corpus))]
        references = [u.text for u in corpus.utterances]
        wers = {}
        for name in ("first", "second"):
            model, tokenizer = models[name]
            segments = LongAudio(model, tokenizer, segment_seconds=0.8, overlap_seconds=0.2)
            texts = {
                "whole": [greedy(model, a) for a in audio],
                "segments": [segments.stream([a]).text for a in audio],
            }
            for way, heard in texts.items():
                row = rows[str(root / name), seconds, way]
                wers[name, way] = jiwer.wer(references, heard)
                assert row["wer"] == pytest.approx(wers[name, way])
                assert row["vs_first"]["difference"] == pytest.approx(
                    wers[name, way] - wers["first", way]
                )
                total = row["compute_seconds"] * len(corpus)
                spoken = sum(map(len, audio)) / 16_000
                assert row["real_time_factor"] == pytest.approx(total / spoken)
        assert rows[str(root / "first"), seconds, "whole"]["speed_up"] == 1.0
    text = (root / "ctc" / "report.md").read_text()
    assert "## 1.1 s" in text
    assert f"| {root / 'second'} | segments |" in text


def test_an_encoder_decoder_takes_the_whole_alone(outcome):
    root, models, outcomes = outcome
    assert outcomes[1]["status"] == 0, outcomes[1]["stderr"]
    (row,) = json.loads((root / "seq" / "report.json").read_text())["rows"]
    assert row["way"] == "whole"
    corpus = joined(root, 1.1)
    texts = Transcriber(*models["moonshine"])([corpus.audio(i) for i in range(len(corpus))])
    references = [plain_text(u.text) for u in corpus.utterances]
    assert row["wer"] == pytest.approx(jiwer.wer(references, [plain_text(t) for t in texts]))


def test_what_is_refused(outcome):
    enhancer, zero, long = outcome[2][2:]
    assert enhancer["status"] == zero["status"] == long["status"] == 2
    assert "a SepFormer: give models with a CTC head, or Moonshines" in enhancer["stderr"]
    assert "--seconds=0: give numbers above 0" in zero["stderr"]
    assert "has a recording of 60 s" in long["stderr"]
