"""Exported files as recognisers: their names, exits as if they were files, 8 bits beside 32."""

import json

import numpy as np
import pytest

from edgespeech.cli import main
from edgespeech.commands import bench
from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError
from edgespeech.evaluation.bench_files import ExportedFile, matching_int8, open_files
from edgespeech.inference.words import text_of, token_texts, words_of_path
from edgespeech.interop.exported import manifest_path
from edgespeech.interop.exported_exits import export_exits, run_exits
from tests.support.modules import randomize
from tests.support.tiny import SAMPLE_RATE
from tests.support.tiny_exits import exit_model


def write_manifest(path):
    facts = {"format": "onnx", "bits": 32, "bytes": 5, "seconds": 1.0}
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = {"inputs": {"audio": {"shape": [1, SAMPLE_RATE]}}}
    manifest_path(path).write_text(json.dumps(facts | shape))
    return path


def test_names_tell_files_apart(tmp_path):
    paths = [write_manifest(tmp_path / name) for name in ("lpa/model.onnx", "none/model.onnx")]
    assert [file.name for file in open_files(paths)] == ["lpa/model.onnx", "none/model.onnx"]
    assert [file.name for file in open_files(paths[1:])] == ["model.onnx"]
    deep = write_manifest(tmp_path / "none" / "lpa" / "model.onnx")
    names = [file.name for file in open_files([paths[0], deep])]
    assert names == [f"{tmp_path.name}/lpa/model.onnx", "none/lpa/model.onnx"]
    with pytest.raises(InputError, match=r"model\.onnx is named twice"):
        open_files([paths[0], tmp_path / "none" / ".." / "lpa" / "model.onnx"])


def test_8_bits_find_their_32():
    names = ["a/model.onnx", "peer", "a/model.int8.onnx", "x.int8, exit 2", "x, exit 2", "b.int8"]
    bits = [32, None, 8, 8, 32, 8]
    assert matching_int8(list(zip(names, bits, strict=True))) == [(0, 2), (4, 3)]


def test_exits_are_rows(tmp_path, monkeypatch, capsys):
    """Each exit costs the segments up to it, and hears what these give."""
    model = randomize(exit_model(vocab_size=CharTokenizer().vocab_size, num_exits=2), 5, 0.5)
    folder = tmp_path / "exits"
    manifest = export_exits(model, CharTokenizer(), {}, folder, form="stablehlo", seconds=0.5)
    files = open_files([folder])
    assert [file.name for file in files] == ["exits, exit 1", "exits, exit 2"]
    sizes = [segment["bytes"] for segment in manifest["segments"]]
    assert [file.model_bytes for file in files] == [sum(sizes[:2]), sum(sizes)]
    assert {(file.most_samples, file.seconds, file.bits) for file in files} == {(8000, 0.5, 32)}

    audio = np.random.default_rng(0).normal(0, 0.1, 6000).astype(np.float32)
    texts = token_texts(CharTokenizer())
    heard = []
    for file, logits in zip(files, run_exits(folder, audio), strict=True):
        file.load(None)
        path = words_of_path(logits.argmax(-1), texts, model.config.frame_seconds)
        assert file.transcribe(audio) == text_of(path) != ""
        heard.append(text_of(path))
        padded = np.pad(audio, (0, 2000))[None]
        found, frames = file.prepare(padded)()
        assert int(frames[0]) >= len(logits)
        assert found.shape[2] == CharTokenizer().vocab_size
    assert heard[0] != heard[1]
    with pytest.raises(InputError, match="audio of 8001 samples"):
        files[0].transcribe(np.zeros(8001, np.float32))

    def measure(file, threads, repeats):
        numbers = ("p50_ms", "p90_ms", "p99_ms", "real_time_factor", "peak_mb")
        sizes = {"megabytes": file.model_bytes / 1e6, "threads": threads, "bits": file.bits}
        return {"file": file.name} | sizes | dict.fromkeys(numbers, 1.0)

    monkeypatch.setattr(bench, "measure", measure)
    rows = tmp_path / "rows.json"
    assert main(["bench", str(folder), "--threads=1,2", f"--output={rows}"]) == 0
    names = [(row["file"], row["threads"]) for row in json.loads(rows.read_text())["rows"]]
    assert names == [(file.name, threads) for file in files for threads in (1, 2)]
    assert "exits, exit 2" in capsys.readouterr().out


def test_a_folder_without_exits_is_a_message(tmp_path):
    with pytest.raises(InputError, match="name a file that `edgespeech export` wrote"):
        open_files([tmp_path])
    manifest_path(tmp_path / "m.onnx").write_text("{}")
    with pytest.raises(InputError, match="is damaged"):
        ExportedFile(tmp_path / "m.onnx")
