"""SepFormer as the latency program sees it, and SpeechBrain's beside it."""

import contextlib
import dataclasses
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.evaluation.latency import Prepare
from edgespeech.evaluation.latency_models import (
    RunPart,
    after_mixer,
    apply,
    random_weights,
    without_mixer,
)
from edgespeech.models.sepformer import SepFormer, SepFormerConfig
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.dual_path import (
    DualPathBlock,
    PathTransformer,
    chunk_count,
    sinusoidal_positions,
)
from edgespeech.nn.kept_gates import keep_gates
from edgespeech.nn.lpa import LPA, harden
from edgespeech.nn.lpa_config import LPAConfig
from edgespeech.ops.mask import mask_from_lengths
from edgespeech.types import Array, Audio, Frames, Lengths


@dataclasses.dataclass(frozen=True)
class TimedSepFormer:
    """`SepFormer` as a `TimedModel`: the intra-chunk layers can be replaced, counted through all blocks.

    Attributes:
        config: sizes of the model.
        lpa: of the replaced layers.
    """

    config: SepFormerConfig
    lpa: LPAConfig = dataclasses.field(default_factory=LPAConfig)

    @property
    def num_layers(self) -> int:
        """Intra-chunk layers."""
        return self.config.num_blocks * self.config.num_intra_layers

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    def num_frames(self, num_samples: int) -> int:
        """Frames of the filter bank."""
        return self.config.num_frames(num_samples)

    def build(self, replaced: Sequence[int]) -> SepFormer:
        """The hybrid with hard LPA in these layers, counted from 0; for none, attention everywhere."""

        def make() -> SepFormer:
            model = SepFormer(self.config, rngs=nnx.Rngs(0))
            layers = [layer for block in model.mask_network.blocks for layer in block.intra.layers]
            for i in replaced:
                attention = cast(SelfAttention, layers[i].mixer)
                layers[i].mixer = LPA.from_attention(attention, self.lpa, rngs=nnx.Rngs(i))
            if replaced:
                harden(model)
            return model

        return random_weights(make)

    def keep_gates(self, model: SepFormer, num_samples: int) -> None:
        """The gates of every LPA that do not see the input, of every chunk."""
        k = self.config.chunk_length
        chunks = chunk_count(self.num_frames(num_samples), k)
        keep_gates(model, jnp.full(chunks, k), k)

    def forward(self, model: SepFormer, audio: Audio, lengths: Lengths) -> Array:
        """Estimates `[1 spk t]`."""
        return model(audio, lengths).estimates

    def run_parts(self, model: SepFormer, audio: Audio, lengths: Lengths, run: RunPart) -> Array:
        """encoder, then mixers and ffn for every intra-chunk layer and inter for every block, decoder.

        Norms, skips and positions count with ffn.
        """
        ends = _without_blocks(model)
        h, x, num_chunks = run("encoder", _encode, ends, audio, lengths)
        for block in model.mask_network.blocks:
            y, chunk_lengths = run("ffn", _enter, _norms(block), x, num_chunks)
            for layer in block.intra.layers:
                u = run("ffn", apply, layer.mixer_norm, y)
                mixed = run("mixers", apply, layer.mixer, u, chunk_lengths)
                y = run("ffn", after_mixer, without_mixer(layer), y, mixed, chunk_lengths)
            y, across, across_lengths = run("ffn", _between, _norms(block), x, y, num_chunks)
            z = run("inter", _last, block.inter, across, across_lengths)
            x = run("ffn", _leave, _norms(block), y, z, num_chunks)
        return run("decoder", _decode, ends, x, h, audio, lengths)


def _without_blocks(model: SepFormer) -> SepFormer:
    copy = nnx.merge(*nnx.split(model))
    copy.mask_network.blocks = nnx.List([])
    return copy


def _encode(model: SepFormer, audio: Audio, lengths: Lengths) -> tuple[Frames, Array, Lengths]:
    h, frames = model.encode(audio, lengths)
    return h, *model.mask_network.split(h, frames)


def _decode(model: SepFormer, x: Array, h: Frames, audio: Audio, lengths: Lengths) -> Array:
    return model.decode(model.mask_network.masks(x, h.shape[1]), h, audio, lengths)


def _norms(block: DualPathBlock) -> tuple:
    """What a block has beside its layers within chunks and its path across them."""
    return block.intra_norm, block.intra.norm, block.inter_norm


def _enter(norms: tuple, x: Array, num_chunks: Lengths) -> tuple[Frames, Lengths]:
    """The input of the first layer within chunks, as in `DualPathBlock`."""
    del norms
    b, s, k, d = x.shape
    lengths = mask_from_lengths(num_chunks, s).astype(num_chunks.dtype).reshape(b * s) * k
    return x.reshape(b * s, k, d) + sinusoidal_positions(k, d), lengths


def _between(
    norms: tuple, x: Array, y: Frames, num_chunks: Lengths
) -> tuple[Array, Frames, Lengths]:
    """From the last layer within chunks to the first one across them."""
    intra_norm, last_norm, _ = norms
    b, s, k, d = x.shape
    y = x + intra_norm(last_norm(y).reshape(x.shape), mask_from_lengths(num_chunks, s))
    return y, y.swapaxes(1, 2).reshape(b * k, s, d), num_chunks.repeat(k)


def _last(path: PathTransformer, x: Frames, lengths: Lengths) -> Frames:
    return path(x, lengths, scan=False)[-1]


def _leave(norms: tuple, y: Array, z: Frames, num_chunks: Lengths) -> Array:
    """From the path across chunks to the next block."""
    _, _, inter_norm = norms
    b, s, k, d = y.shape
    z = z.reshape(b, k, s, d).swapaxes(1, 2)
    return y + inter_norm(z, mask_from_lengths(num_chunks, s))


def random_speechbrain_model(config: SepFormerConfig) -> Any:
    """SpeechBrain's `SepformerWrapper` of our sizes in inference mode, its weights drawn from a fixed seed."""
    torch = importlib.import_module("torch")
    with importable_torchaudio():
        parts = importlib.import_module("speechbrain.lobes.models.dual_path")
    torch.manual_seed(0)
    model = parts.SepformerWrapper(
        encoder_kernel_size=config.kernel_size,
        encoder_out_nchannels=config.width,
        masknet_chunksize=config.chunk_length,
        masknet_numlayers=config.num_blocks,
        masknet_numspks=config.num_speakers,
        intra_numlayers=config.num_intra_layers,
        inter_numlayers=config.num_inter_layers,
        intra_nhead=config.num_heads,
        inter_nhead=config.num_heads,
        intra_dffn=config.ffn_width,
        inter_dffn=config.ffn_width,
    )
    # The wrapper makes the filter bank as wide as the transformers, which the parts themselves do not ask for.
    filters, width, size = config.num_filters, config.width, config.kernel_size
    model.encoder = parts.Encoder(kernel_size=size, out_channels=filters)
    model.masknet.norm = parts.select_norm("ln", filters, 3)
    model.masknet.conv1d = torch.nn.Conv1d(filters, width, 1, bias=False)
    model.masknet.end_conv1x1 = torch.nn.Conv1d(width, filters, 1, bias=False)
    model.decoder = parts.Decoder(
        in_channels=filters, out_channels=1, kernel_size=size, stride=size // 2, bias=False
    )
    return model.eval()


@contextlib.contextmanager
def importable_torchaudio() -> Iterator[None]:
    """SpeechBrain imports it, for files alone: where that fails, an empty module stands in within the block."""
    try:
        importlib.import_module("torchaudio")
        stand_in = None
    except (ImportError, OSError):
        stand_in = types.ModuleType("torchaudio")
        vars(stand_in)["__version__"] = "2.11.0"
        sys.modules["torchaudio"] = stand_in
    try:
        yield
    finally:
        if stand_in is not None:
            del sys.modules["torchaudio"]  # transformers, for one, would take it for the package


def load_speechbrain(config: SepFormerConfig, threads: int) -> Prepare:
    """SpeechBrain's model: calls return estimates `[1 t spk]`.

    Args:
        config: sizes of the model.
        threads: of PyTorch's pool, for the whole process.
    """
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    model = random_speechbrain_model(config)

    def prepare(audio: np.ndarray) -> Callable[[], Any]:
        samples = torch.from_numpy(audio)

        def call():
            with torch.inference_mode():
                return model(samples)

        return call

    return prepare
