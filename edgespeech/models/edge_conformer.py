"""The edge Conformer (arXiv 2312.10359): chunk-wise, in float16 where wanted, one model for offline and streaming use.

From the paper, known second-hand: depthwise-separable subsampling, chunk-based attention, CTC and an attention decoder
in training, a layer norm with a pre-normaliser. Sizes, features and everything else are ours.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.models.edge_conformer_config import STRIDE, EdgeConformerConfig
from edgespeech.nn.causal_conv import StreamingConvolution
from edgespeech.nn.chunk_attention import ChunkAttention, Chunks
from edgespeech.nn.conformer import linear
from edgespeech.nn.streaming_conformer import LayerState, StreamingConformerLayer
from edgespeech.nn.streaming_features import FeatureState, StreamingLogMel
from edgespeech.nn.streaming_lpa import StreamingLPA
from edgespeech.nn.subsampling import StreamingSubsampling
from edgespeech.nn.token_decoder import TokenDecoder
from edgespeech.ops.dropout import dropout
from edgespeech.ops.features import spec_augment
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import Array, Audio, Float, Frames, Lengths, Logits


class EdgeOutput(NamedTuple):
    """What the model returns.

    Attributes:
        logits: `[b n v]` of CTC, unnormalised.
        lengths: `[b]`, valid frames.
    """

    logits: Logits
    lengths: Lengths


class EdgeState(NamedTuple):
    """What the next samples of a stream need of those before."""

    features: FeatureState
    frames: Float[Array, "b f m"]
    layers: tuple[LayerState, ...]


class EdgeConformer(nnx.Module):
    """Log-mel front end, subsampling by four, Conformer layers and a CTC head, whole or in steps; a decoder beside.

    Attributes:
        layers: `layers[i].mixer` is the slot for attention or what replaces it.
        decoder: the attention decoder, for training and rescoring; streaming does not use it.
        stride, chunk, latency, receptive_field: of the stream, in samples: see `StreamingConvolution`.
    """

    stride = STRIDE

    def __init__(self, config: EdgeConformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        d, dtype = config.width, jnp.dtype(config.dtype)
        self.front_end = StreamingLogMel(config.num_mels)
        self.subsampling = StreamingSubsampling(
            config.num_mels, d, separable=config.separable, dtype=dtype, rngs=rngs
        )
        self.layers = nnx.List(_layer(config, rngs) for _ in range(config.num_layers))
        self.head = linear(d, config.vocab_size, rngs, dtype)
        self.decoder = TokenDecoder(
            config.vocab_size,
            d,
            config.num_heads,
            config.ffn_width,
            config.decoder_layers,
            rngs=rngs,
        )

    def __call__(
        self,
        audio: Audio,
        audio_lengths: Lengths,
        chunks: Chunks | None = None,
        key: Array | None = None,
    ) -> EdgeOutput:
        """Audio to the logits of CTC: the head on what `encode` returns."""
        memory, lengths = self.encode(audio, audio_lengths, chunks, key)
        return EdgeOutput(self.head(memory), lengths)

    def encode(
        self,
        audio: Audio,
        audio_lengths: Lengths,
        chunks: Chunks | None = None,
        key: Array | None = None,
    ) -> tuple[Frames, Lengths]:
        """Audio to frames, `[b t], [b] -> [b n d], [b]`, n = t // 640; zero beyond the lengths.

        Args:
            audio: `[b t]`, float32 in [-1, 1], 16 kHz.
            audio_lengths: `[b]`, valid samples; what is beyond has no part in the output.
            chunks: what a frame sees, traced if wanted; None: chunk and left context of the layers (`set_chunks`).
            key: a random key: training, with dropout and SpecAugment.

        Raises:
            InputError: the batch is too short for a frame. A row of it that is too short has 0 frames.
        """
        keys = (None,) * (len(self.layers) + 2)
        if key is not None:
            keys = tuple(jax.random.split(key, len(keys)))
        if self.config.num_frames(audio.shape[1]) == 0:
            raise InputError(
                f"audio of {audio.shape[1]} samples is too short for a single frame of {STRIDE}: pad the batch, "
                "lengths unchanged"
            )
        x, lengths = self.front_end(audio, audio_lengths)
        if keys[0] is not None:
            x = spec_augment(x, lengths, self.config.spec_augment, keys[0])
        x, lengths = self.subsampling(x, lengths)
        x = dropout(x, self.config.dropout, keys[1])
        for layer, layer_key in zip(self.layers, keys[2:], strict=True):
            x = layer(x, lengths, chunks, layer_key)
        return zero_padding(x, mask_from_lengths(lengths, x.shape[1])), lengths

    # ---------------------------------------------------------------- streaming

    @property
    def chunk(self) -> int:
        """Samples."""
        return STRIDE * max(layer.chunk for layer in self.layers)

    @property
    def latency(self) -> int:
        """Samples: a chunk's first frame waits for its last, in all layers together."""
        return self.chunk - 1

    @property
    def receptive_field(self) -> tuple[None, int]:
        """Samples; the features' running mean has no oldest one."""
        ahead = sum(layer.receptive_field[1] for layer in self.layers)
        return None, min(self.latency, STRIDE * ahead + STRIDE - 1)

    def set_chunks(self, size: int, left: int) -> None:
        """Sets chunk size (frames) and left context (chunks) of all layers, in place: what a stream runs with.

        Raises:
            InputError: size is below 1 or left below 0.
        """
        if size < 1 or left < 0:
            raise InputError(
                f"set_chunks got size {size} and left {left}: they must be at least 1 and at least 0"
            )
        for layer in self.layers:
            if isinstance(layer.mixer, ChunkAttention):
                layer.mixer.chunk, layer.mixer.left = size, left
            if layer.conv.reach == "chunk":
                layer.conv.chunk = size

    def init_state(self, batch: int) -> EdgeState:
        """Silence before the first sample, for so many streams."""
        return EdgeState(
            self.front_end.init_state(batch),
            self.subsampling.init_state(batch),
            tuple(layer.init_state(batch) for layer in self.layers),
        )

    def step(
        self, chunk: Audio, lengths: Lengths, state: EdgeState
    ) -> tuple[Logits, Lengths, EdgeState]:
        """The next samples of every stream, `[b c], [b] -> [b c/640 v], [b]`, and the state after them.

        Raises:
            InputError: c is not a multiple of the attribute `chunk`.
        """
        x, lengths, features = self.front_end.step(chunk, lengths, state.features)
        x, lengths, frames = self.subsampling.step(x, lengths, state.frames)
        layers = []
        for layer, old in zip(self.layers, state.layers, strict=True):
            x, lengths, new = layer.step(x, lengths, old)
            layers.append(new)
        return self.head(x), lengths, EdgeState(features, frames, tuple(layers))


def _layer(config: EdgeConformerConfig, rngs: nnx.Rngs) -> StreamingConformerLayer:
    d, dtype = config.width, jnp.dtype(config.dtype)
    mixer: Any
    if config.mixer == "lpa":
        mixer = StreamingLPA(d, config.num_heads, config.lpa, dtype=dtype, rngs=rngs)
    else:
        mixer = ChunkAttention(
            d, config.num_heads, chunk=config.chunk, left=config.left, dtype=dtype, rngs=rngs
        )
    conv = StreamingConvolution(
        d,
        config.conv_kernel,
        config.dropout,
        reach=config.conv_reach,
        chunk=config.chunk,
        norm=config.norm,
        dtype=dtype,
        rngs=rngs,
    )
    return StreamingConformerLayer(
        d,
        mixer,
        conv,
        ffn_width=config.ffn_width,
        dropout_rate=config.dropout,
        norm=config.norm,
        dtype=dtype,
        rngs=rngs,
    )
