"""n-gram language models of words, read from ARPA files, with back-off.

    log p(w | h) = log p(h w)                  if the file has h w
                 = b(h) + log p(w | h')        otherwise; h' is h without its oldest word, b(h) = 0 if h is not there

Katz, "Estimation of probabilities from sparse data", 1987. Natural logarithms here; the file's are of base 10.
"""

import gzip
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

from edgespeech.data.corpus import write_atomically
from edgespeech.errors import InputError

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
# Where the file gives an unknown word no probability (ours): of base 10.
UNKNOWN_LOG10 = -10.0
MOST_CHARACTERS, MOST_DIGITS = 1 << 16, 40  # of a line; of one with a count
_LN10 = math.log(10.0)

Context: TypeAlias = tuple[str, ...]


class Entry(NamedTuple):
    """An n-gram's log probability and back-off weight, natural logarithms."""

    log_prob: float
    backoff: float


class NgramModel:
    """Log probabilities of words after up to `order - 1` words.

    Attributes:
        entries: by n-gram.
        order: words of the longest n-gram.

    Raises:
        InputError: there is no unigram.
    """

    def __init__(self, entries: Mapping[Context, Entry]):
        self.entries = dict(entries)
        if not any(len(ngram) == 1 for ngram in self.entries):
            raise InputError("the language model has no unigram: give one with words")
        self.order = max(map(len, self.entries))

    def __contains__(self, word: str) -> bool:
        return (word,) in self.entries

    @property
    def start(self) -> Context:
        """The context of a text's first word."""
        return (START,) if self.order > 1 else ()

    def log_prob(self, word: str, context: Context) -> float:
        """`log p(word | context)`; a word that the model lacks is `<unk>`, or has 1e-10 where that is missing."""
        if word not in self:
            if UNKNOWN not in self:
                return UNKNOWN_LOG10 * _LN10
            word = UNKNOWN
        context = context[-(self.order - 1) :] if self.order > 1 else ()
        backed_off = 0.0
        while (*context, word) not in self.entries:
            if context in self.entries:
                backed_off += self.entries[context].backoff
            context = context[1:]
        return backed_off + self.entries[(*context, word)].log_prob

    def after(self, context: Context, word: str) -> Context:
        """The context of the word after `word`."""
        word = word if word in self else UNKNOWN
        return (*context, word)[-(self.order - 1) :] if self.order > 1 else ()


class Perplexity(NamedTuple):
    """How well a model foresees texts.

    Attributes:
        perplexity: `exp(-mean log p)` over the known words and the end of each text.
        words: of the texts, ends not counted.
        unknown: words that the model lacks; they are left out of the mean.
    """

    perplexity: float
    words: int
    unknown: int


def perplexity(model: NgramModel, texts: Iterable[str]) -> Perplexity:
    """Of words between spaces; empty texts do not count.

    Raises:
        InputError: no text has a word.
    """
    logs: list[float] = []
    words = unknown = 0
    for text in filter(str.strip, texts):
        context = model.start
        for word in (*text.split(), END):
            words += word != END
            if word in model:
                logs.append(model.log_prob(word, context))
            else:
                unknown += 1
            context = model.after(context, word)
    if not logs:
        raise InputError("the perplexity of no words: give texts that are not empty")
    return Perplexity(math.exp(-sum(logs) / len(logs)), words, unknown)


def read_arpa(path: str | os.PathLike) -> NgramModel:
    """Reads an ARPA file, plain or gzipped (`.gz`).

    Raises:
        InputError: naming file and line: not an ARPA file, a line that is no n-gram, or another number of n-grams than
            the header promises. A binary of KenLM is not read: make it from the ARPA file, not the other way round.
    """
    path = Path(path)
    entries: dict[Context, Entry] = {}
    promised: dict[int, int] = {}
    found: dict[int, int] = {}
    order, begun, ended = 0, False, False
    for number, line in _lines(path):
        if not begun:  # any text may come first
            begun = line == "\\data\\"
            continue
        if line == "\\end\\":
            ended = True
            break
        if line.startswith("ngram ") and order == 0:
            size, _, count = line[6:].partition("=")
            is_count = size.strip().isdecimal() and count.strip().isdecimal()
            if not is_count or len(line) > MOST_DIGITS:
                raise _broken(path, number, "a count such as `ngram 1=200`", line)
            promised[int(size)] = int(count)
        elif line.startswith("\\") and line.endswith("-grams:"):
            is_count = line[1:-7].isdecimal() and len(line) <= MOST_DIGITS
            if not is_count or int(line[1:-7]) not in promised:
                raise _broken(path, number, "a section that the header counts", line)
            order = int(line[1:-7])
        elif line:
            ngram, entry = _parse(path, number, line, order)
            entries[ngram] = entry
            found[order] = found.get(order, 0) + 1
    if not promised or not ended:
        raise InputError(f"{path} is no whole ARPA file: it needs \\data\\, n-grams and \\end\\")
    for size, count in promised.items():
        if found.get(size, 0) != count:
            raise InputError(
                f"{path} has {found.get(size, 0)} {size}-grams and its header promises {count}: fetch it again"
            )
    return NgramModel(entries)


def write_arpa(path: str | os.PathLike, model: NgramModel) -> None:
    """Writes an ARPA file, gzipped where its name ends in `.gz`; `read_arpa` gives the same model back."""
    path = Path(path)
    by_order: dict[int, list[str]] = {}
    for ngram, entry in sorted(model.entries.items()):
        fields = [f"{entry.log_prob / _LN10:.8g}", " ".join(ngram)]
        if entry.backoff:
            fields.append(f"{entry.backoff / _LN10:.8g}")
        by_order.setdefault(len(ngram), []).append("\t".join(fields))
    parts = ["\\data\\", *(f"ngram {n}={len(lines)}" for n, lines in sorted(by_order.items()))]
    for n, lines in sorted(by_order.items()):
        parts += ["", f"\\{n}-grams:", *lines]
    data = "\n".join([*parts, "", "\\end\\", ""]).encode()
    # No time in the header: the same model is the same file.
    data = gzip.compress(data, mtime=0) if path.suffix == ".gz" else data
    write_atomically(path, lambda file: file.write(data))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    is_gzipped = path.suffix == ".gz"
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if is_gzipped
            else path.open(encoding="utf-8") as file
        ):
            # Not the file's own lines: one without an end would be as long as the file unpacked.
            lines = iter(lambda: file.readline(MOST_CHARACTERS), "")
            for number, line in enumerate(lines, 1):
                if len(line) == MOST_CHARACTERS:
                    raise _broken(path, number, f"shorter than {MOST_CHARACTERS} characters", line)
                yield number, line.strip()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(
            f"{path}: unreadable language model ({error}): give an ARPA file, text or gzipped"
        ) from error


def _parse(path: Path, number: int, line: str, order: int) -> tuple[Context, Entry]:
    """`log10 p  word ... word  [log10 backoff]`."""
    fields = line.split()
    if order < 1 or len(fields) not in (order + 1, order + 2):
        raise _broken(path, number, f"an n-gram of {order} words", line)
    try:
        log10 = [float(fields[0]), float(fields[order + 1]) if len(fields) == order + 2 else 0.0]
        if not all(number < math.inf for number in log10):  # NaN neither
            raise ValueError("no probability")
    except ValueError as error:
        raise _broken(path, number, "a logarithm of base 10", line) from error
    return tuple(fields[1 : order + 1]), Entry(log10[0] * _LN10, log10[1] * _LN10)


def _broken(path: Path, number: int, wanted: str, line: str) -> InputError:
    return InputError(f"{path}, line {number}: {line[:60]!r} is not {wanted}: fetch the file again")
