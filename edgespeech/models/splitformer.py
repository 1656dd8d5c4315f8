"""Early-exit Conformers with CTC: the baseline (arXiv 2309.09546) and Splitformer (arXiv 2506.18035)."""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.branch_execution import BranchExecution, run_with_branch
from edgespeech.nn.conformer import ConformerLayer, Positions, add_sinusoids
from edgespeech.nn.exits import BiLSTMHead, LinearHead
from edgespeech.nn.masked_norm import NormKind
from edgespeech.nn.mel_subsampling import FeatureKind, MelSubsampling
from edgespeech.nn.parallel_branch import Combine, Downsample, ParallelBranch
from edgespeech.ops.dropout import dropout
from edgespeech.ops.features import SpecAugmentConfig
from edgespeech.types import Array, Audio, Frames, Lengths, Logits

Placement = Literal["none", "first_last", "all"]
HeadKind = Literal["linear", "bilstm"]


@dataclasses.dataclass(frozen=True)
class SplitformerConfig:
    """Sizes of an early-exit encoder; the defaults are Splitformer's.

    Attributes:
        vocab_size: tokens of every head, the blank at 0 included.
        width: model width d.
        num_exits: exits e; each has a block of layers before it and a head of its own.
        layers_per_exit: Conformer layers of a block.
        num_heads: attention heads; must divide the width.
        ffn_width: width of the feed-forward networks.
        conv_kernel: taps of the depthwise convolutions, odd.
        conv_norm: norm inside the convolution modules: `batch` (the papers), `group` or `layer`.
        positions: `absolute`: sinusoids added once (the papers). `relative`: in every attention.
        front_end: `paper`: power-mel features as released. `fixed`: normalised log-mel features and SpecAugment (ours).
        num_mels: mel bins.
        branches: exits with a parallel branch: `none` (the baseline), `first_last` (Splitformer) or `all`.
        downsample: of the branches: `slice` (Splitformer), `mean` or `softmax`.
        combine: of the branches: `sum` (Splitformer) or `bypass`.
        head: `linear` or `bilstm`.
        lstm_width: width of each direction of a BiLSTM head.
        dropout: rate, in training.
        spec_augment: masks, in training, of the `fixed` front end.

    Raises:
        InputError: a value is out of range.
    """

    vocab_size: int = 256
    width: int = 256
    num_exits: int = 6
    layers_per_exit: int = 2
    num_heads: int = 8
    ffn_width: int = 2048
    conv_kernel: int = 31
    conv_norm: NormKind = "batch"
    positions: Positions = "absolute"
    front_end: FeatureKind = "paper"
    num_mels: int = 80
    branches: Placement = "first_last"
    downsample: Downsample = "slice"
    combine: Combine = "sum"
    head: HeadKind = "linear"
    lstm_width: int = 128
    dropout: float = 0.1
    spec_augment: SpecAugmentConfig = dataclasses.field(default_factory=SpecAugmentConfig)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is int and getattr(self, field.name) < 1:
                raise InputError(
                    f"model.{field.name} is {getattr(self, field.name)}: it must be at least 1"
                )
        for name, kind in (
            ("conv_norm", NormKind),
            ("positions", Positions),
            ("front_end", FeatureKind),
            ("branches", Placement),
            ("downsample", Downsample),
            ("combine", Combine),
            ("head", HeadKind),
        ):
            if getattr(self, name) not in get_args(kind):
                raise InputError(
                    f"model.{name} is {getattr(self, name)!r}: choose {', '.join(get_args(kind))}"
                )
        if self.width % self.num_heads:
            raise InputError(
                f"model.num_heads is {self.num_heads}, which does not divide model.width {self.width}: "
                "change either one"
            )
        if self.width % 2:
            raise InputError(f"model.width is {self.width}: it must be even, for sines and cosines")
        if self.conv_kernel % 2 == 0:
            raise InputError(f"model.conv_kernel is {self.conv_kernel}: it must be odd")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"model.dropout is {self.dropout}: it must be in [0, 1)")

    @classmethod
    def ee_baseline(cls, front_end: FeatureKind = "paper") -> "SplitformerConfig":
        """The early-exit baseline: no branches, 31,536,128 parameters."""
        return cls(branches="none", front_end=front_end)

    @classmethod
    def splitformer(cls, front_end: FeatureKind = "paper") -> "SplitformerConfig":
        """Branches at the first and the last exit, 36,683,264 parameters."""
        return cls(front_end=front_end)

    @classmethod
    def all_exits(cls, front_end: FeatureKind = "paper") -> "SplitformerConfig":
        """A branch at every exit, 46,977,536 parameters."""
        return cls(branches="all", front_end=front_end)

    @classmethod
    def tiny(cls, front_end: FeatureKind = "fixed") -> "SplitformerConfig":
        """Six exits, one layer each, that two CPU cores can train in minutes (ours)."""
        return cls(
            width=96,
            layers_per_exit=1,
            num_heads=4,
            ffn_width=384,
            conv_kernel=15,
            front_end=front_end,
            lstm_width=48,
            dropout=0.0,
            spec_augment=SpecAugmentConfig(frequency_width=12),
        )

    def has_branch(self, index: int) -> bool:
        """Whether the exit of this index, counted from 0, has a parallel branch."""
        ends = (0, self.num_exits - 1)
        return self.branches == "all" or (self.branches == "first_last" and index in ends)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers before each exit, those of branches not counted."""
        return tuple(self.layers_per_exit * m for m in range(1, self.num_exits + 1))

    def num_frames(self, num_samples: int) -> int:
        """Encoder frames of an utterance of so many samples at 16 kHz."""
        return MelSubsampling.num_frames(num_samples, self.front_end)

    @property
    def frame_seconds(self) -> float:
        """Duration of one encoder frame."""
        return 0.04


class ExitOutput(NamedTuple):
    """What an encoder with exits returns.

    Attributes:
        exit_logits: `[b n v]` of every exit, in order, unnormalised.
        lengths: `[b]`, valid frames.
        hidden: the output `[b n d]` of every block, in order.
        embedded: `[b n d]`, input of the first block.
    """

    exit_logits: tuple[Logits, ...]
    lengths: Lengths
    hidden: tuple[Frames, ...]
    embedded: Frames

    @property
    def logits(self) -> Logits:
        """`[b n v]` of the last exit, as in `CTCOutput`."""
        return self.exit_logits[-1]


class ExitBlock(nnx.Module):
    """The Conformer layers before an exit, and the parallel branch if it has one.

    Attributes:
        layers: applied one after another; `layers[i].mixer` is the slot for attention.
        branch: from the block's input to its output, or None.
        execution: how layers and branch are run, see `run_with_branch`; it changes no result.
    """

    def __init__(self, config: SplitformerConfig, has_branch: bool, *, rngs: nnx.Rngs):
        def layer():
            return ConformerLayer(
                config.width,
                config.num_heads,
                config.ffn_width,
                config.conv_kernel,
                dropout_rate=config.dropout,
                conv_norm=config.conv_norm,
                positions=config.positions,
                rngs=rngs,
            )

        self.execution: BranchExecution = "sequential"
        self.layers = nnx.List(layer() for _ in range(config.layers_per_exit))
        self.branch = (
            ParallelBranch(layer(), config.width, config.downsample, config.combine)
            if has_branch
            else None
        )

    def __call__(self, x: Frames, lengths: Lengths, key: Array | None = None) -> Frames:
        """`[b n d], [b] -> [b n d]`; a key means training."""
        if self.branch is not None:
            return run_with_branch(self.layers, self.branch, x, lengths, key, self.execution)
        keys = (None,) * len(self.layers)
        if key is not None:
            # One more than there are layers: a block with a branch gives its layers the same keys.
            keys = tuple(jax.random.split(key, len(keys) + 1)[1:])
        for layer, layer_key in zip(self.layers, keys, strict=True):
            x = layer(x, lengths, layer_key)
        return x


class Splitformer(nnx.Module):
    """Mel front end, blocks of Conformer layers, and a CTC head after every block.

    Attention weights are not dropped in training, as upstream's are; dropout is where the layers have it.

    Attributes:
        blocks: one an exit.
        heads: one an exit, `(x, lengths) -> logits`.
    """

    def __init__(self, config: SplitformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        d = config.width
        self.front_end = MelSubsampling(
            d, config.num_mels, config.front_end, config.spec_augment, rngs=rngs
        )
        self.blocks = nnx.List(
            ExitBlock(config, config.has_branch(index), rngs=rngs)
            for index in range(config.num_exits)
        )
        if config.head == "linear":
            heads = [LinearHead(d, config.vocab_size, rngs=rngs) for _ in self.blocks]
        else:
            heads = [
                BiLSTMHead(d, config.vocab_size, config.lstm_width, rngs=rngs) for _ in self.blocks
            ]
        self.heads = nnx.List(heads)

    def execute_branches(self, execution: BranchExecution) -> None:
        """How every block runs its layers and its branch from now on, see `run_with_branch`; it is not saved.

        Raises:
            InputError: there is no such way.
        """
        if execution not in get_args(BranchExecution):
            raise InputError(
                f"branch execution is {execution!r}: choose {', '.join(get_args(BranchExecution))}"
            )
        for block in self.blocks:
            block.execution = execution

    def embed(
        self, audio: Audio, audio_lengths: Lengths, key: Array | None = None
    ) -> tuple[Frames, Lengths]:
        """Audio to the input of the first block: `[b t], [b] -> [b n d], [b]`.

        Raises:
            InputError: the batch is too short for a frame. A row of it that is too short has 0 frames.
        """
        if self.config.num_frames(audio.shape[1]) == 0:
            raise InputError(
                f"audio of {audio.shape[1]} samples is too short for a single frame: pad the batch, lengths unchanged"
            )
        augment_key, dropout_key = (None, None) if key is None else jax.random.split(key)
        x, lengths = self.front_end(audio, audio_lengths, augment_key)
        if self.config.positions == "absolute":
            x = add_sinusoids(x)
        return dropout(x, self.config.dropout, dropout_key), lengths

    def __call__(
        self, audio: Audio, audio_lengths: Lengths, key: Array | None = None
    ) -> ExitOutput:
        """Audio to the logits of every exit.

        Args:
            audio: `[b t]`, float32 in [-1, 1], 16 kHz.
            audio_lengths: `[b]`, valid samples; what is beyond has no part in the output.
            key: a random key: training, with dropout, SpecAugment (`fixed` front end) and the batch's own statistics
                in batch norms, which then move their running ones. None: inference, where an utterance's output is
                the same alone and in a batch.

        Raises:
            InputError: the batch is too short for a frame. A row of it that is too short has 0 frames.
        """
        return run_exits(self, audio, audio_lengths, key)


def run_exits(
    model: Any, audio: Audio, audio_lengths: Lengths, key: Array | None = None
) -> ExitOutput:
    """The logits of every exit of a model with `embed`, `blocks` and `heads`; a key means training."""
    keys = (None,) * (len(model.blocks) + 1)
    if key is not None:
        keys = tuple(jax.random.split(key, len(keys)))
    embedded, lengths = model.embed(audio, audio_lengths, keys[0])
    x, hidden, logits = embedded, [], []
    for block, head, block_key in zip(model.blocks, model.heads, keys[1:], strict=True):
        x = block(x, lengths, block_key)
        hidden.append(x)
        logits.append(head(x, lengths))
    return ExitOutput(tuple(logits), lengths, tuple(hidden), embedded)
