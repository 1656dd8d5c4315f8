"""Damaged files: sound ones with bytes or values changed, and the limits under which readers meet them.

`FUZZ_EXAMPLES=5000 pytest tests/fuzz` tries so many files in each test, other ones every time; without it each test has
its own few, always the same.
"""

import contextlib
import copy
import os
import pickle
import resource
import signal
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from edgespeech.errors import InputError

MOST_MEGABYTES = 1024  # that a reader may take for a file of a few kB
MOST_SECONDS = 30  # of the processor
# At the ends of what 1, 2, 4 and 8 bytes can say, and what is none of a rate or a number of channels.
NUMBERS = (0, 1, 2, 3, 127, 128, 255, 1024, 32_767, 65_535, 2**31 - 1, 2**31, 2**32 - 1)
NUMBERS = (*NUMBERS, 2**36 - 1, 2**63 - 1, 2**64 - 1)
# In place of any value of a JSON file.
VALUES = (
    None,
    True,
    -1,
    0,
    1,
    3,
    10**6,
    2**31,
    2**63,
    10**400,
    0.5,
    -1e308,
    float("nan"),
    float("inf"),
)
VALUES = (*VALUES, "", "x", "attention", "../../x", "\ud800", [], [0], [[]], {}, {"kind": "lpa"})


def fuzz(examples):
    """Settings of a test: as many examples, or `FUZZ_EXAMPLES`."""
    wanted = os.environ.get("FUZZ_EXAMPLES")
    return settings(
        max_examples=int(wanted or examples),
        derandomize=wanted is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damaged(draw, *files):
    """Bytes of one of the files with one to four changes; most of them early, where headers are."""
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        at = draw(st.integers(0, 63) | st.integers(0, len(data) - 1)) % len(data)
        kind = draw(
            st.sampled_from(("number", "number", "flip", "cut", "remove", "repeat", "splice"))
        )
        size = draw(st.sampled_from((1, 2, 4, 8)))
        if kind == "number":
            number = draw(st.sampled_from(NUMBERS)) % 256**size
            data[at : at + size] = number.to_bytes(size, draw(st.sampled_from(("little", "big"))))
        elif kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "remove":
            del data[at : at + size * draw(st.integers(1, 64))]
        elif kind == "repeat":
            data[at:at] = data[at : at + size * 16] * draw(st.sampled_from((1, 3, 200)))
        else:
            other = draw(st.sampled_from(files))
            start = draw(st.integers(0, len(other)))
            data[at : at + size * 8] = other[start : start + size * 16]
    return bytes(data)


@st.composite
def damaged_json(draw, document):
    """The document with one or two of its values replaced, removed or doubled."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        if not (places := list(_places(document))):
            break
        holder, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "more")))
        if kind == "replace":
            holder[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif kind == "remove":
            del holder[key]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif isinstance(holder[key], int | float):
            holder[key] *= draw(st.sampled_from((-1, 2, 1000, 10**9)))
        else:
            holder[f"{key}x"] = copy.deepcopy(holder[key])
    return document


def _places(value):
    """Every (list or dict, key) in a tree."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


@contextlib.contextmanager
def bounded():
    """Ends what takes more memory (MemoryError) or more time of the processor (TimeoutError) than the limits."""

    def too_long(number, frame):
        raise TimeoutError(f"more than {MOST_SECONDS} s of the processor")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, too_long)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEGABYTES * 2**20, before[1]))
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, handler)


def read_or_refuse(read, *arguments):
    """What a reader gives, or None where it refuses with a message; anything else it raises is the test's failure."""
    with bounded():
        try:
            return read(*arguments)
        except InputError as error:
            message = str(error)
    assert len(message) > 20
    return None


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def bomb(path):
    """A pickle that makes the folder `path`."""
    return pickle.dumps(Bomb(path))
