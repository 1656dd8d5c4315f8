"""WER against a plain edit distance, intervals against the delta method's normal approximation."""

import itertools
import json

import numpy as np
import pytest

from edgespeech.errors import InputError
from edgespeech.evaluation.wer import WordErrors, paired_bootstrap, score


def edit_distance(reference, hypothesis):
    """Levenshtein's table, one cell at a time."""
    table = np.zeros((len(reference) + 1, len(hypothesis) + 1), int)
    table[:, 0] = np.arange(len(reference) + 1)
    table[0] = np.arange(len(hypothesis) + 1)
    cells = itertools.product(range(len(reference)), range(len(hypothesis)))
    for i, j in cells:
        table[i + 1, j + 1] = min(
            table[i, j] + (reference[i] != hypothesis[j]), table[i, j + 1] + 1, table[i + 1, j] + 1
        )
    return int(table[-1, -1])


def corrupted(rng, count, error_rate):
    """Random references of 3 to 20 words, and hypotheses with random edits."""
    vocabulary = ["THE", "CAT", "SAT", "ON", "A", "MAT", "AND", "WENT", "HOME"]
    references, hypotheses = [], []
    for _ in range(count):
        words = list(rng.choice(vocabulary, rng.integers(3, 21)))
        heard = []
        for word in words:
            kind = rng.random()
            if kind < error_rate / 3:
                continue
            heard.append("DOG" if kind < 2 * error_rate / 3 else word)
            if kind > 1 - error_rate / 3:
                heard.append("UH")
        references.append(" ".join(words))
        hypotheses.append(" ".join(heard))
    return [f"utt-{i}" for i in range(count)], references, hypotheses


def test_score_hand_counted():
    result = score(
        ["s", "d", "i", "none", "silence", "noise"],
        ["A B C D", "A B C D", "A B C D", "A B", "A", ""],
        ["A X C D", "A D", "Q A B R C D", "A B", "", "X Y"],
    )
    counts = [(r.substitutions, r.deletions, r.insertions, r.words) for r in result.utterances]
    assert counts == [
        (1, 0, 0, 4),
        (0, 2, 0, 4),
        (0, 0, 2, 4),
        (0, 0, 0, 2),
        (0, 1, 0, 1),
        (0, 0, 2, 0),
    ]
    assert (result.errors, result.words) == (8, 15)
    assert result.wer == pytest.approx(8 / 15)
    # Characters: B>X; "B C " ; "Q " and "R "; nothing; A; "X Y", over 7 + 7 + 7 + 3 + 1 + 0.
    assert result.cer == pytest.approx((1 + 4 + 4 + 0 + 1 + 3) / 25)


def test_score_matches_plain_edit_distance():
    ids, references, hypotheses = corrupted(np.random.default_rng(1), 60, 0.5)
    result = score(ids, references, hypotheses)
    expected = [
        edit_distance(r.split(), h.split()) for r, h in zip(references, hypotheses, strict=True)
    ]
    assert [row.errors for row in result.utterances] == expected
    assert result.wer == sum(expected) / sum(len(r.split()) for r in references)
    characters = [edit_distance(r, h) for r, h in zip(references, hypotheses, strict=True)]
    assert result.cer == pytest.approx(sum(characters) / sum(map(len, references)), rel=1e-12)


def test_white_space_does_not_count():
    result = score(["a"], ["  THE\tCAT  SAT\n"], ["THE CAT   SAT "])
    assert (result.wer, result.cer, result.words) == (0.0, 0.0, 3)


def test_interval_matches_linearised_standard_error():
    """For many utterances the percentile interval approaches the delta method's normal one."""
    ids, references, hypotheses = corrupted(np.random.default_rng(2), 2000, 0.2)
    result = score(ids, references, hypotheses)
    errors = np.array([row.errors for row in result.utterances])
    words = np.array([row.words for row in result.utterances])
    residual = errors - result.wer * words
    half = 1.959964 * np.sqrt((residual**2).sum()) / words.sum()
    low, high = result.ci
    assert low == pytest.approx(result.wer - half, abs=0.05 * half)
    assert high == pytest.approx(result.wer + half, abs=0.05 * half)


def test_interval_is_seeded_and_degenerates():
    ids, references, hypotheses = corrupted(np.random.default_rng(3), 30, 0.3)
    assert score(ids, references, hypotheses) == score(ids, references, hypotheses)
    perfect = score(ids, references, references)
    assert (perfect.wer, perfect.ci) == (0.0, (0.0, 0.0))
    # One utterance can only be drawn as itself.
    assert score(["a"], ["A B C D"], ["A B C"]).ci == (0.25, 0.25)
    # Draws that hold the empty reference alone have no rate and are left out.
    low, high = score(["a", "b"], ["A B", ""], ["A B", "X"]).ci
    assert (low, high) == (0.0, 0.5)


def test_interval_does_not_depend_on_the_block(monkeypatch):
    ids, references, hypotheses = corrupted(np.random.default_rng(4), 50, 0.3)
    whole = score(ids, references, hypotheses).ci
    monkeypatch.setattr("edgespeech.evaluation.wer._BLOCK", 7 * 50)
    assert score(ids, references, hypotheses).ci == whole


def test_paired_bootstrap():
    rng = np.random.default_rng(5)
    ids, references, hypotheses = corrupted(rng, 400, 0.3)
    a = score(ids, references, hypotheses)
    # b drops the last word of every tenth hypothesis that is right there.
    worse = [
        h.rsplit(" ", 1)[0] if i % 10 == 0 and h.split()[-1] == r.split()[-1] else h
        for i, (r, h) in enumerate(zip(references, hypotheses, strict=True))
    ]
    order = rng.permutation(400)
    b = score(*([column[i] for i in order] for column in (ids, references, worse)))
    difference, (low, high) = paired_bootstrap(a, b)
    assert difference == pytest.approx(b.wer - a.wer, rel=1e-12)
    assert 0 < low < difference < high
    # Paired, the shared errors cancel: far narrower than the interval of either system.
    assert high - low < 0.5 * (a.ci[1] - a.ci[0])
    reverse = paired_bootstrap(b, a)
    assert reverse.difference == -difference

    errors_b = {row.id: row.errors for row in b.utterances}
    extra = np.array([errors_b[row.id] - row.errors for row in a.utterances])
    words = np.array([row.words for row in a.utterances])
    half = 1.959964 * np.sqrt(((extra - difference * words) ** 2).sum()) / words.sum()
    assert high - low == pytest.approx(2 * half, rel=0.05)


def test_paired_bootstrap_of_a_system_with_itself():
    a = score(["x", "y"], ["A B", "C"], ["A", "D"])
    assert paired_bootstrap(a, a) == (0.0, (0.0, 0.0))


def test_write_hypotheses(tmp_path):
    result = score(["a", "b"], ["NOËL CAT", "B"], ["NOËL", "B C"])
    result.write_hypotheses(tmp_path / "hypotheses.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "hypotheses.jsonl").read_text().splitlines()]
    assert rows == [
        {"id": "a", "reference": "NOËL CAT", "hypothesis": "NOËL", "errors": 1, "words": 2},
        {"id": "b", "reference": "B", "hypothesis": "B C", "errors": 1, "words": 1},
    ]


def test_to_json():
    result = score(["a", "b"], ["A B", "C D"], ["A", "C X D Y"])
    assert result.utterances[0] == WordErrors("a", "A B", "A", 0, 1, 0, 2)
    totals = json.loads(json.dumps(result.to_json()))
    assert totals == {
        "wer": 0.75,
        "ci": [0.5, 1.0],
        "cer": 1.0,
        "errors": 3,
        "substitutions": 0,
        "deletions": 1,
        "insertions": 2,
        "words": 4,
        "utterances": 2,
    }


def test_bad_input():
    with pytest.raises(InputError, match="2 ids, 1 references and 2 hypotheses"):
        score(["a", "b"], ["A"], ["A", "B"])
    with pytest.raises(InputError, match="'a' comes twice"):
        score(["a", "b", "a"], ["A"] * 3, ["A"] * 3)
    with pytest.raises(InputError, match="none of the 1 references"):
        score(["a"], [" "], ["A"])
    with pytest.raises(InputError, match="none of the 0 references"):
        score([], [], [])
    a = score(["a", "b"], ["A", "B"], ["A", "B"])
    with pytest.raises(InputError, match="1 utterances are in one result only, such as 'b'"):
        paired_bootstrap(a, score(["a"], ["A"], ["A"]))
    with pytest.raises(InputError, match="'b' has two references"):
        paired_bootstrap(a, score(["a", "b"], ["A", "C"], ["A", "C"]))
