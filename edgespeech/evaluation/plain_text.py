"""A written text in the form of a LibriSpeech transcript, so that the two can be compared."""

import re

from edgespeech.data.folder import normalise_text

# As LibriSpeech's readers say them, and as its transcripts write them.
TITLES = {"MR": "MISTER", "MRS": "MISSUS", "DR": "DOCTOR"}


def plain_text(text: str) -> str:
    """Upper case words parted by single spaces; apostrophes inside a word stay, other punctuation parts words.

    Titles are written out (`TITLES`); numbers in digits stay as they are, and count as errors against words.
    """
    text = re.sub(r"[^\w' ]|_", " ", normalise_text(text))
    words = (word.strip("'") for word in text.split())
    return " ".join(TITLES.get(word, word) for word in words if word)
