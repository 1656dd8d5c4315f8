"""One function that opens any corpus from what a command line can say."""

import os
from collections.abc import Sequence

from edgespeech.data.corpus import Corpus, join
from edgespeech.data.folder import FolderCorpus
from edgespeech.data.synthetic import SyntheticConfig, SyntheticCorpus
from edgespeech.errors import InputError

KINDS = ("synthetic", "folder", "tfds")


def open_corpus(
    kind: str,
    split: str,
    *,
    data_dir: Sequence[str] = (),
    synthetic: SyntheticConfig = SyntheticConfig(),  # noqa: B008 (frozen)
    require_text: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> Corpus:
    """Open a corpus, or several joined into one.

    Args:
        kind: "synthetic", "folder" (a LibriSpeech tree) or "tfds" (prepared
            `librispeech/lazy_decode` shards).
        split: a split's name, or several joined with "+": "train-clean-100+train-clean-360".
        data_dir: for "folder" and "tfds", one folder or more. Each "DIR" must hold all of `split`;
            "DIR:SPLIT" or "DIR:SPLIT+SPLIT2" names its own splits instead.
        synthetic: settings of the synthetic corpus; not used by the other kinds.
        require_text: for "folder", leave out audio without a transcript.
        cache_dir: see `corpus.cache_folder`.

    Raises:
        InputError: an unknown kind, no folder, a folder or split that is not there, or an id that
            occurs twice.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind of data {kind!r}; the fix: use one of {', '.join(KINDS)}")
    if isinstance(data_dir, str):
        data_dir = [data_dir]
    if kind == "synthetic":
        return join([SyntheticCorpus(name, synthetic, cache_dir) for name in _names(split)])
    if not data_dir:
        raise InputError(
            f"data of kind {kind!r} needs a folder and none was given; "
            "the fix: give data_dir, or use kind 'synthetic'"
        )
    corpora: list[Corpus] = []
    for entry in data_dir:
        folder, own = _parse(entry)
        for name in _names(own or split):
            if kind == "folder":
                corpora.append(
                    FolderCorpus(folder, name, require_text=require_text, cache_dir=cache_dir)
                )
            else:
                from edgespeech.data.tfds_source import TfdsCorpus

                corpora.append(TfdsCorpus(folder, name, cache_dir=cache_dir))
    return join(corpora)


def _names(split: str) -> list[str]:
    names = split.split("+")
    if not all(names):
        raise InputError(f"split {split!r} has an empty name; the fix: SPLIT or SPLIT+SPLIT2")
    return names


def _parse(entry: str) -> tuple[str, str]:
    """Folder and own splits; a colon inside the folder's own path is part of the path."""
    folder, colon, own = entry.rpartition(":")
    if not colon or os.path.isdir(entry) or not folder or "/" in own or os.sep in own:
        return entry, ""
    return folder, own
