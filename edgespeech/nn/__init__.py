"""Flax NNX modules, one mechanism a file; the mechanisms are exported here."""

from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.channels_first import ChannelsFirstAttention, ChannelsFirstFeedForward
from edgespeech.nn.conformer import ConformerFeedForward, ConformerLayer, ConvolutionModule
from edgespeech.nn.cross_attention import CrossAttention
from edgespeech.nn.decoder_layer import DecoderLayer, GatedFeedForward
from edgespeech.nn.dual_path import DualPathBlock
from edgespeech.nn.exits import BiLSTMHead, LinearHead
from edgespeech.nn.front_end import LogMelFrontEnd, WaveformFrontEnd
from edgespeech.nn.kept_gates import keep_gates
from edgespeech.nn.lpa import LPA, anneal, harden, set_anneal
from edgespeech.nn.lpa_config import LPAConfig
from edgespeech.nn.masked_norm import MaskedNorm
from edgespeech.nn.mel_subsampling import MelSubsampling
from edgespeech.nn.moonshine_front_end import MoonshineFrontEnd
from edgespeech.nn.norm import LpLayerNorm
from edgespeech.nn.parallel_branch import ParallelBranch
from edgespeech.nn.relative_attention import RelativeSelfAttention
from edgespeech.nn.rotary import RotarySelfAttention
from edgespeech.nn.streaming_lpa import STREAMING_CONFIG, StreamingLPA
from edgespeech.nn.subsampling import Subsampling
from edgespeech.nn.token_mixer_controls import (
    Removed,
    RotarySlidingWindowAttention,
    SlidingWindowAttention,
)
from edgespeech.nn.transformer import ConvPositions, EncoderLayer, FeedForward

__all__ = [
    "LPA",
    "STREAMING_CONFIG",
    "BiLSTMHead",
    "ChannelsFirstAttention",
    "ChannelsFirstFeedForward",
    "ConformerFeedForward",
    "ConformerLayer",
    "ConvPositions",
    "ConvolutionModule",
    "CrossAttention",
    "DecoderLayer",
    "DualPathBlock",
    "EncoderLayer",
    "FeedForward",
    "GatedFeedForward",
    "LPAConfig",
    "LinearHead",
    "LogMelFrontEnd",
    "LpLayerNorm",
    "MaskedNorm",
    "MelSubsampling",
    "MoonshineFrontEnd",
    "ParallelBranch",
    "RelativeSelfAttention",
    "Removed",
    "RotarySelfAttention",
    "RotarySlidingWindowAttention",
    "SelfAttention",
    "SlidingWindowAttention",
    "StreamingLPA",
    "Subsampling",
    "WaveformFrontEnd",
    "anneal",
    "harden",
    "keep_gates",
    "set_anneal",
]
