"""Words with times as subtitles: SubRip (.srt) and WebVTT (.vtt)."""

from collections.abc import Sequence

from edgespeech.inference.words import Word, text_of

# Of a cue (ours): about two lines of 42 characters, which is what a reader takes in within 7 s.
MOST_CHARACTERS = 84
MOST_SECONDS = 7.0
PAUSE = 0.8  # seconds of silence that end a cue


def cues(words: Sequence[Word]) -> list[list[Word]]:
    """Words in groups that are shown together; a pause, 84 characters or 7 s end one."""
    groups: list[list[Word]] = []
    for word in words:
        group = groups[-1] if groups else []
        if (
            not group
            or word.start - group[-1].end > PAUSE
            or len(text_of([*group, word])) > MOST_CHARACTERS
            or word.end - group[0].start > MOST_SECONDS
        ):
            groups.append([word])
        else:
            group.append(word)
    return groups


def srt(words: Sequence[Word]) -> str:
    """SubRip: numbered cues, a comma before the milliseconds."""
    return "\n".join(
        f"{number}\n{_span(group, ',')}\n{text_of(group)}\n"
        for number, group in enumerate(cues(words), 1)
    )


def vtt(words: Sequence[Word]) -> str:
    """WebVTT: a header and cues, a point before the milliseconds."""
    return "\n".join(
        ["WEBVTT\n", *(f"{_span(group, '.')}\n{text_of(group)}\n" for group in cues(words))]
    )


def _span(group: Sequence[Word], point: str) -> str:
    return f"{_clock(group[0].start, point)} --> {_clock(group[-1].end, point)}"


def _clock(seconds: float, point: str) -> str:
    """`HH:MM:SS,mmm`."""
    minutes, ms = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{ms // 1000:02d}{point}{ms % 1000:03d}"
