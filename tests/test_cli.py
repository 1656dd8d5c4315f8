"""The command line: words and their times on tones that are known, long files, formats, errors, and every command."""

import dataclasses
import gc
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import soxr
from flax import nnx

from edgespeech import cli
from edgespeech.cli import main
from edgespeech.conversion.mixers import lpa_factory
from edgespeech.data.tokenizer import CharTokenizer, SentencePieceTokenizer, ctc_collapse
from edgespeech.errors import InputError
from edgespeech.evaluation.macs import count_macs
from edgespeech.inference.enhance import enhance_file
from edgespeech.inference.long_audio import LongAudio
from edgespeech.inference.subtitles import cues, srt, vtt
from edgespeech.inference.words import Word, text_of, token_texts, words_of_path
from edgespeech.interop.pretrained import save_pretrained
from edgespeech.models.sepformer import SepFormer
from edgespeech.models.wav2vec2 import count_parameters
from edgespeech.nn.lpa import LPAConfig
from edgespeech.ops.ctc import greedy_path
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from tests.support.modules import randomize
from tests.support.sepformer import TOY
from tests.support.tiny import LETTER, LETTERS, ROOT, tiny_model, tone

FRAME = 500  # samples of a frame of the models below: a quarter of a letter
RATE = 16_000


class Output(NamedTuple):
    logits: jax.Array
    lengths: jax.Array


CONFIG = SimpleNamespace(num_frames=lambda t: t // FRAME, frame_seconds=FRAME / RATE)


def in_frames(audio):
    n = audio.shape[1] // FRAME
    return audio[:, : n * FRAME].reshape(len(audio), n, FRAME)


class HearsTones(nnx.Module):
    """Labels a frame by the tone that is loudest in it, silence as a space."""

    def __init__(self):
        self.config = CONFIG
        time = np.arange(FRAME) / RATE
        waves = [np.exp(2j * np.pi * 400 * (1 + i) * time) for i in range(len(LETTERS))]
        self.waves = nnx.Param(jnp.asarray(np.stack(waves), jnp.complex64))
        self.ids = [int(i) for i in CharTokenizer().encode(LETTERS)]

    def __call__(self, audio, lengths):
        frames = in_frames(audio)
        power = jnp.abs(frames @ self.waves[...].T) / FRAME
        logits = jnp.zeros((*power.shape[:2], CharTokenizer().vocab_size))
        logits = logits.at[..., 1].set(0.05).at[..., jnp.asarray(self.ids)].set(power)
        return Output(logits, lengths // FRAME)


class SeesNeighbours(nnx.Module):
    """Random labels that depend on `reach` frames to each side, and on nothing else."""

    def __init__(self, reach):
        self.config = CONFIG
        rng = np.random.default_rng(0)
        self.project = nnx.Param(jnp.asarray(rng.normal(size=(FRAME, 4)), jnp.float32))
        self.mix = nnx.Param(jnp.asarray(rng.normal(size=(2 * reach + 1, 4, 29)), jnp.float32))

    def __call__(self, audio, lengths):
        x = in_frames(audio) @ self.project[...]
        x = zero_padding(x, mask_from_lengths(lengths // FRAME, x.shape[1]))
        taps = self.mix[...]
        reach = len(taps) // 2
        x = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
        n = x.shape[1] - 2 * reach
        logits = sum(x[:, j : j + n] @ taps[j] for j in range(len(taps)))
        return Output(logits, lengths // FRAME)


def labels(model, audio):
    output = model(audio[None], jnp.array([len(audio)]))
    return np.asarray(greedy_path(output.logits, output.lengths))[0]


# ------------------------------------------------------------------------------------ words and times


def test_words_of_a_path():
    texts = token_texts(CharTokenizer())
    assert texts[:4] == ("", " ", "'", "A")
    ids = {text: i for i, text in enumerate(texts)}
    path = [ids[c] if c != "_" else 0 for c in "__HH_I__  _  THE_E'_"]
    words = words_of_path(path, texts, 0.1)
    assert [word.text for word in words] == ["HI", "THEE'"]
    np.testing.assert_allclose([word[1:3] for word in words], [(0.2, 0.6), (1.3, 1.9)])


def test_pieces_of_words():
    sentences = ["THE THEN THERE", "ON AND ON", "THE END", "DON'T SEND THEM"]
    tokenizer = SentencePieceTokenizer.train(sentences, 34)
    texts = token_texts(tokenizer)
    assert texts[0] == texts[1] == ""
    for sentence in sentences:
        ids = tokenizer.encode(sentence)
        assert "".join(texts[i] for i in ids) == " " + sentence
        spread = [label for i in ids for label in (i, 0)]
        words = words_of_path(spread, texts, 0.02)
        assert text_of(words) == sentence == tokenizer.decode(ctc_collapse(spread))
        assert all(a.end <= b.start for a, b in itertools.pairwise(words))


def test_words_need_units_inside_them():
    words = SimpleNamespace(vocab_size=2, decode=lambda ids: " ".join("X" for i in ids if i))
    with pytest.raises(InputError, match="none of the 2 tokens can stand inside a word"):
        token_texts(words)


WORDS = [Word("A", 0.0, 0.5), Word("B", 0.9, 1.25), Word("C", 3661.5, 3662.0)]


def test_subtitles():
    assert srt(WORDS) == (
        "1\n00:00:00,000 --> 00:00:01,250\nA B\n\n2\n01:01:01,500 --> 01:01:02,000\nC\n"
    )
    assert vtt(WORDS) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.250\nA B\n\n01:01:01.500 --> 01:01:02.000\nC\n"
    )
    assert srt([]) == ""


def test_cues_end_at_pauses_length_and_duration():
    def spoken(count, size, seconds):
        return [Word("X" * size, i * seconds, (i + 0.9) * seconds) for i in range(count)]

    assert [len(group) for group in cues(spoken(10, 20, 0.2))] == [4, 4, 2]  # 4 * 20 + 3 <= 84
    assert [len(group) for group in cues(spoken(10, 1, 2.0))] == [3, 3, 3, 1]  # 5.8 s <= 7 s


# ------------------------------------------------------------------------------------------ long files

TEXT = "AB C DE ABC E D CAB EBD A"


@pytest.mark.parametrize("seconds", [1.0, 1.3, 2.0, 10.0])
def test_tones_in_segments(seconds):
    """Whatever the segments, the text is the whole one's and every word is where its tones are."""
    transcribe = LongAudio(
        HearsTones(), CharTokenizer(), segment_seconds=seconds, overlap_seconds=seconds / 3
    )
    audio = tone(TEXT)
    transcript = transcribe.stream(np.array_split(audio, 7))
    assert transcript.text == TEXT
    assert transcript.seconds == pytest.approx(len(audio) / RATE)
    start = 0
    for word in transcript.words:
        start = TEXT.index(word.text, start)
        assert word.start == pytest.approx(start * LETTER / RATE)
        assert word.end == pytest.approx((start + len(word.text)) * LETTER / RATE)
        start += len(word.text)


def test_segments_give_every_label_of_the_whole():
    """With as much context as half an overlap; with less they do not, so the overlap is needed."""
    rng = np.random.default_rng(1)
    audio = rng.normal(0, 0.1, 40 * FRAME + 123).astype(np.float32)
    model = SeesNeighbours(reach=2)
    texts = token_texts(CharTokenizer())
    want = text_of(words_of_path(labels(model, audio), texts, CONFIG.frame_seconds))
    assert len(want) > 20

    def heard(overlap):
        settings = {"segment_seconds": 12 * FRAME / RATE, "overlap_seconds": overlap * FRAME / RATE}
        return LongAudio(model, CharTokenizer(), **settings).stream([audio]).text

    assert heard(4) == heard(5) == want
    assert heard(2) != want


def test_short_and_empty_streams():
    transcribe = LongAudio(HearsTones(), CharTokenizer())
    assert transcribe.stream([]) == ([], 0.0)
    assert transcribe.stream([np.zeros(FRAME - 1, np.float32)]).words == []
    assert transcribe.stream([tone("B")]).text == "B"


def test_rates_channels_and_bad_files(tmp_path):
    transcribe = LongAudio(HearsTones(), CharTokenizer())
    sound = soxr.resample(tone("AB C D"), RATE, 44_100)
    stereo = np.stack([1.5 * sound, 0.5 * sound], axis=1)
    soundfile.write(tmp_path / "stereo.flac", np.clip(stereo, -1, 1), 44_100)
    transcript = transcribe.file(tmp_path / "stereo.flac")
    assert transcript.text == "AB C D"
    assert transcript.seconds == pytest.approx(6 * LETTER / RATE, abs=1e-3)
    (tmp_path / "bad.wav").write_bytes(b"RIFF no")
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), RATE, subtype="FLOAT")
    for name in ("bad.wav", "nan.wav", "missing.wav"):
        with pytest.raises(InputError, match=name):
            transcribe.file(tmp_path / name)


@pytest.mark.parametrize("overlap", [0.0, 6.0])
def test_overlap_must_fit(overlap):
    with pytest.raises(InputError, match="does not fit segments of 10 s"):
        LongAudio(HearsTones(), CharTokenizer(), segment_seconds=10, overlap_seconds=overlap)


# -------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a hybrid, and the hybrid."""
    model = randomize(tiny_model(seed=2), 3, 0.4)
    config = LPAConfig(aperiodic=2, periodic=1, positional=0, kernel_size=3, local_kernel_size=5)
    model.layers[1].mixer = lpa_factory(config)(model.layers[1].mixer, nnx.Rngs(0))
    model.layers[1].mixer.inference = True
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_pretrained(folder, model, CharTokenizer(), {"data": "tones"})
    return folder, model


def test_help_is_quick():
    """Nothing heavy is imported for it, nor by the other commands' arguments."""
    code = (
        "import sys; from edgespeech.cli import main\n"
        "try: main(['transcribe', '--help'])\n"
        "except SystemExit: print([m for m in ('jax', 'flax', 'numpy', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "--model" in done.stdout


def test_collections_are_few_while_a_command_runs(monkeypatch):
    before, found = gc.get_threshold(), []
    command = SimpleNamespace(
        add_arguments=lambda parser: None,
        run=lambda arguments: found.append(gc.get_threshold()) or 3,
    )
    monkeypatch.setitem(cli.COMMANDS, "inspect", command)
    assert main(["inspect"]) == 3
    assert found == [(50_000, *before[1:])]
    assert gc.get_threshold() == before


def test_transcribe(saved, tmp_path, capsys):
    """A bad file is named, the other is done, and its words are those of the model."""
    folder, model = saved
    audio = tone("ABC DE AC")
    soundfile.write(tmp_path / "good.wav", audio, RATE, subtype="FLOAT")
    (tmp_path / "bad.wav").write_bytes(b"nothing")
    files = [str(tmp_path / name) for name in ("bad.wav", "good.wav")]
    status = main(
        ["transcribe", *files, f"--model={folder}", "--format=json", f"--output={tmp_path / 'o'}"]
    )
    printed = capsys.readouterr()
    assert status == 1
    assert "bad.wav: unreadable audio" in printed.err
    assert "1 of 2 files failed" in printed.err
    assert not (tmp_path / "o" / "bad.json").exists()
    found = json.loads((tmp_path / "o" / "good.json").read_text())

    output = jax.jit(lambda *inputs: model(*inputs))(audio[None], jnp.array([len(audio)]))
    path = np.asarray(greedy_path(output.logits, output.lengths))[0]
    want = CharTokenizer().decode(ctc_collapse(path))
    assert len(want) >= 3
    assert found["text"] == want == " ".join(word["word"] for word in found["words"])
    assert found["seconds"] == pytest.approx(len(audio) / RATE, abs=1e-3)

    assert main(["transcribe", files[1], f"--model={folder}"]) == 0
    assert capsys.readouterr().out == want + "\n"


def test_a_second_start_compiles_nothing(saved, tmp_path):
    """What the first start compiles lies in the user's cache folder, and the second one adds nothing to it."""
    soundfile.write(tmp_path / "a.wav", tone("AB C"), RATE, subtype="FLOAT")
    chosen = {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    folder = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | chosen
    command = [sys.executable, "-m", "edgespeech", "transcribe", str(tmp_path / "a.wav")]

    def start():
        done = subprocess.run(
            [*command, f"--model={saved[0]}"], capture_output=True, text=True, cwd=ROOT, env=folder
        )
        assert done.returncode == 0, done.stderr
        programs = (tmp_path / "edgespeech" / "xla").glob("*-cache")
        return done.stdout, {path.name for path in programs}

    text, programs = start()
    assert any(name.startswith("jit_path-") for name in programs)
    assert start() == (text, programs)


def test_inspect(saved, capsys):
    folder, model = saved
    assert main(["inspect", str(folder), "--seconds=2"]) == 0
    printed = capsys.readouterr().out
    assert f"Wav2Vec2, {count_parameters(model):,} parameters" in printed
    shapes = jnp.zeros((1, 2 * RATE)), jnp.array([2 * RATE])
    macs = count_macs(lambda *x: model(*x), *shapes).total()
    assert f"{macs / 1e9:.3f} G MACs for 2 s" in printed
    rows = [line.split("  ") for line in printed.splitlines() if line.startswith("layers.")]
    assert [row[1].strip() for row in rows] == ["SelfAttention", "LPA", "SelfAttention"]
    assert rows[1][-1].strip() == "2 aperiodic, 1 periodic, local path of 5 frames"
    x = jnp.zeros((1, model.config.num_frames(2 * RATE), 16)), jnp.array([9])
    assert f"{count_macs(lambda *x: model.layers[1](*x), *x).total() / 1e6:.1f}" in printed
    assert "data: tones" in printed


def test_export_and_bench(saved, tmp_path, capsys):
    folder, _ = saved
    options = [f"--model={folder}", "--seconds=1", f"--output={tmp_path}"]
    assert main(["export", "--format=onnx", "--exits", *options]) == 2
    assert "which has no exits: leave it out" in capsys.readouterr().err
    assert main(["export", "--format=stablehlo", *options]) == 0
    assert "0.0% of the frames have another label" in capsys.readouterr().out
    exported = tmp_path / "model.stablehlo"
    manifest = json.loads((tmp_path / "model.stablehlo.manifest.json").read_text())
    assert manifest["difference_from_jax"]["largest"] < 1e-4

    results = tmp_path / "rows.json"
    bench = ["bench", str(exported), "--threads=1", "--repeats=3", f"--output={results}"]
    assert main(bench) == 0
    (row,) = json.loads(results.read_text())["rows"]
    assert row["megabytes"] == pytest.approx(exported.stat().st_size / 1e6)
    assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
    assert row["real_time_factor"] == pytest.approx(row["p50_ms"] / 1000)
    assert row["peak_mb"] >= 0
    assert "model.stablehlo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["transcribe", "a.wav", "--model=nowhere/at/all/x"], "nowhere"),
        (["transcribe", "a/x.wav", "b/x.wav", "--model=m", "--output=o"], "two files would be"),
        (["transcribe", "a", "b", "--model=m", "--format=srt"], "add --output=DIR"),
        (["inspect", ".", "--seconds=0"], "--seconds is 0: give 0.1 to 3600"),
        (["inspect", "."], "holds neither model.json"),
        (["bench", "none.onnx"], "none.onnx.manifest.json is missing"),
        (["bench", "none.onnx", "--threads=x"], "--threads=x: give numbers"),
        (["export", "--model=.", "--format=onnx", "--seconds=0"], "--seconds is 0"),
    ],
)
def test_bad_input_is_a_message(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")


def test_enhance(tmp_path, capsys):
    config = dataclasses.replace(TOY, num_blocks=1, num_intra_layers=1)
    model = randomize(SepFormer(config, rngs=nnx.Rngs(0)), 0, 0.3)
    save_pretrained(tmp_path / "model", model, None, {})
    noise = 0.1 * np.random.default_rng(0).normal(size=9000)
    soundfile.write(tmp_path / "noisy.wav", noise, 16_000)
    names = [str(tmp_path / name) for name in ("noisy.wav", "clean.wav", "wanted.wav")]
    assert (
        main(
            [
                "enhance",
                *names[:2],
                f"--model={tmp_path / 'model'}",
                "--segment=0.4",
                "--overlap=0.1",
            ]
        )
        == 0
    )
    assert names[1] in capsys.readouterr().out
    enhance_file(model, names[0], [names[2]], segment_seconds=0.4, overlap_seconds=0.1)
    found, wanted = (soundfile.read(name)[0] for name in names[1:])
    assert len(found) == 9000
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert main(["enhance", *names, f"--model={tmp_path / 'model'}"]) == 2
    assert "2 output files for a model of 1 speakers" in capsys.readouterr().err
    save_pretrained(tmp_path / "other", tiny_model(), CharTokenizer(), {})
    assert main(["enhance", *names[:2], f"--model={tmp_path / 'other'}"]) == 2
    assert "is a Wav2Vec2: enhancement needs a saved SepFormer" in capsys.readouterr().err
