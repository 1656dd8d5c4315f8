"""Recognisers side by side: peers against their libraries or stand-ins for them, and the table by a clock set by hand.

Stand-ins have the interfaces of the released sources of vosk 0.3.45, pywhispercpp 1.5.1 and faster-whisper 1.2.1, whose
models are downloads of their own.
"""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.cli import main
from edgespeech.data.audio import read_audio, to_int16
from edgespeech.data.folder import FolderCorpus
from edgespeech.data.tokenizer import CharTokenizer, ctc_collapse
from edgespeech.errors import InputError
from edgespeech.evaluation import bench_peers, bench_speech
from edgespeech.evaluation.bench_files import ExportedFile
from edgespeech.evaluation.bench_peers import PEERS, FasterWhisper, Peer, Vosk, WhisperCpp
from edgespeech.evaluation.bench_speech import (
    Heard,
    Recording,
    choose_recordings,
    hear,
    int8_against_float,
    summarise,
    wer_over_time,
)
from edgespeech.interop.exported import export
from edgespeech.ops.ctc import greedy_path
from tests.support.modules import randomize
from tests.support.tiny import SAMPLE_RATE, ToneCorpus, tiny_model, tone, write_librispeech

BECKETT = "ever tried ever failed no matter try again fail again fail better"


# -------------------------------------------------------------------------------------- libraries


@pytest.fixture(scope="module")
def recording():
    """Eleven words by Beckett, which the wheel of moonshine-cpp holds."""
    package = pytest.importorskip("moonshine_cpp")
    return Path(package.__file__).parent / "test-data" / "beckett.wav"


def words(text):
    return "".join(c for c in text.lower() if c.isalpha() or c == " ").split()


def test_moonshine(recording):
    """The text is that of the library's own reader of WAV files; a shorter recording has less of it."""
    peer = PEERS["moonshine-cpp"]()
    assert peer.version == "0.1.4"
    assert peer.model_bytes == pytest.approx(62e6, rel=0.5)
    peer.load(1)
    samples = read_audio(recording).samples
    text = peer.transcribe(samples)
    assert text == peer._loaded.transcribe_wav(str(recording))
    assert words(text) == BECKETT.split()
    assert words(peer.transcribe(samples[: 3 * SAMPLE_RATE])) == BECKETT.split()[:4]


def test_pocketsphinx(recording):
    """It takes "tried ever" for "try it"; what it heard before changes nothing, and silence has no text."""
    pytest.importorskip("pocketsphinx")
    peer = PEERS["pocketsphinx"]()
    assert peer.model_bytes == pytest.approx(38e6, rel=0.1)
    peer.load(1)
    samples = read_audio(recording).samples[: 3 * SAMPLE_RATE]
    text = peer.transcribe(samples)
    assert words(text)[:2] == ["ever", "try"]
    assert peer.transcribe(np.zeros(8000, np.float32)) == ""
    assert peer.transcribe(samples) == text


# -------------------------------------------------------------------------------------- stand-ins

NOISE = np.random.default_rng(0).uniform(-1, 1, 21_000).astype(np.float32)


class KaldiRecognizer:
    """Ends an utterance with every third block; its text is the number of samples in it."""

    heard = b""

    def __init__(self, model, rate):
        assert model.path == "a/model"
        assert rate == 16_000
        self.blocks = self.waiting = 0

    def AcceptWaveform(self, data):  # noqa: N802
        KaldiRecognizer.heard += data
        self.blocks += 1
        self.waiting += len(data) // 2
        return int(self.blocks % 3 == 0)

    def Result(self):  # noqa: N802
        found, self.waiting = self.waiting, 0
        return json.dumps({"text": str(found) if found else ""})

    FinalResult = Result


def vosk_module():
    return SimpleNamespace(
        SetLogLevel=lambda level: None,
        Model=lambda model_path=None, model_name=None, lang=None: SimpleNamespace(path=model_path),
        KaldiRecognizer=KaldiRecognizer,
    )


def test_vosk(monkeypatch):
    monkeypatch.setitem(sys.modules, "vosk", vosk_module())
    peer = Vosk(Path("a/model"))
    peer.load(2)
    # Six blocks of 4000 samples, the last one of 1000: utterances of three blocks, then nothing is left.
    assert peer.transcribe(NOISE) == "12000 9000"
    assert KaldiRecognizer.heard == to_int16(NOISE).tobytes()
    assert peer.transcribe(NOISE[:17_000]) == "12000 5000"


class WhisperCppModel:
    def __init__(
        self,
        model="tiny",
        models_dir=None,
        params_sampling_strategy=0,
        redirect_whispercpp_logs_to=False,
        **params,
    ):
        assert params_sampling_strategy == 0
        assert set(params) <= {"n_threads", "language", "print_progress", "print_realtime"}
        self.made_with = model, params["n_threads"], params["language"]

    def transcribe(self, media, n_processors=None, **params):
        assert media.dtype == np.float32
        assert not params
        texts = [f" {len(media)}", str(self.made_with)]
        return [SimpleNamespace(t0=0, t1=1, text=text) for text in texts]


def test_whisper_cpp(monkeypatch):
    monkeypatch.setitem(sys.modules, "pywhispercpp", SimpleNamespace())
    model = SimpleNamespace(Model=WhisperCppModel)
    monkeypatch.setitem(sys.modules, "pywhispercpp.model", model)
    peer = WhisperCpp(Path("ggml.bin"))
    peer.load(2)
    assert peer.transcribe(NOISE) == "21000 ('ggml.bin', 2, 'en')"


class WhisperModel:
    def __init__(
        self,
        model_size_or_path,
        device="auto",
        device_index=0,
        compute_type="default",
        cpu_threads=0,
        num_workers=1,
        download_root=None,
        local_files_only=False,
    ):
        assert local_files_only
        self.made_with = model_size_or_path, device, cpu_threads

    def transcribe(self, audio, language=None, task="transcribe", beam_size=5):
        assert audio.dtype == np.float32
        texts = (f" {len(audio)}", f" {language}", str(self.made_with))
        segments = (SimpleNamespace(start=0.0, end=1.0, text=text) for text in texts)
        return segments, SimpleNamespace(language=language)


def test_faster_whisper(monkeypatch):
    module = SimpleNamespace(WhisperModel=WhisperModel)
    monkeypatch.setitem(sys.modules, "faster_whisper", module)
    peer = FasterWhisper(Path("a/model"))
    peer.load(3)
    assert peer.transcribe(NOISE) == "21000 en ('a/model', 'cpu', 3)"


def test_which_peers_can_run(monkeypatch, tmp_path):
    (tmp_path / "am").mkdir()
    (tmp_path / "am" / "final.mdl").write_bytes(bytes(300))
    (tmp_path / "README").write_bytes(bytes(7))
    installed = ["vosk", "pywhispercpp", "pocketsphinx"]
    found = lambda name: SimpleNamespace(origin="x") if name in installed else None  # noqa: E731
    monkeypatch.setattr(bench_peers.importlib.util, "find_spec", found)
    peers, absent = bench_peers.find_peers({"vosk": tmp_path})
    assert [peer.name for peer in peers] == ["pocketsphinx", "vosk"]
    assert peers[1].model_bytes == 307
    assert Vosk(tmp_path / "README").model_bytes == 7
    assert absent == [
        "moonshine-cpp is not installed: pip install moonshine-cpp",
        "pywhispercpp has no model: --peer_model=pywhispercpp:PATH, a ggml file of Whisper",
        "faster-whisper is not installed: pip install faster-whisper",
    ]
    with pytest.raises(InputError, match="the peers are moonshine-cpp, pocketsphinx, vosk"):
        bench_peers.find_peers({"siri": tmp_path})
    with pytest.raises(InputError, match="nothing is there"):
        bench_peers.find_peers({"vosk": tmp_path / "none"})


# -------------------------------------------------------------------------------------- the table


class Parrot(Peer):
    """Says what it is told to, one text a recording."""

    name, version, model_bytes = "parrot", "1.0", 2_500_000

    def __init__(self, texts):
        super().__init__()
        self.texts = texts
        self.calls = 0

    def load(self, threads):
        """Nothing to load."""

    def transcribe(self, samples):
        self.calls += 1
        return self.texts[len(samples)]


RECORDINGS = [
    Recording("a", np.zeros(16_000, np.float32), "Hello, Mr. World!"),
    Recording("b", np.zeros(32_000, np.float32), "ONE TWO THREE FOUR FIVE"),
    Recording("c", np.zeros(8_000, np.float32), ""),
]
TEXTS = {16_000: "hello mister word", 32_000: "One two, three -- four five", 8000: "what"}


def test_times_and_errors():
    parrot = Parrot(TEXTS)
    took = [0.1, 0.4, 0.2, 0.3, 0.6, 0.1]
    ticks = itertools.accumulate(itertools.chain.from_iterable((0.5, step) for step in took))
    heard = hear(parrot, RECORDINGS, 2, clock=lambda: next(ticks))
    assert parrot.calls == 7  # one of them warms up
    assert heard.texts == list(TEXTS.values())
    row = summarise(parrot, RECORDINGS, heard)
    assert row["p50_ms"] == pytest.approx(250)  # of 100 100 200 300 400 600
    assert row["p90_ms"] == pytest.approx(500)
    assert row["p99_ms"] == pytest.approx(590)
    assert row["real_time_factor"] == pytest.approx(1.7 / (2 * 3.5))
    assert row["megabytes"] == 2.5
    assert row["is_peer"]
    assert (row["score"]["errors"], row["score"]["words"]) == (1, 8)
    nothing = summarise(parrot, RECORDINGS[2:], Heard(["what"], np.ones((1, 1))))
    assert nothing["score"] is None


def test_choice_of_recordings():
    corpus = ToneCorpus(6)
    chosen, too_long = choose_recordings(corpus, 3, None)
    assert [recording.id for recording in chosen] == [corpus.utterances[i].id for i in (0, 2, 5)]
    assert too_long == 0
    for recording in chosen:
        np.testing.assert_array_equal(recording.samples, tone(recording.text))
    short = 3 * 2000  # "A B": a third of them
    chosen, too_long = choose_recordings(corpus, 20, short)
    assert [len(recording.samples) for recording in chosen] == [short, short]
    assert too_long == 4
    with pytest.raises(InputError, match=r"all 6 recordings are longer than 0\.1 s"):
        choose_recordings(corpus, 3, 1600)
    with pytest.raises(InputError, match="--utterances is 0"):
        choose_recordings(corpus, 0, None)


def row_of(name, rtf, wer, is_peer, **more):
    score = {"wer": wer, "ci": [wer - 0.02, wer + 0.03]}
    return {
        "file": name, "version": "1", "is_peer": is_peer, "bits": None, "megabytes": 1.0,
        "threads": 1, "p50_ms": 1.0, "p90_ms": 2.0, "p99_ms": 3.0, "real_time_factor": rtf,
        "peak_mb": 4.0, "score": score, "texts": [],
    } | more  # fmt: skip


def test_what_8_bits_cost():
    """One more word wrong of eight, in half the time, a quarter of the size and an eighth of the memory."""
    texts = list(TEXTS.values())
    rows = [
        row_of("a/m.onnx", 0.2, 0.1, False, bits=32, megabytes=4.0, peak_mb=8.0, texts=texts),
        row_of("peer", 0.9, 0.1, True, texts=texts),
        row_of("a/m.int8.onnx", 0.1, 0.1, False, bits=8, peak_mb=1.0, texts=["hello", *texts[1:]]),
        row_of("a/m.int8.onnx", 0.1, 0.1, False, bits=8, threads=2, texts=texts),
        row_of("b/m.int8.onnx", 0.1, 0.1, False, bits=8, texts=texts),
    ]
    (pair,) = int8_against_float(rows, RECORDINGS)
    assert pair.pop("ci") == pytest.approx([0.0, 2 / 3 - 1 / 3])  # of draws of one utterance alone
    assert pair == {
        "file": "a/m.int8.onnx", "threads": 1, "wer": pytest.approx(2 / 8 - 1 / 8),
        "size": 0.25, "time": 0.5, "memory": 0.125,
    }  # fmt: skip
    mute = [recording._replace(text="") for recording in RECORDINGS]
    (pair,) = int8_against_float(rows, mute)
    assert pair["wer"] is pair["ci"] is None
    assert pair["size"] == 0.25


def test_plot(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(bench_speech, "save_figure", lambda figure, path: figures.append(figure))
    rows = [
        row_of("ours.onnx", 0.02, 0.12, False),
        row_of("parrot", 0.3, 0.05, True),
        row_of("mute", 0.1, 0.5, True, score=None),
    ]
    wer_over_time(tmp_path / "plot.png", rows, "3 recordings")
    axis = figures[0].axes[0]
    points = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axis.containers}
    assert points == {"exported here": [[0.02, 12.0]], "peers": [[0.3, 5.0]]}
    (bars,) = axis.containers[1].lines[2]
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], [3.0, 8.0])
    assert {text.get_text() for text in axis.texts} == {"ours.onnx", "parrot"}
    with pytest.raises(InputError, match="no row has a WER"):
        wer_over_time(tmp_path / "plot.png", rows[2:], "")


# ------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model in a file of 1 s, and speech beside it: tones, two of six utterances without a transcript."""
    folder = tmp_path_factory.mktemp("bench")
    model = randomize(tiny_model(seed=2), 3, 0.4)
    export(model, CharTokenizer(), {}, folder / "model.stablehlo", form="stablehlo", seconds=1.0)
    split = write_librispeech(folder, "tones", ToneCorpus(6))
    for path in split.rglob("*.trans.txt"):
        path.write_text("".join(path.read_text().splitlines(True)[1:]))
    return model, folder, split


def text_in_jax(model, samples):
    output = jax.jit(lambda *x: model(*x))(samples[None], jnp.array([len(samples)]))
    path = np.asarray(greedy_path(output.logits, output.lengths))[0]
    return CharTokenizer().decode(ctc_collapse(path))


def test_exported_files_are_heard(exported, tmp_path, capsys):
    """In processes of their own: texts as JAX's, errors against the transcripts that are there."""
    model, folder, split = exported
    rows, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    file = folder / "model.stablehlo"
    options = ["--threads=1", f"--output={rows}", f"--plot={plot}", f"--speech={split}"]
    assert main(["bench", str(file), *options]) == 0
    printed = capsys.readouterr().out
    assert "Heard: 6 recordings of tones, 3 s." in printed
    (row,) = json.loads(rows.read_text())["rows"]
    corpus = FolderCorpus(folder, "tones", require_text=False)
    want = [text_in_jax(model, corpus.audio(i)) for i in range(6)]
    assert any(want)
    assert row["texts"] == want
    assert row["score"]["utterances"] == 4
    assert row["score"]["words"] == 8
    assert row["peak_mb"] >= 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    one = ExportedFile(file)
    assert one.most_samples == SAMPLE_RATE
    one.load(1)
    assert one.transcribe(corpus.audio(0)) == want[0]


def test_a_peer_that_fails_is_named(exported, monkeypatch, tmp_path, capsys):
    """The others are measured, and the status says that part of the work failed."""
    _, folder, split = exported

    def measure(recogniser, recordings, threads, repeats):
        if recogniser.name == "broken":
            raise RuntimeError("no model")
        return row_of(recogniser.name, 0.1, 0.25, recogniser.name == "parrot")

    broken = SimpleNamespace(name="broken", version="0")
    monkeypatch.setattr(bench_peers, "find_peers", lambda _: ([broken, Parrot({})], ["x is away"]))
    monkeypatch.setattr(bench_speech, "measure_speech", measure)
    file, rows = str(folder / "model.stablehlo"), tmp_path / "rows.json"
    options = [f"--speech={split}", "--threads=1", f"--output={rows}"]
    assert main(["bench", file, "--peers", *options]) == 1
    facts = json.loads(rows.read_text())
    assert [row["file"] for row in facts["rows"]] == ["model.stablehlo", "parrot"]
    assert facts["notes"] == ["x is away", "broken 0 failed: RuntimeError('no model')"]
    assert "25.0 (23.0 to 28.0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers"], "add --speech=DIR"),
        (["a.onnx", "--plot=x.png"], "add --speech=DIR"),
        ([], "nothing to time"),
        (["--peers", "--speech=x", "--peer_model=vosk"], "give a name and a path"),
        (["--peers", "--speech=x", "--peer_model=siri:."], "the peers are"),
        (["a.onnx", "--repeats=0"], "--repeats is 0"),
    ],
)
def test_bad_input_is_a_message(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
