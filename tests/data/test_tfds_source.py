import io
import shutil
import sys

import numpy as np
import pytest
import soundfile

from edgespeech.data.sources import open_corpus
from edgespeech.data.tfds_source import TfdsCorpus
from edgespeech.errors import InputError

tfds = pytest.importorskip("tensorflow_datasets")
SAMPLES = [
    np.random.default_rng(i).integers(-32768, 32768, 1600 + 10 * i).astype(np.int16)
    for i in range(5)
]


def flac(samples):
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format="FLAC")
    return file.getvalue()


class Librispeech(tfds.core.GeneratorBasedBuilder):
    """A stand-in with the name, the configuration and the features of the official dataset."""

    VERSION = tfds.core.Version("2.1.2")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="lazy_decode")]  # noqa: RUF012 (TFDS's way)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "speech": tfds.features.Scalar(np.object_),
                    "text": tfds.features.Text(),
                    "speaker_id": np.int64,
                    "chapter_id": np.int64,
                    "id": np.str_,
                }
            ),
        )

    def _split_generators(self, dl_manager):
        good = [flac(samples) for samples in SAMPLES]
        return {
            "train_clean100": self._generate_examples([*good, b"fLaC rubbish"]),
            "test_clean": self._generate_examples(good[:1]),
            "dev_other": self._generate_examples([b"fLaC rubbish"]),
        }

    def _generate_examples(self, files):
        for i, speech in enumerate(files):
            yield (
                f"{10 + i}-7-0000",
                {
                    "speech": speech,
                    "text": f"don\u2019t stop {'abcdef'[i]}",
                    "speaker_id": 10 + i,
                    "chapter_id": 7,
                    "id": f"{10 + i}-7-0000",
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    Librispeech(
        config="lazy_decode", data_dir=root, file_format="array_record"
    ).download_and_prepare()
    return root


def test_records_come_back_exactly(prepared, tmp_path):
    corpus = TfdsCorpus(prepared, "train-clean-100", cache_dir=tmp_path)
    assert sorted(u.id for u in corpus.utterances) == [f"{10 + i}-7-0000" for i in range(5)]
    for index, utterance in enumerate(corpus.utterances):
        i = int(utterance.speaker) - 10
        assert utterance.text == f"DON'T STOP {'ABCDEF'[i]}"
        assert utterance.num_samples == len(SAMPLES[i])
        np.testing.assert_array_equal(corpus.audio(index), SAMPLES[i] / np.float32(32768))
    assert [s.id for s in corpus.skipped] == ["15-7-0000"]
    assert "unreadable" in corpus.skipped[0].reason
    assert "tensorflow" not in sys.modules


def test_the_table_is_read_from_the_cache(prepared, tmp_path, monkeypatch):
    first = TfdsCorpus(prepared, "train_clean100", cache_dir=tmp_path)
    monkeypatch.setattr(TfdsCorpus, "_inspect", None)
    again = TfdsCorpus(prepared, "train_clean100", cache_dir=tmp_path)
    assert (again.utterances, again.skipped, again.notes) == (first.utterances, first.skipped, ())
    np.testing.assert_array_equal(again.audio(2), first.audio(2))
    monkeypatch.undo()
    for table in (tmp_path / "tfds").iterdir():
        table.write_text("[1, 2")
    repaired = TfdsCorpus(prepared, "train_clean100", cache_dir=tmp_path)
    assert repaired.utterances == first.utterances
    assert "damaged" in repaired.notes[0]


def test_open_corpus_and_the_version_folder(prepared, tmp_path):
    version = prepared / "librispeech" / "lazy_decode" / "2.1.2"
    root = open_corpus("tfds", "train_clean100", data_dir=[str(prepared)], cache_dir=tmp_path)
    direct = open_corpus("tfds", "train_clean100", data_dir=[str(version)], cache_dir=tmp_path)
    assert root.utterances == direct.utterances
    assert (root.kind, root.name, len(root)) == ("tfds", "train_clean100", 5)


def test_errors(prepared, tmp_path):
    with pytest.raises(InputError, match=r"no prepared librispeech/lazy_decode.*array_record"):
        TfdsCorpus(tmp_path / "nothing", "train_clean100", cache_dir=tmp_path)
    with pytest.raises(InputError, match=r"no split 'dev'.*dev_other, test_clean, train_clean100"):
        TfdsCorpus(prepared, "dev", cache_dir=tmp_path)
    with pytest.raises(InputError, match="all 1 utterances of 'dev_other' were skipped"):
        TfdsCorpus(prepared, "dev_other", cache_dir=tmp_path)
    version = tmp_path / "copy"
    shutil.copytree(prepared / "librispeech" / "lazy_decode" / "2.1.2", version)
    shard = next(version.glob("*test_clean*"))
    shard.rename(version / shard.name.replace("-00000-of-00001", "-00001-of-00002"))
    with pytest.raises(InputError, match="shard 0 of 2 of split 'test_clean' is missing"):
        TfdsCorpus(version, "test_clean", cache_dir=tmp_path)


def test_a_missing_package_is_an_input_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match="pip install tensorflow-datasets"):
        TfdsCorpus(tmp_path, "train_clean100", cache_dir=tmp_path)
