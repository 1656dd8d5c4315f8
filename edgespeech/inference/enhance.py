"""Enhancing or separating long files in bounded memory, by overlapped segments."""

import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import IO, BinaryIO

import jax
import numpy as np
import soundfile
from flax import nnx

from edgespeech.data.audio import to_int16
from edgespeech.data.corpus import write_atomically
from edgespeech.errors import InputError
from edgespeech.inference.audio_blocks import (
    BLOCK,
    cut,
    open_sound,
    read_blocks,
    require_overlap,
    resampled,
)
from edgespeech.inference.compiling import inference_options
from edgespeech.models.sepformer import SepFormer

# `(audio [c t], lengths [c]) -> [c spk t]`
Process = Callable[[np.ndarray, np.ndarray], np.ndarray]


def overlapped_segments(
    process: Process, blocks: Iterable[np.ndarray], segment: int, overlap: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Processes a stream of any length in segments of one shape.

    Neighbours share `overlap` samples. Of these the quarters at the two edges, where a model lacks context, come from
    the other segment alone; between them a raised cosine fades from one to the other, and the two gains sum to 1. So
    the result is that of the whole stream for every process that reaches no further than `overlap // 4` samples, and
    without a step for any other. Where the process gives several speakers, each segment's are put in the order that
    agrees best with the segment before, channel by channel.

    Args:
        process: `(audio [c segment], lengths [c]) -> [c spk segment]`; zeros fill the last segment up.
        blocks: float32 `[c any]`, the stream in pieces.
        segment: samples of a segment.
        overlap: samples that neighbours share, at most half a segment.

    Yields:
        The input `[c any]` and what became of it, `[c spk any]`, piece by piece: in all as many samples as came in.

    Raises:
        InputError: overlap below 4 or above half a segment.
    """
    if not 4 <= overlap <= segment // 2:
        raise InputError(
            f"an overlap of {overlap} samples does not fit segments of {segment}: "
            f"choose 4 to {segment // 2}"
        )
    margin, hop = overlap // 4, segment - overlap
    fade = 0.5 - 0.5 * np.cos(
        np.pi * (np.arange(overlap - 2 * margin) + 0.5) / (overlap - 2 * margin)
    )
    rise = np.concatenate([np.zeros(margin), fade, np.ones(margin)]).astype(np.float32)
    previous = None  # what the segment before made of the samples that this one shares with it
    for piece, is_last in cut(blocks, segment, hop):
        length = piece.shape[1]
        padded = np.pad(piece, ((0, 0), (0, segment - length)))
        made = np.array(process(padded, np.full(len(piece), length, np.int32)))[..., :length]
        if previous is not None:
            made = _in_order_of(previous, made)
            made[..., :overlap] = previous * (1 - rise) + made[..., :overlap] * rise
        stop = length if is_last else hop
        yield piece[:, :stop], made[..., :stop]
        previous = made[..., hop:]


def _in_order_of(previous: np.ndarray, made: np.ndarray) -> np.ndarray:
    """`made [c spk t]` with its speakers permuted to correlate best with `previous [c spk overlap]`."""
    products = np.einsum("cit,cjt->cij", previous, made[..., : previous.shape[-1]])
    count = previous.shape[1]
    orders = list(permutations(range(count)))
    scores = np.stack([products[:, range(count), order].sum(-1) for order in orders], -1)
    best = np.asarray(orders)[scores.argmax(-1)]
    return np.take_along_axis(made, best[..., None], axis=1)


def enhance_file(
    model: SepFormer,
    source: str | os.PathLike,
    outputs: Sequence[str | os.PathLike],
    *,
    segment_seconds: float = 8.0,
    overlap_seconds: float = 1.0,
) -> None:
    """Enhances a recording, or separates its voices: one file out for each speaker of the model.

    Rate, channels and number of samples stay those of the source; each channel is processed by itself, and soxr
    resamples to the model's rate and back. Memory is that of one segment, whatever the length: estimates wait in
    temporary files of 4 bytes a sample.

    SI-SNR, the loss of training, leaves level and sign of an estimate free, so a whole file gets one gain a speaker
    (ours): `<source, estimate> / <estimate, estimate>`, the least-squares fit to the source, cut where the peak would
    exceed 1. For noise that is uncorrelated with the voice it is the voice's own level. In a file without a voice
    nothing tells the level of what is left, and the fit brings noise back.

    Args:
        model: works at `model.config.sample_rate`.
        source: WAV, FLAC, Ogg (Vorbis, Opus) or MP3.
        outputs: a path for each speaker; the suffix names the format (.wav, .flac, ...). Each is written whole or not.
        segment_seconds: longer segments give more context and need more memory.
        overlap_seconds: what neighbouring segments share.

    Raises:
        InputError: another number of outputs than speakers; a suffix that is no format or cannot hold the source's rate
            and channels; a source that is unreadable or empty or has NaN or infinite samples; an overlap that does not
            fit the segments.
    """
    source, targets, config = Path(source), [Path(path) for path in outputs], model.config
    if len(targets) != config.num_speakers:
        raise InputError(
            f"{len(targets)} output files for a model of {config.num_speakers} speakers: name one for each speaker"
        )
    require_overlap(segment_seconds, overlap_seconds)
    with ExitStack() as stack:
        sound = stack.enter_context(open_sound(source))
        rate, channels = sound.samplerate, sound.channels
        for path in targets:
            _create(io.BytesIO(), path, rate, channels).close()
        segments = overlapped_segments(
            _process(model),
            resampled(read_blocks(sound, source), channels, rate, config.sample_rate),
            round(segment_seconds * config.sample_rate),
            round(overlap_seconds * config.sample_rate),
        )
        kept = [stack.enter_context(tempfile.TemporaryFile()) for _ in targets]
        fit, energy, peak = (np.zeros(len(targets)) for _ in range(3))
        for heard, made in segments:
            fit += np.einsum("ct,cst->s", heard, made, dtype=np.float64)
            energy += np.einsum("cst,cst->s", made, made, dtype=np.float64)
            peak = np.maximum(peak, np.abs(made).max((0, 2)))
            for file, estimate in zip(kept, made.swapaxes(0, 1), strict=True):
                file.write(estimate.T.tobytes())
        gains = fit / np.maximum(energy, 1e-20)
        gains /= np.maximum(1.0, np.abs(gains) * peak)
        length = sound.tell()
        for path, file, gain in zip(targets, kept, gains, strict=True):
            blocks = resampled(
                _stored(file, channels, np.float32(gain)), channels, config.sample_rate, rate
            )
            write_atomically(path, partial(_write, path, blocks, rate, channels, length))


def _process(model: SepFormer) -> Process:
    graphdef, state = nnx.split(model)
    run = jax.jit(
        lambda state, *inputs: nnx.merge(graphdef, state)(*inputs).estimates,
        compiler_options=inference_options(),
    )
    return lambda audio, lengths: np.asarray(run(state, audio, lengths))


def _stored(file: IO[bytes], channels: int, gain: np.float32) -> Iterator[np.ndarray]:
    """float32 `[c n]` blocks of a temporary file."""
    file.seek(0)
    while data := file.read(4 * channels * BLOCK):
        yield gain * np.frombuffer(data, np.float32).reshape(-1, channels).T


def _create(file: BinaryIO, path: Path, rate: int, channels: int) -> soundfile.SoundFile:
    """Opens `file` for writing in the format that the path's suffix names."""
    try:
        return soundfile.SoundFile(file, "w", rate, channels, format=path.suffix[1:].upper())
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} cannot hold {channels} channels at {rate} Hz ({error}): choose .wav or .flac"
        ) from error


def _write(
    path: Path, blocks: Iterable[np.ndarray], rate: int, channels: int, length: int, file: BinaryIO
) -> None:
    """Writes exactly `length` samples: resampling there and back may leave one more or less."""
    with _create(file, path, rate, channels) as sound:
        for block in blocks:
            part = block[:, :length]
            # Rounded here: libsndfile cuts the fraction off.
            sound.write(to_int16(part.T))
            length -= part.shape[1]
        sound.write(np.zeros((length, channels), np.int16))
