"""Damaged language models and saved exit rules; subtitles of any words."""

import gzip
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgespeech.inference.exit_policy import ExitPolicy, load_policy, save_policy
from edgespeech.inference.exit_predictor import FEATURES, ExitPredictor
from edgespeech.inference.language_model import read_arpa
from edgespeech.inference.subtitles import cues, srt, vtt
from edgespeech.inference.words import Word
from tests.fuzz.damage import bounded, damaged, damaged_json, fuzz, read_or_refuse

ARPA = b"""\\data\\
ngram 1=4
ngram 2=2

\\1-grams:
-99\t<s>\t-0.5
-0.8\t</s>
-0.4\tA\t-0.3
-0.7\tB

\\2-grams:
-0.2\t<s> A
-0.3\tA B
\\end\\
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


def check_model(model):
    if model is not None:
        with bounded():
            context = model.start
            for word in ("A", "B", "never seen"):
                assert model.log_prob(word, context) < math.inf  # NaN neither
                context = model.after(context, word)


def test_sound_model_is_read(folder):
    (folder / "a.arpa").write_bytes(ARPA)
    model = read_arpa(folder / "a.arpa")
    assert model.log_prob("B", ("A",)) == pytest.approx(-0.3 * math.log(10))


@fuzz(300)
@given(data=damaged(ARPA))
def test_language_models(data, folder):
    (folder / "a.arpa").write_bytes(data)
    check_model(read_or_refuse(read_arpa, folder / "a.arpa"))


@fuzz(100)
@given(data=damaged(gzip.compress(ARPA)))
def test_packed_language_models(data, folder):
    (folder / "a.arpa.gz").write_bytes(data)
    check_model(read_or_refuse(read_arpa, folder / "a.arpa.gz"))


@pytest.mark.parametrize(
    "line",
    [
        b"ngram \xc2\xb2=1",  # a digit for `isdigit`, none for `int`
        b"ngram 1=" + b"9" * 10_000,
        b"\\" + b"9" * 10_000 + b"-grams:",
        b"nan\tA",
        b"inf\tA",
        b"-0.1\tA\tinf",
    ],
)
def test_lines_of_language_models(line, folder):
    for place in (b"ngram 2=2", b"-0.7\tB"):
        (folder / "a.arpa").write_bytes(ARPA.replace(place, line))
        assert read_or_refuse(read_arpa, folder / "a.arpa") is None


def test_a_line_without_end_is_not_held(folder):
    """2 GB of one line in 2 MB: refused at its 65,536th character."""
    piece = gzip.compress(b"A" * 2**24, 9)
    (folder / "a.arpa.gz").write_bytes(gzip.compress(b"\\data\\\n") + 128 * piece)
    assert read_or_refuse(read_arpa, folder / "a.arpa.gz") is None


POLICY = ExitPolicy("entropy", 0.5)
PREDICTOR = ExitPredictor(np.ones((2, len(FEATURES))), np.zeros(2))
CALIBRATED = ExitPolicy("calibrated", 0.5, predictor=PREDICTOR)


@pytest.mark.parametrize("policy", [POLICY, CALIBRATED], ids=["entropy", "calibrated"])
def test_exit_policies(policy, folder):
    save_policy(folder, policy)
    files = ["exit_policy.json", "exit_predictor.json"][: 1 + (policy is CALIBRATED)]
    for path in (folder / name for name in files):

        @fuzz(100)
        @given(content=damaged_json(json.loads(path.read_text())))
        def every(content):
            path.write_text(json.dumps(content))  # noqa: B023, it is called before the next one
            found = read_or_refuse(load_policy, folder)
            if found is not None:
                assert not math.isnan(found.threshold)
                assert found.n_best >= 1
                if found.predictor is not None:
                    assert np.isfinite(found.predictor.weights).all()
                    assert np.isfinite(found.predictor.bias).all()

        every()
        save_policy(folder, policy)
        path.write_text("[" * 100_000)
        assert read_or_refuse(load_policy, folder) is None
        save_policy(folder, policy)


WORDS = st.lists(
    st.builds(
        Word,
        st.text(st.characters(exclude_categories=("Z", "C")), min_size=1, max_size=100),
        st.floats(0, 1e6),
        st.floats(0, 1e6),
    ),
    max_size=20,
)


@fuzz(100)
@given(words=WORDS)
def test_subtitles(words):
    """Every word is in one cue, in order, and the blocks of both formats are as many as the cues."""
    groups = cues(words)
    assert [word for group in groups for word in group] == words
    for text, blocks in ((srt(words), 0), (vtt(words), 1)):
        assert text.count("\n\n") == max(0, len(groups) + blocks - 1)
        assert sum(" --> " in line for line in text.split("\n")) >= len(groups)
