"""Batches of few shapes, as a pure function of (settings, step): any step, in any order.

A plan lives in the domain of indices: lengths decide the buckets once, each epoch shuffles rows.
Nothing needs to be saved to resume but the step, and hosts agree without talking.
"""

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from edgespeech.data.audio import SAMPLE_RATE, change_speed, speed_length
from edgespeech.data.corpus import Corpus, Skipped
from edgespeech.data.tokenizer import min_frames
from edgespeech.errors import InputError

PAD_MULTIPLE = 1280  # samples, 80 ms: whole encoder frames for every front end
_SHUFFLE, _SPEED = 0, 1  # independent random streams of one epoch


@dataclass(frozen=True)
class BatchConfig:
    """How a corpus is cut into batches.

    Attributes:
        batch_seconds: most seconds of padded audio in one batch, over all devices.
        num_buckets: most distinct batch shapes.
        max_seconds: longer utterances (before any change of speed) are skipped.
        speed_factors: each utterance gets one of these, drawn anew each epoch; (1.0,) changes
            nothing.
        shuffle: reshuffle rows and batches each epoch; otherwise length order, the same each epoch.
        seed: of the order and of the speed factors.
        batch_multiple: the rows of a batch are a multiple of this: the number of devices. The plan
            depends on it, so keep it when a run resumes on another number of hosts.
    """

    batch_seconds: float = 120
    num_buckets: int = 4
    max_seconds: float = 20
    speed_factors: tuple[float, ...] = (1.0,)
    shuffle: bool = True
    seed: int = 0
    batch_multiple: int = 1

    def __post_init__(self):
        for name in ("batch_seconds", "num_buckets", "max_seconds", "batch_multiple"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; the fix: a number above 0")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; the fix: 0 or above")
        if not self.speed_factors or not all(0.5 <= f <= 2.0 for f in self.speed_factors):
            raise InputError(
                f"speed_factors are {self.speed_factors}; the fix: one or more, each from 0.5 to 2"
            )


# NumPy arrays as they are built; the same tuple holds JAX arrays once it is on a device.
Rows: TypeAlias = Any


class TextEncoder(Protocol):
    """A tokenizer, as far as batches need it."""

    def can_encode(self, text: str) -> set[str]:
        """The characters of the text that the vocabulary lacks."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 `[u]`."""
        ...


class Batch(NamedTuple):
    """One batch: padding is at the end of each row, and a filler row has weight 0.

    audio float32 `[b t]`, zeros after each row's length; audio_lengths int32 `[b]` (samples);
    targets int32 `[b u]`, zeros after each row's length; target_lengths int32 `[b]` (tokens);
    weights float32 `[b]`, 1, or 0 for filler; index int32 `[b]`, the row in the corpus, or -1 for
    filler.

    A filler row is silence as long as the whole row (audio_lengths = t) with no target, so that no
    mean or normalisation over its valid frames divides by zero: its loss is finite, and its weight
    removes it.
    """

    audio: Rows
    audio_lengths: Rows
    targets: Rows
    target_lengths: Rows
    weights: Rows
    index: Rows


class BatchShape(NamedTuple):
    """Shape of a bucket's batches: `t` samples, `b` rows, `u` tokens."""

    t: int
    b: int
    u: int


class _Planned(NamedTuple):
    bucket: int
    factors: np.ndarray  # of speed, one a row
    rows: np.ndarray  # positions among the kept utterances, at most b


class BatchSource:
    """Batches of a corpus by step number.

    Buckets: the lengths of all kept utterances at all speed factors are sorted and cut where the
    running duration passes equal parts of the total, so every bucket holds about the same amount of
    audio; a bucket's `t` is its longest length, rounded up to 80 ms, its `b` what fits
    batch_seconds, its `u` the longest target it can meet. An utterance is in the bucket of its
    length at its speed of the epoch. The last batch of a bucket is completed with filler rows.

    Args:
        corpus: where the audio and the texts come from.
        tokenizer: turns texts into targets; None for decoding: targets are empty and no text is unfit.
        config: see `BatchConfig`.
        frames_of: encoder frames of a number of samples. When given, utterances whose target needs
            more frames (`min_frames`) than the fastest speed factor leaves are skipped: CTC cannot
            align them.

    Raises:
        InputError: no utterance is left, or batch_multiple rows of the longest bucket exceed
            batch_seconds.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: TextEncoder | None,
        config: BatchConfig,
        frames_of: Callable[[int], int] | None = None,
    ):
        self.corpus = corpus
        self.config = config
        self._hosts = (0, 1)
        self._keep(tokenizer, frames_of)
        self._make_buckets()
        self._starts = [0]  # first step of each epoch planned so far
        self._plans: dict[int, list[_Planned]] = {}
        self._lock = threading.Lock()

    def _keep(self, tokenizer: TextEncoder | None, frames_of: Callable[[int], int] | None) -> None:
        fastest = max(self.config.speed_factors)
        limit = self.config.max_seconds * SAMPLE_RATE
        kept: list[int] = []
        self._targets: list[np.ndarray] = []
        skipped: list[Skipped] = []
        for index, utterance in enumerate(self.corpus.utterances):
            if utterance.num_samples > limit:
                seconds = utterance.num_samples / SAMPLE_RATE
                reason = f"{seconds:.1f} s is above max_seconds = {self.config.max_seconds:g}"
            elif unknown := tokenizer.can_encode(utterance.text) if tokenizer else set():
                reason = f"the tokenizer lacks {sorted(unknown)}"
            else:
                target = tokenizer.encode(utterance.text) if tokenizer else np.zeros(0, np.int32)
                needed = min_frames(target)
                frames = (
                    frames_of(speed_length(utterance.num_samples, fastest)) if frames_of else needed
                )
                if needed <= frames:
                    kept.append(index)
                    self._targets.append(target)
                    continue
                at = "" if fastest == 1.0 else f" at speed {fastest:g}"
                reason = f"CTC needs {needed} frames for the text, the audio has {frames}{at}"
            skipped.append(Skipped(utterance.id, reason))
        self.skipped = tuple(skipped)
        if not kept:
            first = f"; the first, {skipped[0].id}: {skipped[0].reason}" if skipped else ""
            raise InputError(
                f"no utterance of {self.corpus.name!r} is left of {len(self.corpus)}{first}; "
                "the fix: another corpus, tokenizer or max_seconds"
            )
        self.indices = np.asarray(kept)
        """Rows of the corpus that are used, in the corpus's order."""

    def _make_buckets(self) -> None:
        config = self.config
        samples = np.asarray([self.corpus.utterances[i].num_samples for i in self.indices])
        self._lengths = np.stack(
            [speed_length(samples, f) for f in config.speed_factors]
        )  # [factor, kept]
        pooled = np.sort(self._lengths, axis=None)
        total = np.cumsum(pooled)
        parts = total[-1] * np.arange(1, config.num_buckets + 1) / config.num_buckets
        ends = pooled[np.minimum(np.searchsorted(total, parts), len(pooled) - 1)]
        self._ends = np.unique(-(-ends // PAD_MULTIPLE) * PAD_MULTIPLE)
        buckets = np.searchsorted(self._ends, self._lengths)
        tokens = np.asarray([len(target) for target in self._targets])
        shapes = []
        for bucket, t in enumerate(self._ends):
            members = (buckets == bucket).any(axis=0)
            multiple = config.batch_multiple
            fits = int(config.batch_seconds * SAMPLE_RATE) // int(t) // multiple * multiple
            if not fits:
                raise InputError(
                    f"batch_seconds = {config.batch_seconds:g} does not hold batch_multiple = "
                    f"{multiple} rows of {t / SAMPLE_RATE:g} s; the fix: batch_seconds of "
                    f"{t / SAMPLE_RATE * multiple:g} or more, or a lower max_seconds"
                )
            needed = -(-int(members.sum()) // multiple) * multiple
            shapes.append(BatchShape(int(t), min(fits, needed), max(1, int(tokens[members].max()))))
        self._shapes = tuple(shapes)

    @property
    def shapes(self) -> tuple[BatchShape, ...]:
        """Every shape that `batch` can return; rows of one host after `host_slice`."""
        count = self._hosts[1]
        return tuple(shape._replace(b=shape.b // count) for shape in self._shapes)

    @property
    def padding_waste(self) -> float:
        """Fraction of the samples in epoch 0 that is padding or filler, over all hosts."""
        plan = self._plan(0)
        held = sum(
            self._shapes[planned.bucket].t * self._shapes[planned.bucket].b for planned in plan
        )
        return 1.0 - int(self._lengths_of(0).sum()) / held

    def host_slice(self, process_index: int, process_count: int) -> "BatchSource":
        """The same batches, but only one host's block of rows out of `process_count` equal ones.

        All hosts see equal shapes at each step, and their rows, in order of process_index, are the
        whole batch.

        Raises:
            InputError: batch_multiple is not a multiple of process_count, or process_index is out
                of range.
        """
        if self.config.batch_multiple % process_count or not 0 <= process_index < process_count:
            raise InputError(
                f"batch_multiple = {self.config.batch_multiple} rows cannot be cut for host "
                f"{process_index} of {process_count}; the fix: set batch_multiple to the number of "
                "devices over all hosts"
            )
        host = copy(self)
        host._hosts = (process_index, process_count)
        return host

    def steps_in_epoch(self, epoch: int) -> int:
        """Batches in an epoch; several speed factors make it differ a little between epochs."""
        buckets = np.searchsorted(self._ends, self._lengths_of(epoch))
        counts = np.bincount(buckets, minlength=len(self._shapes))
        return sum(-(-int(n) // shape.b) for n, shape in zip(counts, self._shapes, strict=True))

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch of a step, and its position in the epoch, both from 0."""
        if step < 0:
            raise InputError(f"step is {step}; the fix: 0 or above")
        with self._lock:
            while self._starts[-1] <= step:
                self._starts.append(self._starts[-1] + self.steps_in_epoch(len(self._starts) - 1))
            epoch = bisect_right(self._starts, step) - 1
            return epoch, step - self._starts[epoch]

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs: a function of settings and step."""
        epoch, position = self.locate(step)
        return self._build(self._plan(epoch)[position])

    def iterator(
        self, start_step: int, num_steps: int, threads: int = 1, prefetch: int | None = None
    ) -> Generator[tuple[int, Batch], None, None]:
        """(step, batch) of `num_steps` steps from `start_step`, built ahead by threads, in order.

        An error in a thread is raised here, at its step. Closing the iterator, or dropping it,
        stops the threads.

        Args:
            start_step: the first step; a resumed run names the step it stopped at.
            num_steps: how many.
            threads: threads that decode.
            prefetch: batches to build ahead (default: as many as there are threads, and one).
        """
        steps = iter(range(start_step, start_step + num_steps))
        threads = max(1, threads)
        pool = ThreadPoolExecutor(threads, thread_name_prefix="batches")
        most = threads + 1 if prefetch is None else max(1, prefetch)
        try:
            ahead: deque[tuple[int, Future[Batch]]] = deque(
                (step, pool.submit(self.batch, step)) for step in islice(steps, most)
            )
            while ahead:
                step, future = ahead.popleft()
                batch = future.result()
                for following in islice(steps, 1):
                    ahead.append((following, pool.submit(self.batch, following)))
                yield step, batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def eval_batches(self) -> Iterator[Batch]:
        """Each kept utterance once, at its own speed, in length order, in `batch`'s shapes."""
        lengths = np.asarray([self.corpus.utterances[i].num_samples for i in self.indices])
        order = np.argsort(lengths, kind="stable")
        for planned in self._cut(order, lengths, np.ones(len(lengths))):
            yield self._build(planned)

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.config.seed, epoch, stream]))

    def _choices(self, epoch: int) -> np.ndarray:
        """Which speed factor each kept utterance gets: a function of (seed, epoch, corpus row)."""
        draws = self._random(epoch, _SPEED).random(len(self.corpus))[self.indices]
        return (draws * len(self.config.speed_factors)).astype(int)

    def _lengths_of(self, epoch: int) -> np.ndarray:
        return self._lengths[self._choices(epoch), np.arange(len(self.indices))]

    def _cut(self, order: np.ndarray, lengths: np.ndarray, factors: np.ndarray) -> list[_Planned]:
        buckets = np.searchsorted(self._ends, lengths)
        plan = []
        for bucket, shape in enumerate(self._shapes):
            rows = order[buckets[order] == bucket]
            parts = (rows[i : i + shape.b] for i in range(0, len(rows), shape.b))
            plan += [_Planned(bucket, factors[part], part) for part in parts]
        return plan

    def _plan(self, epoch: int) -> list[_Planned]:
        with self._lock:
            if epoch not in self._plans:
                while (
                    len(self._plans) >= 3
                ):  # an iterator works on two epochs at most, at their border
                    self._plans.pop(next(iter(self._plans)))
                self._plans[epoch] = self._new_plan(epoch)
            return self._plans[epoch]

    def _new_plan(self, epoch: int) -> list[_Planned]:
        lengths = self._lengths_of(epoch)
        factors = np.asarray(self.config.speed_factors)[self._choices(epoch)]
        if not self.config.shuffle:
            return self._cut(np.argsort(lengths, kind="stable"), lengths, factors)
        # Sorting random keys keeps the order the same in every numpy: permutation() may change
        # between versions.
        random = self._random(epoch, _SHUFFLE)
        order = np.argsort(random.random(len(self.indices)), kind="stable")
        plan = self._cut(order, lengths, factors)
        return [plan[i] for i in np.argsort(random.random(len(plan)), kind="stable")]

    def _build(self, planned: _Planned) -> Batch:
        shape = self._shapes[planned.bucket]
        host, count = self._hosts
        height = shape.b // count
        batch = Batch(
            audio=np.zeros((height, shape.t), np.float32),
            audio_lengths=np.full(height, shape.t, np.int32),
            targets=np.zeros((height, shape.u), np.int32),
            target_lengths=np.zeros(height, np.int32),
            weights=np.zeros(height, np.float32),
            index=np.full(height, -1, np.int32),
        )
        mine = slice(host * height, (host + 1) * height)
        rows = zip(planned.rows[mine], planned.factors[mine], strict=True)
        for row, (kept, factor) in enumerate(rows):
            audio = change_speed(self.corpus.audio(int(self.indices[kept])), float(factor))
            target = self._targets[kept]
            batch.audio[row, : len(audio)] = audio
            batch.audio_lengths[row] = len(audio)
            batch.targets[row, : len(target)] = target
            batch.target_lengths[row] = len(target)
            batch.weights[row] = 1.0
            batch.index[row] = self.indices[kept]
        return batch
