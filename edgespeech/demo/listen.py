"""What a model hears in a clip, and what its pulses and exits did: plain facts for a page to draw."""

import base64
import functools
import io
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from edgespeech.conversion.capture import Gates, capture_gates
from edgespeech.conversion.layers import mixer_layers
from edgespeech.data.audio import read_audio
from edgespeech.data.tokenizer import Tokenizer
from edgespeech.errors import InputError
from edgespeech.inference.exit_budget import exit_compute
from edgespeech.inference.exit_criteria import all_exit_scores
from edgespeech.inference.exit_policy import (
    CALIBRATED,
    FILE_NAME,
    ExitPolicy,
    chosen_exits,
    load_policy,
)
from edgespeech.inference.exit_predictor import all_exit_features, exit_probabilities
from edgespeech.inference.words import text_of, token_texts, word_facts, words_of_path
from edgespeech.interop.ctc_model import CTCModel
from edgespeech.models.splitformer import ExitOutput, Splitformer
from edgespeech.models.wav2vec2 import count_parameters
from edgespeech.models.wav2vec2_exits import Wav2Vec2Exits
from edgespeech.nn.lpa import LPA
from edgespeech.ops.ctc import greedy_path
from edgespeech.ops.features import HOP, WINDOW, log_mel
from edgespeech.types import SAMPLE_RATE

MOST_SECONDS = 30.0  # of a clip: one utterance, one picture
# Where nobody has tuned a threshold (ours): leaves once the labels are nearly certain.
UNTUNED = ExitPolicy("max_probability", 0.95)
# Percentiles of the spectrogram that become black and white: a click does not darken the rest.
DARKEST, BRIGHTEST = 2, 99.8


def exit_policy(model: CTCModel, folder: str | Path) -> ExitPolicy | None:
    """The policy that was saved with a model, or `UNTUNED`; None for a model without exits.

    Raises:
        InputError: the saved policy is damaged, or its predictor is for another number of exits.
    """
    if not isinstance(model, Splitformer | Wav2Vec2Exits):
        return None
    if not (Path(folder) / FILE_NAME).exists():
        return UNTUNED
    policy = load_policy(folder)
    if policy.predictor is not None and len(policy.predictor.bias) != len(model.blocks) - 1:
        raise InputError(
            f"{folder} has an exit predictor for {len(policy.predictor.bias) + 1} exits and a model of "
            f"{len(model.blocks)}: fit one for this model"
        )
    return policy


class Listener:
    """Transcribes clips and describes what happened in the model; one pass a clip, all exits included.

    Args:
        model: with a CTC head, at inference; LPA with hard gates, which is how a saved one is loaded.
        tokenizer: of its vocabulary.
        policy: of a model with exits; None for the others.

    Attributes:
        policy: another threshold may be set.
    """

    def __init__(self, model: CTCModel, tokenizer: Tokenizer, policy: ExitPolicy | None = None):
        self._model: Any = model
        self.policy = policy
        self._texts = token_texts(tokenizer)
        self._seconds = model.config.frame_seconds
        graphdef, self._state = nnx.split(model)

        @jax.jit
        def run(state, audio, lengths):
            output, gates = capture_gates(nnx.merge(graphdef, state), audio, lengths)
            logits, scores = [output.logits], None
            if policy is not None:
                assert isinstance(output, ExitOutput)
                logits, scores = output.exit_logits, _exit_scores(policy, output)
            paths = [greedy_path(of_exit, output.lengths) for of_exit in logits]
            return paths, output.lengths, gates, scores, log_mel(audio)

        self._run = run
        self._macs = functools.cache(lambda seconds: exit_compute(self._model, seconds))

    def about(self) -> dict[str, Any]:
        """What the page says of the model before a clip is there."""
        layers = mixer_layers(self._model).values()
        return {
            "kind": type(self._model).__name__,
            "parameters": count_parameters(self._model),
            "layers": len(layers),
            "pulse_layers": sum(isinstance(layer.mixer, LPA) for layer in layers),
            "exits": len(self._model.blocks) if self.policy else 0,
            "most_seconds": MOST_SECONDS,
        }

    def __call__(self, clip: bytes) -> dict[str, Any]:
        """Facts of a clip, ready for JSON.

        Text, seconds and words are those of `edgespeech transcribe --format=json`; of a model with exits they are the
        taken exit's, where `transcribe` goes to the last one. Gates are bits, one byte for eight, of `[h p n]` in C
        order; the spectrogram is a byte for each of `[f m]`. Both are in base64.

        Args:
            clip: contents of a WAV, FLAC, Ogg or MP3 file of at most `MOST_SECONDS`.

        Raises:
            InputError: the clip cannot be read, is too long, or is shorter than a window of 25 ms.
        """
        samples = read_audio(io.BytesIO(clip), "the clip", MOST_SECONDS).samples
        length = len(samples)
        if length < WINDOW:
            raise InputError(
                f"the clip has {1000 * length / SAMPLE_RATE:.0f} ms: record at least 25 ms"
            )
        # A power of two of seconds: few programs are compiled, and padding changes nothing.
        bucket = 2 ** max(1, math.ceil(math.log2(length / SAMPLE_RATE)))
        audio = np.pad(samples, (0, bucket * SAMPLE_RATE - length))[None]
        paths, frames, gates, scores, mel = jax.device_get(
            self._run(self._state, audio, np.array([length], np.int32))
        )
        heard = [words_of_path(path[0, : frames[0]], self._texts, self._seconds) for path in paths]
        facts = {
            "seconds": round(length / SAMPLE_RATE, 3),
            "spectrogram": _spectrogram(mel[0, : (length - WINDOW) // HOP + 1]),
            "layers": [
                _layer(number, path, gates[path], self._seconds * _stride(paths[0], gates[path]))
                for number, path in enumerate(mixer_layers(self._model), 1)
                if path in gates
            ],
        }
        taken = 0
        if self.policy is not None:
            facts["exits"], taken = self._exits(heard, scores, bucket)
        return facts | {"text": text_of(heard[taken]), "words": word_facts(heard[taken])}

    def _exits(self, heard: list, scores: np.ndarray, bucket: int) -> tuple[dict[str, Any], int]:
        """Rule, threshold and a row for every exit; and the exit taken, from 0."""
        policy = self.policy
        assert policy is not None
        if policy.predictor is not None:
            scores = exit_probabilities(policy.predictor, scores)
        values = scores[:, 0].astype(float)
        taken = int(chosen_exits(policy.rule, policy.threshold, scores)[0])
        macs = self._macs(bucket)
        rows = [
            {
                "score": score,
                "share": cost / macs[-1],
                "text": text_of(words),
                "words": word_facts(words),
            }
            for score, cost, words in zip(values, macs, heard, strict=True)
        ]
        return {
            "rule": policy.rule,
            # JSON has no infinities: the largest number does the same to a finite score.
            "threshold": float(np.nan_to_num(policy.threshold)),
            "tuned": policy is not UNTUNED,
            "taken": taken + 1,
            "rows": rows,
        }, taken


def _exit_scores(policy: ExitPolicy, output: ExitOutput):
    """The rule's score of every exit, `[e b]`; of the rule `calibrated` its features, `[e b f]`."""
    passed = output.embedded, output.hidden, output.exit_logits, output.lengths
    if policy.rule == CALIBRATED:
        return all_exit_features(*passed)
    return all_exit_scores(policy.rule, *passed, policy.n_best)[0]


def _layer(number: int, path: tuple, gates: Gates, frame: float) -> dict[str, Any]:
    """The pulses of a layer over the clip's frames, `frame` seconds each."""
    n = int(gates.lengths[0])
    kinds = [
        {
            "kind": kind,
            "pulses": gate.shape[2],
            "bits": _base64(np.packbits(gate[0, :, :, :n] > 0.5)),
        }
        for kind, gate in gates.kinds.items()
    ]
    return {
        "name": f"{number}: {'.'.join(map(str, path))}",
        "heads": next(iter(gates.kinds.values())).shape[1] if gates.kinds else 0,
        "frames": n,
        "frame_seconds": frame,
        "kinds": kinds,
    }


def _stride(encoder_path: np.ndarray, gates: Gates) -> int:
    """Encoder frames to a frame of a layer: 2 in the branch of a Splitformer, which runs at half the rate."""
    n = next((gate.shape[-1] for gate in gates.kinds.values()), encoder_path.shape[1])
    return round(encoder_path.shape[1] / n)


def _spectrogram(mel: np.ndarray) -> dict[str, Any]:
    low, high = np.percentile(mel, [DARKEST, BRIGHTEST])
    shades = np.clip((mel - low) / max(high - low, 1e-6), 0, 1) * 255
    return {
        "frames": len(mel),
        "bins": mel.shape[1],
        "frame_seconds": HOP / SAMPLE_RATE,
        "shades": _base64(np.rint(shades).astype(np.uint8)),
    }


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")
