"""Rates of several test splits, and where their hypotheses lie."""

import pytest

from edgespeech.evaluation.wer import score
from experiments import asr

IDS, TEXTS = ["1", "2"], ["A B", "C D E F"]
TEACHER = {
    "clean": score(IDS, TEXTS, ["A B", "C D E X"]),  # 1 of 6 words
    "other": score(IDS, TEXTS, ["A B", "C D X X"]),  # 2
}
HYBRID = {
    "clean": score(IDS, TEXTS, ["A X", "C X X X"]),  # 4
    "other": score(IDS, TEXTS, ["X X", "X X X X"]),  # 6
}


def test_rates_are_the_first_splits_with_the_others_beside_them():
    found = asr.rates(HYBRID, TEACHER)
    assert found["wer"] == pytest.approx(4 / 6)
    assert found["delta_vs_teacher"]["difference"] == pytest.approx(3 / 6)
    assert found["splits"].keys() == {"other"}
    other = found["splits"]["other"]
    assert other["wer"] == pytest.approx(6 / 6)
    assert other["ci"] == [1.0, 1.0]
    assert other["delta_vs_teacher"]["difference"] == pytest.approx(4 / 6)
    assert asr.rates(TEACHER)["splits"]["other"].keys() == {"wer", "ci", "cer"}


def test_one_split_is_as_before_there_were_several():
    (name, result), _ = TEACHER.items()
    assert asr.rates({name: result}).keys() == {"wer", "ci", "cer"}
    assert asr.spoken({name: result}) == "WER 16.67%"
    assert asr.spoken(TEACHER) == "WER 16.67% (clean), 33.33% (other)"


def test_hypotheses_of_further_splits_have_files_of_their_own(tmp_path):
    (tmp_path / "hypotheses").mkdir()
    for split, file in (("clean", "lpa_2"), ("other", "lpa_2_other")):
        HYBRID[split].write_hypotheses(tmp_path / "hypotheses" / f"{file}.jsonl")
    # What an earlier start has written is read: neither decoder nor source is asked.
    nothing = dict.fromkeys(HYBRID)
    found = asr.evaluate_splits(tmp_path, "lpa_2", None, None, nothing)  # type: ignore[arg-type]
    assert {split: result.wer for split, result in found.items()} == {
        split: result.wer for split, result in HYBRID.items()
    }
