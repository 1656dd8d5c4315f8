"""Written texts in the form of transcripts."""

import pytest

from edgespeech.evaluation.plain_text import plain_text


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("Ever tried, ever failed; no matter.", "EVER TRIED EVER FAILED NO MATTER"),
        (
            "A well-known man—Mr. O\u2019Brien_says: 'Tis so!",
            "A WELL KNOWN MAN MISTER O'BRIEN SAYS TIS SO",
        ),
        ("Mrs. Dr. drum", "MISSUS DOCTOR DRUM"),
        ("In 1845... café", "IN 1845 CAFÉ"),
        (" ' - ", ""),
    ],
)
def test_by_hand(written, plain):
    assert plain_text(written) == plain
    assert plain_text(plain) == plain
