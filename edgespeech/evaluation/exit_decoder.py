"""Scoring a model that is left early."""

import numpy as np
from flax import nnx

from edgespeech.data.batching import Batch
from edgespeech.evaluation.decode import Decoder, TextOfIds
from edgespeech.inference.early_exit import EarlyExit
from edgespeech.inference.exit_policy import ExitPolicy


class EarlyExitDecoder(Decoder):
    """Greedy transcripts of the exits that a policy takes, regrouped as in use.

    Args:
        graphdef: of a model with exits.
        tokenizer: turns tokens into text.
        policy: when to leave.
        max_exit: the deepest exit allowed, counted from 1; None: the last.

    Attributes:
        taken: the exits of all utterances so far, counted from 1.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        tokenizer: TextOfIds,
        policy: ExitPolicy,
        max_exit: int | None = None,
    ):
        self._graphdef, self._tokenizer = graphdef, tokenizer
        self._policy, self._max_exit = policy, max_exit
        self._state: nnx.State | None = None
        self.taken: list[int] = []

    def texts(self, state: nnx.State, batch: Batch) -> list[str]:
        """See `Decoder`."""
        if state is not self._state:
            self._run = EarlyExit(nnx.merge(self._graphdef, state), self._policy)
            self._state = state
        result = self._run(batch.audio, batch.audio_lengths, self._max_exit)
        self.taken += result.exits[np.asarray(batch.index) >= 0].tolist()
        return [self._tokenizer.decode(tokens.tolist()) for tokens in result.tokens]
