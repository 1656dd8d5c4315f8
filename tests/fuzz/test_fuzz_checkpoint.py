"""Damaged weights, and pickles planted where weights and data are read: nothing of a file is executed."""

import gzip
import io
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from safetensors.numpy import save

from edgespeech.data.audio import read_audio
from edgespeech.data.folder import FolderCorpus
from edgespeech.data.tokenizer import CharTokenizer, load_tokenizer
from edgespeech.errors import InputError
from edgespeech.evaluation.exit_scores import ExitScores, load_exit_scores, save_exit_scores
from edgespeech.evaluation.wer import score
from edgespeech.inference.exit_policy import load_policy
from edgespeech.inference.exit_predictor import FEATURES
from edgespeech.inference.language_model import read_arpa
from edgespeech.interop.exported import manifest_path, open_exported
from edgespeech.interop.hf_files import read_json, read_weights
from edgespeech.interop.moonshine_tokenizer import (
    load_piece_tokenizer,
    read_tokenizer_bin,
    read_tokenizer_json,
)
from edgespeech.interop.ort_format import read_ort
from edgespeech.interop.pretrained import load_pretrained, save_pretrained
from edgespeech.interop.speechbrain_sepformer import load_speechbrain_sepformer
from edgespeech.interop.splitformer_checkpoint import load_splitformer_checkpoint
from edgespeech.models.sepformer import SepFormerConfig
from edgespeech.models.splitformer import SplitformerConfig
from tests.fuzz.damage import Bomb, bomb, damaged, fuzz, read_or_refuse
from tests.support.tiny import tiny_model

TENSORS = {
    "layers.0.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "layers.0.bias": np.ones(3, np.float16),
    "scale": np.array(2.0, np.float32),
}
SAFETENSORS = save(TENSORS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


def check(tensors, size):
    if tensors is not None:
        assert all(array.dtype == np.float32 for array in tensors.values())
        assert sum(array.size for array in tensors.values()) <= size


@fuzz(300)
@given(data=damaged(SAFETENSORS))
def test_safetensors(data, folder):
    path = folder / "a.safetensors"
    path.write_bytes(data)
    check(read_or_refuse(read_weights, path), len(data))


def header(**changes):
    """A file of one tensor of 4 floats whose header says what it is told."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes})
    return len(text).to_bytes(8, "little") + text.encode() + bytes(16)


@pytest.mark.parametrize(
    "data",
    [
        header(shape=[2**62, 4]),
        header(shape=[2**40], data_offsets=[0, 2**42]),
        header(shape=[-4]),
        header(data_offsets=[16, 0]),
        header(data_offsets=[-16, 0]),
        header(dtype="F4"),
        header(dtype="BF16", shape=[8]),
        header(dtype="F8_E4M3", shape=[16]),
        (2**63).to_bytes(8, "little") + bytes(100),
        (2**27).to_bytes(8, "little") + bytes(100),
        b"",
    ],
    ids=range(11),
)
def test_headers_of_safetensors(data, folder):
    path = folder / "a.safetensors"
    path.write_bytes(data)
    check(read_or_refuse(read_weights, path), len(data))


def test_torch_files(folder):
    torch = pytest.importorskip("torch")
    sound = []
    for new in (True, False):
        file = io.BytesIO()
        state = {name: torch.tensor(array) for name, array in TENSORS.items()}
        torch.save(state, file, _use_new_zipfile_serialization=new)
        sound.append(file.getvalue())
    path = folder / "a.bin"
    path.write_bytes(sound[0])
    np.testing.assert_array_equal(read_weights(path)["layers.0.bias"], np.ones(3))

    @fuzz(150)
    @given(data=damaged(*sound))
    def every(data):
        path.write_bytes(data)
        check(read_or_refuse(read_weights, path), len(data))

    every()


def test_saved_models(tmp_path):
    save_pretrained(tmp_path, tiny_model(num_layers=1), CharTokenizer(), {})
    path = tmp_path / "weights.safetensors"
    sound = path.read_bytes()

    @fuzz(8)
    @given(data=damaged(sound))
    def every(data):
        path.write_bytes(data)
        found = read_or_refuse(load_pretrained, tmp_path)
        assert found is None or found[0].config.num_layers == 1

    every()


def exit_scores(folder):
    """Scores of two exits and three utterances, in a file with its hypotheses."""
    texts = ["A", "B", "A B"]
    rules = {"entropy": np.ones((2, 3)), "patience": np.ones((2, 3))}
    results = (score(["1", "2", "3"], texts, texts),) * 2
    features = np.ones((2, 3, len(FEATURES)))
    save_exit_scores(
        folder, "test", ExitScores(results, rules, features, np.arange(3), np.arange(3))
    )
    return folder / "exits" / "test.npz"


def test_exit_scores(tmp_path):
    path = exit_scores(tmp_path)
    sound = path.read_bytes()
    assert load_exit_scores(tmp_path, "test").errors.sum() == 0

    @fuzz(200)
    @given(data=damaged(sound))
    def every(data):
        path.write_bytes(data)
        found = read_or_refuse(load_exit_scores, tmp_path, "test")
        if found is not None:
            assert all(values.shape == (2, 3) for values in found.rules.values())
            assert found.frames.shape == found.samples.shape == (3,)

    every()


# ------------------------------------------------------------------------------------------- pickles


def readers(folder):
    """Every reader of files that come from elsewhere, on a file of its own name."""
    yield "a.wav", read_audio
    yield "a.safetensors", read_weights
    yield "pytorch_model.bin", read_weights
    yield (
        "model.pt",
        lambda path: load_splitformer_checkpoint(path, SplitformerConfig.splitformer()),
    )
    yield "encoder.ckpt", lambda path: load_speechbrain_sepformer(folder, SepFormerConfig.tiny())
    yield "config.json", read_json
    yield "tokenizer.json", lambda path: load_tokenizer(folder)
    yield "tokenizer.json", lambda path: load_piece_tokenizer(folder)
    yield "hf.json", lambda path: read_tokenizer_json(path, 32)
    yield "tokenizer.bin", lambda path: read_tokenizer_bin(path, 32, ())
    yield "model.json", lambda path: load_pretrained(folder)
    yield "exit_policy.json", lambda path: load_policy(folder)
    yield "a.arpa", read_arpa
    yield "a.arpa.gz", read_arpa
    yield "a.ort", read_ort
    yield "a.onnx", open_exported
    yield "a.stablehlo", open_exported


def pickles(exploded):
    """The pickle itself, packed, in an array and an archive of NumPy's, and in both forms of PyTorch's files."""
    plain = bomb(exploded)
    yield plain
    yield gzip.compress(plain)
    for save_array in (np.save, np.savez):
        file = io.BytesIO()
        save_array(file, np.array([Bomb(exploded)], object), allow_pickle=True)
        yield file.getvalue()
    try:
        import torch
    except ImportError:
        return
    for new in (True, False):
        file = io.BytesIO()
        torch.save(
            {"a": torch.ones(2), "b": Bomb(exploded)}, file, _use_new_zipfile_serialization=new
        )
        yield file.getvalue()


def test_pickles_explode_where_they_are_loaded(tmp_path):
    """The bomb is one."""
    import pickle

    pickle.loads(bomb(tmp_path / "exploded"))
    assert (tmp_path / "exploded").is_dir()


def test_nothing_is_executed(tmp_path):
    exploded = tmp_path / "exploded"
    for number, data in enumerate(list(pickles(exploded))):  # all first: torch is imported for them
        for name, read in readers(tmp_path):
            path = tmp_path / name
            path.write_bytes(data)
            if name in ("a.onnx", "a.stablehlo"):
                form = path.suffix[1:]
                shape = {"inputs": {"audio": {"shape": [1, 16]}}}
                manifest_path(path).write_text(json.dumps({"format": form} | shape))
            read_or_refuse(read, path)
            assert not exploded.exists(), f"{name} has executed pickle {number}"
            path.unlink()


def test_arrays_of_objects_are_not_loaded(tmp_path):
    """Scores of exits, and the table of a corpus, are NumPy's and JSON: an object in them is refused."""
    exploded = tmp_path / "exploded"
    (tmp_path / "exits").mkdir()
    arrays = {"rule_entropy": np.zeros((2, 1)), "frames": np.array([Bomb(exploded)], object)}
    arrays |= {"features": np.array([Bomb(exploded)], object), "samples": np.zeros(1)}
    np.savez(tmp_path / "exits" / "test.npz", allow_pickle=True, **arrays)
    with pytest.raises(InputError, match="Object arrays cannot be loaded"):
        load_exit_scores(tmp_path, "test")
    assert not exploded.exists()

    chapter = tmp_path / "data" / "train" / "1" / "2"
    chapter.mkdir(parents=True)
    (chapter / "1-2-3.wav").write_bytes(bomb(exploded))
    (chapter / "1-2.trans.txt").write_bytes(bomb(exploded))
    with pytest.raises(InputError, match="skipped"):
        FolderCorpus(tmp_path / "data", "train", cache_dir=tmp_path / "cache")
    shutil.rmtree(tmp_path / "data")
    assert not exploded.exists()
