"""SummaryMixing (Parcollet et al., arXiv 2307.07421): one mean over time instead of attention, a rival of LPA."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import copy_module
from edgespeech.nn.rotary import RotarySelfAttention
from edgespeech.ops.mask import mask_from_lengths, masked_mean, zero_padding
from edgespeech.types import Frames, Lengths


class SummaryMixing(nnx.Module):
    """A local branch and a summary of the whole utterance, combined frame by frame, in O(n).

        f(x) = gelu(W_f x + b_f),   s(x) = gelu(W_v x + b_v)
        y_i  = W_c f(x_i) + W_o mean_j s(x_j) + b_o                    j over the valid frames

    (arXiv 2307.07421, section 2.) `[W_c W_o]` is the combiner on `[f; mean s]`. It is linear here (ours): it learns to
    match the output of an attention, which has no activation.

    Attributes:
        local, v_proj: the linear layers of f and s, `d -> d`.
        combine: W_c, `d -> d` without bias.
        out_proj: W_o and b_o, `d -> d`.
    """

    def __init__(
        self,
        d: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        def linear(use_bias: bool = True) -> nnx.Linear:
            return nnx.Linear(
                d, d, use_bias=use_bias, rngs=rngs, dtype=dtype, param_dtype=param_dtype
            )

        self.local, self.v_proj = linear(), linear()
        self.combine, self.out_proj = linear(use_bias=False), linear()

    @classmethod
    def from_attention(
        cls, attention: SelfAttention | RotarySelfAttention, *, rngs: nnx.Rngs
    ) -> "SummaryMixing":
        """Starts with the attention's value and output projections, copied; missing biases are zero."""
        like = attention.v_proj
        mixer = cls(like.in_features, rngs=rngs, dtype=like.dtype, param_dtype=like.param_dtype)
        for ours, theirs in (
            (mixer.v_proj, attention.v_proj),
            (mixer.out_proj, attention.out_proj),
        ):
            nnx.update(ours, nnx.state(copy_module(theirs)))
        return mixer

    def __call__(self, x: Frames, lengths: Lengths) -> Frames:
        """`[b n d], [b] -> [b n d]`; what lies beyond a length is never seen."""
        mask = mask_from_lengths(lengths, x.shape[1])
        x = zero_padding(x, mask)
        summary = masked_mean(jax.nn.gelu(self.v_proj(x)), mask[..., None], axis=1)
        local = self.combine(jax.nn.gelu(self.local(x)))
        return local + self.out_proj(summary.astype(local.dtype))
